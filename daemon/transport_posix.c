/* A repair of libnng 1.5.2 on unix sockets. It takes EPIPE, which the greeting to a peer that has already closed gives, for NNG_ECLOSED, and
 * that for the end of its own listener: one peer that connects and closes at once, and nobody is ever accepted again (found by
 * tests/e2e/test_run.py). ECONNRESET says the same of the peer and ends that connection alone. The definition here stands in for libc's in
 * the whole process, nng included; what the kernel does is unchanged. Thread: any. Memory: none. */
#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

__attribute__((visibility("default"))) ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    ssize_t n = syscall(SYS_sendmsg, fd, message, flags);

    if (n < 0 && errno == EPIPE) {
        errno = ECONNRESET;
    }
    return n;
}
