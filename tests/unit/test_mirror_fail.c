/*
 * The mirror layer when a leg fails, hangs or comes back: guests see nothing of the secondary's troubles, what
 * was missed is copied later, and the primary's read errors are made up for.
 */
#include "mirror_rig.h"

#define STACK                                                                              \
	"( { layer = 'mirror'; overwrite = true; timeout = 1; chunk = 4096; %s"            \
	"    secondary = ( { layer = 'fault' }, { layer = 'memory'; size = 2097664 } ) }," \
	"  { layer = 'fault' }, { layer = 'memory'; size = 2097664 } )"

/* A secondary that may take its time. */
#define HOURS_STACK                                                                        \
	"( { layer = 'mirror'; overwrite = true; timeout = 3600; chunk = 4096;"            \
	"    secondary = ( { layer = 'fault' }, { layer = 'memory'; size = 2097664 } ) }," \
	"  { layer = 'fault' }, { layer = 'memory'; size = 2097664 } )"

static char buf[1 << 20];

static void retry_now(struct mirror *mirror)
{
	mirror_resume(&mirror->blk);
}

/* A leg that hangs does so no longer. */
static void answer_at_last(struct blk *fault)
{
	fault_set(fault, NULL);
	fault_release(fault);
}

/* Whatever operation of the secondary fails first, in the copy or afterwards. */
suspends CO_TEST(test_secondary_fails_at_every_phase)
{
	static const unsigned ops[] = { FAULT_WRITE, FAULT_FLUSH, FAULT_ZERO | FAULT_DISCARD,
		FAULT_EXTENTS, FAULT_ALL };

	for (size_t i = 0; i < ARRAY_LEN(ops); i++) {
		for (uint64_t countdown = 1; countdown < 40; countdown = countdown * 2 + 1) {
			struct fault_rules rules = {
				.ops = ops[i], .countdown = countdown, .error = EIO, .torn = true
			};
			struct test_stack stack;

			test_stack_open(&stack, STACK, "paused = true;");

			struct mirror *mirror = mirror_of(&stack);
			struct blk *fault = fault_find(mirror->secondary);

			fill_leg(mirror->primary, 0, 1 << 20, 'p');
			fill_leg(mirror->secondary, 1 << 20, 1 << 19, 's');
			fault_set(fault, &rules);
			mirror_resume(&mirror->blk);
			for (uint64_t off = 0; off < 2 << 20; off += 150000) {
				memset(buf, 'a' + (int)(off % 23), 40000);
				ck_assert_int_eq(blk_write(&mirror->blk, off, buf, 40000, 0), 0);
				ck_assert_int_eq(
					blk_discard(&mirror->blk, off + 50000, 9000, 0), 0);
				ck_assert_int_eq(blk_flush(&mirror->blk), 0);
				co_sleep_ns(50000);
			}
			fault_set(fault, NULL);
			retry_now(mirror);
			wait_phase(mirror, MIRROR_IN_SYNC);
			check_legs_equal(mirror);
			test_stack_close(&stack);
		}
	}
}

suspends CO_TEST(test_degraded_and_resynchronised)
{
	struct fault_rules broken = { .ops = FAULT_ALL, .every = 1, .error = ENOSPC };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(&mirror->blk, 0, 1 << 20, 'a');
	wait_phase(mirror, MIRROR_IN_SYNC);
	mirror_settle(mirror);
	fault_set(fault_find(mirror->secondary), &broken);
	memset(buf, 'b', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 8192, buf, 4096, 0), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	ck_assert_int_eq(blk_write(&mirror->blk, 1 << 20, buf, 4097, 0), 0);

	json_t *status = status_of(mirror), *failure = json_object_get(status, "secondary_error");

	ck_assert_str_eq(json_string_value(json_object_get(status, "phase")), "degraded");
	ck_assert_str_eq(json_string_value(json_object_get(failure, "text")),
		"write of 4096 bytes at 8192: No space left on device");
	ck_assert_int_ge(json_integer_value(json_object_get(failure, "time")), 1);
	json_decref(status);

	uint64_t copied = mirror->copied_bytes;

	fault_set(fault_find(mirror->secondary), NULL);
	wait_phase(mirror, MIRROR_IN_SYNC); /* by itself, after a second */
	check_legs_equal(mirror);
	ck_assert_uint_le(mirror->copied_bytes - copied, 2 << 20);
	test_stack_close(&stack);
}

