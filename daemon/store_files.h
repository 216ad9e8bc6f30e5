/* Directories and small files of the store, made so that they survive a power cut. Thread: any. */
#ifndef SPURION_STORE_FILES_H
#define SPURION_STORE_FILES_H

#include <stdbool.h>
#include <stddef.h>

#include "spurion/status.h"

/* Makes the directory and its parents when missing (each synced with the one above it). *exists: it holds a RocksDB store.
 * FAILED_PRECONDITION when it holds something else. */
spurion_status store_files_prepare(bool *exists, const char *path) SPURION_MUST_USE;
spurion_status store_files_sync_directory(const char *path) SPURION_MUST_USE;
spurion_status store_files_sync_parent(const char *path) SPURION_MUST_USE;
/* Replaces directory/name: temporary file, sync, rename, sync of the directory. */
spurion_status store_files_replace(const char *directory, const char *name, const char *data, size_t size) SPURION_MUST_USE;
/* Reads at most size - 1 bytes and ends them with NUL; *found false when there is no such file. */
spurion_status store_files_read(bool *found, char *data, size_t size, const char *directory, const char *name) SPURION_MUST_USE;

#endif
