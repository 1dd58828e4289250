/*
 * A mirrored disk is resized: both legs are, or neither; while it copies too; and the intent log follows.
 */
#include <unistd.h>

#include "mirror_rig.h"

#define MIB 1048576ULL

#define STACK                                                                           \
	"( { layer = 'mirror'; overwrite = true; timeout = 1; chunk = 4096; %s"         \
	"    secondary = ( { layer = 'fault' }, { layer = 'memory'; size = '4M' } ) }," \
	"  { layer = 'fault' }, { layer = 'memory'; size = '4M' } )"

static suspends void check_resized(struct test_stack *stack, uint64_t size)
{
	struct mirror *mirror = mirror_of(stack);

	ck_assert_uint_eq(blk_caps(stack->top)->size, size);
	ck_assert_uint_eq(blk_caps(mirror->primary)->size, size);
	ck_assert_uint_eq(blk_caps(mirror->secondary)->size, size);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_uint_le(mirror_bytes_dirty(&mirror->blk), size);
	check_legs_equal(mirror);
}

suspends CO_TEST(test_grow_and_shrink)
{
	static const uint64_t sizes[] = { 5 * MIB, 5 * MIB + 512, 900 * MIB, 3 * MIB, 4096 + 512,
		2 * MIB };
	struct seed seed = seed_start("resize");
	struct test_stack stack;
	struct err err;

	for (int paused = 0; paused < 2; paused++) {
		test_stack_open(&stack, STACK, paused ? "paused = true;" : "");

		struct mirror *mirror = mirror_of(&stack);

		fill_leg(&mirror->blk, 0, 4 * MIB, 'p');
		for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
			if (!seed_below(&seed, 2))
				mirror_resume(&mirror->blk);
			ck_assert_int_eq(blk_resize(stack.top, sizes[i], BLK_FORCE, &err), 0);
			ck_assert_uint_eq(blk_caps(stack.top)->size, sizes[i]);
			fill_leg(stack.top, sizes[i] - 4096, 4096, (char)('a' + i));
			mirror_pause(&mirror->blk);
		}
		mirror_resume(&mirror->blk);
		check_resized(&stack, 2 * MIB);
		/* what was cut off is not there again */
		ck_assert(leg_holds(mirror->secondary, 8192, 2 * MIB - 8192 - 4096, 0));
		test_stack_close(&stack);
	}
}

static suspends void failing(unsigned leg_index, const struct fault_rules *rules, int expected,
	uint64_t size, const char *text)
{
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);
	struct blk *legs[] = { mirror->primary, mirror->secondary };

	fill_leg(&mirror->blk, 0, 4 * MIB, 'p');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(legs[leg_index]), rules);
	ck_assert_int_eq(blk_resize(stack.top, size, BLK_FORCE, &err), expected);
	ck_assert_msg(strstr(err.text, text) != NULL, "%s", err.text);
	fault_set(fault_find(legs[leg_index]), NULL);
	mirror_resume(&mirror->blk);
	check_resized(&stack, 4 * MIB);
	ck_assert(leg_holds(mirror->secondary, 0, 4 * MIB, 'p'));
	test_stack_close(&stack);
}

suspends CO_TEST(test_a_leg_that_cannot)
{
	struct fault_rules rules = { .ops = FAULT_RESIZE, .countdown = 1, .error = ENOSPC };

	failing(1, &rules, -ENOSPC, 6 * MIB, "the secondary cannot be resized");
	failing(1, &rules, -ENOSPC, 2 * MIB, "the secondary cannot be resized");
	failing(0, &rules, -ENOSPC, 6 * MIB, "fault");
	failing(0, &rules, -ENOSPC, 2 * MIB,
		"fault"); /* the secondary was cut already: copied again */
}

/* Late, it becomes what was asked of it, and then the two are no mirror any more. */
suspends CO_TEST(test_a_secondary_that_hangs)
{
	struct fault_rules hangs = { .hang_ops = FAULT_RESIZE };
	struct test_stack stack;
	struct err err;
	char buf[512] = "x";

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->secondary), &hangs);
	ck_assert_int_eq(blk_resize(stack.top, 6 * MIB, 0, &err), -ETIMEDOUT);
	ck_assert_ptr_nonnull(strstr(err.text, "did not answer within 1 s"));
	ck_assert_uint_eq(blk_caps(stack.top)->size, 4 * MIB);
	ck_assert_int_eq(blk_resize(stack.top, 6 * MIB, 0, &err), -EAGAIN);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, sizeof(buf), 0), 0);
	fault_release(fault_find(mirror->secondary));
	while (mirror->phase != MIRROR_DETACHED)
		mirror_wait_change(&mirror->blk, reactor_now_ns() + 10 * NS_PER_MS);
	ck_assert_str_eq(mirror->note, "ended: the secondary was resized to 6291456 bytes");
	ck_assert_int_eq(blk_resize(stack.top, 7 * MIB, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 7 * MIB);
	test_stack_close(&stack);
}

