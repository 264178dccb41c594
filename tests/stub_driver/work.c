/* Streams, events, captures and graphs of the fake GPU. All work is done when it is asked for, in the asking thread. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { COPY, FILL, CALL, KERNEL };
struct op { int kind; void *to; const void *from; size_t size, width; uint32_t value; void (*function)(void *); };
struct fake_graph { struct op *ops; size_t num_ops, room; unsigned long long id; int mode, is_invalid; pthread_t thread; };
struct fake_stream { int priority; struct fake_graph *graph; int is_origin; struct fake_stream *next; };
struct fake_event { double ms; struct fake_graph *graph; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct fake_stream *streams;
static struct fake_graph *capturing; /* one at a time */
static unsigned long long last_id, counts[4];
static __thread int thread_mode; /* 0 global, 1 thread-local, 2 relaxed */

void fake_trace(const char *what, const char *name) {
    static int wanted = -1;
    if (wanted < 0) wanted = getenv("FAKE_GPU_TRACE") != NULL;
    if (wanted) fprintf(stderr, "stub driver: %s %s\n", what, name);
}

int fake_unsupported(const char *name) {
    fake_trace("unsupported", name);
    return FAKE_UNSUPPORTED;
}

void fake_counts(unsigned long long out[4]) { memcpy(out, counts, sizeof counts); }

struct fake_stream *fake_stream_new(int priority) {
    struct fake_stream *stream = calloc(1, sizeof *stream);
    stream->priority = priority;
    pthread_mutex_lock(&lock);
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&lock);
    return stream;
}

void fake_stream_free(struct fake_stream *stream) { (void)stream; /* may still be in the list: a few bytes stay */ }

static int is_default(struct fake_stream *stream) { return (uintptr_t)stream <= 2; }

int fake_stream_priority(struct fake_stream *stream) { return is_default(stream) ? 0 : stream->priority; }

static struct fake_graph *graph_of(struct fake_stream *stream) { return is_default(stream) ? NULL : stream->graph; }

static void run(const struct op *op) {
    if (op->kind == COPY) memmove(op->to, op->from, op->size);
    else if (op->kind == FILL && op->width == 1) memset(op->to, (int)op->value, op->size);
    else if (op->kind == FILL)
        for (size_t i = 0; i < op->size; i++) memcpy((char *)op->to + i * op->width, &op->value, op->width);
    else if (op->kind == CALL) op->function(op->to);
}

static int put(struct op op, struct fake_stream *stream) {
    struct fake_graph *graph = graph_of(stream);
    if (!graph) {
        if (op.kind == KERNEL) __sync_fetch_and_add(&counts[0], 1);
        else if (op.kind == COPY) __sync_fetch_and_add(&counts[2], 1);
        run(&op);
        return FAKE_OK;
    }
    if (graph->num_ops == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 64;
        graph->ops = realloc(graph->ops, graph->room * sizeof op);
    }
    graph->ops[graph->num_ops++] = op;
    return FAKE_OK;
}

int fake_copy(void *to, const void *from, size_t size, struct fake_stream *stream) {
    return size ? put((struct op){.kind = COPY, .to = to, .from = from, .size = size}, stream) : FAKE_OK;
}

int fake_fill(void *to, uint32_t value, size_t width, size_t count, struct fake_stream *stream) {
    return put((struct op){.kind = FILL, .to = to, .size = count, .width = width, .value = value}, stream);
}

int fake_call(void (*function)(void *), void *data, struct fake_stream *stream) {
    return put((struct op){.kind = CALL, .to = data, .function = function}, stream);
}

int fake_launch(const char *name, struct fake_stream *stream) {
    fake_trace("launch", name);
    return put((struct op){.kind = KERNEL}, stream);
}

struct fake_event *fake_event_new(void) { return calloc(1, sizeof(struct fake_event)); }

void fake_event_free(struct fake_event *event) { free(event); }

int fake_event_record(struct fake_event *event, struct fake_stream *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
    event->graph = graph_of(stream);
    return FAKE_OK;
}

int fake_event_wait(struct fake_event *event, struct fake_stream *stream) {
    /* A stream that waits for a capturing one is captured with it. */
    if (event->graph && event->graph == capturing && !is_default(stream)) stream->graph = event->graph;
    return FAKE_OK;
}

double fake_event_ms(struct fake_event *event) { return event->ms; }

int fake_capture_begin(struct fake_stream *stream, int mode) {
    if (is_default(stream)) return FAKE_CAPTURE_UNSUPPORTED;
    pthread_mutex_lock(&lock);
    int free_now = !capturing && !stream->graph;
    if (free_now) {
        capturing = stream->graph = calloc(1, sizeof *capturing);
        *capturing = (struct fake_graph){.id = ++last_id, .mode = mode, .thread = pthread_self()};
        stream->is_origin = 1;
        counts[3]++;
    }
    pthread_mutex_unlock(&lock);
    return free_now ? FAKE_OK : FAKE_CAPTURE_UNSUPPORTED;
}

int fake_capture_end(struct fake_stream *stream, struct fake_graph **graph) {
    *graph = NULL;
    if (is_default(stream) || !stream->graph || !stream->is_origin) return FAKE_CAPTURE_UNMATCHED;
    pthread_mutex_lock(&lock);
    struct fake_graph *mine = stream->graph;
    for (struct fake_stream *s = streams; s; s = s->next)
        if (s->graph == mine) { s->graph = NULL; s->is_origin = 0; }
    capturing = NULL;
    pthread_mutex_unlock(&lock);
    if (mine->is_invalid) return FAKE_CAPTURE_INVALIDATED;
    *graph = mine;
    return FAKE_OK;
}

unsigned long long fake_capture_id(struct fake_stream *stream, struct fake_graph **graph) {
    struct fake_graph *of = graph_of(stream);
    if (graph) *graph = of;
    return of ? of->id : 0;
}

int fake_capture_mode(int mode) {
    int before = thread_mode;
    thread_mode = mode;
    return before;
}

int fake_check_unsafe(const char *name) {
    struct fake_graph *now = capturing;
    if (!now || now->mode == 2 || thread_mode == 2) return FAKE_OK;
    int is_mine = pthread_equal(now->thread, pthread_self());
    if (!is_mine && (now->mode == 1 || thread_mode == 1)) return FAKE_OK;
    fprintf(stderr, "stub driver: %s while a stream is captured\n", name);
    now->is_invalid = 1;
    return FAKE_CAPTURE_UNSUPPORTED;
}

size_t fake_graph_size(struct fake_graph *graph) { return graph->num_ops; }

struct fake_graph *fake_graph_copy(struct fake_graph *graph) {
    struct fake_graph *copy = malloc(sizeof *copy);
    *copy = *graph;
    copy->room = copy->num_ops + 1;
    copy->ops = malloc(copy->room * sizeof *copy->ops);
    if (graph->num_ops) memcpy(copy->ops, graph->ops, graph->num_ops * sizeof *copy->ops);
    return copy;
}

void fake_graph_free(struct fake_graph *graph) {
    free(graph->ops);
    free(graph);
}

int fake_graph_launch(struct fake_graph *graph, struct fake_stream *stream) {
    __sync_fetch_and_add(&counts[1], 1);
    for (size_t i = 0; i < graph->num_ops; i++) {
        int result = put(graph->ops[i], stream);
        if (result) return result;
    }
    return FAKE_OK;
}
