/*
 * A connected stream socket for coroutines, and later the same over TLS: one reader and one writer
 * coroutine at a time (they may be different ones).
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

struct stream {
	int fd; /* owned, non-blocking */
	struct watch watch;
	bool readable, writable, hung_up, cancelled;
	bool filled; /* the last receive took all it was given room for */
	struct co_queue reader, writer;
};

/* Takes fd over and registers it with the current reactor. On error fd is closed. */
int stream_init(struct stream *stream, int fd);
/* Unregisters and closes. Nobody may be waiting. */
void stream_fini(struct stream *stream);
/* Unregisters and gives the fd back, to move the connection to another reactor. */
int stream_release(struct stream *stream);

/* At least one byte, at most max_bytes; 0 at the end of the stream. */
suspends ssize_t stream_recv(
	struct stream *stream, void *buf, size_t max_bytes, uint64_t deadline_ns);
/* Exactly len_bytes, or an error (-ECONNRESET when the stream ends before). */
suspends int stream_recv_exact(
	struct stream *stream, void *buf, size_t len_bytes, uint64_t deadline_ns);
/* All of it. iov is used up (modified). */
suspends int stream_send(
	struct stream *stream, struct iovec *iov, int iov_count, uint64_t deadline_ns);
/* Sends what goes without waiting; the bytes sent, 0 when the socket is full, or -errno. */
ssize_t stream_send_some(struct stream *stream, const struct iovec *iov, int iov_count);

/* Makes everybody who waits, and every later call, return -ECANCELED. */
void stream_cancel(struct stream *stream);
