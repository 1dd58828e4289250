/*
 * What can be seen of the NBD door: latencies in their buckets, and the log of the protocol, switched while a
 * client is at work.
 */
#include "nbd_rig.h"

#include "nbd/latency.h"

static struct rig rig;
static char lines[64][512];
static atomic_uint line_count;

static void keep_line(const struct nbd_trace *trace, const char *text)
{
	unsigned number = atomic_fetch_add(&line_count, 1);

	ck_assert_ptr_eq(trace, &rig.trace);
	if (number < ARRAY_LEN(lines))
		snprintf(lines[number], sizeof(lines[number]), "%s", text);
}

static void setup(void)
{
	rig_start(&rig, NULL, NULL);
	rig.trace.line = keep_line;
}

static void teardown(void)
{
	rig_stop(&rig);
}

/* --- latencies -------------------------------------------------------------------------------- */

START_TEST(test_buckets)
{
	static const struct {
		uint64_t ns;
		unsigned bucket;
	} cases[] = {
		{ 0, 0 },
		{ 999, 0 },
		{ 1000, 1 },
		{ 1999, 1 },
		{ 2000, 2 },
		{ 3999, 2 },
		{ 4000, 3 },
		{ 1000000, 10 },
		{ 1024000, 11 },
		{ 33 * NS_PER_SEC, NBD_LATENCY_BUCKETS - 1 },
		{ UINT64_MAX, NBD_LATENCY_BUCKETS - 1 },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		struct nbd_latency latency = { 0 };

		nbd_latency_count(&latency, NBD_COUNT_FLUSH, cases[i].ns);
		ck_assert_uint_eq(latency.counts[NBD_COUNT_FLUSH][cases[i].bucket], 1);
	}
}
END_TEST

static suspends void status_run(void *arg)
{
	*(json_t **)arg = nbd_export_status(&rig.exports[0].nbd);
}

/* Of all buckets of a kind, the last of which is not empty. */
static json_int_t sum_latencies(const char *door, const char *kind)
{
	json_t *status, *count;
	json_int_t sum = 0, last = 1;
	size_t i;

	rig_run(&rig, status_run, &status);
	json_array_foreach(json_object_get(json_object_get(status, door), kind), i, count)
	{
		last = json_integer_value(count);
		sum += last;
	}
	ck_assert_int_ne(last, 0);
	json_decref(status);
	return sum;
}

static suspends void shut_gate(void *arg)
{
	blk_drain_begin(rig.exports[0].top);
}

static suspends void open_gate(void *arg)
{
	blk_drain_end(rig.exports[0].top);
}

START_TEST(test_latencies_of_requests)
{
	uint8_t buf[4096] = { 0 };
	int fd = rig_serve(&rig);
	int kernel = rig_connect_as(
		&rig, &rig.exports[0].nbd, (struct nbd_session){ .origin = NBD_FROM_KERNEL });

	for (int i = 0; i < 10; i++)
		rig_read(fd, 0, buf, sizeof(buf));
	rig_write(fd, 0, buf, sizeof(buf));
	rig_read(kernel, 0, buf, sizeof(buf));
	/* What is refused has none. */
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, RIG_SIZE, 1, NULL), NBD_EINVAL);
	ck_assert_int_eq(sum_latencies("latency", "read"), 10);
	ck_assert_int_eq(sum_latencies("latency", "write"), 1);
	ck_assert_int_eq(sum_latencies("latency", "trim"), 0);
	ck_assert_int_eq(sum_latencies("kernel_latency", "read"), 1);
	rig_disconnect(kernel);
	rig_disconnect(fd);
}
END_TEST

static suspends void is_under_way_run(void *arg)
{
	const struct list *conns = &rig.exports[0].nbd.conns;

	*(bool *)arg = list_entry(conns->next, struct nbd_conn, link)->in_flight;
}

