/*
 * One client's TLS session on a stream; see tls.h.
 *
 * GnuTLS never touches the socket: it takes encrypted bytes out of `in` and puts them into `out`. So its
 * handshake can run on any thread, one receive or send carries many records, and a full socket
 * is no state of GnuTLS's.
 *
 * In: a receive fills the buffer, records are taken out of it until it is empty; then the buffer goes back, so
 * that an idle session holds none.
 *
 * Out: a batch of plain bytes is encrypted only when nothing encrypted is left over, and counts as sent when
 * the last byte of the whole batch is in the socket. Until then `owed_bytes` says how much of what the
 * caller offers again is in `out` already.
 *
 * Buffers: a session is moved to another reactor at most while it negotiates (tls_attach()), and pooled
 * buffers belong to one reactor. So until it is attached for the second time (`bulk`), its buffers are small
 * and from the heap; what is left in one of these then is used up first.
 *
 * Failure modes: whatever GnuTLS calls fatal, a renegotiation, and an end without a goodbye end the session with
 * -EPROTO or -ECONNRESET. A peer that sends records without content is cut off after EMPTY_RECORDS_MAX.
 */
#include "rt/tls.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "rt/buf.h"
#include "rt/tls_private.h"

#define SMALL_BUFFER_BYTES (32U << 10)
#define BULK_BUFFER_BYTES  (256U << 10)

#define RECORD_MAX_BYTES      (16U << 10) /* RFC 8446, 5.1 */
#define RECORD_OVERHEAD_BYTES 512U        /* header, padding and tag: 256 in TLS 1.3, more in 1.2 */

#define EMPTY_RECORDS_MAX 64 /* in a row, such as new keys */

/* data[pos..fill) is used; data is NULL while nothing is. */
struct tls_buffer {
	uint8_t *data;
	size_t pos, fill, size_bytes;
	bool pooled;
};

struct tls {
	gnutls_session_t session;
	struct stream *stream;
	struct tls_buffer in, out;
	size_t owed_bytes; /* plain bytes that `out` stands for */
	unsigned attached; /* how often; from the second time on it stays there */
	int recv_error;    /* what the next receive says, after the bytes before it */
	char text[TLS_TEXT_MAX_BYTES];
};

/* --- buffers ---------------------------------------------------------------------------------- */

static bool buffer_take(const struct tls *tls, struct tls_buffer *buffer)
{
	bool bulk = tls->attached > 1;

	if (buffer->data)
		return true;
	*buffer = (struct tls_buffer){ .size_bytes = bulk ? BULK_BUFFER_BYTES : SMALL_BUFFER_BYTES,
		.pooled = bulk };
	buffer->data = bulk ? buf_get(buffer->size_bytes) : malloc(buffer->size_bytes);
	return buffer->data;
}

static void buffer_drop(struct tls_buffer *buffer)
{
	if (buffer->pooled)
		buf_put(buffer->data, buffer->size_bytes);
	else
		free(buffer->data);
	*buffer = (struct tls_buffer){};
}

/* --- what GnuTLS calls ------------------------------------------------------------------------ */

/* Fills the empty `in` from the socket. The bytes, 0 at the end, or -errno. */
static ssize_t refill(struct tls *tls)
{
	if (!tls->stream || !tls->stream->readable)
		return -EAGAIN;
	if (!buffer_take(tls, &tls->in))
		return -ENOMEM;
	ssize_t count = stream_socket_recv(tls->stream, tls->in.data, tls->in.size_bytes);
	if (count > 0)
		tls->in.fill = (size_t)count;
	else
		buffer_drop(&tls->in);
	return count;
}

static ssize_t pull(gnutls_transport_ptr_t transport, void *data, size_t max_bytes)
{
	struct tls *tls = transport;
	struct tls_buffer *in = &tls->in;

	if (!in->data) {
		ssize_t count = refill(tls);
		if (count <= 0) {
			gnutls_transport_set_errno(tls->session, (int)-count);
			return count ? -1 : 0;
		}
	}
	size_t count = MIN(max_bytes, in->fill - in->pos);
	memcpy(data, in->data + in->pos, count);
	in->pos += count;
	if (in->pos == in->fill)
		buffer_drop(in);
	return (ssize_t)count;
}

/* GnuTLS may ask whether to wait: never, pull() tells. */
static int pull_timeout(gnutls_transport_ptr_t transport, unsigned timeout_ms)
{
	return 1;
}

static ssize_t push(gnutls_transport_ptr_t transport, const void *data, size_t len_bytes)
{
	struct tls *tls = transport;
	struct tls_buffer *out = &tls->out;

	if (!buffer_take(tls, out)) {
		gnutls_transport_set_errno(tls->session, ENOMEM);
		return -1;
	}
	size_t count = MIN(len_bytes, out->size_bytes - out->fill);
	if (!count) {
		gnutls_transport_set_errno(tls->session, EAGAIN);
		return -1;
	}
	memcpy(out->data + out->fill, data, count);
	out->fill += count;
	return (ssize_t)count;
}

