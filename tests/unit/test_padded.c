/*
 * The padded layer: zeroes behind an odd end, and what happens to writes that reach there.
 */
#include "fake.h"

static char buf[200000];

/* Whether all of the buffer is byte. */
static bool all(const char *bytes, size_t len, char byte)
{
	while (len && *bytes == byte)
		bytes++, len--;
	return !len;
}

suspends CO_TEST(test_sizes)
{
	static const struct {
		uint64_t below, seen;
		const char *options;
	} cases[] = {
		{ 1, 512, "align = 512" }, { 512, 512, "align = 512" },
		{ 513, 1024, "align = 512" }, { 1000000, 1 << 20, "align = '1M'" },
		{ 1000, 1000000, "size = 1000000" },
		{ 1000, 1000, "size = 1" }, /* nothing is hidden */
	};
	struct test_stack stack;

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		test_stack_open(&stack,
			"( { layer = 'padded'; %s }, { layer = 'memory'; size = %d } )",
			cases[i].options, (int)cases[i].below);
		ck_assert_uint_eq(blk_caps(stack.top)->size, cases[i].seen);
		test_stack_close(&stack);
	}
}

suspends CO_TEST(test_reads_straddle)
{
	struct test_stack stack;
	char back[2000];

	test_stack_open(&stack, "( { layer = 'padded'; size = '1M' },"
				"  { layer = 'memory'; size = 1000 } )");
	memset(buf, 'd', 1000);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 1000, 0), 0);
	memset(back, 'x', sizeof(back));
	ck_assert_int_eq(blk_read(stack.top, 500, back, 1000), 0);
	ck_assert(all(back, 500, 'd') && all(back + 500, 500, 0) && all(back + 1000, 1000, 'x'));
	ck_assert_int_eq(blk_read(stack.top, 5000, back, 2000), 0);
	ck_assert(all(back, 2000, 0));
	ck_assert_int_eq(blk_read(stack.top, (1 << 20) - 1, back, 2), -EINVAL);
	test_stack_close(&stack);
}

suspends CO_TEST(test_writes_beyond_fail_whole)
{
	struct test_stack stack;
	struct blk *below;
	char back[1000];

	test_stack_open(&stack, "( { layer = 'padded'; align = 4096 },"
				"  { layer = 'memory'; size = 1000 } )");
	below = stack.top->below;
	memset(buf, 'x', 600);
	ck_assert_int_eq(blk_write(stack.top, 500, buf, 501, 0), -ENOSPC);
	ck_assert_int_eq(blk_write(stack.top, 2000, buf, 1, BLK_FUA), -ENOSPC);
	ck_assert_int_eq(blk_read(below, 0, back, 1000), 0);
	ck_assert(all(back, 1000, 0));
	ck_assert_uint_eq(below->counters.requests[BLK_COUNT_WRITE], 0);
	ck_assert_int_eq(blk_write(stack.top, 500, buf, 500, 0), 0);
	/* what is zero anyway can be zeroed */
	ck_assert_int_eq(blk_zero(stack.top, 900, 3196, BLK_NO_HOLE), 0);
	ck_assert_int_eq(blk_discard(stack.top, 3000, 1096, 0), 0);
	ck_assert_int_eq(blk_read(below, 500, back, 500), 0);
	ck_assert(all(back, 400, 'x') && all(back + 400, 100, 0));
	ck_assert_uint_eq(blk_caps(below)->size, 1000);
	test_stack_close(&stack);
}

suspends CO_TEST(test_grow)
{
	struct test_stack stack;
	char back[1000];

	test_stack_open(&stack, "( { layer = 'padded'; align = 4096; grow = true },"
				"  { layer = 'memory'; size = 1000 } )");
	ck_assert_int_eq(blk_zero(stack.top, 900, 3196, 0), 0);
	ck_assert_uint_eq(blk_caps(stack.top->below)->size, 1000);
	memset(buf, 'x', 100);
	ck_assert_int_eq(blk_write(stack.top, 950, buf, 100, 0), 0);
	ck_assert_uint_eq(blk_caps(stack.top->below)->size, 4096);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 4096);
	ck_assert_int_eq(blk_read(stack.top, 900, back, 1000), 0);
	ck_assert(all(back, 50, 0) && all(back + 50, 100, 'x') && all(back + 150, 850, 0));
	test_stack_close(&stack);
}

