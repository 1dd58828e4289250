/*
 * The fault layer: what it breaks, and that its write log tells what may be on the disk after a power cut.
 */
#include <fcntl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "blk/fault.h"
#include "fake.h"

static char buf[8192];

#define SIMPLE "( { layer = 'fault' }, { layer = 'memory'; size = '1M' } )"

static suspends void expect_writes(struct blk *top, const char *pattern)
{
	for (; *pattern; pattern++)
		ck_assert_int_eq(blk_write(top, 0, buf, 512, 0), *pattern == 'x' ? -EIO : 0);
}

suspends CO_TEST(test_triggers)
{
	struct test_stack stack;
	struct fault_rules every = { .ops = FAULT_WRITE, .error = EIO, .every = 3 };
	struct fault_rules once = { .ops = FAULT_WRITE, .error = EIO, .countdown = 2 };
	struct fault_rules sticky = { FAULT_WRITE, .error = EIO, .countdown = 2, .sticky = true };

	test_stack_open(&stack, SIMPLE);
	ck_assert_ptr_eq(fault_find(stack.top), stack.top);
	ck_assert_ptr_null(fault_find(stack.top->below));
	expect_writes(stack.top, "......");
	fault_set(stack.top, &every);
	expect_writes(stack.top, "..x..x..x");
	ck_assert_uint_eq(fault_counted(stack.top), 9);
	ck_assert_uint_eq(fault_failed(stack.top), 3);
	fault_set(stack.top, &once);
	expect_writes(stack.top, ".x.......");
	fault_set(stack.top, &sticky);
	expect_writes(stack.top, ".xxxxxxxx");
	fault_set(stack.top, NULL);
	expect_writes(stack.top, ".........");
	test_stack_close(&stack);
}

suspends CO_TEST(test_options)
{
	struct test_stack stack;

	test_stack_open(&stack,
		"( { layer = 'fault'; ops = [ 'write', 'flush' ]; from = 512; to = 1024; every = 2;"
		"    error = 'ENOSPC' }, { layer = 'memory'; size = '1M' } )");
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(blk_write(stack.top, 0, buf, 512, 0), 0);
	ck_assert_int_eq(blk_write(stack.top, 1024, buf, 512, 0), 0);
	ck_assert_int_eq(blk_write(stack.top, 1023, buf, 512, 0), 0);
	ck_assert_int_eq(blk_read(stack.top, 512, buf, 512), 0);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 513, 0), -ENOSPC);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	ck_assert_int_eq(blk_flush(stack.top), -ENOSPC);
	test_stack_close(&stack);
}

/* Each operation can be chosen alone. */
suspends CO_TEST(test_every_op)
{
	struct test_stack stack;
	struct blk_extent list[4];
	struct blk_extents extents;
	struct err err;

	test_stack_open(&stack, SIMPLE);
	for (unsigned op = FAULT_READ; op < FAULT_ALL; op <<= 1) {
		struct fault_rules rules = { .ops = op, .error = ENOMEM, .every = 1 };
		int expected[7], got[7];

		fault_set(stack.top, &rules);
		blk_extents_init(&extents, list, 4);
		got[0] = blk_read(stack.top, 0, buf, 512);
		got[1] = blk_write(stack.top, 0, buf, 512, 0);
		got[2] = blk_flush(stack.top);
		got[3] = blk_zero(stack.top, 0, 512, 0);
		got[4] = blk_discard(stack.top, 0, 512, 0);
		got[5] = blk_extents(stack.top, 0, 512, &extents);
		got[6] = blk_resize(stack.top, 2 << 20, 0, &err);
		for (int i = 0; i < 7; i++)
			expected[i] = op == 1U << i ? -ENOMEM : 0;
		ck_assert_mem_eq(got, expected, sizeof(got));
		fault_set(stack.top, NULL);
		ck_assert_int_eq(blk_resize(stack.top, 1 << 20, BLK_FORCE, &err), 0);
	}
	test_stack_close(&stack);
}

