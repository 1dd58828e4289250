/*
 * The handshake, byte by byte: every option, every refusal, and clients that break the rules.
 */
#include "nbd_rig.h"

static struct rig rig;
static uint8_t data[NBD_OPTION_DATA_MAX_BYTES + 4096];

static void setup(void)
{
	rig_start(&rig, NULL, NULL);
}

static void teardown(void)
{
	rig_stop(&rig);
}

/* A client behind the greeting. */
static int greeted(void)
{
	int fd = rig_connect(&rig);

	rig_greet(fd, NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
	return fd;
}

static void abort_option(int fd)
{
	rig_option(fd, NBD_OPT_ABORT, NULL, 0);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_ABORT, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
}

/* The next reply is an error with a text. */
static void expect_error(int fd, uint32_t option, uint32_t type)
{
	uint32_t len;

	ck_assert_uint_eq(rig_option_reply(fd, option, NULL, 0, &len), type);
	ck_assert_uint_gt(len, 0);
}

static void expect_info_export(int fd, uint32_t option, uint64_t size, unsigned flags)
{
	struct nbd_info_export info;
	uint32_t len;

	ck_assert_uint_eq(rig_option_reply(fd, option, &info, sizeof(info), &len), NBD_REP_INFO);
	ck_assert_uint_eq(len, sizeof(info));
	ck_assert_uint_eq(be16_get(info.type), NBD_INFO_EXPORT);
	ck_assert_uint_eq(be64_get(info.size), size);
	ck_assert_uint_eq(be16_get(info.flags), flags);
}

#define FLAGS_WRITABLE                                                                           \
	(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM |     \
		NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO | NBD_FLAG_CAN_MULTI_CONN | \
		NBD_FLAG_SEND_CACHE)

/* --- what goes well --------------------------------------------------------------------------- */

START_TEST(test_go)
{
	int fd = greeted();

	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "second", NULL, 0));
	expect_info_export(fd, NBD_OPT_GO, (uint64_t)RIG_SIZE * 2, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_alive(fd);
	rig_disconnect(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
}
END_TEST

START_TEST(test_go_with_all_infos)
{
	const uint16_t infos[] = { NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, 77, NBD_INFO_NAME,
		NBD_INFO_EXPORT };
	struct nbd_info_block_size block_size;
	char text[64];
	uint32_t len;
	int fd = greeted();

	/* The default export, and its real name. */
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "", infos, ARRAY_LEN(infos)));
	expect_info_export(fd, NBD_OPT_GO, RIG_SIZE, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, text, sizeof(text), &len), NBD_REP_INFO);
	ck_assert_mem_eq(text, "\0\1first", len);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, text, sizeof(text), &len), NBD_REP_INFO);
	ck_assert_mem_eq(text, "\0\2a disk of memory", len);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, &block_size, sizeof(block_size), &len),
		NBD_REP_INFO);
	ck_assert_uint_eq(len, sizeof(block_size));
	ck_assert_uint_eq(be16_get(block_size.type), NBD_INFO_BLOCK_SIZE);
	ck_assert_uint_eq(be32_get(block_size.minimum), 1);
	ck_assert_uint_ge(be32_get(block_size.preferred), 512);
	ck_assert(is_pow2(be32_get(block_size.preferred)));
	ck_assert_uint_eq(be32_get(block_size.max_payload), 32U << 20);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_info_then_go)
{
	int fd = greeted();

	rig_option(fd, NBD_OPT_INFO, data, rig_info_data(data, "first", NULL, 0));
	expect_info_export(fd, NBD_OPT_INFO, RIG_SIZE, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_INFO, NULL, 0, NULL), NBD_REP_ACK);
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "first", NULL, 0));
	expect_info_export(fd, NBD_OPT_GO, RIG_SIZE, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

static void check_export_name(uint32_t client_flags, size_t expected_bytes)
{
	struct nbd_export_name_reply reply;
	int fd = rig_connect(&rig);

	memset(&reply, 0xff, sizeof(reply));
	rig_greet(fd, client_flags);
	rig_option(fd, NBD_OPT_EXPORT_NAME, "second", 6);
	rig_recv(fd, &reply, expected_bytes);
	ck_assert_uint_eq(be64_get(reply.size), (uint64_t)RIG_SIZE * 2);
	ck_assert_uint_eq(be16_get(reply.flags), FLAGS_WRITABLE);
	for (size_t i = 0; i < sizeof(reply.zeroes); i++)
		ck_assert_uint_eq(reply.zeroes[i], expected_bytes == sizeof(reply) ? 0 : 0xff);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}

START_TEST(test_export_name)
{
	check_export_name(NBD_FLAG_C_FIXED_NEWSTYLE, 134);
	check_export_name(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES, 10);
	check_export_name(0, 134);
}
END_TEST

START_TEST(test_list)
{
	const char first[] = "\0\0\0\5firsta disk of memory", second[] = "\0\0\0\6second";
	uint32_t len;
	int fd = greeted();

	rig_option(fd, NBD_OPT_LIST, NULL, 0);
	ck_assert_uint_eq(
		rig_option_reply(fd, NBD_OPT_LIST, data, sizeof(data), &len), NBD_REP_SERVER);
	ck_assert_uint_eq(len, sizeof(first) - 1);
	ck_assert_mem_eq(data, first, len);
	ck_assert_uint_eq(
		rig_option_reply(fd, NBD_OPT_LIST, data, sizeof(data), &len), NBD_REP_SERVER);
	ck_assert_uint_eq(len, sizeof(second) - 1);
	ck_assert_mem_eq(data, second, len);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_LIST, NULL, 0, &len), NBD_REP_ACK);
	ck_assert_uint_eq(len, 0);
	abort_option(fd);
}
END_TEST

