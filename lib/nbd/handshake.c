/*
 * The handshake, fixed newstyle: "Newstyle negotiation" and "Fixed newstyle negotiation".
 *
 * The server greets, the client answers with flags, then sends options one by one; each is answered
 * with one or more replies before the next is read. One function per option, in the table below;
 * an option that is not in it is refused and the client goes on.
 *
 * Nothing a client sends is trusted or kept: an option's data is read only when it fits into a fixed
 * buffer, longer data is thrown away up to a bound; the options are counted; everything together has a
 * deadline. The export that was found is counted in its `clients` before anything suspends, so it
 * cannot go away.
 *
 * What was negotiated (the form of replies, metadata contexts) is kept in the handshake and forgotten at
 * once by nbd_negotiation_forget(), as it has to be when TLS begins.
 *
 * TLS ("TLS support"): where it is required, nothing but NBD_OPT_STARTTLS and NBD_OPT_ABORT is answered
 * before it is there. What a client said in the clear is forgotten when it begins. An export that the
 * client may not enter is like one that does not exist.
 *
 * NBD_REP_ERR_BLOCK_SIZE_REQD is never sent: it is for servers that do not take the default sizes.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "nbd/handshake.h"
#include "nbd/proto.h"
#include "nbd/trace.h"
#include "rt/tls.h"

/* Option data that does not fit is skipped up to this length; a longer one ends the connection. */
#define SKIP_MAX_BYTES (1U << 20)

/* "Size constraints": what we ask of clients. Smaller requests work, the stack takes care. */
#define MINIMUM_BLOCK_BYTES   1U
#define PREFERRED_BLOCK_BYTES 4096U

/* What a handler says: the client goes on with its next option, or the handshake is over. Or -errno. */
enum { NEXT_OPTION, HANDSHAKE_OVER };

/* --- replies ---------------------------------------------------------------------------------- */

static void append(struct nbd_handshake *handshake, const void *data, size_t len_bytes)
{
	if (!len_bytes || handshake->no_memory)
		return;
	uint8_t *grown = realloc(handshake->replies, handshake->replies_bytes + len_bytes);
	if (!grown) {
		handshake->no_memory = true;
		return;
	}
	memcpy(grown + handshake->replies_bytes, data, len_bytes);
	handshake->replies = grown;
	handshake->replies_bytes += len_bytes;
}

void nbd_option_reply(struct nbd_handshake *handshake, uint32_t type, const void *head,
	size_t head_bytes, const char *tail)
{
	size_t tail_bytes = tail ? strlen(tail) : 0;
	struct nbd_option_reply header = {
		.magic = be64_make(NBD_OPTION_REPLY_MAGIC),
		.option = be32_make(handshake->option),
		.type = be32_make(type),
		.len = be32_make((uint32_t)(head_bytes + tail_bytes)),
	};

	if (nbd_traced(handshake->visitor->trace))
		nbd_trace_option_reply(handshake, type, head_bytes + tail_bytes, tail);
	append(handshake, &header, sizeof(header));
	append(handshake, head, head_bytes);
	append(handshake, tail, tail_bytes);
}

void nbd_option_ack(struct nbd_handshake *handshake)
{
	nbd_option_reply(handshake, NBD_REP_ACK, NULL, 0, NULL);
}

void nbd_option_error(struct nbd_handshake *handshake, uint32_t type, const char *text)
{
	nbd_option_reply(handshake, type, NULL, 0, text);
}

static suspends int send_all(struct nbd_handshake *handshake, const void *data, size_t len_bytes)
{
	struct iovec iov = { (void *)data, len_bytes };

	return stream_send(&handshake->stream, &iov, 1, handshake->deadline_ns);
}

static suspends int send_replies(struct nbd_handshake *handshake)
{
	int ret = handshake->no_memory ? -ENOMEM : 0;

	if (!ret && handshake->replies_bytes)
		ret = send_all(handshake, handshake->replies, handshake->replies_bytes);
	free(handshake->replies);
	handshake->replies = NULL;
	handshake->replies_bytes = 0;
	return ret;
}

void nbd_negotiation_forget(struct nbd_handshake *handshake)
{
	handshake->form = NBD_SIMPLE;
	nbd_meta_forget(handshake);
}

/* --- exports ---------------------------------------------------------------------------------- */

