/*
 * Checks and snapshots of a qcow image in use: the disk's content, what a snapshot keeps, sizes that change, and
 * what happens when storing fails. Racing guests are in test_qcow_model.c, power cuts in test_qcow_crash.c.
 */
#include <errno.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"
#include "blk/qcow/qcow.h"
#include "co_test.h"
#include "qcow_images.h"

#define MIB (UINT64_C(1) << 20)

static suspends void fill(struct blk *disk, uint64_t off, uint64_t len, int pattern)
{
	uint8_t *buf = malloc(len);

	memset(buf, pattern, len);
	ck_assert_int_eq(blk_write(disk, off, buf, len, 0), 0);
	free(buf);
}

static suspends void expect(struct blk *disk, uint64_t off, uint64_t len, int pattern)
{
	uint8_t *buf = malloc(len);

	ck_assert_int_eq(blk_read(disk, off, buf, len), 0);
	for (uint64_t i = 0; i < len; i++)
		if (buf[i] != pattern)
			ck_abort_msg("byte %llu is %d instead of %d", (unsigned long long)(off + i),
				buf[i], pattern);
	free(buf);
}

#define must_change(disk, change, name)                                                          \
	do {                                                                                     \
		struct err change_err_;                                                          \
		ck_assert_msg(!qcow_live_snapshot((disk), (change), (name), &change_err_), "%s", \
			change_err_.text);                                                       \
	} while (0)

static suspends void expect_sound(struct blk *disk)
{
	struct qcow_check_result result;
	struct err err;

	ck_assert_msg(!qcow_live_check(disk, NULL, &result, &err), "%s", err.text);
	ck_assert_uint_eq(result.corruptions, 0);
	ck_assert_uint_eq(result.errors, 0);
	ck_assert_uint_eq(result.leaks, 0);
}

static suspends unsigned count_snapshots(struct blk *disk)
{
	struct qcow_snapshots list;
	struct err err;

	ck_assert_msg(!qcow_live_snapshots(disk, &list, &err), "%s", err.text);
	unsigned count = list.count;
	qcow_snapshots_fini(&list);
	return count;
}

#define open_image(stack)                                                                          \
	test_stack_open((stack), "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2' } " \
				 ")")

/* The layer has more options: its backing. */
#define open_image_over(stack, backing) \
	test_stack_open((stack),        \
		"( { layer = 'qcow'; %s }, { layer = 'file'; path = 'image.qcow2' } )", (backing))

/* --- snapshots -------------------------------------------------------------------------------- */

static suspends void life_of_snapshots(const char *options)
{
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 -o %s image.qcow2 16M", options);
	open_image(&stack);
	fill(stack.top, 0, 4 * MIB, 1);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "one");
	fill(stack.top, MIB + 1000, 2 * MIB, 2);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "two");
	fill(stack.top, 5 * MIB, MIB, 3);
	ck_assert_int_eq(blk_discard(stack.top, 0, MIB, 0), 0);
	ck_assert_uint_eq(count_snapshots(stack.top), 2);
	expect_sound(stack.top);
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "one");
	expect(stack.top, 0, 4 * MIB, 1);
	expect(stack.top, 5 * MIB, MIB, 0);
	fill(stack.top, 2 * MIB, MIB, 4);
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "two");
	expect(stack.top, 0, MIB, 1);
	expect(stack.top, MIB + 1000, 2 * MIB, 2);
	must_change(stack.top, QCOW_SNAPSHOT_DELETE, "one");
	fill(stack.top, 0, MIB, 5);
	expect_sound(stack.top);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
	image_must("qemu-img snapshot -a two image.qcow2");
	open_image(&stack);
	expect(stack.top, 0, MIB, 1);
	expect(stack.top, 3 * MIB + 1000, MIB - 1000, 1);
	must_change(stack.top, QCOW_SNAPSHOT_DELETE, "two");
	ck_assert_uint_eq(count_snapshots(stack.top), 0);
	expect(stack.top, MIB + 1000, 2 * MIB, 2);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

