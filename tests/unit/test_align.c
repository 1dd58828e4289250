/*
 * Requests that do not fit: splitting, bouncing, read-modify-write, and zeroes made from writes.
 *
 * The main test lets several coroutines work at random, each in a range of bytes of its own; the ranges
 * meet within blocks, so that a lost update of a neighbour shows as a difference from the oracle.
 */
#include "fake.h"

#define WORKERS    8
#define OPERATIONS 150
#define BUF_BYTES  9000U

struct worker {
	struct fake_stack *stack;
	struct seed seed;
	uint8_t *oracle;     /* of the whole disk; a worker touches its own range alone */
	uint64_t start, end; /* its range */
};

/* One random operation within the worker's range, on the disk and on the oracle. */
static suspends void work_once(struct worker *worker, uint8_t *buf)
{
	struct blk *top = worker->stack->top;
	uint64_t off = worker->start + seed_below(&worker->seed, worker->end - worker->start);
	uint64_t len = 1 + seed_below(&worker->seed, MIN(worker->end - off, BUF_BYTES - 64));
	unsigned fua = seed_below(&worker->seed, 4) ? 0 : BLK_FUA;

	buf += seed_below(&worker->seed, 2) ? 0 : seed_below(&worker->seed, 64);
	switch (seed_below(&worker->seed, 6)) {
	case 0:
		ck_assert_int_eq(blk_zero(top, off, len, fua), 0);
		memset(worker->oracle + off, 0, len);
		break;
	case 1:
		ck_assert_int_eq(blk_discard(top, off, len, fua), 0);
		memset(worker->oracle + off, 0, len);
		break;
	case 2:
	case 3:
		ck_assert_int_eq(blk_read(top, off, buf, len), 0);
		ck_assert_mem_eq(buf, worker->oracle + off, len);
		break;
	default:
		seed_fill(&worker->seed, buf, len);
		memcpy(worker->oracle + off, buf, len);
		ck_assert_int_eq(blk_write(top, off, buf, len, fua), 0);
	}
}

static suspends void work(void *arg)
{
	struct worker worker = *(struct worker *)arg;
	uint8_t *buf = aligned_alloc(4096, 3 * 4096);

	for (int i = 0; i < OPERATIONS; i++)
		work_once(&worker, buf);
	free(buf);
}

static suspends void check_whole_disk(struct fake_stack *stack, const uint8_t *oracle)
{
	uint64_t size = blk_caps(stack->top)->size;
	uint8_t *buf = malloc(size);

	ck_assert_mem_eq(stack->fake->data, oracle, size);
	ck_assert_int_eq(blk_read(stack->top, 0, buf, size), 0);
	ck_assert_mem_eq(buf, oracle, size);
	free(buf);
}

static suspends void run_workers(struct fake_stack *stack)
{
	uint64_t size = blk_caps(stack->top)->size;
	uint8_t *oracle = calloc(1, size);
	struct co_group group;
	uint64_t start = 0;

	co_group_init(&group);
	for (uint64_t i = 0; i < WORKERS; i++) {
		uint64_t nominal_end = size * (i + 1) / WORKERS;
		struct worker worker = { stack, { seed_next(&stack->seed) }, oracle, start,
			i == WORKERS - 1 ? size : nominal_end - seed_below(&stack->seed, 2000) };

		co_group_start(&group, work, &worker);
		start = worker.end;
	}
	co_group_wait(&group);
	check_whole_disk(stack, oracle);
	free(oracle);
}

suspends CO_TEST(test_concurrent_against_oracle)
{
	struct seed seed = seed_start("test_concurrent_against_oracle");

	for (int round = 0; round < 24; round++) {
		uint64_t block_size = UINT64_C(1) << seed_below(&seed, 13);
		uint64_t mem_align = UINT64_C(1) << seed_below(&seed, 13);
		uint64_t max_request = MAX(block_size, 512U) * (1 + seed_below(&seed, 5));
		struct fake_stack stack;

		if (seed_below(&seed, 3) == 0)
			max_request = BLK_REQUEST_MAX;
		fake_stack_open(&stack, "round", NULL,
			"( { size = 65536; block-size = %d; mem-align = %d; max-request = %d; fua "
			"= "
			"%s;"
			"    zero = %s; discard = %s; zero-fast = %s; waits = %d } )",
			(int)block_size, (int)mem_align, (int)max_request,
			seed_below(&seed, 2) ? "true" : "false",
			seed_below(&seed, 2) ? "true" : "false",
			seed_below(&seed, 2) ? "true" : "false",
			seed_below(&seed, 2) ? "true" : "false", (int)seed_below(&seed, 4));
		run_workers(&stack);
		fake_stack_close(&stack);
	}
}