suspends CO_TEST(test_grow_fails)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "grow", NULL,
		"( { layer = 'padded'; align = 4096; grow = true },"
		"  { size = 1000 } )");
	stack.fake->resize_error = -EFBIG;
	ck_assert_int_eq(blk_write(stack.top, 950, buf, 100, 0), -ENOSPC);
	ck_assert_int_eq(blk_zero(stack.top, 950, 100, BLK_NO_HOLE), -ENOSPC);
	ck_assert_uint_eq(stack.fake->writes + stack.fake->zeroes, 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 4096);
	ck_assert_int_eq(blk_write(stack.top, 900, buf, 100, 0), 0);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_extents)
{
	struct blk_extent list[8];
	struct blk_extents extents;
	struct test_stack stack;

	test_stack_open(&stack, "( { layer = 'padded'; size = '1M' },"
				"  { layer = 'memory'; size = 10000 } )");
	ck_assert_int_eq(blk_write(stack.top, 9999, "x", 1, 0), 0);
	blk_extents_init(&extents, list, 8);
	ck_assert_int_eq(blk_extents(stack.top, 0, 1 << 20, &extents), 0);
	ck_assert_uint_eq(extents.count, 3);
	ck_assert_uint_eq(extents.end, 1 << 20);
	ck_assert_uint_eq(list[0].flags, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	ck_assert_uint_eq(list[1].flags, 0);
	ck_assert_uint_eq(list[0].len + list[1].len, 10000);
	ck_assert_uint_eq(list[2].flags, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	ck_assert_uint_eq(list[2].len, (1 << 20) - 10000);
	/* wholly in the padding, and a list too short for what is below */
	blk_extents_init(&extents, list, 8);
	ck_assert_int_eq(blk_extents(stack.top, 20000, 100, &extents), 0);
	ck_assert_uint_eq(extents.count, 1);
	ck_assert_uint_eq(list[0].len, 100);
	ck_assert_uint_eq(list[0].flags, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	blk_extents_init(&extents, list, 1);
	ck_assert_int_eq(blk_extents(stack.top, 0, 1 << 20, &extents), 0);
	ck_assert_uint_eq(extents.count, 1);
	ck_assert_uint_lt(extents.end, 10000);
	test_stack_close(&stack);
}

suspends CO_TEST(test_resize)
{
	struct test_stack stack;
	struct blk *below;
	struct err err;

	test_stack_open(&stack, "( { layer = 'padded'; size = 10000 },"
				"  { layer = 'memory'; size = 1000 } )");
	below = stack.top->below;
	/* a shrink within the padding leaves what is below alone, a deeper one does not */
	ck_assert_int_eq(blk_resize(stack.top, 5000, BLK_FORCE, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 5000);
	ck_assert_uint_eq(blk_caps(below)->size, 1000);
	ck_assert_int_eq(blk_resize(stack.top, 700, BLK_FORCE, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 700);
	ck_assert_uint_eq(blk_caps(below)->size, 700);
	/* growing gives real space */
	ck_assert_int_eq(blk_resize(stack.top, 20000, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(below)->size, 20000);
	ck_assert_int_eq(blk_write(stack.top, 19999, "x", 1, 0), 0);
	/* what is below grows on its own, and shows */
	ck_assert_int_eq(blk_resize(below, 30000, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 30000);
	test_stack_close(&stack);
}

suspends CO_TEST(test_failed_resize_changes_nothing)
{
	struct fake_stack stack;
	struct err err;

	fake_stack_open(&stack, "resize", NULL,
		"( { layer = 'padded'; size = 10000 },"
		"  { size = 5000 } )");
	stack.fake->resize_error = -EIO;
	ck_assert_int_eq(blk_resize(stack.top, 20000, 0, &err), -EIO);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 10000);
	ck_assert_int_eq(blk_resize(stack.top, 3000, BLK_FORCE, &err), -EIO);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 10000);
	ck_assert_uint_eq(blk_caps(&stack.fake->blk)->size, 5000);
	/* an event from below does not bring the refused size back */
	stack.fake->resize_error = 0;
	ck_assert_int_eq(blk_resize(&stack.fake->blk, 6000, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 10000);
	fake_stack_close(&stack);
}

/* Several writers find the end at the same time: one of them grows, all of them write. */
struct grower {
	struct blk *top;
	uint64_t off;
};

static suspends void grow_main(void *arg)
{
	struct grower grower = *(struct grower *)arg;

	ck_assert_int_eq(blk_write(grower.top, grower.off, "x", 1, 0), 0);
}

suspends CO_TEST(test_concurrent_growers)
{
	struct fake_stack stack;
	struct co_group group;

	fake_stack_open(&stack, "growers", NULL,
		"( { layer = 'padded'; size = 8192; grow = true }, { size = 100; waits = 3 } )");
	co_group_init(&group);
	for (uint64_t off = 0; off < 8192; off += 64) {
		struct grower grower = { stack.top, off };

		co_group_start(&group, grow_main, &grower);
	}
	co_group_wait(&group);
	ck_assert_uint_eq(blk_caps(&stack.fake->blk)->size, 8192);
	for (int i = 0; i < 8192; i++)
		if (stack.fake->data[i] != (i % 64 ? 0 : 'x'))
			ck_abort_msg("byte %d is %d", i, stack.fake->data[i]);
	fake_stack_close(&stack);
}

/* Random sizes, block sizes and operations against an oracle. */
static suspends void run_random(struct seed *seed, bool grow)
{
	uint64_t block_size = UINT64_C(1) << seed_below(seed, 13);
	uint64_t below_len = block_size * (1 + seed_below(seed, 50000 / block_size));
	uint64_t seen = below_len + block_size * seed_below(seed, 50000 / block_size);
	struct fake_stack stack;
	static char oracle[100000], data[100000];

	fake_stack_open(&stack, "random", NULL,
		"( { layer = 'padded'; size = %d; grow = %s },"
		"  { size = %d; block-size = %d; zero = true; max-request = %d } )",
		(int)seen, grow ? "true" : "false", (int)below_len, (int)block_size,
		(int)MAX(4096U, block_size));
	memset(oracle, 0, sizeof(oracle));
	for (int i = 0; i < 200; i++) {
		uint64_t off = seed_below(seed, seen), len = 1 + seed_below(seed, seen - off);
		bool beyond = off + len > blk_caps(&stack.fake->blk)->size;

		switch (seed_below(seed, 4)) {
		case 0:
			ck_assert_int_eq(blk_zero(stack.top, off, len, 0), 0);
			memset(oracle + off, 0, len);
			break;
		case 1:
			seed_fill(seed, data, len);
			if (beyond && !grow) {
				ck_assert_int_eq(blk_write(stack.top, off, data, len, 0), -ENOSPC);
				break;
			}
			ck_assert_int_eq(blk_write(stack.top, off, data, len, 0), 0);
			memcpy(oracle + off, data, len);
			break;
		default:
			ck_assert_int_eq(blk_read(stack.top, off, data, len), 0);
			ck_assert_mem_eq(data, oracle + off, len);
		}
	}
	ck_assert_mem_eq(stack.fake->data, oracle, MIN(seen, blk_caps(&stack.fake->blk)->size));
	fake_stack_close(&stack);
}

suspends CO_TEST(test_any_request)
{
	struct seed seed = seed_start("test_any_request");

	for (int round = 0; round < 60; round++)
		run_random(&seed, round % 2);
}

int main(void)
{
	Suite *suite = suite_create("padded");
	TCase *tcase = tcase_create("padded");

	suite_add_tcase(suite, tcase);
	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_sizes);
	tcase_add_test(tcase, test_reads_straddle);
	tcase_add_test(tcase, test_writes_beyond_fail_whole);
	tcase_add_test(tcase, test_grow);
	tcase_add_test(tcase, test_grow_fails);
	tcase_add_test(tcase, test_extents);
	tcase_add_test(tcase, test_resize);
	tcase_add_test(tcase, test_failed_resize_changes_nothing);
	tcase_add_test(tcase, test_concurrent_growers);
	tcase_add_test(tcase, test_any_request);
	return test_suite(suite);
}
