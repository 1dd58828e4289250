/*
 * A connection in transmission; private to lib/nbd. Everything here lives on the export's home reactor.
 *
 * Who does what:
 *	receive.c	one coroutine per connection (the caller of nbd_serve()) reads requests
 *	request.c	each request runs in a coroutine of its own and ends with a reply
 *	reply.c		replies that are ready wait in `ready`; they are sent together
 *
 * Batching: everything one receive brought in is run before the socket is touched again. `batching` is
 * true meanwhile: the receiver sends the replies when it is through. Replies that become ready at any
 * other time are sent by a task at the end of the reactor's turn.
 *
 * Memory: `slots` bounds the requests, `buffered_bytes` what they hold. When either is used up the
 * receiver waits for `room`, so a client that does not read its replies fills its own share and stops.
 */
#pragma once

#include "nbd/proto.h"
#include "nbd/server.h"
#include "rt/stream.h"

/*
 * What is received at once. Payloads that are complete in it are written to the disk from where they
 * are; a chunk is given back when the last of these writes is done.
 */
#define NBD_CHUNK_BYTES (256U << 10)

struct nbd_chunk {
	unsigned refs; /* the receiver's, and one per write that uses its payload in place */
	uint8_t data[];
};
#define NBD_CHUNK_DATA_BYTES (NBD_CHUNK_BYTES - sizeof(struct nbd_chunk))

struct nbd_request {
	struct list link; /* in conn->free or conn->ready */
	struct nbd_conn *conn;
	uint16_t type, flags; /* NBD_CMD_..., NBD_CMD_FLAG_... */
	uint32_t len;
	uint64_t off;
	uint8_t *payload;        /* of a read or write, else NULL */
	struct nbd_chunk *chunk; /* where payload lies, or NULL: it is a buffer of its own */
	struct nbd_simple_reply reply;
};

struct nbd_conn {
	struct list link; /* in export->conns */
	struct nbd_export *export;
	const struct nbd_limits *limits;
	bool read_only;
	char *peer;
	uint64_t since_ns;
	struct stream stream;
	struct nbd_counters counters;

	/* receiving */
	struct nbd_chunk *chunk;
	size_t pos, fill; /* chunk->data[pos..fill) is received and not yet used */
	bool batching;
	bool between_requests; /* the receiver waits for the first byte of a request */
	bool stopping;         /* no more requests, please */

	/* requests */
	struct nbd_request *slots; /* limits->requests of them */
	struct list free;
	unsigned in_flight;      /* slots in use: from the complete request to the sent reply */
	uint64_t buffered_bytes; /* chunks and payload buffers */
	struct co_queue room;    /* woken whenever one of the above goes down */

	/* replies */
	struct list ready;
	unsigned ready_count;
	size_t ready_bytes; /* of all in ready */
	size_t sent_bytes;  /* of the first one in ready */
	bool sending;       /* the sender coroutine runs */
	struct task send_ready;
	int error; /* -errno when the connection is broken: nothing is sent any more */
};

/* receive.c. 0 at a clean end. */
suspends int nbd_receive_requests(struct nbd_conn *conn);
/* A buffer that counts as the connection's; NULL when memory is exhausted. */
void *nbd_buffer_get(struct nbd_conn *conn, size_t size_bytes);
/* Gives back what payload points to. */
void nbd_payload_put(struct nbd_request *request);

/* request.c. What is wrong with a request as such: NBD_SUCCESS when nothing is. */
enum nbd_error nbd_request_check(const struct nbd_conn *conn, const struct nbd_request *request);
/* Runs it, or as much of it as goes without waiting. Ends in nbd_reply(). */
void nbd_request_start(struct nbd_request *request);

/* reply.c */
void nbd_reply_init(struct nbd_conn *conn);
void nbd_reply(struct nbd_request *request, enum nbd_error error);
/* Sends what is ready as far as the socket takes it; the rest follows when it takes more. */
void nbd_reply_send(struct nbd_conn *conn);
/* Nothing can be sent any more: forgets the replies and wakes who waits for the client. */
void nbd_conn_break(struct nbd_conn *conn, int error);
