/* A stand-in for NVIDIA's CUDA runtime: the functions that balcony_runtime/backends/accelerator/cuda.py calls, with their names, parameters
 * and error codes. Memory lies on the host. Tests compile it; runtime.py puts it in the place of cuda.bindings.runtime.
 *
 * Why not a stand-in for the driver (libcuda.so.1), below the real bindings? cuda.bindings 13.4 links the CUDA runtime statically.
 * That runtime opens libcuda.so.1, asks cuGetProcAddress for 480 functions and then cuGetExportTable for two tables of functions
 * (6bd5fb6c-5bf4-e74a-8987-d93912fd9df9 among them). Without them every call returns cudaErrorSymbolNotFound. NVIDIA documents
 * neither their layout nor their contents, and its licence forbids reverse engineering.
 *
 * It is as unhelpful as CUDA's documentation allows, so that mistakes show:
 *   - Work in a stream runs when something waits for the stream, in order. Until then nothing has happened: a result that is
 *     read early is old, and a source that is changed early arrives changed. Pageable memory is no exception, because a copy
 *     from it "might be synchronous" (CUDA, API synchronization behavior).
 *   - New memory holds 0xff (NaN), freed memory 0xdd. Freed memory is kept for a while, and each block has guards.
 *   - Nodes of a graph without a dependency between them run in reverse order.
 * Misuse is refused with CUDA's code and also written down (standInMisuse). Copies are checked for their bounds and direction.
 * Errors come on demand (standInFail, standInSet). After a failed kernel every call fails, as after a real one.
 */
#define _GNU_SOURCE
#include "core.h"

/* ---- the CUDA runtime's functions ---- */

int cudaGetLastError(void) {
    int code = sticky ? sticky : last_error;
    last_error = SUCCESS;
    return code;
}

int cudaDriverGetVersion(int *version) {
    *version = (int)set.driver;
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    ENTER;
    *count = (int)set.devices;
    LEAVE(SUCCESS);
}

int cudaGetDevice(int *device) {
    ENTER;
    *device = current_device;
    LEAVE(SUCCESS);
}

int cudaSetDevice(int device) {
    ENTER;
    if (device < 0 || device >= set.devices) LEAVE(fail(INVALID_DEVICE));
    current_device = device;
    LEAVE(SUCCESS);
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    if (device < 0 || device >= set.devices) LEAVE(fail(INVALID_DEVICE));
    switch (attribute) {
        case MAJOR: *value = (int)set.major; break;
        case MINOR: *value = (int)set.minor; break;
        case POOLS: *value = (int)set.pools; break;
        default: LEAVE(misused(INVALID_VALUE, "attribute %d is not in the stand-in", attribute));
    }
    LEAVE(SUCCESS);
}

int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    ENTER;
    if (length < 13) LEAVE(fail(INVALID_VALUE));
    if (device < 0 || device >= set.devices) LEAVE(fail(INVALID_DEVICE));
    snprintf(text, length, "0000:%02X:00.0", 0x65 - device); /* the first GPU is the last on the bus */
    LEAVE(SUCCESS);
}

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    ENTER;
    if (flags > 1) LEAVE(fail(INVALID_VALUE));
    *stream = made(STREAM);
    LEAVE(SUCCESS);
}

int cudaStreamDestroy(void *handle) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (!stream) LEAVE(misused(INVALID_HANDLE, "cudaStreamDestroy: not a stream"));
    if (stream->capturing) LEAVE(misused(CAPTURE_UNSUPPORTED, "cudaStreamDestroy: the stream captures"));
    result = run_all(stream);
    stream->alive = 0;
    LEAVE(result);
}

int cudaStreamSynchronize(void *handle) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (!stream) LEAVE(misused(INVALID_HANDLE, "cudaStreamSynchronize: not a stream"));
    if (stream->capturing) {
        stream->invalid = 1;
        LEAVE(misused(CAPTURE_UNSUPPORTED, "cudaStreamSynchronize: the stream captures"));
    }
    LEAVE(run_all(stream));
}

int cudaMallocHost(void **pointer, size_t size) {
    ENTER;
    if ((result = unsafe(__func__))) LEAVE(result);
    LEAVE(allocated(PINNED, size, pointer));
}

int cudaFreeHost(void *pointer) {
    ENTER;
    if ((result = unsafe(__func__))) LEAVE(result);
    LEAVE(released(__func__, pointer, PINNED));
}

