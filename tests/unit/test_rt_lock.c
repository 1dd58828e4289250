/*
 * Queues, mutexes, groups and range locks: exclusion, fairness, and nobody waits for nothing.
 *
 * Range locks are compared, step by step, with an oracle that does the obvious thing.
 */
#include <string.h>

#include "base/util.h"
#include "rt/lock.h"
#include "tests/unit/testing.h"

static suspends void yield_randomly(void)
{
	for (unsigned yields = test_random(4); yields; yields--)
		co_yield ();
}

/* --- queues ----------------------------------------------------------------------------------- */

static struct co_queue queue;
static int woken_order[8], woken_count;

static suspends void wait_in_queue(void *arg)
{
	co_queue_wait(&queue);
	woken_order[woken_count++] = (int)(intptr_t)arg;
}

static suspends void wake_in_order(void *arg)
{
	co_queue_init(&queue);
	ck_assert(!co_queue_wake_one(&queue));
	for (intptr_t i = 0; i < 5; i++)
		co_start(wait_in_queue, (void *)i);
	ck_assert(co_queue_wake_one(&queue));
	co_yield ();
	ck_assert_int_eq(woken_count, 1);
	co_queue_wake_all(&queue);
	ck_assert(!co_queue_wake_one(&queue));
	co_yield ();
	ck_assert_int_eq(woken_count, 5);
	for (int i = 0; i < 5; i++)
		ck_assert_int_eq(woken_order[i], i);
}

START_TEST(a_queue_wakes_in_order_of_waiting)
{
	test_run_co(wake_in_order, NULL);
}
END_TEST

static bool was_woken;

static suspends void wait_until(void *arg)
{
	was_woken = co_queue_wait_until(&queue, *(uint64_t *)arg);
}

static void wake_the_queue(struct task *task)
{
	ck_assert(co_queue_wake_one(&queue));
}

static suspends void wait_with_deadlines(void *arg)
{
	struct task task;
	uint64_t soon_ns = reactor_now_ns() + NS_PER_MS, never_ns = NO_DEADLINE;

	co_queue_init(&queue);
	ck_assert(!co_queue_wait_until(&queue, reactor_now_ns()));
	ck_assert(!co_queue_wait_until(&queue, soon_ns));
	ck_assert_uint_ge(reactor_now_ns(), soon_ns);
	ck_assert(!co_queue_wake_one(&queue)); /* who gave up is not in the queue any more */

	co_start(wait_until, &never_ns);
	co_queue_wake_all(&queue);
	co_yield ();
	ck_assert(was_woken);

	/* Wake-up and deadline are found in the same turn, before the waiter runs: the wake-up counts. */
	was_woken = false;
	soon_ns = reactor_now_ns() + 1;
	co_start(wait_until, &soon_ns);
	task_init(&task, wake_the_queue);
	reactor_post(reactor_self(), &task);
	co_sleep_ns(NS_PER_MS);
	ck_assert(was_woken);
}

START_TEST(a_wait_ends_at_its_deadline_or_by_a_wake_up_never_both)
{
	test_run_co(wait_with_deadlines, NULL);
}
END_TEST

static int race_waits, race_wakes_taken, race_left;

static suspends void race_waiter(void *arg)
{
	for (int i = 0; i < 50; i++) {
		race_waits++;
		race_wakes_taken += co_queue_wait_until(
			&queue, reactor_now_ns() + test_random(100 * 1000));
	}
	race_left--;
}

/* As many wake-ups are taken as were given, whatever the deadlines do. */
static suspends void race_deadlines(void *arg)
{
	int given = 0;

	co_queue_init(&queue);
	for (race_left = 0; race_left < 20; race_left++)
		co_start(race_waiter, NULL);
	while (race_left) {
		for (unsigned i = test_random(4); i; i--)
			given += co_queue_wake_one(&queue);
		co_sleep_ns(test_random(50 * 1000));
	}
	ck_assert_int_eq(race_waits, 20 * 50);
	ck_assert_int_eq(given, race_wakes_taken);
}

START_TEST(no_wake_up_is_lost_to_a_deadline)
{
	test_seed();
	test_run_co(race_deadlines, NULL);
}
END_TEST

/* --- mutexes ---------------------------------------------------------------------------------- */

static struct co_mutex mutex;
static int tickets, next_ticket, inside;

