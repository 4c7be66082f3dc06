/* Memory, streams and graphs of the stand-in, and what counts as misuse of them. cudart_stand_in.c includes it. */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0, INVALID_VALUE = 1, NO_MEMORY = 2, INVALID_PITCH = 12, INSUFFICIENT_DRIVER = 35, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, LAUNCH_FAILURE = 719, NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_WRONG_THREAD = 908
};
enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };
enum { MAJOR = 75, MINOR = 76, POOLS = 115 }; /* of cudaDeviceAttr */
enum { RELAXED = 2 };                         /* of cudaStreamCaptureMode */
#define GUARD 256 /* also the alignment of all memory, as of cudaMalloc */
#define QUARANTINE 256 /* freed blocks that are kept */
#define MAX_PITCH 0x7fffffff /* cudaDevAttrMaxPitch */

typedef int (*Kernel)(void *user);
typedef enum { POOLED, PLAIN, PINNED } Kind;
typedef struct Block {
    unsigned char *start;
    size_t size;
    Kind kind;
    int device, freeing, gone; /* freeing: a free is in a stream; gone: it has run */
    struct Block *next;
} Block;
typedef struct { void *pointer; size_t size; } Span;
typedef struct Op {
    enum { COPY, SET, CALL, FREE } what;
    void *to, *from;
    size_t to_pitch, from_pitch, width, height;
    int value;
    Kernel kernel;
    void *user;
    Span *spans; /* what a kernel reads and writes */
    int count;
    struct Op *next;
} Op;
typedef struct { Op *first, *last; } Queue;
typedef struct Object {
    enum { STREAM, GRAPH, PROGRAM } what;
    int alive, device;
    Queue work; /* of a stream: what has not run; of a graph or program: its nodes */
    int capturing, invalid, mode;
    pthread_t by;
    struct Object *recording;
    uintptr_t last_node;
    struct Object *next;
} Object;

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static Block *blocks;
static Object *objects;
static size_t live_bytes;
static int quarantined, sticky, inside_kernel, misuses;
static char misuse[1 << 13];
static __thread int current_device, last_error;
static struct { long devices, driver, major, minor, pools, memory; } set;
static struct { char name[48]; int calls, fail_at, code; } seen[64];

static int fail(int code) {
    if (code) last_error = code;
    return code;
}

static int misused(int code, const char *format, ...) {
    size_t used = strlen(misuse);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(misuse + used, sizeof misuse - used - 1, format, arguments);
    va_end(arguments);
    if (strlen(misuse) + 2 < sizeof misuse) strcat(misuse, "\n");
    misuses++;
    return fail(code);
}

/* Counts a call; its code if it has to fail, else 0. */
static int entered(const char *name) {
    int i = 0;
    while (i < 63 && seen[i].name[0] && strcmp(seen[i].name, name)) i++;
    snprintf(seen[i].name, sizeof seen[i].name, "%s", name);
    int number = ++seen[i].calls;
    if (inside_kernel) return misused(NOT_PERMITTED, "%s: called by a kernel", name);
    if (sticky) return fail(sticky);
    if (!set.driver) return fail(INSUFFICIENT_DRIVER);
    if (!set.devices) return fail(NO_DEVICE);
    if (seen[i].code && number == seen[i].fail_at) return fail(seen[i].code);
    return SUCCESS;
}
#define ENTER                                              \
    pthread_mutex_lock(&mutex);                            \
    int result = entered(__func__);                        \
    if (result) { pthread_mutex_unlock(&mutex); return result; }
#define LEAVE(code)                     \
    do {                                \
        int code_ = (code);             \
        pthread_mutex_unlock(&mutex);   \
        return code_;                   \
    } while (0)

static Block *block_of(const void *pointer) {
    for (Block *b = blocks; b; b = b->next)
        if ((unsigned char *)pointer >= b->start && (unsigned char *)pointer < b->start + b->size) return b;
    return NULL;
}

/* Whether a range may be used; the block that it lies in, NULL for pageable memory. */
static int usable(const char *who, const void *pointer, size_t size, Block **found) {
    Block *b = *found = block_of(pointer);
    if (!b) return SUCCESS;
    if (b->gone || (b->freeing && size)) return misused(INVALID_VALUE, "%s: memory is used after it was freed", who);
    if ((unsigned char *)pointer + size > b->start + b->size)
        return misused(INVALID_VALUE, "%s: %zu bytes from byte %zu of %zu", who, size,
                       (size_t)((unsigned char *)pointer - b->start), b->size);
    return SUCCESS;
}

static Object *object(const void *handle, int what) {
    for (Object *o = objects; o; o = o->next)
        if (o == handle && o->what == (unsigned)what && o->alive) return o;
    return NULL;
}

static Object *made(int what) {
    Object *o = calloc(1, sizeof *o);
    o->what = what;
    o->alive = 1;
    o->device = current_device;
    o->next = objects;
    return objects = o;
}

static void append(Queue *queue, Op *op) {
    op->next = NULL;
    if (queue->last) queue->last->next = op;
    else queue->first = op;
    queue->last = op;
}

