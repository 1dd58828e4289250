/*
 * co_offload(): slow calls on a pool of threads of their own, so that they and file I/O do not starve
 * each other; see reactor.h.
 */
#include "base/util.h"
#include "rt/pool.h"
#include "rt/reactor.h"

/* Enough for a few calls that hang (a name look-up on a dead server) beside those that compute. */
#define OFFLOAD_THREADS_MAX 8

struct offload_call {
	struct task task;
	void (*fn)(void *arg);
	void *arg;
	struct reactor *origin;
	struct co *caller;
};

static void offload_done(struct task *task)
{
	co_wake(container_of(task, struct offload_call, task)->caller);
}

static void offload_run(struct list *item)
{
	struct offload_call *call = list_entry(item, struct offload_call, task.link);

	call->fn(call->arg);
	reactor_post(call->origin, &call->task);
}

static struct pool offload_pool = POOL_INIT(
	offload_pool, "blk-offload", OFFLOAD_THREADS_MAX, offload_run);

suspends void co_offload(void (*fn)(void *arg), void *arg)
{
	struct offload_call call = {
		.fn = fn, .arg = arg, .origin = reactor_self(), .caller = co_self()
	};
	struct list items;

	task_init(&call.task, offload_done);
	list_init(&items);
	list_push_back(&items, &call.task.link);
	pool_submit(&offload_pool, &items, 1);
	co_suspend_outside();
}
