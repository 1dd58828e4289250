/*
 * Buffers: aligned, disjoint, reused last in first out, and kept within bounds.
 */
#include <string.h>

#include "base/util.h"
#include "rt/buf.h"
#include "rt/reactor_private.h"
#include "tests/unit/testing.h"

#define BUF_COUNT      64
#define STEP_COUNT     3000
#define MAX_BYTES      (8 * 1024 * 1024)
#define PAGE_BYTES     4096
#define MAX_KEPT_BYTES (1024 * 1024)
#define STRIDE_BYTES   1021

struct held {
	unsigned char *buf, mark;
	size_t size_bytes;
};

static void take(struct held *held)
{
	/* Sizes of all magnitudes. */
	held->size_bytes = 1 + test_random(MAX_BYTES >> test_random(20));
	held->mark = (unsigned char)random();
	held->buf = buf_get(held->size_bytes);
	require(held->buf && is_aligned((uintptr_t)held->buf, PAGE_BYTES));
	for (size_t i = 0; i < held->size_bytes; i += STRIDE_BYTES)
		held->buf[i] = held->mark;
	held->buf[held->size_bytes - 1] = held->mark;
}

static void give_back(struct held *held)
{
	for (size_t i = 0; i < held->size_bytes; i += STRIDE_BYTES)
		require(held->buf[i] == held->mark);
	require(held->buf[held->size_bytes - 1] == held->mark);
	buf_put(held->buf, held->size_bytes);
	held->buf = NULL;
	require(reactor_current->bufs.kept_bytes <= BUF_POOL_KEEP_BYTES);
}

static suspends void take_and_give_back(void *arg)
{
	struct held all[BUF_COUNT] = { 0 };

	for (int step = 0; step < STEP_COUNT; step++) {
		struct held *held = &all[test_random(BUF_COUNT)];

		if (held->buf)
			give_back(held);
		else
			take(held);
	}
	for (int i = 0; i < BUF_COUNT; i++)
		if (all[i].buf)
			give_back(&all[i]);
	buf_put(NULL, 4096);
}

START_TEST(buffers_are_aligned_and_disjoint_and_what_is_kept_is_bounded)
{
	test_seed();
	test_run_co(take_and_give_back, NULL);
}
END_TEST

#ifndef __SANITIZE_ADDRESS__
static suspends void reuse(void *arg)
{
	void *first = buf_get(64 * 1024), *second = buf_get(64 * 1024);

	buf_put(first, 64 * 1024);
	buf_put(second, 64 * 1024);
	/* A size that is rounded up comes from the same shelf. */
	ck_assert_ptr_eq(buf_get(64 * 1024 - 100), second);
	ck_assert_ptr_eq(buf_get(64 * 1024), first);
	buf_put(first, 64 * 1024);
	buf_put(second, 64 * 1024 - 100);
}

START_TEST(the_buffer_last_used_is_used_next)
{
	test_run_co(reuse, NULL);
}
END_TEST

static suspends void use_and_rest(void *arg)
{
	struct buf_pool *pool = &reactor_current->bufs;
	void *bufs[8];

	for (size_t i = 0; i < ARRAY_LEN(bufs); i++)
		bufs[i] = buf_get(MAX_KEPT_BYTES);
	for (size_t i = 0; i < ARRAY_LEN(bufs); i++)
		buf_put(bufs[i], MAX_KEPT_BYTES);
	ck_assert_uint_eq(pool->kept_bytes, ARRAY_LEN(bufs) * MAX_KEPT_BYTES);
	/* Needed all the time: kept. */
	for (int i = 0; i < 3; i++) {
		for (size_t n = 0; n < ARRAY_LEN(bufs); n++)
			bufs[n] = buf_get(MAX_KEPT_BYTES);
		co_sleep_ns(500 * NS_PER_MS);
		for (size_t n = 0; n < ARRAY_LEN(bufs); n++)
			buf_put(bufs[n], MAX_KEPT_BYTES);
		ck_assert_uint_eq(pool->kept_bytes, ARRAY_LEN(bufs) * MAX_KEPT_BYTES);
	}
	while (pool->kept_bytes > BUF_POOL_REST_BYTES)
		co_sleep_ns(100 * NS_PER_MS);
	ck_assert_uint_eq(pool->trim.heap_index, TIMER_IDLE);
}

START_TEST(what_nobody_needs_is_given_back)
{
	test_run_co(use_and_rest, NULL);
}
END_TEST
#endif

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, buffers_are_aligned_and_disjoint_and_what_is_kept_is_bounded);
#ifndef __SANITIZE_ADDRESS__
	tcase_add_test(tcase, the_buffer_last_used_is_used_next);
	tcase_add_test(tcase, what_nobody_needs_is_given_back);
#endif
}

int main(void)
{
	return test_run_suite("buf", fill);
}
