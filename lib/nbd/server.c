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
#include "nbd/conn.h"
#include "nbd/handshake.h"

void nbd_server_init(struct nbd_server *server, const struct nbd_limits *limits)
{
	*server = (struct nbd_server){ .limits = *limits };
	list_init(&server->exports);
	list_init(&server->handshakes);
	list_init(&server->sessions);
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

void nbd_make_first(struct nbd_server *server, struct nbd_export *export)
{
	list_remove(&export->link);
	list_push_front(&server->exports, &export->link);
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

void nbd_server_set_limits(struct nbd_server *server, const struct nbd_limits *limits)
{
	server->limits = *limits;
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
	struct list link; /* in server->sessions */
	struct nbd_export *export;
	struct nbd_session session;
	struct nbd_limits limits; /* as they were when the client came */
	int ret;
};

static suspends void serve(void *arg)
{
	struct serve_call *call = arg;

	call->ret = nbd_serve(call->export, &call->session);
}

/* Fills in the session; chosen is NULL when there is none to serve. */
static suspends int handshake(struct nbd_server *server, const struct nbd_visitor *visitor,
	struct nbd_session *session, struct nbd_export **chosen)
{
	struct nbd_handshake *handshake = calloc(1, sizeof(*handshake));

	if (!handshake) {
		close(session->fd);
		return -ENOMEM;
	}
	handshake->server = server;
	handshake->visitor = visitor;
	handshake->since_ns = reactor_now_ns();
	handshake->deadline_ns = handshake->since_ns + server->limits.handshake_ns;
	int ret = stream_init(&handshake->stream, session->fd);
	if (!ret) {
		list_push_back(&server->handshakes, &handshake->link);
		ret = nbd_handshake_run(handshake);
		list_remove(&handshake->link);
		*chosen = handshake->chosen;
		session->form = handshake->form;
		session->contexts = *chosen ? nbd_meta_selected(handshake, *chosen) : 0;
		session->tls = *chosen ? stream_take_tls(&handshake->stream) : NULL;
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

suspends int nbd_client(struct nbd_server *server, int fd, const struct nbd_visitor *visitor)
{
	struct nbd_export *export = NULL;

	if (server->closing) {
		close(fd);
		return -ESHUTDOWN;
	}
	co_group_enter(&server->clients);
	struct serve_call call = {
		.limits = server->limits,
		.session = { .fd = fd,
			.limits = &call.limits,
			.peer = visitor->peer,
			.id = visitor->id,
			.read_only = visitor->read_only,
			.trace = visitor->trace },
	};
	int ret = handshake(server, visitor, &call.session, &export);
	if (export) {
		call.export = export;
		list_push_back(&server->sessions, &call.link);
		co_call_on(export->home, serve, &call);
		list_remove(&call.link);
		ret = MIN(call.ret, 0);
		nbd_export_leave(export);
	}
	co_group_leave(&server->clients);
	return ret;
}

/* --- who is inside ---------------------------------------------------------------------------- */

/* A client that has no export yet tells the same as one that has, with nothing counted. */
json_t *nbd_server_handshakes(const struct nbd_server *server)
{
	json_t *clients = json_array();

	list_for_each (link, &server->handshakes) {
		struct nbd_handshake *handshake = list_entry(link, struct nbd_handshake, link);
		const struct nbd_conn conn = {
			.peer = (char *)handshake->visitor->peer,
			.id = handshake->visitor->id,
			.read_only = handshake->visitor->read_only,
			.since_ns = handshake->since_ns,
			.stream.tls = handshake->stream.tls,
		};

		json_array_append_new(clients, nbd_conn_status(&conn));
	}
	return clients;
}

struct disconnect_call {
	struct nbd_export *export;
	uint64_t id;
	bool found;
};

static suspends void disconnect(void *arg)
{
	struct disconnect_call *call = arg;

	list_for_each (link, &call->export->conns) {
		struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);

		if (conn->id != call->id)
			continue;
		call->found = true;
		nbd_conn_break(conn, -ECONNABORTED);
	}
}

/* The export is kept from going away by counting us among its clients. */
static suspends int disconnect_from(struct nbd_export *export, uint64_t id)
{
	struct disconnect_call call = { .export = export, .id = id };

	co_group_enter(&export->clients);
	co_call_on(export->home, disconnect, &call);
	co_group_leave(&export->clients);
	return call.found ? 0 : -ENOENT; /* it left meanwhile */
}

suspends int nbd_disconnect(struct nbd_server *server, uint64_t id)
{
	if (!id)
		return -ENOENT;
	list_for_each (link, &server->handshakes) {
		struct nbd_handshake *handshake = list_entry(link, struct nbd_handshake, link);

		if (handshake->visitor->id != id)
			continue;
		stream_cancel(&handshake->stream);
		return 0;
	}
	list_for_each (link, &server->sessions) {
		struct serve_call *session = list_entry(link, struct serve_call, link);

		if (session->session.id == id)
			return disconnect_from(session->export, id);
	}
	return -ENOENT;
}
