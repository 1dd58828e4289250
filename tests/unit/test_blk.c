/*
 * The checked entry points: who is refused and in what order, counters and status, draining, resizing
 * and the events it causes, and extents.
 */
#include <sys/uio.h>

#include "fake.h"

/* --- refusals ----------------------------------------------------------------------------------- */

enum call { READ, WRITE, ZERO, DISCARD, EXTENTS, FLUSH, CALLS };

static char buf[8192];

static suspends int call(
	struct blk *blk, enum call what, uint64_t off, uint64_t len, unsigned flags)
{
	struct blk_extent list[4];
	struct blk_extents extents;

	blk_extents_init(&extents, list, 4);
	switch (what) {
	case READ:
		return blk_read(blk, off, buf, len);
	case WRITE:
		return blk_write(blk, off, buf, len, flags);
	case ZERO:
		return blk_zero(blk, off, len, flags);
	case DISCARD:
		return blk_discard(blk, off, len, flags);
	case EXTENTS:
		return blk_extents(blk, off, len, &extents);
	default:
		return blk_flush(blk);
	}
}

/* Each fault is refused before the ones after it: all of them at once, then one less, and so on. */
suspends CO_TEST(test_order_of_refusal)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "refusal", NULL, "( { size = 4096; zero = true } )");
	for (enum call what = READ; what < CALLS; what++) {
		bool writes = what == WRITE || what == ZERO || what == DISCARD;
		uint64_t beyond = what == FLUSH ? 0 : 4000;
		struct blk *blk = stack.top;

		blk->disconnected = blk->caps.read_only = true;
		if (writes)
			ck_assert_int_eq(call(blk, what, beyond, 97, 0x80), -EINVAL);
		ck_assert_int_eq(call(blk, what, beyond, 97, 0), -ESHUTDOWN);
		ck_assert_int_eq(call(blk, what, 0, 0, 0), -ESHUTDOWN);
		blk->disconnected = false;
		if (writes) {
			ck_assert_int_eq(call(blk, what, beyond, 97, 0), -EPERM);
			ck_assert_int_eq(call(blk, what, 0, 0, 0), -EPERM);
		}
		blk->caps.read_only = false;
		if (what != FLUSH) {
			int out_of_range = writes ? -ENOSPC : -EINVAL;

			ck_assert_int_eq(call(blk, what, beyond, 97, 0), out_of_range);
			ck_assert_int_eq(call(blk, what, 4097, 0, 0), out_of_range);
			ck_assert_int_eq(call(blk, what, UINT64_MAX, 2, 0), out_of_range);
			ck_assert_int_eq(call(blk, what, UINT64_MAX - 50, 100, 0), out_of_range);
		}
		ck_assert_int_eq(call(blk, what, beyond, 96, 0), 0);
		ck_assert_int_eq(call(blk, what, 4096, 0, 0), 0);
	}
	ck_assert_int_eq(blk_read(stack.top, 0, buf, BLK_REQUEST_MAX + 1), -EINVAL);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, BLK_REQUEST_MAX + 1, 0), -EINVAL);
	ck_assert_int_eq(blk_zero(stack.top, 0, 1, BLK_FORCE), -EINVAL);
	ck_assert_int_eq(blk_discard(stack.top, 0, 1, BLK_NO_HOLE), -EINVAL);
	ck_assert_int_eq(stack.top->counters.last_error, 0);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_nothing_to_do)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "nothing", NULL, "( { size = 4096 } )");
	for (enum call what = READ; what < FLUSH; what++) {
		ck_assert_int_eq(call(stack.top, what, 5, 0, 0), 0);
		ck_assert_uint_eq(stack.top->counters.requests[what], 0);
	}
	ck_assert_uint_eq(stack.fake->reads + stack.fake->writes + stack.fake->zeroes, 0);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_vectors)
{
	char a[3], b[2];
	struct iovec out[] = { { (char *)"abc", 3 }, { NULL, 0 }, { (char *)"de", 2 } };
	struct iovec in[] = { { a, 3 }, { b, 2 } };
	struct fake_stack stack;

	fake_stack_open(&stack, "vectors", NULL, "( { size = 4096 } )");
	ck_assert_int_eq(blk_writev(stack.top, 7, out, 3, BLK_FUA), 0);
	ck_assert_int_eq(blk_readv(stack.top, 7, in, 2), 0);
	ck_assert_mem_eq(a, "abc", 3);
	ck_assert_mem_eq(b, "de", 2);
	ck_assert_int_eq(blk_readv(stack.top, 4093, in, 2), -EINVAL);
	fake_stack_close(&stack);
}

