/*
 * Transmission, byte by byte: every command, flag and error, in sequence and in bursts.
 */
#include "nbd_rig.h"

static struct rig rig;
static uint8_t *out, *in; /* scratch of the longest request, and more */

#define SCRATCH_BYTES (BLK_REQUEST_MAX + 4096)

static void setup(void)
{
	rig_start(&rig, NULL, NULL);
	out = malloc(SCRATCH_BYTES);
	in = malloc(SCRATCH_BYTES);
	for (size_t i = 0; i < SCRATCH_BYTES; i++)
		out[i] = (uint8_t)(i * 2654435761U >> 13);
}

static void teardown(void)
{
	rig_stop(&rig);
	free(out);
	free(in);
}

static void expect_content(int fd, uint64_t off, uint32_t len, const uint8_t *expected)
{
	rig_read(fd, off, in, len);
	ck_assert_mem_eq(in, expected, len);
}

static void expect_zeroes(int fd, uint64_t off, uint32_t len)
{
	static const uint8_t zeroes[RIG_SIZE];

	expect_content(fd, off, len, zeroes);
}

/* --- commands --------------------------------------------------------------------------------- */

START_TEST(test_read_write)
{
	/* Around the sizes at which a payload changes its way: in place, gathered in place, own buffer. */
	const uint32_t lens[] = { 0, 1, 2, 511, 512, 4095, 4096, 65535, 65536, 65537, 262100,
		262116, 262144, 262145, 1048576, 5000000 };
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
		uint64_t off = 1000 + i;

		rig_write(fd, off, out + i, lens[i]);
		expect_content(fd, off, lens[i], out + i);
		expect_zeroes(fd, off + lens[i], 100);
	}
	rig_disconnect(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
}
END_TEST

START_TEST(test_whole_disk)
{
	int fd = rig_serve(&rig);

	rig_write(fd, 0, out, RIG_SIZE);
	expect_content(fd, 0, RIG_SIZE, out);
	rig_write(fd, RIG_SIZE - 1, "!", 1);
	expect_content(fd, RIG_SIZE - 1, 1, (const uint8_t *)"!");
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_zero_and_trim)
{
	const uint16_t zero_flags[] = { 0, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FUA,
		NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE };
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(zero_flags); i++) {
		rig_write(fd, 0, out, 100000);
		ck_assert_uint_eq(
			rig_command(fd, NBD_CMD_WRITE_ZEROES, zero_flags[i], 5, 70001, NULL),
			NBD_SUCCESS);
		expect_content(fd, 0, 5, out);
		expect_zeroes(fd, 5, 70001);
		expect_content(fd, 70006, 1000, out + 70006);
	}
	rig_write(fd, 0, out, 100000);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_TRIM, 0, 4097, 80000, NULL), NBD_SUCCESS);
	expect_content(fd, 0, 4097, out);
	expect_zeroes(fd, 4097, 80000);
	expect_content(fd, 84097, 1000, out + 84097);
	/* The whole disk, longer than any payload may be. */
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 0, RIG_SIZE, NULL), NBD_SUCCESS);
	expect_zeroes(fd, 0, RIG_SIZE);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_fast_zero)
{
	int fd = rig_serve(&rig);

	rig_write(fd, 0, out, 4096);
	uint32_t error = rig_command(
		fd, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 0, 4096, NULL);
	ck_assert(error == NBD_SUCCESS || error == NBD_ENOTSUP);
	if (error)
		expect_content(fd, 0, 4096, out);
	else
		expect_zeroes(fd, 0, 4096);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_flush)
{
	int fd = rig_serve(&rig);

	rig_write(fd, 0, out, 4096);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_FLUSH, 0, 0, 0, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0, NULL), NBD_SUCCESS);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_fua)
{
	int fd = rig_serve(&rig);

	/* Allowed on every command, also where it means nothing: "Command flags". */
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 9, 4096, out), NBD_SUCCESS);
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_READ, NBD_CMD_FLAG_FUA, 9, 4096, NULL), NBD_SUCCESS);
	rig_recv(fd, in, 4096);
	ck_assert_mem_eq(in, out, 4096);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_zero_length)
{
	const uint16_t types[] = { NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM,
		NBD_CMD_WRITE_ZEROES };
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(types); i++) {
		ck_assert_uint_eq(rig_command(fd, types[i], 0, 0, 0, NULL), NBD_SUCCESS);
		ck_assert_uint_eq(rig_command(fd, types[i], 0, RIG_SIZE, 0, NULL), NBD_SUCCESS);
		ck_assert_uint_ne(rig_command(fd, types[i], 0, RIG_SIZE + 1, 0, NULL), NBD_SUCCESS);
	}
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