/* Whether all of [off, end) of the fake is byte. */
static bool all(const struct fake_stack *stack, size_t off, size_t end, char byte)
{
	while (off < end && stack->fake->data[off] == (uint8_t)byte)
		off++;
	return off == end;
}

/* --- one writer in a block, one over it --------------------------------------------------------- */

struct racer {
	struct fake_stack *stack;
	uint64_t off;
	char buf[512];
	size_t len;
	int ret;
};

static suspends void race_write(void *arg)
{
	struct racer *racer = arg;

	racer->ret = blk_write(racer->stack->top, racer->off, racer->buf, racer->len, 0);
}

static suspends void race_discard(void *arg)
{
	struct racer *racer = arg;

	racer->ret = blk_discard(racer->stack->top, racer->off, racer->len, 0);
}

/*
 * A part of a block is written while the whole block is written or discarded: whichever comes first, all
 * bytes outside the part are the whole write's, never what the block held before.
 */
static suspends void race_with_whole_block(co_fn *whole_fn, char expected)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "race", NULL,
		"( { size = 4096; block-size = 512; waits = 3; zero = true; discard = true } )");
	for (int i = 0; i < 200; i++) {
		struct racer part = { &stack, 512 + 100, { 0 }, 10 };
		struct racer whole = { &stack, 512, { 0 }, 512 };
		struct co_group group;

		memset(stack.fake->data, 'o', 4096);
		memset(part.buf, 'p', sizeof(part.buf));
		memset(whole.buf, 'w', sizeof(whole.buf));
		co_group_init(&group);
		co_group_start(&group, i % 2 ? race_write : whole_fn, i % 2 ? &part : &whole);
		co_group_start(&group, i % 2 ? whole_fn : race_write, i % 2 ? &whole : &part);
		co_group_wait(&group);
		ck_assert_int_eq(part.ret, 0);
		ck_assert_int_eq(whole.ret, 0);
		ck_assert(all(&stack, 512, 612, expected) && all(&stack, 622, 1024, expected));
	}
	fake_stack_close(&stack);
}

suspends CO_TEST(test_part_races_whole_write)
{
	race_with_whole_block(race_write, 'w');
}

suspends CO_TEST(test_part_races_discard)
{
	race_with_whole_block(race_discard, 0);
}

/* --- the shape of what reaches the ops --------------------------------------------------------- */

suspends CO_TEST(test_aligned_goes_straight)
{
	static char buf[8192] __attribute__((aligned(4096)));
	struct fake_stack stack;

	fake_stack_open(&stack, "straight", NULL, "( { block-size = 512; mem-align = 512 } )");
	ck_assert_int_eq(blk_write(stack.top, 512, buf, 8192, 0), 0);
	ck_assert_int_eq(blk_read(stack.top, 512, buf, 8192), 0);
	ck_assert_uint_eq(stack.fake->writes, 1);
	ck_assert_uint_eq(stack.fake->reads, 1);
	/* through a bounce buffer, without reading first */
	ck_assert_int_eq(blk_write(stack.top, 512, buf + 1, 4096, 0), 0);
	ck_assert_uint_eq(stack.fake->writes, 2);
	ck_assert_uint_eq(stack.fake->reads, 1);
	/* both edges read, written in one */
	ck_assert_int_eq(blk_write(stack.top, 500, buf, 4096, 0), 0);
	ck_assert_uint_eq(stack.fake->writes, 3);
	ck_assert_uint_eq(stack.fake->reads, 3);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_split)
{
	static char buf[10000];
	struct fake_stack stack;

	fake_stack_open(&stack, "split", NULL, "( { max-request = 4096 } )");
	ck_assert_int_eq(blk_write(stack.top, 1, buf, 10000, 0), 0);
	ck_assert_uint_eq(stack.fake->writes, 3);
	ck_assert_int_eq(blk_read(stack.top, 1, buf, 8192), 0);
	ck_assert_uint_eq(stack.fake->reads, 2);
	ck_assert_uint_eq(stack.top->counters.requests[BLK_COUNT_WRITE], 1);
	ck_assert_uint_eq(stack.top->counters.bytes[BLK_COUNT_WRITE], 10000);
	fake_stack_close(&stack);
}