START_TEST(test_abort)
{
	int fd = greeted();

	/* Data is ignored: "NBD_OPT_ABORT". */
	rig_option(fd, NBD_OPT_ABORT, "bye", 3);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_ABORT, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);

	/* And one that does not wait for the answer. */
	fd = greeted();
	rig_option(fd, NBD_OPT_ABORT, NULL, 0);
	close(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
}
END_TEST

/* --- what is refused, and the client goes on -------------------------------------------------- */

START_TEST(test_unknown_options)
{
	const uint32_t unknown[] = { 0, 4, 12, 0x7fffffff, 0xffffffff };
	int fd = greeted();

	for (size_t i = 0; i < ARRAY_LEN(unknown); i++) {
		/* Without data, with some, and with more than any buffer of ours. */
		rig_option(fd, unknown[i], NULL, 0);
		expect_error(fd, unknown[i], NBD_REP_ERR_UNSUP);
		rig_option(fd, unknown[i], data, 100);
		expect_error(fd, unknown[i], NBD_REP_ERR_UNSUP);
		rig_option(fd, unknown[i], data, sizeof(data));
		expect_error(fd, unknown[i], NBD_REP_ERR_UNSUP);
	}
	abort_option(fd);
}
END_TEST

START_TEST(test_unknown_export)
{
	const char *const names[] = { "third", "firs", "firstx", "First" };
	int fd = greeted();

	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		uint32_t option = i % 2 ? NBD_OPT_GO : NBD_OPT_INFO;

		rig_option(fd, option, data, rig_info_data(data, names[i], NULL, 0));
		expect_error(fd, option, NBD_REP_ERR_UNKNOWN);
	}
	abort_option(fd);

	fd = greeted();
	rig_option(fd, NBD_OPT_EXPORT_NAME, "third", 5);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -ENOENT);

	/* A name with a zero byte in it is another name. */
	fd = greeted();
	rig_option(fd, NBD_OPT_EXPORT_NAME, "first\0", 6);
	rig_expect_end(fd);
}
END_TEST

