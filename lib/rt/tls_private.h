/*
 * What tls.c (a session) and tls_server.c (what it is checked against) share.
 */
#pragma once

#include "rt/gnutls_load.h"
#include "rt/tls.h"

#define TLS_TEXT_MAX_BYTES 256

/* Makes a fresh session one of the server's. A GnuTLS error code. */
int tls_server_apply(struct tls_server *server, gnutls_session_t session);

/* Why a handshake failed, as a text with what was wrong with the client's certificate. -EPROTO. */
int tls_handshake_error(gnutls_session_t session, int gnutls_error, struct err *err);

/* Fills text for tls_text(). */
void tls_describe(gnutls_session_t session, char text[TLS_TEXT_MAX_BYTES]);