int cudaMalloc(void **pointer, size_t size) {
    ENTER;
    if ((result = unsafe(__func__))) LEAVE(result);
    LEAVE(allocated(PLAIN, size, pointer));
}

int cudaFree(void *pointer) {
    ENTER;
    if ((result = unsafe(__func__))) LEAVE(result);
    LEAVE(released(__func__, pointer, PLAIN));
}

int cudaMallocAsync(void **pointer, size_t size, void *handle) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (!stream) LEAVE(misused(INVALID_HANDLE, "cudaMallocAsync: not a stream"));
    if (stream->capturing) LEAVE(misused(CAPTURE_UNSUPPORTED, "cudaMallocAsync: the graph would own the memory"));
    if (!set.pools) LEAVE(fail(NOT_SUPPORTED));
    int device = current_device;
    current_device = stream->device; /* the pool is the stream's */
    result = allocated(POOLED, size, pointer);
    current_device = device;
    LEAVE(result);
}

int cudaFreeAsync(void *pointer, void *handle) {
    ENTER;
    Block *b = block_of(pointer);
    Object *stream = object(handle, STREAM);
    if (stream && stream->capturing) LEAVE(misused(INVALID_VALUE, "cudaFreeAsync: the memory is not the graph's"));
    if (!b || b->start != pointer || b->kind != POOLED) LEAVE(misused(INVALID_VALUE, "cudaFreeAsync: not memory of a pool"));
    if (b->freeing) LEAVE(misused(INVALID_VALUE, "cudaFreeAsync: freed twice"));
    if ((result = put(__func__, handle, (Op){.what = FREE, .to = b}))) LEAVE(result);
    b->freeing = 1;
    LEAVE(SUCCESS);
}

int cudaMemsetAsync(void *pointer, int value, size_t count, void *stream) {
    ENTER;
    Block *b;
    if ((result = usable(__func__, pointer, count, &b))) LEAVE(result);
    if (!b || b->kind == PINNED) LEAVE(misused(INVALID_VALUE, "cudaMemsetAsync: not device memory"));
    LEAVE(put(__func__, stream, (Op){.what = SET, .to = pointer, .value = value, .width = count, .height = 1}));
}

static int copy(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind,
                void *handle) {
    int result;
    Block *target, *source;
    Object *stream = object(handle, STREAM);
    if (width > to_pitch || width > from_pitch) return misused(INVALID_PITCH, "a copy's rows exceed their pitch");
    if (!width || !height) return SUCCESS;
    if ((result = usable("target of a copy", to, (height - 1) * to_pitch + width, &target))) return result;
    if ((result = usable("source of a copy", from, (height - 1) * from_pitch + width, &source))) return result;
    int to_device = target && target->kind != PINNED, from_device = source && source->kind != PINNED;
    if (kind < HOST_TO_DEVICE || kind > DEVICE_TO_DEVICE || to_device != (kind != DEVICE_TO_HOST) ||
        from_device != (kind != HOST_TO_DEVICE))
        return misused(INVALID_VALUE, "a copy of kind %d from %s to %s", kind, from_device ? "device" : "host",
                       to_device ? "device" : "host");
    if (stream && stream->capturing && (!target || !source)) {
        stream->invalid = 1;
        return misused(CAPTURE_UNSUPPORTED, "a copy of pageable memory in a capture");
    }
    Op op = {.what = COPY, .to = to, .from = (void *)from, .to_pitch = to_pitch, .from_pitch = from_pitch, .width = width,
             .height = height};
    return put("a copy", handle, op);
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind,
                      void *stream) {
    ENTER;
    if (to_pitch > MAX_PITCH || from_pitch > MAX_PITCH) LEAVE(misused(INVALID_PITCH, "a pitch above the largest"));
    LEAVE(copy(to, to_pitch, from, from_pitch, width, height, kind, stream));
}

int cudaMemcpyAsync(void *to, const void *from, size_t count, int kind, void *stream) {
    ENTER;
    LEAVE(copy(to, count, from, count, count, 1, kind, stream));
}

int cudaStreamBeginCapture(void *handle, int mode) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (!stream) LEAVE(misused(INVALID_HANDLE, "cudaStreamBeginCapture: not a stream"));
    if (stream->capturing) LEAVE(misused(ILLEGAL_STATE, "cudaStreamBeginCapture: the stream captures already"));
    stream->recording = made(GRAPH);
    stream->capturing = 1;
    stream->invalid = 0;
    stream->mode = mode;
    stream->by = pthread_self();
    LEAVE(SUCCESS);
}