START_TEST(test_bad_info_data)
{
	static const struct {
		const char *bytes;
		uint32_t len;
	} bad[] = {
		{ "", 0 },
		{ "\0\0\0\0\0", 5 },
		{ "\0\0\0\1\0\0", 6 },             /* name longer than the data */
		{ "\0\0\0\5first\0", 10 },         /* half a count */
		{ "\0\0\0\5first\0\1", 11 },       /* count without its items */
		{ "\0\0\0\5first\0\0\0", 12 },     /* bytes too many */
		{ "\0\0\0\5first\0\1\0\3\0", 14 }, /* likewise */
		{ "\xff\xff\xff\xff"
		  "first\0\0",
			11 }, /* name length near 2^32 */
		{ "\xff\xff\xff\xfa"
		  "first\0\0",
			11 },
		{ "\0\0\0\5first\xff\xff\0\3", 13 },
	};
	int fd = greeted();

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		uint32_t option = i % 2 ? NBD_OPT_GO : NBD_OPT_INFO;

		rig_option(fd, option, bad[i].bytes, bad[i].len);
		expect_error(fd, option, NBD_REP_ERR_INVALID);
	}
	rig_option(fd, NBD_OPT_GO, data, sizeof(data));
	expect_error(fd, NBD_OPT_GO, NBD_REP_ERR_TOO_BIG);
	rig_option(fd, NBD_OPT_LIST, "x", 1);
	expect_error(fd, NBD_OPT_LIST, NBD_REP_ERR_INVALID);
	abort_option(fd);
}
END_TEST

START_TEST(test_longest_name)
{
	char name[NBD_STRING_MAX_BYTES + 1];
	int fd = greeted();

	memset(name, 'n', sizeof(name));
	name[NBD_STRING_MAX_BYTES] = '\0';
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, name, NULL, 0));
	expect_error(fd, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN);
	abort_option(fd);
}
END_TEST

static suspends void read_only_second(void *arg)
{
	rig.exports[1].nbd.read_only = true;
}

START_TEST(test_read_only_flags)
{
	int fd = greeted();

	rig_run(&rig, read_only_second, NULL);
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "second", NULL, 0));
	expect_info_export(fd, NBD_OPT_GO, (uint64_t)RIG_SIZE * 2,
		NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
			NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_WRITE, 0, 0, 3, "abc"), NBD_EPERM);
	rig_disconnect(fd);
}
END_TEST

static suspends void one_client_only(void *arg)
{
	rig.exports[0].nbd.max_clients = 1;
}

