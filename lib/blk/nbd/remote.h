/*
 * Private to the nbd layer: its structs, and what its files share.
 *
 *	remote.c		options, opening and closing, what the server promised, status
 *	remote_conn.c		a connection's life: handshake, events, loss, back-off, disconnect
 *	remote_request.c	the ops: choosing a connection, waiting for one, asking again, flush
 *
 * The layer is "the remote" in names, since those of libnbd begin with nbd_.
 */
#pragma once

#include "blk/blk.h"
#include "blk/nbd/libnbd_load.h"
#include "rt/reactor.h"

#define REMOTE_CONNECTIONS_MAX 16 /* as many as servers' defaults allow one client */

/* What the server said in the handshake, in our terms. */
struct remote_terms {
	uint64_t size;
	uint32_t block_size, preferred_size, max_request;
	bool read_only;
	bool flush, fua, trim, zero, fast_zero, multi_conn, extents;
};

struct remote;

struct remote_conn {
	struct remote *remote;
	struct nbd_handle *handle; /* NULL: none */
	bool ready;                /* takes requests */
	bool lost;                 /* ready no more; its keeper clears up */
	bool was_up;               /* it was ready before */
	bool answered;             /* at least one reply came: it works */
	uint64_t
		born; /* remote->acked when it was established: older writes it may know nothing of */

	uint64_t asked; /* remote->sizes_asked when its handshake began */

	struct list requests; /* what the server has not answered yet */
	unsigned request_count;
	uint64_t completed; /* answers so far */

	struct watch watch;
	uint32_t watched; /* epoll events the watch is for */
	uint32_t events;  /* what came, during handshake and disconnect */
	uint64_t heard_ns;
	struct timer silence;    /* armed while requests wait for a server that may have died */
	struct co_queue changed; /* its keeper waits here */
};

struct remote {
	struct blk blk;

	/* options */
	const char *uri;
	bool read_only;
	int64_t connections;
	int64_t reconnect_s, reconnect_delay_s, timeout_s;
	bool write_through;
	const char *tls_certificates, *tls_psk_file;
	bool tls_verify;

	struct remote_terms terms; /* of the first connection: what we build on */
	struct remote_conn conns[REMOTE_CONNECTIONS_MAX];
	unsigned conn_count;
	unsigned ready_count;
	struct co_group keepers;
	struct co_queue waiting; /* requests, for a connection */
	uint64_t give_up_ns;     /* while ready_count is 0: when requests are to wait no longer */
	bool refused;            /* the server is there, but it is not the same disk any more */
	uint64_t resize_to;      /* a size that is right, too, when it comes back; 0: none */
	uint64_t sizes_asked;    /* how often a resize asked what the size is */
	bool closing;

	/* Writes are counted as they are acknowledged; see remote_request.c on flush. */
	uint64_t acked, flushed;

	/* status */
	struct err trouble; /* the last loss or failure to connect; code 0: none so far */
	int64_t trouble_time;
	uint64_t reconnects, repeated, flushes_refused;
};

enum remote_type {
	REMOTE_READ,
	REMOTE_WRITE,
	REMOTE_FLUSH,
	REMOTE_TRIM,
	REMOTE_ZERO,
	REMOTE_EXTENTS,
};

/* A request of ours while a server has it; a variable of the op. */
struct remote_request {
	struct list link;
	struct remote_conn *conn;
	struct co *waiter; /* NULL: not suspended */
	bool done;
	int result; /* -errno as the server said; -ENOTCONN: the connection was lost before it answered */

	enum remote_type type;
	uint64_t off;
	uint64_t len;
	void *buf;      /* a write's is not written to */
	uint32_t flags; /* LIBNBD_CMD_FLAG_... */
	struct blk_extents *extents;
};

/* --- remote.c --------------------------------------------------------------------------------- */

/* Reads what the handshake brought. An error when we cannot work with it. */
int remote_read_terms(struct nbd_handle *handle, struct remote_terms *terms, struct err *err);
/* Whether a server that we came back to still is what we were promised, or has the size that we wait for. */
int remote_check_terms(
	const struct remote *remote, const struct remote_terms *terms, struct err *err);
/* Remembers err for status, and tells the administrator unless it is the same as last time. */
void remote_note_trouble(struct remote *remote, const struct err *err);

/* --- remote_conn.c ---------------------------------------------------------------------------- */

void remote_conn_init(struct remote_conn *conn, struct remote *remote);
/* Connects and shakes hands, in bounded time. On an error there is no handle. */
suspends int remote_conn_connect(struct remote_conn *conn, struct err *err);
/* Says goodbye, in bounded time, and frees the handle, if there is one. */
suspends void remote_conn_disconnect(struct remote_conn *conn);
/* Keeps the connection up, from now until remote->closing, and disconnects it then. */
suspends void remote_conn_keep(void *arg);
/* Takes requests from now on. Connected, its terms checked. */
int remote_conn_start(struct remote_conn *conn, struct err *err);
/* After a call that sent something: looks what the socket is to be watched for, and whether it lives. */
void remote_conn_settle(struct remote_conn *conn);
/* The connection is of no use any more. Legal inside callbacks of libnbd: frees nothing. */
void remote_conn_lose(struct remote_conn *conn, int code, const char *why);

/* --- remote_request.c ------------------------------------------------------------------------- */

/* False: there is none, and it is time to give up. */
suspends bool remote_wait_for_connection(struct remote *remote, uint64_t give_up_ns);
/* The server has answered, or will never. */
void remote_request_end(struct remote_request *request, int result);

/* A flush of what can be, for ourselves: what is in doubt stays so, for the next flush of others to tell. */
suspends int remote_flush_known(struct remote *remote);

suspends int remote_read(struct blk *blk, uint64_t off, void *buf, size_t len);
suspends int remote_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags);
suspends int remote_flush(struct blk *blk);
suspends int remote_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
suspends int remote_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
suspends int remote_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents);
