/*
 * The "uring" engine: file I/O by io_uring(7), one ring per reactor; see engine.h.
 *
 * What coroutines submit in one turn stays in the submission queue until uring_kick(), so it shares one
 * system call; what has completed by then is reaped at once. Later completions make the ring's
 * descriptor readable, which the reactor's epoll watches.
 *
 * No request is lost and no completion dropped: at most IN_FLIGHT_MAX requests, as many as the completion
 * queue holds, are in the ring; more wait in `backlog`. When the kernel takes no submission for
 * lack of memory, the entries stay where they are and are offered again after the next completion, or
 * after RETRY_NS when none is due.
 *
 * The kernel does not interrupt the reactor for a completion (COOP_TASKRUN) but processes it in the next
 * system call. DEFER_TASKRUN is not used: with it a ring on Linux 6.18 was seen to have completions due
 * without becoming readable, which loses a wake-up.
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "base/util.h"
#include "rt/engine.h"

#define SQ_ENTRIES    256
#define IN_FLIGHT_MAX 1024
#define RETRY_NS      NS_PER_MS

struct uring {
	struct engine engine;
	struct io_uring ring;
	struct watch watch;
	struct timer retry_timer;
	struct list backlog; /* requests for which there was no room */
	unsigned in_flight;  /* submission entries filled and not yet completed */
};

static struct uring *to_uring(struct engine *engine)
{
	return container_of(engine, struct uring, engine);
}

/* --- submitting ------------------------------------------------------------------------------- */

static void sqe_fill(struct io_uring_sqe *sqe, struct io_request *request)
{
	unsigned len_bytes = (unsigned)request->len_bytes;

	switch (request->op) {
	case IO_OP_READ:
		io_uring_prep_read(sqe, request->fd, request->buf, len_bytes, request->off);
		sqe->rw_flags = request->flags;
		break;
	case IO_OP_WRITE:
		io_uring_prep_write(sqe, request->fd, request->buf, len_bytes, request->off);
		sqe->rw_flags = request->flags;
		break;
	case IO_OP_FDATASYNC:
		io_uring_prep_fsync(sqe, request->fd, IORING_FSYNC_DATASYNC);
		break;
	case IO_OP_FALLOCATE:
		io_uring_prep_fallocate(sqe, request->fd, request->flags, (off_t)request->off,
			(off_t)request->len_bytes);
		break;
	}
	io_uring_sqe_set_data(sqe, request);
}

/* False when there is no room. */
static bool ring_put(struct uring *uring, struct io_request *request)
{
	struct io_uring_sqe *sqe;

	if (uring->in_flight == IN_FLIGHT_MAX)
		return false;
	sqe = io_uring_get_sqe(&uring->ring);
	if (!sqe) {
		io_uring_submit(&uring->ring); /* makes room, unless memory is short */
		sqe = io_uring_get_sqe(&uring->ring);
	}
	if (!sqe)
		return false;
	sqe_fill(sqe, request);
	uring->in_flight++;
	return true;
}

static void uring_submit(struct engine *engine, struct io_request *request)
{
	struct uring *uring = to_uring(engine);

	if (!list_empty(&uring->backlog) || !ring_put(uring, request))
		list_push_back(&uring->backlog, &request->task.link);
}

static void backlog_put(struct uring *uring)
{
	struct list *link;

	while ((link = list_pop_front(&uring->backlog))) {
		if (!ring_put(uring, list_entry(link, struct io_request, task.link))) {
			list_push_front(&uring->backlog, link);
			return;
		}
	}
}

/* --- completing ------------------------------------------------------------------------------- */

static bool ring_reap(struct uring *uring)
{
	struct io_uring_cqe *cqe;
	unsigned head, count = 0;

	io_uring_for_each_cqe(&uring->ring, head, cqe)
	{
		engine_complete(io_uring_cqe_get_data(cqe), cqe->res);
		count++;
	}
	io_uring_cq_advance(&uring->ring, count);
	uring->in_flight -= count;
	return count;
}

static bool uring_kick(struct engine *engine)
{
	struct uring *uring = to_uring(engine);
	struct io_uring *ring = &uring->ring;
	bool completed = false;
	int ret = 0;

	do {
		if (io_uring_sq_ready(ring))
			ret = io_uring_submit(ring);
		completed |= ring_reap(uring);
		backlog_put(uring);
	} while (ret >= 0 && io_uring_sq_ready(ring));
	if (io_uring_sq_ready(ring) && io_uring_sq_ready(ring) == uring->in_flight)
		timer_arm(&uring->retry_timer, reactor_now_ns() + RETRY_NS);
	return completed;
}

/* Nothing to do: the end of this turn kicks. */
static void retry(struct timer *timer)
{
}

static void ring_readable(struct watch *watch, uint32_t epoll_events)
{
	struct uring *uring = container_of(watch, struct uring, watch);

	ring_reap(uring);
}

/* --- making and ending one -------------------------------------------------------------------- */

/* With the flags that this kernel takes. */
static int ring_create(struct io_uring *ring)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,
		.cq_entries = IN_FLIGHT_MAX,
	};
	int ret = io_uring_queue_init_params(SQ_ENTRIES, ring, &params);

	if (ret != -EINVAL)
		return ret;
	/* Before Linux 5.19. */
	params = (struct io_uring_params){
		.flags = IORING_SETUP_CQSIZE,
		.cq_entries = IN_FLIGHT_MAX,
	};
	return io_uring_queue_init_params(SQ_ENTRIES, ring, &params);
}

/* Whether the kernel knows the operations, and a filter lets all three system calls through. */
static int ring_probe(struct io_uring *ring)
{
	static const int ops[] = { IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC,
		IORING_OP_FALLOCATE };
	struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
	bool known = probe;

	for (size_t i = 0; known && i < ARRAY_LEN(ops); i++)
		known = io_uring_opcode_supported(probe, ops[i]);
	io_uring_free_probe(probe);
	if (!known)
		return -EOPNOTSUPP;
	int ret = io_uring_get_events(ring);
	return MIN(ret, 0);
}

static int uring_create(struct engine **engine, struct reactor *reactor, struct err *err)
{
	struct uring *uring = calloc(1, sizeof(*uring));

	if (!uring)
		return err_set(err, ENOMEM, "no memory for the uring engine");
	int ret = ring_create(&uring->ring);
	if (ret) {
		free(uring);
		return err_sys(err, -ret, "cannot set up io_uring (engine \"threads\" needs none)");
	}
	ret = ring_probe(&uring->ring);
	if (ret) {
		io_uring_queue_exit(&uring->ring);
		free(uring);
		return err_sys(err, -ret, "cannot use io_uring (engine \"threads\" needs none)");
	}
	uring->engine.ops = &uring_engine_ops;
	list_init(&uring->backlog);
	timer_init(&uring->retry_timer, retry);
	*engine = &uring->engine;
	return 0;
}

static int uring_start(struct engine *engine)
{
	struct uring *uring = to_uring(engine);

	return watch_add(&uring->watch, uring->ring.ring_fd, EPOLLIN, ring_readable);
}

static void uring_stop(struct engine *engine)
{
	struct uring *uring = to_uring(engine);

	timer_cancel(&uring->retry_timer);
	watch_remove(&uring->watch);
}

static void uring_free(struct engine *engine)
{
	struct uring *uring = to_uring(engine);

	io_uring_queue_exit(&uring->ring);
	free(uring);
}

const struct engine_ops uring_engine_ops = {
	.name = "uring",
	.create = uring_create,
	.start = uring_start,
	.submit = uring_submit,
	.kick = uring_kick,
	.stop = uring_stop,
	.free = uring_free,
};
