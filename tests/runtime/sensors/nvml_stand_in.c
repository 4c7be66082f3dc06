/* A stand-in for the NVIDIA driver's libnvidia-ml.so.1, which the tests compile and nvidia-ml-py loads by its own path.
 *
 * It answers like one GPU; environment variables, read at every call, change its mind:
 *   NVML_INIT            error code of nvmlInitWithFlags (9: driver not loaded)
 *   NVML_COUNT           number of GPUs (default 1)
 *   NVML_UNSUPPORTED     comma-separated names of functions that answer NOT_SUPPORTED, or "all"
 *   NVML_LOST            every question about a GPU answers GPU_IS_LOST
 *   NVML_HANG            a power reading does not come back for 30 s
 *   NVML_POWER_MW, NVML_ENERGY_MJ, NVML_CELSIUS, NVML_BUSY, NVML_REASONS   values
 *   NVML_PID             the process that uses the GPU: "self" or a number; 70 % and 50 % of it in two samples
 *   NVML_AGO_MS          its samples are older by so much
 *   NVML_UNPLACED        questions about the place on the PCI bus answer GPU_IS_LOST
 *   NVML_QUIET           it has not used the GPU lately: no samples
 * NVML_OLD_DRIVER at compile time leaves out what drivers before 510 do not export.
 * Layouts and codes are those of nvml.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

typedef void *nvmlDevice;
typedef struct { unsigned gpu, memory; } nvmlUtilization;
typedef struct { unsigned long long total, free, used; } nvmlMemory;
typedef struct { unsigned pid; unsigned long long usedGpuMemory; unsigned gpuInstanceId, computeInstanceId; } nvmlProcessInfo;
typedef struct { unsigned pid; unsigned long long timeStamp; unsigned smUtil, memUtil, encUtil, decUtil; } nvmlProcessSample;

static int opened = 0; /* counted, as the driver's library does */

static unsigned long long value(const char *name, unsigned long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

static int refusal(const char *function, nvmlDevice device) {
    const char *list = getenv("NVML_UNSUPPORTED");
    if (!opened) return 1; /* UNINITIALIZED */
    if (!device) return 2; /* INVALID_ARGUMENT */
    if (getenv("NVML_LOST")) return GPU_IS_LOST;
    if (list && (strcmp(list, "all") == 0 || strstr(list, function))) return NOT_SUPPORTED;
    return SUCCESS;
}

static unsigned user_pid(void) {
    const char *text = getenv("NVML_PID");
    if (!text) return 0;
    return strcmp(text, "self") == 0 ? (unsigned)getpid() : (unsigned)strtoul(text, NULL, 10);
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = (int)value("NVML_INIT", SUCCESS);
    if (code == SUCCESS) opened++;
    return code;
}

int nvmlShutdown(void) {
    opened--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case GPU_IS_LOST: return "GPU is lost";
        case 9: return "Driver Not Loaded";
        default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    strncpy(version, "580.00", length);
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)value("NVML_COUNT", 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice *device) {
    if (value("NVML_UNOPENED", 99) == index) return GPU_IS_LOST;
    *device = (nvmlDevice)(size_t)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetName(nvmlDevice device, char *name, unsigned length) {
    (void)device;
    strncpy(name, "Stand-in GPU", length);
    return SUCCESS;
}

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo;

/* The first GPU is on bus 0x64, the second on 0x65, ...: NVML counts in the order of the bus. */
int nvmlDeviceGetPciInfo_v3(nvmlDevice device, nvmlPciInfo *info) {
    if (getenv("NVML_UNPLACED")) return GPU_IS_LOST;
    snprintf(info->busId, sizeof info->busId, "00000000:%02X:00.0", 0x63 + (unsigned)(size_t)device);
    return refusal("PciInfo", device);
}

int nvmlDeviceGetPowerUsage(nvmlDevice device, unsigned *milliwatts) {
    if (getenv("NVML_HANG")) sleep(30);
    *milliwatts = (unsigned)value("NVML_POWER_MW", 61500) * (unsigned)(size_t)device;
    return refusal("PowerUsage", device);
}

int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice device, unsigned long long *millijoules) {
    *millijoules = value("NVML_ENERGY_MJ", 1234567);
    return refusal("TotalEnergyConsumption", device);
}

int nvmlDeviceGetUtilizationRates(nvmlDevice device, nvmlUtilization *rates) {
    rates->gpu = (unsigned)value("NVML_BUSY", 85);
    rates->memory = 40;
    return refusal("UtilizationRates", device);
}

int nvmlDeviceGetTemperature(nvmlDevice device, unsigned sensor, unsigned *celsius) {
    if (sensor != 0) return 2; /* INVALID_ARGUMENT: there is one sensor, the GPU's */
    *celsius = (unsigned)value("NVML_CELSIUS", 67);
    return refusal("Temperature", device);
}

int nvmlDeviceGetMemoryInfo(nvmlDevice device, nvmlMemory *memory) {
    memory->total = 8ull << 30;
    memory->used = 3ull << 30;
    memory->free = 5ull << 30;
    return refusal("MemoryInfo", device);
}

static int clock_reasons(nvmlDevice device, unsigned long long *reasons) {
    *reasons = value("NVML_REASONS", 0x1); /* idle */
    return refusal("ClocksEventReasons", device);
}

#ifndef NVML_OLD_DRIVER
int nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice device, unsigned long long *reasons) {
    return clock_reasons(device, reasons);
}
#else
int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice device, unsigned long long *reasons) {
    return clock_reasons(device, reasons);
}
#endif

#ifndef NVML_OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice device, unsigned *count, nvmlProcessInfo *infos) {
    int code = refusal("ComputeRunningProcesses", device);
    unsigned users = user_pid() ? 1 : 0;
    if (code != SUCCESS) return code;
    if (*count < users) {
        *count = users;
        return INSUFFICIENT_SIZE;
    }
    *count = users;
    if (users) infos[0] = (nvmlProcessInfo){user_pid(), 1ull << 30, ~0u, ~0u};
    return SUCCESS;
}
#endif

/* Samples of 0.6 s and 0.1 s ago (more by NVML_AGO_MS), in µs of the time of day; those up to ``since`` are left out. */
int nvmlDeviceGetProcessUtilization(nvmlDevice device, nvmlProcessSample *samples, unsigned *count,
                                    unsigned long long since) {
    int code = refusal("ProcessUtilization", device);
    unsigned pid = user_pid();
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long end = now.tv_sec * 1000000ull + now.tv_nsec / 1000 - 100000ull - 1000ull * value("NVML_AGO_MS", 0);
    nvmlProcessSample all[] = {{pid, end - 500000ull, 70, 0, 0, 0}, {pid, end, 50, 0, 0, 0}};
    unsigned fresh = 0;
    if (code != SUCCESS) return code;
    if (!pid || getenv("NVML_QUIET")) return NOT_FOUND;
    if (!samples) {
        *count = 2;
        return INSUFFICIENT_SIZE;
    }
    for (unsigned i = 0; i < 2; i++)
        if (all[i].timeStamp > since) samples[fresh++] = all[i];
    *count = fresh;
    return fresh ? SUCCESS : NOT_FOUND;
}
