/* The rest of libcudart.so.13 of the fake GPU: kernels that are registered and launched, captures and graphs. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

typedef struct fake_stream *S;
typedef struct fake_graph *G;

/* Kernels: what the compiler calls for each of them. The name is kept for traces. */
struct kernel { const void *host; const char *name; };
static struct kernel *kernels;
static size_t num_kernels, room;

void **__cudaRegisterFatBinary(void *image) {
    (void)image;
    return calloc(1, sizeof(void *));
}
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterFunction(void **handle, const char *host, char *function, const char *name, int limit, void *thread,
                            void *block, void *block_dim, void *grid_dim, int *warp) {
    (void)handle, (void)function, (void)limit, (void)thread, (void)block, (void)block_dim, (void)grid_dim, (void)warp;
    if (num_kernels == room) {
        room = room ? 2 * room : 4096;
        kernels = realloc(kernels, room * sizeof *kernels);
    }
    kernels[num_kernels++] = (struct kernel){host, name};
}

struct variable { const void *host; size_t size; void *address; };
static struct variable variables[4096];
static size_t num_variables;

void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external, size_t size,
                       int constant, int global) {
    (void)handle, (void)address, (void)name, (void)external, (void)constant, (void)global;
    if (num_variables < sizeof variables / sizeof *variables)
        variables[num_variables++] = (struct variable){host, size, NULL};
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    for (size_t i = 0; i < num_variables; i++)
        if (variables[i].host == symbol) {
            if (!variables[i].address) fake_alloc(variables[i].size, &variables[i].address);
            *address = variables[i].address;
            return cudaSuccess;
        }
    return cudaErrorInvalidSymbol;
}

static const char *name_of(const void *host) {
    if (getenv("FAKE_GPU_TRACE"))
        for (size_t i = 0; i < num_kernels; i++)
            if (kernels[i].host == host) return kernels[i].name;
    return "a registered kernel";
}

static __thread struct { dim3 grid, block; size_t shared; struct CUstream_st *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(struct CUstream_st **)stream = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    (void)grid, (void)block, (void)arguments, (void)shared;
    return (cudaError_t)fake_launch(name_of(k), (S)s);
}
cudaError_t cudaLaunchKernel(const void *k, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    (void)grid, (void)block, (void)arguments, (void)shared;
    return (cudaError_t)fake_launch(name_of(k), (S)s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    (void)arguments;
    return (cudaError_t)fake_launch(name_of(kernel), (S)config->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    (void)kernel;
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 10 * FAKE_MAJOR + FAKE_MINOR;
    found->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
    (void)kernel, (void)attribute, (void)value;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size,
                                                                   size_t shared, unsigned int flags) {
    (void)kernel, (void)size, (void)shared, (void)flags;
    *blocks = 1;
    return cudaSuccess;
}

/* Captures */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return (cudaError_t)fake_capture_begin((S)stream, (int)mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    return (cudaError_t)fake_capture_end((S)stream, (struct fake_graph **)graph);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = fake_capture_id((S)stream, NULL) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *num_dependencies) {
    unsigned long long found = fake_capture_id((S)stream, (struct fake_graph **)graph);
    *status = found ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = found;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (num_dependencies) *num_dependencies = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    *mode = (enum cudaStreamCaptureMode)fake_capture_mode((int)*mode);
    return cudaSuccess;
}

/* Graphs: an instance is a copy. */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    size_t have = fake_graph_size((G)graph);
    if (nodes) memset(nodes, 0, *count * sizeof *nodes);
    *count = have;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    *made = (cudaGraphExec_t)fake_graph_copy((G)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(made, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t graph, cudaStream_t stream) { (void)graph, (void)stream; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    return (cudaError_t)fake_graph_launch((G)graph, (S)stream);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { fake_graph_free((G)graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { fake_graph_free((G)graph); return cudaSuccess; }