/* What was written and not flushed may be gone when the secondary comes back. */
suspends CO_TEST(test_unflushed_writes_are_copied_again)
{
	struct fault_rules broken = { .ops = FAULT_FLUSH, .every = 1, .error = EIO };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	memset(buf, 'b', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 8192, buf, 4096, 0), 0);
	ck_assert(leg_holds(mirror->secondary, 8192, 4096, 'b'));
	/* its power fails: it loses the write, and says so to the flush */
	fill_leg(mirror->secondary->below, 8192, 4096, 0);
	fault_set(fault_find(mirror->secondary), &broken);
	ck_assert_int_eq(blk_flush(&mirror->blk), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	fault_set(fault_find(mirror->secondary), NULL);
	retry_now(mirror);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert(leg_holds(mirror->secondary, 8192, 4096, 'b'));
	test_stack_close(&stack);
}

suspends CO_TEST(test_hanging_secondary_does_not_hang_guests)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->secondary), &hangs);
	memset(buf, 'h', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 0, buf, 4096, 0), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	ck_assert_ptr_nonnull(strstr(mirror->secondary_failure.text, "no answer within 1 s"));
	/* the next ones do not even wait; the late write must not undo this one */
	memset(buf, 'i', sizeof(buf));
	for (int i = 0; i < 100; i++)
		ck_assert_int_eq(blk_write(&mirror->blk, 0, buf, 4096, 0), 0);
	ck_assert_uint_eq(mirror->leg->given_up_count, 1);
	/* it works again, but owes an answer: nothing is copied before that has come */
	fault_set(fault_find(mirror->secondary), NULL);
	retry_now(mirror);
	co_sleep_ns(100 * NS_PER_MS);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	fault_release(fault_find(mirror->secondary));
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	ck_assert(leg_holds(mirror->secondary, 0, 4096, 'i'));
	test_stack_close(&stack);
}

/* A copy step that hangs lets go of its range. */
suspends CO_TEST(test_hanging_copy_lets_guests_write)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "paused = true;");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(mirror->primary, 0, 1 << 20, 'p');
	fault_set(fault_find(mirror->secondary), &hangs);
	mirror_resume(&mirror->blk);
	while (!mirror->leg->running.running)
		co_sleep_ns(0);
	memset(buf, 'g', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 0, buf, 65536, 0), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	answer_at_last(fault_find(mirror->secondary));
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	ck_assert(leg_holds(mirror->secondary, 0, 65536, 'g'));
	test_stack_close(&stack);
}

suspends CO_TEST(test_stop_waits_for_resume)
{
	struct fault_rules broken = { .ops = FAULT_WRITE, .countdown = 1, .error = EIO };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "on-error = 'stop';");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->secondary), &broken);
	ck_assert_int_eq(blk_write(&mirror->blk, 0, buf, 4096, 0), 0);
	co_sleep_ns(1500 * NS_PER_MS);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	test_stack_close(&stack);
}

suspends CO_TEST(test_primary_read_answered_by_secondary)
{
	struct fault_rules bad = {
		.ops = FAULT_READ, .from = 65536, .to = 65537, .every = 1, .error = EIO
	};
	struct test_stack stack;

	test_stack_open(&stack, STACK, "paused = true;");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(mirror->primary, 0, 1 << 20, 'r');
	fault_set(fault_find(mirror->primary), &bad);
	ck_assert_int_eq(blk_read(&mirror->blk, 65536, buf, 4096), -EIO); /* not copied yet */
	fault_set(fault_find(mirror->primary), NULL);
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->primary), &bad);
	memset(buf, 0, 4096);
	ck_assert_int_eq(blk_read(&mirror->blk, 65536, buf, 4096), 0);
	ck_assert_int_eq(buf[0], 'r');
	ck_assert_int_eq(buf[4095], 'r');
	ck_assert_uint_eq(mirror->served_by_secondary, 1);
	ck_assert_str_eq(
		mirror->primary_failure.text, "read of 4096 bytes at 65536: Input/output error");
	test_stack_close(&stack);
}

