/*
 * Replies in chunks, byte by byte: every chunk type, every flag and error that exists only here. Each test
 * runs in both forms, structured and extended; the last ones are about extended headers alone.
 *
 * The disk is sparse and larger than 32 bits can say, with a fault layer on top that fails when told to.
 */
#define RIG_FIRST_SIZE (UINT64_C(12) << 30)
#include "nbd_chunks.h"

#include "blk/fault.h"

static struct rig rig;
static struct fault_rules rules;
static uint8_t out[1 << 20], in[1 << 20], zeroes[1 << 20];

static void setup(void)
{
	struct seed seed = seed_start("chunks");

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = (uint8_t)(1 + seed_below(&seed, 255));
	rules = (struct fault_rules){ 0 };
	rig_start(&rig, NULL, "{ layer = 'fault'; },");
}

static void teardown(void)
{
	rig_stop(&rig);
}

static suspends void set_rules(void *arg)
{
	fault_set(fault_find(rig.exports[0].top), &rules);
}

static struct chunk_client client_of(enum nbd_form form)
{
	return chunk_connect(
		&rig, (struct nbd_session){ .form = form, .contexts = 1U << NBD_ALLOCATION_ID });
}

static const enum nbd_form forms[] = { NBD_STRUCTURED, NBD_EXTENDED };

/* --- reads ------------------------------------------------------------------------------------ */

START_TEST(test_data)
{
	const uint32_t lens[] = { 1, 512, 4096, 65536, 1 << 20 };
	struct chunk_client client = client_of(forms[_i]);

	chunk_write(&client, 12345, out, sizeof(out));
	for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
		struct chunk_read read = chunk_read(&client, 0, 12345, in, lens[i]);

		ck_assert_uint_eq(read.error, 0);
		ck_assert_uint_eq(read.data_chunks, 1);
		ck_assert_uint_eq(read.data_bytes, lens[i]);
		ck_assert_mem_eq(in, out, lens[i]);
	}
	chunk_disconnect(&client);
}
END_TEST

START_TEST(test_holes)
{
	struct chunk_client client = client_of(forms[_i]);

	chunk_write(&client, 256 << 10, out, 128 << 10);
	struct chunk_read read = chunk_read(&client, 0, 0, in, 1 << 20);
	ck_assert_uint_eq(read.hole_chunks, 2);
	ck_assert_uint_eq(read.data_chunks, 1);
	ck_assert_uint_eq(read.data_bytes, 128 << 10);
	ck_assert_mem_eq(in, zeroes, 256 << 10);
	ck_assert_mem_eq(in + (256 << 10), out, 128 << 10);

	read = chunk_read(&client, 0, 4 << 20, in, 1 << 20);
	ck_assert_uint_eq(read.hole_chunks, 1);
	ck_assert_uint_eq(read.hole_bytes, 1 << 20);
	chunk_disconnect(&client);
}
END_TEST

/* All in one piece when asked for, zeroes and all. */
START_TEST(test_do_not_fragment)
{
	struct chunk_client client = client_of(forms[_i]);

	chunk_write(&client, 256 << 10, out, 128 << 10);
	memset(in, 0xff, sizeof(in));
	struct chunk_read read = chunk_read(&client, NBD_CMD_FLAG_DF, 0, in, 1 << 20);
	ck_assert_uint_eq(read.data_chunks, 1);
	ck_assert_uint_eq(read.hole_chunks, 0);
	ck_assert_mem_eq(in, zeroes, 256 << 10);
	ck_assert_mem_eq(in + (256 << 10), out, 128 << 10);
	ck_assert_mem_eq(in + (384 << 10), zeroes, 640 << 10);
	chunk_disconnect(&client);
}
END_TEST

/* More holes than a reply names: what is left over comes as data, and everything is right. */
START_TEST(test_many_holes)
{
	struct chunk_client client = client_of(forms[_i]);
	const uint32_t step = 8192;

	for (uint32_t off = 0; off < sizeof(in); off += step)
		chunk_write(&client, off, out + off, 4096);
	memset(in, 0xff, sizeof(in));
	struct chunk_read read = chunk_read(&client, 0, 0, in, sizeof(in));
	ck_assert_uint_gt(read.hole_chunks, 1);
	ck_assert_uint_le(read.hole_chunks + read.data_chunks, NBD_READ_EXTENTS_MAX);
	for (uint32_t off = 0; off < sizeof(in); off += step) {
		ck_assert_mem_eq(in + off, out + off, 4096);
		ck_assert_mem_eq(in + off + 4096, zeroes, step - 4096);
	}
	chunk_disconnect(&client);
}
END_TEST

