/*
 * Receiving requests: one coroutine per connection, straight-line, and batched all the same.
 *
 * need() is the heart: it returns at once while enough bytes are at hand, so a whole batch of requests is
 * run between two receives. Only when bytes are missing does it send the replies that are ready
 * and go to the socket, for as much as the chunk holds.
 *
 * Payloads of writes: complete in the chunk, or short enough to become so: used in place; else
 * received into a buffer of their own. The payload of a request that is refused anyway is thrown away
 * piece by piece, then the error is answered and the connection lives on.
 *
 * A connection with a journal receives into the ring of its line instead of chunks, where everything
 * is in place; it begins with what its predecessor left.
 *
 * What ends a connection: the client (NBD_CMD_DISC, end of stream), stopping, a wrong magic number or an
 * absurd length ("Terminating the transmission phase" allows a hard disconnect), a broken socket.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "nbd/conn.h"
#include "nbd/trace.h"
#include "rt/buf.h"

/* A payload up to this size is put together in the chunk, which may cost a copy of what is there. */
#define PAYLOAD_IN_PLACE_MAX_BYTES (64U << 10)

/* With less space than this in a chunk that cannot be reused yet, a new one is taken. */
#define CHUNK_SPACE_MIN_BYTES (32U << 10)

/*
 * A refused payload longer than this is not waited for: no client is that wrong by mistake.
 * ("Size constraints": up to 32 MiB is never to be taken for an attack.)
 */
#define SKIP_MAX_BYTES (256U << 20)

/*
 * The work after which others get their turn, if there is more at hand. A client that keeps 64 requests in flight, or
 * less, never notices. The others are those who have news for us, too: a newcomer waits for one such turn of each.
 */
#define TURN_REQUESTS 64
#define TURN_BYTES    (256U << 10)

/* --- memory ----------------------------------------------------------------------------------- */

static void *buffer_get(struct nbd_conn *conn, size_t size_bytes)
{
	void *buf = buf_get(size_bytes);

	if (buf)
		conn->buffered_bytes += size_bytes;
	return buf;
}

static void buffer_put(struct nbd_conn *conn, void *buf, size_t size_bytes)
{
	buf_put(buf, size_bytes);
	conn->buffered_bytes -= size_bytes;
}

static struct nbd_chunk *chunk_get(struct nbd_conn *conn)
{
	struct nbd_chunk *chunk = buffer_get(conn, NBD_CHUNK_BYTES);

	if (chunk)
		chunk->refs = 1;
	return chunk;
}

static void chunk_put(struct nbd_conn *conn, struct nbd_chunk *chunk)
{
	if (--chunk->refs == 0)
		buffer_put(conn, chunk, NBD_CHUNK_BYTES);
}

bool nbd_payload_get(struct nbd_request *request, uint32_t size_bytes)
{
	request->payload = request->conn->line ? nbd_line_payload_get(request, size_bytes)
					       : buffer_get(request->conn, size_bytes);
	request->payload_bytes = size_bytes;
	return request->payload;
}

void nbd_payload_put(struct nbd_request *request)
{
	if (request->conn->line)
		nbd_line_payload_put(request);
	else if (request->chunk)
		chunk_put(request->conn, request->chunk);
	else if (request->payload)
		buffer_put(request->conn, request->payload, request->payload_bytes);
	request->chunk = NULL;
	request->payload = NULL;
}

bool nbd_fragments_get(struct nbd_request *request)
{
	request->fragments = buffer_get(request->conn, sizeof(*request->fragments));
	if (request->fragments)
		request->fragments->count = 0;
	return request->fragments;
}

void nbd_fragments_put(struct nbd_request *request)
{
	if (request->fragments)
		buffer_put(request->conn, request->fragments, sizeof(*request->fragments));
	request->fragments = NULL;
}

/* --- waiting ---------------------------------------------------------------------------------- */

/* Before the receiver suspends: what it has done so far must not wait for it. */
static void pause_batch(struct nbd_conn *conn)
{
	conn->batching = false;
	nbd_reply_send(conn);
}

