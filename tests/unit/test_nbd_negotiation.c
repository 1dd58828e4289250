/*
 * What a client can negotiate in its handshake, byte by byte: forms of replies, metadata contexts, what they
 * do to transmission flags, in which order and how often; and the end of the server meanwhile.
 */
#include "nbd_chunks.h"

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

static int greeted(void)
{
	int fd = rig_connect(&rig);

	rig_greet(fd, NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
	return fd;
}

static uint32_t reply_type(int fd, uint32_t option)
{
	return rig_option_reply(fd, option, NULL, 0, NULL);
}

static uint32_t ask(int fd, uint32_t option)
{
	rig_option(fd, option, NULL, 0);
	return reply_type(fd, option);
}

/* The transmission flags that INFO or GO tells. */
static unsigned flags_by(int fd, uint32_t option, const char *name)
{
	struct nbd_info_export info;

	rig_option(fd, option, data, rig_info_data(data, name, NULL, 0));
	ck_assert_uint_eq(rig_option_reply(fd, option, &info, sizeof(info), NULL), NBD_REP_INFO);
	ck_assert_uint_eq(reply_type(fd, option), NBD_REP_ACK);
	return be16_get(info.flags);
}

/* Sends a LIST or SET_META_CONTEXT with queries, ended by NULL. */
static void send_meta(int fd, uint32_t option, const char *export, const char *const *queries)
{
	uint8_t *end = data;
	uint32_t count = 0, export_bytes = (uint32_t)strlen(export);
	be32 field = be32_make(export_bytes);

	end = mempcpy(end, &field, 4);
	end = mempcpy(end, export, export_bytes);
	while (queries[count])
		count++;
	field = be32_make(count);
	end = mempcpy(end, &field, 4);
	for (uint32_t i = 0; i < count; i++) {
		field = be32_make((uint32_t)strlen(queries[i]));
		end = mempcpy(end, &field, 4);
		end = mempcpy(end, queries[i], strlen(queries[i]));
	}
	rig_option(fd, option, data, (uint32_t)(end - data));
}

#define ALLOCATION (1U << NBD_ALLOCATION_ID)
#define DEPTH      (1U << NBD_DEPTH_ID)

/* The contexts that the option finds, by id; no error. */
static unsigned finds(int fd, uint32_t option, const char *export, const char *const *queries)
{
	static const char *const names[] = { [NBD_ALLOCATION_ID] = "base:allocation",
		[NBD_DEPTH_ID] = "blkstack:allocation-depth" };
	unsigned found = 0;
	uint32_t type, len;

	send_meta(fd, option, export, queries);
	for (;;) {
		char context[64] = "";
		be32 id;

		type = rig_option_reply(fd, option, context, sizeof(context) - 1, &len);
		if (type == NBD_REP_ACK)
			return found;
		ck_assert_uint_eq(type, NBD_REP_META_CONTEXT);
		unsigned known = !strcmp(context + 4, names[NBD_DEPTH_ID]) ? NBD_DEPTH_ID
									   : NBD_ALLOCATION_ID;
		ck_assert_str_eq(context + 4, names[known]);
		ck_assert_uint_eq(len, 4 + strlen(names[known]));
		memcpy(&id, context, sizeof(id));
		ck_assert_uint_eq(be32_get(id), option == NBD_OPT_SET_META_CONTEXT ? known : 0);
		ck_assert(!(found >> known & 1));
		found |= 1U << known;
	}
}

static const char *const allocation[] = { NBD_CONTEXT_ALLOCATION, NULL };
static const char *const nothing[] = { NULL };

static bool selects(int fd, const char *export)
{
	return finds(fd, NBD_OPT_SET_META_CONTEXT, export, allocation);
}

/* In transmission after GO: whether block status is answered. */
static bool has_status(int fd, enum nbd_form form)
{
	struct chunk_client client = { .fd = fd, .form = form };
	static struct chunk chunk;

	chunk_request(&client, NBD_CMD_BLOCK_STATUS, 0, 0, 4096);
	chunk_recv(&client, &chunk);
	if (chunk.type == NBD_REPLY_ERROR)
		ck_assert_uint_eq(chunk_error(&chunk, UINT64_MAX), NBD_EINVAL);
	chunk_disconnect(&client);
	return chunk.type != NBD_REPLY_ERROR;
}

/* --- forms ------------------------------------------------------------------------------------ */

START_TEST(test_simple_has_no_chunks)
{
	int fd = greeted();

	ck_assert(!(flags_by(fd, NBD_OPT_GO, "first") & NBD_FLAG_SEND_DF));
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512, NULL), NBD_EINVAL);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_BLOCK_STATUS, 0, 0, 512, NULL), NBD_EINVAL);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