/* A bad sector of the primary holds up its chunk alone, and no lock is left behind. */
suspends CO_TEST(test_unreadable_chunk)
{
	struct fault_rules bad = {
		.ops = FAULT_READ, .from = 65536, .to = 65537, .every = 1, .error = EIO
	};
	struct test_stack stack;

	test_stack_open(&stack, STACK, "paused = true;");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(mirror->primary, 0, 2 << 20, 'r');
	fault_set(fault_find(mirror->primary), &bad);
	mirror_resume(&mirror->blk);
	while (mirror->dirty_count != 1)
		mirror_wait_change(&mirror->blk, reactor_now_ns() + 10 * NS_PER_MS);
	ck_assert_int_eq(mirror->phase, MIRROR_COPYING);
	ck_assert(list_empty(&mirror->writes.held));
	/* what a guest writes there heals it, in the end */
	fill_leg(&mirror->blk, 65536, 4096, 'w');
	fault_set(fault_find(mirror->primary), NULL);
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	test_stack_close(&stack);
}

/* The guest hears of it, and the legs are made equal all the same. */
suspends CO_TEST(test_primary_write_fails)
{
	struct fault_rules bad = { .ops = FAULT_WRITE, .countdown = 1, .error = EIO, .torn = true };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->primary), &bad);
	memset(buf, 'w', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 1000, buf, 100000, 0), -EIO);
	ck_assert_uint_gt(mirror->dirty_count, 0);
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	test_stack_close(&stack);
}

/* --- ends ------------------------------------------------------------------------------------- */

static suspends void write_once(void *arg)
{
	struct mirror *mirror = arg;

	ck_assert_int_eq(blk_write(&mirror->blk, 0, buf, 4096, 0), 0);
}

/* What takes the mirror's place serves on; the secondary is closed behind everybody's back, later. */
suspends CO_TEST(test_cancel_while_the_secondary_hangs)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;
	struct co_group group;

	test_stack_open(&stack, HOURS_STACK);

	struct mirror *mirror = mirror_of(&stack);
	struct blk *fault = fault_find(mirror->secondary);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault, &hangs);
	memset(buf, 'c', sizeof(buf));
	co_group_init(&group);
	co_group_start(&group, write_once, mirror);
	while (!mirror->leg->running.running)
		co_sleep_ns(0);
	mirror_cancel(&mirror->blk);
	co_group_wait(&group); /* the guest had to wait no longer */
	mirror_unlink(&mirror->blk, &stack.top);
	stack_close(&mirror->blk);
	ck_assert_uint_eq(stack.env.left_behind, 1);
	ck_assert(leg_holds(stack.top, 0, 4096, 'c'));
	fill_leg(stack.top, 0, 65536, 'd');
	answer_at_last(fault);
	test_stack_close(&stack);
}

/* Nothing is on its way, and it would hang in the last flush. */
suspends CO_TEST(test_cancel_with_a_last_flush_that_hangs)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;

	test_stack_open(&stack, HOURS_STACK);

	struct mirror *mirror = mirror_of(&stack);
	struct blk *fault = fault_find(mirror->secondary);

	fill_leg(&mirror->blk, 0, 65536, 'f');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault, &hangs);
	mirror_cancel(&mirror->blk);
	mirror_unlink(&mirror->blk, &stack.top);
	stack_close(&mirror->blk);
	ck_assert_uint_eq(stack.env.left_behind, 1);
	answer_at_last(fault);
	test_stack_close(&stack);
}

