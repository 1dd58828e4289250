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
 *	journal*.c	what outlives the process, for a connection that does (`line` is not NULL)
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
	struct list link; /* in conn->free, conn->running or conn->ready */
	struct nbd_conn *conn;
	uint16_t type, flags; /* NBD_CMD_..., NBD_CMD_FLAG_... */
	be64 cookie;
	uint64_t received_ns;    /* the turn in which it came */
	enum nbd_counter kind;   /* NBD_COUNTERS: was refused */
	uint64_t off, len;       /* the range */
	unsigned contexts;       /* of a block status: those wanted */
	uint8_t *payload;        /* of a read or write, descriptors of a block status; else NULL */
	uint32_t payload_bytes;  /* what payload was taken for */
	struct nbd_chunk *chunk; /* where payload lies, or NULL: it is a buffer of its own */
	struct nbd_held *held;   /* its place in the journal; NULL where there is none */

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
	unsigned contexts;           /* selected, by id; 0: no block status */
	struct nbd_latency *latency; /* the export's, for this door */
	const struct nbd_trace *trace;
	char *peer;
	uint64_t id; /* of the visitor */
	uint64_t since_ns;
	struct stream stream;
	struct nbd_counters counters;
	struct nbd_line *line; /* in the journal; NULL: the connection ends with the process */
	uint32_t max_len;      /* of a read or write */

	/* receiving */
	struct nbd_chunk *chunk; /* NULL when there is a line */
	/* chunk->data[pos..fill), or the line's ring, is received and not yet used. */
	uint64_t pos, fill;
	bool batching;
	bool between_requests;  /* the receiver waits for the first byte of a request */
	bool stopping;          /* no more requests, please */
	bool parking;           /* nor the rest of one: a successor goes on */
	unsigned turn_requests; /* started since the receiver last let others run */
	uint64_t turn_bytes;

	/* requests */
	struct nbd_request *slots; /* limits->requests of them */
	struct list free;
	struct list running;     /* in the disk, the oldest first */
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

/* What a write, trim or write of zeroes does to a disk. */
struct nbd_change {
	uint16_t type, flags;
	uint64_t off, len;
	const void *payload;
};
struct nbd_change nbd_change_of(const struct nbd_request *request);
suspends int nbd_change(struct blk *blk, const struct nbd_change *change);

/* read.c, status.c: the reply is formed afterwards, whatever the result (0 or -errno, for the counters). */
suspends int nbd_read(struct nbd_request *request);
suspends int nbd_status(struct nbd_request *request);
#define NBD_STATUS_BUFFER_BYTES (64U << 10)

/* form.c. Each forms a whole reply. */
void nbd_form_success(struct nbd_request *request); /* without data */
/* off: where it went wrong, NULL when that is not known. */
void nbd_form_error(struct nbd_request *request, struct nbd_refusal refusal, const uint64_t *off);
void nbd_form_data(struct nbd_request *request); /* payload is what was read */
/* In the simple form, the reply that it had, byte for byte; payload as above if that was data. */
void nbd_form_again(struct nbd_request *request, enum nbd_error error);
/* The descriptors of one metadata context, in the form's own layout. */
void nbd_form_status(
	struct nbd_request *request, unsigned context, const void *descriptors, unsigned count);
/* Part after part of a reply in several chunks: after nbd_fragments_get(), at most NBD_READ_EXTENTS_MAX. */
void nbd_form_part_data(struct nbd_request *request, uint64_t off, uint32_t len, bool last);
void nbd_form_part_hole(struct nbd_request *request, uint64_t off, uint32_t len, bool last);
void nbd_form_part_status(struct nbd_request *request, unsigned context, const void *descriptors,
	unsigned count, bool last);
void nbd_form_part_error(struct nbd_request *request, struct nbd_refusal refusal, uint64_t off);

/* reply.c */
void nbd_reply_init(struct nbd_conn *conn);
/* The reply is formed: sends it, soon. */
void nbd_reply(struct nbd_request *request);
/* Sends what is ready as far as the socket takes it; the rest follows when it takes more. */
void nbd_reply_send(struct nbd_conn *conn);
/* The same for what is left of a reply of which sent_bytes were sent: before all others. */
void nbd_reply_rest(struct nbd_request *request, size_t sent_bytes);
/* Nothing can be sent any more: forgets the replies and wakes who waits for the client. */
void nbd_conn_break(struct nbd_conn *conn, int error);

/*
 * journal_line.c: what a connection with a journal does instead, or in addition. A request is entered when it
 * is complete, and before it is run; conn->pos is its end then.
 */
struct nbd_line *nbd_line_of(struct nbd_journal *journal, unsigned connection); /* or NULL */
int nbd_line_fd(const struct nbd_line *line);
bool nbd_line_may_begin(const struct nbd_line *line, const struct nbd_export *export);
void nbd_line_begin(struct nbd_line *line, struct nbd_conn *conn); /* sets conn's positions */
void nbd_line_end(struct nbd_line *line);
uint32_t nbd_line_max_request(const struct nbd_line *line);
/* In flight; there are entries for as many that wait for a flush. */
#define NBD_LINE_REQUESTS_MAX 1024U

/* The predecessor's reply that is to be completed, and its requests that are to be run again. */
bool nbd_line_cut_off(struct nbd_line *line, struct nbd_request *request, enum nbd_error *error,
	size_t *sent_bytes);
/* The next one in the order of receipt; after: NULL for the first one. */
bool nbd_line_next_unanswered(
	struct nbd_line *line, const struct nbd_held *after, struct nbd_request *request);

uint8_t *nbd_line_at(const struct nbd_line *line, uint64_t position);
size_t nbd_line_space(const struct nbd_line *line); /* for more, behind conn->fill */
int nbd_line_received(struct nbd_line *line, size_t bytes);
/* For one more request that will take so much with nbd_line_payload_get(). */
bool nbd_line_has_room(const struct nbd_line *line, size_t payload_bytes);
/* Not much of either is left, or (full) too little: sees to it that there will be more. */
void nbd_line_wants_room(struct nbd_line *line, bool full);
void nbd_line_enter(struct nbd_line *line, struct nbd_request *request);

uint8_t *nbd_line_payload_get(struct nbd_request *request, size_t size_bytes);
void nbd_line_payload_put(struct nbd_request *request);

void nbd_line_answer(
	struct nbd_request *request); /* its reply is formed, and the next to be sent */
int nbd_line_sent(struct nbd_line *line, size_t bytes);
void nbd_line_done(struct nbd_request *request); /* the reply was sent to its end */

/* journal_keep.c: a change, or a flush, of an export that has a journal. By anybody. */
suspends int nbd_journal_change(struct nbd_journal *journal, struct nbd_request *request);
suspends int nbd_journal_flush(struct nbd_journal *journal);