/* A request that took 40 ms is in a bucket that says so. */
START_TEST(test_latency_of_a_slow_disk)
{
	bool under_way;
	int fd = rig_serve(&rig);

	rig_run(&rig, shut_gate, NULL);
	rig_request(fd, NBD_CMD_FLUSH, 0, 7, 0, 0);
	do
		rig_run(&rig, is_under_way_run, &under_way);
	while (!under_way);
	usleep(40000);
	rig_run(&rig, open_gate, NULL);
	ck_assert_uint_eq(rig_reply(fd, 7), NBD_SUCCESS);
	ck_assert_int_eq(sum_latencies("latency", "flush"), 1);
	/* Less than 2^14 us, 16 ms: none. */
	for (int i = 0; i <= 14; i++)
		ck_assert_uint_eq(
			rig.exports[0].nbd.latency[NBD_FROM_LISTENER].counts[NBD_COUNT_FLUSH][i],
			0);
	rig_disconnect(fd);
}
END_TEST

/* --- the log of the protocol ------------------------------------------------------------------ */

static bool was_logged(const char *part)
{
	for (unsigned i = 0; i < MIN(atomic_load(&line_count), (unsigned)ARRAY_LEN(lines)); i++)
		if (strstr(lines[i], part))
			return true;
	return false;
}

static void expect_logged(const char *part)
{
	if (was_logged(part))
		return;
	for (unsigned i = 0; i < atomic_load(&line_count) && i < ARRAY_LEN(lines); i++)
		printf("%s\n", lines[i]);
	ck_abort_msg("not logged: %s", part);
}

START_TEST(test_log_of_a_handshake)
{
	static const char bad_name[] = "\0\0\0\6a\"\n\x80\\b\0\0";
	uint8_t data[256];
	int fd;

	atomic_store(&rig.trace.on, true);
	fd = rig_connect(&rig);
	rig_greet(fd, NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
	rig_option(fd, 99, "odd", 3);
	rig_option_reply(fd, 99, NULL, 0, NULL);
	rig_option(fd, NBD_OPT_INFO, bad_name, sizeof(bad_name) - 1);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_INFO, NULL, 0, NULL), NBD_REP_ERR_UNKNOWN);
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "first", NULL, 0));
	while (rig_option_reply(fd, NBD_OPT_GO, NULL, 0, NULL) != NBD_REP_ACK)
		;
	rig_expect_alive(fd);
	rig_disconnect(fd);
	rig_all_left(&rig);
	expect_logged("option 99 (unknown), 3 bytes \"odd\"");
	expect_logged("reply ERR_UNSUP to unknown");
	expect_logged("option 6 (INFO), 12 bytes "
		      "\"\\x00\\x00\\x00\\x06a\\x22\\x0a\\x80\\x5cb\\x00\\x00\"");
	expect_logged("reply ERR_UNKNOWN to INFO");
	expect_logged("reply INFO to GO, 12 bytes");
	expect_logged("reply ACK to GO");
	expect_logged("1 (WRITE), offset 8384512, length 4, flags none");
	expect_logged("0 (READ), offset 8384512, length 4, flags none");
	expect_logged("error 0");
	expect_logged("2 (DISC)");
	expect_logged("the client is through");
}
END_TEST

START_TEST(test_log_is_switched_live)
{
	uint8_t buf[512];
	int fd = rig_serve(&rig);

	rig_read(fd, 0, buf, sizeof(buf));
	ck_assert_uint_eq(atomic_load(&line_count), 0);
	atomic_store(&rig.trace.on, true);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE | 0x8000, 77, 5, NULL),
		NBD_EINVAL);
	expect_logged("0 (READ), offset 77, length 5, flags NO_HOLE and more");
	expect_logged("error 22, a flag is set that the command does not have");
	unsigned count = atomic_load(&line_count);
	atomic_store(&rig.trace.on, false);
	rig_read(fd, 0, buf, sizeof(buf));
	ck_assert_uint_eq(atomic_load(&line_count), count);
	rig_disconnect(fd);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_buckets);
	tcase_add_test(tcase, test_latencies_of_requests);
	tcase_add_test(tcase, test_latency_of_a_slow_disk);
	tcase_add_test(tcase, test_log_of_a_handshake);
	tcase_add_test(tcase, test_log_is_switched_live);
}

int main(void)
{
	return test_run_suite("nbd seeing", fill);
}