static bool may_enter(const struct nbd_handshake *handshake, const struct nbd_export *export)
{
	const struct nbd_visitor *visitor = handshake->visitor;

	return !visitor->may_enter || visitor->may_enter(visitor, export);
}

bool nbd_lacks_tls(const struct nbd_handshake *handshake, const struct nbd_export *export)
{
	return export->tls_required && !handshake->stream.tls;
}

struct nbd_export *nbd_find_export(
	struct nbd_handshake *handshake, const uint8_t *name, size_t name_bytes)
{
	list_for_each (link, &handshake->server->exports) {
		struct nbd_export *export = list_entry(link, struct nbd_export, link);

		if ((!name_bytes || (strlen(export->name) == name_bytes &&
					    !memcmp(export->name, name, name_bytes))) &&
			may_enter(handshake, export))
			return export;
	}
	return NULL;
}

void nbd_export_enter(struct nbd_export *export)
{
	co_group_enter(&export->clients);
	export->inside++;
}

void nbd_export_leave(struct nbd_export *export)
{
	export->inside--;
	co_group_leave(&export->clients);
}

static bool is_full(const struct nbd_export *export)
{
	return export->max_clients && export->inside >= export->max_clients;
}

/* What an export is like at this moment, for this client; asked on its home reactor. */
struct properties {
	struct nbd_export *export;
	uint16_t negotiated_flags; /* set by the caller */
	bool read_only;            /* too: whatever the export is */
	uint64_t size;
	uint16_t flags;
	uint32_t preferred_bytes;
};

static suspends void look_up_properties(void *arg)
{
	struct properties *properties = arg;
	const struct blk_caps *caps = blk_caps(properties->export->blk);

	properties->size = caps->size;
	properties->flags = nbd_export_flags(properties->export, properties->read_only) |
			    properties->negotiated_flags;
	properties->preferred_bytes = MAX(caps->preferred_size, PREFERRED_BLOCK_BYTES);
	properties->preferred_bytes = MIN(properties->preferred_bytes, BLK_REQUEST_MAX);
}

/* The transmission flags that depend on what was negotiated: "Transmission flags". */
static uint16_t negotiated_flags(
	const struct nbd_handshake *handshake, const struct nbd_export *export)
{
	uint16_t flags = handshake->form == NBD_SIMPLE ? 0 : NBD_FLAG_SEND_DF;

	if (handshake->form == NBD_EXTENDED && nbd_meta_selected(handshake, export))
		flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
	return flags;
}

static suspends struct properties properties_of(
	const struct nbd_handshake *handshake, struct nbd_export *export)
{
	struct properties properties = {
		.export = export,
		.negotiated_flags = negotiated_flags(handshake, export),
		.read_only = handshake->visitor->read_only,
	};

	co_call_on(export->home, look_up_properties, &properties);
	return properties;
}

/* --- options ---------------------------------------------------------------------------------- */

/* No errors can be told here: an export that cannot be had ends the connection. */
static suspends int option_export_name(struct nbd_handshake *handshake)
{
	struct nbd_export *export = nbd_find_export(handshake, handshake->data, handshake->len);

	if (!export || is_full(export))
		return export ? -EUSERS : -ENOENT;
	if (nbd_lacks_tls(handshake, export))
		return -EPERM;
	if (handshake->form == NBD_EXTENDED)
		return -EPROTO; /* not allowed any more: "NBD_OPT_EXTENDED_HEADERS" */
	nbd_export_enter(export);
	struct properties properties = properties_of(handshake, export);
	struct nbd_export_name_reply answer = {
		.size = be64_make(properties.size),
		.flags = be16_make(properties.flags),
	};
	size_t answer_bytes = handshake->no_zeroes ? offsetof(struct nbd_export_name_reply, zeroes)
						   : sizeof(answer);
	int ret = send_all(handshake, &answer, answer_bytes);
	if (ret) {
		nbd_export_leave(export);
		return ret;
	}
	handshake->chosen = export;
	return HANDSHAKE_OVER;
}

static suspends int option_abort(struct nbd_handshake *handshake)
{
	nbd_option_ack(handshake);
	send_replies(handshake); /* the client may be gone already, and may be so */
	return HANDSHAKE_OVER;
}