static suspends void lock_often(void *arg)
{
	for (int i = 0; i < 100; i++) {
		int ticket = tickets++;

		co_mutex_lock(&mutex);
		require(ticket == next_ticket);
		next_ticket++;
		require(!inside++);
		yield_randomly();
		inside--;
		co_mutex_unlock(&mutex);
		yield_randomly();
	}
}

static suspends void lock_from_many(void *arg)
{
	struct co_group group;

	co_mutex_init(&mutex);
	co_group_init(&group);
	for (int i = 0; i < 20; i++)
		co_group_start(&group, lock_often, NULL);
	co_group_wait(&group);
	ck_assert(!mutex.locked);
	ck_assert_int_eq(next_ticket, 20 * 100);
}

START_TEST(a_mutex_lets_one_in_at_a_time_in_order_of_arrival)
{
	test_seed();
	test_run_co(lock_from_many, NULL);
}
END_TEST

/* --- groups ----------------------------------------------------------------------------------- */

static int members_done;

static suspends void member(void *arg)
{
	struct co_group *group = arg;

	if (group && test_random(2))
		co_group_start(group, member, NULL); /* a member may bring others */
	yield_randomly();
	members_done++;
}

static suspends void await_group(void *arg)
{
	struct co_group *group = arg;

	co_group_wait(group);
	require(!group->running);
}

static suspends void run_groups(void *arg)
{
	struct co_group group, waiters;

	co_group_init(&group);
	co_group_init(&waiters);
	co_group_wait(&group); /* of an empty group: at once */
	for (int round = 0; round < 100; round++) {
		for (int i = 0; i < 10; i++)
			co_group_start(&group, member, &group);
		co_group_enter(&group);
		co_group_start(&waiters, await_group, &group);
		co_yield ();
		ck_assert_uint_eq(waiters.running, 1);
		co_group_leave(&group);
		co_group_wait(&group);
		co_group_wait(&waiters);
	}
	ck_assert_int_ge(members_done, 1000);
}

START_TEST(a_group_is_over_when_all_its_members_are)
{
	test_seed();
	test_run_co(run_groups, NULL);
}
END_TEST

/* --- ranges ----------------------------------------------------------------------------------- */

#define RANGE_USERS 24
#define RANGE_STEPS 200
#define RANGE_SPACE 64

enum phase { ABSENT, WAITING, HOLDING };

/* The oracle: everybody's request, and its place in the order of arrival. */
static struct range_user {
	enum phase phase;
	bool returned; /* range_lock_acquire() has */
	int arrival;
	uint64_t off, len;
	bool exclusive;
} users[RANGE_USERS];

static struct range_lock range_lock;
static int arrivals;

/* Byte by byte, as a reader of lock.h would say it. */
static bool users_conflict(const struct range_user *a, const struct range_user *b)
{
	if (!a->exclusive && !b->exclusive)
		return false;
	for (uint64_t byte = a->off; byte < a->off + a->len; byte++)
		if (byte >= b->off && byte < b->off + b->len)
			return true;
	return false;
}

static bool may_hold(const struct range_user *user)
{
	for (int i = 0; i < RANGE_USERS; i++) {
		const struct range_user *other = &users[i];
		bool ahead = other->phase == HOLDING ||
			     (other->phase == WAITING && other->arrival < user->arrival);

		if (other != user && ahead && users_conflict(user, other))
			return false;
	}
	return true;
}

static void oracle_grant(void)
{
	bool granted;

	do {
		granted = false;
		for (int i = 0; i < RANGE_USERS; i++) {
			if (users[i].phase == WAITING && may_hold(&users[i])) {
				users[i].phase = HOLDING;
				granted = true;
			}
		}
	} while (granted);
}

static suspends void use_ranges(void *arg)
{
	struct range_user *user = arg;

	for (int i = 0; i < RANGE_STEPS; i++) {
		struct range range;

		user->off = test_random(RANGE_SPACE);
		user->len = test_random(RANGE_SPACE / 4);
		user->exclusive = test_random(3) == 0;
		user->arrival = arrivals++;
		user->returned = false;
		user->phase = WAITING;
		oracle_grant();
		range_lock_acquire(&range_lock, &range, user->off, user->len, user->exclusive);
		require(user->phase == HOLDING);
		user->returned = true;
		yield_randomly();
		user->phase = ABSENT;
		oracle_grant();
		range_lock_release(&range_lock, &range);
		yield_randomly();
	}
}

static int checks_done;