/* --- FUA ---------------------------------------------------------------------------------------- */

suspends CO_TEST(test_fua_becomes_a_flush)
{
	char buf[600] = { 0 };
	struct fake_stack stack;

	fake_stack_open(&stack, "fua", NULL, "( { block-size = 512; zero = true } )");
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 512, 0), 0);
	ck_assert_uint_eq(stack.fake->flushes, 0);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 512, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->flushes, 1);
	ck_assert_int_eq(blk_write(stack.top, 7, buf, 600, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->flushes, 2);
	ck_assert_int_eq(blk_zero(stack.top, 0, 1024, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->flushes, 3);
	ck_assert_int_eq(blk_discard(stack.top, 3, 10, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->flushes, 4);
	ck_assert_uint_eq(stack.fake->fua_writes + stack.fake->fua_zeroes, 0);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_fua_is_passed_on)
{
	char buf[600] = { 0 };
	struct fake_stack stack;

	fake_stack_open(&stack, "fua", NULL, "( { block-size = 512; fua = true; zero = true } )");
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 512, BLK_FUA), 0);
	ck_assert_int_eq(blk_zero(stack.top, 0, 1024, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->fua_writes, 1);
	ck_assert_uint_eq(stack.fake->fua_zeroes, 1);
	ck_assert_uint_eq(stack.fake->flushes, 0);
	/* several ops: one flush after them all */
	ck_assert_int_eq(blk_zero(stack.top, 100, 2000, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->fua_zeroes, 1);
	ck_assert_uint_eq(stack.fake->flushes, 1);
	/* the op refuses, the emulation is durable all the same */
	stack.fake->zero = false;
	ck_assert_int_eq(blk_zero(stack.top, 0, 1024, BLK_FUA), 0);
	ck_assert_uint_eq(stack.fake->flushes, 2);
	fake_stack_close(&stack);
}

/* --- zero and discard --------------------------------------------------------------------------- */

suspends CO_TEST(test_zero_emulation_is_bounded)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "bounded", NULL, "( { size = '4M'; block-size = 512 } )");
	memset(stack.fake->data, 'x', 4 << 20);
	ck_assert_int_eq(blk_zero(stack.top, 1, (4 << 20) - 2, 0), 0);
	ck_assert_uint_le(stack.fake->largest_write, 256 << 10);
	ck_assert(all(&stack, 0, 1, 'x') && all(&stack, 1, (4 << 20) - 1, 0));
	ck_assert(all(&stack, (4 << 20) - 1, 4 << 20, 'x'));
	fake_stack_close(&stack);
}

suspends CO_TEST(test_discard_falls_back_to_zero)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "discard", NULL, "( { zero = true } )");
	ck_assert_int_eq(blk_discard(stack.top, 10, 100, 0), 0);
	ck_assert_uint_eq(stack.fake->discards, 1);
	ck_assert_uint_eq(stack.fake->zeroes, 1);
	ck_assert_uint_eq(stack.fake->writes, 0);
	stack.fake->discard = true;
	ck_assert_int_eq(blk_discard(stack.top, 10, 100, 0), 0);
	ck_assert_uint_eq(stack.fake->zeroes, 1);
	ck_assert_int_eq(blk_zero(stack.top, 10, 100, BLK_NO_HOLE), 0);
	ck_assert_uint_eq(stack.fake->last_zero_flags, BLK_NO_HOLE);
	fake_stack_close(&stack);
}

suspends CO_TEST(test_fast_zero)
{
	struct fake_stack stack;

	fake_stack_open(&stack, "fast", NULL, "( { block-size = 512; zero-fast = true } )");
	memset(stack.fake->data, 'x', 4096);
	ck_assert_int_eq(blk_zero(stack.top, 1, 2000, BLK_FAST_ZERO), -EOPNOTSUPP);
	ck_assert_int_eq(blk_zero(stack.top, 512, 512, BLK_FAST_ZERO), -EOPNOTSUPP);
	ck_assert_uint_eq(stack.fake->writes, 0);
	ck_assert_uint_eq(stack.top->counters.errors[BLK_COUNT_ZERO], 0);
	stack.fake->zero = true;
	ck_assert_int_eq(blk_zero(stack.top, 1, 100, BLK_FAST_ZERO), -EOPNOTSUPP);
	ck_assert(all(&stack, 0, 4096, 'x'));
	ck_assert_int_eq(blk_zero(stack.top, 1, 2000, BLK_FAST_ZERO), 0);
	ck_assert(
		all(&stack, 0, 1, 'x') && all(&stack, 1, 2001, 0) && all(&stack, 2001, 4096, 'x'));
	stack.top->caps.zero_fast = false;
	ck_assert_int_eq(blk_zero(stack.top, 512, 512, BLK_FAST_ZERO), -EOPNOTSUPP);
	fake_stack_close(&stack);
}

