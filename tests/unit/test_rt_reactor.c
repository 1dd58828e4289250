/*
 * The reactor: timers against an oracle, posts from threads, deferred tasks, watches, calls to other
 * reactors, and offloaded calls.
 */
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/lock.h"
#include "tests/unit/testing.h"

/* --- timers ----------------------------------------------------------------------------------- */

#define TIMER_COUNT       200
#define TIMERS_TO_FIRE    5000
#define TIMER_SPAN_NS     (2 * NS_PER_MS)
#define TIMER_OPS_PER_ONE 4

/* The oracle: what is armed, until when. */
static struct oracle_timer {
	struct timer timer;
	bool armed;
	uint64_t deadline_ns;
} timers[TIMER_COUNT];

static int fired_count;
static struct co *timer_test_co;

static void timer_op(struct oracle_timer *one)
{
	if (test_random(3)) {
		one->deadline_ns = reactor_now_ns() + test_random(TIMER_SPAN_NS);
		one->armed = true;
		timer_arm(&one->timer, one->deadline_ns);
	} else {
		one->armed = false;
		timer_cancel(&one->timer);
	}
}

static void oracle_timer_fired(struct timer *timer)
{
	struct oracle_timer *one = container_of(timer, struct oracle_timer, timer);

	require(one->armed);
	require(timer->heap_index == TIMER_IDLE);
	require(one->deadline_ns <= reactor_now_ns());
	for (int i = 0; i < TIMER_COUNT; i++)
		require(!timers[i].armed || timers[i].deadline_ns >= one->deadline_ns);
	one->armed = false;
	if (++fired_count < TIMERS_TO_FIRE)
		for (int i = 0; i < TIMER_OPS_PER_ONE; i++)
			timer_op(&timers[test_random(TIMER_COUNT)]);
	bool any_armed = false;
	for (int i = 0; i < TIMER_COUNT; i++)
		any_armed |= timers[i].armed;
	if (!any_armed)
		co_wake(timer_test_co);
}

static suspends void random_timers(void *arg)
{
	timer_test_co = co_self();
	for (int i = 0; i < TIMER_COUNT; i++) {
		timer_init(&timers[i].timer, oracle_timer_fired);
		timers[i].armed = true;
		timers[i].deadline_ns = reactor_now_ns() + test_random(TIMER_SPAN_NS);
		timer_arm(&timers[i].timer, timers[i].deadline_ns);
	}
	co_suspend();
}

START_TEST(timers_fire_in_order_of_their_deadlines)
{
	test_seed();
	test_run_co(random_timers, NULL);
	ck_assert_int_ge(fired_count, TIMERS_TO_FIRE);
}
END_TEST

static suspends void sleep_a_while(void *arg)
{
	uint64_t until_ns = reactor_now_ns() + 3 * NS_PER_MS;

	co_sleep_ns(3 * NS_PER_MS);
	ck_assert_uint_ge(reactor_now_ns(), until_ns);
}

START_TEST(a_sleep_is_never_shorter)
{
	test_run_co(sleep_a_while, NULL);
}
END_TEST

/* --- posts ------------------------------------------------------------------------------------ */

#define POSTER_COUNT     4
#define POSTS_PER_THREAD 5000

static struct poster {
	struct reactor *reactor;
	pthread_t thread;
	int arrived;
	struct numbered_task {
		struct task task;
		struct poster *poster;
		int number;
	} tasks[POSTS_PER_THREAD];
} posters[POSTER_COUNT];

static int posts_missing = POSTER_COUNT * POSTS_PER_THREAD;
static struct co *post_test_co;

static void post_arrived(struct task *task)
{
	struct numbered_task *numbered = container_of(task, struct numbered_task, task);

	require(reactor_self() == numbered->poster->reactor);
	require(numbered->number == numbered->poster->arrived++);
	if (!--posts_missing)
		co_wake(post_test_co);
}

static void *post_many(void *arg)
{
	struct poster *poster = arg;

	for (int i = 0; i < POSTS_PER_THREAD; i++) {
		poster->tasks[i].poster = poster;
		poster->tasks[i].number = i;
		task_init(&poster->tasks[i].task, post_arrived);
		reactor_post(poster->reactor, &poster->tasks[i].task);
	}
	return NULL;
}