static bool has_room(const struct nbd_conn *conn, size_t size_bytes)
{
	if (conn->line && !nbd_line_has_room(conn->line, size_bytes))
		return false;
	if (!conn->in_flight)
		return true; /* one request alone always may */
	return conn->in_flight < conn->max_requests &&
	       conn->buffered_bytes + size_bytes <= conn->max_buffered_bytes;
}

/* Why the receiver must not go on, whatever it waits for. */
static int stopped(const struct nbd_conn *conn)
{
	return conn->error ? conn->error : conn->parking ? -ECANCELED : 0;
}

/* Waits until there is a slot and so much memory for one more request. */
static suspends int wait_for_room(struct nbd_conn *conn, size_t size_bytes)
{
	while (!stopped(conn) && !has_room(conn, size_bytes)) {
		pause_batch(conn);
		if (conn->line)
			nbd_line_wants_room(conn->line, !nbd_line_has_room(conn->line, size_bytes));
		/* Sending may have made room just now. */
		if (!stopped(conn) && !has_room(conn, size_bytes))
			co_queue_wait(&conn->room);
		conn->batching = true;
	}
	return stopped(conn);
}

static bool has_had_its_turn(const struct nbd_conn *conn)
{
	return conn->pos < conn->fill &&
	       (conn->turn_requests >= TURN_REQUESTS || conn->turn_bytes >= TURN_BYTES);
}

static suspends void let_others_run(struct nbd_conn *conn)
{
	pause_batch(conn);
	co_yield_turn();
	conn->batching = true;
	conn->turn_requests = 0;
	conn->turn_bytes = 0;
}

/* --- bytes ------------------------------------------------------------------------------------ */

/* Waits until enough of what is in use in the ring has been answered. */
static suspends int wait_for_space(struct nbd_conn *conn, size_t space_bytes)
{
	while (!stopped(conn) && nbd_line_space(conn->line) < space_bytes) {
		pause_batch(conn);
		nbd_line_wants_room(conn->line, true);
		if (!stopped(conn) && nbd_line_space(conn->line) < space_bytes)
			co_queue_wait(&conn->room);
		conn->batching = true;
	}
	return stopped(conn);
}

/* Makes space behind fill so that [pos, pos + len_bytes) fits, or a good part of it. */
static suspends int make_space(struct nbd_conn *conn, size_t len_bytes)
{
	size_t have = conn->fill - conn->pos;

	if (conn->line)
		return wait_for_space(conn, MIN(len_bytes - have, (size_t)CHUNK_SPACE_MIN_BYTES));
	bool fits = NBD_CHUNK_DATA_BYTES - conn->pos >= len_bytes &&
		    NBD_CHUNK_DATA_BYTES - conn->fill >= CHUNK_SPACE_MIN_BYTES;

	if (fits && (have || conn->chunk->refs > 1))
		return 0;
	if (conn->chunk->refs > 1) {
		int ret = wait_for_room(conn, NBD_CHUNK_BYTES);

		if (ret)
			return ret;
	}
	if (conn->chunk->refs > 1) {
		struct nbd_chunk *chunk = chunk_get(conn);

		if (!chunk)
			return -ENOMEM;
		memcpy(chunk->data, conn->chunk->data + conn->pos, have);
		chunk_put(conn, conn->chunk);
		conn->chunk = chunk;
	} else {
		memmove(conn->chunk->data, conn->chunk->data + conn->pos, have);
	}
	conn->pos = 0;
	conn->fill = have;
	return 0;
}

/* One receive. The count of bytes, 0 at the end of the stream, or -errno. */
static suspends ssize_t receive(struct nbd_conn *conn, void *buf, size_t max_bytes)
{
	pause_batch(conn);
	ssize_t got = stream_recv(&conn->stream, buf, max_bytes, NO_DEADLINE);
	conn->batching = true;
	conn->moved++;
	conn->turn_requests = 0;
	conn->turn_bytes = 0;
	if (conn->line && got > 0) {
		int ret = nbd_line_received(conn->line, (size_t)got);
		got = ret ? ret : got;
	}
	return conn->error ? conn->error : got;
}