/* The same seed fails the same operations; about as many as asked for. */
suspends CO_TEST(test_random_repeats)
{
	struct seed seed = seed_start("test_random_repeats");
	int number = (int)seed_below(&seed, 1000000);
	bool failed[2][2000];

	for (int run = 0; run < 2; run++) {
		struct test_stack stack;

		test_stack_open(&stack,
			"( { layer = 'fault'; ops = 'all'; permille = 250; seed = %d },"
			"  { layer = 'null' } )",
			number);
		for (int i = 0; i < 2000; i++)
			failed[run][i] = blk_write(stack.top, 0, buf, 512, 0);
		ck_assert_uint_gt(fault_failed(stack.top), 350);
		ck_assert_uint_lt(fault_failed(stack.top), 650);
		test_stack_close(&stack);
	}
	ck_assert_mem_eq(failed[0], failed[1], sizeof(failed[0]));
}

suspends CO_TEST(test_torn_writes)
{
	static char written[8192], back[8192];
	struct test_stack stack;
	bool seen[17] = { 0 };

	memset(written, 'x', sizeof(written));
	test_stack_open(&stack, "( { layer = 'fault'; ops = 'write'; every = 1; torn = true },"
				"  { layer = 'memory'; size = '1M' } )");
	for (int i = 0; i < 1000; i++) {
		size_t kept = 0;

		ck_assert_int_eq(blk_zero(stack.top, 0, 8192, 0), 0);
		ck_assert_int_eq(blk_write(stack.top, 0, written, 8192, 0), -EIO);
		ck_assert_int_eq(blk_read(stack.top, 0, back, 8192), 0);
		while (kept < 8192 && back[kept] == 'x')
			kept++;
		ck_assert_uint_eq(kept % FAULT_SECTOR, 0);
		ck_assert(kept == 8192 || !memchr(back + kept, 'x', 8192 - kept));
		seen[kept / FAULT_SECTOR] = true;
	}
	for (int i = 0; i < 17; i++)
		ck_assert(seen[i]);
	test_stack_close(&stack);
}

struct timed_write {
	struct blk *top;
	int *turn;
	int finished; /* as which one */
};

static suspends void timed_write_main(void *arg)
{
	struct timed_write *write = arg;

	ck_assert_int_eq(blk_write(write->top, 0, buf, 512, 0), 0);
	write->finished = ++*write->turn;
}

/* Not timed, but ordered: what is delayed finishes after what is not. */
suspends CO_TEST(test_delay)
{
	struct test_stack stack;
	struct fault_rules delay = { .delay_ops = FAULT_WRITE, .delay_us = 3000 };
	int turn = 0;
	struct timed_write slow = { .turn = &turn }, quick = { .turn = &turn };
	struct co_group group;

	test_stack_open(&stack, SIMPLE);
	slow.top = quick.top = stack.top;
	co_group_init(&group);
	fault_set(stack.top, &delay);
	co_group_start(&group, timed_write_main, &slow);
	ck_assert_int_eq(blk_read(stack.top, 0, buf, 512), 0);
	ck_assert_int_eq(slow.finished, 0);
	fault_set(stack.top, NULL);
	co_group_start(&group, timed_write_main, &quick);
	co_group_wait(&group);
	ck_assert_int_eq(quick.finished, 1);
	ck_assert_int_eq(slow.finished, 2);
	test_stack_close(&stack);
}

/* Until it is released, whatever the rules are by then. */
suspends CO_TEST(test_hang)
{
	struct test_stack stack;
	struct fault_rules hang = { .hang_ops = FAULT_WRITE };
	int turn = 0;
	struct timed_write hanging = { .turn = &turn }, quick = { .turn = &turn };
	struct co_group group;

	test_stack_open(&stack, SIMPLE);
	hanging.top = quick.top = stack.top;
	co_group_init(&group);
	fault_set(stack.top, &hang);
	co_group_start(&group, timed_write_main, &hanging);
	fault_set(stack.top, NULL);
	co_group_start(&group, timed_write_main, &quick);
	co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(quick.finished, 1);
	ck_assert_int_eq(hanging.finished, 0);
	fault_release(stack.top);
	co_group_wait(&group);
	ck_assert_int_eq(hanging.finished, 2);
	test_stack_close(&stack);
}

