/*
 * A connection in transmission; private to lib/nbd. Everything here lives on the export's home reactor.
 *
 * Who does what:
 *	receive.c	one coroutine per connection (the caller of nbd_serve()) reads requests
 *	request.c	each request runs in a coroutine of its own and ends with a reply
 *	read.c		reads, whole or with their holes left out
 *	status.c	block status
 *	form.c		a reply's bytes, in the form that was negotiated
 *	reply.c		replies that are ready wait in `ready`; they are sent together
 *
 * Batching: everything one receive brought in is run before the socket is touched again. `batching` is
 * true meanwhile: the receiver sends the replies when it is through. Replies that become ready at any
 * other time are sent by a task at the end of the reactor's turn.
 *
 * Memory: `slots` bounds the requests, `buffered_bytes` what they hold, and an export's connections
 * share what the export may have. When any of it is used up the receiver waits for `room`, so a client that
 * does not read its replies fills its own share and stops.
 *
 * Fairness: after a bounded amount of work the receiver lets the others run, however much it has at hand.
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

/*
 * A reply with several chunks: what does not fit into the request. In a pooled buffer of its own. A chunk
 * takes two pieces at most (head, and data); an error at the end takes three.
 */
#define NBD_READ_EXTENTS_MAX 24

struct nbd_reply_head {
	uint8_t bytes[48]; /* the longest: extended header, error, offset */
};

struct nbd_fragments {
	struct iovec pieces[2 * NBD_READ_EXTENTS_MAX + 3];
	struct nbd_reply_head heads[NBD_READ_EXTENTS_MAX + 1];
	unsigned count; /* heads used */
};

struct nbd_request {
	struct list link; /* in conn->free or conn->ready */
	struct nbd_conn *conn;
	uint16_t type, flags; /* NBD_CMD_..., NBD_CMD_FLAG_... */
	be64 cookie;
	uint64_t received_ns;    /* the turn in which it came */
	enum nbd_counter kind;   /* NBD_COUNTERS: was refused */
	uint64_t off, len;       /* the range */
	uint8_t *payload;        /* of a read or write, descriptors of a block status; else NULL */
	uint32_t payload_bytes;  /* what payload was taken for */
	struct nbd_chunk *chunk; /* where payload lies, or NULL: it is a buffer of its own */

	/* The reply, piece by piece: form.c fills it in. What is above is known when it was received. */
	struct iovec *pieces; /* own_pieces, or in fragments */
	unsigned piece_count;
	size_t reply_bytes; /* of all pieces */
	struct iovec own_pieces[3];
	struct nbd_reply_head head;
	struct nbd_fragments *fragments; /* NULL when the reply has one chunk */
};

/* What is wrong with a request, and what the client's user is told about it. */
struct nbd_refusal {
	enum nbd_error error; /* NBD_SUCCESS: nothing is wrong */
	const char *text;     /* lives for ever */
};

struct nbd_conn {
	struct list link; /* in export->conns */
	struct nbd_export *export;
	const struct nbd_limits *limits;
	bool read_only;
	enum nbd_form form;
	bool allocation;             /* the client may ask for block status */
	struct nbd_latency *latency; /* the export's, for this door */
	const struct nbd_trace *trace;
	char *peer;
	uint64_t id; /* of the visitor */
	uint64_t since_ns;
	struct stream stream;
	struct nbd_counters counters;

	/* receiving */
	struct nbd_chunk *chunk;
	size_t pos, fill; /* chunk->data[pos..fill) is received and not yet used */
	bool batching;
	bool between_requests;  /* the receiver waits for the first byte of a request */
	bool stopping;          /* no more requests, please */
	unsigned turn_requests; /* started since the receiver last let others run */
	uint64_t turn_bytes;

	/* requests */
	struct nbd_request *slots; /* limits->requests of them */
	struct list free;
	unsigned in_flight;      /* slots in use: from the complete request to the sent reply */
	uint64_t buffered_bytes; /* chunks and payload buffers */
	unsigned max_requests;   /* this connection's share */
	uint64_t max_buffered_bytes;
	struct co_queue room; /* woken whenever one of the above goes down */

	/* replies */
	struct list ready;
	unsigned ready_count;
	size_t ready_bytes; /* of all in ready */
	size_t sent_bytes;  /* of the first one in ready */
	bool sending;       /* the sender coroutine runs */
	struct task send_ready;

	/* idleness */
	struct timer idle_timer;
	unsigned moved, moved_before; /* counts receives and sends */
	unsigned still_ticks;         /* since it last changed */

	int error; /* -errno when the connection is broken: nothing is sent any more */
};

/* export.c. An item of "clients" in nbd_export_status(). */
json_t *nbd_conn_status(const struct nbd_conn *conn);

/* receive.c. 0 at a clean end. */
suspends int nbd_receive_requests(struct nbd_conn *conn);
/* Takes a payload that counts as the connection's; false when memory is exhausted. */
bool nbd_payload_get(struct nbd_request *request, uint32_t size_bytes);
/* Gives back what payload points to. */
void nbd_payload_put(struct nbd_request *request);
bool nbd_fragments_get(struct nbd_request *request);
void nbd_fragments_put(struct nbd_request *request);

/* request.c. What is wrong with a request as such; read-only and range come last. */
struct nbd_refusal nbd_request_check(
	const struct nbd_conn *conn, const struct nbd_request *request);
/* What a client is told of ret, the -errno of a call on the disk. */
struct nbd_refusal nbd_refusal_of(const struct nbd_request *request, int ret);
void nbd_refuse(struct nbd_request *request, struct nbd_refusal refusal);
/* What it holds in memory beyond what was received with it. */
uint32_t nbd_request_buffer_bytes(const struct nbd_request *request);
/* Runs it, or as much of it as goes without waiting. Ends in nbd_reply(). */
void nbd_request_start(struct nbd_request *request);

/* read.c, status.c: the reply is formed afterwards, whatever the result (0 or -errno, for the counters). */
suspends int nbd_read(struct nbd_request *request);
suspends int nbd_status(struct nbd_request *request);
#define NBD_STATUS_BUFFER_BYTES (64U << 10)
#define NBD_ALLOCATION_ID       1U /* of the metadata context */

/* form.c. Each forms a whole reply. */
void nbd_form_success(struct nbd_request *request); /* without data */
/* off: where it went wrong, NULL when that is not known. */
void nbd_form_error(struct nbd_request *request, struct nbd_refusal refusal, const uint64_t *off);
void nbd_form_data(struct nbd_request *request); /* payload is what was read */
void nbd_form_status(struct nbd_request *request, unsigned descriptor_count);
/* Part after part of a reply in several chunks: after nbd_fragments_get(), at most NBD_READ_EXTENTS_MAX. */
void nbd_form_part_data(struct nbd_request *request, uint64_t off, uint32_t len, bool last);
void nbd_form_part_hole(struct nbd_request *request, uint64_t off, uint32_t len, bool last);
void nbd_form_part_error(struct nbd_request *request, struct nbd_refusal refusal, uint64_t off);

/* reply.c */
void nbd_reply_init(struct nbd_conn *conn);
/* The reply is formed: sends it, soon. */
void nbd_reply(struct nbd_request *request);
/* Sends what is ready as far as the socket takes it; the rest follows when it takes more. */
void nbd_reply_send(struct nbd_conn *conn);
/* Nothing can be sent any more: forgets the replies and wakes who waits for the client. */
void nbd_conn_break(struct nbd_conn *conn, int error);
