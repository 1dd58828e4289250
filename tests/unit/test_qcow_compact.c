/*
 * Compaction of a qcow image: the file shrinks to what is in use, the content stays, and qemu-img finds no
 * fault. Racing guests and power cuts are in test_qcow_model.c and test_qcow_crash.c.
 */
#include <errno.h>

#include "base/util.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/qcow.h"
#include "co_test.h"
#include "qcow_images.h"

#define DISK_SIZE (UINT64_C(64) << 20)
#define STEP      (UINT64_C(64) << 10)

static uint64_t file_size(const char *path)
{
	struct stat st;

	ck_assert_int_eq(stat(path, &st), 0);
	return (uint64_t)st.st_size;
}

static suspends void fill_and_thin(struct blk *disk)
{
	uint8_t *buf = malloc(STEP);

	for (uint64_t off = 0; off < DISK_SIZE; off += STEP) {
		memset(buf, (int)(off / STEP % 255 + 1), STEP);
		ck_assert_int_eq(blk_write(disk, off, buf, STEP, 0), 0);
	}
	for (uint64_t off = 0; off < DISK_SIZE; off += STEP)
		if (off / STEP % 8)
			ck_assert_int_eq(blk_discard(disk, off, STEP, 0), 0);
	ck_assert_int_eq(blk_flush(disk), 0);
	free(buf);
}

static suspends void check_content(struct blk *disk)
{
	uint8_t *buf = malloc(STEP), *expected = malloc(STEP);

	for (uint64_t off = 0; off < DISK_SIZE; off += STEP) {
		memset(expected, off / STEP % 8 ? 0 : (int)(off / STEP % 255 + 1), STEP);
		ck_assert_int_eq(blk_read(disk, off, buf, STEP), 0);
		ck_assert_msg(!memcmp(buf, expected, STEP), "the content at %llu is wrong",
			(unsigned long long)off);
	}
	free(buf);
	free(expected);
}

static suspends void compact_image(const char *options)
{
	struct test_stack stack;
	struct qcow_compact job = { 0 };
	struct err err;

	image_must("qemu-img create -q -f qcow2 -o %s image.qcow2 64M", options);
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2' } )");
	fill_and_thin(stack.top);
	ck_assert_msg(!qcow_compact(stack.top, &job, &err), "%s", err.text);
	ck_assert_uint_gt(job.size_before, DISK_SIZE);
	/* An eighth is in use, and some tables. */
	ck_assert_uint_lt(job.size_after, DISK_SIZE / 8 + DISK_SIZE / 16);
	check_content(stack.top);
	test_stack_close(&stack);
	ck_assert_uint_lt(file_size("image.qcow2"), DISK_SIZE / 8 + DISK_SIZE / 16);
	image_check("image.qcow2", false);
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2' } )");
	check_content(stack.top);
	test_stack_close(&stack);
}

CO_TEST(test_shrinks)
{
	compact_image("cluster_size=64k");
	compact_image("cluster_size=4k,refcount_bits=64");
	compact_image("cluster_size=1k");
	compact_image("extended_l2=on,cluster_size=64k");
}

static void cancel_soon(struct qcow_compact *job)
{
	job->cancelled = job->moved > 3;
}

/* The number of clusters in use, which is kept up to date, is what counting says. */
static suspends void check_used_clusters(struct qcow *q)
{
	uint64_t known = q->used_clusters;

	ck_assert_uint_eq(q->counted_to, UINT64_MAX);
	co_mutex_lock(&q->moving);
	q->counted_to = q->used_clusters = 0;
	ck_assert_int_eq(qcow_count_used(q), 0);
	co_mutex_unlock(&q->moving);
	ck_assert_uint_eq(q->used_clusters, known);
}

/* By itself, when nobody asks for anything; and not once more for what it left behind. */
static suspends void compact_by_itself(const char *after)
{
	struct test_stack stack;
	struct qcow *q;

	image_must("qemu-img create -q -f qcow2 image.qcow2 64M");
	test_stack_open(&stack,
		"( { layer = 'qcow'; compact-after = '%s'; compact-idle = 1; compact-rate = '1G' },"
		"  { layer = 'file'; path = 'image.qcow2' } )",
		after);
	q = qcow_of(stack.top);
	fill_and_thin(stack.top);
	ck_assert_uint_gt(file_size("image.qcow2"), DISK_SIZE);
	while (file_size("image.qcow2") > DISK_SIZE / 4 || q->compacting)
		co_sleep_ns(50 * NS_PER_MS);
	uint64_t runs = q->auto_compact.runs;
	check_used_clusters(q);
	check_content(stack.top);
	co_sleep_ns(2500 * NS_PER_MS);
	ck_assert_uint_eq(q->auto_compact.runs, runs);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

CO_TEST(test_by_itself)
{
	compact_by_itself("20%");
	compact_by_itself("8M");
}

CO_TEST(test_by_itself_refusals)
{
	static const char *const bad[] = { "0%", "100%", "5.5%", "%", "-1%", "much" };
	struct test_stack stack;
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		ck_assert_int_eq(test_stack_try(&stack, &err,
					 "( { layer = 'qcow'; compact-after = '%s' },"
					 "  { layer = 'null' } )",
					 bad[i]),
			-EINVAL);
		ck_assert_ptr_nonnull(strstr(err.text, "compact-after"));
		test_stack_close(&stack);
	}
}

CO_TEST(test_cancel)
{
	struct qcow_compact job = { .progress = cancel_soon };
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 image.qcow2 64M");
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2' } )");
	fill_and_thin(stack.top);
	ck_assert_int_eq(qcow_compact(stack.top, &job, &err), -ECANCELED);
	ck_assert_uint_gt(job.moved, 0);
	check_content(stack.top);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
}

CO_TEST(test_keeps_snapshots)
{
	struct qcow_compact job = { 0 };
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 image.qcow2 64M");
	image_must("qemu-io -c 'write -P 7 8M 16M' image.qcow2 >io.log");
	image_must("qemu-img snapshot -c kept image.qcow2");
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'image.qcow2' } )");
	fill_and_thin(stack.top);
	ck_assert_msg(!qcow_compact(stack.top, &job, &err), "%s", err.text);
	check_content(stack.top);
	test_stack_close(&stack);
	image_check("image.qcow2", false);
	image_must("qemu-img snapshot -a kept image.qcow2");
	image_must("qemu-io -c 'read -P 7 8M 16M' image.qcow2 | tee io.log | grep -qv failed");
}

int main(void)
{
	Suite *suite = suite_create("qcow compact");
	TCase *tcase = tcase_create("compact");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_shrinks);
	tcase_add_test(tcase, test_by_itself);
	tcase_add_test(tcase, test_by_itself_refusals);
	tcase_add_test(tcase, test_cancel);
	tcase_add_test(tcase, test_keeps_snapshots);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