int cudaStreamEndCapture(void *handle, void **graph) {
    pthread_mutex_lock(&mutex);
    int result = entered(__func__);
    Object *stream = object(handle, STREAM);
    *graph = NULL;
    if (result) { /* the capture has ended all the same */
        if (stream && stream->capturing) stream->capturing = stream->recording->alive = 0;
        LEAVE(result);
    }
    if (!stream || !stream->capturing) LEAVE(misused(ILLEGAL_STATE, "cudaStreamEndCapture: the stream does not capture"));
    if (stream->mode != RELAXED && !pthread_equal(stream->by, pthread_self()))
        LEAVE(misused(CAPTURE_WRONG_THREAD, "cudaStreamEndCapture: another thread began"));
    stream->capturing = 0;
    if (stream->invalid) {
        stream->recording->alive = 0;
        LEAVE(fail(CAPTURE_INVALIDATED));
    }
    *graph = stream->recording;
    LEAVE(SUCCESS);
}

int cudaGraphCreate(void **graph, unsigned flags) {
    ENTER;
    if (flags) LEAVE(fail(INVALID_VALUE));
    *graph = made(GRAPH);
    LEAVE(SUCCESS);
}

int cudaGraphAddChildGraphNode(void **node, void *handle, void *const *dependencies, size_t count, void *child_handle) {
    ENTER;
    Object *graph = object(handle, GRAPH), *child = object(child_handle, GRAPH);
    if (!graph || !child) LEAVE(misused(INVALID_VALUE, "cudaGraphAddChildGraphNode: not a graph"));
    if (count > 1 || (count && (uintptr_t)dependencies[0] != graph->last_node))
        LEAVE(misused(INVALID_VALUE, "cudaGraphAddChildGraphNode: the stand-in knows chains of nodes only"));
    Queue nodes = {0};
    append_all(&nodes, &child->work);
    if (!count && graph->work.first && nodes.first) { /* nothing says that it comes after the others */
        nodes.last->next = graph->work.first;
        nodes.last = graph->work.last;
        graph->work = nodes;
    } else if (nodes.first) {
        if (graph->work.last) graph->work.last->next = nodes.first;
        else graph->work.first = nodes.first;
        graph->work.last = nodes.last;
    }
    *node = (void *)++graph->last_node;
    LEAVE(SUCCESS);
}

int cudaGraphInstantiate(void **program, void *handle, unsigned long long flags) {
    ENTER;
    Object *graph = object(handle, GRAPH);
    if (!graph || flags) LEAVE(misused(INVALID_VALUE, "cudaGraphInstantiate: not a graph"));
    Object *made_program = made(PROGRAM);
    append_all(&made_program->work, &graph->work);
    *program = made_program;
    LEAVE(SUCCESS);
}

int cudaGraphLaunch(void *handle, void *stream_handle) {
    ENTER;
    Object *program = object(handle, PROGRAM), *stream = object(stream_handle, STREAM);
    if (!program || !stream) LEAVE(misused(INVALID_VALUE, "cudaGraphLaunch: not a program or not a stream"));
    if (stream->capturing) LEAVE(misused(CAPTURE_UNSUPPORTED, "cudaGraphLaunch: the stream captures"));
    if (stream->device != current_device) LEAVE(misused(INVALID_HANDLE, "cudaGraphLaunch: the stream is another device's"));
    append_all(&stream->work, &program->work);
    LEAVE(SUCCESS);
}

static int destroyed(const char *who, void *handle, int what) {
    Object *o = object(handle, what);
    if (!o) return misused(INVALID_VALUE, "%s: destroyed twice, or not such an object", who);
    if (capture_of_this_thread()) misused(SUCCESS, "%s: during a capture", who);
    emptied(&o->work); /* launches that wait have copies: CUDA also finishes them */
    o->alive = 0;
    return SUCCESS;
}

int cudaGraphDestroy(void *graph) {
    ENTER;
    LEAVE(destroyed(__func__, graph, GRAPH));
}

int cudaGraphExecDestroy(void *program) {
    ENTER;
    LEAVE(destroyed(__func__, program, PROGRAM));
}

/* ---- what tests control ---- */

