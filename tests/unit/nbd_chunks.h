/*
 * For tests of replies in chunks: a client that reads and checks them byte by byte, in the structured and
 * in the extended form. Includes nbd_rig.h.
 */
#pragma once

#include "nbd_rig.h"

struct chunk {
	uint16_t flags, type;
	uint64_t cookie, len;
	bool simple; /* a simple reply; its error is in error */
	uint32_t error;
	uint8_t payload[(1U << 20) + 64];
};

struct chunk_client {
	int fd;
	enum nbd_form form;
	uint64_t cookie, off; /* of the request sent last */
};

static inline uint64_t get32(const void *at)
{
	be32 field;

	memcpy(&field, at, sizeof(field));
	return be32_get(field);
}

static inline uint64_t get64(const void *at)
{
	be64 field;

	memcpy(&field, at, sizeof(field));
	return be64_get(field);
}

static inline struct chunk_client chunk_connect(struct rig *rig, struct nbd_session session)
{
	return (struct chunk_client){
		.fd = rig_connect_as(rig, &rig->exports[0].nbd, session),
		.form = session.form,
		.cookie = 0xc000000000000000,
	};
}

/* Sends a header; len is that of the range or payload, as the form and the flags say. */
static inline void chunk_request(
	struct chunk_client *client, uint16_t type, uint16_t flags, uint64_t off, uint64_t len)
{
	struct nbd_extended_request_header header = {
		.magic = be32_make(NBD_EXTENDED_REQUEST_MAGIC),
		.flags = be16_make(flags),
		.type = be16_make(type),
		.cookie = be64_make(++client->cookie),
		.off = be64_make(off),
		.len = be64_make(len),
	};

	client->off = off;
	if (client->form == NBD_EXTENDED)
		rig_send(client->fd, &header, sizeof(header));
	else
		rig_request(client->fd, type, flags, client->cookie, off, (uint32_t)len);
}

static inline void chunk_recv_structured(struct chunk_client *client, struct chunk *chunk)
{
	struct nbd_structured_reply reply;

	rig_recv(client->fd, (char *)&reply + 4, sizeof(reply) - 4);
	chunk->flags = be16_get(reply.flags);
	chunk->type = be16_get(reply.type);
	chunk->cookie = be64_get(reply.cookie);
	chunk->len = be32_get(reply.len);
}

static inline void chunk_recv_extended(struct chunk_client *client, struct chunk *chunk)
{
	struct nbd_extended_reply reply;

	rig_recv(client->fd, (char *)&reply + 4, sizeof(reply) - 4);
	chunk->flags = be16_get(reply.flags);
	chunk->type = be16_get(reply.type);
	chunk->cookie = be64_get(reply.cookie);
	chunk->len = be64_get(reply.len);
	ck_assert_uint_eq(be64_get(reply.off), client->off);
}

/* Receives a chunk, or a simple reply where one is allowed. */
static inline void chunk_recv(struct chunk_client *client, struct chunk *chunk)
{
	be32 magic;

	rig_recv(client->fd, &magic, sizeof(magic));
	chunk->simple = be32_get(magic) == NBD_SIMPLE_REPLY_MAGIC;
	if (chunk->simple) {
		struct nbd_simple_reply reply;

		ck_assert_int_eq(client->form, NBD_STRUCTURED);
		rig_recv(client->fd, (char *)&reply + 4, sizeof(reply) - 4);
		chunk->error = be32_get(reply.error);
		ck_assert_uint_eq(be64_get(reply.cookie), client->cookie);
		return;
	}
	ck_assert_uint_eq(be32_get(magic), client->form == NBD_EXTENDED
						   ? NBD_EXTENDED_REPLY_MAGIC
						   : NBD_STRUCTURED_REPLY_MAGIC);
	if (client->form == NBD_EXTENDED)
		chunk_recv_extended(client, chunk);
	else
		chunk_recv_structured(client, chunk);
	ck_assert_uint_eq(chunk->cookie, client->cookie);
	ck_assert_uint_eq(chunk->flags & ~NBD_REPLY_FLAG_DONE, 0);
	ck_assert_uint_le(chunk->len, sizeof(chunk->payload));
	rig_recv(client->fd, chunk->payload, chunk->len);
}

/* An error chunk is well-formed; its error. off: UINT64_MAX when it must have none. */
static inline uint32_t chunk_error(const struct chunk *chunk, uint64_t off)
{
	bool has_off = off != UINT64_MAX;
	size_t text_bytes = get32(chunk->payload + 2) & 0xffff;

	ck_assert(!chunk->simple);
	ck_assert_uint_eq(chunk->type, has_off ? NBD_REPLY_ERROR_OFFSET : NBD_REPLY_ERROR);
	ck_assert_uint_gt(text_bytes, 0);
	ck_assert_uint_eq(chunk->len, 6 + text_bytes + (has_off ? 8 : 0));
	if (has_off)
		ck_assert_uint_eq(get64(chunk->payload + 6 + text_bytes), off);
	ck_assert_uint_ne(get32(chunk->payload), 0);
	return (uint32_t)get32(chunk->payload);
}