static uint8_t *place_of(const struct nbd_conn *conn, uint64_t pos)
{
	return conn->line ? nbd_line_at(conn->line, pos) : conn->chunk->data + pos;
}

static suspends ssize_t receive_some(struct nbd_conn *conn)
{
	size_t space = conn->line ? MIN(nbd_line_space(conn->line), (size_t)NBD_CHUNK_BYTES)
				  : NBD_CHUNK_DATA_BYTES - conn->fill;
	ssize_t got = receive(conn, place_of(conn, conn->fill), space);

	if (got > 0)
		conn->fill += (size_t)got;
	return got;
}

/* Until len_bytes are at chunk->data + pos: 0. -ECONNRESET when the stream ends before. */
static suspends int need(struct nbd_conn *conn, size_t len_bytes)
{
	while (conn->fill - conn->pos < len_bytes) {
		int ret = make_space(conn, len_bytes);
		if (ret)
			return ret;
		ssize_t got = receive_some(conn);
		if (got <= 0)
			return got ? (int)got : -ECONNRESET;
	}
	return 0;
}

/* Waits for the first byte of a request: 1; 0: there will be none. */
static suspends int next_request(struct nbd_conn *conn)
{
	if (conn->parking)
		return 0;
	if (conn->pos < conn->fill)
		return 1;
	if (conn->stopping)
		return 0;
	int ret = make_space(conn, sizeof(struct nbd_extended_request_header));
	if (ret)
		return ret;
	conn->between_requests = true;
	ssize_t got = receive_some(conn);
	conn->between_requests = false;
	return got > 0 ? 1 : (int)got;
}

/* --- payloads --------------------------------------------------------------------------------- */

static suspends int skip_payload(struct nbd_conn *conn, size_t len_bytes)
{
	if (len_bytes > (conn->line ? conn->max_len : SKIP_MAX_BYTES))
		return -EPROTO;
	for (;;) {
		size_t skipped = MIN(len_bytes, conn->fill - conn->pos);

		conn->pos += skipped;
		len_bytes -= skipped;
		if (!len_bytes)
			return 0;
		int ret = need(conn, 1);
		if (ret)
			return ret;
	}
}

/* The payload stays where it is; the request shares the chunk. */
static void use_in_place(struct nbd_conn *conn, struct nbd_request *request)
{
	request->chunk = conn->chunk;
	if (conn->chunk)
		conn->chunk->refs++;
	request->payload = place_of(conn, conn->pos);
	conn->pos += request->len;
}

static suspends int receive_into_buffer(struct nbd_conn *conn, struct nbd_request *request)
{
	size_t have = conn->fill - conn->pos;
	int ret = wait_for_room(conn, request->len);

	if (ret)
		return ret;
	if (!nbd_payload_get(request, (uint32_t)request->len))
		return -ENOMEM;
	memcpy(request->payload, conn->chunk->data + conn->pos, have);
	conn->pos = conn->fill;
	while (have < request->len) {
		ssize_t got = receive(conn, request->payload + have, request->len - have);

		if (got <= 0) {
			nbd_payload_put(request);
			return got ? (int)got : -ECONNRESET;
		}
		have += (size_t)got;
	}
	return 0;
}

static suspends int receive_payload(struct nbd_conn *conn, struct nbd_request *request)
{
	if (!conn->line && request->len > PAYLOAD_IN_PLACE_MAX_BYTES &&
		request->len > conn->fill - conn->pos)
		return receive_into_buffer(conn, request);
	int ret = need(conn, request->len);
	if (!ret)
		use_in_place(conn, request);
	return ret;
}

/* --- requests --------------------------------------------------------------------------------- */

/* From a request on the receiver's stack to a slot. */
static struct nbd_request *take_slot(struct nbd_conn *conn, const struct nbd_request *received)
{
	struct list *slot = list_pop_front(&conn->free);

