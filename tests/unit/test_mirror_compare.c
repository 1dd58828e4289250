/*
 * Both legs are compared while guests write: what differs is found and copied again, what does not is never reported,
 * and a leg that cannot be read is told by name.
 */
#include "mirror_rig.h"

#define MIB     1048576ULL
#define SIZE    (4 * MIB + 512)
#define WRITERS 4

#define STACK                                                                              \
	"( { layer = 'mirror'; overwrite = true; chunk = 4096; %s"                         \
	"    secondary = ( { layer = 'fault' }, { layer = 'memory'; size = 4194816 } ) }," \
	"  { layer = 'fault' }, { layer = 'memory'; size = 4194816 } )"

/* All of it; the first error ends it. */
static suspends int compare(struct mirror *mirror, struct mirror_comparison *sum, struct err *err)
{
	int ret = 0;

	*sum = (struct mirror_comparison){};
	for (uint64_t off = 0, len; off < SIZE && !ret; off += len) {
		len = SIZE - off;
		ret = mirror_compare(&mirror->blk, off, &len, sum, err);
		co_sleep_ns(0);
	}
	return ret;
}

suspends CO_TEST(test_differences_are_copied_again)
{
	struct seed seed = seed_start("compare");
	struct mirror_comparison sum;
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(&mirror->blk, MIB, MIB, 'p');
	for (int round = 0; round < 20; round++) {
		uint64_t first = SIZE, count = 1 + seed_below(&seed, 5);
		uint64_t step = SIZE / count;

		wait_phase(mirror, MIRROR_IN_SYNC);
		for (uint64_t i = 0; i < count; i++) {
			uint64_t off = i * step + seed_below(&seed, step);

			ck_assert_int_eq(blk_write(mirror->secondary, off, "x", 1, 0), 0);
			first = MIN(first, off);
		}
		ck_assert_int_eq(compare(mirror, &sum, &err), 0);
		ck_assert_uint_eq(sum.different, count);
		ck_assert_uint_eq(sum.first_off, first);
		wait_phase(mirror, MIRROR_IN_SYNC);
		check_legs_equal(mirror);
	}
	ck_assert_int_eq(compare(mirror, &sum, &err), 0);
	ck_assert_uint_eq(sum.different, 0);
	ck_assert_uint_eq(sum.compared, SIZE);
	test_stack_close(&stack);
}

static suspends void fails(struct mirror *mirror, struct blk *leg, const struct fault_rules *rules,
	int expected, const char *text)
{
	struct mirror_comparison sum;
	struct err err;

	fault_set(fault_find(leg), rules);
	ck_assert_int_eq(compare(mirror, &sum, &err), expected);
	ck_assert_msg(strstr(err.text, text) != NULL, "%s", err.text);
	ck_assert_uint_eq(sum.different, 0);
	/* the range is free again, and both legs are in use */
	ck_assert_int_eq(blk_write(&mirror->blk, 0, "g", 1, 0), 0);
	fault_set(fault_find(leg), NULL);
	ck_assert_int_eq(mirror->phase, MIRROR_IN_SYNC);
}

suspends CO_TEST(test_a_leg_that_cannot_be_read)
{
	struct fault_rules bad = {
		.ops = FAULT_READ, .countdown = 3, .sticky = true, .error = EIO
	};
	struct fault_rules hangs = { .delay_ops = FAULT_READ, .delay_us = 2500000 };
	struct mirror_comparison sum;
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "timeout = 1;");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(&mirror->blk, 0, 4 * MIB, 'p');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fails(mirror, mirror->secondary, &bad, -EIO, "the secondary cannot be read at ");
	fails(mirror, mirror->primary, &bad, -EIO, "the primary cannot be read at ");
	fails(mirror, mirror->secondary, &hangs, -ETIMEDOUT, "the secondary cannot be read at 0");
	ck_assert_int_eq(compare(mirror, &sum, &err), 0);
	ck_assert_uint_eq(sum.different, 0);
	test_stack_close(&stack);
}

suspends CO_TEST(test_nothing_to_compare)
{
	struct fault_rules broken = { .ops = FAULT_ALL, .every = 1, .error = EIO };
	struct mirror_comparison sum;
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "paused = true;");

	struct mirror *mirror = mirror_of(&stack);

	/* what was not copied yet is no difference */
	fill_leg(&mirror->blk, 0, MIB, 'p');
	ck_assert_int_eq(compare(mirror, &sum, &err), 0);
	ck_assert_uint_eq(sum.compared + sum.different, 0);
	fault_set(fault_find(mirror->secondary), &broken);
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_DEGRADED);
	ck_assert_int_eq(compare(mirror, &sum, &err), -EAGAIN);
	ck_assert_ptr_nonnull(strstr(err.text, "the secondary is not in use"));
	test_stack_close(&stack);
}

struct writer {
	struct blk *blk;
	struct seed *seed;
	bool *ending;
};

static suspends void writer_run(void *arg)
{
	struct writer *writer = arg;
	char buf[70000];

	while (!*writer->ending) {
		uint64_t len = 1 + seed_below(writer->seed, sizeof(buf));
		uint64_t off = seed_below(writer->seed, SIZE - len);

		memset(buf, (int)seed_below(writer->seed, 256), len);
		if (seed_below(writer->seed, 4))
			ck_assert_int_eq(blk_write(writer->blk, off, buf, len, 0), 0);
		else
			ck_assert_int_eq(blk_discard(writer->blk, off, len, 0), 0);
		co_sleep_ns(seed_below(writer->seed, 50000));
	}
}

/* The legs get a change at different times, and are never seen in between. */
suspends CO_TEST(test_writes_are_no_difference)
{
	struct fault_rules slow = { .delay_ops = FAULT_ALL, .delay_random_us = 300 };
	struct seed seed = seed_start("compare while it is written");
	struct mirror_comparison sum;
	struct test_stack stack;
	struct co_group group;
	bool ending = false;
	struct err err;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);
	struct writer writer = { &mirror->blk, &seed, &ending };

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->secondary), &slow);
	fault_set(fault_find(mirror->primary), &slow);
	co_group_init(&group);
	for (int i = 0; i < WRITERS; i++)
		co_group_start(&group, writer_run, &writer);
	for (int round = 0; round < 5; round++) {
		ck_assert_int_eq(compare(mirror, &sum, &err), 0);
		ck_assert_uint_eq(sum.different, 0);
		ck_assert_uint_eq(sum.compared, SIZE);
	}
	ending = true;
	co_group_wait(&group);
	check_legs_equal(mirror);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("mirror_compare");
	TCase *tcase = tcase_create("mirror_compare");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_differences_are_copied_again);
	tcase_add_test(tcase, test_a_leg_that_cannot_be_read);
	tcase_add_test(tcase, test_nothing_to_compare);
	tcase_add_test(tcase, test_writes_are_no_difference);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
