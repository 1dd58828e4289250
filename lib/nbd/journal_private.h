/*
 * What a journal is made of; private to lib/nbd. The rules are in journal.c.
 *
 * In the shared memory, page by page:
 *
 *	struct journal_head				what it is, and how large its parts are
 *	per connection:	struct journal_line		where the connection is
 *			struct journal_entry [...]	requests received and not yet done with
 *			ring of what comes in		the stream of requests, byte for byte
 *			ring of what goes out		what is read from the disk, until it is sent
 *
 * Integers are the machine's own: a journal never leaves its machine. "Position" is a count of bytes since the
 * connection began, in the stream that the word next to it names.
 *
 * The other half of each part is in the process: struct nbd_journal, nbd_line, nbd_held. It is
 * made anew by nbd_journal_open().
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "nbd/conn.h"
#include "nbd/journal.h"

/* --- in the shared memory --------------------------------------------------------------------- */

#define JOURNAL_MAGIC      UINT64_C(0x626c6b7365617421) /* "blkseat!" */
/* In its place when the rest means nothing: nothing is missed, or all that was before (nbd_seat.inherited). */
#define JOURNAL_BLANK      UINT64_C(0x626c6b7365617430) /* "blkseat0" */
#define JOURNAL_LOST       UINT64_C(0x626c6b736561743f) /* "blkseat?" */
#define JOURNAL_VERSION    1U                           /* of everything in this part */
#define JOURNAL_ENTRIES    2048U                        /* per connection */
#define JOURNAL_PAGE_BYTES 4096U

#define JOURNAL_RING_MIN_BYTES (UINT64_C(2) << 20)

struct journal_head {
	uint64_t magic; /* written last */
	uint32_t version;
	uint32_t connections;
	uint64_t memory_bytes;
	uint64_t ring_bytes; /* of each ring; a power of two */
};
_Static_assert(sizeof(struct journal_head) <= JOURNAL_PAGE_BYTES, "fits into its page");

/*
 * How to get from a socket's SO_PEEK_OFF to the count of bytes it ever gave away: `position` when it
 * stood at `armed`, and by one more for each step down. armed 0: what counts is `position`.
 */
struct journal_note {
	uint64_t position;
	uint64_t armed;
};

struct journal_count {
	struct journal_note notes[2];
	uint32_t current; /* the one of them that is valid */
	uint32_t unused;
};

struct journal_line {
	uint64_t parsed; /* position of the first request that is not in the table */
	struct journal_count received;
	struct journal_count
		sent; /* armed 0: sent; else: taken by the driver, to which add what it has not */
	uint64_t socket; /* SO_COOKIE of the server's end; 0: not known */
};
_Static_assert(sizeof(struct journal_line) <= JOURNAL_PAGE_BYTES, "fits into its page");

enum journal_state {
	JOURNAL_FREE,
	JOURNAL_RECEIVED, /* to be done */
	JOURNAL_ANSWERED, /* the reply is, or will be, in the stream at reply_at */
	JOURNAL_KEPT,     /* the reply was sent; the disk may have it in this process only */
};

struct journal_entry {
	uint64_t at; /* position of the request; the entry is one only if that is below `parsed` */
	uint64_t order; /* of receipt, over all connections */
	be64 cookie;
	uint64_t off;
	uint64_t reply_at; /* position among what is sent */
	uint64_t data_at;  /* position in the ring of what goes out: a read's data */
	uint32_t len;
	uint16_t type, flags;
	uint32_t error; /* enum nbd_error in the reply */
	uint16_t state; /* enum journal_state */
	uint16_t safe;  /* answered: its effect does not end with the process */
};
_Static_assert(sizeof(struct journal_entry) == 64, "a cache line");

/* Where everything of one connection lies, relative to its part of the memory. */
#define JOURNAL_ENTRIES_OFF JOURNAL_PAGE_BYTES
#define JOURNAL_RINGS_OFF   (JOURNAL_ENTRIES_OFF + JOURNAL_ENTRIES * sizeof(struct journal_entry))

/*
 * Between any two stores whose order matters: the compiler keeps them apart (a process that dies leaves what
 * it had stored so far, in program order). Tests put the end of the process here.
 */
extern void (*nbd_journal_step)(void);

