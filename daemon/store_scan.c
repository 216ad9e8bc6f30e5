/* Range scans over one column family; see store_internal.h. */
#include <string.h>

#include "daemon/store_internal.h"

void store_scan_prefix(store_scan *scan, const store_key *prefix)
{
    scan->lower = *prefix;
    scan->upper = *prefix;
    store_key_successor(&scan->upper);
}

void store_scan_init(store_scan *scan, spurion_store *s, store_family family, bool descending, const rocksdb_snapshot_t *snapshot,
                     spurion_bytes after)
{
    scan->store = s;
    scan->descending = descending;
    scan->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(scan->read, 1);
    rocksdb_readoptions_set_iterate_lower_bound(scan->read, (const char *)scan->lower.data, scan->lower.size);
    rocksdb_readoptions_set_iterate_upper_bound(scan->read, (const char *)scan->upper.data, scan->upper.size);
    if (snapshot) {
        rocksdb_readoptions_set_snapshot(scan->read, snapshot);
    }
    scan->it = rocksdb_create_iterator_cf(s->db, scan->read, s->families[family]);
    if (after.size == 0) {
        if (descending) {
            rocksdb_iter_seek_to_last(scan->it);
        } else {
            rocksdb_iter_seek_to_first(scan->it);
        }
        return;
    }
    if (descending) {
        rocksdb_iter_seek_for_prev(scan->it, after.data, after.size);
    } else {
        rocksdb_iter_seek(scan->it, after.data, after.size);
    }
    if (store_scan_valid(scan)) {
        spurion_bytes key = store_scan_key(scan);
        if (key.size == after.size && memcmp(key.data, after.data, key.size) == 0) {
            store_scan_move(scan);
        }
    }
}

bool store_scan_valid(const store_scan *scan)
{
    return rocksdb_iter_valid(scan->it) != 0;
}

void store_scan_move(store_scan *scan)
{
    if (scan->descending) {
        rocksdb_iter_prev(scan->it);
    } else {
        rocksdb_iter_next(scan->it);
    }
}

spurion_bytes store_scan_key(const store_scan *scan)
{
    spurion_bytes b;
    b.data = rocksdb_iter_key(scan->it, &b.size);
    return b;
}

spurion_bytes store_scan_value(const store_scan *scan)
{
    spurion_bytes b;
    b.data = rocksdb_iter_value(scan->it, &b.size);
    return b;
}

spurion_status store_scan_status(store_scan *scan)
{
    char *message = NULL;
    rocksdb_iter_get_error(scan->it, &message);
    return message ? store_error(scan->store, message, "scan") : spurion_ok();
}

void store_scan_fini(store_scan *scan)
{
    if (scan->it) {
        rocksdb_iter_destroy(scan->it);
        rocksdb_readoptions_destroy(scan->read);
        scan->it = NULL;
    }
}