START_TEST(test_structured)
{
	int fd = greeted();

	ck_assert(!(flags_by(fd, NBD_OPT_INFO, "first") & NBD_FLAG_SEND_DF));
	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	ck_assert(flags_by(fd, NBD_OPT_INFO, "first") & NBD_FLAG_SEND_DF);
	unsigned flags = flags_by(fd, NBD_OPT_GO, "first");
	ck_assert(flags & NBD_FLAG_SEND_DF);
	ck_assert(!(flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD));
	struct chunk_client client = { .fd = fd, .form = NBD_STRUCTURED };
	chunk_expect_alive(&client);
	chunk_disconnect(&client);
}
END_TEST

/* By the old way in, too. */
START_TEST(test_structured_by_export_name)
{
	struct nbd_export_name_reply reply;
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	ck_assert(selects(fd, "first"));
	rig_option(fd, NBD_OPT_EXPORT_NAME, "first", 5);
	rig_recv(fd, &reply, 10);
	ck_assert(be16_get(reply.flags) & NBD_FLAG_SEND_DF);
	ck_assert(has_status(fd, NBD_STRUCTURED));
}
END_TEST

START_TEST(test_extended)
{
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	ck_assert(selects(fd, "first")); /* kept when the form changes */
	ck_assert_uint_eq(ask(fd, NBD_OPT_EXTENDED_HEADERS), NBD_REP_ACK);
	ck_assert_uint_eq(ask(fd, NBD_OPT_EXTENDED_HEADERS), NBD_REP_ACK);
	/* There is no way back. */
	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ERR_EXT_HEADER_REQD);
	ck_assert(!(flags_by(fd, NBD_OPT_INFO, "second") & NBD_FLAG_BLOCK_STATUS_PAYLOAD));
	unsigned flags = flags_by(fd, NBD_OPT_GO, "first");
	ck_assert(flags & NBD_FLAG_SEND_DF);
	ck_assert(flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD);
	struct chunk_client client = { .fd = fd, .form = NBD_EXTENDED };
	chunk_expect_alive(&client);
	ck_assert(has_status(fd, NBD_EXTENDED));
}
END_TEST

START_TEST(test_extended_and_export_name)
{
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_EXTENDED_HEADERS), NBD_REP_ACK);
	rig_option(fd, NBD_OPT_EXPORT_NAME, "first", 5);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), -EPROTO);
}
END_TEST

START_TEST(test_forms_have_no_data)
{
	const uint32_t options[] = { NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS };
	int fd = greeted();

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		rig_option(fd, options[i], "x", 1);
		ck_assert_uint_eq(reply_type(fd, options[i]), NBD_REP_ERR_INVALID);
	}
	ck_assert(!(flags_by(fd, NBD_OPT_GO, "first") & NBD_FLAG_SEND_DF));
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

/* --- metadata contexts ------------------------------------------------------------------------ */

START_TEST(test_meta_needs_chunks)
{
	const uint32_t options[] = { NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT };
	int fd = greeted();

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		send_meta(fd, options[i], "first", allocation);
		ck_assert_uint_eq(reply_type(fd, options[i]), NBD_REP_ERR_INVALID);
	}
	rig_option(fd, NBD_OPT_ABORT, NULL, 0);
	ck_assert_uint_eq(reply_type(fd, NBD_OPT_ABORT), NBD_REP_ACK);
	rig_expect_end(fd);
}
END_TEST

START_TEST(test_meta_queries)
{
	static const struct {
		const char *queries[4];
		unsigned listed, selected;
	} cases[] = {
		{ { NULL }, ALLOCATION | DEPTH, 0 },
		{ { "base:" }, ALLOCATION, 0 },
		{ { "base:allocation" }, ALLOCATION, ALLOCATION },
		{ { "x:y", "base:allocation", "base:allocation" }, ALLOCATION, ALLOCATION },
		{ { "base:allocatio" }, 0, 0 },
		{ { "base:allocation2" }, 0, 0 },
		{ { "base" }, 0, 0 },
		{ { "" }, 0, 0 },
		{ { "qemu:allocation-depth", "blkstack:" }, DEPTH, 0 },
		{ { "blkstack:allocation-depth" }, DEPTH, DEPTH },
		{ { "blkstack:allocation-depth", "base:allocation" }, ALLOCATION | DEPTH,
			ALLOCATION | DEPTH },
		{ { "base:", "blkstack:" }, ALLOCATION | DEPTH, 0 },
		{ { "blkstack" }, 0, 0 },
		{ { "blkstack:allocation" }, 0, 0 },
	};
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		ck_assert_uint_eq(finds(fd, NBD_OPT_LIST_META_CONTEXT, "", cases[i].queries),
			cases[i].listed);
		ck_assert_uint_eq(finds(fd, NBD_OPT_SET_META_CONTEXT, "second", cases[i].queries),
			cases[i].selected);
	}
	send_meta(fd, NBD_OPT_LIST_META_CONTEXT, "third", allocation);
	ck_assert_uint_eq(reply_type(fd, NBD_OPT_LIST_META_CONTEXT), NBD_REP_ERR_UNKNOWN);
	close(fd);
}
END_TEST

