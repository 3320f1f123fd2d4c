/* Records what a process does to the files below one directory, so that a test can tell what a power loss would leave.
 *
 * Preloaded (LD_PRELOAD). Every call passes through; calls that change files or names below $POWERLOSS_DIR, and syncs,
 * are then appended to $POWERLOSS_LOG in one O_APPEND write each, which gives one order for all processes and threads. A
 * change is logged after it was made, before the caller knows; a sync is logged when it begins and when it ended well,
 * and covers only changes logged before it began. So the log never makes durable what the disk was not asked to keep.
 *
 * A file is known by inode number and birth time: inode numbers are used again. Not seen: writes through mmap (they
 * count as never synced), through stdio streams, and by raw system calls. Compiled by tests/support/powerloss.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    CREATE = 1, WRITE, TRUNCATE, RENAME, UNLINK, LINK, SYNC_BEGIN, SYNC_END, MKDIR, SYNC_ALL_BEGIN, SYNC_ALL_END
};

struct event {
    uint32_t magic, kind, pid, path_bytes, path2_bytes, reserved;
    uint64_t inode, born, offset, data_bytes, stamp;
};

static char root[PATH_MAX];
static size_t root_bytes;
static int log_fd = -1;
static uint64_t syncs;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t real_writev_fd(int fd, const struct iovec *iov, int count) {
    REAL(writev);
    return real(fd, iov, count);
}

static int real_open_path(const char *path, int flags, mode_t mode) {
    REAL(open64);
    return real(path, flags, mode);
}

__attribute__((constructor)) static void start(void) {
    const char *directory = getenv("POWERLOSS_DIR"), *path = getenv("POWERLOSS_LOG");
    if (!directory || !path || !realpath(directory, root)) return;
    root_bytes = strlen(root);
    int fd = real_open_path(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return;
    /* Far from the numbers that programs close in bulk. */
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
    if (log_fd < 0) log_fd = fd;
    else close(fd);
}

static int below_root(const char *path) {
    return root_bytes && !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes]);
}

/* A recording that is wrong would prove what is not so: better no process. */
__attribute__((noreturn)) static void stop(const char *why) {
    fprintf(stderr, "powerloss.so: %s (errno %d): the recording would be wrong, so the process stops\n", why, errno);
    abort();
}

static void emit(int kind, uint64_t inode, uint64_t born, const char *path, const char *path2, uint64_t offset,
                 const struct iovec *data, int data_count, uint64_t data_bytes) {
    int saved = errno;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct event e = {0x534C5750, kind, getpid(), path ? strlen(path) : 0, path2 ? strlen(path2) : 0, 0,
                      inode, born, offset, data_bytes, (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec};
    struct iovec parts[3 + 64];
    int count = 0;
    size_t total = sizeof e + e.path_bytes + e.path2_bytes, left = data_bytes;
    parts[count++] = (struct iovec){&e, sizeof e};
    if (path) parts[count++] = (struct iovec){(void *)path, e.path_bytes};
    if (path2) parts[count++] = (struct iovec){(void *)path2, e.path2_bytes};
    for (int i = 0; i < data_count && left && count < 3 + 64; i++) {
        size_t take = data[i].iov_len < left ? data[i].iov_len : left;
        parts[count++] = (struct iovec){data[i].iov_base, take};
        left -= take;
        total += take;
    }
    if (left || real_writev_fd(log_fd, parts, count) != (ssize_t)total) stop("the recording could not be written");
    errno = saved;
}

/* --- which descriptors are ours: remembered with the identity of the file, since numbers are used again */

#define FDS 4096
static struct { uint64_t inode, device; int ours; } known[FDS];

static int path_of(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return 1;
}

static uint64_t born_of(int fd) {
    struct statx s;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &s) || !(s.stx_mask & STATX_BTIME)) return 0;
    return (uint64_t)s.stx_btime.tv_sec * 1000000000u + s.stx_btime.tv_nsec;
}