/* Random sparse content, random ranges; many at a time, so that replies are sent in halves. */
START_TEST(test_random_reads)
{
	struct seed seed = seed_start("random chunks");
	uint8_t *copy = calloc(1, 2 << 20);
	struct chunk_client client = client_of(forms[_i]);

	for (unsigned i = 0; i < 300; i++) {
		uint32_t len = (uint32_t)seed_below(&seed, 1U << seed_below(&seed, 20)) + 1;
		uint64_t off = seed_below(&seed, (2 << 20) - len);

		if (seed_below(&seed, 3)) {
			uint16_t flags = seed_below(&seed, 4) ? 0 : NBD_CMD_FLAG_DF;

			ck_assert_uint_eq(chunk_read(&client, flags, off, in, len).error, 0);
			ck_assert_mem_eq(in, copy + off, len);
		} else if (seed_below(&seed, 2)) {
			len = MIN(len, 20000U);
			memcpy(copy + off, out + i, len);
			chunk_write(&client, off, out + i, len);
		} else {
			memset(copy + off, 0, len);
			ck_assert_uint_eq(
				chunk_command(&client, NBD_CMD_TRIM, 0, off, len, NULL), 0);
		}
	}
	chunk_disconnect(&client);
	free(copy);
}
END_TEST

/* --- errors ----------------------------------------------------------------------------------- */

START_TEST(test_refusals)
{
	struct chunk_client client = client_of(forms[_i]);

	ck_assert_uint_eq(chunk_read(&client, 0, RIG_FIRST_SIZE, in, 1).error, NBD_EINVAL);
	ck_assert_uint_eq(chunk_read(&client, NBD_CMD_FLAG_NO_HOLE, 0, in, 1).error, NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_WRITE, 0, RIG_FIRST_SIZE, 4, out), NBD_ENOSPC);
	ck_assert_uint_eq(chunk_command(&client, 99, 0, 0, 0, NULL), NBD_EINVAL);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_FLUSH, 0, 1, 0, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_TRIM, NBD_CMD_FLAG_DF, 0, 1, NULL), NBD_EINVAL);
	/* Too long a read says so here, and only here. */
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_READ, 0, 0, BLK_REQUEST_MAX + 1, NULL),
		NBD_EOVERFLOW);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_CACHE, 0, 0, BLK_REQUEST_MAX + 1, NULL),
		NBD_EOVERFLOW);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_READ, 0, 0, 0, NULL), NBD_SUCCESS);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);

	client = chunk_connect(&rig, (struct nbd_session){ .form = forms[_i], .read_only = true });
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_WRITE, 0, 0, 4, out), NBD_EPERM);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_TRIM, 0, 0, 4, NULL), NBD_EPERM);
	chunk_disconnect(&client);
}
END_TEST

START_TEST(test_failing_disk)
{
	struct chunk_client client = client_of(forms[_i]);

	chunk_write(&client, 0, out, 64 << 10);
	chunk_write(&client, 128 << 10, out, 64 << 10);
	rules = (struct fault_rules){
		.ops = FAULT_READ | FAULT_WRITE | FAULT_FLUSH,
		.from = 128 << 10,
		.to = 192 << 10,
		.error = EIO,
		.permille = 1000,
	};
	rig_run(&rig, set_rules, NULL);
	/* A read that fails as a whole: no data, and the place where it began. */
	struct chunk_read read = chunk_read(&client, 0, 128 << 10, in, 4096);
	ck_assert_uint_eq(read.error, NBD_EIO);
	ck_assert_uint_eq(read.error_off, 128 << 10);
	ck_assert_uint_eq(read.data_chunks, 0);
	/* After data: that arrives, and the error says from where on there is none. */
	memset(in, 0, sizeof(in));
	read = chunk_read(&client, 0, 0, in, 256 << 10);
	ck_assert_uint_eq(read.error, NBD_EIO);
	ck_assert_uint_eq(read.error_off, 128 << 10);
	ck_assert_uint_eq(read.data_bytes, 64 << 10);
	ck_assert_uint_eq(read.hole_bytes, 64 << 10);
	ck_assert_mem_eq(in, out, 64 << 10);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_WRITE, 0, 128 << 10, 4, out), NBD_EIO);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_CACHE, 0, 128 << 10, 4, NULL), NBD_EIO);
	rules = (struct fault_rules){ 0 };
	rig_run(&rig, set_rules, NULL);
	ck_assert_uint_eq(chunk_read(&client, 0, 0, in, 256 << 10).error, 0);
	chunk_disconnect(&client);
}
END_TEST