	assert(slot); /* there is room */
	struct nbd_request *request = list_entry(slot, struct nbd_request, link);
	memcpy(request, received, offsetof(struct nbd_request, pieces));
	list_push_back(&conn->running, &request->link);
	request->received_ns = reactor_now_ns();
	conn->in_flight++;
	return request;
}

/* When it is complete with its payload; and off it goes. */
static suspends int start_request(
	struct nbd_conn *conn, const struct nbd_request *received, struct nbd_refusal refusal)
{
	int ret = wait_for_room(conn, refusal.error ? 0 : nbd_request_buffer_bytes(received));

	if (ret)
		return ret;
	struct nbd_request *request = take_slot(conn, received);
	if (conn->line && !request->held)
		nbd_line_enter(conn->line, request);
	conn->turn_requests++;
	conn->turn_bytes += request->payload ? request->len : nbd_request_buffer_bytes(request);
	if (refusal.error)
		nbd_refuse(request, refusal);
	else
		nbd_request_start(request);
	return 0;
}

static bool parse_compact(const uint8_t *bytes, struct nbd_request *request)
{
	struct nbd_request_header header;

	memcpy(&header, bytes, sizeof(header));
	request->type = be16_get(header.type);
	request->flags = be16_get(header.flags);
	request->cookie = header.cookie;
	request->off = be64_get(header.off);
	request->len = be32_get(header.len);
	return be32_get(header.magic) == NBD_REQUEST_MAGIC;
}

static bool parse_extended(const uint8_t *bytes, struct nbd_request *request)
{
	struct nbd_extended_request_header header;

	memcpy(&header, bytes, sizeof(header));
	request->type = be16_get(header.type);
	request->flags = be16_get(header.flags);
	request->cookie = header.cookie;
	request->off = be64_get(header.off);
	request->len = be64_get(header.len);
	return be32_get(header.magic) == NBD_EXTENDED_REQUEST_MAGIC;
}

static suspends int receive_header(struct nbd_conn *conn, struct nbd_request *request)
{
	bool extended = conn->form == NBD_EXTENDED;
	size_t header_bytes = extended ? sizeof(struct nbd_extended_request_header)
				       : sizeof(struct nbd_request_header);
	int ret = need(conn, header_bytes);

	if (ret)
		return ret;
	const uint8_t *bytes = place_of(conn, conn->pos);
	conn->pos += header_bytes;
	bool right = extended ? parse_extended(bytes, request) : parse_compact(bytes, request);
	return right ? 0 : -EPROTO;
}

/* What follows the header. */
static uint64_t payload_bytes_of(const struct nbd_conn *conn, const struct nbd_request *request)
{
	bool has_payload = conn->form == NBD_EXTENDED ? request->flags & NBD_CMD_FLAG_PAYLOAD_LEN
						      : request->type == NBD_CMD_WRITE;

	return has_payload ? request->len : 0;
}

/* The contexts that a payload names, by id; 0 when it does not name selected ones, each once. */
static unsigned contexts_of(const struct nbd_conn *conn, const uint8_t *ids, size_t ids_bytes)
{
	unsigned contexts = 0;
	be32 field;

	for (; ids_bytes; ids += sizeof(field), ids_bytes -= sizeof(field)) {
		memcpy(&field, ids, sizeof(field));
		uint32_t id = be32_get(field);
		if (id >= NBD_CONTEXT_IDS || !(conn->contexts >> id & 1) || contexts >> id & 1)
			return 0;
		contexts |= 1U << id;
	}
	return contexts;
}

/* The payload of a block status has the real length, and which of the contexts selected are wanted. */
static suspends int receive_status_payload(
	struct nbd_conn *conn, struct nbd_request *request, struct nbd_refusal *refusal)
{
	struct nbd_status_payload payload;
	uint64_t payload_bytes = request->len;
	uint64_t ids_bytes = payload_bytes - sizeof(payload);

