/*
 * A server with one small disk, and one client of it, for the fuzzers of NBD.
 *
 * An input's first byte says how: in which phase and with what negotiated the connection starts, whether the
 * export is read-only, and in pieces of what size the rest is sent (so that requests arrive in halves).
 */
#pragma once

#include <stdlib.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "nbd/server.h"

enum {
	MODE_HANDSHAKE = 1,
	MODE_READ_ONLY = 2,
	MODE_STRUCTURED = 4,
	MODE_EXTENDED = 8,
	MODE_PIECES_SHIFT = 4
};

#define DISK_BYTES (1 << 20)

struct session {
	unsigned mode;
	const uint8_t *data;
	size_t size;
	struct nbd_server server;
	struct nbd_export export;
	struct tls_server *tls_server; /* NULL: no TLS */
	int client_fd, server_fd;
	struct co_group running;
	co_fn *client; /* with the session; takes client_fd */
};

static size_t session_piece_bytes(const struct session *session)
{
	size_t bytes = session->mode >> MODE_PIECES_SHIFT;

	return bytes ? bytes * bytes : MAX(session->size, (size_t)1);
}

static enum nbd_form form_of(unsigned mode)
{
	if (mode & MODE_EXTENDED)
		return NBD_EXTENDED;
	return mode & MODE_STRUCTURED ? NBD_STRUCTURED : NBD_SIMPLE;
}

static suspends void serve(void *arg)
{
	struct session *session = arg;
	const struct nbd_session transmission = {
		.fd = session->server_fd,
		.limits = &session->server.limits,
		.peer = "fuzzer",
		.read_only = session->mode & MODE_READ_ONLY,
		.form = form_of(session->mode),
		.contexts = session->mode & (MODE_STRUCTURED | MODE_EXTENDED)
				    ? 1U << NBD_ALLOCATION_ID | 1U << NBD_DEPTH_ID
				    : 0,
	};
	const struct nbd_visitor visitor = {
		.peer = "fuzzer",
		.tls = session->tls_server ? NBD_TLS_ON : NBD_TLS_OFF,
		.tls_server = session->tls_server,
		.read_only = session->mode & MODE_READ_ONLY,
	};

	if (session->mode & MODE_HANDSHAKE)
		nbd_client(&session->server, session->server_fd, &visitor);
	else
		nbd_serve(&session->export, &transmission);
}

static suspends void session_run(void *arg)
{
	struct session *session = arg;
	struct conf *stack = conf_new(CONF_LIST, NULL, NULL);
	struct conf *layer = conf_add(stack, conf_new(CONF_GROUP, NULL, NULL));
	struct blk_env env;
	struct blk *top;
	struct err err;
	int fds[2];

	conf_add(layer, conf_new_string("layer", NULL, "memory"));
	conf_add(layer, conf_new_int("size", NULL, DISK_BYTES));
	if (blk_env_init(&env) || stack_open(stack, &env, false, &top, &err) ||
		socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds))
		abort();
	session->client_fd = fds[0];
	session->server_fd = fds[1];
	nbd_server_init(&session->server, &nbd_limits_default);
	nbd_export_init(&session->export, "disk", "a disk", top, reactor_self(), false);
	if (nbd_publish(&session->server, &session->export, &err))
		abort();

	co_group_init(&session->running);
	co_group_start(&session->running, serve, session);
	session->client(session);
	co_group_wait(&session->running);

	nbd_withdraw(&session->export, 0);
	nbd_server_close(&session->server, 0);
	stack_close(top);
	blk_env_fini(&env);
	conf_free(stack);
}