/* --- errors: the right one, and the connection lives on --------------------------------------- */

START_TEST(test_out_of_range)
{
	static const struct {
		uint64_t off;
		uint32_t len;
	} ranges[] = {
		{ RIG_SIZE, 1 },
		{ RIG_SIZE - 1, 2 },
		{ 0, RIG_SIZE + 1 },
		{ RIG_SIZE + 4096, 4096 },
		{ UINT64_MAX, 1 },
		{ UINT64_MAX - 4095, 4096 },
		{ UINT64_MAX - 10, 4096 },
		{ 1ULL << 63, 512 },
		{ (1ULL << 63) - 512, 1024 },
		{ 1ULL << 62, 512 },
	};
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(ranges); i++) {
		uint64_t off = ranges[i].off;
		uint32_t len = ranges[i].len;

		ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, off, len, NULL), NBD_EINVAL);
		ck_assert_uint_eq(rig_command(fd, NBD_CMD_TRIM, 0, off, len, NULL), NBD_EINVAL);
		ck_assert_uint_eq(
			rig_command(fd, NBD_CMD_WRITE_ZEROES, 0, off, len, NULL), NBD_ENOSPC);
		ck_assert_uint_eq(rig_command(fd, NBD_CMD_WRITE, 0, off, len, out), NBD_ENOSPC);
		rig_expect_alive(fd);
	}
	expect_zeroes(fd, RIG_SIZE - 1, 1);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_TRIM, 0, 0, UINT32_MAX, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_WRITE_ZEROES, 0, 0, UINT32_MAX, NULL), NBD_ENOSPC);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_too_long)
{
	int fd = rig_serve(&rig);

	/* Longer than any payload we take: refused and skipped, as long as that is bearable. */
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_READ, 0, 0, BLK_REQUEST_MAX + 1, NULL), NBD_EINVAL);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, 0, UINT32_MAX, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_WRITE, 0, 0, BLK_REQUEST_MAX + 1, out), NBD_EINVAL);
	expect_zeroes(fd, 0, 4096);
	rig_expect_alive(fd);

	/* No client means this. */
	rig_request(fd, NBD_CMD_WRITE, 0, 1, 0, UINT32_MAX);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