static Op *copied(const Op *op) {
    Op *copy = malloc(sizeof *copy);
    *copy = *op;
    if (op->count) {
        copy->spans = malloc(op->count * sizeof(Span));
        memcpy(copy->spans, op->spans, op->count * sizeof(Span));
    }
    return copy;
}

static void append_all(Queue *queue, const Queue *other) {
    for (Op *op = other->first; op; op = op->next) append(queue, copied(op));
}

static void emptied(Queue *queue) {
    for (Op *op = queue->first, *next; op; op = next) {
        next = op->next;
        if (op->count) free(op->spans);
        free(op);
    }
    queue->first = queue->last = NULL;
}

static Object *capture_of_this_thread(void) {
    for (Object *o = objects; o; o = o->next)
        if (o->what == STREAM && o->capturing && pthread_equal(o->by, pthread_self())) return o;
    return NULL;
}

/* For calls that NVIDIA calls unsafe during a capture: they are refused, and the capture is lost. */
static int unsafe(const char *who) {
    Object *stream = capture_of_this_thread();
    if (!stream || stream->mode == RELAXED) return SUCCESS;
    stream->invalid = 1;
    return misused(CAPTURE_UNSUPPORTED, "%s: called during a capture", who);
}

/* Puts work into a stream, or into the graph that the stream records. */
static int put(const char *who, void *handle, Op op) {
    Object *stream = object(handle, STREAM);
    if (!stream) return misused(INVALID_HANDLE, "%s: not a stream", who);
    if (stream->capturing) {
        if (!pthread_equal(stream->by, pthread_self())) misused(SUCCESS, "%s: a thread enters another's capture", who);
        if (stream->invalid) return fail(CAPTURE_INVALIDATED);
    }
    append(stream->capturing ? &stream->recording->work : &stream->work, copied(&op));
    return SUCCESS;
}

static void check_guards(const Block *b) {
    for (int i = 0; i < GUARD; i++)
        if (b->start[-1 - i] != 0xbb || b->start[b->size + i] != 0xbb) {
            misused(SUCCESS, "bytes next to a block of %zu bytes were overwritten", b->size);
            return;
        }
}

static void forget_oldest(void) {
    Block **oldest = NULL;
    for (Block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->gone) oldest = at; /* the newest come first */
    Block *b = *oldest;
    *oldest = b->next;
    free(b->start - GUARD);
    free(b);
    quarantined--;
}

static void gone(Block *b) {
    check_guards(b);
    memset(b->start, 0xdd, b->size);
    b->gone = b->freeing = 1;
    if (b->kind != PINNED) live_bytes -= b->size;
    if (++quarantined > QUARANTINE) forget_oldest();
}

static int run_one(Op *op) {
    Block *b;
    if (op->what == FREE) { gone(op->to); return SUCCESS; }
    if (op->what == CALL) {
        for (int i = 0; i < op->count; i++) {
            b = block_of(op->spans[i].pointer);
            if (!b || b->gone) return misused(LAUNCH_FAILURE, "a kernel runs over freed memory");
        }
        inside_kernel = 1;
        int failed = op->kernel(op->user);
        inside_kernel = 0;
        for (int i = 0; i < op->count; i++) check_guards(block_of(op->spans[i].pointer));
        return failed ? LAUNCH_FAILURE : SUCCESS;
    }
    if (((b = block_of(op->to)) && b->gone) || (op->what == COPY && (b = block_of(op->from)) && b->gone))
        return misused(LAUNCH_FAILURE, "a copy runs over freed memory");
    for (size_t row = 0; row < op->height; row++) {
        char *to = (char *)op->to + row * op->to_pitch;
        if (op->what == SET) memset(to, op->value, op->width);
        else memmove(to, (char *)op->from + row * op->from_pitch, op->width);
    }
    return SUCCESS;
}

static int run_all(Object *stream) {
    Queue work = stream->work;
    stream->work = (Queue){0};
    for (Op *op = work.first; op && !sticky; op = op->next) sticky = run_one(op);
    emptied(&work);
    return fail(sticky);
}

static int allocated(Kind kind, size_t size, void **pointer) {
    if (!size) return fail(INVALID_VALUE);
    if (kind != PINNED && (long)(live_bytes + size) > set.memory) return fail(NO_MEMORY);
    Block *b = calloc(1, sizeof *b);
    b->start = (unsigned char *)aligned_alloc(GUARD, (size + 3 * GUARD) / GUARD * GUARD) + GUARD;
    b->size = size;
    b->kind = kind;
    b->device = current_device;
    memset(b->start - GUARD, 0xbb, GUARD);
    memset(b->start, 0xff, size);
    memset(b->start + size, 0xbb, GUARD);
    if (kind != PINNED) live_bytes += size;
    b->next = blocks;
    blocks = b;
    *pointer = b->start;
    return SUCCESS;
}

static int released(const char *who, void *pointer, Kind kind) {
    Block *b = block_of(pointer);
    if (!b || b->start != pointer || b->kind != kind) return misused(INVALID_VALUE, "%s: not memory of its kind", who);
    if (b->freeing) return misused(INVALID_VALUE, "%s: freed twice", who);
    for (Object *o = objects; o; o = o->next)
        if (o->what == STREAM && o->work.first) misused(SUCCESS, "%s: work that waits in a stream may use the memory", who);
    gone(b);
    return SUCCESS;
}

