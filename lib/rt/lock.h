/*
 * What coroutines of one reactor wait on: queues, mutexes, groups, byte ranges.
 *
 * None of it is for several threads. All of it is FIFO: who waited first is served first.
 * All structs are embedded and need no destructor; nobody may be waiting when they go away.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/list.h"
#include "rt/co.h"

/* A queue to wait in until somebody says it is worth looking again. */
struct co_queue {
	struct list waiters;
};

void co_queue_init(struct co_queue *queue);
suspends void co_queue_wait(struct co_queue *queue);
/* Like co_queue_wait() but gives up at deadline_ns (reactor clock): false then. */
suspends bool co_queue_wait_until(struct co_queue *queue, uint64_t deadline_ns);
bool co_queue_wake_one(struct co_queue *queue); /* false when nobody waits */
void co_queue_wake_all(struct co_queue *queue);

struct co_mutex {
	bool locked;
	struct co_queue queue;
};

void co_mutex_init(struct co_mutex *mutex);
suspends void co_mutex_lock(struct co_mutex *mutex);
void co_mutex_unlock(struct co_mutex *mutex); /* hands over to the first waiter, if any */

/* Coroutines started together and waited for together; also a counter of requests in flight. */
struct co_group {
	unsigned running;
	struct co_queue idle;
};

void co_group_init(struct co_group *group);
void co_group_start(struct co_group *group, co_fn *fn, void *arg);
void co_group_enter(struct co_group *group); /* counts the caller itself */
void co_group_leave(struct co_group *group);
suspends void co_group_wait(struct co_group *group); /* until running is 0 */

/*
 * Byte ranges in use. Shared ranges overlap freely with each other; an exclusive one with none.
 * The range is a variable of the holder. Cost without a conflict: a walk over those in flight.
 */
struct range_lock {
	struct list held;
	struct list waiting;
};

struct range {
	struct list link;
	uint64_t off, len;
	bool exclusive;
	struct co *waiter; /* NULL: it is held */
};

void range_lock_init(struct range_lock *lock);
/* Waits until [off, off + len) may be held, in order of arrival among those that conflict. */
suspends void range_lock_acquire(
	struct range_lock *lock, struct range *range, uint64_t off, uint64_t len, bool exclusive);
/* The same for the whole space, exclusively, but gives up at deadline_ns (reactor clock): false then. */
suspends bool range_lock_acquire_all_until(
	struct range_lock *lock, struct range *range, uint64_t deadline_ns);
void range_lock_release(struct range_lock *lock, struct range *range);