static inline void journal_step(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (unlikely(nbd_journal_step != NULL))
		nbd_journal_step();
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* --- in the process --------------------------------------------------------------------------- */

/* What belongs to an entry. */
struct nbd_held {
	struct list link; /* in line->free, or in line->in_use: by position, those with a payload */
	struct list out_link; /* in line->out_use: by position */
	struct list log_link; /* in journal->log: by order; of what changes the disk */
	struct journal_entry *entry;
	struct nbd_line *line;
	uint64_t out_at; /* where its place in the ring of what goes out begins */
	uint64_t epoch;  /* in which it was done */
	bool durable;    /* FUA was honoured */
};

/* A connection's part. */
struct nbd_line {
	struct nbd_journal *journal;
	struct nbd_seat_ends ends;
	struct journal_line *shared;
	struct journal_entry *entries;
	uint8_t *in, *out; /* the rings, each mapped twice in a row: no piece of one has a seam */
	struct nbd_held *held;
	struct nbd_conn *conn; /* while it is served */
	struct list free, in_use, out_use;
	unsigned free_count;
	uint64_t out_end; /* position behind the last place taken in the ring of what goes out */

	uint64_t received, sent;             /* positions */
	uint64_t received_armed, sent_armed; /* at these positions the counters were last armed */
	uint64_t reply_end;                  /* where the next reply goes */
};

struct nbd_journal {
	struct nbd_export *export; /* NULL until nbd_journal_replay() */
	struct journal_head *head;
	uint8_t *mapped; /* the whole region; head and lines lie in it */
	size_t mapped_bytes;
	uint64_t ring_bytes;
	unsigned line_count;
	uint64_t rearm_bytes; /* JOURNAL_REARM_BYTES; less in tests */
	bool resumed;
	bool orphaned; /* its sockets are gone: of use is only what was acknowledged */
	bool lost;     /* there should have been a predecessor's */
	struct nbd_line lines[NBD_SEAT_CONNECTIONS_MAX];

	uint64_t next_order;
	struct list log;        /* of nbd_held: entries that change the disk, in order of receipt */
	unsigned kept_count;    /* of them in state JOURNAL_KEPT */
	uint64_t epoch;         /* goes up when a flush begins */
	uint64_t durable_epoch; /* what was done up to then is durable */
	bool flushing_itself;
	bool flush_failed; /* the last one */
	bool full;         /* a request waits for room */
	bool gave_up;      /* since the last one that did not fail */
	struct co_group flushes;
};

static inline bool journal_changes_disk(uint16_t type)
{
	return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES;
}

static inline uint32_t journal_payload_bytes(const struct journal_entry *entry)
{
	return entry->type == NBD_CMD_WRITE ? entry->len : 0;
}

static inline uint64_t journal_payload_at(const struct journal_entry *entry)
{
	return entry->at + sizeof(struct nbd_request_header);
}

static inline uint64_t journal_request_end(const struct journal_entry *entry)
{
	return journal_payload_at(entry) + journal_payload_bytes(entry);
}

static inline uint64_t journal_reply_end(const struct journal_entry *entry)
{
	bool has_data = entry->type == NBD_CMD_READ && !entry->error;

	return entry->reply_at + sizeof(struct nbd_simple_reply) + (has_data ? entry->len : 0);
}

static inline uint8_t *journal_in(const struct nbd_line *line, uint64_t position)
{
	return line->in + (position & (line->journal->ring_bytes - 1));
}

static inline uint8_t *journal_out(const struct nbd_line *line, uint64_t position)
{
	return line->out + (position & (line->journal->ring_bytes - 1));
}

/* journal_count.c. Both are as if nothing had happened when they fail. */
int journal_count_received(const struct nbd_line *line, uint64_t *position, struct err *err);
int journal_count_sent(const struct nbd_line *line, uint64_t *position, struct err *err);
/* Nothing is received, or sent, meanwhile. Positions are line->received and line->sent. */
int journal_arm_received(struct nbd_line *line);
int journal_arm_sent(struct nbd_line *line);
/* Whether sockets of this kernel count as they should. */
int journal_count_probe(struct err *err);
/* Counters start at the one, and are armed again when the other was counted: many receives earlier. */
#define JOURNAL_ARMED_BYTES (UINT64_C(1) << 30)
#define JOURNAL_REARM_BYTES (UINT64_C(1) << 29)

/* journal.c. Blank, then new, whatever it was; bound to nothing. */
int journal_renew(struct nbd_journal *journal, struct err *err);

/* journal_keep.c. The reply was sent: the entry is free, or kept. */
void journal_done(struct nbd_held *held);