/* --- cache ------------------------------------------------------------------------------------ */

START_TEST(test_cache)
{
	struct chunk_client client = client_of(forms[_i]);

	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_CACHE, 0, 1, 1000000, NULL), 0);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_CACHE, 0, 0, 0, NULL), 0);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_CACHE, 0, RIG_FIRST_SIZE, 1, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_CACHE, NBD_CMD_FLAG_DF, 0, 1, NULL), NBD_EINVAL);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* --- block status ----------------------------------------------------------------------------- */

#define HOLE (NBD_STATE_HOLE | NBD_STATE_ZERO)

struct status {
	unsigned count;
	uint64_t len[300];
	uint64_t flags[300];
};

/* The descriptors of a successful reply that has just been asked for. */
static struct status status_reply_of(struct chunk_client *client, unsigned context, bool last)
{
	static struct chunk chunk;
	static struct status status;
	bool extended = client->form == NBD_EXTENDED;
	size_t fixed = extended ? 8 : 4, each = extended ? 16 : 8;

	chunk_recv(client, &chunk);
	ck_assert(!chunk.simple);
	ck_assert_uint_eq(
		chunk.type, extended ? NBD_REPLY_BLOCK_STATUS_EXT : NBD_REPLY_BLOCK_STATUS);
	ck_assert_uint_eq(chunk.flags, last ? NBD_REPLY_FLAG_DONE : 0);
	ck_assert_uint_gt(chunk.len, fixed);
	ck_assert_uint_eq((chunk.len - fixed) % each, 0);
	ck_assert_uint_eq(get32(chunk.payload), context);
	status.count = (unsigned)((chunk.len - fixed) / each);
	ck_assert_uint_le(status.count, ARRAY_LEN(status.len));
	if (extended)
		ck_assert_uint_eq(get32(chunk.payload + 4), status.count);
	for (unsigned i = 0; i < status.count; i++) {
		const uint8_t *at = chunk.payload + fixed + i * each;

		status.len[i] = extended ? get64(at) : get32(at);
		status.flags[i] = extended ? get64(at + 8) : get32(at + 4);
		ck_assert_uint_gt(status.len[i], 0);
	}
	return status;
}

static struct status status_reply(struct chunk_client *client)
{
	return status_reply_of(client, NBD_ALLOCATION_ID, true);
}

static struct status status_of(
	struct chunk_client *client, uint16_t flags, uint64_t off, uint64_t len)
{
	chunk_request(client, NBD_CMD_BLOCK_STATUS, flags, off, len);
	return status_reply(client);
}

START_TEST(test_block_status)
{
	struct chunk_client client = client_of(forms[_i]);

	chunk_write(&client, 1 << 20, out, 64 << 10);
	struct status status = status_of(&client, 0, 0, 4 << 20);
	ck_assert_uint_eq(status.count, 3);
	ck_assert_uint_eq(status.len[0], 1 << 20);
	ck_assert_uint_eq(status.flags[0], HOLE);
	ck_assert_uint_eq(status.len[1], 64 << 10);
	ck_assert_uint_eq(status.flags[1], 0);
	ck_assert_uint_eq(status.len[2], (3 << 20) - (64 << 10));
	ck_assert_uint_eq(status.flags[2], HOLE);

	status = status_of(&client, NBD_CMD_FLAG_REQ_ONE, 4096, 4 << 20);
	ck_assert_uint_eq(status.count, 1);
	ck_assert_uint_eq(status.len[0], (1 << 20) - 4096);
	status = status_of(&client, NBD_CMD_FLAG_REQ_ONE, 4096, 512);
	ck_assert_uint_eq(status.count, 1);
	ck_assert_uint_eq(status.len[0], 512);
	/* The longest range that 32 bits can say. */
	status = status_of(&client, 0, 2 << 20, UINT32_MAX);
	ck_assert_uint_eq(status.count, 1);
	ck_assert_uint_eq(status.len[0], UINT32_MAX);
	chunk_disconnect(&client);
}
END_TEST