static suspends int option_list(struct nbd_handshake *handshake)
{
	if (handshake->len) {
		nbd_option_error(handshake, NBD_REP_ERR_INVALID, "NBD_OPT_LIST has no data");
		return NEXT_OPTION;
	}
	list_for_each (link, &handshake->server->exports) {
		struct nbd_export *export = list_entry(link, struct nbd_export, link);
		if (!may_enter(handshake, export) || nbd_lacks_tls(handshake, export))
			continue;
		uint32_t name_bytes = (uint32_t)strlen(export->name);
		struct {
			be32 name_bytes;
			char name[NBD_STRING_MAX_BYTES];
		} head = { .name_bytes = be32_make(name_bytes) };

		memcpy(head.name, export->name, name_bytes);
		nbd_option_reply(handshake, NBD_REP_SERVER, &head,
			sizeof(head.name_bytes) + name_bytes, export->description);
	}
	nbd_option_ack(handshake);
	return NEXT_OPTION;
}

/* The data of NBD_OPT_INFO and NBD_OPT_GO, taken apart. */
struct info_request {
	const uint8_t *name;
	uint32_t name_bytes;
	unsigned wanted; /* bit n: enum nbd_info n; unknown ones are ignored */
};

static bool parse_info_request(const struct nbd_handshake *handshake, struct info_request *request)
{
	const uint8_t *data = handshake->data;
	be32 name_bytes;
	be16 count, info;

	if (handshake->len < sizeof(name_bytes) + sizeof(count))
		return false;
	memcpy(&name_bytes, data, sizeof(name_bytes));
	request->name = data + sizeof(name_bytes);
	request->name_bytes = be32_get(name_bytes);
	size_t rest_bytes = handshake->len - sizeof(name_bytes) - sizeof(count);
	if (request->name_bytes > rest_bytes)
		return false;
	rest_bytes -= request->name_bytes;
	data = request->name + request->name_bytes;
	memcpy(&count, data, sizeof(count));
	if (rest_bytes != be16_get(count) * sizeof(info))
		return false;
	request->wanted = 0;
	for (unsigned i = 0; i < be16_get(count); i++) {
		memcpy(&info, data + sizeof(count) + i * sizeof(info), sizeof(info));
		if (be16_get(info) <= NBD_INFO_BLOCK_SIZE)
			request->wanted |= 1U << be16_get(info);
	}
	return true;
}

static void reply_info_text(struct nbd_handshake *handshake, enum nbd_info type, const char *text)
{
	be16 head = be16_make(type);

	nbd_option_reply(handshake, NBD_REP_INFO, &head, sizeof(head), text);
}

static void reply_infos(
	struct nbd_handshake *handshake, unsigned wanted, const struct properties *properties)
{
	const struct nbd_export *export = properties->export;
	struct nbd_info_export info = {
		.type = be16_make(NBD_INFO_EXPORT),
		.size = be64_make(properties->size),
		.flags = be16_make(properties->flags),
	};
	struct nbd_info_block_size block_size = {
		.type = be16_make(NBD_INFO_BLOCK_SIZE),
		.minimum = be32_make(MINIMUM_BLOCK_BYTES),
		.preferred = be32_make(properties->preferred_bytes),
		.max_payload = be32_make(BLK_REQUEST_MAX),
	};

	nbd_option_reply(handshake, NBD_REP_INFO, &info, sizeof(info), NULL);
	if (wanted & 1U << NBD_INFO_NAME)
		reply_info_text(handshake, NBD_INFO_NAME, export->name);
	if (wanted & 1U << NBD_INFO_DESCRIPTION && export->description && *export->description)
		reply_info_text(handshake, NBD_INFO_DESCRIPTION, export->description);
	if (wanted & 1U << NBD_INFO_BLOCK_SIZE)
		nbd_option_reply(handshake, NBD_REP_INFO, &block_size, sizeof(block_size), NULL);
}