static suspends void receive_posts(void *arg)
{
	post_test_co = co_self();
	for (int i = 0; i < POSTER_COUNT; i++) {
		posters[i].reactor = reactor_self();
		ck_assert(!pthread_create(&posters[i].thread, NULL, post_many, &posters[i]));
	}
	co_suspend();
	for (int i = 0; i < POSTER_COUNT; i++)
		pthread_join(posters[i].thread, NULL);
}

START_TEST(posts_from_threads_all_arrive_in_each_threads_order)
{
	test_run_co(receive_posts, NULL);
	ck_assert_int_eq(posts_missing, 0);
}
END_TEST

/* --- deferred tasks --------------------------------------------------------------------------- */

static int deferred_runs, yields_before_deferred;
static struct co *defer_test_co;

static void deferred(struct task *task)
{
	deferred_runs++;
	ck_assert_int_eq(yields_before_deferred, 3);
	co_wake(defer_test_co);
}

static void never(struct task *task)
{
	ck_abort_msg("a cancelled task ran");
}

static suspends void yield_three_times(void *arg)
{
	for (int i = 0; i < 3; i++) {
		co_yield ();
		yields_before_deferred++;
	}
}

static suspends void defer(void *arg)
{
	struct task task, cancelled;

	defer_test_co = co_self();
	task_init(&task, deferred);
	task_init(&cancelled, never);
	reactor_defer(&task);
	reactor_defer(&task);
	reactor_defer(&cancelled);
	reactor_defer_cancel(&cancelled);
	co_start(yield_three_times, NULL);
	co_suspend();
	co_sleep_ns(0);
	ck_assert_int_eq(deferred_runs, 1);
}

START_TEST(a_deferred_task_runs_once_when_nothing_else_is_ready)
{
	test_run_co(defer, NULL);
}
END_TEST

/* --- watches ---------------------------------------------------------------------------------- */

static struct watch watch_pair[2];
static int watch_calls;

/* Both descriptors are readable in the same turn; whoever is called first removes the other. */
static void remove_the_other(struct watch *watch, uint32_t epoll_events)
{
	ck_assert(epoll_events & EPOLLIN);
	watch_calls++;
	watch_remove(&watch_pair[0]);
	watch_remove(&watch_pair[1]);
}

static suspends void watch_two(void *arg)
{
	int fds[2] = { eventfd(1, EFD_CLOEXEC), eventfd(1, EFD_CLOEXEC) };

	for (int i = 0; i < 2; i++)
		ck_assert(!watch_add(&watch_pair[i], fds[i], EPOLLIN, remove_the_other));
	co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(watch_calls, 1);
	close(fds[0]);
	close(fds[1]);
}

START_TEST(no_event_comes_to_a_removed_watch)
{
	test_run_co(watch_two, NULL);
}
END_TEST

/* --- other reactors --------------------------------------------------------------------------- */

#define CALLERS_PER_REACTOR 8
#define CALLS_PER_CALLER    200

struct station {
	struct reactor *reactor, *other;
	pthread_t thread;
	int served; /* touched on its own reactor only */
};

static suspends void serve_call(void *arg)
{
	struct station *there = arg;

	require(reactor_self() == there->reactor);
	if (test_random(2))
		co_yield ();
	there->served++;
}

static struct station stations[2];

static suspends void make_calls(void *arg)
{
	struct station *here = arg;

	for (int i = 0; i < CALLS_PER_CALLER; i++) {
		struct station *there = &stations[here == &stations[i % 2]];

		co_call_on(there->reactor, serve_call, there);
		require(reactor_self() == here->reactor);
	}
}

static suspends void run_callers(void *arg)
{
	struct co_group group;

	co_group_init(&group);
	for (int i = 0; i < CALLERS_PER_REACTOR; i++)
		co_group_start(&group, make_calls, arg);
	co_group_wait(&group);
}

static void *run_station(void *arg)
{
	struct station *station = arg;

	reactor_run(station->reactor);
	return NULL;
}

static suspends void both_stations(void *arg)
{
	co_call_on(stations[1].reactor, run_callers, &stations[1]);
}

static suspends void call_each_other(void *arg)
{
	struct co_group group;

	co_group_init(&group);
	co_group_start(&group, run_callers, &stations[0]);
	co_group_start(&group, both_stations, NULL);
	co_group_wait(&group);
}