/* --- counters and status ------------------------------------------------------------------------ */

suspends CO_TEST(test_counters_and_status)
{
	struct test_stack stack;
	json_t *status, *below, *error;

	test_stack_open(&stack, "( { layer = 'padded'; size = '2M' },"
				"  { layer = 'fault'; ops = 'write'; from = 4096; countdown = 1 },"
				"  { layer = 'memory'; size = '1M' } )");
	ck_assert_int_eq(blk_read(stack.top, 0, buf, 100), 0);
	ck_assert_int_eq(blk_read(stack.top, 0, buf, 28), 0);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 100, 0), 0);
	ck_assert_int_eq(blk_write(stack.top, 5000, buf, 200, 0), -EIO);
	ck_assert_int_eq(blk_flush(stack.top), 0);

	status = blk_status(stack.top);
	ck_assert_str_eq(json_string_value(json_object_get(status, "layer")), "padded");
	ck_assert_int_eq(json_integer_value(json_object_get(status, "size")), 2 << 20);

	json_t *counters = json_object_get(status, "counters");
	json_t *reads = json_object_get(counters, "read");
	json_t *writes = json_object_get(counters, "write");

	ck_assert_int_eq(json_integer_value(json_object_get(reads, "requests")), 2);
	ck_assert_int_eq(json_integer_value(json_object_get(reads, "bytes")), 128);
	ck_assert_int_eq(json_integer_value(json_object_get(writes, "requests")), 2);
	ck_assert_int_eq(json_integer_value(json_object_get(writes, "bytes")), 100);
	ck_assert_int_eq(json_integer_value(json_object_get(writes, "errors")), 1);

	error = json_object_get(status, "last_error");
	ck_assert_str_eq(json_string_value(json_object_get(error, "op")), "write");
	ck_assert_int_eq(json_integer_value(json_object_get(error, "code")), EIO);
	ck_assert_int_eq(json_integer_value(json_object_get(error, "off")), 5000);
	ck_assert_int_eq(json_integer_value(json_object_get(error, "len")), 200);

	below = json_array_get(json_object_get(status, "children"), 0);
	ck_assert_str_eq(json_string_value(json_object_get(below, "layer")), "fault");
	below = json_array_get(json_object_get(below, "children"), 0);
	ck_assert_str_eq(json_string_value(json_object_get(below, "layer")), "memory");
	ck_assert_uint_eq(json_array_size(json_object_get(below, "children")), 0);
	ck_assert_ptr_null(json_object_get(below, "last_error"));
	json_decref(status);
	test_stack_close(&stack);
}

/* --- drain -------------------------------------------------------------------------------------- */

struct request {
	struct blk *blk;
	bool done;
	int ret;
};

static suspends void request_main(void *arg)
{
	struct request *request = arg;

	request->ret = blk_write(request->blk, 0, buf, 512, 0);
	request->done = true;
}

suspends CO_TEST(test_drain)
{
	struct fake_stack stack;
	struct request before = { 0 }, during = { 0 };

	fake_stack_open(&stack, "drain", NULL, "( { size = 4096; waits = 5 } )");
	before.blk = during.blk = stack.top;
	for (int i = 0; i < 50; i++) {
		before.done = during.done = false;
		co_start(request_main, &before);
		blk_drain_begin(stack.top);
		ck_assert(before.done);
		blk_drain_begin(stack.top);

		unsigned writes = stack.fake->writes;

		co_start(request_main, &during);
		blk_drain_end(stack.top);
		for (int turns = 0; turns < 20; turns++)
			co_yield ();
		ck_assert(!during.done);
		ck_assert_uint_eq(stack.fake->writes, writes);
		blk_drain_end(stack.top);
		while (!during.done)
			co_yield ();
		ck_assert_int_eq(during.ret, 0);
	}
	fake_stack_close(&stack);
}

/* --- resize ------------------------------------------------------------------------------------- */

struct listener {
	struct blk_listener listener;
	uint64_t size;
	int calls;
};

static void note_size(struct blk_listener *listener, uint64_t size)
{
	struct listener *noted = container_of(listener, struct listener, listener);

	noted->size = size;
	noted->calls++;
}

