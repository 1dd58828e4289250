/*
 * The qcow layer against an oracle in memory: random reads, writes, zeroes, discards, flushes, resizes and
 * reopens, several at a time, on images of every kind that qemu-img makes. Afterwards qemu-img must
 * find no fault with the image and read the same bytes out of it.
 *
 * Overlapping requests are serialized by a range lock of the test's own, so that the oracle is exact;
 * neighbours in one cluster still race. The seed is printed.
 */
#include <errno.h>

#include "base/util.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define DISK_SIZE  (UINT64_C(8) << 20)
#define DISK_MAX   (UINT64_C(12) << 20)
#define WORKERS    8
#define OPERATIONS 100 /* per worker and round */

struct model {
	struct test_stack stack;
	struct seed seed;
	uint8_t *content;
	uint64_t size;
	struct range_lock busy;
	struct co_group workers;
	const struct image_kind *kind;
};

static void fill_random(void *arg, uint8_t *buf, size_t len)
{
	seed_fill(arg, buf, len);
}

static suspends void open_image(struct model *model)
{
	test_stack_open(&model->stack, "( %s, { layer = 'file'; path = 'image.qcow2' } )",
		image_layer(model->kind));
	ck_assert_uint_eq(blk_caps(model->stack.top)->size, model->size);
}

/* Short ones most of the time, of any alignment or of whole sectors; seldom long ones. */
static void choose_range(struct model *model, uint64_t *off, uint64_t *len)
{
	uint64_t longest = seed_below(&model->seed, 8) ? 8192 : 300000;

	*len = 1 + seed_below(&model->seed, MIN(longest, model->size));
	*off = seed_below(&model->seed, model->size - *len + 1);
	if (seed_below(&model->seed, 2)) {
		*off = round_down(*off, 512);
		*len = MIN(round_up(*len, 512), model->size - *off);
	}
}

static suspends void compare(struct model *model, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);

	ck_assert_int_eq(blk_read(model->stack.top, off, buf, len), 0);
	for (uint64_t i = 0; i < len; i++)
		if (buf[i] != model->content[off + i])
			ck_abort_msg("byte %llu is %#x instead of %#x",
				(unsigned long long)(off + i), buf[i], model->content[off + i]);
	free(buf);
}

static suspends void write_random(struct model *model, uint64_t off, uint64_t len, unsigned flags)
{
	uint8_t *buf = malloc(len);

	seed_fill(&model->seed, buf, len);
	ck_assert_int_eq(blk_write(model->stack.top, off, buf, len, flags), 0);
	memcpy(model->content + off, buf, len);
	free(buf);
}

/* An extent that says zero must be zero, whatever else it says. */
static suspends void check_extents(struct model *model, uint64_t off, uint64_t len)
{
	struct blk_extent list[32];
	struct blk_extents extents;

	blk_extents_init(&extents, list, 32);
	ck_assert_int_eq(blk_extents(model->stack.top, off, len, &extents), 0);
	ck_assert_uint_ge(extents.count, 1);
	for (unsigned i = 0; i < extents.count; off += list[i++].len)
		for (uint64_t at = off; list[i].flags & BLK_EXTENT_ZERO && at < off + list[i].len;
			at++)
			ck_assert_msg(!model->content[at], "byte %llu is in a zero extent",
				(unsigned long long)at);
}

static suspends void one_operation(struct model *model)
{
	struct blk *top = model->stack.top;
	unsigned what = (unsigned)seed_below(&model->seed, 100);
	unsigned fua = seed_below(&model->seed, 10) ? 0 : BLK_FUA;
	struct range range;
	uint64_t off, len;

	choose_range(model, &off, &len);
	range_lock_acquire(&model->busy, &range, off, len, true);
	if (what < 30) {
		compare(model, off, len);
	} else if (what < 70) {
		write_random(model, off, len, fua);
	} else if (what < 80) {
		unsigned flags = seed_below(&model->seed, 3) ? 0 : BLK_NO_HOLE;

		ck_assert_int_eq(blk_zero(top, off, len, flags | fua), 0);
		memset(model->content + off, 0, len);
	} else if (what < 92) {
		ck_assert_int_eq(blk_discard(top, off, len, fua), 0);
		memset(model->content + off, 0, len);
	} else if (what < 96) {
		check_extents(model, off, len);
	} else {
		ck_assert_int_eq(blk_flush(top), 0);
	}
	range_lock_release(&model->busy, &range);
}