/* A zero that answers ENOTSUP is emulated above the layer. */
suspends CO_TEST(test_unsupported_zero)
{
	struct test_stack stack;

	test_stack_open(&stack,
		"( { layer = 'fault'; ops = [ 'zero', 'discard' ]; every = 1; error = 'ENOTSUP' },"
		"  { layer = 'memory'; size = '1M' } )");
	memset(buf, 'x', 512);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, 512, 0), 0);
	ck_assert_int_eq(blk_discard(stack.top, 0, 512, 0), 0);
	ck_assert_int_eq(blk_read(stack.top, 0, buf, 512), 0);
	ck_assert(!memchr(buf, 'x', 512));
	ck_assert_int_eq(blk_zero(stack.top, 0, 512, BLK_FAST_ZERO), -EOPNOTSUPP);
	test_stack_close(&stack);
}

/* --- the write log ------------------------------------------------------------------------------ */

#define DISK_BYTES 65536U

struct log {
	uint8_t *bytes;
	size_t len, pos;
};

static struct log log_load(const char *path)
{
	CLEANUP(fd) int fd = open(path, O_RDONLY);
	struct log log = { .len = (size_t)lseek(fd, 0, SEEK_END) };

	log.bytes = malloc(log.len);
	ck_assert_int_eq(pread(fd, log.bytes, log.len, 0), (ssize_t)log.len);
	return log;
}

/* The next record, with its data behind it; NULL at the end. */
static const struct fault_log_record *log_next(struct log *log)
{
	const struct fault_log_record *record = (const void *)(log->bytes + log->pos);

	if (log->pos == log->len)
		return NULL;
	ck_assert_uint_le(log->pos + sizeof(*record), log->len);
	ck_assert_uint_eq(be32_get(record->magic), FAULT_LOG_MAGIC);
	log->pos += sizeof(*record);
	if (be16_get(record->kind) == FAULT_LOG_WRITE)
		log->pos += be64_get(record->len);
	ck_assert_uint_le(log->pos, log->len);
	return record;
}

static void apply(uint8_t *disk, const struct fault_log_record *record)
{
	uint64_t off = be64_get(record->off), len = be64_get(record->len);

	switch (be16_get(record->kind)) {
	case FAULT_LOG_WRITE:
		memcpy(disk + off, record + 1, len);
		break;
	case FAULT_LOG_ZERO:
	case FAULT_LOG_DISCARD:
		memset(disk + off, 0, len);
	}
}

suspends CO_TEST(test_log_format)
{
	static const struct {
		enum fault_log_kind kind;
		unsigned flags;
		uint64_t id, off, len;
	} expected[] = {
		{ FAULT_LOG_OPEN, 0, 0, 0, 1 << 20 },
		{ FAULT_LOG_WRITE, 0, 1, 512, 3 },
		{ FAULT_LOG_RETURN, 0, 1, 0, 0 },
		{ FAULT_LOG_ZERO, BLK_FUA, 2, 1024, 512 },
		{ FAULT_LOG_RETURN, 0, 2, 0, 0 },
		{ FAULT_LOG_DISCARD, 0, 3, 2048, 512 },
		{ FAULT_LOG_RETURN, 0, 3, 0, 0 },
		{ FAULT_LOG_FLUSH, 0, 4, 0, 0 },
		{ FAULT_LOG_RETURN, 0, 4, 0, 0 },
		{ FAULT_LOG_RESIZE, 0, 5, 0, 2 << 20 },
		{ FAULT_LOG_RETURN, 0, 5, 0, 0 },
	};
	struct test_stack stack;
	const struct fault_log_record *record;
	struct err err;

	test_stack_open(&stack, "( { layer = 'fault'; log = 'changes' },"
				"  { layer = 'memory'; size = '1M' } )");
	ck_assert_int_eq(blk_write(stack.top, 512, "abc", 3, 0), 0);
	ck_assert_int_eq(blk_read(stack.top, 512, buf, 3), 0);
	ck_assert_int_eq(blk_zero(stack.top, 1024, 512, BLK_FUA), 0);
	ck_assert_int_eq(blk_discard(stack.top, 2048, 512, 0), 0);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	ck_assert_int_eq(blk_resize(stack.top, 2 << 20, 0, &err), 0);

	struct log log = log_load("changes");

	for (size_t i = 0; i < ARRAY_LEN(expected); i++) {
		record = log_next(&log);
		ck_assert_ptr_nonnull(record);
		ck_assert_uint_eq(be16_get(record->kind), expected[i].kind);
		ck_assert_uint_eq(be16_get(record->flags), expected[i].flags);
		ck_assert_uint_eq(be64_get(record->id), expected[i].id);
		ck_assert_uint_eq(be64_get(record->off), expected[i].off);
		ck_assert_uint_eq(be64_get(record->len), expected[i].len);
		if (expected[i].kind == FAULT_LOG_WRITE)
			ck_assert_mem_eq(record + 1, "abc", 3);
	}
	ck_assert_ptr_null(log_next(&log));
	free(log.bytes);
	test_stack_close(&stack);
}