suspends CO_TEST(test_resize_events_travel_up)
{
	struct listener noted = { .listener.size_changed = note_size };
	struct test_stack stack;
	struct blk *bottom;
	struct err err;

	test_stack_open(&stack, "( { layer = 'fault' }, { layer = 'padded'; align = '1M' },"
				"  { layer = 'null'; size = 1000000; } )");
	blk_set_listener(stack.top, &noted.listener);
	bottom = stack.top->below->below;
	ck_assert_uint_eq(blk_caps(stack.top)->size, 1 << 20);

	/* from below: the padding swallows it, then shows it */
	ck_assert_int_eq(blk_resize(bottom, 1000001, 0, &err), 0);
	ck_assert_int_eq(noted.calls, 0);
	ck_assert_int_eq(blk_resize(bottom, 2000000, 0, &err), 0);
	ck_assert_int_eq(noted.calls, 1);
	ck_assert_uint_eq(noted.size, 2 << 20);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 2 << 20);

	/* from the top: everything */
	ck_assert_int_eq(blk_resize(stack.top, 5 << 20, 0, &err), 0);
	ck_assert_int_eq(noted.calls, 2);
	ck_assert_uint_eq(noted.size, 5 << 20);
	ck_assert_uint_eq(blk_caps(bottom)->size, 5 << 20);
	ck_assert_int_eq(blk_resize(stack.top, 5 << 20, 0, &err), 0);
	ck_assert_int_eq(noted.calls, 2);
	blk_set_listener(stack.top, NULL);
	ck_assert_int_eq(blk_resize(stack.top, 6 << 20, 0, &err), 0);
	ck_assert_int_eq(noted.calls, 2);
	test_stack_close(&stack);
}

suspends CO_TEST(test_resize_refused)
{
	struct listener noted = { .listener.size_changed = note_size };
	struct fake_stack stack;
	struct err err;

	fake_stack_open(&stack, "resize", NULL,
		"( { layer = 'padded'; align = 1024 },"
		"  { size = 8192; block-size = 512 } )");
	blk_set_listener(stack.top, &noted.listener);
	ck_assert_int_eq(blk_resize(stack.top, 4096, 0, &err), -EINVAL);
	ck_assert_str_eq(err.text, "resize: 4 KiB is less than the present 8 KiB, what lies beyond "
				   "would be lost: to shrink must be forced");
	ck_assert_int_eq(blk_resize(stack.top, 0, BLK_FORCE, &err), -EINVAL);
	ck_assert_str_eq(err.text, "resize: a disk of size 0 is of no use");
	ck_assert_int_eq(blk_resize(stack.top, UINT64_MAX, 0, &err), -EINVAL);
	ck_assert_str_eq(err.text, "resize: 16.00 EiB is more than the largest size, 4 EiB");
	ck_assert_int_eq(blk_resize(stack.top, 16384, BLK_FUA, &err), -EINVAL);
	stack.fake->resize_error = -EFBIG;
	ck_assert_int_eq(blk_resize(stack.top, 16384, 0, &err), -EFBIG);
	ck_assert_str_eq(err.text, "padded: fake: no: File too large");
	ck_assert_int_eq(blk_resize(stack.top, 16384, 0, NULL), -EFBIG);
	stack.top->caps.read_only = true;
	ck_assert_int_eq(blk_resize(stack.top, 16384, 0, &err), -EPERM);
	stack.top->caps.read_only = false;

	ck_assert_uint_eq(blk_caps(stack.top)->size, 8192);
	ck_assert_uint_eq(blk_caps(&stack.fake->blk)->size, 8192);
	ck_assert_int_eq(noted.calls, 0);
	ck_assert_uint_eq(stack.top->drained, 0);
	ck_assert_int_eq(blk_write(stack.top, 8191, "x", 1, 0), 0);

	stack.fake->resize_error = 0;
	ck_assert_int_eq(blk_resize(stack.top, 1025, BLK_FORCE, &err), 0);
	ck_assert_uint_eq(blk_caps(&stack.fake->blk)->size, 1536); /* rounded to its block */
	ck_assert_uint_eq(blk_caps(stack.top)->size, 2048);
	ck_assert_int_eq(blk_write(stack.top, 8191, "x", 1, 0), -ENOSPC);
	fake_stack_close(&stack);
}

struct resizing {
	struct blk *blk;
	uint64_t size;
};

static suspends void resize_main(void *arg)
{
	struct resizing resizing = *(struct resizing *)arg;

	ck_assert_int_eq(blk_resize(resizing.blk, resizing.size, BLK_FORCE, NULL), 0);
}

/* fake_resize() asserts that nothing else is in flight. */
suspends CO_TEST(test_resize_drains)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "resizes", NULL, "( { size = 4096; waits = 4 } )");
	for (int i = 0; i < 50; i++) {
		struct request requests[4] = { 0 };
		struct co_group group;

		co_group_init(&group);
		for (int j = 0; j < 4; j++) {
			struct resizing resizing = { stack.top,
				512 * (1 + seed_below(&stack.seed, 32)) };

			requests[j].blk = stack.top;
			co_group_start(&group, request_main, &requests[j]);
			co_group_start(&group, resize_main, &resizing);
		}
		co_group_wait(&group);
		for (int j = 0; j < 4; j++)
			ck_assert_int_eq(requests[j].ret, 0);
	}
	fake_stack_close(&stack);
}