static suspends void worker(void *arg)
{
	struct model *model = arg;

	for (int i = 0; i < OPERATIONS; i++) {
		one_operation(model);
		if (!seed_below(&model->seed, 4))
			co_yield ();
	}
}

/* Compacts while the workers work; a cancel half-way is as good. */
static suspends void compactor(void *arg)
{
	struct model *model = arg;
	struct qcow_compact job = { 0 };
	struct err err;

	for (int i = 0; i < 20; i++)
		co_yield ();
	ck_assert_msg(!qcow_compact(model->stack.top, &job, &err), "%s", err.text);
	ck_assert_uint_eq(job.done, job.total);
}

/* Takes a snapshot of the disk in use, and drops it again; the image is sound at any time. */
static suspends void snapshotter(void *arg)
{
	struct model *model = arg;
	struct qcow_check_result result;
	struct err err;
	int ret = 0;

	for (int i = 0; !ret && i < 3; i++) {
		for (int yields = 30; yields; yields--)
			co_yield ();
		ret = qcow_live_snapshot(model->stack.top, QCOW_SNAPSHOT_CREATE, "live", &err);
		/* Counts of one bit have no room for a second user. */
		ck_assert_msg(!ret || !strcmp(model->kind->name, "refcount-1"), "%s", err.text);
		ck_assert_msg(
			!qcow_live_check(model->stack.top, NULL, &result, &err), "%s", err.text);
		ck_assert_uint_eq(result.corruptions + result.errors + result.leaks, 0);
		for (int yields = 30; yields; yields--)
			co_yield ();
		if (!ret)
			ck_assert_msg(!qcow_live_snapshot(
					      model->stack.top, QCOW_SNAPSHOT_DELETE, "live", &err),
				"%s", err.text);
	}
}

/* Grows or shrinks; what comes back after a shrink is zeroes. */
static suspends void resize(struct model *model)
{
	uint64_t size = round_up(1 + seed_below(&model->seed, DISK_MAX - 1), 512);
	struct err err;
	int ret = blk_resize(model->stack.top, size, BLK_FORCE, &err);

	if (ret == -ENOTSUP && model->kind->backing_size)
		return; /* version 2 cannot hide a backing, and says so */
	ck_assert_msg(!ret, "%s", err.text);
	if (size < model->size)
		memset(model->content + size, 0, model->size - size);
	model->size = size;
	ck_assert_uint_eq(blk_caps(model->stack.top)->size, size);
}

static suspends void compare_all(struct model *model)
{
	for (uint64_t off = 0, step; off < model->size; off += step) {
		step = MIN(model->size - off, UINT64_C(1) << 20);
		compare(model, off, step);
	}
}

static void run_kind(const struct image_kind *kind, struct seed *seed)
{
	struct model model = { .kind = kind, .size = DISK_SIZE, .seed = *seed };

	printf("  %s\n", kind->name);
	fflush(stdout);
	model.content = calloc(1, DISK_MAX);
	image_make(kind, "image.qcow2", model.content, DISK_SIZE, fill_random, &model.seed);
	range_lock_init(&model.busy);
	co_group_init(&model.workers);
	for (int round = 0; round < 3; round++) {
		open_image(&model);
		for (int i = 0; i < WORKERS; i++)
			co_group_start(&model.workers, worker, &model);
		if (round)
			co_group_start(&model.workers, compactor, &model);
		co_group_start(&model.workers, snapshotter, &model);
		co_group_wait(&model.workers);
		if (round)
			resize(&model);
		compare_all(&model);
		test_stack_close(&model.stack);
		image_check("image.qcow2", false);
	}
	image_must("qemu-img convert -f qcow2 -O raw image.qcow2 out.img");
	image_write_file("oracle.img", model.content, model.size);
	image_must("cmp out.img oracle.img");
	if (kind->snapshot) {
		image_must("qemu-img snapshot -a first image.qcow2");
		image_must("qemu-img compare -q -f qcow2 -F raw image.qcow2 seed.img");
	}
	free(model.content);
	*seed = model.seed;
}

CO_TEST(test_all_kinds)
{
	const char *only = getenv("KIND");
	struct seed seed = seed_start("qcow model");

	for (size_t i = 0; i < IMAGE_KINDS; i++)
		if (!only || !strcmp(only, image_kinds[i].name))
			run_kind(&image_kinds[i], &seed);
}

int main(void)
{
	Suite *suite = suite_create("qcow model");
	TCase *tcase = tcase_create("model");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_all_kinds);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