	*refusal = (struct nbd_refusal){ NBD_EINVAL,
		"the payload does not name each metadata context wanted once" };
	if (payload_bytes < sizeof(payload) || ids_bytes % sizeof(be32) ||
		ids_bytes > NBD_CONTEXTS_MAX * sizeof(be32))
		return skip_payload(conn, payload_bytes);
	int ret = need(conn, payload_bytes);
	if (ret)
		return ret;
	memcpy(&payload, place_of(conn, conn->pos), sizeof(payload));
	request->contexts = contexts_of(
		conn, place_of(conn, conn->pos) + sizeof(payload), ids_bytes);
	conn->pos += payload_bytes;
	request->len = be64_get(payload.len);
	if (request->contexts)
		*refusal = nbd_request_check(conn, request);
	return 0;
}

/* Takes it, or throws it away when the request is refused. */
static suspends int receive_what_follows(struct nbd_conn *conn, struct nbd_request *request,
	uint64_t payload_bytes, struct nbd_refusal *refusal)
{
	/* "Request message": longer ones end an extended session. */
	if (conn->form == NBD_EXTENDED && payload_bytes > BLK_REQUEST_MAX)
		return -EPROTO;
	if (request->type == NBD_CMD_BLOCK_STATUS)
		return receive_status_payload(conn, request, refusal);
	*refusal = nbd_request_check(conn, request);
	if (refusal->error)
		return skip_payload(conn, payload_bytes);
	return receive_payload(conn, request);
}

static suspends int receive_request(struct nbd_conn *conn)
{
	struct nbd_request request;
	struct nbd_refusal refusal;

	/* The rest comes with the slot. */
	memset(&request, 0, offsetof(struct nbd_request, pieces));
	request.conn = conn;
	request.contexts = conn->contexts;
	int ret = receive_header(conn, &request);

	if (ret)
		return ret;
	if (nbd_traced(conn->trace))
		nbd_trace_request(&request);
	if (request.type == NBD_CMD_DISC) {
		conn->stopping = true;
		conn->pos = conn->fill; /* nothing may follow */
		return 0;
	}
	uint64_t payload_bytes = payload_bytes_of(conn, &request);
	if (payload_bytes)
		ret = receive_what_follows(conn, &request, payload_bytes, &refusal);
	else
		refusal = nbd_request_check(conn, &request);
	if (!ret)
		ret = start_request(conn, &request, refusal);
	if (ret)
		nbd_payload_put(&request);
	return ret;
}

/* --- the connection --------------------------------------------------------------------------- */

/* Goes on where the predecessor was: the rest of its last reply, then its requests that have none. */
static suspends int resume(struct nbd_conn *conn)
{
	struct nbd_request request;
	enum nbd_error error;
	size_t sent_bytes;
	int ret = 0;

	if (nbd_line_cut_off(conn->line, &request, &error, &sent_bytes)) {
		struct nbd_request *cut_off = take_slot(conn, &request);

		cut_off->kind = NBD_COUNTERS; /* counted when it was done */
		nbd_form_again(cut_off, error);
		nbd_reply_rest(cut_off, sent_bytes);
	}
	const struct nbd_held *after = NULL;
	while (!ret && nbd_line_next_unanswered(conn->line, after, &request)) {
		after = request.held;
		ret = start_request(conn, &request, nbd_request_check(conn, &request));
	}
	return ret;
}

static suspends int receive_all(struct nbd_conn *conn)
{
	int ret = conn->line ? resume(conn) : 0;

	while (!ret && (ret = next_request(conn)) > 0) {
		ret = receive_request(conn);
		if (!ret && has_had_its_turn(conn))
			let_others_run(conn);
	}
	return ret;
}

suspends int nbd_receive_requests(struct nbd_conn *conn)
{
	if (!conn->line) {
		conn->chunk = chunk_get(conn);
		if (!conn->chunk)
			return -ENOMEM;
	}
	conn->batching = true;
	int ret = receive_all(conn);
	pause_batch(conn);
	if (conn->chunk)
		chunk_put(conn, conn->chunk);
	return ret;
}