/* --- a session -------------------------------------------------------------------------------- */

static struct tls *session_create(struct tls_server *server, struct err *err)
{
	struct tls *tls = calloc(1, sizeof(*tls));
	int ret = tls ? gnutls_init(&tls->session, GNUTLS_SERVER | GNUTLS_NONBLOCK |
							   GNUTLS_NO_SIGNAL | GNUTLS_NO_TICKETS)
		      : GNUTLS_E_MEMORY_ERROR;

	if (!ret)
		ret = tls_server_apply(server, tls->session);
	if (ret) {
		err_set(err, ENOMEM, "TLS: %s", gnutls_strerror(ret));
		tls_free(tls);
		return NULL;
	}
	gnutls_handshake_set_timeout(tls->session, GNUTLS_INDEFINITE_TIMEOUT); /* ours counts */
	gnutls_transport_set_ptr(tls->session, tls);
	gnutls_transport_set_pull_function(tls->session, pull);
	gnutls_transport_set_pull_timeout_function(tls->session, pull_timeout);
	gnutls_transport_set_push_function(tls->session, push);
	return tls;
}

void tls_free(struct tls *tls)
{
	if (!tls)
		return;
	if (tls->session)
		gnutls_deinit(tls->session);
	buffer_drop(&tls->in);
	buffer_drop(&tls->out);
	free(tls);
}

const char *tls_text(const struct tls *tls)
{
	return tls->text;
}

void tls_attach(struct tls *tls, struct stream *stream)
{
	tls->stream = stream;
	if (stream)
		tls->attached++;
}

/* --- handshake -------------------------------------------------------------------------------- */

struct handshake_step {
	struct tls *tls;
	int ret;
};

static void handshake_step(void *arg)
{
	struct handshake_step *step = arg;

	step->ret = gnutls_handshake(step->tls->session);
	if (step->ret && gnutls_error_is_fatal(step->ret))
		gnutls_alert_send_appropriate(step->tls->session, step->ret);
}

static suspends int send_out(struct tls *tls, struct stream *stream, uint64_t deadline_ns)
{
	struct iovec iov = { tls->out.data, tls->out.fill };

	if (!tls->out.fill)
		return 0;
	int ret = stream_send(stream, &iov, 1, deadline_ns);
	buffer_drop(&tls->out);
	return ret;
}

static suspends int receive_in(struct tls *tls, struct stream *stream, uint64_t deadline_ns)
{
	if (!buffer_take(tls, &tls->in))
		return -ENOMEM;
	ssize_t count = stream_recv(stream, tls->in.data, tls->in.size_bytes, deadline_ns);
	if (count <= 0) {
		buffer_drop(&tls->in);
		return count ? (int)count : -ECONNRESET;
	}
	tls->in.fill = (size_t)count;
	return 0;
}

static suspends int handshake(
	struct tls *tls, struct stream *stream, uint64_t deadline_ns, struct err *err)
{
	for (;;) {
		struct handshake_step step = { .tls = tls };
		co_offload(handshake_step, &step);
		bool fatal = step.ret && gnutls_error_is_fatal(step.ret);

		int ret = send_out(tls, stream, deadline_ns);
		if (fatal)
			return tls_handshake_error(tls->session, step.ret, err);
		if (!ret && !step.ret)
			return 0;
		if (!ret && !tls->in.data)
			ret = receive_in(tls, stream, deadline_ns);
		if (ret)
			return err_sys(err, -ret, "TLS handshake");
	}
}

suspends int tls_accept(struct stream *stream, struct tls_server *server, uint64_t deadline_ns,
	struct tls **session, struct err *err)
{
	struct tls *tls = session_create(server, err);

	*session = NULL;
	if (!tls)
		return -ENOMEM;
	int ret = handshake(tls, stream, deadline_ns, err);
	if (ret) {
		tls_free(tls);
		return ret;
	}
	tls_describe(tls->session, tls->text);
	log_debug("tls: %s", tls->text);
	*session = tls;
	return 0;
}

/* --- receiving -------------------------------------------------------------------------------- */

static int error_of(int gnutls_error)
{
	switch (gnutls_error) {
	case GNUTLS_E_PULL_ERROR:
	case GNUTLS_E_PUSH_ERROR:
	case GNUTLS_E_PREMATURE_TERMINATION:
		return -ECONNRESET;
	case GNUTLS_E_MEMORY_ERROR:
		return -ENOMEM;
	default: /* GNUTLS_E_REHANDSHAKE among them */
		return -EPROTO;
	}
}

