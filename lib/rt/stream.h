/*
 * A connected stream socket for coroutines, plain or with TLS on it (rt/tls.h): one reader and one
 * writer coroutine at a time (they may be different ones).
 *
 * The socket is registered once, edge-triggered, and read only when there may be something: a batch of
 * requests costs one receive and one send. A short read is taken as "drained" and saves the EAGAIN.
 *
 * Errors: -errno; -ECANCELED after stream_cancel(); -ETIMEDOUT at the deadline. End of stream: 0 from
 * stream_recv(), -EPIPE or -ECONNRESET elsewhere.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "rt/lock.h"
#include "rt/reactor.h"

struct tls;

struct stream {
	int fd;          /* owned, non-blocking */
	struct tls *tls; /* owned; NULL: plain */
	struct watch watch;
	bool readable, writable, hung_up, cancelled, reading_cancelled;
	bool watches_writable;
	bool filled; /* the last receive took all it was given room for */
	struct co_queue reader, writer;
};

/* Takes fd over and registers it with the current reactor. On error fd is closed. */
int stream_init(struct stream *stream, int fd);
/* Unregisters and closes. Nobody may be waiting. */
void stream_fini(struct stream *stream);
/* Unregisters and gives the fd back, to move the connection to another reactor. */
int stream_release(struct stream *stream);

/* From now on all data goes through the session, which the stream owns. */
void stream_set_tls(struct stream *stream, struct tls *session);
/* Before stream_release(): the session, to be set on the stream that goes on. NULL when it is plain. */
struct tls *stream_take_tls(struct stream *stream);

/* At least one byte, at most max_bytes; 0 at the end of the stream. */
suspends ssize_t stream_recv(
	struct stream *stream, void *buf, size_t max_bytes, uint64_t deadline_ns);
/* Exactly len_bytes, or an error (-ECONNRESET when the stream ends before). */
suspends int stream_recv_exact(
	struct stream *stream, void *buf, size_t len_bytes, uint64_t deadline_ns);
/* All of it. iov is used up (modified). */
suspends int stream_send(
	struct stream *stream, struct iovec *iov, int iov_count, uint64_t deadline_ns);
/*
 * Sends what goes without waiting; the bytes sent, 0 when the socket is full, or -errno. After less than
 * all, the next call begins with the first byte that was not sent: it may be encrypted already.
 */
ssize_t stream_send_some(struct stream *stream, const struct iovec *iov, int iov_count);

/* Makes everybody who waits, and every later call, return -ECANCELED. */
void stream_cancel(struct stream *stream);

/* The same for receiving alone; what could have been received is still in the socket. */
void stream_cancel_recv(struct stream *stream);

/* --- for tls.c: the socket itself ------------------------------------------------------------- */

/* What there is; -EAGAIN when there is nothing, 0 at the end. */
ssize_t stream_socket_recv(struct stream *stream, void *buf, size_t max_bytes);
/* What goes; 0 when the socket is full. */
ssize_t stream_socket_send(struct stream *stream, const struct iovec *iov, int iov_count);