/* Reads into nothing: any range, at most as long as a read. */
START_TEST(test_cache)
{
	int fd = rig_serve(&rig);

	ck_assert_uint_eq(rig_command(fd, NBD_CMD_CACHE, 0, 1, 1000000, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_CACHE, 0, RIG_SIZE, 0, NULL), NBD_SUCCESS);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_CACHE, 0, RIG_SIZE, 1, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		rig_command(fd, NBD_CMD_CACHE, 0, 0, BLK_REQUEST_MAX + 1, NULL), NBD_EOVERFLOW);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_unknown_commands)
{
	const uint16_t types[] = { 8, 9, 255, 256, 32767, 65535 };
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(types); i++)
		ck_assert_uint_eq(rig_command(fd, types[i], 0, 0, 512, NULL), NBD_EINVAL);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_flags)
{
	static const struct {
		uint16_t type, allowed;
	} commands[] = {
		{ NBD_CMD_READ, NBD_CMD_FLAG_FUA }, { NBD_CMD_WRITE, NBD_CMD_FLAG_FUA },
		{ NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA }, { NBD_CMD_TRIM, NBD_CMD_FLAG_FUA },
		{ NBD_CMD_WRITE_ZEROES,
			NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO },
		{ NBD_CMD_CACHE, NBD_CMD_FLAG_FUA },
		{ NBD_CMD_BLOCK_STATUS, 0 }, /* there is no context */
	};
	int fd = rig_serve(&rig);

	for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
		for (unsigned bit = 0; bit < 16; bit++) {
			uint16_t flag = (uint16_t)(1U << bit), type = commands[i].type;
			uint32_t len = type == NBD_CMD_FLUSH ? 0 : 100;
			const uint8_t *payload = type == NBD_CMD_WRITE ? out : NULL;
			uint32_t error = rig_command(fd, type, flag, 0, len, payload);

			if (!(commands[i].allowed & flag)) {
				ck_assert_uint_eq(error, NBD_EINVAL);
				continue;
			}
			ck_assert(
				!error || (flag == NBD_CMD_FLAG_FAST_ZERO && error == NBD_ENOTSUP));
			if (type == NBD_CMD_READ)
				rig_recv(fd, in, len);
		}
	}
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_FLUSH, 0, 512, 0, NULL), NBD_EINVAL);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_FLUSH, 0, 0, 512, NULL), NBD_EINVAL);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_read_only)
{
	const uint32_t lens[] = { 1, 4096, 100000, 1000000 };
	int writer = rig_serve(&rig), fd = rig_connect_to(&rig, &rig.exports[0].nbd, true);

	rig_write(writer, 0, out, 4096);
	for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
		ck_assert_uint_eq(
			rig_command(fd, NBD_CMD_WRITE, 0, 0, lens[i], out + 1), NBD_EPERM);
		ck_assert_uint_eq(rig_command(fd, NBD_CMD_TRIM, 0, 0, lens[i], NULL), NBD_EPERM);
		ck_assert_uint_eq(
			rig_command(fd, NBD_CMD_WRITE_ZEROES, 0, 0, lens[i], NULL), NBD_EPERM);
	}
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_WRITE, 0, RIG_SIZE, 1, out), NBD_EPERM);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_FLUSH, 0, 0, 0, NULL), NBD_SUCCESS);
	expect_content(fd, 0, 4096, out);
	rig_disconnect(fd);
	rig_expect_alive(writer);
	rig_disconnect(writer);
}
END_TEST

