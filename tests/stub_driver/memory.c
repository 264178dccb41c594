/* Device memory of the fake GPU, and the driver's virtual memory management on it.

   Physical memory is one memory file; a handle is a run of its pages. Mapping is mmap of that run, so what is not mapped
   faults when host copies touch it, and contents travel with a handle. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <cuda.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define WINDOW ((size_t)1 << 43) /* addresses, not memory */
#define MAX_RUNS 65536

struct run { /* of addresses, or of physical pages */
    char *address;
    size_t size, offset;
    int kind; /* 0 free entry, 1 allocation, 2 reserved, 3 mapping, 4 pinned host */
    struct handle *handle;
};
struct handle { size_t size, offset; int references; struct handle *next; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *window;
static size_t window_used, used, file_used;
static int file = -1;
static struct run runs[MAX_RUNS];
static int num_runs;
static struct handle *spare; /* released ones, to be used again */

static size_t whole(size_t size) { return (size + FAKE_PAGE - 1) / FAKE_PAGE * FAKE_PAGE; }

size_t fake_total(void) {
    const char *mib = getenv("FAKE_GPU_MIB");
    return (mib ? strtoull(mib, NULL, 10) : 139ull << 10) << 20;
}

size_t fake_used(void) { return used; }

static int open_window(void) {
    if (window) return FAKE_OK;
    char *at = mmap(NULL, WINDOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    file = memfd_create("fake-gpu", MFD_CLOEXEC);
    if (at == MAP_FAILED || file < 0) return FAKE_NO_MEMORY;
    window = (char *)whole((size_t)at);
    return FAKE_OK;
}

static char *take_addresses(size_t size) {
    char *at = window + window_used;
    window_used += whole(size) + FAKE_PAGE; /* a page that is never there between two */
    return window_used < WINDOW - FAKE_PAGE ? at : NULL;
}

static struct run *add(char *address, size_t size, int kind) {
    int i = 0;
    while (i < num_runs && runs[i].kind) i++;
    if (i == MAX_RUNS) return NULL;
    if (i == num_runs) num_runs++;
    runs[i] = (struct run){address, size, 0, kind, NULL};
    return &runs[i];
}

static struct run *find(const void *address, int kind, int anywhere) {
    const char *at = address;
    for (int i = 0; i < num_runs; i++)
        if (runs[i].kind == kind && (at == runs[i].address || (anywhere && at > runs[i].address &&
                                                               at < runs[i].address + runs[i].size)))
            return &runs[i];
    return NULL;
}

static void put_nothing(char *address, size_t size) {
    mmap(address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

int fake_alloc(size_t size, void **address) {
    pthread_mutex_lock(&lock);
    int result = open_window();
    *address = NULL;
    if (!result && used + whole(size) > fake_total()) result = FAKE_NO_MEMORY;
    if (!result && size) {
        char *at = take_addresses(size);
        struct run *run = at ? add(at, whole(size), 1) : NULL;
        if (!run || mprotect(at, whole(size), PROT_READ | PROT_WRITE)) result = FAKE_NO_MEMORY;
        else { used += whole(size); *address = at; }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int fake_free(void *address) {
    if (!address) return FAKE_OK;
    pthread_mutex_lock(&lock);
    struct run *run = find(address, 1, 0);
    if (run) {
        put_nothing(run->address, run->size);
        used -= run->size;
        run->kind = 0;
    }
    pthread_mutex_unlock(&lock);
    return run ? FAKE_OK : FAKE_INVALID;
}

int fake_is_device(const void *address) {
    return window && (const char *)address >= window && (const char *)address < window + window_used;
}

int fake_host_note(void *address, size_t size) {
    pthread_mutex_lock(&lock);
    struct run *run = add(address, size, 4);
    pthread_mutex_unlock(&lock);
    return run ? FAKE_OK : FAKE_NO_MEMORY;
}

int fake_host_forget(void *address) {
    pthread_mutex_lock(&lock);
    struct run *run = find(address, 4, 0);
    if (run) run->kind = 0;
    pthread_mutex_unlock(&lock);
    return run ? FAKE_OK : FAKE_INVALID;
}

int fake_is_pinned(const void *address) {
    pthread_mutex_lock(&lock);
    int found = find(address, 4, 1) != NULL;
    pthread_mutex_unlock(&lock);
    return found;
}

CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
    (void)f;
    if (p->type != CU_MEM_ALLOCATION_TYPE_PINNED || p->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return FAKE_INVALID;
    *size = FAKE_PAGE;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *at, size_t size, size_t align, CUdeviceptr hint, unsigned long long flags) {
    (void)hint;
    if (!size || size % FAKE_PAGE || align > FAKE_PAGE || flags) return FAKE_INVALID;
    pthread_mutex_lock(&lock);
    char *address = open_window() ? NULL : take_addresses(size);
    int ok = address && add(address, size, 2);
    pthread_mutex_unlock(&lock);
    *at = (CUdeviceptr)address;
    return ok ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
    pthread_mutex_lock(&lock);
    struct run *run = find((void *)at, 2, 0);
    int ok = run && run->size == size;
    for (int i = 0; ok && i < num_runs; i++)
        if (runs[i].kind == 3 && runs[i].address >= run->address && runs[i].address < run->address + size) ok = 0;
    if (ok) run->kind = 0;
    pthread_mutex_unlock(&lock);
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *made, size_t size, const CUmemAllocationProp *p,
                     unsigned long long flags) {
    if (!size || size % FAKE_PAGE || flags || p->type != CU_MEM_ALLOCATION_TYPE_PINNED) return FAKE_INVALID;
    pthread_mutex_lock(&lock);
    int result = open_window();
    if (!result && used + size > fake_total()) result = FAKE_NO_MEMORY;
    if (!result) {
        struct handle **at = &spare;
        while (*at && (*at)->size != size) at = &(*at)->next;
        struct handle *handle = *at;
        if (handle) *at = handle->next;
        else {
            handle = calloc(1, sizeof *handle);
            *handle = (struct handle){size, file_used, 0, NULL};
            file_used += size;
            if (ftruncate(file, (off_t)file_used)) result = FAKE_NO_MEMORY;
        }
        handle->references = 1;
        used += size;
        *made = (CUmemGenericAllocationHandle)handle;
    }
    pthread_mutex_unlock(&lock);
    return (CUresult)result;
}

static void drop(struct handle *handle) {
    if (--handle->references) return;
    used -= handle->size;
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)handle->offset, (off_t)handle->size);
    handle->next = spare;
    spare = handle;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    pthread_mutex_lock(&lock);
    drop((struct handle *)handle);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    struct handle *memory = (struct handle *)handle;
    pthread_mutex_lock(&lock);
    struct run *range = find((void *)at, 2, 1);
    int ok = range && !flags && !offset && size == memory->size && at % FAKE_PAGE == 0 &&
             (char *)at + size <= range->address + range->size && !find((void *)at, 3, 1);
    struct run *run = ok ? add((char *)at, size, 3) : NULL;
    if (run) {
        run->handle = memory;
        memory->references++;
        if (mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, file, (off_t)memory->offset) == MAP_FAILED) abort();
    }
    pthread_mutex_unlock(&lock);
    return run ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t count) {
    int ok = count == 1 && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    pthread_mutex_lock(&lock);
    for (CUdeviceptr a = at; ok && a < at + size;) {
        struct run *run = find((void *)a, 3, 0);
        ok = run != NULL;
        if (run) a += run->size;
    }
    if (ok && mprotect((void *)at, size, PROT_READ | PROT_WRITE)) ok = 0;
    pthread_mutex_unlock(&lock);
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
    pthread_mutex_lock(&lock);
    struct run *run = find((void *)at, 3, 0);
    int ok = run && run->size == size; /* a mapping as a whole */
    if (ok) {
        put_nothing(run->address, size);
        drop(run->handle);
        run->kind = 0;
    }
    pthread_mutex_unlock(&lock);
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
