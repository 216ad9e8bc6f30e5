/* Device memory of the CPU backend: the process's own, aligned; large blocks ask for huge pages.
 * A block larger than what the machine could give is refused here, where the number is known, and not by the OOM killer later. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/cpu/cpu.h"

enum { HUGE_PAGE = 2 << 20 };

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

spurion_status spurion_cpu_alloc(spurion_dev *dev, void **out, size_t bytes)
{
    size_t align = bytes >= 2 * (size_t)HUGE_PAGE ? (size_t)HUGE_PAGE : 64;
    size_t left = bytes > (size_t)64 << 20 ? spurion_cpu_memory_free(dev) : 0;
    *out = NULL;
    if (bytes > SIZE_MAX / 2 || (left != 0 && bytes > left)) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cpu: %zu bytes asked, %zu free", bytes, left);
    }
    void *p = aligned_alloc(align, spurion_round_up(bytes == 0 ? 1 : bytes, align));
    if (p == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cpu: no memory for %zu bytes", bytes);
    }
    if (align == (size_t)HUGE_PAGE) {
        (void)madvise(p, spurion_round_up(bytes, align), MADV_HUGEPAGE); /* a wish */
    }
    *out = p;
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
