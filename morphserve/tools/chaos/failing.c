/* In front of libc, and does what the file named by MORPHSERVE_CHAOS_SAYS says: see libraries.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define POPULATE_WRITE 23
#define REGION 16384 /* the allocator's own small calls go through */
#define NEXT(name) do { if (!real) real = dlsym(RTLD_NEXT, name); } while (0)

/* Whether the file says `word`; `number` is what follows. System calls only: read and clock_gettime are ours. */
static int says(const char *word, long *number) {
    const char *path = getenv("MORPHSERVE_CHAOS_SAYS");
    char text[64];
    int saved = errno, file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) {
        errno = saved;
        return 0;
    }
    long count = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    errno = saved;
    size_t length = strlen(word);
    text[count > 0 ? count : 0] = 0;
    if (strncmp(text, word, length) || (text[length] != ' ' && text[length] != '\n')) return 0;
    if (number) *number = strtol(text + length, NULL, 10);
    return 1;
}

/* Leave a file beside it: somebody has met what it says. */
static void met(void) {
    char path[4096];
    int saved = errno;
    snprintf(path, sizeof path, "%s.met", getenv("MORPHSERVE_CHAOS_SAYS"));
    syscall(SYS_close, (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    errno = saved;
}

static int refused(void) {
    met();
    errno = ENOMEM;
    return -1;
}

/* One process alone can remove the file. */
static void stop_if(const char *word) {
    const char *path = getenv("MORPHSERVE_CHAOS_SAYS");
    if (says(word, NULL) && unlink(path) == 0) kill(getpid(), SIGSTOP);
}

static int path_of(int file, char *path, size_t size) {
    char link[48];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = readlink(link, path, size - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int is_packed(int file) {
    char path[4096];
    return path_of(file, path, sizeof path) && strstr(path, ".safetensors") != NULL;
}

static int is_cached(int file) {
    const char *cache = getenv("MORPHSERVE_CHAOS_CACHE");
    char path[4096];
    return cache && path_of(file, path, sizeof path) && strncmp(path, cache, strlen(cache)) == 0;
}

static void nap(long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void before_read(int file) {
    long milliseconds = 0;
    int saved = errno;
    if (says("slow-read", &milliseconds)) {
        if (is_packed(file)) {
            met();
            nap(milliseconds);
        }
    } else if (says("hang-read", NULL)) {
        for (; is_packed(file) && says("hang-read", NULL); nap(10)) met();
    } else if (says("stop-read", NULL) && is_packed(file)) {
        stop_if("stop-read");
    }
    errno = saved;
}

ssize_t read(int file, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    NEXT("read");
    if (count >= 512) before_read(file);
    return real(file, buffer, count);
}

ssize_t pread64(int file, void *buffer, size_t count, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    NEXT("pread64");
    before_read(file);
    return real(file, buffer, count, offset);
}

ssize_t write(int file, const void *buffer, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    NEXT("write");
    if (says("no-write", NULL) && is_cached(file)) {
        errno = ENOSPC;
        return -1;
    }
    return real(file, buffer, count);
}

int madvise(void *start, size_t bytes, int advice) {
    static int (*real)(void *, size_t, int);
    NEXT("madvise");
    if (bytes >= REGION && advice == MADV_DONTNEED) {
        stop_if("stop-unmap");
        if (says("no-release", NULL)) return refused();
    }
    if (bytes >= REGION && advice == POPULATE_WRITE) {
        stop_if("stop-map");
        if (says("no-populate", NULL)) return refused();
    }
    return real(start, bytes, advice);
}

/* A layer's tensors. Not Python's own arenas and frames: without those vLLM's code ends wherever it happens to be. */
static int is_refused(size_t bytes, int flags) {
    if (!(flags & MAP_ANONYMOUS) || (flags & (MAP_STACK | MAP_NORESERVE)) || bytes < (1 << 16)) return 0;
    return bytes != (1 << 18) && bytes != (1 << 20) && says("no-mmap", NULL);
}

void *mmap64(void *start, size_t bytes, int protection, int flags, int file, off64_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off64_t);
    NEXT("mmap64");
    if (is_refused(bytes, flags)) {
        refused();
        return MAP_FAILED;
    }
    return real(start, bytes, protection, flags, file, offset);
}

void *mmap(void *start, size_t bytes, int protection, int flags, int file, off_t offset) {
    return mmap64(start, bytes, protection, flags, file, offset);
}

static long shift(void) {
    long seconds = 0;
    return says("clock", &seconds) ? seconds : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    NEXT("clock_gettime");
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *restrict, void *restrict);
    NEXT("gettimeofday");
    int result = real(now, zone);
    if (result == 0) now->tv_sec += shift();
    return result;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
