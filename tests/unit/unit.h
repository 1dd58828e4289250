/*
 * What the unit tests of layers share: cases that run as a coroutine on a reactor, stacks written
 * as text, a seeded random generator.
 *
 * A test program is a table of cases and a main:
 *
 *	static suspends void case_reads_back(void) { struct blk *blk = stack("memory size=1M"); ... }
 *	static const struct unit_case cases[] = { CASE(case_reads_back), ... };
 *	int main(void) { return unit_main("memory", cases, ARRAY_LEN(cases)); }
 *
 * Each case runs in a process and a folder of its own (Check forks), once per I/O engine. The seed
 * is printed at the start; SEED=... in the environment repeats a run.
 */
#pragma once

#include <check.h>
#include <ftw.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "blk/blk.h"
#include "rt/reactor.h"
#include "testing.h"

struct unit_case {
	const char *name;
	suspends void (*fn)(void);
};

#define CASE(function)              \
	{                           \
#function, function \
	}

/* --- what lives as long as the case ------------------------------------------------------------ */

static pthread_mutex_t unit_lock = PTHREAD_MUTEX_INITIALIZER;
static struct conf *unit_confs; /* the stacks point into them */

static inline struct conf *unit_keep_conf(struct conf *conf)
{
	pthread_mutex_lock(&unit_lock);
	if (!unit_confs)
		unit_confs = conf_new(CONF_LIST, NULL, NULL);
	conf_add(unit_confs, conf);
	pthread_mutex_unlock(&unit_lock);
	return conf;
}

/* --- random ----------------------------------------------------------------------------------- */

static uint64_t unit_seed;

/* splitmix64 */
static inline uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

static inline uint64_t random_below(uint64_t *state, uint64_t limit)
{
	return random_next(state) % limit;
}

static inline void random_fill(uint64_t *state, void *buf, size_t len_bytes)
{
	uint8_t *byte = buf;
	uint64_t word;

	for (; len_bytes;
		byte += MIN(len_bytes, sizeof(word)), len_bytes -= MIN(len_bytes, sizeof(word))) {
		word = random_next(state) | UINT64_C(0x0101010101010101); /* no byte is zero */
		memcpy(byte, &word, MIN(len_bytes, sizeof(word)));
	}
}

static inline bool all_bytes_are(const void *buf, size_t len_bytes, uint8_t value)
{
	for (size_t i = 0; i < len_bytes; i++)
		if (((const uint8_t *)buf)[i] != value)
			return false;
	return true;
}

/* --- stacks ----------------------------------------------------------------------------------- */

static struct blk_env unit_env;

static inline struct conf *unit_value(const char *name, const char *text)
{
	if (!strcmp(text, "true") || !strcmp(text, "false"))
		return conf_new_bool(name, NULL, !strcmp(text, "true"));
	if (*text && !text[strspn(text, "0123456789")])
		return conf_new_int(name, NULL, strtoll(text, NULL, 10));
	return conf_new_string(name, NULL, text);
}

/* "file path=/x size=1M create=true": layers, top first, separated by '|'. */
static inline struct conf *unit_conf(const char *text)
{
	struct conf *list = unit_keep_conf(conf_new(CONF_LIST, NULL, NULL));
	struct conf *group = NULL;
	char *copy = strdup(text), *rest = NULL;

	for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
		char *value = strchr(word, '=');
		if (!strcmp(word, "|")) {
			group = NULL;
		} else if (!group) {
			group = conf_add(list, conf_new(CONF_GROUP, NULL, NULL));
			conf_add(group, conf_new_string("layer", NULL, word));
		} else {
			ck_assert_ptr_nonnull(value);
			*value++ = '\0';
			conf_add(group, unit_value(word, value));
		}
	}
	free(copy);
	return list;
}

static inline suspends struct blk *stack_try(struct err *err, const char *text)
{
	struct blk *top = NULL;

	*err = (struct err){ 0 };
	int result = stack_open(unit_conf(text), &unit_env, false, &top, err);
	ck_assert_int_eq(result, -err->code);
	ck_assert((result == 0) == (top != NULL));
	return top;
}

static inline suspends struct blk *stack(const char *format, ...)
{
	char text[1024];
	struct err err;
	va_list ap;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	struct blk *top = stack_try(&err, text);
	ck_assert_msg(top != NULL, "%s: %s", text, err.text);
	return top;
}

/* Opening fails, with a text that contains `expected`, and leaves no file open. */
static inline suspends void stack_refused(const char *expected, const char *format, ...)
{
	char text[1024];
	struct err err;
	va_list ap;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	unsigned files_before = count_open_files();
	struct blk *top = stack_try(&err, text);
	ck_assert_msg(!top, "%s: opened", text);
	ck_assert_uint_eq(count_open_files(), files_before);
	ck_assert_msg(strstr(err.text, expected) != NULL, "%s: \"%s\" lacks \"%s\"", text, err.text,
		expected);
}

/* --- running ---------------------------------------------------------------------------------- */

static char unit_folder[] = "/tmp/blkstack-unit.XXXXXX";
static const char *unit_engine;
static const struct unit_case *unit_cases;

static void unit_call_case(void *arg)
{
	const struct unit_case *unit_case = arg;

	unit_case->fn();
}

START_TEST(unit_run_case)
{
	char folder[128];
	struct reactor *reactor;
	struct err err;

	snprintf(folder, sizeof(folder), "%s/%s.%s", unit_folder, unit_cases[_i].name, unit_engine);
	ck_assert_int_eq(mkdir(folder, 0700), 0);
	ck_assert_int_eq(chdir(folder), 0);
	ck_assert_int_eq(blk_env_init(&unit_env), 0);
	ck_assert_msg(!reactor_create(&reactor, unit_engine, &err), "%s", err.text);
	reactor_run_main(reactor, unit_call_case, (void *)&unit_cases[_i]);
	reactor_free(reactor);
	blk_env_fini(&unit_env);
	conf_free(unit_confs);
}
END_TEST

static inline int unit_remove(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
	return remove(path);
}

static inline int unit_main(const char *name, const struct unit_case *cases, size_t case_count)
{
	static const char *const engines[] = { "uring", "threads" };
	const char *seed_text = getenv("SEED");
	int failed = 0;

	unit_seed = seed_text ? strtoull(seed_text, NULL, 0) : (uint64_t)time(NULL);
	printf("SEED=%llu\n", (unsigned long long)unit_seed);
	unit_cases = cases;
	if (!mkdtemp(unit_folder))
		return EXIT_FAILURE;
	for (size_t engine = 0; engine < ARRAY_LEN(engines); engine++) {
		struct reactor *reactor;
		struct err err;
		unit_engine = engines[engine];
		if (reactor_create(&reactor, unit_engine, &err)) {
			printf("without the engine \"%s\": %s\n", unit_engine, err.text);
			failed += !strcmp(unit_engine, "threads");
			continue;
		}
		reactor_free(reactor);

		printf("engine \"%s\"\n", unit_engine);
		Suite *suite = suite_create(name);
		for (size_t i = 0; i < case_count; i++) {
			TCase *tcase = tcase_create(cases[i].name);
			tcase_set_timeout(tcase, TEST_TIMEOUT_S);
			tcase_add_loop_test(tcase, unit_run_case, (int)i, (int)i + 1);
			suite_add_tcase(suite, tcase);
		}
		SRunner *runner = srunner_create(suite);
		srunner_run_all(runner, CK_NORMAL);
		failed += srunner_ntests_failed(runner);
		srunner_free(runner);
	}
	nftw(unit_folder, unit_remove, 16, FTW_DEPTH | FTW_PHYS);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
