/*
 * Images with an external data file, written by us and by qemu-io in turn: each reads what the other wrote, and
 * a raw data file is, byte by byte, what the guest sees.
 *
 * ROUNDS=100 in the environment goes on for longer. The seed is printed.
 */
#include <errno.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/qcow/qcow.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define DISK_SIZE       ((UINT64_C(4) << 20) + 1536) /* ends within a cluster */
#define WORKERS         4
#define OPERATIONS      40 /* per worker */
#define QEMU_OPERATIONS 30

static const struct {
	const char *options;
	bool raw;
} kinds[] = {
	{ "cluster_size=64k", true },
	{ "cluster_size=64k", false },
	{ "cluster_size=4k", true },
	{ "cluster_size=512", false },
	{ "cluster_size=16k,extended_l2=on", true },
	{ "cluster_size=16k,extended_l2=on", false },
};

struct load {
	struct test_stack stack;
	struct seed seed;
	uint8_t *content;
	struct range_lock busy;
	struct co_group workers;
};

static void make_image(size_t kind)
{
	image_must("rm -f data; qemu-img create -q -f qcow2 -o %s,data_file=data,data_file_raw=%s "
		   "image.qcow2 %llu",
		kinds[kind].options, kinds[kind].raw ? "on" : "off", (unsigned long long)DISK_SIZE);
}

/* --- what we write ---------------------------------------------------------------------------- */

static suspends void write_some(struct load *load, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);

	seed_fill(&load->seed, buf, len);
	ck_assert_int_eq(
		blk_write(load->stack.top, off, buf, len, seed_below(&load->seed, 8) ? 0 : BLK_FUA),
		0);
	memcpy(load->content + off, buf, len);
	free(buf);
}

/* Anywhere, and often at either end of the disk. */
static uint64_t some_off(struct seed *seed, uint64_t len)
{
	switch (seed_below(seed, 8)) {
	case 0:
		return 0;
	case 1:
		return DISK_SIZE - len;
	default:
		return seed_below(seed, DISK_SIZE - len);
	}
}

static suspends void worker(void *arg)
{
	struct load *load = arg;

	for (int i = 0; i < OPERATIONS; i++) {
		uint64_t len = 1 +
			       seed_below(&load->seed, seed_below(&load->seed, 5) ? 9000 : 400000);
		uint64_t off = some_off(&load->seed, len);
		unsigned what = (unsigned)seed_below(&load->seed, 10);
		struct range range;

		range_lock_acquire(&load->busy, &range, off, len, true);
		if (what < 6)
			write_some(load, off, len);
		else if (what < 8)
			ck_assert_int_eq(blk_discard(load->stack.top, off, len, 0), 0);
		else if (what < 9)
			ck_assert_int_eq(blk_zero(load->stack.top, off, len,
						 seed_below(&load->seed, 2) ? BLK_NO_HOLE : 0),
				0);
		else
			ck_assert_int_eq(blk_flush(load->stack.top), 0);
		if (what == 6 || what == 7 || what == 8)
			memset(load->content + off, 0, len);
		range_lock_release(&load->busy, &range);
	}
}

static suspends void open_image(struct load *load)
{
	test_stack_open(&load->stack,
		"( { layer = 'qcow'; data-file = ( { layer = 'file'; path = 'data' } ) },"
		"  { layer = 'file'; path = 'image.qcow2' } )");
}

static suspends void check_our_view(struct load *load)
{
	uint8_t *buf = malloc(DISK_SIZE);

	ck_assert_int_eq(blk_read(load->stack.top, 0, buf, DISK_SIZE), 0);
	for (uint64_t i = 0; i < DISK_SIZE; i++)
		if (buf[i] != load->content[i])
			ck_abort_msg("byte %llu is %#x instead of %#x", (unsigned long long)i,
				buf[i], load->content[i]);
	free(buf);
}

/* --- what qemu-io writes ---------------------------------------------------------------------- */

static void qemu_writes(struct load *load)
{
	FILE *script = fopen("script", "we");

	for (int i = 0; i < QEMU_OPERATIONS; i++) {
		uint64_t len = 512 * (1 + seed_below(&load->seed, 300));
		uint64_t off = 512 * seed_below(&load->seed, (DISK_SIZE - len) / 512);
		unsigned what = (unsigned)seed_below(&load->seed, 4), byte = 1 + what + (unsigned)i;

		if (what < 3)
			fprintf(script, "write -q -P %u %llu %llu\n", byte, (unsigned long long)off,
				(unsigned long long)len);
		else
			fprintf(script, "write -q -z %s %llu %llu\n",
				seed_below(&load->seed, 2) ? "-u" : "", (unsigned long long)off,
				(unsigned long long)len);
		memset(load->content + off, what < 3 ? (int)byte : 0, len);
	}
	fclose(script);
	image_must("qemu-io -f qcow2 image.qcow2 <script >qemu.log 2>&1");
}

