/*
 * TLS for streams, by GnuTLS: what a server shows and asks (struct tls_server), and one client's session
 * (struct tls).
 *
 * The handshake is done by tls_accept() on a stream that was plain until then; with the session handed
 * to stream_set_tls(), the functions of stream.h mean the bytes inside of TLS. TLS 1.2 and 1.3 are spoken.
 * There is no session resumption and no renegotiation: who asks for that is disconnected.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/err.h"
#include "rt/stream.h"

/* What clients are shown and asked for. Shared by all sessions, never changed. */
struct tls_server;

struct tls_options {
	/*
	 * A folder with server-cert.pem and server-key.pem, with ca-cert.pem when clients are verified,
	 * and ca-crl.pem where there are revoked ones; or NULL.
	 */
	const char *certificates;
	const char *psk; /* a file of lines `user:hexkey`, read at every handshake; or NULL */
	bool verify_clients;
	/* Subjects of client certificates ("CN=alice,O=example", RFC 4514), whole; none: all of the CA's. */
	const char *const *subjects;
	size_t subject_count;
	const char *priority; /* of GnuTLS, in place of ours; or NULL */
};

/* At least one of certificates and psk. The options may go away. Plain code that reads files. */
int tls_server_create(
	struct tls_server **server, const struct tls_options *options, struct err *err);
/* One more who needs it; the same. All on one thread. */
struct tls_server *tls_server_get(struct tls_server *server);
/* The last one frees it, after all its sessions; NULL is fine. */
void tls_server_free(struct tls_server *server);

/*
 * The handshake with the client at the other end of a plain stream. The computing is done on a thread of
 * the offload pool. -ETIMEDOUT, -ECANCELED, -ECONNRESET; -EPROTO when the client is refused or speaks no
 * TLS, with the reason in err.
 */
suspends int tls_accept(struct stream *stream, struct tls_server *server, uint64_t deadline_ns,
	struct tls **session, struct err *err);

/* What was agreed on, and with whom: "TLS1.3, AES-256-GCM, PSK alice". Lives as long as the session. */
const char *tls_text(const struct tls *session);

void tls_free(struct tls *session); /* NULL is fine */

/* --- for stream.c ----------------------------------------------------------------------------- */

/* The stream that the session is on, NULL while it is on its way to another reactor. */
void tls_attach(struct tls *session, struct stream *stream);

/* As stream_recv() and stream_send_some() without waiting: -EAGAIN, and 0, when it cannot go on. */
ssize_t tls_recv_some(struct tls *session, void *buf, size_t max_bytes);
ssize_t tls_send_some(struct tls *session, const struct iovec *iov, int iov_count);

/* Tells the client that this is the end, if the socket takes it at once. */
void tls_goodbye(struct tls *session);