/* A leaf without the ops at all. */
suspends CO_TEST(test_missing_ops)
{
	struct blk_ops bare = fake_ops;
	struct fake_stack stack;
	struct err err;

	bare.zero = NULL;
	bare.discard = NULL;
	bare.flush = NULL;
	bare.extents = NULL;
	bare.resize = NULL;
	fake_stack_open(&stack, "bare", &bare, "( { block-size = 512 } )");
	memset(stack.fake->data, 'x', 4096);
	ck_assert_int_eq(blk_zero(stack.top, 1, 1000, BLK_FUA), 0);
	ck_assert_int_eq(blk_discard(stack.top, 2000, 1000, BLK_FUA), 0);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	ck_assert(all(&stack, 0, 1, 'x') && all(&stack, 1, 1001, 0) &&
		  all(&stack, 1001, 2000, 'x') && all(&stack, 2000, 3000, 0) &&
		  all(&stack, 3000, 4096, 'x'));
	ck_assert_int_eq(blk_resize(stack.top, 1 << 20, 0, &err), -EOPNOTSUPP);
	ck_assert_str_eq(err.text, "fake: it has a fixed size");
	fake_stack_close(&stack);
}

/* A layer without ops passes everything on, unchanged. */
suspends CO_TEST(test_forwarding_layer)
{
	static const struct blk_ops forward_ops = { .name = "forward",
		.struct_size = sizeof(struct blk) };
	struct conf *conf = conf_build("{}");
	struct fake_stack stack;
	struct err err;
	char buf[10];

	fake_stack_open(&stack, "forward", NULL, "( { zero = true; fua = true } )");
	ck_assert_int_eq(
		blk_open_layer(&forward_ops, conf, &stack.env, false, &stack.top, &err), 0);
	ck_assert_ptr_eq(stack.top->below, &stack.fake->blk);
	ck_assert_int_eq(blk_write(stack.top, 5, "12345", 5, BLK_FUA), 0);
	ck_assert_int_eq(blk_read(stack.top, 5, buf, 5), 0);
	ck_assert_mem_eq(buf, "12345", 5);
	ck_assert_uint_eq(stack.fake->fua_writes, 1);
	ck_assert_int_eq(blk_zero(stack.top, 5, 2, BLK_FUA | BLK_NO_HOLE), 0);
	ck_assert_uint_eq(stack.fake->last_zero_flags, BLK_FUA | BLK_NO_HOLE);
	ck_assert_int_eq(blk_discard(stack.top, 7, 3, 0), 0);
	ck_assert_uint_eq(stack.fake->discards, 1);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	ck_assert_uint_eq(stack.fake->flushes, 1);
	ck_assert_int_eq(blk_resize(stack.top, 1 << 20, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(stack.top)->size, 1 << 20);
	fake_stack_close(&stack);
	conf_free(conf);
}

int main(void)
{
	Suite *suite = suite_create("align");
	TCase *tcase = tcase_create("align");

	suite_add_tcase(suite, tcase);
	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_concurrent_against_oracle);
	tcase_add_test(tcase, test_part_races_whole_write);
	tcase_add_test(tcase, test_part_races_discard);
	tcase_add_test(tcase, test_aligned_goes_straight);
	tcase_add_test(tcase, test_split);
	tcase_add_test(tcase, test_fua_becomes_a_flush);
	tcase_add_test(tcase, test_fua_is_passed_on);
	tcase_add_test(tcase, test_zero_emulation_is_bounded);
	tcase_add_test(tcase, test_discard_falls_back_to_zero);
	tcase_add_test(tcase, test_fast_zero);
	tcase_add_test(tcase, test_missing_ops);
	tcase_add_test(tcase, test_forwarding_layer);
	return test_suite(suite);
}