/* --- extents ------------------------------------------------------------------------------------ */

#define HOLE (BLK_EXTENT_HOLE | BLK_EXTENT_ZERO)

static void check_extents(
	const struct blk_extents *extents, uint64_t off, const struct blk_extent *expected)
{
	uint64_t end = off;

	ck_assert_uint_eq(extents->off, off);
	for (unsigned i = 0; i < extents->count; i++) {
		ck_assert_uint_eq(extents->list[i].len, expected[i].len);
		ck_assert_uint_eq(extents->list[i].flags, expected[i].flags);
		end += extents->list[i].len;
	}
	ck_assert_uint_eq(expected[extents->count].len, 0);
	ck_assert_uint_eq(extents->end, end);
}

suspends CO_TEST(test_extents_merge)
{
	struct blk_extent list[2];
	struct blk_extents extents;

	blk_extents_init(&extents, list, 2);
	extents.limit = 100;
	ck_assert(blk_extents_add(&extents, 10, 0));
	ck_assert(blk_extents_add(&extents, 10, 0));
	ck_assert(blk_extents_add(&extents, 0, HOLE));
	ck_assert(blk_extents_add(&extents, 10, HOLE));
	ck_assert(!blk_extents_add(&extents, 10, 0)); /* full */
	ck_assert(blk_extents_add(&extents, 10, HOLE));
	ck_assert(!blk_extents_add(&extents, 1000, HOLE)); /* cut */
	check_extents(&extents, 0, (struct blk_extent[]){ { 20, 0 }, { 80, HOLE }, { 0 } });
}

static const struct blk_extent shown[] = { { 700, 0 }, { 2400, HOLE }, { 100, 0 }, { 60, HOLE },
	{ 40, BLK_EXTENT_ZERO }, { 800, HOLE }, { 0 } };

static suspends void expect_extents(struct fake_stack *stack, uint64_t off, uint64_t len,
	unsigned max_count, const struct blk_extent *expected)
{
	struct blk_extent list[8];
	struct blk_extents extents;

	blk_extents_init(&extents, list, max_count);
	ck_assert_int_eq(blk_extents(stack->top, off, len, &extents), 0);
	check_extents(&extents, off, expected);
}

suspends CO_TEST(test_extents_of_bytes)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "extents", NULL, "( { size = 4100 } )");
	stack.fake->shown = shown;
	expect_extents(&stack, 0, 4100, 8, shown);
	expect_extents(
		&stack, 600, 200, 8, (struct blk_extent[]){ { 100, 0 }, { 100, HOLE }, { 0 } });
	expect_extents(
		&stack, 600, 2600, 2, (struct blk_extent[]){ { 100, 0 }, { 2400, HOLE }, { 0 } });
	stack.fake->shown = NULL; /* it does not know: data */
	expect_extents(&stack, 600, 200, 8, (struct blk_extent[]){ { 200, 0 }, { 0 } });
	fake_stack_close(&stack);
}

suspends CO_TEST(test_extents_of_blocks)
{
	struct fake_stack stack;

	/* in blocks: data 0-1, hole 2-5, data 6, hole 7 */
	fake_stack_open(&stack, "extents", NULL, "( { size = 4096; block-size = 512 } )");
	stack.fake->shown = shown;
	expect_extents(&stack, 0, 4096, 8,
		(struct blk_extent[]){
			{ 1024, 0 }, { 2048, HOLE }, { 512, 0 }, { 512, HOLE }, { 0 } });
	expect_extents(&stack, 1000, 2100, 8,
		(struct blk_extent[]){ { 24, 0 }, { 2048, HOLE }, { 28, 0 }, { 0 } });
	expect_extents(&stack, 1025, 5, 8, (struct blk_extent[]){ { 5, HOLE }, { 0 } });
	expect_extents(&stack, 1000, 2100, 1, (struct blk_extent[]){ { 24, 0 }, { 0 } });
	fake_stack_close(&stack);
}