suspends CO_TEST(test_close_while_the_secondary_hangs)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);
	struct blk *fault = fault_find(mirror->secondary);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault, &hangs);
	write_once(mirror);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	stack_close(stack.top);
	stack.top = NULL;
	ck_assert_uint_eq(stack.env.left_behind, 1);
	answer_at_last(fault);
	test_stack_close(&stack);
}

/* A late write could undo a newer one. */
suspends CO_TEST(test_no_promotion_of_what_owes_answers)
{
	struct fault_rules hangs = { .hang_ops = FAULT_ALL };
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->secondary), &hangs);
	write_once(mirror);
	ck_assert_int_eq(promote(&mirror->blk, true, false, &err), -EAGAIN);
	ck_assert_msg(strstr(err.text, "has not answered 1 requests") != NULL, "%s", err.text);
	answer_at_last(fault_find(mirror->secondary));
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_int_eq(promote(&mirror->blk, false, false, &err), 0);
	mirror_unlink(&mirror->blk, &stack.top);
	stack_close(&mirror->blk);
	test_stack_close(&stack);
}

static suspends void promote_by_force(void *arg)
{
	struct mirror *mirror = arg;
	struct err err;

	if (promote(&mirror->blk, true, false, &err))
		ck_abort_msg("%s", err.text);
}

/* A write hangs in the primary, or its flush will: it is not left for a secondary that does not work. */
suspends CO_TEST(test_forced_promotion_when_both_legs_are_in_trouble)
{
	static const struct fault_rules troubles[] = {
		{ .ops = FAULT_FLUSH, .every = 1, .error = EIO }, { .hang_ops = FAULT_FLUSH }
	};

	for (size_t i = 0; i < 2 * ARRAY_LEN(troubles); i++) {
		struct fault_rules hangs = { .hang_ops = i / 2 ? FAULT_FLUSH : FAULT_WRITE };
		struct test_stack stack;
		struct co_group group;
		struct err err;

		test_stack_open(&stack, STACK, "");

		struct mirror *mirror = mirror_of(&stack);
		struct blk *primary = fault_find(mirror->primary);
		struct blk *secondary = fault_find(mirror->secondary);

		wait_phase(mirror, MIRROR_IN_SYNC);
		fault_set(primary, &hangs);
		fault_set(secondary, &troubles[i % 2]);
		memset(buf, 't', sizeof(buf));
		co_group_init(&group);
		co_group_start(&group, write_once, mirror);
		ck_assert_int_eq(promote(&mirror->blk, true, false, &err),
			troubles[i % 2].error ? -EIO : -ETIMEDOUT);
		ck_assert_msg(strstr(err.text, "the secondary cannot be flushed"), "%s", err.text);
		ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
		ck_assert(!mirror->primary_left);

		/* it works again: now the primary is left, and what waits for it is answered */
		answer_at_last(secondary);
		while (mirror->leg->given_up_count)
			co_sleep_ns(NS_PER_MS);
		co_group_start(&group, promote_by_force, mirror);
		while (!mirror->primary_left)
			co_sleep_ns(NS_PER_MS);
		answer_at_last(primary);
		co_group_wait(&group);
		ck_assert(mirror->promoted);
		mirror_unlink(&mirror->blk, &stack.top);
		stack_close(&mirror->blk);
		ck_assert(leg_holds(stack.top, 0, 4096, 't'));
		test_stack_close(&stack);
	}
}

/* Steps of the copy that waited for the promotion must not go on: the secondary is a disk in use then. */
suspends CO_TEST(test_forced_promotion_ends_the_copy)
{
	struct fault_rules slow = { .delay_ops = FAULT_WRITE, .delay_us = 20000 };
	struct test_stack stack;
	struct err err;

	test_stack_open(&stack, STACK, "paused = true;");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(mirror->primary, 0, 2 << 20, 'o');
	fill_leg(mirror->secondary, 0, 2 << 20, 'n');
	fault_set(fault_find(mirror->secondary), &slow);
	mirror->step_max = 65536;
	mirror_resume(&mirror->blk);
	while (!mirror->copied_bytes)
		mirror_wait_change(&mirror->blk, reactor_now_ns() + NS_PER_MS);
	ck_assert_int_eq(promote(&mirror->blk, true, false, &err), 0);

	uint64_t copied = mirror->copied_bytes;

	ck_assert_uint_lt(copied, 1 << 20);
	mirror_unlink(&mirror->blk, &stack.top);
	stack_close(&mirror->blk);
	ck_assert(leg_holds(stack.top, 1 << 20, 1 << 20, 'n'));
	test_stack_close(&stack);
}

