/*
 * Stream sockets for coroutines; see stream.h.
 *
 * `readable` and `writable` say that the next call may succeed. They are set by the edges epoll
 * reports and cleared by a call that took, or placed, less than it was asked for: whatever comes after
 * that makes a new edge. The peer's end makes no further edge, so once seen (`hung_up`) the socket
 * stays readable and the receive itself tells data from the end.
 *
 * A reader that found its buffer filled lets the others run before it reads again, so a client that sends
 * faster than it is served cannot shut out the rest.
 */
#include "rt/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/tls.h"

#define EVENTS (EPOLLIN | EPOLLRDHUP | EPOLLET)

/*
 * Is it asked whether the socket is writable? Only from a send that came short on: a local socket makes an
 * edge of every piece that the peer takes out, which would wake us once more for each reply.
 */
static void watch_writable(struct stream *stream, bool on)
{
	if (stream->watches_writable == on)
		return;
	stream->watches_writable = on;
	watch_modify(&stream->watch, on ? EVENTS | EPOLLOUT : EVENTS);
}

static void stream_event(struct watch *watch, uint32_t epoll_events)
{
	struct stream *stream = container_of(watch, struct stream, watch);

	if (epoll_events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		stream->hung_up = true;
	if (epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		stream->readable = true;
		co_queue_wake_one(&stream->reader);
	}
	if (epoll_events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
		if (stream->writable)
			watch_writable(stream, false); /* no news */
		stream->writable = true;
		co_queue_wake_one(&stream->writer);
	}
}

int stream_init(struct stream *stream, int fd)
{
	int flags = fcntl(fd, F_GETFL), ret = 0;

	*stream = (struct stream){ .fd = fd, .writable = true };
	co_queue_init(&stream->reader);
	co_queue_init(&stream->writer);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK))
		ret = -errno;
	if (!ret)
		ret = watch_add(&stream->watch, fd, EVENTS, stream_event);
	if (ret) {
		close(fd);
		stream->fd = -1;
	}
	return ret;
}

int stream_release(struct stream *stream)
{
	int fd = stream->fd;

	if (fd >= 0)
		watch_remove(&stream->watch);
	stream->fd = -1;
	return fd;
}

void stream_fini(struct stream *stream)
{
	if (stream->tls) {
		tls_goodbye(stream->tls);
		tls_free(stream->tls);
		stream->tls = NULL;
	}
	int fd = stream_release(stream);
	if (fd >= 0)
		close(fd);
}

void stream_set_tls(struct stream *stream, struct tls *session)
{
	stream->tls = session;
	if (session)
		tls_attach(session, stream);
}

struct tls *stream_take_tls(struct stream *stream)
{
	struct tls *session = stream->tls;

	stream->tls = NULL;
	if (session)
		tls_attach(session, NULL);
	return session;
}

void stream_cancel(struct stream *stream)
{
	stream->cancelled = true;
	co_queue_wake_all(&stream->reader);
	co_queue_wake_all(&stream->writer);
}

void stream_cancel_recv(struct stream *stream)
{
	stream->reading_cancelled = true;
	co_queue_wake_all(&stream->reader);
}

/* --- receiving -------------------------------------------------------------------------------- */

ssize_t stream_socket_recv(struct stream *stream, void *buf, size_t max_bytes)
{
	ssize_t count;

	if (!stream->readable)
		return -EAGAIN;
	do {
		count = recv(stream->fd, buf, max_bytes, 0);
	} while (count < 0 && errno == EINTR);
	if (count < 0)
		count = -errno;
	if (count != (ssize_t)max_bytes && !stream->hung_up)
		stream->readable = false;
	return count;
}

static ssize_t receive_some(struct stream *stream, void *buf, size_t max_bytes)
{
	ssize_t count = stream->tls ? tls_recv_some(stream->tls, buf, max_bytes)
				    : stream_socket_recv(stream, buf, max_bytes);

	stream->filled = count == (ssize_t)max_bytes;
	return count;
}

suspends ssize_t stream_recv(
	struct stream *stream, void *buf, size_t max_bytes, uint64_t deadline_ns)
{
	if (stream->filled) {
		stream->filled = false;
		co_yield_turn();
	}
	for (;;) {
		if (stream->cancelled || stream->reading_cancelled)
			return -ECANCELED;
		ssize_t count = receive_some(stream, buf, max_bytes);
		if (count != -EAGAIN)
			return count;
		if (!stream->readable && !co_queue_wait_until(&stream->reader, deadline_ns))
			return -ETIMEDOUT;
	}
}

suspends int stream_recv_exact(
	struct stream *stream, void *buf, size_t len_bytes, uint64_t deadline_ns)
{
	while (len_bytes) {
		ssize_t count = stream_recv(stream, buf, len_bytes, deadline_ns);

		if (count <= 0)
			return count ? (int)count : -ECONNRESET;
		buf = (char *)buf + count;
		len_bytes -= (size_t)count;
	}
	return 0;
}

/* --- sending ---------------------------------------------------------------------------------- */

static size_t iov_total_bytes(const struct iovec *iov, int iov_count)
{
	size_t total_bytes = 0;

	for (int i = 0; i < iov_count; i++)
		total_bytes += iov[i].iov_len;
	return total_bytes;
}

ssize_t stream_socket_send(struct stream *stream, const struct iovec *iov, int iov_count)
{
	struct msghdr message = {
		.msg_iov = (struct iovec *)iov,
		.msg_iovlen = (size_t)MIN(iov_count, IOV_MAX),
	};
	ssize_t count;

	if (!stream->writable)
		return 0;
	do {
		count = sendmsg(stream->fd, &message, MSG_NOSIGNAL);
	} while (count < 0 && errno == EINTR);
	if (count < 0 && errno != EAGAIN)
		return -errno;
	count = MAX(count, 0);
	if ((size_t)count < iov_total_bytes(iov, (int)message.msg_iovlen)) {
		stream->writable = false;
		watch_writable(stream, true);
	}
	return count;
}

ssize_t stream_send_some(struct stream *stream, const struct iovec *iov, int iov_count)
{
	if (stream->cancelled)
		return -ECANCELED;
	return stream->tls ? tls_send_some(stream->tls, iov, iov_count)
			   : stream_socket_send(stream, iov, iov_count);
}

/* Skips what was sent, and empty elements. */
static void iov_advance(struct iovec **iov, int *iov_count, size_t sent_bytes)
{
	while (*iov_count && sent_bytes >= (*iov)->iov_len) {
		sent_bytes -= (*iov)->iov_len;
		(*iov)++;
		(*iov_count)--;
	}
	if (*iov_count) {
		(*iov)->iov_base = (char *)(*iov)->iov_base + sent_bytes;
		(*iov)->iov_len -= sent_bytes;
	}
}

suspends int stream_send(
	struct stream *stream, struct iovec *iov, int iov_count, uint64_t deadline_ns)
{
	iov_advance(&iov, &iov_count, 0);
	while (iov_count) {
		ssize_t sent_bytes = stream_send_some(stream, iov, iov_count);

		if (sent_bytes < 0)
			return (int)sent_bytes;
		iov_advance(&iov, &iov_count, (size_t)sent_bytes);
		if (!iov_count)
			break;
		if (stream->writable)
			co_yield (); /* TLS: encrypting takes time that others need too */
		else if (!co_queue_wait_until(&stream->writer, deadline_ns))
			return -ETIMEDOUT;
	}
	return stream->cancelled ? -ECANCELED : 0;
}