/* NBD_OPT_INFO and NBD_OPT_GO: the same, but that after a success GO ends the handshake. */
static suspends int option_info(struct nbd_handshake *handshake)
{
	bool goes = handshake->option == NBD_OPT_GO;
	struct info_request request;

	if (!parse_info_request(handshake, &request)) {
		nbd_option_error(
			handshake, NBD_REP_ERR_INVALID, "the lengths in the data do not add up");
		return NEXT_OPTION;
	}
	struct nbd_export *export = nbd_find_export(handshake, request.name, request.name_bytes);
	if (!export) {
		nbd_option_error(handshake, NBD_REP_ERR_UNKNOWN, "there is no export of that name");
		return NEXT_OPTION;
	}
	if (nbd_lacks_tls(handshake, export)) {
		nbd_option_error(handshake, NBD_REP_ERR_TLS_REQD, "this export needs TLS");
		return NEXT_OPTION;
	}
	if (goes && is_full(export)) {
		nbd_option_error(
			handshake, NBD_REP_ERR_POLICY, "the export has as many clients as allowed");
		return NEXT_OPTION;
	}
	/* Who only asks takes nobody's place, but keeps the export from going away. */
	co_group_enter(&export->clients);
	export->inside += goes;
	struct properties properties = properties_of(handshake, export);
	reply_infos(handshake, request.wanted, &properties);
	nbd_option_ack(handshake);
	int ret = send_replies(handshake);
	if (!ret && goes) {
		handshake->chosen = export;
		return HANDSHAKE_OVER;
	}
	export->inside -= goes;
	co_group_leave(&export->clients);
	return ret;
}

/* NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS; asking for the same again changes nothing. */
static suspends int option_form(struct nbd_handshake *handshake)
{
	bool extended = handshake->option == NBD_OPT_EXTENDED_HEADERS;

	if (handshake->len) {
		nbd_option_error(handshake, NBD_REP_ERR_INVALID, "the option has no data");
	} else if (!extended && handshake->form == NBD_EXTENDED) {
		nbd_option_error(handshake, NBD_REP_ERR_EXT_HEADER_REQD,
			"extended headers are negotiated already");
	} else {
		handshake->form = extended ? NBD_EXTENDED : NBD_STRUCTURED;
		nbd_option_ack(handshake);
	}
	return NEXT_OPTION;
}

static suspends int option_meta(struct nbd_handshake *handshake)
{
	nbd_meta_answer(handshake);
	return NEXT_OPTION;
}

/* "NBD_OPT_STARTTLS". A handshake that fails ends the connection: no plain byte may follow. */
static suspends int start_tls(struct nbd_handshake *handshake)
{
	const struct nbd_visitor *visitor = handshake->visitor;
	struct tls *session;
	struct err err;

	nbd_option_ack(handshake);
	int ret = send_replies(handshake);
	if (ret)
		return ret;
	ret = tls_accept(
		&handshake->stream, visitor->tls_server, handshake->deadline_ns, &session, &err);
	if (ret) {
		if (visitor->tls_failed)
			visitor->tls_failed(visitor, err.text);
		return ret;
	}
	stream_set_tls(&handshake->stream, session);
	nbd_negotiation_forget(handshake);
	if (nbd_traced(visitor->trace))
		nbd_trace(visitor->trace, "TLS begins: %s", tls_text(session));
	return NEXT_OPTION;
}

static suspends int option_starttls(struct nbd_handshake *handshake)
{
	if (handshake->len)
		nbd_option_error(handshake, NBD_REP_ERR_INVALID, "NBD_OPT_STARTTLS has no data");
	else if (handshake->stream.tls)
		nbd_option_error(handshake, NBD_REP_ERR_INVALID, "TLS is on already");
	else if (handshake->visitor->tls == NBD_TLS_OFF)
		nbd_option_error(handshake, NBD_REP_ERR_POLICY, "TLS is off here");
	else
		return start_tls(handshake);
	return NEXT_OPTION;
}

static const struct option {
	uint32_t number;
	suspends int (*answer)(struct nbd_handshake *handshake);
	bool always_plain; /* answered without TLS even where that is required */
} options[] = {
	{ NBD_OPT_EXPORT_NAME, option_export_name },
	{ NBD_OPT_ABORT, option_abort, .always_plain = true },
	{ NBD_OPT_LIST, option_list },
	{ NBD_OPT_STARTTLS, option_starttls, .always_plain = true },
	{ NBD_OPT_INFO, option_info },
	{ NBD_OPT_GO, option_info },
	{ NBD_OPT_STRUCTURED_REPLY, option_form },
	{ NBD_OPT_LIST_META_CONTEXT, option_meta },
	{ NBD_OPT_SET_META_CONTEXT, option_meta },
	{ NBD_OPT_EXTENDED_HEADERS, option_form },
};

static const struct option *find_option(uint32_t number)
{
	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		if (options[i].number == number)
			return &options[i];
	return NULL;
}

/* --- the conversation ------------------------------------------------------------------------- */

