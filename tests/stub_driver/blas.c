/* libcublas.so.13 of the fake GPU: handles. Every computation is generated (build.py), and computes nothing. */
#include "fake_gpu.h"

#include <stdlib.h>

int cublasCreate_v2(void **handle) {
    *handle = calloc(1, 64);
    return 0;
}
int cublasDestroy_v2(void *handle) {
    free(handle);
    return 0;
}
int cublasGetVersion_v2(void *handle, int *version) {
    (void)handle;
    *version = 130100;
    return 0;
}
int cublasGetMathMode(void *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return 0;
}
int cublasGetPointerMode_v2(void *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return 0;
}
int cublasGemmEx(void) { return fake_launch("cublasGemmEx", NULL); }
