/*
 * What the layers see of a request, and what clients see of what the layers answer: flags, errors, order.
 *
 * The first export has a fault layer on top, which fails and delays, and logs what passes.
 */
#include <fcntl.h>

#include "blk/fault.h"
#include "nbd_rig.h"

#define LOG_NAME "writes.log"

static struct rig rig;
static struct fault_rules rules;
static uint8_t data[65536];

static void setup(void)
{
	rules = (struct fault_rules){ 0 };
	rig_start(&rig, NULL, "{ layer = 'fault'; log = '" LOG_NAME "' },");
}

static void teardown(void)
{
	rig_stop(&rig);
	unlink(LOG_NAME);
}

static suspends void apply_rules_run(void *arg)
{
	fault_set(fault_find(rig.exports[0].top), &rules);
}

static void apply_rules(void)
{
	rig_run(&rig, apply_rules_run, NULL);
}

static suspends void release_run(void *arg)
{
	fault_release(fault_find(rig.exports[0].top));
}

/* --- flags ------------------------------------------------------------------------------------ */

/* The operation the log ends with: its beginning, not its return. */
static struct fault_log_record last_logged(void)
{
	struct fault_log_record record, last = { 0 };
	int fd = open(LOG_NAME, O_RDONLY);

	ck_assert_int_ge(fd, 0);
	while (read(fd, &record, sizeof(record)) == sizeof(record)) {
		ck_assert_uint_eq(be32_get(record.magic), FAULT_LOG_MAGIC);
		if (be16_get(record.kind) == FAULT_LOG_WRITE)
			lseek(fd, (off_t)be64_get(record.len), SEEK_CUR);
		if (be16_get(record.kind) != FAULT_LOG_RETURN)
			last = record;
	}
	close(fd);
	return last;
}

START_TEST(test_flags_reach_the_layers)
{
	static const struct {
		uint16_t type, flags, kind;
		unsigned expected;
	} commands[] = {
		{ NBD_CMD_WRITE, 0, FAULT_LOG_WRITE, 0 },
		{ NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, FAULT_LOG_WRITE, BLK_FUA },
		{ NBD_CMD_TRIM, 0, FAULT_LOG_DISCARD, 0 },
		{ NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, FAULT_LOG_DISCARD, BLK_FUA },
		{ NBD_CMD_WRITE_ZEROES, 0, FAULT_LOG_ZERO, 0 },
		{ NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FUA, FAULT_LOG_ZERO, BLK_FUA },
		{ NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, FAULT_LOG_ZERO, BLK_NO_HOLE },
		{ NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, FAULT_LOG_ZERO, BLK_FAST_ZERO },
	};
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
		const uint8_t *payload = commands[i].type == NBD_CMD_WRITE ? data : NULL;
		uint64_t off = 512 * i;

		rig_command(fd, commands[i].type, commands[i].flags, off, 512, payload);
		struct fault_log_record record = last_logged();
		ck_assert_uint_eq(be16_get(record.kind), commands[i].kind);
		ck_assert_uint_eq(be16_get(record.flags), commands[i].expected);
		ck_assert_uint_eq(be64_get(record.off), off);
		ck_assert_uint_eq(be64_get(record.len), 512);
	}
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_FLUSH, 0, 0, 0, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(be16_get(last_logged().kind), FAULT_LOG_FLUSH);
	rig_disconnect(fd);
}
END_TEST

/* --- errors ----------------------------------------------------------------------------------- */

static const struct {
	uint16_t type;
	unsigned op;
	uint32_t len;
} failing[] = {
	{ NBD_CMD_READ, FAULT_READ, 512 },
	{ NBD_CMD_READ, FAULT_READ, 65536 },
	{ NBD_CMD_WRITE, FAULT_WRITE, 512 },
	{ NBD_CMD_WRITE, FAULT_WRITE, 65536 },
	{ NBD_CMD_FLUSH, FAULT_FLUSH, 0 },
	{ NBD_CMD_TRIM, FAULT_DISCARD, 512 },
	{ NBD_CMD_WRITE_ZEROES, FAULT_ZERO, 512 },
};

