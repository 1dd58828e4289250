/*
 * What clients can choose from, and the way of one client through handshake and transmission.
 *
 * The way crosses threads: the handshake runs on the server's reactor, where the list of exports
 * lives; the socket then moves to the export's home reactor, while the coroutine that started the
 * client waits here for its end. As long as it does, the export counts it in `clients`, so
 * nbd_withdraw() cannot miss a client that is just on its way.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "nbd/handshake.h"

void nbd_server_init(struct nbd_server *server, const struct nbd_limits *limits)
{
	*server = (struct nbd_server){ .limits = *limits };
	list_init(&server->exports);
	list_init(&server->handshakes);
	co_group_init(&server->clients);
}

int nbd_publish(struct nbd_server *server, struct nbd_export *export, struct err *err)
{
	size_t name_bytes = strlen(export->name);

	if (!name_bytes)
		return err_set(err, EINVAL, "an export needs a name");
	if (name_bytes > NBD_STRING_MAX_BYTES)
		return err_set(err, ENAMETOOLONG, "the name has %zu bytes, at most %d are allowed",
			name_bytes, NBD_STRING_MAX_BYTES);
	if (export->description && strlen(export->description) > NBD_STRING_MAX_BYTES)
		return err_set(err, ENAMETOOLONG,
			"the description has %zu bytes, at most %d are allowed",
			strlen(export->description), NBD_STRING_MAX_BYTES);
	list_for_each (link, &server->exports) {
		if (!strcmp(list_entry(link, struct nbd_export, link)->name, export->name))
			return err_set(
				err, EEXIST, "there is an export \"%s\" already", export->name);
	}
	list_push_back(&server->exports, &export->link);
	return 0;
}

struct close_call {
	struct nbd_export *export;
	uint64_t grace_ns;
};

static suspends void close_export(void *arg)
{
	struct close_call *call = arg;

	nbd_export_close(call->export, call->grace_ns);
}

suspends void nbd_withdraw(struct nbd_export *export, uint64_t grace_ns)
{
	struct close_call call = { export, grace_ns };

	list_remove(&export->link);
	co_call_on(export->home, close_export, &call);
	/* Who had chosen the export but was not there yet is turned away. */
	co_group_wait(&export->clients);
}

void nbd_server_stop(struct nbd_server *server)
{
	server->closing = true;
}

struct cut {
	struct timer timer;
	struct nbd_server *server;
};

static void cut_handshakes(struct timer *timer)
{
	struct cut *cut = container_of(timer, struct cut, timer);

	list_for_each (link, &cut->server->handshakes)
		stream_cancel(&list_entry(link, struct nbd_handshake, link)->stream);
}

suspends void nbd_server_close(struct nbd_server *server, uint64_t grace_ns)
{
	struct cut cut = { .server = server };

	nbd_server_stop(server);
	timer_init(&cut.timer, cut_handshakes);
	timer_arm(&cut.timer, reactor_now_ns() + grace_ns);
	co_group_wait(&server->clients);
	timer_cancel(&cut.timer);
}

struct serve_call {
	struct nbd_export *export;
	struct nbd_session session;
	int ret;
};

static suspends void serve(void *arg)
{
	struct serve_call *call = arg;

	call->ret = nbd_serve(call->export, &call->session);
}

/* Fills in the session; chosen is NULL when there is none to serve. */
static suspends int handshake(
	struct nbd_server *server, struct nbd_session *session, struct nbd_export **chosen)
{
	struct nbd_handshake *handshake = calloc(1, sizeof(*handshake));

	if (!handshake) {
		close(session->fd);
		return -ENOMEM;
	}
	handshake->server = server;
	handshake->deadline_ns = reactor_now_ns() + server->limits.handshake_ns;
	int ret = stream_init(&handshake->stream, session->fd);
	if (!ret) {
		list_push_back(&server->handshakes, &handshake->link);
		ret = nbd_handshake_run(handshake);
		list_remove(&handshake->link);
		*chosen = handshake->chosen;
		session->form = handshake->form;
		session->allocation = *chosen && nbd_meta_selected(handshake, *chosen);
		if (*chosen)
			session->fd = stream_release(&handshake->stream);
		else
			stream_fini(&handshake->stream);
	}
	nbd_meta_forget(handshake);
	free(handshake->replies);
	free(handshake);
	return ret;
}

suspends int nbd_client(struct nbd_server *server, int fd, const char *peer)
{
	struct nbd_export *export = NULL;

	if (server->closing) {
		close(fd);
		return -ESHUTDOWN;
	}
	co_group_enter(&server->clients);
	struct serve_call call = {
		.session = { .fd = fd, .limits = &server->limits, .peer = peer },
	};
	int ret = handshake(server, &call.session, &export);
	if (export) {
		call.export = export;
		co_call_on(export->home, serve, &call);
		ret = call.ret;
		co_group_leave(&export->clients);
	}
	co_group_leave(&server->clients);
	return ret;
}
