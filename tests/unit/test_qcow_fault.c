/*
 * The qcow layer over a file that fails now and then: any operation below may answer EIO or ENOSPC. The
 * request that it hits gets an error; whatever succeeded stays true; when the file works again,
 * everything works again; and the image is sound in the end (leaks are allowed).
 *
 * Sizes change, snapshots come and go and clusters are moved meanwhile. When not even the header can be stored, or
 * a flush failed, the layer changes no table from then on: then the image is sound, and no more is asked for.
 *
 * What a failed request left behind is unknown until it is written again: old or new, byte by byte. The
 * seed is printed.
 */
#include <errno.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"
#include "blk/qcow/qcow.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define DISK_SIZE  (UINT64_C(4) << 20)
#define WORKERS    4
#define OPERATIONS 40 /* per worker and round */
#define ROUNDS     5

struct trial {
	struct test_stack stack;
	struct seed seed;
	const struct image_kind *kind;
	bool data_file; /* which fails, too */
	uint8_t *content;
	bool *unknown; /* per byte */
	struct range_lock busy;
	struct co_group workers;
	unsigned failed;
	bool flushes_fail, frozen;
};

static void fill_random(void *arg, uint8_t *buf, size_t len)
{
	seed_fill(arg, buf, len);
}

static bool expected_error(int ret)
{
	return ret == -EIO || ret == -ENOSPC || ret == -ESHUTDOWN; /* the last one: tables lost */
}

static void wrote(struct trial *trial, int ret, uint64_t off, uint64_t len, const uint8_t *new)
{
	ck_assert_msg(!ret || expected_error(ret), "a write fails with %d", ret);
	trial->failed += ret != 0;
	if (!ret && new)
		memcpy(trial->content + off, new, len);
	else if (!ret)
		memset(trial->content + off, 0, len);
	memset(trial->unknown + off, ret != 0, len);
}

static suspends void write_some(struct trial *trial, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);

	seed_fill(&trial->seed, buf, len);
	wrote(trial, blk_write(trial->stack.top, off, buf, len, 0), off, len, buf);
	free(buf);
}

static suspends void read_some(struct trial *trial, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);
	int ret = blk_read(trial->stack.top, off, buf, len);

	ck_assert_msg(!ret || expected_error(ret), "a read fails with %d", ret);
	for (uint64_t i = 0; !ret && i < len; i++)
		if (!trial->unknown[off + i] && buf[i] != trial->content[off + i])
			ck_abort_msg("%s: byte %llu is %#x instead of %#x", trial->kind->name,
				(unsigned long long)(off + i), buf[i], trial->content[off + i]);
	trial->failed += ret != 0;
	free(buf);
}

static suspends void worker(void *arg)
{
	struct trial *trial = arg;

	for (int i = 0; i < OPERATIONS; i++) {
		uint64_t len = 1 + seed_below(&trial->seed,
					   seed_below(&trial->seed, 6) ? 9000 : 200000);
		uint64_t off = seed_below(&trial->seed, DISK_SIZE - len);
		unsigned what = (unsigned)seed_below(&trial->seed, 20);
		struct range range;

		range_lock_acquire(&trial->busy, &range, off, len, true);
		if (what < 5)
			read_some(trial, off, len);
		else if (what < 13)
			write_some(trial, off, len);
		else if (what < 15)
			wrote(trial, blk_zero(trial->stack.top, off, len, 0), off, len, NULL);
		else if (what < 18)
			wrote(trial, blk_discard(trial->stack.top, off, len, 0), off, len, NULL);
		else
			trial->failed += blk_flush(trial->stack.top) != 0;
		range_lock_release(&trial->busy, &range);
		if (!seed_below(&trial->seed, 3))
			co_yield ();
	}
}

/* All of what replaces tables. It fails as the rest does, or because the last attempt failed. */
static suspends void rearrange(void *arg)
{
	struct trial *trial = arg;
	struct blk *top = trial->stack.top;
	struct err err;

	for (int i = 0; i < OPERATIONS / 4; i++) {
		uint64_t size = DISK_SIZE + (seed_below(&trial->seed, 64) << 20);
		struct qcow_compact job = { 0 };

		trial->failed += blk_resize(top, size, BLK_FORCE, &err) != 0;
		trial->failed += qcow_live_snapshot(top, QCOW_SNAPSHOT_CREATE, "s", &err) != 0;
		trial->failed += qcow_compact(top, &job, &err) != 0;
		trial->failed += qcow_live_snapshot(top, QCOW_SNAPSHOT_DELETE, "s", &err) != 0;
	}
}

