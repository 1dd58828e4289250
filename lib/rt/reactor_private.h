/*
 * The insides of a reactor, for the files of lib/rt only.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>

#include "rt/co_switch.h"
#include "rt/engine.h"
#include "rt/reactor.h"

/* co.c: the coroutines of one thread. */
struct co_pool {
	struct co *running; /* NULL in plain code */
	struct list idle;   /* coroutines whose stack waits for reuse, last used first */
	unsigned idle_count;
	struct co_context plain; /* the reactor's own context while a coroutine runs */
	void *plain_fake_stack;  /* the sanitizers' notion of it */
	const void *plain_stack;
	size_t plain_stack_size_bytes;
	void *plain_fiber;
};

void co_pool_init(struct co_pool *pool);
void co_pool_fini(struct co_pool *pool); /* none may be suspended */

/* Lets a woken coroutine run; its list link is its place in the ready queue. */
void co_resume(struct list *link);

/* buf.c: buffers for reuse, a LIFO list per power of two from 4 KiB to BUF_POOLED_MAX_BYTES. */
enum { BUF_SHELVES = 11 };
struct buf_pool {
	void *free[BUF_SHELVES];
	size_t kept_bytes;
	size_t unused_bytes; /* the least that was kept since the last trim: nobody needed it */
	struct timer trim;
};

void buf_pool_init(struct buf_pool *pool);
void buf_pool_fini(struct buf_pool *pool);

#define REACTOR_EVENTS_MAX 64

struct reactor {
	int epoll_fd, wake_fd;
	struct watch wake_watch;
	struct engine *engine;
	struct list ready;     /* coroutines to resume */
	struct list next_turn; /* and those of co_yield_turn() */
	struct list deferred;  /* tasks for the end of this turn */
	uint64_t now_ns;
	struct timer **heap; /* armed timers, a binary heap by deadline */
	size_t timer_count, timer_capacity;
	struct epoll_event
		events[REACTOR_EVENTS_MAX]; /* of this turn; event_next.. are still to come */
	int event_count, event_next;
	struct co_pool co;
	unsigned outside_waits; /* coroutines in co_suspend_outside() */
	struct buf_pool bufs;
	atomic_bool stopping;
	pthread_mutex_t posted_mutex; /* protects posted, the only thing other threads touch */
	struct list posted;
};

/* The one of this thread while it runs; set by reactor_run(). */
extern __thread struct reactor *reactor_current;

/* Queues a coroutine's link for resumption. */
static inline void reactor_ready(struct list *link)
{
	list_push_back(&reactor_current->ready, link);
}
