// A library for LD_PRELOAD: the call of FAIL_CALL that is number FAIL_AT fails, with FAIL_ERRNO, or
// with FAIL_SHORT=1 does a part of its work (read and write). The file FAIL_REPORT is made when
// that happens. Used by faults.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;
static bool started;               // before that the loader allocates

__attribute__((constructor)) static void start(void) { started = true; }

// Is this the call that fails?
static bool fails(const char *name) {
    const char *wanted = getenv("FAIL_CALL"), *at = getenv("FAIL_AT");
    if (!wanted || !at || strcmp(wanted, name) != 0) return false;
    if (atomic_fetch_add(&calls, 1) + 1 != atol(at)) return false;
    const char *report = getenv("FAIL_REPORT");
    long fd = syscall(SYS_openat, AT_FDCWD, report, O_CREAT | O_WRONLY, 0600);
    if (fd >= 0) syscall(SYS_close, fd);
    errno = atoi(getenv("FAIL_ERRNO"));
    return true;
}

static bool is_short(void) { return getenv("FAIL_SHORT") != NULL; }

// The next definition of a function, which is the C library's.
#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))

// glibc's own names: to look these up with dlsym would allocate.
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);

void *malloc(size_t n) { return started && fails("alloc") ? NULL : __libc_malloc(n); }

void *calloc(size_t n, size_t size) {
    return started && fails("alloc") ? NULL : __libc_calloc(n, size);
}

void *aligned_alloc(size_t alignment, size_t n) {
    if (fails("alloc")) return NULL;
    return REAL(void *(*)(size_t, size_t), "aligned_alloc")(alignment, n);
}

void *realloc(void *p, size_t n) {
    if (fails("alloc")) return NULL;
    return REAL(void *(*)(void *, size_t), "realloc")(p, n);
}

int open(const char *name, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (fails("open")) return -1;
    return REAL(int (*)(const char *, int, ...), "open")(name, flags, mode);
}

ssize_t read(int fd, void *data, size_t n) {
    if (fails("read")) {
        if (!is_short()) return -1;
        n = n ? 1 : 0;
    }
    return syscall(SYS_read, fd, data, n);
}

ssize_t write(int fd, const void *data, size_t n) {
    if (fd != STDERR_FILENO && fails("write")) {
        if (!is_short()) return -1;
        n = n ? 1 : 0;
    }
    return syscall(SYS_write, fd, data, n);
}

void *mmap(void *at, size_t n, int rights, int flags, int fd, off_t offset) {
    if (fails("mmap")) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, rights, flags, fd, offset);
}

int mprotect(void *at, size_t n, int rights) {
    if (fails("mprotect")) return -1;
    return (int)syscall(SYS_mprotect, at, n, rights);
}

int rename(const char *from, const char *to) {
    if (fails("rename")) return -1;
    return (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int fsync(int fd) {
    if (fails("fsync")) return -1;
    return (int)syscall(SYS_fsync, fd);
}

int poll(struct pollfd *fds, nfds_t n, int timeout) {
    if (fails("poll")) return -1;
    return REAL(int (*)(struct pollfd *, nfds_t, int), "poll")(fds, n, timeout);
}

int pipe(int ends[2]) {
    if (fails("pipe")) return -1;
    return (int)syscall(SYS_pipe2, ends, 0);
}

int getentropy(void *data, size_t n) {
    if (fails("getentropy")) return -1;
    return syscall(SYS_getrandom, data, n, 0) == (ssize_t)n ? 0 : -1;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                   void *arg) {
    if (fails("pthread_create")) return errno;
    return REAL(int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *),
                "pthread_create")(thread, attributes, run, arg);
}