suspends CO_TEST(test_refused)
{
	struct fault_rules broken = { .ops = FAULT_ALL, .every = 1, .error = EIO };
	struct test_stack stack;
	struct err err;
	char buf[512] = "x";

	test_stack_open(&stack, STACK, "on-error = 'stop';");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_int_eq(blk_resize(stack.top, MIB, 0, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.text, "must be forced"));
	fault_set(fault_find(mirror->secondary), &broken);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, sizeof(buf), 0), 0);
	ck_assert_int_eq(blk_resize(stack.top, 5 * MIB, 0, &err), -EAGAIN);
	ck_assert_ptr_nonnull(strstr(err.text, "cannot be resized with it"));
	test_stack_close(&stack);

	test_stack_open(&stack, "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = "
				"'memory'; size = '4M'; block-size = 4096 } ) },"
				"  { layer = 'memory'; size = '4M' } )");
	ck_assert_int_eq(blk_resize(stack.top, 5 * MIB + 512, 0, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.text, "no multiple of the secondary's block size, 4096"));
	test_stack_close(&stack);
}

/* After it, and after an end, the log knows the disk that it belongs to. */
suspends CO_TEST(test_with_a_log)
{
	static const char conf[] =
		"( { layer = 'mirror'; overwrite = true; timeout = 3600; intent-log = 'log'; "
		"secondary = ("
		"    { layer = 'file'; path = 'b'; create = true; size = '4M' } ) },"
		"  { layer = 'file'; path = 'a'; create = true; size = '4M' } )";
	const char *scratch = getenv("SCRATCH");
	struct test_stack stack;
	struct err err;

	ck_assert_int_eq(chdir(scratch ? scratch : "/tmp"), 0);
	test_stack_open(&stack, conf);
	fill_leg(stack.top, 0, 4 * MIB, 'p');
	wait_phase(mirror_of(&stack), MIRROR_IN_SYNC);
	ck_assert_int_eq(blk_resize(stack.top, 70 * MIB, 0, &err), 0);
	fill_leg(stack.top, 69 * MIB, MIB, 'q');
	check_resized(&stack, 70 * MIB);
	test_stack_close(&stack);
	test_stack_open(&stack, conf);
	ck_assert_str_eq(mirror_of(&stack)->note,
		"only what the intent log names is copied: 0 of 73400320 bytes");
	check_resized(&stack, 70 * MIB);
	ck_assert(leg_holds(mirror_of(&stack)->secondary, 69 * MIB, MIB, 'q'));
	test_stack_close(&stack);
	ck_assert_int_eq(unlink("a") | unlink("b") | unlink("log"), 0);
}

static suspends void shrink(void *arg)
{
	struct err err;

	ck_assert_int_eq(blk_resize(arg, MIB, BLK_FORCE, &err), 0);
}

/* The secondary is cut, the primary not yet: should it end here, the log must know what was cut. */
suspends CO_TEST(test_a_cut_is_noted_first)
{
	struct fault_rules hangs = { .hang_ops = FAULT_RESIZE };
	const char *scratch = getenv("SCRATCH");
	struct test_stack stack;
	struct co_group group;

	ck_assert_int_eq(chdir(scratch ? scratch : "/tmp"), 0);
	test_stack_open(&stack, STACK, "intent-log = 'log';");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(stack.top, 0, 4 * MIB, 'p');
	wait_phase(mirror, MIRROR_IN_SYNC);
	mirror_settle(mirror);
	ck_assert(!bitmap_test(mirror->log.durable, 3));
	fault_set(fault_find(mirror->primary), &hangs);
	co_group_init(&group);
	co_group_start(&group, shrink, stack.top);
	while (blk_caps(mirror->secondary)->size != MIB)
		co_sleep_ns(NS_PER_MS);
	ck_assert_uint_eq(blk_caps(mirror->primary)->size, 4 * MIB);
	ck_assert(!bitmap_test(mirror->log.durable, 0));
	for (size_t i = 1; i < 4; i++)
		ck_assert(bitmap_test(mirror->log.durable, i));
	fault_release(fault_find(mirror->primary));
	co_group_wait(&group);
	check_resized(&stack, MIB);
	test_stack_close(&stack);
	ck_assert_int_eq(unlink("log"), 0);
}

/* The range is waited for until the disk ends before it. */
suspends CO_TEST(test_compared_while_it_shrinks)
{
	struct fault_rules slow = { .delay_ops = FAULT_RESIZE, .delay_us = 50000 };
	struct mirror_comparison sum = {};
	struct test_stack stack;
	struct co_group group;
	struct err err;
	uint64_t len;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(stack.top, 0, 4 * MIB, 'p');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->primary), &slow);
	co_group_init(&group);
	co_group_start(&group, shrink, stack.top);
	while (blk_caps(mirror->secondary)->size != MIB)
		co_sleep_ns(NS_PER_MS);
	len = 2 * MIB;
	ck_assert_int_eq(mirror_compare(&mirror->blk, 2 * MIB, &len, &sum, &err), 0);
	ck_assert_uint_eq(len, 0);
	len = 2 * MIB;
	ck_assert_int_eq(mirror_compare(&mirror->blk, MIB - 512, &len, &sum, &err), 0);
	ck_assert_uint_eq(len, 512);
	ck_assert_uint_eq(sum.compared, 512);
	ck_assert_uint_eq(sum.different, 0);
	co_group_wait(&group);
	check_resized(&stack, MIB);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("mirror_resize");
	TCase *tcase = tcase_create("mirror_resize");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_grow_and_shrink);
	tcase_add_test(tcase, test_a_leg_that_cannot);
	tcase_add_test(tcase, test_a_secondary_that_hangs);
	tcase_add_test(tcase, test_refused);
	tcase_add_test(tcase, test_with_a_log);
	tcase_add_test(tcase, test_a_cut_is_noted_first);
	tcase_add_test(tcase, test_compared_while_it_shrinks);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