START_TEST(test_bad_magic)
{
	int fd = rig_serve(&rig);
	struct nbd_request_header header = rig_header(NBD_CMD_READ, 0, 7, 0, 16);

	/* What was asked before is still answered. */
	rig_send(fd, &header, sizeof(header));
	header.magic = be32_make(NBD_SIMPLE_REPLY_MAGIC);
	rig_send(fd, &header, sizeof(header));
	ck_assert_uint_eq(rig_reply(fd, 7), NBD_SUCCESS);
	rig_recv(fd, in, 16);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

START_TEST(test_nothing_after_disconnect)
{
	struct {
		struct nbd_request_header disconnect, write;
		uint8_t payload[512];
	} bytes = { rig_header(NBD_CMD_DISC, 0, 1, 0, 0), rig_header(NBD_CMD_WRITE, 0, 2, 0, 512),
		"written" };
	int fd = rig_serve(&rig);

	rig_send(fd, &bytes, sizeof(bytes));
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
	fd = rig_serve(&rig);
	expect_zeroes(fd, 0, 512);
	rig_disconnect(fd);
}
END_TEST

/* --- bursts ----------------------------------------------------------------------------------- */

#define BURST 1000
static uint8_t burst[BURST * (sizeof(struct nbd_request_header) + 512)];

/* Requests in one piece, answered in any order, each exactly once. */
START_TEST(test_burst_of_reads)
{
	int fd = rig_serve(&rig);
	static bool seen[BURST];
	struct nbd_request_header *headers = (void *)burst;

	memset(seen, 0, sizeof(seen));
	rig_write(fd, 0, out, BURST * 4096);
	for (unsigned i = 0; i < BURST; i++)
		headers[i] = rig_header(NBD_CMD_READ, 0, i, (uint64_t)i * 4096, 4096);
	rig_send(fd, headers, sizeof(*headers) * BURST);
	for (unsigned i = 0; i < BURST; i++) {
		uint64_t cookie;

		ck_assert_uint_eq(rig_any_reply(fd, &cookie), NBD_SUCCESS);
		ck_assert_uint_lt(cookie, BURST);
		ck_assert(!seen[cookie]);
		seen[cookie] = true;
		rig_recv(fd, in, 4096);
		ck_assert_mem_eq(in, out + cookie * 4096, 4096);
	}
	rig_disconnect(fd);
}
END_TEST

/* The same, mixed, cut into pieces at random places. */
START_TEST(test_burst_in_pieces)
{
	struct seed seed = seed_start("burst in pieces");
	int fd = rig_serve(&rig);

	for (unsigned round = 0; round < 50; round++) {
		size_t len = 0, sent = 0;
		static uint32_t errors[BURST];
		const unsigned count = 200;

		for (unsigned i = 0; i < count; i++) {
			bool refused = seed_below(&seed, 4) == 0;
			uint32_t bytes = (uint32_t)seed_below(&seed, 512);
			uint64_t off = refused ? RIG_SIZE : i * 512;
			struct nbd_request_header header = rig_header(
				NBD_CMD_WRITE, 0, i, off, bytes);

			errors[i] = refused && bytes ? NBD_ENOSPC : NBD_SUCCESS;
			memcpy(burst + len, &header, sizeof(header));
			memcpy(burst + len + sizeof(header), out + off % RIG_SIZE + round, bytes);
			len += sizeof(header) + bytes;
		}
		while (sent < len) {
			size_t piece = MIN(len - sent, (size_t)seed_below(&seed, 3000) + 1);

			rig_send(fd, burst + sent, piece);
			sent += piece;
		}
		for (unsigned i = 0; i < count; i++) {
			uint64_t cookie;
			uint32_t error = rig_any_reply(fd, &cookie);

			ck_assert_uint_lt(cookie, count);
			ck_assert_uint_eq(error, errors[cookie]);
			errors[cookie] = UINT32_MAX;
		}
	}
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

/* Random reads and writes of all sizes against a copy in memory. */
START_TEST(test_random_against_copy)
{
	struct seed seed = seed_start("random against copy");
	uint8_t *copy = calloc(1, RIG_SIZE);
	int fd = rig_serve(&rig);

	for (unsigned i = 0; i < 1500; i++) {
		uint32_t len = (uint32_t)seed_below(&seed, 2U << seed_below(&seed, 20));
		uint64_t off = seed_below(&seed, RIG_SIZE - len);
		unsigned what = (unsigned)seed_below(&seed, 8);

		if (what < 3) {
			rig_read(fd, off, in, len);
			ck_assert_mem_eq(in, copy + off, len);
		} else if (what < 6) {
			memcpy(copy + off, out + i, len);
			rig_write(fd, off, out + i, len);
		} else {
			memset(copy + off, 0, len);
			ck_assert_uint_eq(
				rig_command(fd, what == 6 ? NBD_CMD_TRIM : NBD_CMD_WRITE_ZEROES, 0,
					off, len, NULL),
				NBD_SUCCESS);
		}
	}
	rig_disconnect(fd);
	free(copy);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_read_write);
	tcase_add_test(tcase, test_whole_disk);
	tcase_add_test(tcase, test_zero_and_trim);
	tcase_add_test(tcase, test_fast_zero);
	tcase_add_test(tcase, test_flush);
	tcase_add_test(tcase, test_fua);
	tcase_add_test(tcase, test_zero_length);
	tcase_add_test(tcase, test_out_of_range);
	tcase_add_test(tcase, test_too_long);
	tcase_add_test(tcase, test_cache);
	tcase_add_test(tcase, test_unknown_commands);
	tcase_add_test(tcase, test_flags);
	tcase_add_test(tcase, test_read_only);
	tcase_add_test(tcase, test_bad_magic);
	tcase_add_test(tcase, test_nothing_after_disconnect);
	tcase_add_test(tcase, test_burst_of_reads);
	tcase_add_test(tcase, test_burst_in_pieces);
	tcase_add_test(tcase, test_random_against_copy);
}

int main(void)
{
	return test_run_suite("nbd transmission", fill);
}
