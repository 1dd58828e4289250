/*
 * A reactor: one thread, one epoll, one run queue of coroutines, one I/O engine.
 *
 * One turn of the loop: wait for events; run their callbacks; run due timers and everything that is
 * ready until nothing is; run the deferred tasks (this is where replies are gathered and sent); hand the
 * collected file I/O to the engine in one go; wait again. So everything that one wake-up produces
 * shares its system calls.
 *
 * Everything here is called on the reactor's own thread, except where it says "any thread".
 * Watches, timers and tasks are embedded in their owners' structs and belong to them; the reactor
 * only links them. Callbacks run in plain code (they must not suspend): to wait, co_start().
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/list.h"
#include "rt/co.h"

struct reactor;

/*
 * engine_name: "uring", "threads", or "auto" (uring where the kernel allows it, else threads).
 * The thread that calls reactor_run() becomes the reactor's thread.
 */
int reactor_create(struct reactor **reactor, const char *engine_name, struct err *err);
void reactor_run(struct reactor *reactor);  /* until reactor_stop() */
void reactor_stop(struct reactor *reactor); /* any thread; the loop ends after the current turn */
void reactor_free(struct reactor *reactor); /* not running; every watch and timer removed */

/* Runs fn(arg) as a coroutine on a new reactor loop in this thread until it returns: for main(), tools, tests. */
void reactor_run_main(struct reactor *reactor, co_fn *fn, void *arg);

struct reactor *reactor_self(void); /* the current thread's reactor, NULL elsewhere */
const char *reactor_engine_name(const struct reactor *reactor);

/* CLOCK_MONOTONIC in ns, read once per turn (cheap; good for deadlines, not for measuring). */
uint64_t reactor_now_ns(void);
/* The same clock, read now. */
uint64_t reactor_clock_ns(void);

/* --- tasks ------------------------------------------------------------------------------------ */

struct task {
	struct list link; /* of task_init(): a list of its own while not queued */
	void (*fn)(struct task *task);
};

void task_init(struct task *task, void (*fn)(struct task *task));

/* Any thread: fn runs on reactor's thread soon. The task must not be queued already. */
void reactor_post(struct reactor *reactor, struct task *task);

/* fn runs once at the end of this turn, when nothing else is ready. Harmless when queued already. */
void reactor_defer(struct task *task);
void reactor_defer_cancel(struct task *task);

/* --- file descriptors ------------------------------------------------------------------------- */

struct watch {
	int fd;
	void (*fn)(struct watch *watch, uint32_t epoll_events);
};

/* epoll_events as in epoll_ctl(2), EPOLLET allowed. The fd stays the caller's. -errno (e.g. EPERM: not pollable). */
int watch_add(struct watch *watch, int fd, uint32_t epoll_events,
	void (*fn)(struct watch *watch, uint32_t epoll_events));
void watch_modify(struct watch *watch, uint32_t epoll_events);
/* Before the fd is closed. No callback comes after this, not even for an event already fetched. */
void watch_remove(struct watch *watch);

/* --- timers ----------------------------------------------------------------------------------- */

struct timer {
	size_t heap_index; /* TIMER_IDLE while not armed */
	uint64_t deadline_ns;
	void (*fn)(struct timer *timer);
};

#define TIMER_IDLE  SIZE_MAX
#define NO_DEADLINE UINT64_MAX
#define NS_PER_MS   UINT64_C(1000000)
#define NS_PER_SEC  UINT64_C(1000000000)

void timer_init(struct timer *timer, void (*fn)(struct timer *timer));
/* Arms or re-arms; deadline_ns on the clock of reactor_now_ns(). */
void timer_arm(struct timer *timer, uint64_t deadline_ns);
void timer_cancel(struct timer *timer);

/* --- for coroutines --------------------------------------------------------------------------- */

/*
 * As co_suspend(), where the wake-up will come from outside: from a disk, another thread or machine, the clock. When
 * nobody waits like this, those who wait at all wait for each other.
 */
suspends void co_suspend_outside(void);
/* How many coroutines of the current reactor do. */
unsigned reactor_outside_waits(void);

suspends void co_sleep_ns(uint64_t duration_ns);

/* As co_yield(), but until the sockets have been looked at: those who have news go first. */
suspends void co_yield_turn(void);

/* Runs fn(arg) as a coroutine on another reactor (or this one) and waits for its end. */
suspends void co_call_on(struct reactor *reactor, co_fn *fn, void *arg);

/*
 * Runs fn(arg) on a thread of the offload pool and waits for its end: for calls that block and have no
 * other form (open, ioctl, compression, sysfs). The pool is shared by all reactors and small.
 */
suspends void co_offload(void (*fn)(void *arg), void *arg);
