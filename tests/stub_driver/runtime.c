/* libcudart.so.13 of the fake GPU, on top of the stub libcuda.so.1. Functions of the real library that are not here are
   generated (build.py) and answer cudaErrorNotSupported. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct fake_stream *S;
typedef struct fake_event *E;
static __thread cudaError_t last_error;
static __thread int attached; /* as the runtime does: the first call of a thread makes the primary context current */

static cudaError_t done(int result) {
    if (result) last_error = (cudaError_t)result;
    return (cudaError_t)result;
}

static void attach(void) {
    CUcontext context, now;
    if (attached) return;
    attached = 1;
    cuCtxGetCurrent(&now);
    if (now) return;
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxSetCurrent(context);
}

/* Devices */
cudaError_t cudaGetDeviceCount(int *count) { return done(cuDeviceGetCount(count)); }
cudaError_t cudaGetDevice(int *device) { attach(); *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { attach(); return done(device ? cudaErrorInvalidDevice : 0); }
cudaError_t cudaDriverGetVersion(int *version) { return done(cuDriverGetVersion(version)); }
cudaError_t cudaRuntimeGetVersion(int *version) { return done(cuDriverGetVersion(version)); }
cudaError_t cudaDeviceSynchronize(void) { return done(fake_check_unsafe("cudaDeviceSynchronize")); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = a != b; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    return done(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device));
}
cudaError_t cudaDeviceGetPCIBusId(char *bus, int length, int device) {
    snprintf(bus, (size_t)length, "0000:00:%02x.0", device);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

static int attribute(CUdevice_attribute which) {
    int value;
    cuDeviceGetAttribute(&value, which, 0);
    return value;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", FAKE_NAME);
    memset(&p->uuid, 0xfa, sizeof p->uuid);
    p->totalGlobalMem = fake_total();
    p->sharedMemPerBlock = (size_t)attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
    p->sharedMemPerBlockOptin = (size_t)attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    p->sharedMemPerMultiprocessor = (size_t)attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    p->regsPerBlock = p->regsPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
    p->warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
    p->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i);
        p->maxGridSize[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i);
    }
    p->major = FAKE_MAJOR;
    p->minor = FAKE_MINOR;
    p->textureAlignment = 512;
    p->multiProcessorCount = FAKE_SMS;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
    p->streamPrioritiesSupported = p->canUseHostPointerForRegisteredMem = 1;
    p->asyncEngineCount = attribute(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
    p->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
    p->l2CacheSize = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
    p->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
    p->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
    return done(device ? cudaErrorInvalidDevice : 0);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    CUdriverProcAddressQueryResult found;
    int result = cuGetProcAddress(symbol, function, (int)version, flags, &found);
    if (status) *status = result ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* Errors */
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) { return error ? "an error of the stub driver" : "no error"; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaError (stub driver)" : "cudaSuccess"; }

/* Memory */
cudaError_t cudaMalloc(void **address, size_t size) {
    attach();
    int result = fake_check_unsafe("cudaMalloc");
    return done(result ? result : fake_alloc(size, address));
}
cudaError_t cudaFree(void *address) {
    attach();
    int result = address ? fake_check_unsafe("cudaFree") : 0;
    return done(result ? result : fake_free(address));
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { return done(cuMemGetInfo(free_bytes, total)); }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned int flags) {
    (void)flags;
    *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    return done(fake_host_note(*address, size));
}
cudaError_t cudaFreeHost(void *address) {
    int result = fake_host_forget(address);
    if (!result) free(address);
    return done(result);
}
cudaError_t cudaHostRegister(void *address, size_t size, unsigned int flags) {
    (void)flags;
    return done(fake_host_note(address, size));
}
cudaError_t cudaHostUnregister(void *address) { return done(fake_host_forget(address)); }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned int flags) {
    (void)flags;
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    memset(found, 0, sizeof *found);
    found->type = fake_is_device(address)   ? cudaMemoryTypeDevice
                  : fake_is_pinned(address) ? cudaMemoryTypeHost
                                            : cudaMemoryTypeUnregistered;
    found->devicePointer = found->type == cudaMemoryTypeUnregistered ? NULL : (void *)address;
    found->hostPointer = found->type == cudaMemoryTypeDevice ? NULL : (void *)address;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    return done(fake_copy(to, from, size, (S)stream));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    (void)kind;
    return done(fake_copy(to, from, size, NULL));
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
    (void)a, (void)b;
    return done(fake_copy(to, from, size, (S)stream));
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    for (size_t i = 0; i < rows; i++)
        fake_copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, (S)stream);
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind k) {
    (void)symbol, (void)from, (void)size, (void)offset, (void)k; /* no kernel would read it */
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return done(fake_fill(to, (uint32_t)value, 1, size, (S)stream));
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return done(fake_fill(to, (uint32_t)value, 1, size, NULL)); }

/* Streams and events */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority) {
    (void)flags;
    *stream = (cudaStream_t)fake_stream_new(priority);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { fake_stream_free((S)stream); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = fake_stream_priority((S)stream);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) { (void)s; return done(fake_check_unsafe("cudaStreamQuery")); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { (void)s; return done(fake_check_unsafe("cudaStreamSynchronize")); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
    (void)flags;
    return done(fake_event_wait((E)event, (S)stream));
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    return done(fake_call(function, data, (S)stream));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    (void)flags;
    *event = (cudaEvent_t)fake_event_new();
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { fake_event_free((E)event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) { return done(fake_event_record((E)event, (S)s)); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
    (void)flags;
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t e) { (void)e; return done(fake_check_unsafe("cudaEventQuery")); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { (void)e; return done(fake_check_unsafe("cudaEventSynchronize")); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = (float)(fake_event_ms((E)end) - fake_event_ms((E)start));
    return cudaSuccess;
}
