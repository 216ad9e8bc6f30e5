/* How far the store was synced, in a small file of its own. RocksDB's recovery takes a log that ends early for a torn tail and says
 * nothing; a log cut below what was synced and acknowledged is found by this number. */
#include <inttypes.h>
#include <string.h>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/store_files.h"
#include "daemon/store_internal.h"

#define FILE_NAME "SPURION-SYNCED"
#define INTERVAL_MS 1000

spurion_status store_synced_check(spurion_store *s)
{
    spurion_status st;
    char text[128];
    bool found = false;
    uint64_t expected = 0, sequence = rocksdb_get_latest_sequence_number(s->db);
    unsigned crc = 0;
    int digits = 0;

    SPURION_TRY(st, store_files_read(&found, text, sizeof text, s->path, FILE_NAME));
    if (!found) {
        goto out;
    }
    if (sscanf(text, "%" SCNu64 "%n crc32c %x", &expected, &digits, &crc) != 2 || spurion_crc32c(0, text, (size_t)digits) != crc) {
        spurion_log_warn("STORE-SYNCED", "%s/%s is damaged and not looked at", s->path, FILE_NAME);
        goto out;
    }
    if (sequence < expected) {
        st = store_note(s, spurion_error(SPURION_DATA_LOSS,
                                         "store %s: its log was cut: expected what was acknowledged up to write %" PRIu64
                                         ", found up to %" PRIu64,
                                         s->path, expected, sequence));
    }
out:
    return st;
}

void store_synced_write(spurion_store *s, bool now)
{
    spurion_status st;
    char digits[32], text[64];
    int64_t time = spurion_clock_ms();
    int n, length;

    if (s->unsynced || (!now && time - s->synced_written_ms < INTERVAL_MS)) {
        return;
    }
    s->synced_written_ms = time;
    n = snprintf(digits, sizeof digits, "%" PRIu64, rocksdb_get_latest_sequence_number(s->db));
    length = snprintf(text, sizeof text, "%s crc32c %08x\n", digits, spurion_crc32c(0, digits, (size_t)n));
    st = store_files_replace(s->path, FILE_NAME, text, (size_t)length);
    if (st.code != SPURION_OK) { /* only the check at the next start is weaker */
        spurion_log_warn("STORE-SYNCED", "%s", st.message);
    }
}
