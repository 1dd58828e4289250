/*
 * The reactor's loop: events, timers, ready coroutines, deferred tasks, file I/O; see reactor.h.
 *
 * One turn is reactor_turn(). Ready coroutines are run in rounds, and the rounds of one turn are
 * bounded, so coroutines that keep yielding to each other cannot shut out the sockets.
 *
 * Other threads reach a reactor only through reactor_post(): a list under a mutex and one eventfd write
 * when the list was empty.
 */
#include "rt/reactor.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/reactor_private.h"

/* Rounds of ready coroutines in one turn before the sockets are looked at again. */
#define ROUNDS_PER_TURN_MAX 16

__thread struct reactor *reactor_current;

struct reactor *reactor_self(void)
{
	return reactor_current;
}

struct engine *reactor_engine(void)
{
	return reactor_current->engine;
}

const char *reactor_engine_name(const struct reactor *reactor)
{
	return reactor->engine->ops->name;
}

uint64_t reactor_now_ns(void)
{
	return reactor_current->now_ns;
}

uint64_t reactor_clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_SEC + (uint64_t)now.tv_nsec;
}

/* --- tasks ------------------------------------------------------------------------------------ */

void task_init(struct task *task, void (*fn)(struct task *task))
{
	list_init(&task->link);
	task->fn = fn;
}

void reactor_post(struct reactor *reactor, struct task *task)
{
	pthread_mutex_lock(&reactor->posted_mutex);
	bool was_empty = list_empty(&reactor->posted);
	list_push_back(&reactor->posted, &task->link);
	/* Under the mutex: once the task runs, it may end the reactor this fd belongs to. */
	if (was_empty)
		eventfd_write(reactor->wake_fd, 1);
	pthread_mutex_unlock(&reactor->posted_mutex);
}

static void run_posted(struct watch *watch, uint32_t epoll_events)
{
	struct reactor *reactor = container_of(watch, struct reactor, wake_watch);
	struct list *link, posted;
	eventfd_t count;

	list_init(&posted);
	eventfd_read(reactor->wake_fd, &count);
	pthread_mutex_lock(&reactor->posted_mutex);
	list_splice_back(&posted, &reactor->posted);
	pthread_mutex_unlock(&reactor->posted_mutex);
	while ((link = list_pop_front(&posted))) {
		struct task *task = list_entry(link, struct task, link);

		task->fn(task);
	}
}

void reactor_defer(struct task *task)
{
	if (list_empty(&task->link))
		list_push_back(&reactor_current->deferred, &task->link);
}

void reactor_defer_cancel(struct task *task)
{
	list_remove(&task->link);
}

/* --- file descriptors ------------------------------------------------------------------------- */