static int ours(int fd, struct stat *s) {
    if (log_fd < 0 || fd < 0 || fd == log_fd) return 0;
    int saved = errno, answer = 0;
    if (!fstat(fd, s) && (S_ISREG(s->st_mode) || S_ISDIR(s->st_mode))) {
        if (fd < FDS && known[fd].inode == s->st_ino && known[fd].device == s->st_dev) {
            answer = known[fd].ours;
        } else {
            char path[PATH_MAX];
            answer = path_of(fd, path) && below_root(path);
            if (fd < FDS) {
                known[fd].ours = answer;
                known[fd].inode = s->st_ino;
                known[fd].device = s->st_dev;
            }
        }
    }
    errno = saved;
    return answer;
}

static void wrote(int fd, uint64_t offset, const struct iovec *data, int count, ssize_t bytes) {
    struct stat s;
    if (bytes > 0 && ours(fd, &s)) emit(WRITE, s.st_ino, born_of(fd), 0, 0, offset, data, count, bytes);
}

static void wrote_here(int fd, const struct iovec *data, int count, ssize_t bytes) {
    if (log_fd < 0 || bytes <= 0 || fd == log_fd) return;
    off_t end = lseek(fd, 0, SEEK_CUR);
    if (end >= bytes) wrote(fd, end - bytes, data, count, bytes);
}

/* Bytes that the kernel moved itself: read them back. */
static void copied(int fd, uint64_t offset, ssize_t bytes) {
    struct stat s;
    if (bytes <= 0 || !ours(fd, &s)) return;
    char link[40], *buffer = malloc(bytes);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int readable = real_open_path(link, O_RDONLY | O_CLOEXEC, 0);  /* fd itself may be for writing only */
    if (!buffer || readable < 0 || pread64(readable, buffer, bytes, offset) != bytes)
        stop("moved bytes could not be read back");
    close(readable);
    struct iovec part = {buffer, bytes};
    wrote(fd, offset, &part, 1, bytes);
    free(buffer);
}

ssize_t write(int fd, const void *data, size_t bytes) {
    REAL(write);
    ssize_t n = real(fd, data, bytes);
    struct iovec part = {(void *)data, bytes};
    wrote_here(fd, &part, 1, n);
    return n;
}