/* Whom the oracle has let in runs next, or the lock makes somebody wait for nothing. */
static suspends void check_progress(void *arg)
{
	bool *over = arg;

	while (!*over) {
		int granted_arrival[RANGE_USERS];

		for (int i = 0; i < RANGE_USERS; i++) {
			bool due = users[i].phase == HOLDING && !users[i].returned;

			granted_arrival[i] = due ? users[i].arrival : -1;
			checks_done += due;
		}
		co_yield ();
		for (int i = 0; i < RANGE_USERS; i++)
			require(users[i].arrival != granted_arrival[i] || users[i].returned);
	}
}

static suspends void use_ranges_from_many(void *arg)
{
	struct co_group group, checker;
	bool over = false;

	range_lock_init(&range_lock);
	co_group_init(&group);
	co_group_init(&checker);
	co_group_start(&checker, check_progress, &over);
	for (int i = 0; i < RANGE_USERS; i++)
		co_group_start(&group, use_ranges, &users[i]);
	co_group_wait(&group);
	over = true;
	co_group_wait(&checker);
	ck_assert(list_empty(&range_lock.held) && list_empty(&range_lock.waiting));
	ck_assert_int_gt(checks_done, 0);
}

START_TEST(a_range_lock_does_what_the_oracle_does)
{
	test_seed();
	test_run_co(use_ranges_from_many, NULL);
}
END_TEST

static suspends void ranges_at_the_end(void *arg)
{
	struct range last, empty, before;

	/* None of these share a byte: none waits. */
	range_lock_init(&range_lock);
	range_lock_acquire(&range_lock, &last, UINT64_MAX - 4095, 4096, true);
	range_lock_acquire(&range_lock, &empty, UINT64_MAX - 100, 0, true);
	range_lock_acquire(&range_lock, &before, 0, UINT64_MAX - 4095, true);
	range_lock_release(&range_lock, &empty);
	range_lock_release(&range_lock, &last);
	range_lock_release(&range_lock, &before);
}

START_TEST(ranges_at_the_end_of_the_space_and_empty_ones_conflict_with_nobody)
{
	test_run_co(ranges_at_the_end, NULL);
}
END_TEST

static bool all_acquired, behind_acquired;

static suspends void acquire_all(void *arg)
{
	struct range all;

	all_acquired = range_lock_acquire_all_until(
		&range_lock, &all, reactor_now_ns() + *(uint64_t *)arg);
	if (all_acquired)
		range_lock_release(&range_lock, &all);
}

static suspends void acquire_behind(void *arg)
{
	struct range behind;

	range_lock_acquire(&range_lock, &behind, 4096, 4096, true);
	behind_acquired = true;
	range_lock_release(&range_lock, &behind);
}

/* Who gave up keeps nobody waiting; who has it in time has it for good. */
static suspends void give_up_a_range(void *arg)
{
	uint64_t soon_ns = NS_PER_MS, late_ns = 1000 * NS_PER_SEC;
	struct range held;

	range_lock_init(&range_lock);
	range_lock_acquire(&range_lock, &held, 0, 4096, true);
	all_acquired = true;
	co_start(acquire_all, &soon_ns);
	co_start(acquire_behind, NULL);
	ck_assert(!behind_acquired);
	while (!behind_acquired)
		co_sleep_ns(NS_PER_MS);
	ck_assert(!all_acquired);
	ck_assert(list_empty(&range_lock.waiting));

	co_start(acquire_all, &late_ns);
	range_lock_release(&range_lock, &held);
	co_yield ();
	ck_assert(all_acquired);
	ck_assert(list_empty(&range_lock.held));
}

START_TEST(a_range_is_given_up_at_its_deadline)
{
	test_run_co(give_up_a_range, NULL);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, a_queue_wakes_in_order_of_waiting);
	tcase_add_test(tcase, a_wait_ends_at_its_deadline_or_by_a_wake_up_never_both);
	tcase_add_test(tcase, no_wake_up_is_lost_to_a_deadline);
	tcase_add_test(tcase, a_mutex_lets_one_in_at_a_time_in_order_of_arrival);
	tcase_add_test(tcase, a_group_is_over_when_all_its_members_are);
	tcase_add_test(tcase, a_range_lock_does_what_the_oracle_does);
	tcase_add_test(tcase, ranges_at_the_end_of_the_space_and_empty_ones_conflict_with_nobody);
	tcase_add_test(tcase, a_range_is_given_up_at_its_deadline);
}

int main(void)
{
	return test_run_suite("lock", fill);
}