CO_TEST(test_life)
{
	life_of_snapshots("cluster_size=64k");
	life_of_snapshots("compat=0.10,cluster_size=4k");
	life_of_snapshots("extended_l2=on,cluster_size=32k");
	life_of_snapshots("cluster_size=512,refcount_bits=64");
}

/* What a snapshot leaves is given back to the file system, or kept where that is not wanted. */
CO_TEST(test_snapshots_discard_as_told)
{
	for (int discards = 0; discards < 2; discards++) {
		struct test_stack stack;

		image_must("qemu-img create -q -f qcow2 image.qcow2 8M");
		open_image_over(&stack, discards ? "" : "discard = false;");
		for (int i = 1; i <= 3; i++) {
			fill(stack.top, 0, MIB, i);
			must_change(stack.top, QCOW_SNAPSHOT_CREATE,
				i == 1   ? "one"
				: i == 2 ? "two"
					 : "three");
		}
		must_change(stack.top, QCOW_SNAPSHOT_APPLY, "two");
		must_change(stack.top, QCOW_SNAPSHOT_DELETE, "one");
		must_change(stack.top, QCOW_SNAPSHOT_DELETE, "three");

		const struct blk *file = stack.top->below;

		ck_assert(file->counters.requests[BLK_COUNT_DISCARD] ? discards : !discards);
		expect(stack.top, 0, MIB, 2);
		expect_sound(stack.top);
		test_stack_close(&stack);
	}
}

/* Two snapshots and the disk share all: no more than three references, which two bits can count, at any time. */
CO_TEST(test_narrow_counts)
{
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 -o refcount_bits=2 image.qcow2 16M");
	open_image(&stack);
	fill(stack.top, 0, 4 * MIB, 1);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "one");
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "two");
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "one");
	fill(stack.top, 0, MIB, 2);
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "two");
	expect(stack.top, 0, 4 * MIB, 1);
	expect_sound(stack.top);
	test_stack_close(&stack);
}

/* The L1 table shrinks and grows with the disk; what lies beyond must not be looked at. */
CO_TEST(test_other_size)
{
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 -o cluster_size=4k image.qcow2 8M");
	open_image(&stack);
	fill(stack.top, 6 * MIB, 2 * MIB, 1);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "small");
	ck_assert_msg(!blk_resize(stack.top, 100 * MIB, 0, &err), "%s", err.text);
	fill(stack.top, 90 * MIB, 10 * MIB, 2);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "large");
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "small");
	ck_assert_uint_eq(blk_caps(stack.top)->size, 8 * MIB);
	expect(stack.top, 6 * MIB, 2 * MIB, 1);
	fill(stack.top, 0, 8 * MIB, 3);
	must_change(stack.top, QCOW_SNAPSHOT_APPLY, "large");
	ck_assert_uint_eq(blk_caps(stack.top)->size, 100 * MIB);
	expect(stack.top, 90 * MIB, 10 * MIB, 2);
	expect(stack.top, 6 * MIB, 2 * MIB, 1);
	expect_sound(stack.top);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

/* qemu-img ends a new image's file inside the cluster of the L1 table: entries beyond are zeroes not there yet. */
CO_TEST(test_grow_new_image)
{
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 image.qcow2 8M");
	open_image(&stack);
	ck_assert_msg(!blk_resize(stack.top, 4096 * MIB, 0, &err), "%s", err.text);
	fill(stack.top, 4000 * MIB, MIB, 1);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
	open_image(&stack);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 4096 * MIB);
	expect(stack.top, 4000 * MIB, MIB, 1);
	test_stack_close(&stack);
}

