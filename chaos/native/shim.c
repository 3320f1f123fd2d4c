/* Clock and disk faults for one process and its children, by LD_PRELOAD; told by a small file that all of them map.
 *
 * Offset 0: nanoseconds added to the wall clock. 8: milliseconds that each fsync and fdatasync takes longer.
 * 16: the errno that each of them fails with; 0: none. Monotonic clocks are left alone: no machine lets them jump. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *told;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_SHIM");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) told = page;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (result == 0 && told && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = (int64_t)at->tv_sec * 1000000000 + at->tv_nsec + told[0];
        at->tv_sec = ns / 1000000000;
        at->tv_nsec = ns % 1000000000;
    }
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

/* Who waits until a wall time computed it by the bent clock, and the kernel knows the true one only. Conditions that
 * go by the monotonic clock are told apart by their small numbers: no machine has been up for thirty years. */
static struct timespec by_kernel(const struct timespec *until) {
    if (!told || until->tv_sec < 1000000000) return *until;
    int64_t ns = (int64_t)until->tv_sec * 1000000000 + until->tv_nsec - told[0];
    return (struct timespec){ns / 1000000000, ns % 1000000000};
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec at = by_kernel(until);
    return real(cond, mutex, &at);
}

int cnd_timedwait(cnd_t *restrict cond, mtx_t *restrict mutex, const struct timespec *restrict until) {
    static int (*real)(cnd_t *, mtx_t *, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "cnd_timedwait");
    struct timespec at = by_kernel(until);
    return real(cond, mutex, &at);
}

static int sync_as_told(const char *name, int file) {
    if (told && told[1] > 0) {
        struct timespec wait = {told[1] / 1000, told[1] % 1000 * 1000000};
        nanosleep(&wait, NULL);
    }
    if (told && told[2]) {
        errno = (int)told[2];
        return -1;
    }
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    return real(file);
}

int fsync(int file) { return sync_as_told("fsync", file); }
int fdatasync(int file) { return sync_as_told("fdatasync", file); }