START_TEST(test_errors_of_the_layers)
{
	static const struct {
		int code;
		uint32_t expected;
	} errors[] = {
		{ EIO, NBD_EIO },
		{ ENOSPC, NBD_ENOSPC },
		{ EDQUOT, NBD_ENOSPC },
		{ EFBIG, NBD_ENOSPC },
		{ ENOMEM, NBD_ENOMEM },
		{ EPERM, NBD_EPERM },
		{ EROFS, NBD_EPERM },
		{ EACCES, NBD_EPERM },
		{ EINVAL, NBD_EINVAL },
		{ ESHUTDOWN, NBD_ESHUTDOWN },
		{ ETIMEDOUT, NBD_EIO },
		{ ENXIO, NBD_EIO },
		{ EOVERFLOW, NBD_EIO },
	};
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(errors) * ARRAY_LEN(failing); i++) {
		uint16_t type = failing[i % ARRAY_LEN(failing)].type;
		uint32_t len = failing[i % ARRAY_LEN(failing)].len;

		rules = (struct fault_rules){ .ops = failing[i % ARRAY_LEN(failing)].op,
			.every = 1,
			.error = errors[i / ARRAY_LEN(failing)].code };
		apply_rules();
		ck_assert_uint_eq(
			rig_command(fd, type, 0, 0, len, type == NBD_CMD_WRITE ? data : NULL),
			errors[i / ARRAY_LEN(failing)].expected);
		rules.ops = 0;
		apply_rules();
		rig_expect_alive(fd);
	}
	rig_disconnect(fd);
}
END_TEST

/* NBD_ENOTSUP is for those who asked whether it is fast, and for nobody else: "Error values". */
START_TEST(test_not_supported)
{
	int fd = rig_serve(&rig);

	rules = (struct fault_rules){
		.ops = FAULT_ALL & ~FAULT_WRITE, .every = 1, .error = EOPNOTSUPP
	};
	apply_rules();
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 0, 512, NULL),
		NBD_ENOTSUP);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_WRITE_ZEROES, 0, 0, 512, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_TRIM, 0, 0, 512, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, 0, 512, NULL), NBD_EINVAL);
	rig_disconnect(fd);
}
END_TEST

/* --- order ------------------------------------------------------------------------------------ */

/* A slow request holds up no other one, on its connection or another. */
START_TEST(test_slow_request_holds_up_nobody)
{
	int fd = rig_serve(&rig), other = rig_serve(&rig);

	rules = (struct fault_rules){ .hang_ops = FAULT_READ };
	apply_rules();
	rig_request(fd, NBD_CMD_READ, 0, 1, 0, 512);
	rig_request(fd, NBD_CMD_WRITE, 0, 2, 4096, 512);
	rig_send(fd, data, 512);
	rig_request(other, NBD_CMD_FLUSH, 0, 3, 0, 0);
	ck_assert_uint_eq(rig_reply(other, 3), NBD_SUCCESS);
	ck_assert_uint_eq(rig_reply(fd, 2), NBD_SUCCESS);
	rig_run(&rig, release_run, NULL);
	ck_assert_uint_eq(rig_reply(fd, 1), NBD_SUCCESS);
	rig_recv(fd, data, 512);
	rig_disconnect(fd);
	rig_disconnect(other);
}
END_TEST

/* Completions in random order: each reply has the data of its own request. */
START_TEST(test_random_order)
{
	enum { COUNT = 200, LEN = 700 };
	static uint8_t content[COUNT * LEN], reply[LEN];
	struct seed seed = seed_start("random order");
	int fd = rig_serve(&rig);
	unsigned moved = 0;

	seed_fill(&seed, content, sizeof(content));
	rules = (struct fault_rules){ .delay_ops = FAULT_READ | FAULT_WRITE,
		.delay_random_us = 20000 };
	apply_rules();
	for (unsigned i = 0; i < COUNT; i++) {
		rig_request(fd, NBD_CMD_WRITE, 0, i, i * LEN, LEN);
		rig_send(fd, content + i * LEN, LEN);
	}
	for (unsigned i = 0; i < COUNT; i++) {
		uint64_t cookie;

		ck_assert_uint_eq(rig_any_reply(fd, &cookie), NBD_SUCCESS);
		moved += cookie != i;
	}
	ck_assert_uint_gt(moved, 0);
	for (unsigned i = 0; i < COUNT; i++)
		rig_request(fd, NBD_CMD_READ, 0, i, i * LEN, LEN);
	for (unsigned i = 0; i < COUNT; i++) {
		uint64_t cookie;

		ck_assert_uint_eq(rig_any_reply(fd, &cookie), NBD_SUCCESS);
		ck_assert_uint_lt(cookie, COUNT);
		rig_recv(fd, reply, LEN);
		ck_assert_mem_eq(reply, content + cookie * LEN, LEN);
	}
	rig_disconnect(fd);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_flags_reach_the_layers);
	tcase_add_test(tcase, test_errors_of_the_layers);
	tcase_add_test(tcase, test_not_supported);
	tcase_add_test(tcase, test_slow_request_holds_up_nobody);
	tcase_add_test(tcase, test_random_order);
}

int main(void)
{
	return test_run_suite("nbd layers", fill);
}
