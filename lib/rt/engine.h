/*
 * An I/O engine: how a reactor does file I/O that may wait. Private to lib/rt; the rest uses io.h.
 *
 * One table, several implementations: "uring" (io_uring, one per reactor), "threads" (a pool shared
 * by all reactors, same semantics: many systems forbid io_uring). A request belongs to the coroutine
 * that waits for it; the engine keeps it while it is under way and calls engine_complete() on the
 * reactor's thread when it is done.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "rt/co.h"
#include "rt/reactor.h"

enum io_op { IO_OP_READ, IO_OP_WRITE, IO_OP_FDATASYNC, IO_OP_FALLOCATE };

struct io_request {
	struct task task; /* the engine's while the request is under way */
	struct reactor *reactor;
	enum io_op op;
	int fd;
	int flags; /* rwf flags, or fallocate's mode */
	void *buf;
	uint64_t len_bytes;
	uint64_t off;
	int64_t result; /* a byte count or -errno; may be short: io.c goes on with the rest */
	struct co *waiter;
};

struct engine {
	const struct engine_ops *ops;
};

struct engine_ops {
	const char *name;
	/* Called on any thread before the loop runs; watches are added in start(), on the reactor's thread. */
	int (*create)(struct engine **engine, struct reactor *reactor, struct err *err);
	int (*start)(struct engine *engine);
	void (*submit)(struct engine *engine, struct io_request *request);
	/* End of a turn: hand over what was submitted. Returns true when requests were completed meanwhile. */
	bool (*kick)(struct engine *engine);
	void (*stop)(struct engine *engine); /* reactor's thread, nothing under way */
	void (*free)(struct engine *engine);
};

extern const struct engine_ops uring_engine_ops;
extern const struct engine_ops threads_engine_ops;

/* The engine of the current reactor. */
struct engine *reactor_engine(void);

static inline void engine_complete(struct io_request *request, int64_t result)
{
	request->result = result;
	co_wake(request->waiter);
}