/* Random maps: never an error, always progress, and no byte of data is ever called anything else. */
suspends CO_TEST(test_extents_are_conservative)
{
	struct seed seed = seed_start("test_extents_are_conservative");

	for (int round = 0; round < 200; round++) {
		struct blk_extent map[60] = { 0 };
		uint8_t flags[65536] = { 0 };
		struct fake_stack stack;
		uint64_t end = 0;

		fake_stack_open(&stack, "extents", NULL, "( { block-size = %d } )",
			1 << seed_below(&seed, 13));
		for (int i = 0; i < 59 && end < 65536; i++) {
			uint64_t len = 1 + seed_below(&seed, seed_below(&seed, 2) ? 300 : 5000);

			map[i] = (struct blk_extent){ MIN(len, 65536 - end),
				(uint32_t)seed_below(&seed, 2) * 3 };
			memset(flags + end, (int)map[i].flags, map[i].len);
			end += map[i].len;
		}
		stack.fake->shown = map;
		for (uint64_t off = seed_below(&seed, 65536), last; off < 65536; off = last) {
			struct blk_extent list[3];
			struct blk_extents extents;

			blk_extents_init(&extents, list, 3);
			ck_assert_int_eq(blk_extents(stack.top, off, 65536 - off, &extents), 0);
			ck_assert_uint_gt(extents.count, 0);
			last = off;
			for (unsigned i = 0; i < extents.count; last += list[i++].len)
				ck_assert(!list[i].flags || !memchr(flags + last, 0, list[i].len));
		}
		fake_stack_close(&stack);
	}
}

/* Who goes through a disk chunk by chunk is not told all that follows each time. */
suspends CO_TEST(test_seek_by_chunks)
{
	const struct blk_extent data[] = { { 8 << 20, 0 }, { 0, 0 } };
	const struct blk_extent hole[] = { { 8 << 20, HOLE }, { 0, 0 } };
	struct fake_stack stack;
	uint64_t off;

	fake_stack_open(&stack, "seek by chunks", NULL, "( { size = '8M' } )");
	stack.fake->shown = data;
	for (uint64_t at = 0; at < 8 << 20; at += 16384) {
		ck_assert_int_eq(blk_seek_mapped(stack.top, at, &off), 0);
		ck_assert_uint_eq(off, at);
	}
	ck_assert_uint_le(stack.fake->extents_asked_bytes, 8 * (8 << 20));
	/* And a long way costs the way. */
	stack.fake->extents_asked_bytes = 0;
	stack.fake->shown = hole;
	ck_assert_int_eq(blk_seek_mapped(stack.top, 0, &off), 0);
	ck_assert_uint_eq(off, 8 << 20);
	ck_assert_uint_eq(stack.fake->extents_asked_bytes, 8 << 20);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_seek)
{
	struct test_stack stack;
	uint64_t off;

	test_stack_open(&stack, "( { layer = 'memory'; size = '1M' } )");
	ck_assert_int_eq(blk_seek_mapped(stack.top, 0, &off), 0);
	ck_assert_uint_eq(off, 1 << 20);
	ck_assert_int_eq(blk_write(stack.top, 8192, "x", 1, 0), 0);
	ck_assert_int_eq(blk_seek_mapped(stack.top, 0, &off), 0);
	ck_assert_uint_eq(off, 8192);
	ck_assert_int_eq(blk_seek_mapped(stack.top, 8193, &off), 0);
	ck_assert_uint_eq(off, 8193);
	ck_assert_int_eq(blk_seek_unmapped(stack.top, 8193, &off), 0);
	ck_assert_uint_eq(off, 12288);
	ck_assert_int_eq(blk_seek_unmapped(stack.top, 5, &off), 0);
	ck_assert_uint_eq(off, 5);
	ck_assert_int_eq(blk_seek_mapped(stack.top, 1 << 20, &off), 0);
	ck_assert_uint_eq(off, 1 << 20);
	ck_assert_int_eq(blk_seek_mapped(stack.top, (1 << 20) + 1, &off), -EINVAL);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("blk");
	TCase *tcase = tcase_create("blk");

	suite_add_tcase(suite, tcase);
	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_order_of_refusal);
	tcase_add_test(tcase, test_nothing_to_do);
	tcase_add_test(tcase, test_vectors);
	tcase_add_test(tcase, test_counters_and_status);
	tcase_add_test(tcase, test_drain);
	tcase_add_test(tcase, test_resize_events_travel_up);
	tcase_add_test(tcase, test_resize_refused);
	tcase_add_test(tcase, test_resize_drains);
	tcase_add_test(tcase, test_extents_merge);
	tcase_add_test(tcase, test_extents_of_bytes);
	tcase_add_test(tcase, test_extents_of_blocks);
	tcase_add_test(tcase, test_extents_are_conservative);
	tcase_add_test(tcase, test_seek_by_chunks);
	tcase_add_test(tcase, test_seek);
	return test_suite(suite);
}