/* A library's kernel: it runs in the stream's order over these ranges of device memory. Nonzero: it crashes the GPU. */
int standInLaunch(void *handle, Kernel kernel, void *user, const Span *spans, int count) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (!stream) LEAVE(misused(INVALID_HANDLE, "a kernel is launched on what is not a stream"));
    if (stream->device != current_device) LEAVE(misused(INVALID_HANDLE, "a kernel is launched on another device's stream"));
    for (int i = 0; i < count; i++) {
        Block *b;
        if ((result = usable("a kernel", spans[i].pointer, spans[i].size, &b))) LEAVE(result);
        if (!b || b->kind == PINNED || b->device != stream->device)
            LEAVE(misused(INVALID_VALUE, "a kernel over memory that is not the device's"));
    }
    LEAVE(put(__func__, handle, (Op){.what = CALL, .kernel = kernel, .user = user, .spans = (Span *)spans, .count = count}));
}

/* Whether a stream captures; the question of cudaStreamIsCapturing, for stand-ins of libraries. */
int standInCapturing(void *handle) {
    Object *stream = object(handle, STREAM);
    return stream && stream->capturing;
}

/* A call that no capture allows, as libraries make at their first launch. */
int standInInitialise(void *handle) {
    ENTER;
    Object *stream = object(handle, STREAM);
    if (stream && stream->capturing) {
        stream->invalid = 1;
        LEAVE(fail(CAPTURE_UNSUPPORTED));
    }
    LEAVE(SUCCESS);
}

void standInSet(const char *name, long value) {
    if (!strcmp(name, "devices")) set.devices = value;
    if (!strcmp(name, "driver")) set.driver = value;
    if (!strcmp(name, "major")) set.major = value;
    if (!strcmp(name, "minor")) set.minor = value;
    if (!strcmp(name, "pools")) set.pools = value;
    if (!strcmp(name, "memory")) set.memory = value;
}

int standInCalls(const char *name) {
    for (int i = 0; i < 64 && seen[i].name[0]; i++)
        if (!strcmp(seen[i].name, name)) return seen[i].calls;
    return 0;
}

/* The call after this many more calls of a function fails with a code. */
void standInFail(const char *name, int after, int code) {
    int i = 0;
    while (i < 63 && seen[i].name[0] && strcmp(seen[i].name, name)) i++;
    snprintf(seen[i].name, sizeof seen[i].name, "%s", name);
    seen[i].fail_at = seen[i].calls + after + 1;
    seen[i].code = code;
}

/* What was misused since the last call, one line each. */
const char *standInMisuse(void) {
    static char told[sizeof misuse];
    pthread_mutex_lock(&mutex);
    strcpy(told, misuse);
    misuse[0] = 0;
    pthread_mutex_unlock(&mutex);
    return told;
}

/* What is still allocated, in words; empty if nothing is. */
const char *standInLeft(void) {
    static char told[256];
    int count[6] = {0};
    pthread_mutex_lock(&mutex);
    for (Block *b = blocks; b; b = b->next)
        if (!b->gone) count[b->kind]++;
    for (Object *o = objects; o; o = o->next)
        if (o->alive) count[3 + o->what]++;
    told[0] = 0;
    const char *names[] = {"blocks of a pool", "blocks", "pinned blocks", "streams", "graphs", "programs"};
    for (int i = 0; i < 6; i++)
        if (count[i]) sprintf(told + strlen(told), "%d %s\n", count[i], names[i]);
    pthread_mutex_unlock(&mutex);
    return told;
}

long standInBytes(void) { return (long)live_bytes; }

/* One healthy GPU of compute capability 8.9, and nothing allocated. */
void standInReset(void) {
    pthread_mutex_lock(&mutex);
    for (Block *b = blocks, *next; b; b = next) {
        next = b->next;
        free(b->start - GUARD);
        free(b);
    }
    for (Object *o = objects, *next; o; o = next) {
        next = o->next;
        emptied(&o->work);
        free(o);
    }
    blocks = NULL;
    objects = NULL;
    live_bytes = 0;
    quarantined = sticky = inside_kernel = misuses = current_device = last_error = 0;
    misuse[0] = 0;
    memset(seen, 0, sizeof seen);
    set.devices = 1;
    set.driver = 13000;
    set.major = 8;
    set.minor = 9;
    set.pools = 1;
    set.memory = 1l << 30;
    pthread_mutex_unlock(&mutex);
}