static void check_qemus_view(const struct load *load, bool raw)
{
	image_check("image.qcow2", false);
	image_write_file("expected", load->content, DISK_SIZE);
	image_must("qemu-img compare -q -f qcow2 -F raw image.qcow2 expected");
	if (raw)
		image_must("cmp -n %llu data expected", (unsigned long long)DISK_SIZE);
}

/* Somebody cuts the data file short: that part of the disk reads as zeroes, and can be written. */
static void cut_data_file(struct load *load)
{
	uint64_t size = 512 * (1 + seed_below(&load->seed, DISK_SIZE / 512));

	image_must("truncate -s %llu data", (unsigned long long)size);
	memset(load->content + size, 0, DISK_SIZE - size);
}

/* --- in turn ---------------------------------------------------------------------------------- */

static suspends void run(size_t kind, int rounds, struct seed *seed)
{
	struct load load = { .seed = *seed, .content = calloc(1, DISK_SIZE) };

	printf("  %s%s\n", kinds[kind].options, kinds[kind].raw ? ", raw" : "");
	fflush(stdout);
	make_image(kind);
	range_lock_init(&load.busy);
	co_group_init(&load.workers);
	for (int round = 0; round < rounds; round++) {
		open_image(&load);
		check_our_view(&load);
		for (int i = 0; i < WORKERS; i++)
			co_group_start(&load.workers, worker, &load);
		co_group_wait(&load.workers);
		check_our_view(&load);
		test_stack_close(&load.stack);
		check_qemus_view(&load, kinds[kind].raw);
		qemu_writes(&load);
		check_qemus_view(&load, kinds[kind].raw);
		if (!kinds[kind].raw && seed_below(&load.seed, 2))
			cut_data_file(&load);
	}
	open_image(&load);
	check_our_view(&load);
	test_stack_close(&load.stack);
	free(load.content);
	*seed = load.seed;
}

CO_TEST(test_in_turn_with_qemu)
{
	const char *given = getenv("ROUNDS");
	struct seed seed = seed_start("qcow data file");

	for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
		run(i, given ? atoi(given) : 2, &seed);
}

/* --- zeroes and space ------------------------------------------------------------------------- */

#define PART UINT64_C(131072) /* two of the largest clusters */

static suspends void expect_zeroes(struct blk *blk, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);

	ck_assert_int_eq(blk_read(blk, off, buf, len), 0);
	for (uint64_t i = 0; i < len; i++)
		if (buf[i])
			ck_abort_msg("byte %llu is %#x", (unsigned long long)(off + i), buf[i]);
	free(buf);
}

/* The first cluster lies at offset 0 of the data file, which is no offset at all in other images. */
CO_TEST(test_zero_the_first_cluster)
{
	struct load load = { .content = malloc(PART) };

	memset(load.content, 7, PART);
	for (size_t i = 0; i < ARRAY_LEN(kinds) * 3; i++) {
		make_image(i / 3);
		open_image(&load);
		ck_assert_int_eq(blk_write(load.stack.top, 0, load.content, PART, 0), 0);
		ck_assert_int_eq(i % 3 == 0   ? blk_discard(load.stack.top, 0, PART, 0)
				 : i % 3 == 1 ? blk_zero(load.stack.top, 0, PART, 0)
					      : blk_zero(load.stack.top, 0, PART, BLK_NO_HOLE),
			0);
		expect_zeroes(load.stack.top, 0, PART);
		test_stack_close(&load.stack);
		image_check("image.qcow2", false);
		image_must("qemu-io -f qcow2 -c 'read -P 0 0 %llu' image.qcow2 >read.log",
			(unsigned long long)PART);
	}
	free(load.content);
}

static uint64_t data_file_space(void)
{
	struct stat st;

	ck_assert_int_eq(stat("data", &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

/* File systems take a little more than is written. */
static suspends void expect_space(size_t kind, const char *layer_options, bool given_back)
{
	struct test_stack stack;
	uint8_t *buf = malloc(4 * PART);

	memset(buf, 7, 4 * PART);
	make_image(kind);
	test_stack_open(&stack,
		"( { layer = 'qcow'; %s data-file = ( { layer = 'file'; path = 'data' } ) },"
		"  { layer = 'file'; path = 'image.qcow2' } )",
		layer_options);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 4 * PART, BLK_FUA), 0);
	ck_assert_uint_ge(data_file_space(), 4 * PART);
	ck_assert_int_eq(blk_discard(stack.top, PART, 3 * PART, 0), 0);
	ck_assert((data_file_space() < 3 * PART) == given_back);
	expect_zeroes(stack.top, PART, 3 * PART);
	test_stack_close(&stack);
	free(buf);
}

/* A discard punches the data file. */
CO_TEST(test_discard_gives_space_back)
{
	for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
		expect_space(i, "", true);
		if (!kinds[i].raw)
			expect_space(i, "discard = false;", false);
	}
}

