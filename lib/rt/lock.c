/*
 * Queues, mutexes, groups and range locks for coroutines; see lock.h.
 *
 * Whoever waits has a struct waiter on its own stack, linked into the queue until it is woken.
 * A link that is a list of its own means "not waiting any more": that settles the race between a wake-up and a
 * deadline, because whichever comes first unlinks the waiter and the other then leaves it alone.
 *
 * A mutex and a range are handed over by whoever lets go, not taken by whoever runs first, so nobody
 * can overtake a waiter.
 */
#include "rt/lock.h"

#include <assert.h>

#include "base/util.h"
#include "rt/reactor.h"

struct waiter {
	struct list link;
	struct co *co;
	bool timed_out;
	struct timer timer;
};

/* --- queues ----------------------------------------------------------------------------------- */

void co_queue_init(struct co_queue *queue)
{
	list_init(&queue->waiters);
}

suspends void co_queue_wait(struct co_queue *queue)
{
	struct waiter waiter = { .co = co_self() };

	list_push_back(&queue->waiters, &waiter.link);
	co_suspend();
}

static void wait_timed_out(struct timer *timer)
{
	struct waiter *waiter = container_of(timer, struct waiter, timer);

	if (list_empty(&waiter->link))
		return; /* woken in this very turn */
	list_remove(&waiter->link);
	waiter->timed_out = true;
	co_wake(waiter->co);
}

suspends bool co_queue_wait_until(struct co_queue *queue, uint64_t deadline_ns)
{
	struct waiter waiter = { .co = co_self() };

	if (deadline_ns == NO_DEADLINE) {
		co_queue_wait(queue);
		return true;
	}
	if (deadline_ns <= reactor_now_ns())
		return false;
	timer_init(&waiter.timer, wait_timed_out);
	timer_arm(&waiter.timer, deadline_ns);
	list_push_back(&queue->waiters, &waiter.link);
	co_suspend_outside();
	timer_cancel(&waiter.timer);
	return !waiter.timed_out;
}

bool co_queue_wake_one(struct co_queue *queue)
{
	struct list *link = list_pop_front(&queue->waiters);

	if (!link)
		return false;
	co_wake(list_entry(link, struct waiter, link)->co);
	return true;
}

void co_queue_wake_all(struct co_queue *queue)
{
	while (co_queue_wake_one(queue))
		;
}

/* --- mutexes ---------------------------------------------------------------------------------- */

void co_mutex_init(struct co_mutex *mutex)
{
	mutex->locked = false;
	co_queue_init(&mutex->queue);
}

suspends void co_mutex_lock(struct co_mutex *mutex)
{
	if (mutex->locked)
		co_queue_wait(&mutex->queue); /* ours when we return */
	else
		mutex->locked = true;
}

void co_mutex_unlock(struct co_mutex *mutex)
{
	assert(mutex->locked);
	if (!co_queue_wake_one(&mutex->queue))
		mutex->locked = false;
}

/* --- groups ----------------------------------------------------------------------------------- */

struct group_call {
	struct co_group *group;
	co_fn *fn;
	void *arg;
};

void co_group_init(struct co_group *group)
{
	group->running = 0;
	co_queue_init(&group->idle);
}

static suspends void group_call_run(void *arg)
{
	/* A copy: the original is gone as soon as fn suspends. */
	struct group_call call = *(struct group_call *)arg;

	call.fn(call.arg);
	co_group_leave(call.group);
}

void co_group_start(struct co_group *group, co_fn *fn, void *arg)
{
	struct group_call call = { .group = group, .fn = fn, .arg = arg };

	co_group_enter(group);
	co_start(group_call_run, &call);
}

void co_group_enter(struct co_group *group)
{
	group->running++;
}

void co_group_leave(struct co_group *group)
{
	assert(group->running);
	if (!--group->running)
		co_queue_wake_all(&group->idle);
}

suspends void co_group_wait(struct co_group *group)
{
	while (group->running)
		co_queue_wait(&group->idle);
}

/* --- ranges ----------------------------------------------------------------------------------- */

void range_lock_init(struct range_lock *lock)
{
	list_init(&lock->held);
	list_init(&lock->waiting);
}

static bool ranges_conflict(const struct range *a, const struct range *b)
{
	return (a->exclusive || b->exclusive) && ranges_overlap(a->off, a->len, b->off, b->len);
}

/* Whether range conflicts with one on the list that comes before `end`, a link or the head itself. */
static bool conflicts_with_any(
	const struct range *range, const struct list *head, const struct list *end)
{
	for (const struct list *link = head->next; link != end; link = link->next)
		if (ranges_conflict(range, list_entry(link, const struct range, link)))
			return true;
	return false;
}

/* Whether it is held already; else it waits, and whoever asked has to suspend. */
static inline bool acquire_or_queue(struct range_lock *lock, struct range *range)
{
	if (conflicts_with_any(range, &lock->held, &lock->held) ||
		conflicts_with_any(range, &lock->waiting, &lock->waiting)) {
		range->waiter = co_self();
		list_push_back(&lock->waiting, &range->link);
		return false;
	}
	list_push_back(&lock->held, &range->link);
	return true;
}

suspends void range_lock_acquire(
	struct range_lock *lock, struct range *range, uint64_t off, uint64_t len, bool exclusive)
{
	*range = (struct range){ .off = off, .len = len, .exclusive = exclusive };
	if (!acquire_or_queue(lock, range))
		co_suspend(); /* in lock->held when we return */
}

/* Only those that conflict with the range let go can have been waiting for it. */
void range_lock_release(struct range_lock *lock, struct range *range)
{
	list_remove(&range->link);
	list_for_each_safe (link, &lock->waiting) {
		struct range *next = list_entry(link, struct range, link);

		if (!ranges_conflict(next, range) ||
			conflicts_with_any(next, &lock->held, &lock->held) ||
			conflicts_with_any(next, &lock->waiting, link))
			continue;
		list_remove(link);
		list_push_back(&lock->held, link);
		co_wake(next->waiter);
		next->waiter = NULL;
	}
}

struct range_deadline {
	struct timer timer;
	struct range_lock *lock;
	struct range *range;
	bool passed;
};

static void range_timed_out(struct timer *timer)
{
	struct range_deadline *deadline = container_of(timer, struct range_deadline, timer);
	struct co *waiter = deadline->range->waiter;

	if (!waiter)
		return; /* held since this very turn */
	deadline->passed = true;
	range_lock_release(deadline->lock, deadline->range); /* nobody waits behind it any more */
	co_wake(waiter);
}

suspends bool range_lock_acquire_all_until(
	struct range_lock *lock, struct range *range, uint64_t deadline_ns)
{
	struct range_deadline deadline = { .lock = lock, .range = range };

	*range = (struct range){ .len = UINT64_MAX, .exclusive = true };
	if (acquire_or_queue(lock, range))
		return true;
	timer_init(&deadline.timer, range_timed_out);
	timer_arm(&deadline.timer, deadline_ns);
	co_suspend_outside();
	timer_cancel(&deadline.timer);
	return !deadline.passed;
}
