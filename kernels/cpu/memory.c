/* Device memory of the CPU backend: the process's own, aligned; large blocks ask for huge pages, spread over the machine's memory nodes.
 * A block larger than what the machine could give is refused here, where the number is known, and not by the OOM killer later. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

enum { HUGE_PAGE = 2 << 20, INTERLEAVE = 3 /* MPOL_INTERLEAVE of linux/mempolicy.h */ };

/* MemAvailable, bytes; 0: unknown. */
static size_t machine_free(void)
{
    size_t kib = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "re");
    if (f == NULL) {
        return 0;
    }
    while (fgets(line, sizeof line, f) != NULL && sscanf(line, "MemAvailable: %zu kB", &kib) != 1) {
    }
    fclose(f);
    return kib * 1024;
}

static bool read_number(size_t *out, const char *path)
{
    FILE *f = fopen(path, "re");
    bool ok = f != NULL && fscanf(f, "%zu", out) == 1;
    if (f != NULL) {
        fclose(f);
    }
    return ok;
}

/* What a container's limit (cgroup v2, seen from inside) leaves; SIZE_MAX: no limit. */
static size_t container_free(void)
{
    size_t limit, used;
    if (!read_number(&limit, "/sys/fs/cgroup/memory.max") || !read_number(&used, "/sys/fs/cgroup/memory.current")) {
        return SIZE_MAX;
    }
    return limit > used ? limit - used : 0;
}

size_t spurion_cpu_memory_free(spurion_dev *dev)
{
    (void)dev;
    size_t machine = machine_free(), container = container_free();
    return machine < container ? machine : container;
}

uint64_t spurion_cpu_nodes(const char *list)
{
    uint64_t nodes = 0;
    for (const char *at = list; *at >= '0' && *at <= '9';) {
        char *end;
        unsigned long first = strtoul(at, &end, 10), last = *end == '-' ? strtoul(end + 1, &end, 10) : first;
        for (unsigned long n = first; n <= last && n < 64; n++) {
            nodes |= (uint64_t)1 << n;
        }
        at = *end == ',' ? end + 1 : end;
    }
    return nodes;
}

bool spurion_cpu_spread(void *p, size_t bytes, uint64_t nodes)
{
    return syscall(SYS_mbind, p, bytes, INTERLEAVE, &nodes, (unsigned long)64, 0U) == 0;
}

/* Memory nodes of the machine; 0: unknown. */
static uint64_t machine_nodes(void)
{
    char line[256] = "";
    FILE *f = fopen("/sys/devices/system/node/has_memory", "re");
    if (f != NULL) {
        (void)!fgets(line, sizeof line, f);
        fclose(f);
    }
    return spurion_cpu_nodes(line);
}

void *spurion_cpu_block(size_t bytes)
{
    size_t align = bytes >= 2 * (size_t)HUGE_PAGE ? (size_t)HUGE_PAGE : 64, whole = spurion_round_up(bytes == 0 ? 1 : bytes, align);
    void *p = aligned_alloc(align, whole);
    if (p != NULL && align == (size_t)HUGE_PAGE) { /* wishes both: a container may forbid them */
        uint64_t nodes = machine_nodes();
        (void)madvise(p, whole, MADV_HUGEPAGE);
        if ((nodes & (nodes - 1)) != 0) {
            (void)spurion_cpu_spread(p, whole, nodes);
        }
    }
    return p;
}

spurion_status spurion_cpu_alloc(spurion_dev *dev, void **out, size_t bytes)
{
    size_t left = bytes > (size_t)64 << 20 ? spurion_cpu_memory_free(dev) : 0;
    *out = NULL;
    if (bytes > SIZE_MAX / 2 || (left != 0 && bytes > left)) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cpu: %zu bytes asked, %zu free", bytes, left);
    }
    *out = spurion_cpu_block(bytes);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cpu: no memory for %zu bytes", bytes);
    }
    return spurion_ok();
}

void spurion_cpu_free(spurion_dev *dev, void *p)
{
    (void)dev;
    free(p);
}

/* Bytes set to 0 (in NULL) or copied, in parts that all workers share. */
typedef struct move_job {
    char *out;
    const char *in;
    size_t bytes;
} move_job;

enum { MOVE_BYTES = 256 << 10 };

static void move_item(void *context, int64_t item, int worker)
{
    const move_job *j = context;
    size_t at = (size_t)item * MOVE_BYTES, n = j->bytes - at < MOVE_BYTES ? j->bytes - at : MOVE_BYTES;
    (void)worker;
    if (j->in == NULL) {
        memset(j->out + at, 0, n);
    } else {
        memcpy(j->out + at, j->in + at, n);
    }
}

static spurion_status move(spurion_dev *dev, void *out, const void *in, size_t bytes)
{
    double start = spurion_cpu_now();
    move_job job = {out, in, bytes};
    spurion_pool_run(spurion_cpu_of(dev)->pool, move_item, &job, (int64_t)((bytes + MOVE_BYTES - 1) / MOVE_BYTES));
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, 0, (in == NULL ? 1.0 : 2.0) * (double)bytes);
    return spurion_ok();
}

spurion_status spurion_cpu_upload(spurion_dev *dev, void *out, const void *host, size_t bytes)
{
    return move(dev, out, host, bytes);
}

spurion_status spurion_cpu_download(spurion_dev *dev, void *host, const void *in, size_t bytes)
{
    return move(dev, host, in, bytes);
}

spurion_status spurion_cpu_download_later(spurion_dev *dev, void *host, const void *in, size_t bytes)
{
    return move(dev, host, in, bytes);
}

/* Zeroed, and by that resident. */
spurion_status spurion_cpu_host_alloc(spurion_dev *dev, void **out, size_t bytes)
{
    spurion_status st = spurion_cpu_alloc(dev, out, bytes);
    if (st.code == SPURION_OK) {
        memset(*out, 0, bytes);
    }
    return st;
}

void spurion_cpu_host_free(spurion_dev *dev, void *p)
{
    spurion_cpu_free(dev, p);
}

spurion_status spurion_cpu_copy(spurion_dev *dev, void *out, const void *in, size_t bytes)
{
    return move(dev, out, in, bytes);
}

spurion_status spurion_cpu_zero(spurion_dev *dev, void *out, size_t bytes)
{
    return move(dev, out, NULL, bytes);
}

spurion_status spurion_cpu_sync(spurion_dev *dev)
{
    (void)dev;
    return spurion_ok();
}