START_TEST(test_export_is_full)
{
	uint16_t infos[1];
	int inside = greeted(), outside = greeted();

	rig_run(&rig, one_client_only, NULL);
	rig_option(inside, NBD_OPT_GO, data, rig_info_data(data, "first", infos, 0));
	expect_info_export(inside, NBD_OPT_GO, RIG_SIZE, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(inside, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);

	rig_option(outside, NBD_OPT_GO, data, rig_info_data(data, "first", infos, 0));
	expect_error(outside, NBD_OPT_GO, NBD_REP_ERR_POLICY);
	/* To ask is allowed all the same. */
	rig_option(outside, NBD_OPT_INFO, data, rig_info_data(data, "first", infos, 0));
	expect_info_export(outside, NBD_OPT_INFO, RIG_SIZE, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(outside, NBD_OPT_INFO, NULL, 0, NULL), NBD_REP_ACK);
	rig_expect_alive(inside);
	rig_disconnect(inside);

	/* Its place is free once it has left; other exports have been so all the time. */
	rig_option(outside, NBD_OPT_GO, data, rig_info_data(data, "second", infos, 0));
	expect_info_export(outside, NBD_OPT_GO, (uint64_t)RIG_SIZE * 2, FLAGS_WRITABLE);
	ck_assert_uint_eq(rig_option_reply(outside, NBD_OPT_GO, NULL, 0, NULL), NBD_REP_ACK);
	rig_disconnect(outside);
	rig_all_left(&rig);

	inside = greeted();
	rig_option(inside, NBD_OPT_EXPORT_NAME, "first", 5);
	rig_recv(inside, data, 10);
	outside = greeted();
	rig_option(outside, NBD_OPT_EXPORT_NAME, "first", 5);
	rig_expect_end(outside);
	rig_disconnect(inside);
}
END_TEST

/* --- what ends the connection ----------------------------------------------------------------- */

START_TEST(test_unknown_client_flags)
{
	int fd = rig_connect(&rig);

	rig_greet(fd, 4 | NBD_FLAG_C_FIXED_NEWSTYLE);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

START_TEST(test_bad_option_magic)
{
	int fd = greeted();

	rig_send(fd, "IHAVEOPX\0\0\0\3\0\0\0\0", 16);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

START_TEST(test_absurd_lengths)
{
	const uint32_t lens[] = { (1U << 20) + 1, 1U << 31, UINT32_MAX };
	const uint32_t numbers[] = { NBD_OPT_GO, NBD_OPT_EXPORT_NAME, NBD_OPT_LIST, 99 };

	for (size_t i = 0; i < ARRAY_LEN(lens) * ARRAY_LEN(numbers); i++) {
		int fd = greeted();

		rig_option_header(
			fd, numbers[i % ARRAY_LEN(numbers)], lens[i / ARRAY_LEN(numbers)]);
		rig_expect_end(fd);
		ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
	}
}
END_TEST

START_TEST(test_too_many_options)
{
	int fd = greeted();

	for (unsigned i = 0; i < nbd_limits_default.handshake_options; i++) {
		rig_option(fd, 99, NULL, 0);
		expect_error(fd, 99, NBD_REP_ERR_UNSUP);
	}
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

/* Cut off after every single byte of a whole handshake. */
START_TEST(test_vanishes)
{
	uint8_t bytes[256];
	be32 flags = be32_make(NBD_FLAG_C_FIXED_NEWSTYLE);
	struct nbd_option_header header = { .magic = be64_make(NBD_OPTION_MAGIC),
		.option = be32_make(NBD_OPT_GO) };
	size_t len = rig_info_data(data, "first", NULL, 0);

	header.len = be32_make((uint32_t)len);
	memcpy(bytes, &flags, sizeof(flags));
	memcpy(bytes + sizeof(flags), &header, sizeof(header));
	memcpy(bytes + sizeof(flags) + sizeof(header), data, len);
	len += sizeof(flags) + sizeof(header);

	for (size_t i = 0; i <= len; i++) {
		int fd = rig_connect(&rig);

		rig_send(fd, bytes, i);
		if (i % 2)
			shutdown(fd, SHUT_WR); /* half a close */
		else
			close(fd);
		int ret = rig_all_left(&rig);
		if (i < len)
			ck_assert_msg(ret == -ECONNRESET || ret == -EPIPE, "%zu: %d", i, ret);
		if (i % 2)
			close(fd);
	}
}
END_TEST

/* --- time and end ----------------------------------------------------------------------------- */

static suspends void set_deadline(void *arg)
{
	rig.server.limits.handshake_ns = *(uint64_t *)arg;
}

START_TEST(test_silent_client)
{
	struct {
		be32 client_flags;
		struct nbd_option_header header;
		char half[4];
	} option = {
		.client_flags = be32_make(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES),
		.header = { be64_make(NBD_OPTION_MAGIC), be32_make(NBD_OPT_GO), be32_make(100) },
		.half = "half",
	};
	struct nbd_greeting greeting;
	uint64_t hasty_ns = 50 * NS_PER_MS;
	int fd;

	rig_run(&rig, set_deadline, &hasty_ns);
	fd = rig_connect(&rig);
	rig_recv(fd, &greeting, sizeof(greeting));
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -ETIMEDOUT);

	/* In the middle of an option, and one that keeps the server busy. */
	fd = rig_connect_with(&rig, NULL, (struct nbd_session){ 0 }, &option, sizeof(option));
	rig_recv(fd, &greeting, sizeof(greeting));
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -ETIMEDOUT);
}
END_TEST

static suspends void withdraw_first(void *arg)
{
	nbd_withdraw(&rig.exports[0].nbd, 0);
}

START_TEST(test_withdrawn_export)
{
	uint32_t len;
	int fd = greeted();

	rig_run(&rig, withdraw_first, NULL);
	rig_option(fd, NBD_OPT_GO, data, rig_info_data(data, "first", NULL, 0));
	expect_error(fd, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN);
	rig_option(fd, NBD_OPT_LIST, NULL, 0);
	ck_assert_uint_eq(
		rig_option_reply(fd, NBD_OPT_LIST, data, sizeof(data), &len), NBD_REP_SERVER);
	ck_assert_mem_eq(data, "\0\0\0\6second", len);
	ck_assert_uint_eq(rig_option_reply(fd, NBD_OPT_LIST, NULL, 0, &len), NBD_REP_ACK);
	abort_option(fd);
}
END_TEST

static suspends void close_server(void *arg)
{
	nbd_server_close(&rig.server, 0);
}

START_TEST(test_server_closes)
{
	uint64_t patient_ns = 3600 * NS_PER_SEC;
	int fd, half;

	rig_run(&rig, set_deadline, &patient_ns); /* it does not help */
	fd = greeted();
	half = greeted();
	rig_send(half, "IHAVE", 5);
	rig_run(&rig, close_server, NULL);
	rig_expect_end(fd);
	rig_expect_end(half);
	/* And lets nobody in any more. */
	fd = rig_connect(&rig);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -ESHUTDOWN);
}
END_TEST

static suspends void publish_bad(void *arg)
{
	struct nbd_export export;
	static char long_name[NBD_STRING_MAX_BYTES + 2];
	struct err err;

	memset(long_name, 'x', sizeof(long_name) - 1);
	nbd_export_init(&export, "first", NULL, rig.exports[0].top, rig.reactor, false);
	ck_assert_int_eq(nbd_publish(&rig.server, &export, &err), -EEXIST);
	export.name = "";
	ck_assert_int_eq(nbd_publish(&rig.server, &export, &err), -EINVAL);
	export.name = long_name;
	ck_assert_int_eq(nbd_publish(&rig.server, &export, &err), -ENAMETOOLONG);
	export.name = "third";
	export.description = long_name;
	ck_assert_int_eq(nbd_publish(&rig.server, &export, &err), -ENAMETOOLONG);
}

START_TEST(test_publish)
{
	rig_run(&rig, publish_bad, NULL);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_go);
	tcase_add_test(tcase, test_go_with_all_infos);
	tcase_add_test(tcase, test_info_then_go);
	tcase_add_test(tcase, test_export_name);
	tcase_add_test(tcase, test_list);
	tcase_add_test(tcase, test_abort);
	tcase_add_test(tcase, test_unknown_options);
	tcase_add_test(tcase, test_unknown_export);
	tcase_add_test(tcase, test_bad_info_data);
	tcase_add_test(tcase, test_longest_name);
	tcase_add_test(tcase, test_read_only_flags);
	tcase_add_test(tcase, test_export_is_full);
	tcase_add_test(tcase, test_unknown_client_flags);
	tcase_add_test(tcase, test_bad_option_magic);
	tcase_add_test(tcase, test_absurd_lengths);
	tcase_add_test(tcase, test_too_many_options);
	tcase_add_test(tcase, test_vanishes);
	tcase_add_test(tcase, test_withdrawn_export);
	tcase_add_test(tcase, test_publish);
	tcase_add_test(tcase, test_silent_client);
	tcase_add_test(tcase, test_server_closes);
}

int main(void)
{
	return test_run_suite("nbd handshake", fill);
}