START_TEST(calls_between_reactors_run_there_and_return_here)
{
	for (int i = 0; i < 2; i++)
		stations[i].reactor = test_reactor("auto");
	ck_assert(!pthread_create(&stations[1].thread, NULL, run_station, &stations[1]));
	reactor_run_main(stations[0].reactor, call_each_other, NULL);
	reactor_stop(stations[1].reactor);
	pthread_join(stations[1].thread, NULL);
	ck_assert_int_eq(stations[0].served + stations[1].served,
		2 * CALLERS_PER_REACTOR * CALLS_PER_CALLER);
	for (int i = 0; i < 2; i++)
		reactor_free(stations[i].reactor);
}
END_TEST

/* --- offloaded calls -------------------------------------------------------------------------- */

#define OFFLOAD_COUNT 100

static pthread_t reactor_thread;
static int offload_sum;

static void square(void *arg)
{
	int *number = arg;

	require(!pthread_equal(pthread_self(), reactor_thread));
	*number *= *number;
}

static suspends void offload_square(void *arg)
{
	int number = (int)(intptr_t)arg;

	co_offload(square, &number);
	require(pthread_equal(pthread_self(), reactor_thread));
	offload_sum += number;
}

static suspends void offload_many(void *arg)
{
	struct co_group group;

	reactor_thread = pthread_self();
	co_group_init(&group);
	for (intptr_t i = 0; i < OFFLOAD_COUNT; i++)
		co_group_start(&group, offload_square, (void *)i);
	co_group_wait(&group);
}

START_TEST(offloaded_calls_run_elsewhere_and_their_results_are_seen)
{
	test_run_co(offload_many, NULL);
	ck_assert_int_eq(
		offload_sum, OFFLOAD_COUNT * (OFFLOAD_COUNT - 1) * (2 * OFFLOAD_COUNT - 1) / 6);
}
END_TEST

static int blocking_pipe[2];

static void read_pipe(void *arg)
{
	ck_assert_int_eq(read(blocking_pipe[0], arg, 1), 1);
}

static suspends void block_in_pool(void *arg)
{
	co_offload(read_pipe, arg);
}

/* The blocked call ends only by what the reactor does meanwhile. */
static suspends void go_on_meanwhile(void *arg)
{
	struct co_group group;
	char byte = 0;

	ck_assert(!pipe(blocking_pipe));
	co_group_init(&group);
	co_group_start(&group, block_in_pool, &byte);
	co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(write(blocking_pipe[1], "!", 1), 1);
	co_group_wait(&group);
	ck_assert_int_eq(byte, '!');
}

START_TEST(the_reactor_goes_on_while_an_offloaded_call_blocks)
{
	test_run_co(go_on_meanwhile, NULL);
}
END_TEST

/* --- creation --------------------------------------------------------------------------------- */

START_TEST(an_unknown_engine_is_refused_by_name)
{
	struct reactor *reactor;
	struct err err;

	ck_assert_int_lt(reactor_create(&reactor, "steam", &err), 0);
	ck_assert_ptr_null(reactor);
	ck_assert_ptr_nonnull(strstr(err.text, "\"steam\""));
	ck_assert_ptr_nonnull(strstr(err.text, "threads"));
}
END_TEST

static suspends void nothing(void *arg)
{
}

START_TEST(a_reactor_can_run_again)
{
	struct reactor *reactor = test_reactor("auto");

	for (int i = 0; i < 3; i++)
		reactor_run_main(reactor, nothing, NULL);
	reactor_free(reactor);
	reactor_free(NULL);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, timers_fire_in_order_of_their_deadlines);
	tcase_add_test(tcase, a_sleep_is_never_shorter);
	tcase_add_test(tcase, posts_from_threads_all_arrive_in_each_threads_order);
	tcase_add_test(tcase, a_deferred_task_runs_once_when_nothing_else_is_ready);
	tcase_add_test(tcase, no_event_comes_to_a_removed_watch);
	tcase_add_test(tcase, calls_between_reactors_run_there_and_return_here);
	tcase_add_test(tcase, offloaded_calls_run_elsewhere_and_their_results_are_seen);
	tcase_add_test(tcase, the_reactor_goes_on_while_an_offloaded_call_blocks);
	tcase_add_test(tcase, an_unknown_engine_is_refused_by_name);
	tcase_add_test(tcase, a_reactor_can_run_again);
}

int main(void)
{
	return test_run_suite("reactor", fill);
}
