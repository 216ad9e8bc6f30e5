/* Files of the store beside RocksDB's; see store_files.h. */
#include "daemon/store_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static spurion_status failed(const char *what, const char *path)
{
    int e = errno;
    spurion_code code = e == EACCES || e == EPERM ? SPURION_PERMISSION_DENIED
                        : e == ENOSPC             ? SPURION_RESOURCE_EXHAUSTED
                        : e == ENOTDIR            ? SPURION_FAILED_PRECONDITION
                                                  : SPURION_UNAVAILABLE;
    return spurion_error(code, "store %s: %s: %s", path, what, strerror(e));
}

static spurion_status join(char out[PATH_MAX], const char *directory, const char *name)
{
    int n = snprintf(out, PATH_MAX, "%s/%s", directory, name);
    return n > 0 && n < PATH_MAX
               ? spurion_ok()
               : spurion_error(SPURION_INVALID_ARGUMENT, "store: path: expected less than %d bytes, found %d", PATH_MAX, n);
}

spurion_status store_files_sync_directory(const char *path)
{
    spurion_status st = spurion_ok();
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        return failed("opening the directory", path);
    }
    if (fsync(fd) != 0) {
        st = failed("syncing the directory", path);
    }
    close(fd);
    return st;
}

/* "a/b/c" -> "a/b", "c" -> ".", "/c" -> "/"; trailing slashes do not count. */
static spurion_status parent_of(char out[PATH_MAX], const char *path)
{
    size_t n = strlen(path);
    if (n == 0 || n >= PATH_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: path: expected 1 to %d bytes, found %zu", PATH_MAX - 1, n);
    }
    memcpy(out, path, n + 1);
    while (n > 1 && out[n - 1] == '/') {
        n--;
    }
    while (n && out[n - 1] != '/') {
        n--;
    }
    while (n > 1 && out[n - 1] == '/') {
        n--;
    }
    if (n == 0) {
        out[n++] = '.';
    }
    out[n] = '\0';
    return spurion_ok();
}

spurion_status store_files_sync_parent(const char *path)
{
    char parent[PATH_MAX];
    spurion_status st;
    SPURION_TRY(st, parent_of(parent, path));
    SPURION_TRY(st, store_files_sync_directory(parent));
out:
    return st;
}

/* One directory, whose parent exists; synced with it when it is new. */
static spurion_status make_one(const char *path)
{
    spurion_status st;
    if (mkdir(path, 0750) != 0) {
        return errno == EEXIST ? spurion_ok() : failed("making the directory", path);
    }
    SPURION_TRY(st, store_files_sync_directory(path));
    SPURION_TRY(st, store_files_sync_parent(path));
out:
    return st;
}

static spurion_status make_all(const char *path)
{
    char part[PATH_MAX];
    spurion_status st = spurion_ok();
    size_t i, n = strlen(path);

    if (n == 0 || n >= PATH_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: path: expected 1 to %d bytes, found %zu", PATH_MAX - 1, n);
    }
    for (i = 1; i <= n && st.code == SPURION_OK; i++) {
        if (path[i] == '/' || path[i] == '\0') {
            memcpy(part, path, i);
            part[i] = '\0';
            st = make_one(part);
        }
    }
    return st;
}

/* What a directory holds that no store put there, or '\0'. A store whose making was cut short has RocksDB's first files only. */
static spurion_status find_stranger(char name[NAME_MAX + 1], bool *exists, const char *path)
{
    static const char *const ours[] = {"CURRENT",  "IDENTITY", "LOCK",       "LOG",    "MANIFEST-",
                                       "OPTIONS-", "SPURION-", "lost+found", "archive"};
    struct dirent *e;
    DIR *d = opendir(path);

    name[0] = '\0';
    *exists = false;
    if (!d) {
        return failed("reading the directory", path);
    }
    while ((e = readdir(d)) != NULL) {
        size_t i, known = sizeof ours / sizeof *ours, n = strlen(e->d_name);
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) {
            continue;
        }
        *exists = *exists || strcmp(e->d_name, "CURRENT") == 0;
        for (i = 0; i < known && strncmp(e->d_name, ours[i], strlen(ours[i])) != 0; i++) {
        }
        if (i == known && !(n > 4 && (strcmp(e->d_name + n - 4, ".log") == 0 || strcmp(e->d_name + n - 4, ".sst") == 0 ||
                                      strcmp(e->d_name + n - 4, "btmp") == 0))) {
            (void)snprintf(name, NAME_MAX + 1, "%s", e->d_name);
        }
    }
    closedir(d);
    return spurion_ok();
}

spurion_status store_files_prepare(bool *exists, const char *path)
{
    spurion_status st;
    char stranger[NAME_MAX + 1];

    SPURION_TRY(st, make_all(path));
    SPURION_TRY(st, find_stranger(stranger, exists, path));
    if (!*exists && stranger[0]) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "store %s: expected an empty directory or a store, found %s", path,
                           stranger);
    }
out:
    return st;
}

static spurion_status write_synced(const char *path, const char *data, size_t size)
{
    spurion_status st = spurion_ok();
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (fd < 0) {
        return failed("making a file", path);
    }
    if (write(fd, data, size) != (ssize_t)size || fsync(fd) != 0) {
        st = failed("writing a file", path);
    }
    close(fd);
    return st;
}

spurion_status store_files_replace(const char *directory, const char *name, const char *data, size_t size)
{
    char path[PATH_MAX], temporary[PATH_MAX];
    spurion_status st;

    SPURION_TRY(st, join(path, directory, name));
    if (snprintf(temporary, sizeof temporary, "%s.new", path) >= (int)sizeof temporary) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: path of over %d bytes", PATH_MAX - 5);
    }
    SPURION_TRY(st, write_synced(temporary, data, size));
    if (rename(temporary, path) != 0) {
        st = failed("renaming a file", path);
        goto out;
    }
    SPURION_TRY(st, store_files_sync_directory(directory));
out:
    return st;
}

spurion_status store_files_read(bool *found, char *data, size_t size, const char *directory, const char *name)
{
    char path[PATH_MAX];
    spurion_status st;
    ssize_t n;
    int fd;

    *found = false;
    SPURION_TRY(st, join(path, directory, name));
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return errno == ENOENT ? spurion_ok() : failed("opening a file", path);
    }
    n = read(fd, data, size - 1);
    if (n < 0) {
        st = failed("reading a file", path);
    } else {
        data[n] = '\0';
        *found = true;
    }
    close(fd);
out:
    return st;
}