static suspends void read_once(void *arg)
{
	struct mirror *mirror = arg;
	char content[4096];

	ck_assert_int_eq(blk_read(&mirror->blk, 0, content, sizeof(content)), 0);
	ck_assert_int_eq(content[4095], 'r');
}

/* The read is with the primary when that is replaced, and fails there afterwards. */
suspends CO_TEST(test_read_across_a_promotion)
{
	struct fault_rules bad = {
		.ops = FAULT_READ, .every = 1, .error = EIO, .hang_ops = FAULT_READ
	};
	struct test_stack stack;
	struct co_group group;
	struct err err;

	test_stack_open(&stack, STACK, "");

	struct mirror *mirror = mirror_of(&stack);
	struct blk *primary = mirror->primary;

	fill_leg(&mirror->blk, 0, 65536, 'r');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(primary), &bad);
	co_group_init(&group);
	co_group_start(&group, read_once, mirror);
	while (!primary->in_flight.running)
		co_sleep_ns(0);
	ck_assert_int_eq(promote(&mirror->blk, false, false, &err), 0);
	ck_assert_uint_eq(group.running, 1);
	mirror_unlink(&mirror->blk, &stack.top);
	fault_release(fault_find(primary));
	stack_close(&mirror->blk);
	ck_assert_uint_eq(group.running, 0);
	test_stack_close(&stack);
}

/* It lost its power after the write, and says so to the next flush only: it must not answer with old data. */
suspends CO_TEST(test_fallback_does_not_read_what_was_lost)
{
	struct fault_rules broken = { .ops = FAULT_FLUSH, .countdown = 1, .error = EIO };
	struct fault_rules bad = { .ops = FAULT_READ, .every = 1, .error = EIO };
	struct test_stack stack;

	test_stack_open(&stack, STACK, "on-error = 'stop';");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	memset(buf, 'n', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 8192, buf, 4096, 0), 0);
	fill_leg(mirror->secondary->below, 8192, 4096, 0);
	fault_set(fault_find(mirror->secondary), &broken);
	fault_set(fault_find(mirror->primary), &bad);
	ck_assert_int_eq(blk_read(&mirror->blk, 8192, buf, 4096), -EIO);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	fault_set(fault_find(mirror->primary), NULL);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("mirror_fail");
	TCase *tcase = tcase_create("mirror_fail");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_secondary_fails_at_every_phase);
	tcase_add_test(tcase, test_degraded_and_resynchronised);
	tcase_add_test(tcase, test_unflushed_writes_are_copied_again);
	tcase_add_test(tcase, test_hanging_secondary_does_not_hang_guests);
	tcase_add_test(tcase, test_hanging_copy_lets_guests_write);
	tcase_add_test(tcase, test_stop_waits_for_resume);
	tcase_add_test(tcase, test_primary_read_answered_by_secondary);
	tcase_add_test(tcase, test_unreadable_chunk);
	tcase_add_test(tcase, test_primary_write_fails);
	tcase_add_test(tcase, test_cancel_while_the_secondary_hangs);
	tcase_add_test(tcase, test_cancel_with_a_last_flush_that_hangs);
	tcase_add_test(tcase, test_close_while_the_secondary_hangs);
	tcase_add_test(tcase, test_no_promotion_of_what_owes_answers);
	tcase_add_test(tcase, test_forced_promotion_when_both_legs_are_in_trouble);
	tcase_add_test(tcase, test_forced_promotion_ends_the_copy);
	tcase_add_test(tcase, test_read_across_a_promotion);
	tcase_add_test(tcase, test_fallback_does_not_read_what_was_lost);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
