/* A faked GPU: device memory is host memory, streams run at once, kernels compute nothing.

   What the stub libraries share. All of it lives in the stub libcuda.so.1, which the stub libcudart.so.13 links to. */
#ifndef FAKE_GPU_H
#define FAKE_GPU_H

#include <stddef.h>
#include <stdint.h>

#define FAKE_NAME "Fake H200 (stub driver, computes nothing)"
#define FAKE_PAGE ((size_t)2 << 20)
#define FAKE_MAJOR 9
#define FAKE_MINOR 0
#define FAKE_SMS 132
#define FAKE_DRIVER_VERSION 13000

enum { FAKE_OK = 0, FAKE_INVALID = 1, FAKE_NO_MEMORY = 2, FAKE_NOT_FOUND = 500, FAKE_UNSUPPORTED = 801,
       FAKE_CAPTURE_UNSUPPORTED = 900, FAKE_CAPTURE_INVALIDATED = 901, FAKE_CAPTURE_UNMATCHED = 903 };

/* Memory. Sizes in bytes; addresses come from one window and are never used twice. */
size_t fake_total(void);
size_t fake_used(void);
int fake_alloc(size_t size, void **address);
int fake_free(void *address);
int fake_is_device(const void *address);
int fake_host_note(void *address, size_t size);
int fake_host_forget(void *address);
int fake_is_pinned(const void *address);

/* Work. A stream is NULL (the legacy stream) or from fake_stream_new. What is put on a capturing stream goes into its
   graph; copies and fills of a graph are done at each launch, its kernels are counted. */
struct fake_stream;
struct fake_event;
struct fake_graph;
struct fake_stream *fake_stream_new(int priority);
void fake_stream_free(struct fake_stream *stream);
int fake_stream_priority(struct fake_stream *stream);
int fake_copy(void *to, const void *from, size_t size, struct fake_stream *stream);
int fake_fill(void *to, uint32_t value, size_t width, size_t count, struct fake_stream *stream);
int fake_call(void (*function)(void *), void *data, struct fake_stream *stream);
int fake_launch(const char *name, struct fake_stream *stream);
struct fake_event *fake_event_new(void);
void fake_event_free(struct fake_event *event);
int fake_event_record(struct fake_event *event, struct fake_stream *stream);
int fake_event_wait(struct fake_event *event, struct fake_stream *stream);
double fake_event_ms(struct fake_event *event);
int fake_capture_begin(struct fake_stream *stream, int mode);
int fake_capture_end(struct fake_stream *stream, struct fake_graph **graph);
/* The id of the capture that the stream is part of, 0 when it is in none. */
unsigned long long fake_capture_id(struct fake_stream *stream, struct fake_graph **graph);
int fake_capture_mode(int mode); /* of this thread; returns the one before */
/* FAKE_CAPTURE_UNSUPPORTED where a capture forbids this thread calls that may wait or allocate; it is then invalid. */
int fake_check_unsafe(const char *name);
size_t fake_graph_size(struct fake_graph *graph);
struct fake_graph *fake_graph_copy(struct fake_graph *graph);
void fake_graph_free(struct fake_graph *graph);
int fake_graph_launch(struct fake_graph *graph, struct fake_stream *stream);

/* FAKE_GPU_TRACE=1: a line on stderr for each function that the stub only answers, does not do. */
int fake_unsupported(const char *name);
void fake_trace(const char *what, const char *name);
/* Counts since the start, for harnesses: kernels, graphs launched, copies, captures. */
void fake_counts(unsigned long long counts[4]);

#endif