/* Two contexts: a chunk each, for the same range; and each alone. */
START_TEST(test_two_contexts)
{
	struct chunk_client client = chunk_connect(
		&rig, (struct nbd_session){ .form = forms[_i],
			      .contexts = 1U << NBD_ALLOCATION_ID | 1U << NBD_DEPTH_ID });

	chunk_write(&client, 1 << 20, out, 64 << 10);
	for (unsigned round = 0; round < 2; round++) {
		uint16_t flags = round ? NBD_CMD_FLAG_REQ_ONE : 0;

		chunk_request(&client, NBD_CMD_BLOCK_STATUS, flags, 0, 4 << 20);
		struct status allocation = status_reply_of(&client, NBD_ALLOCATION_ID, false);
		struct status depth = status_reply_of(&client, NBD_DEPTH_ID, true);
		ck_assert_uint_eq(allocation.count, round ? 1 : 3);
		ck_assert_uint_eq(depth.count, allocation.count);
		for (unsigned i = 0; i < depth.count; i++) {
			ck_assert_uint_eq(depth.len[i], allocation.len[i]);
			ck_assert_uint_eq(allocation.flags[i], i == 1 ? 0 : HOLE);
			ck_assert_uint_eq(depth.flags[i], i == 1);
		}
	}
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, RIG_FIRST_SIZE, 1, NULL),
		NBD_EINVAL);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);

	client = chunk_connect(
		&rig, (struct nbd_session){ .form = forms[_i], .contexts = 1U << NBD_DEPTH_ID });
	chunk_request(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 4 << 20);
	ck_assert_uint_eq(status_reply_of(&client, NBD_DEPTH_ID, true).count, 3);
	chunk_disconnect(&client);
}
END_TEST

START_TEST(test_block_status_many)
{
	struct chunk_client client = client_of(forms[_i]);

	for (unsigned i = 0; i < 100; i++)
		chunk_write(&client, i * 8192, out, 4096);
	struct status status = status_of(&client, 0, 0, 100 * 8192);
	ck_assert_uint_eq(status.count, 200);
	for (unsigned i = 0; i < status.count; i++) {
		ck_assert_uint_eq(status.len[i], 4096);
		ck_assert_uint_eq(status.flags[i], i % 2 ? HOLE : 0);
	}
	chunk_disconnect(&client);
}
END_TEST

START_TEST(test_block_status_refused)
{
	struct chunk_client client = client_of(forms[_i]);

	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 0, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, RIG_FIRST_SIZE - 1, 2, NULL),
		NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_DF, 0, 512, NULL),
		NBD_EINVAL);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);

	client = chunk_connect(&rig, (struct nbd_session){ .form = forms[_i] });
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 512, NULL), NBD_EINVAL);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* --- flags ------------------------------------------------------------------------------------ */

static const struct flags_case {
	uint16_t type, allowed;
} flags_cases[] = {
	{ NBD_CMD_READ, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF },
	{ NBD_CMD_WRITE, NBD_CMD_FLAG_FUA },
	{ NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA },
	{ NBD_CMD_TRIM, NBD_CMD_FLAG_FUA },
	{ NBD_CMD_CACHE, NBD_CMD_FLAG_FUA },
	{ NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO },
	{ NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE },
};

/* One command with one flag that it may have. */
static void expect_flag_taken(
	struct chunk_client *client, uint16_t type, uint16_t flag, uint32_t len)
{
	uint32_t error;

	if (type == NBD_CMD_READ) {
		ck_assert_uint_eq(chunk_read(client, flag, 0, in, len).error, 0);
	} else if (type == NBD_CMD_BLOCK_STATUS) {
		ck_assert_uint_eq(status_of(client, flag, 0, len).count, 1);
	} else {
		error = chunk_command(
			client, type, flag, 0, len, type == NBD_CMD_WRITE ? out : NULL);
		ck_assert(!error || (flag == NBD_CMD_FLAG_FAST_ZERO && error == NBD_ENOTSUP));
	}
}