static suspends int receive(struct nbd_handshake *handshake, void *data, size_t len_bytes)
{
	return stream_recv_exact(&handshake->stream, data, len_bytes, handshake->deadline_ns);
}

static suspends int greet(struct nbd_handshake *handshake)
{
	struct nbd_greeting greeting = {
		.magic = be64_make(NBD_MAGIC),
		.option_magic = be64_make(NBD_OPTION_MAGIC),
		.flags = be16_make(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES),
	};
	be32 flags;
	int ret = send_all(handshake, &greeting, sizeof(greeting));

	if (!ret)
		ret = receive(handshake, &flags, sizeof(flags));
	if (ret)
		return ret;
	handshake->no_zeroes = be32_get(flags) & NBD_FLAG_C_NO_ZEROES;
	/* "Client flags": the connection must end when there is an unknown one. */
	if (be32_get(flags) & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES))
		return -EPROTO;
	return 0;
}

static suspends int skip_data(struct nbd_handshake *handshake)
{
	uint32_t left_bytes = handshake->len;

	if (left_bytes > SKIP_MAX_BYTES)
		return -EPROTO;
	while (left_bytes) {
		uint32_t piece_bytes = MIN(left_bytes, (uint32_t)sizeof(handshake->data));
		int ret = receive(handshake, handshake->data, piece_bytes);

		if (ret)
			return ret;
		left_bytes -= piece_bytes;
	}
	return 0;
}

/* "Termination of the session during option haggling" */
static bool is_unwelcome(const struct nbd_handshake *handshake)
{
	return handshake->server->closing && handshake->option != NBD_OPT_ABORT;
}

static bool needs_tls_first(const struct nbd_handshake *handshake, const struct option *option)
{
	return handshake->visitor->tls == NBD_TLS_REQUIRED && !handshake->stream.tls &&
	       !(option && option->always_plain);
}

/* option: NULL when it is unknown. */
static int refuse_option(struct nbd_handshake *handshake, const struct option *option)
{
	if (handshake->option == NBD_OPT_EXPORT_NAME) /* no other way to refuse it */
		return is_unwelcome(handshake) ? -ESHUTDOWN : -EPERM;
	if (handshake->option == NBD_OPT_SET_META_CONTEXT)
		nbd_meta_forget(handshake);
	if (is_unwelcome(handshake))
		nbd_option_error(handshake, NBD_REP_ERR_SHUTDOWN, "the server is shutting down");
	else if (needs_tls_first(handshake, option))
		nbd_option_error(
			handshake, NBD_REP_ERR_TLS_REQD, "TLS is required: NBD_OPT_STARTTLS first");
	else if (option)
		nbd_option_error(handshake, NBD_REP_ERR_TOO_BIG, "the data is too long");
	else
		nbd_option_error(handshake, NBD_REP_ERR_UNSUP, "unknown option");
	return NEXT_OPTION;
}

static suspends int answer_option(struct nbd_handshake *handshake)
{
	struct nbd_option_header header;
	int ret = receive(handshake, &header, sizeof(header));

	if (ret)
		return ret;
	if (be64_get(header.magic) != NBD_OPTION_MAGIC)
		return -EPROTO;
	handshake->option = be32_get(header.option);
	handshake->len = be32_get(header.len);
	const struct option *option = find_option(handshake->option);
	if (!option || handshake->len > sizeof(handshake->data) || is_unwelcome(handshake) ||
		needs_tls_first(handshake, option)) {
		ret = skip_data(handshake);
		if (!ret && nbd_traced(handshake->visitor->trace))
			nbd_trace_option(handshake);
		if (!ret)
			ret = refuse_option(handshake, option);
	} else {
		ret = receive(handshake, handshake->data, handshake->len);
		if (!ret && nbd_traced(handshake->visitor->trace))
			nbd_trace_option(handshake);
		if (!ret)
			ret = option->answer(handshake);
	}
	if (ret == NEXT_OPTION)
		ret = send_replies(handshake);
	return ret;
}

suspends int nbd_handshake_run(struct nbd_handshake *handshake)
{
	int ret = greet(handshake);

	for (unsigned i = 0; !ret && i < handshake->server->limits.handshake_options; i++)
		ret = answer_option(handshake);
	if (ret == HANDSHAKE_OVER)
		return 0;
	return ret ? ret : -EPROTO; /* too many options */
}
