/*
 * Replies as bytes, in the three forms a client can have negotiated.
 *
 *			a read's data		success otherwise	an error
 *	simple		simple reply, data	simple reply		simple reply
 *	structured	chunks			simple reply		one chunk
 *	extended	chunks			chunk "none"		one chunk
 *
 * A simple reply is allowed in the structured form for everything but reads ("Structured reply chunk
 * message") and is the shortest; extended headers are all of one length.
 *
 * A reply is a list of pieces: heads, made here and kept in the request or its fragments, data where
 * it was read to, and error texts, which are constants. Nothing is copied, and nothing of the heads changes
 * once it is formed. The last chunk carries the flag that ends the reply.
 */
#include <string.h>

#include "base/util.h"
#include "nbd/conn.h"

/* --- pieces ----------------------------------------------------------------------------------- */

static void begin(struct nbd_request *request)
{
	request->pieces = request->fragments ? request->fragments->pieces : request->own_pieces;
	request->piece_count = 0;
	request->reply_bytes = 0;
}

static void add_piece(struct nbd_request *request, const void *bytes, size_t len_bytes)
{
	request->pieces[request->piece_count++] = (struct iovec){ (void *)bytes, len_bytes };
	request->reply_bytes += len_bytes;
}

static void *put(void *at, const void *field, size_t len_bytes)
{
	memcpy(at, field, len_bytes);
	return (char *)at + len_bytes;
}

/* The header of a chunk; what follows in the head is put where the result points to. */
static uint8_t *put_chunk(const struct nbd_request *request, struct nbd_reply_head *head,
	uint16_t type, size_t len_bytes, bool last)
{
	be16 flags = be16_make(last ? NBD_REPLY_FLAG_DONE : 0);

	if (request->conn->form == NBD_EXTENDED) {
		struct nbd_extended_reply reply = {
			.magic = be32_make(NBD_EXTENDED_REPLY_MAGIC),
			.flags = flags,
			.type = be16_make(type),
			.cookie = request->cookie,
			.off = be64_make(request->off),
			.len = be64_make(len_bytes),
		};
		return put(head->bytes, &reply, sizeof(reply));
	}
	struct nbd_structured_reply reply = {
		.magic = be32_make(NBD_STRUCTURED_REPLY_MAGIC),
		.flags = flags,
		.type = be16_make(type),
		.cookie = request->cookie,
		.len = be32_make((uint32_t)len_bytes),
	};
	return put(head->bytes, &reply, sizeof(reply));
}

static void add_head(
	struct nbd_request *request, const struct nbd_reply_head *head, const uint8_t *end)
{
	add_piece(request, head->bytes, (size_t)(end - head->bytes));
}

/* --- chunks ----------------------------------------------------------------------------------- */

static void add_data(struct nbd_request *request, struct nbd_reply_head *head, uint64_t off,
	uint32_t len, bool last)
{
	be64 off_field = be64_make(off);
	uint8_t *end = put_chunk(
		request, head, NBD_REPLY_OFFSET_DATA, sizeof(off_field) + len, last);

	end = put(end, &off_field, sizeof(off_field));
	add_head(request, head, end);
	add_piece(request, request->payload + (off - request->off), len);
}

/* off: where the error is, NULL when it has no place. */
static void add_error(struct nbd_request *request, struct nbd_reply_head *head,
	struct nbd_refusal refusal, const uint64_t *off)
{
	uint16_t text_bytes = (uint16_t)strlen(refusal.text);
	be64 off_field = be64_make(off ? *off : 0);
	size_t off_bytes = off ? sizeof(off_field) : 0;
	struct nbd_reply_error error = {
		.error = be32_make(refusal.error),
		.text_bytes = be16_make(text_bytes),
	};
	uint8_t *end = put_chunk(request, head, off ? NBD_REPLY_ERROR_OFFSET : NBD_REPLY_ERROR,
		sizeof(error) + text_bytes + off_bytes, true);

	end = put(end, &error, sizeof(error));
	add_head(request, head, end);
	add_piece(request, refusal.text, text_bytes);
	if (off)
		add_piece(request, end, (size_t)((uint8_t *)put(end, &off_field, off_bytes) - end));
}