/* --- other sizes ------------------------------------------------------------------------------ */

static suspends void resize_to(struct load *load, uint64_t size)
{
	struct err err;

	if (blk_resize(load->stack.top, size, BLK_FORCE, &err))
		ck_abort_msg("%s", err.text);
	ck_assert_uint_eq(blk_caps(load->stack.top)->size, size);
}

static void expect_content_of(const struct load *load, uint64_t size, bool raw)
{
	struct stat st;

	image_check("image.qcow2", false);
	image_write_file("expected", load->content, size);
	image_must("qemu-img compare -q -f qcow2 -F raw image.qcow2 expected");
	if (raw)
		image_must("cmp data expected");
	ck_assert_int_eq(stat("data", &st), 0);
	ck_assert_uint_eq((uint64_t)st.st_size, size);
}

/* Shrunk and grown, to any sector: the data file follows, and what was cut off does not come back. */
CO_TEST(test_resize)
{
	struct seed seed = seed_start("qcow data file resize");
	struct load load = { .content = malloc(DISK_SIZE) };

	for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
		uint64_t size = 512 * (1 + seed_below(&seed, DISK_SIZE / 512 - 1));
		uint64_t middle = size + 512 * seed_below(&seed, (DISK_SIZE - size) / 512 + 1);

		make_image(i);
		open_image(&load);
		seed_fill(&seed, load.content, DISK_SIZE);
		ck_assert_int_eq(blk_write(load.stack.top, 0, load.content, DISK_SIZE, 0), 0);
		resize_to(&load, size);
		test_stack_close(&load.stack);
		expect_content_of(&load, size, kinds[i].raw);
		/* Somebody left something behind the end. */
		image_must("printf behind >>data");
		memset(load.content + size, 0, DISK_SIZE - size);
		open_image(&load);
		resize_to(&load, middle);
		resize_to(&load, DISK_SIZE);
		check_our_view(&load);
		test_stack_close(&load.stack);
		expect_content_of(&load, DISK_SIZE, kinds[i].raw);
	}
	free(load.content);
}

/* A data file that does not follow is named, and the disk stays as it is, until the file grows after all. */
CO_TEST(test_data_file_that_cannot_grow)
{
	struct fault_rules rules = { .error = EIO, .every = 1 };
	struct load load = { .content = calloc(1, DISK_SIZE) };
	struct blk *top, *fault;
	struct err err;

	make_image(0);
	test_stack_open(&load.stack,
		"( { layer = 'qcow';"
		"    data-file = ( { layer = 'fault' }, { layer = 'file'; path = 'data' } ) },"
		"  { layer = 'file'; path = 'image.qcow2' } )");
	top = load.stack.top;
	fault = fault_find(qcow_of(top)->data);
	rules.ops = FAULT_RESIZE;
	fault_set(fault, &rules);
	ck_assert_int_eq(blk_resize(top, 2 * DISK_SIZE, 0, &err), -EIO);
	ck_assert_str_eq(err.text, "qcow: data-file: must grow before the disk: fault: injected: "
				   "Input/output error");
	rules.ops = FAULT_FLUSH;
	fault_set(fault, &rules);
	ck_assert_int_eq(blk_resize(top, 2 * DISK_SIZE, 0, &err), -EIO);
	ck_assert_str_eq(err.text, "qcow: data-file: cannot be flushed: Input/output error");
	ck_assert_uint_eq(blk_caps(top)->size, DISK_SIZE);
	check_our_view(&load);
	fault_set(fault, NULL);
	resize_to(&load, 2 * DISK_SIZE);
	test_stack_close(&load.stack);
	image_check("image.qcow2", false);
	free(load.content);
}

int main(void)
{
	Suite *suite = suite_create("qcow data file");
	TCase *edges = tcase_create("edges"), *load = tcase_create("load");

	tcase_set_timeout(edges, TEST_TIMEOUT_S);
	tcase_add_test(edges, test_zero_the_first_cluster);
	tcase_add_test(edges, test_discard_gives_space_back);
	tcase_add_test(edges, test_resize);
	tcase_add_test(edges, test_data_file_that_cannot_grow);
	suite_add_tcase(suite, edges);
	tcase_set_timeout(load, TEST_TIMEOUT_S);
	tcase_add_test(load, test_in_turn_with_qemu);
	suite_add_tcase(suite, load);
	return test_suite(suite);
}