/* A request without data in its reply: its error. */
static inline uint32_t chunk_command(struct chunk_client *client, uint16_t type, uint16_t flags,
	uint64_t off, uint64_t len, const void *payload)
{
	static struct chunk chunk;

	if (payload && client->form == NBD_EXTENDED)
		flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
	chunk_request(client, type, flags, off, len);
	if (payload)
		rig_send(client->fd, payload, len);
	chunk_recv(client, &chunk);
	if (chunk.simple)
		return chunk.error;
	ck_assert_uint_eq(chunk.flags, NBD_REPLY_FLAG_DONE);
	if (chunk.type != NBD_REPLY_NONE)
		return chunk_error(&chunk, UINT64_MAX);
	ck_assert_uint_eq(chunk.len, 0);
	return NBD_SUCCESS;
}

static inline void chunk_write(
	struct chunk_client *client, uint64_t off, const void *data, uint32_t len)
{
	ck_assert_uint_eq(chunk_command(client, NBD_CMD_WRITE, 0, off, len, data), NBD_SUCCESS);
}

struct chunk_read {
	unsigned data_chunks, hole_chunks;
	uint64_t data_bytes, hole_bytes;
	uint32_t error; /* 0, or of the error chunk it ended with */
	uint64_t error_off;
};

/*
 * A whole read: data and holes land in buf. No byte comes twice, none is outside; all of them come unless
 * there is an error.
 */
static inline struct chunk_read chunk_read(
	struct chunk_client *client, uint16_t flags, uint64_t off, void *buf, uint32_t len)
{
	static struct chunk chunk;
	struct chunk_read result = { 0 };
	uint8_t *seen = calloc(1, len + 1);

	chunk_request(client, NBD_CMD_READ, flags, off, len);
	do {
		uint64_t at = 0, bytes = 0;

		chunk_recv(client, &chunk);
		ck_assert(!chunk.simple);
		if (chunk.type == NBD_REPLY_OFFSET_DATA) {
			ck_assert_uint_gt(chunk.len, 8);
			at = get64(chunk.payload) - off;
			bytes = chunk.len - 8;
			ck_assert(range_ok(at, bytes, len));
			memcpy((char *)buf + at, chunk.payload + 8, bytes);
			result.data_chunks++;
			result.data_bytes += bytes;
		} else if (chunk.type == NBD_REPLY_OFFSET_HOLE) {
			ck_assert_uint_eq(chunk.len, 12);
			at = get64(chunk.payload) - off;
			bytes = get32(chunk.payload + 8);
			ck_assert_uint_gt(bytes, 0);
			ck_assert(range_ok(at, bytes, len));
			memset((char *)buf + at, 0, bytes);
			result.hole_chunks++;
			result.hole_bytes += bytes;
		} else if (chunk.type == NBD_REPLY_ERROR_OFFSET) {
			result.error_off = get64(chunk.payload + chunk.len - 8);
			ck_assert_uint_ge(result.error_off, off);
			ck_assert_uint_lt(result.error_off, off + len);
			result.error = chunk_error(&chunk, result.error_off);
		} else if (chunk.type == NBD_REPLY_ERROR) {
			result.error = chunk_error(&chunk, UINT64_MAX);
		} else {
			ck_assert_uint_eq(chunk.type, NBD_REPLY_NONE);
			ck_assert_uint_eq(chunk.flags, NBD_REPLY_FLAG_DONE);
			ck_assert_uint_eq(chunk.len, 0);
		}
		for (uint64_t i = 0; i < bytes; i++)
			require(!seen[at + i]++);
	} while (!(chunk.flags & NBD_REPLY_FLAG_DONE));
	if (!result.error)
		ck_assert_uint_eq(result.data_bytes + result.hole_bytes, len);
	free(seen);
	return result;
}

/* Between two requests, and in order. */
static inline void chunk_expect_alive(struct chunk_client *client)
{
	static uint32_t count;
	uint32_t there = 0xa11e0000 + count++, back = 0;

	chunk_write(client, RIG_FIRST_SIZE - 4096, &there, sizeof(there));
	ck_assert_uint_eq(chunk_read(client, 0, RIG_FIRST_SIZE - 4096, &back, 4).error, 0);
	ck_assert_uint_eq(back, there);
}

static inline void chunk_disconnect(struct chunk_client *client)
{
	chunk_request(client, NBD_CMD_DISC, 0, 0, 0);
	rig_expect_end(client->fd);
}