ssize_t writev(int fd, const struct iovec *data, int count) {
    REAL(writev);
    ssize_t n = real(fd, data, count);
    wrote_here(fd, data, count, n);
    return n;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t bytes, offset_type offset) { \
        REAL(name); \
        ssize_t n = real(fd, data, bytes, offset); \
        struct iovec part = {(void *)data, bytes}; \
        wrote(fd, offset, &part, 1, n); \
        return n; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define PWRITEV(name, offset_type) \
    ssize_t name(int fd, const struct iovec *data, int count, offset_type offset) { \
        REAL(name); \
        ssize_t n = real(fd, data, count, offset); \
        wrote(fd, offset, data, count, n); \
        return n; \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

#define PWRITEV2(name, offset_type) \
    ssize_t name(int fd, const struct iovec *data, int count, offset_type offset, int flags) { \
        REAL(name); \
        ssize_t n = real(fd, data, count, offset, flags); \
        if (offset == -1) wrote_here(fd, data, count, n); \
        else wrote(fd, offset, data, count, n); \
        return n; \
    }
PWRITEV2(pwritev2, off_t)
PWRITEV2(pwritev64v2, off64_t)

#define SENDFILE(name, offset_type) \
    ssize_t name(int out, int in, offset_type *offset, size_t bytes) { \
        REAL(name); \
        ssize_t n = real(out, in, offset, bytes); \
        if (log_fd >= 0 && n > 0) { \
            int saved = errno; \
            off_t end = lseek(out, 0, SEEK_CUR); \
            if (end >= n) copied(out, end - n, n); \
            errno = saved; \
        } \
        return n; \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t bytes, unsigned flags) {
    REAL(copy_file_range);
    ssize_t n = real(in, in_at, out, out_at, bytes, flags);
    if (log_fd >= 0 && n > 0) copied(out, (out_at ? *out_at : lseek(out, 0, SEEK_CUR)) - n, n);
    return n;
}

static void truncated(int fd, int result, uint64_t size) {
    struct stat s;
    if (!result && ours(fd, &s)) emit(TRUNCATE, s.st_ino, born_of(fd), 0, 0, size, 0, 0, 0);
}

int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    int result = real(fd, size);
    truncated(fd, result, size);
    return result;
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    int result = real(fd, size);
    truncated(fd, result, size);
    return result;
}

#define BY_DESCRIPTOR(path, size) \
    int fd = real_open_path(path, O_WRONLY | O_CLOEXEC, 0); \
    if (fd < 0) return -1; \
    int result = ftruncate64(fd, size); \
    close(fd); \
    return result
int truncate(const char *path, off_t size) { BY_DESCRIPTOR(path, size); }
int truncate64(const char *path, off64_t size) { BY_DESCRIPTOR(path, size); }

/* Allocation changes bytes only by growing the file, or by making holes, which nobody here does. */
static void allocated(int fd, uint64_t end, int keeps_size, int result) {
    struct stat s;
    if (!result && !keeps_size && ours(fd, &s) && (uint64_t)s.st_size == end) truncated(fd, 0, end);
}

#define FALLOCATE(name, offset_type) \
    int name(int fd, int mode, offset_type offset, offset_type bytes) { \
        REAL(name); \
        int result = real(fd, mode, offset, bytes); \
        allocated(fd, offset + bytes, mode & FALLOC_FL_KEEP_SIZE, result); \
        return result; \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

#define POSIX_FALLOCATE(name, offset_type) \
    int name(int fd, offset_type offset, offset_type bytes) { \
        REAL(name); \
        int result = real(fd, offset, bytes); \
        allocated(fd, offset + bytes, 0, result); \
        return result; \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

/* --- syncs */

#define SYNC(name) \
    int name(int fd) { \
        REAL(name); \
        struct stat s; \
        if (!ours(fd, &s)) return real(fd); \
        char path[PATH_MAX] = ""; \
        if (S_ISDIR(s.st_mode)) path_of(fd, path); \
        uint64_t born = born_of(fd), number = __atomic_add_fetch(&syncs, 1, __ATOMIC_RELAXED); \
        emit(SYNC_BEGIN, s.st_ino, born, path, 0, number, 0, 0, 0); \
        int result = real(fd); \
        if (!result) emit(SYNC_END, s.st_ino, born, path, 0, number, 0, 0, 0); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

/* sync_file_range promises nothing after a power loss (its manual says so): it passes through, unrecorded. */

static void everything(int kind, uint64_t number) {
    if (log_fd >= 0) emit(kind, 0, 0, 0, 0, number, 0, 0, 0);
}

void sync(void) {
    REAL(sync);
    uint64_t number = __atomic_add_fetch(&syncs, 1, __ATOMIC_RELAXED);
    everything(SYNC_ALL_BEGIN, number);
    real();
    everything(SYNC_ALL_END, number);
}

int syncfs(int fd) {
    REAL(syncfs);
    uint64_t number = __atomic_add_fetch(&syncs, 1, __ATOMIC_RELAXED);
    everything(SYNC_ALL_BEGIN, number);
    int result = real(fd);
    if (!result) everything(SYNC_ALL_END, number);
    return result;
}

/* --- names */

/* The path as the kernel would name it: the folder resolved, the last part as given. */
static int full_path(int folder, const char *path, char *full) {
    if (log_fd < 0 || !path || !*path) return 0;
    char joined[PATH_MAX * 2], parent[PATH_MAX * 2];
    if (*path == '/') {
        snprintf(joined, sizeof joined, "%s", path);
    } else if (folder == AT_FDCWD) {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(joined, sizeof joined, "%s/%s", here, path);
    } else {
        char here[PATH_MAX];
        if (!path_of(folder, here)) return 0;
        snprintf(joined, sizeof joined, "%s/%s", here, path);
    }
    for (size_t n = strlen(joined); n > 1 && joined[n - 1] == '/'; n--) joined[n - 1] = 0;
    char *slash = strrchr(joined, '/');
    snprintf(parent, sizeof parent, "%.*s", slash == joined ? 1 : (int)(slash - joined), joined);
    char resolved[PATH_MAX];
    if (!realpath(parent, resolved)) return 0;
    return snprintf(full, PATH_MAX, "%s/%s", strcmp(resolved, "/") ? resolved : "", slash + 1) < PATH_MAX;
}

static int named(int folder, const char *path, char *full) {
    int saved = errno, answer = full_path(folder, path, full) && below_root(full);
    errno = saved;
    return answer;
}

static void identity(const char *full, uint64_t *inode, uint64_t *born) {
    int saved = errno;
    struct statx s;
    *inode = *born = 0;
    if (!statx(AT_FDCWD, full, AT_SYMLINK_NOFOLLOW, STATX_BTIME | STATX_INO, &s)) {
        *inode = s.stx_ino;
        if (s.stx_mask & STATX_BTIME) *born = (uint64_t)s.stx_btime.tv_sec * 1000000000u + s.stx_btime.tv_nsec;
    }
    errno = saved;
}

static int real_openat(int folder, const char *path, int flags, mode_t mode) {
    REAL(openat64);
    return real(folder, path, flags, mode);
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int changes = flags & (O_CREAT | O_TRUNC);
    int fd, made = 0;
    if (log_fd < 0 || (flags & O_TMPFILE) == O_TMPFILE || !changes || !named(folder, path, full)) {
        fd = real_openat(folder, path, flags, mode);
        if (fd >= 0 && fd < FDS) known[fd].inode = 0;
        return fd;
    }
    for (;;) {  /* Find out whether it is we who make the file. */
        fd = real_openat(folder, path, flags & ~(O_CREAT | O_EXCL), 0);
        if (fd >= 0 && (flags & O_CREAT) && (flags & O_EXCL)) {
            close(fd);
            errno = EEXIST;
            return -1;
        }
        if (fd >= 0 || errno != ENOENT || !(flags & O_CREAT)) break;
        fd = real_openat(folder, path, flags | O_EXCL, mode);
        made = fd >= 0;
        if (made || errno != EEXIST || (flags & O_EXCL)) break;
    }
    int saved = errno;
    struct stat s;
    if (fd >= 0 && fd < FDS) known[fd].inode = 0;
    if (fd >= 0 && ours(fd, &s) && S_ISREG(s.st_mode)) {
        if (made && path_of(fd, full)) emit(CREATE, s.st_ino, born_of(fd), full, 0, 0, 0, 0, 0);
        else if (flags & O_TRUNC) emit(TRUNCATE, s.st_ino, born_of(fd), 0, 0, 0, 0, 0, 0);
    }
    errno = saved;
    return fd;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(renameat2);
    char source[PATH_MAX], target[PATH_MAX];
    int is_source = named(from_folder, from, source), is_target = named(to_folder, to, target);
    uint64_t inode = 0, born = 0;
    if (is_source) identity(source, &inode, &born);
    int result = real(from_folder, from, to_folder, to, flags);
    if (!result && (is_source || is_target)) {
        if (!is_source || !is_target || flags) stop("a rename into or out of the directory, or an exchange");
        emit(RENAME, inode, born, source, target, 0, 0, 0, 0);
    }
    return result;
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return renameat2(from_folder, from, to_folder, to, 0);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    char full[PATH_MAX];
    int is_ours = named(folder, path, full);
    uint64_t inode = 0, born = 0;
    if (is_ours) identity(full, &inode, &born);
    int result = real(folder, path, flags);
    if (!result && is_ours) emit(UNLINK, inode, born, full, 0, 0, 0, 0, 0);
    return result;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    int result = unlink(path);
    return result && (errno == EISDIR || errno == EPERM) ? rmdir(path) : result;
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(linkat);
    int result = real(from_folder, from, to_folder, to, flags);
    char target[PATH_MAX];
    if (!result && named(to_folder, to, target)) {
        uint64_t inode, born;
        identity(target, &inode, &born);
        emit(LINK, inode, born, target, 0, 0, 0, 0, 0);
    }
    return result;
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    int result = real(folder, path, mode);
    char full[PATH_MAX];
    if (!result && named(folder, path, full)) emit(MKDIR, 0, 0, full, 0, 0, 0, 0, 0);
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
