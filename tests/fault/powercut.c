/* Power-cut shim, for LD_PRELOAD: writes down what was synced, so that after kill -9 the harness (powercut.py) can throw away what
 * a power cut would have thrown away. kill -9 alone proves nothing about durability: the page cache survives it.
 * SPURION_POWERCUT_LOG   file that gets, for every successful fsync or fdatasync, one line:
 *                        "F dev inode size"  a regular file is safe up to size
 *                        "D dev inode n" and n lines "inode name": a directory's entries are safe
 *                        "U dev inode"       the inode was given back (unlink, rename onto it): what it is next is not safe
 * SPURION_SYNC_FAIL_AT   the n-th sync of the process (from 1) fails with EIO, without syncing; later ones work again
 * Thread: any; one write(2) for each record. It loses no renames, unlinks or overwritten blocks, and ignores msync,
 * sync_file_range. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD_BYTES_MAX (1 << 20)

static atomic_int sync_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -2; /* -2: not opened yet; under lock */
static char record[RECORD_BYTES_MAX];

static void write_record(size_t size)
{
    if (log_fd == -2) {
        const char *path = getenv("SPURION_POWERCUT_LOG");
        log_fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    }
    if (log_fd >= 0 && write(log_fd, record, size) != (ssize_t)size) {
        static const char text[] = "powercut: the log cannot be written\n";
        (void)!write(2, text, sizeof text - 1);
        abort();
    }
}

/* Entries of a directory, as they are now. */
static size_t list_directory(int fd, const struct stat *st)
{
    size_t count = 0, used = 0, head;
    static char entries[RECORD_BYTES_MAX - 128];
    int again = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = again >= 0 ? fdopendir(again) : NULL;
    struct dirent *e;

    while (d && (e = readdir(d)) != NULL) {
        int n = snprintf(entries + used, sizeof entries - used, "%llu %s\n", (unsigned long long)e->d_ino, e->d_name);
        if (n < 0 || (size_t)n >= sizeof entries - used) {
            break;
        }
        used += (size_t)n;
        count++;
    }
    if (d) {
        closedir(d);
    }
    head = (size_t)snprintf(record, sizeof record, "D %llu %llu %zu\n", (unsigned long long)st->st_dev,
                            (unsigned long long)st->st_ino, count);
    memcpy(record + head, entries, used);
    return head + used;
}

static int synced(int (*real)(int), int fd)
{
    const char *fail = getenv("SPURION_SYNC_FAIL_AT");
    struct stat before;
    bool known = fstat(fd, &before) == 0;
    int saved, n = atomic_fetch_add(&sync_count, 1) + 1;

    if (fail && atoi(fail) == n) {
        errno = EIO;
        return -1;
    }
    if (real(fd) != 0) {
        return -1;
    }
    saved = errno;
    pthread_mutex_lock(&lock);
    if (known && S_ISREG(before.st_mode)) { /* the size before the call: what was written during it may not be safe */
        write_record((size_t)snprintf(record, sizeof record, "F %llu %llu %lld\n", (unsigned long long)before.st_dev,
                                      (unsigned long long)before.st_ino, (long long)before.st_size));
    } else if (known && S_ISDIR(before.st_mode)) {
        write_record(list_directory(fd, &before));
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return 0;
}

/* dlsym gives an object pointer; POSIX says it holds a function's. */
static int (*find(const char *name))(int)
{
    int (*f)(int);
    void *p = dlsym(RTLD_NEXT, name);
    memcpy(&f, &p, sizeof f);
    return f;
}

/* The file that the path names, when this is its last name. */
static bool is_last_name(struct stat *st, const char *path)
{
    return lstat(path, st) == 0 && S_ISREG(st->st_mode) && st->st_nlink == 1;
}

static void given_back(const struct stat *st)
{
    pthread_mutex_lock(&lock);
    write_record(
        (size_t)snprintf(record, sizeof record, "U %llu %llu\n", (unsigned long long)st->st_dev, (unsigned long long)st->st_ino));
    pthread_mutex_unlock(&lock);
}

int unlink(const char *path)
{
    int (*real)(const char *);
    void *p = dlsym(RTLD_NEXT, "unlink");
    struct stat st;
    bool last = is_last_name(&st, path);
    memcpy(&real, &p, sizeof real);
    if (last) {
        given_back(&st); /* before: nobody can have the inode yet */
    }
    return real(path);
}

int rename(const char *from, const char *to)
{
    int (*real)(const char *, const char *);
    void *p = dlsym(RTLD_NEXT, "rename");
    struct stat st;
    memcpy(&real, &p, sizeof real);
    if (is_last_name(&st, to)) {
        given_back(&st);
    }
    return real(from, to);
}

int fsync(int fd)
{
    return synced(find("fsync"), fd);
}

int fdatasync(int fd)
{
    return synced(find("fdatasync"), fd);
}