/* Replayed whole, the log gives the disk, torn and failed writes included. */
suspends CO_TEST(test_log_replays)
{
	struct test_stack stack;
	struct seed seed = seed_start("test_log_replays");
	uint8_t *disk = calloc(1, DISK_BYTES), *back = malloc(DISK_BYTES);

	test_stack_open(&stack,
		"( { layer = 'fault'; log = 'changes'; ops = 'all'; permille = 200; torn = true },"
		"  { layer = 'memory'; size = %u; block-size = 512 } )",
		DISK_BYTES);
	for (int i = 0; i < 500; i++) {
		uint64_t off = seed_below(&seed, DISK_BYTES - sizeof(buf));
		uint64_t len = 1 + seed_below(&seed, sizeof(buf));

		seed_fill(&seed, buf, len);
		switch (seed_below(&seed, 8)) {
		case 0:
			blk_zero(stack.top, off, len, 0);
			break;
		case 1:
			blk_discard(stack.top, off, len, 0);
			break;
		case 2:
			blk_flush(stack.top);
			break;
		default:
			blk_write(stack.top, off, buf, len, 0);
		}
	}

	struct log log = log_load("changes");

	for (const struct fault_log_record *record; (record = log_next(&log));)
		apply(disk, record);
	fault_set(stack.top, NULL);
	ck_assert_int_eq(blk_read(stack.top, 0, back, DISK_BYTES), 0);
	ck_assert_mem_eq(disk, back, DISK_BYTES);
	free(log.bytes);
	free(disk);
	free(back);
	test_stack_close(&stack);
}

suspends CO_TEST(test_log_cannot_be_opened)
{
	struct test_stack stack;
	struct err err;

	ck_assert_int_eq(test_stack_try(&stack, &err,
				 "( { layer = 'fault'; log = '/nonexistent/log' },"
				 "  { layer = 'null' } )"),
		-ENOENT);
	ck_assert_str_eq(err.text, "test.conf:1: fault: log \"/nonexistent/log\": "
				   "No such file or directory");
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("fault");
	TCase *tcase = tcase_create("fault");

	suite_add_tcase(suite, tcase);
	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_triggers);
	tcase_add_test(tcase, test_options);
	tcase_add_test(tcase, test_every_op);
	tcase_add_test(tcase, test_random_repeats);
	tcase_add_test(tcase, test_torn_writes);
	tcase_add_test(tcase, test_delay);
	tcase_add_test(tcase, test_hang);
	tcase_add_test(tcase, test_unsupported_zero);
	tcase_add_test(tcase, test_log_format);
	tcase_add_test(tcase, test_log_replays);
	tcase_add_test(tcase, test_log_cannot_be_opened);
	return test_suite(suite);
}