static void add_status(struct nbd_request *request, struct nbd_reply_head *head, unsigned context,
	const void *descriptors, unsigned count, bool last)
{
	be32 context_field = be32_make(context), count_field = be32_make(count);
	bool extended = request->conn->form == NBD_EXTENDED;
	size_t list_bytes = count * (extended ? sizeof(struct nbd_extended_descriptor)
					      : sizeof(struct nbd_descriptor));
	size_t fixed_bytes = sizeof(context_field) + (extended ? sizeof(count_field) : 0);
	uint8_t *end = put_chunk(request, head,
		extended ? NBD_REPLY_BLOCK_STATUS_EXT : NBD_REPLY_BLOCK_STATUS,
		fixed_bytes + list_bytes, last);

	end = put(end, &context_field, sizeof(context_field));
	if (extended)
		end = put(end, &count_field, sizeof(count_field));
	add_head(request, head, end);
	add_piece(request, descriptors, list_bytes);
}

/* --- whole replies ---------------------------------------------------------------------------- */

static void form_simple(struct nbd_request *request, enum nbd_error error)
{
	struct nbd_simple_reply reply = {
		.magic = be32_make(NBD_SIMPLE_REPLY_MAGIC),
		.error = be32_make(error),
		.cookie = request->cookie,
	};

	begin(request);
	memcpy(request->head.bytes, &reply, sizeof(reply));
	add_piece(request, request->head.bytes, sizeof(reply));
}

void nbd_form_success(struct nbd_request *request)
{
	bool simple = request->conn->form == NBD_SIMPLE ||
		      (request->conn->form == NBD_STRUCTURED && request->type != NBD_CMD_READ);

	if (simple) {
		form_simple(request, NBD_SUCCESS);
		return;
	}
	begin(request);
	add_head(request, &request->head,
		put_chunk(request, &request->head, NBD_REPLY_NONE, 0, true));
}

void nbd_form_error(struct nbd_request *request, struct nbd_refusal refusal, const uint64_t *off)
{
	if (request->conn->form == NBD_SIMPLE) {
		form_simple(request, refusal.error);
		return;
	}
	begin(request);
	add_error(request, &request->head, refusal, off);
}

void nbd_form_data(struct nbd_request *request)
{
	if (request->conn->form == NBD_SIMPLE) {
		form_simple(request, NBD_SUCCESS);
		add_piece(request, request->payload, request->len);
		return;
	}
	begin(request);
	add_data(request, &request->head, request->off, (uint32_t)request->len, true);
}

void nbd_form_again(struct nbd_request *request, enum nbd_error error)
{
	form_simple(request, error);
	if (request->type == NBD_CMD_READ && !error && request->len)
		add_piece(request, request->payload, request->len);
}

void nbd_form_status(
	struct nbd_request *request, unsigned context, const void *descriptors, unsigned count)
{
	begin(request);
	add_status(request, &request->head, context, descriptors, count, true);
}

/* --- replies in parts ------------------------------------------------------------------------- */

static struct nbd_reply_head *next_head(struct nbd_request *request)
{
	if (!request->fragments->count)
		begin(request);
	return &request->fragments->heads[request->fragments->count++];
}

void nbd_form_part_data(struct nbd_request *request, uint64_t off, uint32_t len, bool last)
{
	add_data(request, next_head(request), off, len, last);
}

void nbd_form_part_hole(struct nbd_request *request, uint64_t off, uint32_t len, bool last)
{
	struct nbd_reply_head *head = next_head(request);
	struct nbd_reply_hole hole = { .off = be64_make(off), .len = be32_make(len) };
	uint8_t *end = put_chunk(request, head, NBD_REPLY_OFFSET_HOLE, sizeof(hole), last);

	add_head(request, head, put(end, &hole, sizeof(hole)));
}

void nbd_form_part_status(struct nbd_request *request, unsigned context, const void *descriptors,
	unsigned count, bool last)
{
	add_status(request, next_head(request), context, descriptors, count, last);
}

void nbd_form_part_error(struct nbd_request *request, struct nbd_refusal refusal, uint64_t off)
{
	add_error(request, next_head(request), refusal, &off);
}
