/*
 * Fuzzes the NBD server: an input is what one client sends.
 *
 * Its first byte says how: in which phase and with what negotiated the connection starts, whether the
 * export is read-only, and in pieces of what size the rest is sent (so that requests arrive in halves). Then the client
 * closes its end, while it goes on reading until the server closes too. The server must come to an end
 * by itself; that it does not crash or leak is for the sanitizers to say.
 *
 * The same inputs are replayed by tests/unit/test_nbd_corpus.c.
 */
#include <stdlib.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "nbd/server.h"
#include "rt/stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

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
	struct stream client;
	int server_fd;
	struct co_group running;
};

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
		.allocation = session->mode & (MODE_STRUCTURED | MODE_EXTENDED),
	};
	const struct nbd_visitor visitor = { .peer = "fuzzer" };

	if (session->mode & MODE_HANDSHAKE)
		nbd_client(&session->server, session->server_fd, &visitor);
	else
		nbd_serve(&session->export, &transmission);
}

static suspends void send_input(void *arg)
{
	struct session *session = arg;
	size_t piece_bytes = session->mode >> MODE_PIECES_SHIFT;
	int ret = 0;

	piece_bytes = piece_bytes ? piece_bytes * piece_bytes : session->size;
	for (size_t pos = 0; pos < session->size && !ret; pos += piece_bytes) {
		struct iovec iov = { (void *)(session->data + pos),
			MIN(piece_bytes, session->size - pos) };

		ret = stream_send(&session->client, &iov, 1, NO_DEADLINE);
		co_yield ();
	}
	shutdown(session->client.fd, SHUT_WR);
}

static suspends void read_replies(void *arg)
{
	struct session *session = arg;
	CLEANUP(free) uint8_t *replies = malloc(65536);

	while (stream_recv(&session->client, replies, 65536, NO_DEADLINE) > 0)
		;
}

static suspends void run(void *arg)
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
		socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) ||
		stream_init(&session->client, fds[0]))
		abort();
	session->server_fd = fds[1];
	nbd_server_init(&session->server, &nbd_limits_default);
	nbd_export_init(&session->export, "disk", "a disk", top, reactor_self(), false);
	if (nbd_publish(&session->server, &session->export, &err))
		abort();

	co_group_init(&session->running);
	co_group_start(&session->running, serve, session);
	co_group_start(&session->running, read_replies, session);
	co_group_start(&session->running, send_input, session);
	co_group_wait(&session->running);

	stream_fini(&session->client);
	nbd_withdraw(&session->export, 0);
	nbd_server_close(&session->server, 0);
	stack_close(top);
	blk_env_fini(&env);
	conf_free(stack);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct reactor *reactor;
	struct err err;

	if (!size)
		return 0;
	if (!reactor && reactor_create(&reactor, "threads", &err))
		abort();
	struct session session = { .mode = data[0], .data = data + 1, .size = size - 1 };
	reactor_run_main(reactor, run, &session);
	return 0;
}
