/*
 * The server side of NBD: exports, and what one connected client goes through. No sockets are opened
 * here: whoever accepts (the listeners) or makes (the kernel door) a connected stream socket hands it in.
 *
 *	nbd_client()	a client of a listener: handshake, in which it chooses a published export, then
 *			transmission, until it leaves. Runs on the reactor of its nbd_server; the
 *			transmission part runs on the export's home reactor.
 *	nbd_serve()	transmission only, for a socket whose other end needs no handshake (the kernel).
 *			Runs on the export's home reactor.
 *
 * Both take the socket over and return when nothing is left of the connection: a client that is gone
 * waits here for its requests under way, whose buffers belong to the layers until they return.
 *
 * What one client can hold is bounded by struct nbd_limits; a client that does not read its replies
 * is not read from. All rules of the wire: NBD's doc/proto.md; sections are named where they apply.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "base/list.h"
#include "blk/blk.h"
#include "nbd/proto.h"
#include "rt/lock.h"
#include "rt/reactor.h"

struct nbd_limits {
	uint64_t handshake_ns;      /* from the first byte to the end of the handshake */
	uint64_t linger_ns;         /* for the last replies, after the last request was read */
	unsigned handshake_options; /* per handshake */
	unsigned requests;          /* in flight per connection, 1..NBD_REQUESTS_MAX */
	uint64_t buffer_bytes;      /* per connection; one single request may exceed it */
	uint64_t idle_ns; /* a connection on which nothing moves for so long is cut; 0: never */

	/* Per export: its connections share these evenly, each has one request at least. */
	unsigned export_requests;
	uint64_t export_buffer_bytes;
};

#define NBD_REQUESTS_MAX 4096

extern const struct nbd_limits nbd_limits_default;

enum nbd_counter {
	NBD_COUNT_READ,
	NBD_COUNT_WRITE,
	NBD_COUNT_FLUSH,
	NBD_COUNT_TRIM,
	NBD_COUNT_ZERO,
	NBD_COUNT_CACHE,
	NBD_COUNT_BLOCK_STATUS,
	NBD_COUNTERS
};

/* Requests answered. */
struct nbd_counters {
	uint64_t requests[NBD_COUNTERS];
	uint64_t bytes[NBD_COUNTERS];
	uint64_t errors; /* answered with an error, ill-formed ones included */
};

/* How long they took, by kind; see latency.h. */
#define NBD_LATENCY_BUCKETS 26

struct nbd_latency {
	uint64_t counts[NBD_COUNTERS][NBD_LATENCY_BUCKETS];
};

/* The log of the protocol: what one client asks and is told. */
struct nbd_trace {
	atomic_bool on; /* any thread, at any time */
	/* Gets every line while it is on; on whatever reactor the client is served by. */
	void (*line)(const struct nbd_trace *trace, const char *text);
};

/* --- who comes in ----------------------------------------------------------------------------- */

struct nbd_export;
struct nbd_journal;
struct tls;
struct tls_server;

/* What a listener expects of its clients. */
enum nbd_tls { NBD_TLS_OFF, NBD_TLS_ON, NBD_TLS_REQUIRED };

/* A client as the one who lets it in sees it. Outlives the call it is given to. */
struct nbd_visitor {
	const char *peer; /* for status and log, e.g. "127.0.0.1:40312" */
	uint64_t id; /* for nbd_disconnect(), unique among clients; 0: it cannot be disconnected */
	enum nbd_tls tls;
	struct tls_server *tls_server; /* not NULL unless tls is off */
	bool read_only;                /* also where the export is not */
	const struct nbd_trace *trace; /* NULL: none */
	/* Told why the handshake of TLS failed; may be NULL. Server's reactor. */
	void (*tls_failed)(const struct nbd_visitor *visitor, const char *reason);
	/* Whether the export is there for this client; NULL: all are. Server's reactor. */
	bool (*may_enter)(const struct nbd_visitor *visitor, const struct nbd_export *export);
};

/* Where a connection came from. */
enum nbd_origin { NBD_FROM_LISTENER, NBD_FROM_KERNEL, NBD_ORIGINS };

/* --- exports ---------------------------------------------------------------------------------- */

/* A disk as clients see it. Embedded in the owner's struct; the owner sets the first part. */
struct nbd_export {
	const char *name;        /* 1 to NBD_STRING_MAX_BYTES bytes */
	const char *description; /* at most as long; NULL or "": none */
	struct blk *blk; /* home only; there it may be exchanged for another one of the same size */
	struct reactor *home; /* blk's; transmission runs there */
	bool read_only;       /* whatever blk allows */
	bool tls_required;    /* clients without TLS are told that they need it */
	unsigned max_clients; /* inside at once; 0: any number */

	/* On the server's reactor. */
	struct list link; /* in nbd_server.exports */
	struct co_group
		clients; /* who needs it to stay: nbd_client() calls that look at it or chose it */
	unsigned inside; /* those that chose it */

	/* On the home reactor. */
	struct list conns; /* of struct nbd_conn */
	unsigned conn_count;
	struct co_group serving;     /* nbd_serve() calls */
	bool closing;                /* nbd_serve() refuses with -ESHUTDOWN */
	struct nbd_journal *journal; /* of a kernel device: nbd_journal_replay(); NULL: none */
	uint64_t answered;           /* requests that the disk has been through with */
	struct nbd_counters
		counters; /* of connections that are gone; nbd_export_status() adds the others */
	struct nbd_latency latency[NBD_ORIGINS]; /* of all connections */
};

void nbd_export_init(struct nbd_export *export, const char *name, const char *description,
	struct blk *blk, struct reactor *home, bool read_only);