/* QEMU does not clear the rest of the last cluster when it makes an image smaller. */
static suspends void grow_after_qemu(const char *options, const char *backing)
{
	const uint64_t cut_size = MIB - 24 * 1024 - 512;
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 %s image.qcow2 1M", options);
	open_image_over(&stack, backing);
	fill(stack.top, 0, MIB, 1);
	test_stack_close(&stack);
	image_must("qemu-img resize -q --shrink image.qcow2 %llu", (unsigned long long)cut_size);
	open_image_over(&stack, backing);
	ck_assert_msg(!blk_resize(stack.top, cut_size + 512, 0, &err), "%s", err.text);
	ck_assert_msg(!blk_resize(stack.top, 2 * MIB, 0, &err), "%s", err.text);
	expect(stack.top, 0, cut_size, 1);
	expect(stack.top, cut_size, 2 * MIB - cut_size, 0);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

CO_TEST(test_what_is_added_is_zero)
{
	grow_after_qemu("", "");
	grow_after_qemu("-o extended_l2=on", "");
	grow_after_qemu("-o compat=0.10", "");
	image_must("qemu-img create -q -f raw base.img 512K");
	grow_after_qemu("-o compat=0.10,backing_file=base.img,backing_fmt=raw",
		"backing = ( { layer = 'file'; path = 'base.img' } )");
}

/* Whoever is told that it is not fast may leave it at that, and relies on nothing having changed. */
CO_TEST(test_fast_zero_or_nothing)
{
	const unsigned flags = BLK_FAST_ZERO | BLK_NO_HOLE;
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 image.qcow2 1M");
	open_image(&stack);
	fill(stack.top, 0, MIB / 2, 1);
	ck_assert_int_eq(blk_zero(stack.top, 0, MIB, flags), -EOPNOTSUPP);
	ck_assert_int_eq(blk_zero(stack.top, 100, MIB - 100, flags), -EOPNOTSUPP);
	expect(stack.top, 0, MIB / 2, 1);
	ck_assert_int_eq(blk_zero(stack.top, 0, MIB, BLK_NO_HOLE), 0);
	expect(stack.top, 0, MIB, 0);
	fill(stack.top, 0, MIB / 2, 1);
	ck_assert_int_eq(blk_zero(stack.top, 100, MIB - 100, BLK_FAST_ZERO), 0);
	expect(stack.top, 0, 100, 1);
	expect(stack.top, 100, MIB - 100, 0);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

CO_TEST(test_refusals)
{
	struct qcow_check_result result;
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 image.qcow2 8M");
	open_image(&stack);
	must_change(stack.top, QCOW_SNAPSHOT_CREATE, "one");
	ck_assert_int_eq(qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_CREATE, "one", &err), -EEXIST);
	ck_assert_int_eq(qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_APPLY, "none", &err), -ENOENT);
	ck_assert_int_eq(
		qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_DELETE, "none", &err), -ENOENT);
	ck_assert_int_eq(qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_CREATE, "", &err), -EINVAL);
	fill(stack.top, 0, MIB, 1);
	expect_sound(stack.top);
	test_stack_close(&stack);
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2'; "
				"read-only = true } )");
	ck_assert_int_eq(qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_CREATE, "two", &err), -EROFS);
	ck_assert_msg(!qcow_live_check(stack.top, NULL, &result, &err), "%s", err.text);
	ck_assert_uint_eq(count_snapshots(stack.top), 1);
	test_stack_close(&stack);
}

/* The nth request below fails: the disk goes on with what it was, or says why it cannot. False: nothing failed. */
static suspends bool one_fails(unsigned nth, const char *ops)
{
	struct test_stack stack;
	struct err err;
	uint8_t byte = 2;

	image_must("cp filled.qcow2 image.qcow2");
	int ret = test_stack_try(&stack, &err,
		"( { layer = 'qcow' }, { layer = 'fault'; ops = '%s'; countdown = %u; },"
		"  { layer = 'file'; path = 'image.qcow2' } )",
		ops, nth);
	bool opened = !ret;

	if (opened)
		ret = qcow_live_snapshot(stack.top, QCOW_SNAPSHOT_CREATE, "one", &err);
	if (opened && ret && !strstr(err.text, "the disk is gone")) {
		expect(stack.top, 0, 4 * MIB, 1);
		if (!blk_write(stack.top, 8 * MIB, &byte, 1, 0))
			expect(stack.top, 8 * MIB + 1, MIB, 0);
	}
	if (opened && ret && strstr(err.text, "the disk is gone"))
		ck_assert_int_eq(blk_read(stack.top, 0, &byte, 1), -ESHUTDOWN);
	test_stack_close(&stack);
	image_check("image.qcow2", true);
	return ret;
}