START_TEST(test_meta_bad_data)
{
	static const struct {
		uint8_t bytes[24];
		uint32_t len;
	} cases[] = {
		{ { 0 }, 0 },
		{ { 0, 0, 0, 0 }, 4 },
		{ { 0, 0, 0, 9, 'f' }, 5 },                          /* name longer than data */
		{ { 255, 255, 255, 255, 0, 0, 0, 0 }, 8 },           /* much longer */
		{ { 0, 0, 0, 0, 0, 0, 0, 1 }, 8 },                   /* a query is missing */
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 'b' }, 13 }, /* and half of one */
		{ { 0, 0, 0, 0, 0, 0, 0, 0, 1 }, 9 },                /* more than said */
		{ { 0, 0, 0, 0, 0, 0, 0, 1, 255, 255, 255, 255 }, 12 },
	};
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		uint32_t option = i % 2 ? NBD_OPT_LIST_META_CONTEXT : NBD_OPT_SET_META_CONTEXT;

		rig_option(fd, option, cases[i].bytes, cases[i].len);
		ck_assert_uint_eq(reply_type(fd, option), NBD_REP_ERR_INVALID);
	}
	ck_assert(selects(fd, "first"));
	close(fd);
}
END_TEST

START_TEST(test_meta_too_big)
{
	uint8_t many[8 + 65 * 4] = { [7] = 65 };
	int fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	rig_option(fd, NBD_OPT_LIST_META_CONTEXT, many, sizeof(many));
	ck_assert_uint_eq(reply_type(fd, NBD_OPT_LIST_META_CONTEXT), NBD_REP_ERR_TOO_BIG);
	/* A selection that fails, even so, takes the one before away. */
	ck_assert(selects(fd, "first"));
	rig_option(fd, NBD_OPT_SET_META_CONTEXT, data, sizeof(data));
	ck_assert_uint_eq(reply_type(fd, NBD_OPT_SET_META_CONTEXT), NBD_REP_ERR_TOO_BIG);
	flags_by(fd, NBD_OPT_GO, "first");
	ck_assert(!has_status(fd, NBD_STRUCTURED));
}
END_TEST

/* What was selected last counts, and only for its export. */
START_TEST(test_meta_repeated)
{
	static const struct {
		const char *selected[2]; /* one after the other; NULL: none any more */
		const char *chosen;
		bool works;
	} cases[] = {
		{ { "first", "first" }, "first", true },
		{ { "second", "first" }, "first", true },
		{ { "first", "second" }, "first", false },
		{ { "first", "third" }, "first", false },
		{ { "first", NULL }, "first", false },
		{ { "", "" }, "first", true }, /* the default export is the first one */
		{ { "first", "" }, "second", false },
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		int fd = greeted();

		ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
		for (unsigned round = 0; round < 2; round++) {
			const char *name = cases[i].selected[round];

			send_meta(fd, NBD_OPT_SET_META_CONTEXT, name ? name : "first",
				name ? allocation : nothing);
			while (reply_type(fd, NBD_OPT_SET_META_CONTEXT) == NBD_REP_META_CONTEXT)
				;
		}
		flags_by(fd, NBD_OPT_GO, cases[i].chosen);
		ck_assert_int_eq(has_status(fd, NBD_STRUCTURED), cases[i].works);
	}
}
END_TEST

/* --- the end of the server -------------------------------------------------------------------- */

static suspends void stop_server(void *arg)
{
	nbd_server_stop(&rig.server);
}

START_TEST(test_shutdown)
{
	const uint32_t options[] = { NBD_OPT_LIST, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY, 99 };
	int served = rig_serve(&rig), named = greeted(), fd = greeted();

	ck_assert_uint_eq(ask(fd, NBD_OPT_STRUCTURED_REPLY), NBD_REP_ACK);
	rig_run(&rig, stop_server, NULL);
	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		ck_assert_uint_eq(ask(fd, options[i]), NBD_REP_ERR_SHUTDOWN);
	ck_assert_uint_eq(ask(fd, NBD_OPT_ABORT), NBD_REP_ACK);
	rig_expect_end(fd);
	rig_option(named, NBD_OPT_EXPORT_NAME, "first", 5);
	rig_expect_end(named);
	rig_expect_end(rig_connect(&rig));
	/* Who is in transmission is not disturbed by this. */
	rig_expect_alive(served);
	rig_disconnect(served);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_simple_has_no_chunks);
	tcase_add_test(tcase, test_structured);
	tcase_add_test(tcase, test_structured_by_export_name);
	tcase_add_test(tcase, test_extended);
	tcase_add_test(tcase, test_extended_and_export_name);
	tcase_add_test(tcase, test_forms_have_no_data);
	tcase_add_test(tcase, test_meta_needs_chunks);
	tcase_add_test(tcase, test_meta_queries);
	tcase_add_test(tcase, test_meta_bad_data);
	tcase_add_test(tcase, test_meta_too_big);
	tcase_add_test(tcase, test_meta_repeated);
	tcase_add_test(tcase, test_shutdown);
}

int main(void)
{
	return test_run_suite("nbd negotiation", fill);
}