/*
 * Home reactor. Ends all connections: they stop reading at the next boundary between requests, answer what
 * they have read, and close. After grace_ns they are cut; requests under way are waited for even then.
 * Later connections are refused. Then blk may be closed.
 * Connections with a journal are parked instead: they stop reading wherever they are, nothing is lost
 * when they are cut, and a successor goes on. What the journal keeps is settled.
 */
suspends void nbd_export_close(struct nbd_export *export, uint64_t grace_ns);

/*
 * The transmission flags as clients are told (NBD_FLAG_..., proto.h); the kernel wants the same.
 * read_only: also when the export is not.
 */
uint16_t nbd_export_flags(const struct nbd_export *export, bool read_only);

/* What the disk has in hand, for all connections. */
struct nbd_progress {
	unsigned running;
	uint64_t oldest_ns; /* when the oldest of these came; now: there is none */
	uint64_t answered;  /* since the beginning */
};

/* Home reactor. */
struct nbd_progress nbd_export_progress(const struct nbd_export *export);

/*
 * Home reactor. {"running": n, "oldest_seconds": n, "connections": n, "requests": {"read": {"requests", "bytes"}, ...}, "errors", "latency",
 * "kernel_latency", "clients": [...]}
 */
json_t *nbd_export_status(struct nbd_export *export);

/* What requests and replies look like, by what the client asked for in its handshake. */
enum nbd_form {
	NBD_SIMPLE,     /* as every client can: simple replies */
	NBD_STRUCTURED, /* NBD_OPT_STRUCTURED_REPLY: replies in chunks */
	NBD_EXTENDED,   /* NBD_OPT_EXTENDED_HEADERS: and 64-bit lengths both ways */
};

/* Metadata contexts by their ids. */
enum { NBD_ALLOCATION_ID = 1, NBD_DEPTH_ID = 2, NBD_CONTEXT_IDS };
#define NBD_CONTEXTS_MAX 2

/* A connection on its way into transmission. */
struct nbd_session {
	int fd; /* connected; nbd_serve() takes it over */
	const struct nbd_limits *limits;
	const char *peer; /* who it is, for status and log */
	uint64_t id;      /* of the visitor, 0: none */
	struct tls *tls;  /* on the socket, taken over too; NULL: none */
	bool read_only;   /* also when the export is not */
	enum nbd_origin origin;
	const struct nbd_trace *trace; /* outlives the connection; NULL: none */
	enum nbd_form form;
	unsigned
		contexts; /* the metadata contexts that were selected: bit n for the one with id n */

	/*
	 * A connection that outlives this process (journal.h): number `connection` of the journal, which
	 * knows the socket. fd is -1, there is no TLS, the form is NBD_SIMPLE. NULL: any other.
	 */
	struct nbd_journal *journal;
	unsigned connection;
};

/*
 * Home reactor. Serves until the client leaves. limits outlive the call, peer need not. 0, NBD_SHUT if it left at a
 * boundary between requests without a word (NBD_CMD_DISC), or -errno.
 *
 * With a journal: goes on where the predecessor was. NBD_PARKED after nbd_export_close(): the socket is as it
 * was and the journal ready for a successor. After anything else the connection is over for good: the
 * socket, whoever else has a descriptor of it, was shut down, so that the driver sees the end.
 */
#define NBD_PARKED 1
#define NBD_SHUT   2
suspends int nbd_serve(struct nbd_export *export, const struct nbd_session *session);

/* --- a server: what the clients of all listeners can choose from ------------------------------ */

struct nbd_server {
	struct nbd_limits limits;
	struct list exports;     /* of struct nbd_export; the first one is the default export */
	struct list handshakes;  /* under way */
	struct list sessions;    /* of clients that chose an export */
	struct co_group clients; /* nbd_client() calls */
	bool closing;            /* nbd_client() refuses with -ESHUTDOWN, options are refused */
};

/* Everything below is called on one reactor, the server's. */
void nbd_server_init(struct nbd_server *server, const struct nbd_limits *limits);

/* For clients that come from now on. */
void nbd_server_set_limits(struct nbd_server *server, const struct nbd_limits *limits);

/* Clients can choose it from now on. -EEXIST when there is one of that name, -ENAMETOOLONG, -EINVAL. */
int nbd_publish(struct nbd_server *server, struct nbd_export *export, struct err *err);

/* Makes a published export the default one. */
void nbd_make_first(struct nbd_server *server, struct nbd_export *export);

/* Hides it from new clients, then nbd_export_close(). Harmless when it was never published. */
suspends void nbd_withdraw(struct nbd_export *export, uint64_t grace_ns);

/* From now on every option is answered with NBD_REP_ERR_SHUTDOWN. Connections in transmission go on. */
void nbd_server_stop(struct nbd_server *server);

/*
 * For the end: nothing accepts clients any more, and every export was withdrawn. Gives the handshakes
 * that are left grace_ns to take the hint, ends them, and returns when no nbd_client() runs.
 */
suspends void nbd_server_close(struct nbd_server *server, uint64_t grace_ns);

/* Takes fd over. 0: it left, with or without a word; or -errno as nbd_serve(). */
suspends int nbd_client(struct nbd_server *server, int fd, const struct nbd_visitor *visitor);

/* Clients that have not chosen an export yet, as "clients" of nbd_export_status(): "export" is null. */
json_t *nbd_server_handshakes(const struct nbd_server *server);

/* Cuts the connection of the client with that id. -ENOENT when there is none. */
suspends int nbd_disconnect(struct nbd_server *server, uint64_t id);