CO_TEST(test_failing_storage)
{
	static const char *const kinds[] = { "write", "flush", "read" };
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 -o cluster_size=4k filled.qcow2 16M");
	test_stack_open(
		&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'filled.qcow2' } )");
	fill(stack.top, 0, 4 * MIB, 1);
	test_stack_close(&stack);
	for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
		unsigned nth = 1;

		while (one_fails(nth, kinds[i]))
			nth++;
		ck_assert_uint_gt(nth, 2);
	}
}

/* --- compaction and the rest ------------------------------------------------------------------ */

static char noticed[300];

static void note_it(const struct blk *blk, const char *text)
{
	snprintf(noticed, sizeof(noticed), "%s", text);
}

static const char *text_in(json_t *status, const char *key)
{
	return json_string_value(json_object_get(status, key));
}

/* The commit timer's flush fails, of which no guest hears: the next flush must not succeed. */
CO_TEST(test_a_failed_flush_is_told)
{
	struct fault_rules once = { .ops = FAULT_FLUSH, .countdown = 1, .error = EIO };
	struct test_stack stack;
	uint8_t byte = 3;

	image_must("qemu-img create -q -f qcow2 image.qcow2 8M");
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'fault' }, "
				"{ layer = 'file'; path = 'image.qcow2' } )");
	fill(stack.top, 0, MIB, 1);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	fill(stack.top, MIB, MIB, 2);
	stack.env.notice = note_it;
	fault_set(fault_find(stack.top), &once);

	json_t *before = blk_status(stack.top);

	ck_assert_ptr_null(text_in(before, "frozen"));
	json_decref(before);
	ck_assert_int_eq(qcow_commit(qcow_of(stack.top)), -EIO);
	ck_assert_msg(strstr(noticed, "add it again"), "%s", noticed);

	json_t *after = blk_status(stack.top);

	ck_assert_str_eq(text_in(after, "frozen"),
		"a flush failed (Input/output error): nothing is allocated, and no flush succeeds, "
		"until the image is opened anew");
	json_decref(after);
	ck_assert_int_eq(blk_flush(stack.top), -EIO);
	ck_assert_int_eq(blk_flush(stack.top), -EIO);
	ck_assert_int_eq(blk_write(stack.top, 4 * MIB, &byte, 1, 0), -EIO);
	expect(stack.top, 0, MIB, 1);
	expect(stack.top, MIB, MIB, 2);
	test_stack_close(&stack);
	image_check("image.qcow2", true);
	open_image(&stack);
	expect(stack.top, 0, MIB, 1);
	fill(stack.top, 4 * MIB, MIB, 3);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	test_stack_close(&stack);
}

static uint64_t entry_on_disk(uint64_t table_off, uint64_t index)
{
	int fd = open("image.qcow2", O_RDONLY | O_CLOEXEC);
	be64 entry;

	ck_assert_int_eq(pread(fd, &entry, sizeof(entry), (off_t)(table_off + index * 8)), 8);
	close(fd);
	return be64_get(entry);
}

/*
 * A commit fails amid the L1 table: of two parts one is on the disk, and leads to an L2 table. What comes into that
 * table afterwards waits for the flush of what it points to, as in any other table.
 */
CO_TEST(test_order_after_half_a_commit)
{
	struct fault_rules rules = { .ops = FAULT_WRITE, .countdown = 1, .error = EIO };
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 -o cluster_size=512 image.qcow2 8M");
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'fault' }, "
				"{ layer = 'file'; path = 'image.qcow2' } )");

	struct qcow *q = qcow_of(stack.top);
	struct blk *fault = fault_find(stack.top);
	uint64_t l1_off = q->header.l1_off, l2_off;

	fill(stack.top, 0, 512, 1);
	fill(stack.top, 4 * MIB, 512, 1);
	rules.from = l1_off + 1024;
	rules.to = l1_off + 1536;
	fault_set(fault, &rules);
	ck_assert_int_eq(qcow_commit(q), -EIO);
	ck_assert_uint_eq(fault_failed(fault), 1);
	l2_off = entry_on_disk(l1_off, 0) & QCOW_ENTRY_OFF_MASK;
	ck_assert_uint_ne(l2_off, 0);

	fill(stack.top, 512, 512, 2);
	rules = (struct fault_rules){ .ops = FAULT_FLUSH, .countdown = 1, .error = EIO };
	fault_set(fault, &rules);
	ck_assert_int_eq(qcow_commit(q), -EIO);
	ck_assert_uint_eq(entry_on_disk(l2_off, 1), 0);
	test_stack_close(&stack);
	image_check("image.qcow2", true);
}