/* Every command with each of the sixteen flags. What must follow a write follows it, whatever is wrong. */
START_TEST(test_every_flag)
{
	struct chunk_client client = client_of(forms[_i]);
	bool extended = forms[_i] == NBD_EXTENDED;

	for (size_t i = 0; i < ARRAY_LEN(flags_cases); i++) {
		uint16_t type = flags_cases[i].type;
		uint32_t len = type == NBD_CMD_FLUSH ? 0 : 100;

		for (unsigned bit = 0; bit < 16; bit++) {
			uint16_t flag = (uint16_t)(1U << bit);
			/* Tested by themselves: test_status_payload, test_payload_flag. */
			if (extended && flag == NBD_CMD_FLAG_PAYLOAD_LEN)
				continue;
			if (flags_cases[i].allowed & flag)
				expect_flag_taken(&client, type, flag, len);
			else
				ck_assert_uint_eq(chunk_command(&client, type, flag, 0, len,
							  type == NBD_CMD_WRITE ? out : NULL),
					NBD_EINVAL);
		}
	}
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* --- extended headers alone ------------------------------------------------------------------- */

START_TEST(test_beyond_32_bits)
{
	const uint64_t long_range = (UINT64_C(9) << 30) + 5;
	struct chunk_client client = client_of(NBD_EXTENDED);

	chunk_write(&client, 0, out, 100);
	chunk_write(&client, long_range - 1, out, 2);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_TRIM, 0, 0, long_range, NULL), 0);
	ck_assert_uint_eq(chunk_read(&client, 0, 0, in, 100).error, 0);
	ck_assert_mem_eq(in, zeroes, 100);
	ck_assert_uint_eq(chunk_read(&client, 0, long_range - 1, in, 2).error, 0);
	ck_assert_uint_eq(in[0], 0);
	ck_assert_uint_eq(in[1], out[1]);
	chunk_write(&client, 0, out, 100);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_WRITE_ZEROES, 0, 0, RIG_FIRST_SIZE, NULL), 0);
	struct status status = status_of(&client, 0, 0, RIG_FIRST_SIZE);
	ck_assert_uint_eq(status.count, 1);
	ck_assert_uint_eq(status.len[0], RIG_FIRST_SIZE);
	ck_assert_uint_eq(status.flags[0] & NBD_STATE_ZERO, NBD_STATE_ZERO);

	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_WRITE_ZEROES, 0, 1, RIG_FIRST_SIZE, NULL),
		NBD_ENOSPC);
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_TRIM, 0, 1, UINT64_MAX, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_READ, 0, 0, UINT64_MAX, NULL), NBD_EOVERFLOW);
	chunk_disconnect(&client);
}
END_TEST