/* Faults for a round: each kind of operation, often or seldom; the last round has none. */
static void choose_faults(struct trial *trial, int round)
{
	struct fault_rules rules = { .ops = FAULT_WRITE | FAULT_ZERO | FAULT_RESIZE,
		.error = seed_below(&trial->seed, 2) ? EIO : ENOSPC,
		.permille = 1 + (unsigned)seed_below(&trial->seed, 150),
		.torn = seed_below(&trial->seed, 2),
		.delay_ops = FAULT_WRITE,
		.delay_random_us = seed_below(&trial->seed, 2) * 100 };

	if (seed_below(&trial->seed, 3) == 0)
		rules.ops |= FAULT_READ;
	if (trial->flushes_fail) /* the first of them freezes it */
		rules.ops |= FAULT_FLUSH;
	if (round % 2) /* seldom twice in a row: else the first thing that fails freezes it */
		rules.permille = 1 + rules.permille / 20;
	fault_set(fault_find(trial->stack.top), round == ROUNDS - 1 ? NULL : &rules);
	if (trial->data_file)
		fault_set(fault_find(qcow_of(trial->stack.top)->data),
			round == ROUNDS - 1 ? NULL : &rules);
}

/* Whatever failed: how many clusters are in use is known exactly, once it is. */
static suspends void check_used_clusters(struct qcow *q)
{
	uint64_t known = q->used_clusters;

	if (q->counted_to != UINT64_MAX)
		return;
	co_mutex_lock(&q->moving);
	q->counted_to = q->used_clusters = 0;
	ck_assert_int_eq(qcow_count_used(q), 0);
	co_mutex_unlock(&q->moving);
	ck_assert_uint_eq(q->used_clusters, known);
}

static suspends void run_trial(struct trial *trial)
{
	test_stack_open(&trial->stack,
		"( %s, { layer = 'fault'; seed = %d }, { layer = 'file'; path = 'image.qcow2' } )",
		image_layer(trial->kind), (int)seed_below(&trial->seed, 1 << 30));
	range_lock_init(&trial->busy);
	co_group_init(&trial->workers);
	for (int round = 0; round < ROUNDS; round++) {
		choose_faults(trial, round);
		for (int i = 0; i < WORKERS; i++)
			co_group_start(&trial->workers, worker, trial);
		if (round % 2)
			co_group_start(&trial->workers, rearrange, trial);
		co_group_wait(&trial->workers);
	}
	ck_assert_uint_gt(trial->failed, 0);
	trial->frozen = qcow_of(trial->stack.top)->frozen;
	ck_assert(trial->frozen || !qcow_of(trial->stack.top)->corrupt);
	if (!trial->frozen) {
		ck_assert_int_eq(blk_flush(trial->stack.top), 0);
		check_used_clusters(qcow_of(trial->stack.top));
		for (uint64_t off = 0; off < DISK_SIZE; off += 1 << 16)
			read_some(trial, off, 1 << 16);
	}
	test_stack_close(&trial->stack);
	image_check("image.qcow2", true);
}

static suspends void run_kind(const struct image_kind *kind, bool data_file, struct seed *seed)
{
	const char *only = getenv("KIND");
	struct trial trial = { .kind = kind, .data_file = data_file, .seed = *seed };

	if (only && strcmp(only, kind->name))
		return;

	printf("  %s", kind->name);
	fflush(stdout);
	trial.flushes_fail = !seed_below(&trial.seed, 3);
	trial.content = malloc(DISK_SIZE);
	trial.unknown = calloc(DISK_SIZE, sizeof(*trial.unknown));
	image_make(kind, "image.qcow2", trial.content, DISK_SIZE, fill_random, &trial.seed);
	run_trial(&trial);
	printf(": %u requests failed%s\n", trial.failed, trial.frozen ? ", frozen" : "");
	free(trial.content);
	free(trial.unknown);
	*seed = trial.seed;
}

CO_TEST(test_faults_below)
{
	struct seed seed = seed_start("qcow faults");

	for (size_t i = 0; i < IMAGE_KINDS; i++)
		run_kind(&image_kinds[i], false, &seed);
}

CO_TEST(test_faults_below_with_a_data_file)
{
	struct seed seed = seed_start("qcow faults, data file");

	for (size_t i = 0; i < IMAGE_DATA_KINDS; i++) {
		struct image_kind kind = { .name = image_data_kinds[i].name,
			.create_options = image_data_kinds[i].create_options,
			.layer_options = "data-file = ( { layer = 'fault'; seed = 7 }, "
					 "{ layer = 'file'; path = 'data' } );" };

		image_must("rm -f data");
		run_kind(&kind, true, &seed);
	}
}

int main(void)
{
	Suite *suite = suite_create("qcow fault");
	TCase *tcase = tcase_create("fault");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_faults_below);
	tcase_add_test(tcase, test_faults_below_with_a_data_file);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
