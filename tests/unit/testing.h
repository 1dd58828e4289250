/*
 * What unit tests share: a main() for a suite, a seed that is printed and can be given, coroutines to test in.
 *
 *	SEED=123 build/tests/unit/test_rt_lock	repeats a run that failed
 */
#pragma once

#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "rt/reactor.h"

/* Far beyond what any test needs, with sanitizers on a busy machine: longer than tests/run waits. */
#define TEST_TIMEOUT_S 1000

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TEST_SANITIZED 1
#else
#define TEST_SANITIZED 0
#endif

/* Like ck_assert(), which does a system call even when all is well, for places that run thousands of times. */
#define require(condition)                                      \
	do {                                                    \
		if (!(condition))                               \
			ck_abort_msg("failed: %s", #condition); \
	} while (0)

/* Seeds random() and returns the seed. */
static inline unsigned test_seed(void)
{
	const char *given = getenv("SEED");
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	unsigned seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)now.tv_nsec;
	printf("SEED=%u\n", seed);
	fflush(stdout);
	srandom(seed);
	return seed;
}

/* 0 <= random number < bound */
static inline unsigned test_random(unsigned bound)
{
	return (unsigned)random() % bound;
}

static inline unsigned count_open_files(void)
{
	DIR *folder = opendir("/proc/self/fd");
	unsigned count = 0;

	while (readdir(folder))
		count++;
	closedir(folder);
	return count;
}

static inline struct reactor *test_reactor(const char *engine_name)
{
	struct reactor *reactor;
	struct err err;

	ck_assert_msg(!reactor_create(&reactor, engine_name, &err), "%s", err.text);
	return reactor;
}

/* Runs fn(arg) as a coroutine on a reactor of its own. */
static inline void test_run_co(co_fn *fn, void *arg)
{
	struct reactor *reactor = test_reactor("auto");

	reactor_run_main(reactor, fn, arg);
	reactor_free(reactor);
}

/* Runs the suite and returns main()'s exit status. */
static inline int test_suite(Suite *suite)
{
	SRunner *runner = srunner_create(suite);

	srunner_run_all(runner, CK_ENV);

	int failed = srunner_ntests_failed(runner);

	srunner_free(runner);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* The same for a suite of one case. */
static inline int test_run_suite(const char *name, void (*fill)(TCase *tcase))
{
	Suite *suite = suite_create(name);
	TCase *tcase = tcase_create(name);

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	fill(tcase);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