START_TEST(test_status_payload)
{
	struct {
		be64 len;
		be32 ids[3];
	} payload = { be64_make(2 << 20), { be32_make(NBD_ALLOCATION_ID) } };
	struct chunk_client client = client_of(NBD_EXTENDED);

	chunk_write(&client, 1 << 20, out, 4096);
	chunk_request(&client, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 12);
	rig_send(client.fd, &payload, 12);
	struct status status = status_reply(&client);
	ck_assert_uint_eq(status.count, 3);
	ck_assert_uint_eq(status.len[0], 1 << 20);

	/* None, one twice, too many, an unknown one, half a one; a range beyond the end. */
	payload.ids[1] = payload.ids[0];
	for (unsigned len = 1; len <= 20; len++)
		if (len != 12)
			ck_assert_uint_eq(
				chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, len, &payload),
				NBD_EINVAL);
	payload.len = be64_make(RIG_FIRST_SIZE + 1);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 12, &payload), NBD_EINVAL);
	payload.len = be64_make(4096);
	payload.ids[0] = be32_make(NBD_ALLOCATION_ID + 1);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 12, &payload), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0, sizeof(out), out), NBD_EINVAL);
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* Which contexts are wanted of those selected: one, the other, both in any order; not one twice. */
START_TEST(test_status_payload_of_two)
{
	static const struct {
		unsigned count;
		uint32_t ids[3];
	} wrong[] = { { 0, {} }, { 2, { 1, 1 } }, { 2, { 2, 2 } }, { 3, { 1, 2, 1 } }, { 1, { 0 } },
		{ 1, { 3 } }, { 1, { 32 } }, { 1, { 33 } }, { 1, { UINT32_MAX } },
		{ 2, { 1, 3 } } };
	struct {
		be64 len;
		be32 ids[3];
	} payload = { .len = be64_make(4096) };
	struct chunk_client client = chunk_connect(
		&rig, (struct nbd_session){ .form = NBD_EXTENDED,
			      .contexts = 1U << NBD_ALLOCATION_ID | 1U << NBD_DEPTH_ID });

	for (unsigned which = 0; which < 4; which++) {
		payload.ids[0] = be32_make(which & 1 ? NBD_DEPTH_ID : NBD_ALLOCATION_ID);
		payload.ids[1] = be32_make(which & 1 ? NBD_ALLOCATION_ID : NBD_DEPTH_ID);
		uint32_t len = which & 2 ? 16 : 12;
		chunk_request(&client, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, len);
		client.off = 0;
		rig_send(client.fd, &payload, len);
		if (which & 2 || !(which & 1))
			status_reply_of(&client, NBD_ALLOCATION_ID, !(which & 2));
		if (which & 2 || which & 1)
			status_reply_of(&client, NBD_DEPTH_ID, true);
	}
	for (size_t i = 0; i < ARRAY_LEN(wrong); i++) {
		for (unsigned j = 0; j < 3; j++)
			payload.ids[j] = be32_make(wrong[i].ids[j]);
		ck_assert_uint_eq(chunk_command(&client, NBD_CMD_BLOCK_STATUS, 0, 0,
					  8 + 4 * wrong[i].count, &payload),
			NBD_EINVAL);
	}
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* Whoever has no use for a payload throws it away; a write needs one. */
START_TEST(test_payload_flag)
{
	const uint16_t types[] = { NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE,
		NBD_CMD_WRITE_ZEROES, 77 };
	struct chunk_client client = client_of(NBD_EXTENDED);

	for (size_t i = 0; i < ARRAY_LEN(types); i++) {
		ck_assert_uint_eq(chunk_command(&client, types[i], 0, 0, 1000, out), NBD_EINVAL);
		ck_assert_uint_eq(
			chunk_command(&client, types[i], 0, 0, sizeof(out), out), NBD_EINVAL);
	}
	ck_assert_uint_eq(chunk_command(&client, NBD_CMD_WRITE, 0, 0, 4096, NULL), NBD_EINVAL);
	ck_assert_uint_eq(
		chunk_command(&client, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 0, NULL), 0);
	chunk_expect_alive(&client);
	/* One byte more than the longest payload there may be ends the session. */
	chunk_request(&client, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, BLK_REQUEST_MAX + 1);
	rig_expect_end(client.fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

/* The other form's requests end the connection. */
START_TEST(test_wrong_form)
{
	struct chunk_client client = client_of(forms[_i]);

	static const char rest[64];

	client.form = forms[!_i];
	chunk_request(&client, NBD_CMD_READ, 0, 0, 512);
	/* The other header may be longer; and the server may have left already. */
	(void)!send(client.fd, rest, sizeof(rest), MSG_NOSIGNAL);
	rig_expect_end(client.fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_loop_test(tcase, test_data, 0, 2);
	tcase_add_loop_test(tcase, test_holes, 0, 2);
	tcase_add_loop_test(tcase, test_do_not_fragment, 0, 2);
	tcase_add_loop_test(tcase, test_many_holes, 0, 2);
	tcase_add_loop_test(tcase, test_random_reads, 0, 2);
	tcase_add_loop_test(tcase, test_refusals, 0, 2);
	tcase_add_loop_test(tcase, test_failing_disk, 0, 2);
	tcase_add_loop_test(tcase, test_cache, 0, 2);
	tcase_add_loop_test(tcase, test_block_status, 0, 2);
	tcase_add_loop_test(tcase, test_two_contexts, 0, 2);
	tcase_add_loop_test(tcase, test_block_status_many, 0, 2);
	tcase_add_loop_test(tcase, test_block_status_refused, 0, 2);
	tcase_add_loop_test(tcase, test_wrong_form, 0, 2);
	tcase_add_loop_test(tcase, test_every_flag, 0, 2);
	tcase_add_test(tcase, test_beyond_32_bits);
	tcase_add_test(tcase, test_status_payload);
	tcase_add_test(tcase, test_status_payload_of_two);
	tcase_add_test(tcase, test_payload_flag);
}

int main(void)
{
	return test_run_suite("nbd chunks", fill);
}