ssize_t tls_recv_some(struct tls *tls, void *buf, size_t max_bytes)
{
	size_t total_bytes = 0;
	int empty_records = 0;

	while (!tls->recv_error && total_bytes < max_bytes) {
		ssize_t count = gnutls_record_recv(
			tls->session, (char *)buf + total_bytes, max_bytes - total_bytes);
		if (count > 0) {
			total_bytes += (size_t)count;
			empty_records = 0;
		} else if (count == 0) {
			break;
		} else if (count != GNUTLS_E_AGAIN && count != GNUTLS_E_INTERRUPTED) {
			log_debug("tls: receive: %s", gnutls_strerror((int)count));
			tls->recv_error = error_of((int)count);
		} else if (!tls->in.data && !tls->stream->readable) {
			return total_bytes ? (ssize_t)total_bytes : -EAGAIN;
		} else if (++empty_records > EMPTY_RECORDS_MAX) {
			tls->recv_error = -EPROTO;
		}
	}
	return total_bytes || !tls->recv_error ? (ssize_t)total_bytes : tls->recv_error;
}

/* --- sending ---------------------------------------------------------------------------------- */

/* Takes plain bytes from where iov[*index] has *skip_bytes behind it; small pieces share a record. */
static const void *next_record(const struct iovec *iov, int iov_count, int *index,
	size_t *skip_bytes, uint8_t *staging, size_t *len_bytes)
{
	size_t fill = 0;

	while (*index < iov_count && fill < RECORD_MAX_BYTES) {
		const uint8_t *piece = (const uint8_t *)iov[*index].iov_base + *skip_bytes;
		size_t left_bytes = iov[*index].iov_len - *skip_bytes;
		size_t taken_bytes = MIN(left_bytes, RECORD_MAX_BYTES - fill);

		*skip_bytes += taken_bytes;
		if (taken_bytes == left_bytes) {
			(*index)++;
			*skip_bytes = 0;
		}
		if (taken_bytes == RECORD_MAX_BYTES) {
			*len_bytes = taken_bytes;
			return piece;
		}
		memcpy(staging + fill, piece, taken_bytes);
		fill += taken_bytes;
	}
	*len_bytes = fill;
	return staging;
}

static bool has_space(const struct tls_buffer *out)
{
	return out->size_bytes - out->fill >= RECORD_MAX_BYTES + RECORD_OVERHEAD_BYTES;
}

/* As much as fits into the empty `out`. 0 or -errno. */
static int encrypt(struct tls *tls, const struct iovec *iov, int iov_count)
{
	uint8_t *staging = buf_get(RECORD_MAX_BYTES);
	size_t skip_bytes = 0, len_bytes;
	int index = 0, ret = staging && buffer_take(tls, &tls->out) ? 0 : -ENOMEM;

	while (!ret && has_space(&tls->out)) {
		const void *record = next_record(
			iov, iov_count, &index, &skip_bytes, staging, &len_bytes);
		size_t done_bytes = 0;
		if (!len_bytes)
			break;
		/* One record a call, of all that is offered unless smaller ones were agreed on. */
		while (!ret && done_bytes < len_bytes && has_space(&tls->out)) {
			ssize_t count = gnutls_record_send(tls->session,
				(const char *)record + done_bytes, len_bytes - done_bytes);
			if (count > 0)
				done_bytes += (size_t)count;
			else
				ret = error_of((int)count);
		}
		tls->owed_bytes += done_bytes;
	}
	buf_put(staging, RECORD_MAX_BYTES);
	return ret;
}

ssize_t tls_send_some(struct tls *tls, const struct iovec *iov, int iov_count)
{
	struct tls_buffer *out = &tls->out;

	if (!tls->owed_bytes) {
		int ret = encrypt(tls, iov, iov_count);
		if (ret)
			return ret;
	}
	if (out->data) {
		struct iovec rest = { out->data + out->pos, out->fill - out->pos };
		ssize_t count = stream_socket_send(tls->stream, &rest, 1);
		if (count < 0)
			return count;
		out->pos += (size_t)count;
		if (out->pos < out->fill)
			return 0;
		buffer_drop(out);
	}
	size_t sent_bytes = tls->owed_bytes;
	tls->owed_bytes = 0;
	return (ssize_t)sent_bytes;
}

void tls_goodbye(struct tls *tls)
{
	if (tls->out.data || tls->recv_error || !tls->stream || tls->stream->cancelled)
		return;
	gnutls_bye(tls->session, GNUTLS_SHUT_WR);
	struct iovec iov = { tls->out.data, tls->out.fill };
	if (tls->out.fill)
		stream_socket_send(tls->stream, &iov, 1);
}
