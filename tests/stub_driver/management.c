/* libnvidia-ml.so.1 of the fake GPU: what is asked to find one device and its properties. */
#include "fake_gpu.h"

#include <stdio.h>
#include <string.h>

typedef int nvmlReturn; /* 0 success, 3 not supported */
typedef void *nvmlDevice;
static char device;

nvmlReturn nvmlInit_v2(void) { return 0; }
nvmlReturn nvmlInit(void) { return 0; } /* torch counts devices with it: otherwise it would initialize CUDA for that */
nvmlReturn nvmlInitWithFlags(unsigned int flags) { (void)flags; return 0; }
nvmlReturn nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(nvmlReturn result) { return result ? "not supported by the stub driver" : "success"; }

static nvmlReturn text(char *to, unsigned int length, const char *value) {
    snprintf(to, length, "%s", value);
    return 0;
}

nvmlReturn nvmlSystemGetDriverVersion(char *to, unsigned int length) { return text(to, length, "580.00.stub"); }
nvmlReturn nvmlSystemGetNVMLVersion(char *to, unsigned int length) { return text(to, length, "13.580.00.stub"); }
nvmlReturn nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = FAKE_DRIVER_VERSION; return 0; }
nvmlReturn nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return 0; }

nvmlReturn nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice *found) {
    *found = &device;
    return index ? 2 : 0;
}

nvmlReturn nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice *found) { (void)uuid; *found = &device; return 0; }
nvmlReturn nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvmlDevice *found) { (void)bus; *found = &device; return 0; }
nvmlReturn nvmlDeviceGetIndex(nvmlDevice d, unsigned int *index) { (void)d; *index = 0; return 0; }
nvmlReturn nvmlDeviceGetName(nvmlDevice d, char *to, unsigned int length) { (void)d; return text(to, length, FAKE_NAME); }

nvmlReturn nvmlDeviceGetUUID(nvmlDevice d, char *to, unsigned int length) {
    (void)d;
    return text(to, length, "GPU-fafafafa-fafa-fafa-fafa-fafafafafafa");
}

nvmlReturn nvmlDeviceGetCudaComputeCapability(nvmlDevice d, int *major, int *minor) {
    (void)d;
    *major = FAKE_MAJOR;
    *minor = FAKE_MINOR;
    return 0;
}

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned int version; unsigned long long total, reserved, free, used; };

nvmlReturn nvmlDeviceGetMemoryInfo(nvmlDevice d, struct memory *memory) {
    (void)d;
    *memory = (struct memory){fake_total(), fake_total() - fake_used(), fake_used()};
    return 0;
}

nvmlReturn nvmlDeviceGetMemoryInfo_v2(nvmlDevice d, struct memory_v2 *memory) {
    (void)d;
    *memory = (struct memory_v2){memory->version, fake_total(), 0, fake_total() - fake_used(), fake_used()};
    return 0;
}

nvmlReturn nvmlDeviceGetNumaNodeId(nvmlDevice d, unsigned int *node) { (void)d; *node = 0; return 3; }

struct pci {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

nvmlReturn nvmlDeviceGetPciInfo_v3(nvmlDevice d, struct pci *pci) {
    (void)d;
    memset(pci, 0, sizeof *pci);
    pci->device_id = 0x233510de;
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "0000:00:00.0");
    return text(pci->bus_id, sizeof pci->bus_id, "00000000:00:00.0");
}
