/*
 * Coroutines: starting, nesting, suspending, waking, pooling, and the guard below a stack.
 */
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/lock.h"
#include "tests/unit/testing.h"

#ifdef __SANITIZE_THREAD__
#define MANY_COUNT 2000 /* it knows no more than 8000 fibers */
#else
#define MANY_COUNT 10000
#endif

static char journal[64];

static void note(char letter)
{
	journal[strlen(journal)] = letter;
}

/* --- order ------------------------------------------------------------------------------------ */

static struct co *inner_co;

static suspends void inner(void *arg)
{
	note('b');
	inner_co = co_self();
	co_suspend();
	note('e');
}

static suspends void outer(void *arg)
{
	struct co *self = co_self();

	note('a');
	co_start(inner, NULL);
	ck_assert_ptr_eq(co_self(), self);
	note('c');
	co_yield ();
	note('d');
	co_wake(inner_co);
	co_yield ();
	note('f');
}

START_TEST(nested_start_runs_at_once_and_returns_at_the_first_suspension)
{
	test_run_co(outer, NULL);
	ck_assert_str_eq(journal, "abcdef");
}
END_TEST

struct sleeper {
	char letter;
	struct co *co;
};

static suspends void sleep_and_note(void *arg)
{
	struct sleeper *sleeper = arg;

	sleeper->co = co_self();
	co_suspend();
	note(sleeper->letter);
}

static suspends void wake_three(void *arg)
{
	struct sleeper sleepers[] = { { .letter = 'x' }, { .letter = 'y' }, { .letter = 'z' } };
	static const int order[] = { 1, 2, 0 };

	for (int i = 0; i < 3; i++)
		co_start(sleep_and_note, &sleepers[i]);
	for (int i = 0; i < 3; i++)
		co_wake(sleepers[order[i]].co);
	note('-'); /* waking does not run anybody yet */
	co_yield ();
}

START_TEST(the_woken_run_in_the_order_of_waking)
{
	test_run_co(wake_three, NULL);
	ck_assert_str_eq(journal, "-yzx");
}
END_TEST

START_TEST(plain_code_is_no_coroutine)
{
	ck_assert_ptr_null(co_self());
	ck_assert_ptr_null(reactor_self());
}
END_TEST

/* --- woken by a timer, a coroutine, another thread -------------------------------------------- */

static struct co *target;

static void wake_from_timer(struct timer *timer)
{
	ck_assert_ptr_null(co_self());
	note('t');
	co_wake(target);
}

static suspends void wake_from_coroutine(void *arg)
{
	note('c');
	co_wake(target);
}

static void wake_from_task(struct task *task)
{
	ck_assert_ptr_null(co_self());
	note('p');
	co_wake(target);
}

struct poster {
	struct task task;
	struct reactor *reactor;
};

static void *post_from_thread(void *arg)
{
	struct poster *poster = arg;

	reactor_post(poster->reactor, &poster->task);
	return NULL;
}

static suspends void woken_by_all(void *arg)
{
	struct poster poster = { .reactor = reactor_self() };
	struct timer timer;
	pthread_t thread;

	target = co_self();
	timer_init(&timer, wake_from_timer);
	timer_arm(&timer, reactor_now_ns() + NS_PER_MS);
	co_suspend();
	co_start(wake_from_coroutine, NULL);
	co_suspend();
	task_init(&poster.task, wake_from_task);
	ck_assert(!pthread_create(&thread, NULL, post_from_thread, &poster));
	co_suspend();
	pthread_join(thread, NULL);
}

START_TEST(anything_may_wake)
{
	test_run_co(woken_by_all, NULL);
	ck_assert_str_eq(journal, "tcp");
}
END_TEST

/* --- many ------------------------------------------------------------------------------------- */

static int many_alive, many_alive_max;

static suspends void one_of_many(void *arg)
{
	volatile char on_stack[256];
	char mark = (char)(intptr_t)arg;

	memset((void *)on_stack, mark, sizeof(on_stack));
	many_alive++;
	many_alive_max = MAX(many_alive, many_alive_max);
	for (int turn = 0; turn < 3; turn++) {
		co_yield ();
		for (size_t i = 0; i < sizeof(on_stack); i++)
			require(on_stack[i] == mark);
	}
	many_alive--;
}

static suspends void many(void *arg)
{
	struct co_group group;

	co_group_init(&group);
	for (int round = 0; round < 2; round++) {
		for (intptr_t i = 0; i < MANY_COUNT; i++)
			co_group_start(&group, one_of_many, (void *)(i & 0x7f));
		co_group_wait(&group);
		ck_assert_int_eq(many_alive, 0);
	}
}

START_TEST(ten_thousand_at_once_keep_their_stacks)
{
	test_run_co(many, NULL);
	ck_assert_int_eq(many_alive_max, MANY_COUNT);
}
END_TEST

/* --- the guard -------------------------------------------------------------------------------- */

/* Frames larger than a page: they must not step over the guard either. */
static int recurse(int depth)
{
	volatile char frame[16 * 1024];

	frame[0] = (char)depth;
	return depth ? recurse(depth - 1) + frame[0] : 0;
}

static suspends void overflow(void *arg)
{
	_exit(recurse(100000) ? 1 : 2);
}

static suspends void overflow_beside_others(void *arg)
{
	struct sleeper neighbour;

	co_start(sleep_and_note, &neighbour);
	co_start(overflow, NULL);
}

START_TEST(running_over_the_stack_is_a_fault)
{
	int status;
	pid_t child = fork();

	if (!child) {
		close(STDERR_FILENO); /* the sanitizers' report of what is expected here */
		signal(SIGSEGV, SIG_DFL);
		test_run_co(overflow_beside_others, NULL);
		_exit(3);
	}
	ck_assert_int_eq(waitpid(child, &status, 0), child);
	ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "status 0x%x", status);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, nested_start_runs_at_once_and_returns_at_the_first_suspension);
	tcase_add_test(tcase, the_woken_run_in_the_order_of_waking);
	tcase_add_test(tcase, plain_code_is_no_coroutine);
	tcase_add_test(tcase, anything_may_wake);
	tcase_add_test(tcase, ten_thousand_at_once_keep_their_stacks);
	tcase_add_test(tcase, running_over_the_stack_is_a_fault);
}

int main(void)
{
	return test_run_suite("co", fill);
}