struct resizer {
	struct blk *disk;
	int rounds;
	struct co_group group;
};

static suspends void resize_again_and_again(void *arg)
{
	struct resizer *resizer = arg;
	struct err err;

	for (int i = 0; i < resizer->rounds; i++) {
		uint64_t size = (i % 2 ? 24 : 300) * MIB;

		ck_assert_msg(!blk_resize(resizer->disk, size, BLK_FORCE, &err), "%s", err.text);
		must_change(resizer->disk, QCOW_SNAPSHOT_CREATE, "passing");
		expect_sound(resizer->disk);
		must_change(resizer->disk, QCOW_SNAPSHOT_DELETE, "passing");
		co_yield ();
	}
}

/* Resizes move the L1 table, snapshots change what is ours, all while clusters are moved. */
CO_TEST(test_compaction_meets_others)
{
	struct resizer resizer = { .rounds = 12 };
	struct qcow_compact job = { 0 };
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 -o cluster_size=4k image.qcow2 24M");
	open_image(&stack);
	fill(stack.top, 0, 16 * MIB, 1);
	fill(stack.top, 16 * MIB, 8 * MIB, 2);
	ck_assert_int_eq(blk_discard(stack.top, 0, 16 * MIB, 0), 0);
	resizer.disk = stack.top;
	co_group_init(&resizer.group);
	co_group_start(&resizer.group, resize_again_and_again, &resizer);
	ck_assert_msg(!qcow_compact(stack.top, &job, &err), "%s", err.text);
	co_group_wait(&resizer.group);
	expect(stack.top, 0, 16 * MIB, 0);
	expect(stack.top, 16 * MIB, 8 * MIB, 2);
	expect_sound(stack.top);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

static suspends void compact_slowly(void *arg)
{
	struct resizer *resizer = arg;
	struct qcow_compact job = { .rate_bytes_s = 1 };
	struct err err;

	ck_assert_int_eq(qcow_compact(resizer->disk, &job, &err), -ECANCELED);
}

/* At a byte per second the next step would be due in hours. */
CO_TEST(test_cancel_does_not_wait_for_the_rate)
{
	struct resizer resizer = { 0 };
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 image.qcow2 24M");
	open_image(&stack);
	fill(stack.top, 0, 24 * MIB, 1);
	ck_assert_int_eq(blk_discard(stack.top, 0, 16 * MIB, 0), 0);
	resizer.disk = stack.top;
	co_group_init(&resizer.group);
	ck_assert_ptr_null(qcow_compaction(stack.top));
	co_group_start(&resizer.group, compact_slowly, &resizer);
	while (!qcow_compaction(stack.top) || !qcow_compaction(stack.top)->moved)
		co_sleep_ns(NS_PER_MS);
	qcow_compaction(stack.top)->cancelled = true;
	co_group_wait(&resizer.group);
	expect(stack.top, 16 * MIB, 8 * MIB, 1);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

int main(void)
{
	Suite *suite = suite_create("qcow live");
	TCase *tcase = tcase_create("live");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_life);
	tcase_add_test(tcase, test_snapshots_discard_as_told);
	tcase_add_test(tcase, test_narrow_counts);
	tcase_add_test(tcase, test_other_size);
	tcase_add_test(tcase, test_grow_new_image);
	tcase_add_test(tcase, test_what_is_added_is_zero);
	tcase_add_test(tcase, test_fast_zero_or_nothing);
	tcase_add_test(tcase, test_refusals);
	tcase_add_test(tcase, test_failing_storage);
	tcase_add_test(tcase, test_a_failed_flush_is_told);
	tcase_add_test(tcase, test_order_after_half_a_commit);
	tcase_add_test(tcase, test_compaction_meets_others);
	tcase_add_test(tcase, test_cancel_does_not_wait_for_the_rate);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