int watch_add(struct watch *watch, int fd, uint32_t epoll_events,
	void (*fn)(struct watch *watch, uint32_t epoll_events))
{
	struct epoll_event event = { .events = epoll_events, .data.ptr = watch };

	watch->fd = fd;
	watch->fn = fn;
	return epoll_ctl(reactor_current->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

void watch_modify(struct watch *watch, uint32_t epoll_events)
{
	struct epoll_event event = { .events = epoll_events, .data.ptr = watch };

	if (epoll_ctl(reactor_current->epoll_fd, EPOLL_CTL_MOD, watch->fd, &event))
		assert(!"watch_modify() of a descriptor that is not watched");
}

void watch_remove(struct watch *watch)
{
	struct reactor *reactor = reactor_current;

	epoll_ctl(reactor->epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
	for (int i = reactor->event_next; i < reactor->event_count; i++)
		if (reactor->events[i].data.ptr == watch)
			reactor->events[i].data.ptr = NULL;
}

/* --- timers ----------------------------------------------------------------------------------- */

static void heap_put(struct reactor *reactor, size_t index, struct timer *timer)
{
	reactor->heap[index] = timer;
	timer->heap_index = index;
}

/* Moves timer from index towards the root or the leaves until the heap is in order. */
static void heap_settle(struct reactor *reactor, size_t index, struct timer *timer)
{
	struct timer **heap = reactor->heap;

	while (index && heap[(index - 1) / 2]->deadline_ns > timer->deadline_ns) {
		heap_put(reactor, index, heap[(index - 1) / 2]);
		index = (index - 1) / 2;
	}
	for (;;) {
		size_t child = 2 * index + 1;

		if (child + 1 < reactor->timer_count &&
			heap[child + 1]->deadline_ns < heap[child]->deadline_ns)
			child++;
		if (child >= reactor->timer_count || heap[child]->deadline_ns >= timer->deadline_ns)
			break;
		heap_put(reactor, index, heap[child]);
		index = child;
	}
	heap_put(reactor, index, timer);
}

void timer_init(struct timer *timer, void (*fn)(struct timer *timer))
{
	timer->heap_index = TIMER_IDLE;
	timer->fn = fn;
}

void timer_arm(struct timer *timer, uint64_t deadline_ns)
{
	struct reactor *reactor = reactor_current;

	timer_cancel(timer);
	if (reactor->timer_count == reactor->timer_capacity) {
		size_t capacity = MAX((size_t)64, 2 * reactor->timer_capacity);
		void *heap = realloc(reactor->heap, capacity * sizeof(struct timer *));

		if (!heap)
			abort();
		reactor->heap = heap;
		reactor->timer_capacity = capacity;
	}
	timer->deadline_ns = deadline_ns;
	heap_settle(reactor, reactor->timer_count++, timer);
}

void timer_cancel(struct timer *timer)
{
	struct reactor *reactor = reactor_current;
	size_t index = timer->heap_index;

	if (index == TIMER_IDLE)
		return;
	timer->heap_index = TIMER_IDLE;
	struct timer *last = reactor->heap[--reactor->timer_count];
	if (last != timer)
		heap_settle(reactor, index, last);
}

static void run_due_timers(struct reactor *reactor)
{
	while (reactor->timer_count && reactor->heap[0]->deadline_ns <= reactor->now_ns) {
		struct timer *timer = reactor->heap[0];

		timer_cancel(timer);
		timer->fn(timer);
	}
}

/* --- the loop --------------------------------------------------------------------------------- */

/* Resumes what is ready now; what becomes ready meanwhile is for the next round. */
static void run_ready_round(struct reactor *reactor)
{
	struct list round, *link;

	list_init(&round);
	list_splice_back(&round, &reactor->ready);
	while ((link = list_pop_front(&round)))
		co_resume(link);
}

static void run_deferred(struct reactor *reactor)
{
	struct list tasks, *link;

	list_init(&tasks);
	list_splice_back(&tasks, &reactor->deferred);
	while ((link = list_pop_front(&tasks))) {
		struct task *task = list_entry(link, struct task, link);

		task->fn(task);
	}
}

/* Runs everything that can run without waiting. */
static void run_until_idle(struct reactor *reactor)
{
	for (int round = 0; round < ROUNDS_PER_TURN_MAX; round++) {
		while (!list_empty(&reactor->ready) && round++ < ROUNDS_PER_TURN_MAX)
			run_ready_round(reactor);
		bool completed = reactor->engine->ops->kick(reactor->engine);
		if (completed && round < ROUNDS_PER_TURN_MAX)
			continue;
		run_deferred(reactor);
		if (list_empty(&reactor->ready) && list_empty(&reactor->deferred))
			break;
	}
	/* What the last deferred tasks submitted must not wait for the next event. */
	reactor->engine->ops->kick(reactor->engine);
}

static void wait_for_events(struct reactor *reactor)
{
	struct timespec timeout = { 0 };
	bool wait_forever = false;

	if (list_empty(&reactor->ready) && list_empty(&reactor->deferred) &&
		list_empty(&reactor->next_turn)) {
		wait_forever = !reactor->timer_count;
		if (!wait_forever) {
			uint64_t now_ns = reactor_clock_ns(),
				 due_ns = reactor->heap[0]->deadline_ns;
			uint64_t left_ns = due_ns > now_ns ? due_ns - now_ns : 0;

			timeout.tv_sec = (time_t)MIN(left_ns / NS_PER_SEC, UINT64_C(86400));
			timeout.tv_nsec = (long)(left_ns % NS_PER_SEC);
		}
	}
	int count = epoll_pwait2(reactor->epoll_fd, reactor->events, REACTOR_EVENTS_MAX,
		wait_forever ? NULL : &timeout, NULL);
	assert(count >= 0 || errno == EINTR);
	reactor->event_count = MAX(count, 0);
	reactor->now_ns = reactor_clock_ns();
}

static void reactor_turn(struct reactor *reactor)
{
	wait_for_events(reactor);
	for (reactor->event_next = 0; reactor->event_next < reactor->event_count;) {
		struct epoll_event *event = &reactor->events[reactor->event_next++];
		struct watch *watch = event->data.ptr;

		if (watch)
			watch->fn(watch, event->events);
	}
	run_due_timers(reactor);
	list_splice_back(&reactor->ready, &reactor->next_turn);
	run_until_idle(reactor);
}

void reactor_run(struct reactor *reactor)
{
	assert(!reactor_current);
	reactor_current = reactor;
	reactor->now_ns = reactor_clock_ns();
	co_pool_init(&reactor->co);
	if (watch_add(&reactor->wake_watch, reactor->wake_fd, EPOLLIN, run_posted) ||
		reactor->engine->ops->start(reactor->engine))
		abort(); /* both only add a fresh descriptor to a fresh epoll */
	while (!atomic_load(&reactor->stopping))
		reactor_turn(reactor);
	reactor->engine->ops->stop(reactor->engine);
	watch_remove(&reactor->wake_watch);
	co_pool_fini(&reactor->co);
	atomic_store(&reactor->stopping, false);
	reactor_current = NULL;
}

void reactor_stop(struct reactor *reactor)
{
	pthread_mutex_lock(&reactor->posted_mutex);
	atomic_store(&reactor->stopping, true);
	eventfd_write(reactor->wake_fd, 1);
	pthread_mutex_unlock(&reactor->posted_mutex);
}

/* --- making and ending one -------------------------------------------------------------------- */

static int engine_create(struct reactor *reactor, const char *name, struct err *err)
{
	bool automatic = !strcmp(name, "auto");

	if (automatic || !strcmp(name, uring_engine_ops.name)) {
		int ret = uring_engine_ops.create(&reactor->engine, reactor, err);

		if (!ret || !automatic)
			return ret;
	} else if (strcmp(name, threads_engine_ops.name)) {
		return err_set(err, EINVAL,
			"unknown engine \"%s\" (there are: auto, uring, threads)", name);
	}
	return threads_engine_ops.create(&reactor->engine, reactor, err);
}

int reactor_create(struct reactor **created, const char *engine_name, struct err *err)
{
	struct reactor *reactor = calloc(1, sizeof(*reactor));

	*created = NULL;
	if (!reactor)
		return err_set(err, ENOMEM, "no memory for a reactor");
	list_init(&reactor->ready);
	list_init(&reactor->next_turn);
	list_init(&reactor->deferred);
	list_init(&reactor->posted);
	buf_pool_init(&reactor->bufs);
	pthread_mutex_init(&reactor->posted_mutex, NULL);
	reactor->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	reactor->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (reactor->epoll_fd < 0 || reactor->wake_fd < 0) {
		int code = errno;

		reactor_free(reactor);
		return err_sys(err, code, "cannot create an epoll instance");
	}
	int ret = engine_create(reactor, engine_name, err);
	if (ret) {
		reactor_free(reactor);
		return ret;
	}
	*created = reactor;
	return 0;
}

void reactor_free(struct reactor *reactor)
{
	if (!reactor)
		return;
	if (reactor->engine)
		reactor->engine->ops->free(reactor->engine);
	if (reactor->epoll_fd >= 0)
		close(reactor->epoll_fd);
	if (reactor->wake_fd >= 0)
		close(reactor->wake_fd);
	pthread_mutex_destroy(&reactor->posted_mutex);
	buf_pool_fini(&reactor->bufs);
	free(reactor->heap);
	free(reactor);
}

struct main_call {
	struct task task;
	co_fn *fn;
	void *arg;
};

static suspends void main_call_run(void *arg)
{
	struct main_call *call = arg;

	call->fn(call->arg);
	reactor_stop(reactor_self());
}

static void main_call_start(struct task *task)
{
	co_start(main_call_run, container_of(task, struct main_call, task));
}

void reactor_run_main(struct reactor *reactor, co_fn *fn, void *arg)
{
	struct main_call call = { .fn = fn, .arg = arg };

	task_init(&call.task, main_call_start);
	reactor_post(reactor, &call.task);
	reactor_run(reactor);
}

/* --- for coroutines --------------------------------------------------------------------------- */

suspends void co_suspend_outside(void)
{
	struct reactor *reactor = reactor_current;

	reactor->outside_waits++;
	co_suspend();
	reactor->outside_waits--;
}

unsigned reactor_outside_waits(void)
{
	return reactor_current->outside_waits;
}

struct sleep {
	struct timer timer;
	struct co *co;
};

static void sleep_over(struct timer *timer)
{
	co_wake(container_of(timer, struct sleep, timer)->co);
}

suspends void co_sleep_ns(uint64_t duration_ns)
{
	struct sleep sleep = { .co = co_self() };

	timer_init(&sleep.timer, sleep_over);
	timer_arm(&sleep.timer, reactor_now_ns() + duration_ns);
	co_suspend_outside();
}

struct remote_call {
	struct task task;
	co_fn *fn;
	void *arg;
	struct reactor *origin;
	struct co *caller;
};

static void remote_call_done(struct task *task)
{
	co_wake(container_of(task, struct remote_call, task)->caller);
}

static suspends void remote_call_run(void *arg)
{
	struct remote_call *call = arg;

	call->fn(call->arg);
	task_init(&call->task, remote_call_done);
	reactor_post(call->origin, &call->task);
}

static void remote_call_start(struct task *task)
{
	co_start(remote_call_run, container_of(task, struct remote_call, task));
}

suspends void co_call_on(struct reactor *reactor, co_fn *fn, void *arg)
{
	struct remote_call call = {
		.fn = fn, .arg = arg, .origin = reactor_self(), .caller = co_self()
	};

	if (reactor == call.origin) {
		fn(arg);
		return;
	}
	task_init(&call.task, remote_call_start);
	reactor_post(reactor, &call.task);
	co_suspend_outside();
}
