/*
 * Exports and their connections: how a connection begins, ends, is ended, and what is known about it.
 *
 * A connection is over when its receiver has returned, every request has been answered by the layers and
 * every reply is sent or given up: only then are its buffers nobody's. nbd_serve() does not return before.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "nbd/conn.h"
#include "nbd/journal.h"
#include "nbd/latency.h"
#include "nbd/trace.h"
#include "rt/tls.h"

/*
 * What a unix socket holds for the client to fetch: with the system's 208 KiB a reply of 1 MiB takes five
 * turns of the reactor and a quarter more processor time. TCP finds its own size.
 */
#define UNIX_SEND_BUFFER_BYTES (512 << 10)

const struct nbd_limits nbd_limits_default = {
	.handshake_ns = 10 * NS_PER_SEC,
	.linger_ns = 30 * NS_PER_SEC,
	.handshake_options = 64, /* the busiest clients send about ten */
	.requests = 256,         /* the kernel and libnbd users keep 64 to 128 in flight */
	.buffer_bytes = 32U << 20,
	.export_requests = 4096, /* sixteen connections get all they can use */
	.export_buffer_bytes = 256U << 20,
};

/* The least a connection gets: what it receives into, and as much for a request or two. */
#define SHARE_MIN_BYTES (2 * NBD_CHUNK_BYTES)

/* Nothing has moved for so many parts of the idle time: then it has passed. */
#define IDLE_TICKS 4

void nbd_export_init(struct nbd_export *export, const char *name, const char *description,
	struct blk *blk, struct reactor *home, bool read_only)
{
	*export = (struct nbd_export){
		.name = name,
		.description = description,
		.blk = blk,
		.home = home,
		.read_only = read_only,
	};
	list_init(&export->link);
	list_init(&export->conns);
	co_group_init(&export->clients);
	co_group_init(&export->serving);
}

uint16_t nbd_export_flags(const struct nbd_export *export, bool read_only)
{
	const struct blk_caps *caps = blk_caps(export->blk);
	uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
			 NBD_FLAG_SEND_CACHE;

	/* A flush reaches the stack, which all connections share: "NBD_FLAG_CAN_MULTI_CONN". */
	flags |= NBD_FLAG_CAN_MULTI_CONN;
	if (read_only || export->read_only || caps->read_only)
		return flags | NBD_FLAG_READ_ONLY;
	/* Where it gives no space back, a trim of a free terabyte would write a terabyte of zeroes. */
	if (caps->discard)
		flags |= NBD_FLAG_SEND_TRIM;
	return flags | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
}

/* --- one connection --------------------------------------------------------------------------- */

static void conn_free(struct nbd_conn *conn)
{
	if (!conn)
		return;
	free(conn->slots);
	free(conn->peer);
	free(conn);
}

static struct nbd_conn *conn_create(struct nbd_export *export, const struct nbd_session *session)
{
	const struct nbd_limits *limits = session->limits;
	struct nbd_conn *conn = calloc(1, sizeof(*conn));

	if (!conn)
		return NULL;
	conn->export = export;
	conn->limits = limits;
	conn->max_len = BLK_REQUEST_MAX;
	conn->id = session->id;
	conn->read_only = nbd_export_flags(export, session->read_only) & NBD_FLAG_READ_ONLY;
	conn->form = session->form;
	conn->contexts = session->contexts;
	conn->latency = &export->latency[session->origin];
	conn->trace = session->trace;
	conn->since_ns = reactor_now_ns();
	conn->peer = strdup(session->peer);
	conn->slots = calloc(limits->requests, sizeof(*conn->slots));
	if (!conn->peer || !conn->slots) {
		conn_free(conn);
		return NULL;
	}
	list_init(&conn->free);
	list_init(&conn->running);
	for (unsigned i = 0; i < limits->requests; i++)
		list_push_back(&conn->free, &conn->slots[i].link);
	co_queue_init(&conn->room);
	nbd_reply_init(conn);
	return conn;
}

/* After one has come or gone: each gets its even share, at once. What is held already is not taken back. */
static void share_out(struct nbd_export *export)
{
	list_for_each (link, &export->conns) {
		struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);
		const struct nbd_limits *limits = conn->limits;
		unsigned requests = MAX(limits->export_requests / export->conn_count, 1U);
		uint64_t bytes = MAX(limits->export_buffer_bytes / export->conn_count,
			(uint64_t)SHARE_MIN_BYTES);

		conn->max_requests = MIN(limits->requests, requests);
		if (conn->line)
			conn->max_requests = MIN(conn->max_requests, NBD_LINE_REQUESTS_MAX);
		conn->max_buffered_bytes = MIN(limits->buffer_bytes, bytes);
		co_queue_wake_all(&conn->room);
	}
}

static void enter(struct nbd_export *export, struct nbd_conn *conn)
{
	co_group_enter(&export->serving);
	list_push_back(&export->conns, &conn->link);
	export->conn_count++;
	share_out(export);
}

static void leave(struct nbd_export *export, struct nbd_conn *conn)
{
	list_remove(&conn->link);
	export->conn_count--;
	share_out(export);
	co_group_leave(&export->serving);
}

/* Cuts a client that neither sends nor reads, unless it waits for the disk. */
static void idle_tick(struct timer *timer)
{
	struct nbd_conn *conn = container_of(timer, struct nbd_conn, idle_timer);
	bool still = conn->moved == conn->moved_before && conn->in_flight == conn->ready_count;

	conn->still_ticks = still ? conn->still_ticks + 1 : 0;
	conn->moved_before = conn->moved;
	if (conn->still_ticks > IDLE_TICKS)
		nbd_conn_break(conn, -ETIMEDOUT);
	else
		timer_arm(timer, reactor_now_ns() + conn->limits->idle_ns / IDLE_TICKS);
}

static void enlarge_send_buffer(int fd)
{
	const int bytes = UNIX_SEND_BUFFER_BYTES;
	socklen_t domain_len = sizeof(int);
	int domain;

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &domain_len) || domain != AF_UNIX)
		return;
	/* Above the system's limit only with privileges; else as far as it goes. */
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/* Reads no more requests; those that were read are answered. */
static void conn_stop(struct nbd_conn *conn)
{
	if (conn->line && !conn->stopping) {
		conn->parking = true;
		stream_cancel_recv(&conn->stream);
		co_queue_wake_all(&conn->room);
		return;
	}
	conn->stopping = true;
	/* Wakes the receiver with an end of stream; in the middle of a request it reads on to its end. */
	if (conn->between_requests)
		shutdown(conn->stream.fd, SHUT_RD);
}

/* The receiver is through: waits for the requests under way, and a while for their replies to be read. */
static suspends void conn_finish(struct nbd_conn *conn)
{
	uint64_t deadline_ns = reactor_now_ns() + conn->limits->linger_ns;

	while (conn->in_flight || conn->sending) {
		if (co_queue_wait_until(&conn->room, deadline_ns))
			continue;
		nbd_conn_break(conn, -ETIMEDOUT);
		deadline_ns = NO_DEADLINE;
	}
	reactor_defer_cancel(&conn->send_ready);
}

static void add_counters(struct nbd_counters *sum, const struct nbd_counters *counters)
{
	for (int i = 0; i < NBD_COUNTERS; i++) {
		sum->requests[i] += counters->requests[i];
		sum->bytes[i] += counters->bytes[i];
	}
	sum->errors += counters->errors;
}

/* Whether it is as a successor needs it: nothing went wrong but that we would not wait any longer. */
static bool is_parked(const struct nbd_conn *conn)
{
	return conn->parking &&
	       (!conn->error || conn->error == -ESHUTDOWN || conn->error == -ETIMEDOUT);
}

static suspends int serve(struct nbd_conn *conn)
{
	struct nbd_export *export = conn->export;

	enlarge_send_buffer(conn->stream.fd);
	enter(export, conn);
	timer_init(&conn->idle_timer, idle_tick);
	if (conn->limits->idle_ns)
		idle_tick(&conn->idle_timer);
	int ret = nbd_receive_requests(conn);
	if (nbd_traced(conn->trace))
		nbd_trace(conn->trace, "the last request was received: %s",
			ret ? strerror(-ret) : "the client is through");
	timer_cancel(&conn->idle_timer);
	conn_finish(conn);
	if (is_parked(conn))
		ret = NBD_PARKED;
	else if (!ret && !conn->stopping)
		ret = NBD_SHUT;
	if (ret < 0)
		log_debug("nbd: export \"%s\": client %s: %s", export->name, conn->peer,
			strerror(-ret));
	add_counters(&export->counters, &conn->counters);
	leave(export, conn);
	return ret;
}

/* On a duplicate: the stream's descriptor is the stream's. */
static suspends int serve_line(struct nbd_conn *conn, struct nbd_line *line)
{
	int fd = fcntl(nbd_line_fd(line), F_DUPFD_CLOEXEC, 0);
	int ret = fd < 0 ? -errno : stream_init(&conn->stream, fd);

	if (ret)
		return ret;
	conn->line = line;
	conn->max_len = nbd_line_max_request(line);
	nbd_line_begin(line, conn);
	ret = serve(conn);
	nbd_line_end(line);
	if (ret != NBD_PARKED)
		shutdown(conn->stream.fd, SHUT_RDWR);
	stream_fini(&conn->stream);
	return ret;
}

static suspends int serve_socket(struct nbd_conn *conn, const struct nbd_session *session)
{
	int ret = stream_init(&conn->stream, session->fd);

	if (ret) {
		tls_free(session->tls);
		return ret;
	}
	stream_set_tls(&conn->stream, session->tls);
	ret = serve(conn);
	stream_fini(&conn->stream);
	return ret;
}

suspends int nbd_serve(struct nbd_export *export, const struct nbd_session *session)
{
	struct nbd_line *line = session->journal
					? nbd_line_of(session->journal, session->connection)
					: NULL;

	if (session->journal && (!line || !nbd_line_may_begin(line, export)))
		return -EINVAL;
	struct nbd_conn *conn = export->closing ? NULL : conn_create(export, session);
	if (!conn) {
		tls_free(session->tls);
		if (!line)
			close(session->fd);
		return !export->closing ? -ENOMEM : line ? NBD_PARKED : -ESHUTDOWN;
	}
	int ret = line ? serve_line(conn, line) : serve_socket(conn, session);
	conn_free(conn);
	return ret;
}

/* --- all of them ------------------------------------------------------------------------------ */

struct cut {
	struct timer timer;
	struct nbd_export *export;
};

static void cut_all(struct timer *timer)
{
	struct cut *cut = container_of(timer, struct cut, timer);

	list_for_each (link, &cut->export->conns)
		nbd_conn_break(list_entry(link, struct nbd_conn, link), -ESHUTDOWN);
}

suspends void nbd_export_close(struct nbd_export *export, uint64_t grace_ns)
{
	struct cut cut = { .export = export };

	export->closing = true;
	list_for_each (link, &export->conns)
		conn_stop(list_entry(link, struct nbd_conn, link));
	timer_init(&cut.timer, cut_all);
	timer_arm(&cut.timer, reactor_now_ns() + grace_ns);
	co_group_wait(&export->serving);
	timer_cancel(&cut.timer);
	nbd_journal_settle(export); /* else the successor does it all again, which is no harm */
}

/* --- status ----------------------------------------------------------------------------------- */

const char *const nbd_counter_names[NBD_COUNTERS] = {
	[NBD_COUNT_READ] = "read",
	[NBD_COUNT_WRITE] = "write",
	[NBD_COUNT_FLUSH] = "flush",
	[NBD_COUNT_TRIM] = "trim",
	[NBD_COUNT_ZERO] = "zero",
	[NBD_COUNT_CACHE] = "cache",
	[NBD_COUNT_BLOCK_STATUS] = "block_status",
};

static void put_counters(json_t *object, const struct nbd_counters *counters)
{
	json_t *requests = json_object();

	for (int i = 0; i < NBD_COUNTERS; i++)
		json_object_set_new(requests, nbd_counter_names[i],
			json_pack("{s:I, s:I}", "requests", (json_int_t)counters->requests[i],
				"bytes", (json_int_t)counters->bytes[i]));
	json_object_set_new(object, "requests", requests);
	json_object_set_new(object, "errors", json_integer((json_int_t)counters->errors));
}

json_t *nbd_conn_status(const struct nbd_conn *conn)
{
	uint64_t age_ns = reactor_now_ns() - conn->since_ns;
	static const char *const form_names[] = {
		[NBD_SIMPLE] = "simple",
		[NBD_STRUCTURED] = "structured",
		[NBD_EXTENDED] = "extended",
	};
	const struct tls *tls = conn->stream.tls;
	json_t *client = json_object();

	json_object_set_new(client, "id", json_integer((json_int_t)conn->id));
	json_object_set_new(client, "peer", json_string(conn->peer));
	json_object_set_new(
		client, "export", conn->export ? json_string(conn->export->name) : json_null());
	json_object_set_new(client, "tls", json_string_nocheck(tls ? tls_text(tls) : ""));
	json_object_set_new(
		client, "connected_seconds", json_integer((json_int_t)(age_ns / NS_PER_SEC)));
	json_object_set_new(client, "read_only", json_boolean(conn->read_only));
	json_object_set_new(client, "replies", json_string(form_names[conn->form]));
	json_object_set_new(client, "in_flight", json_integer(conn->in_flight));
	json_object_set_new(client, "max_in_flight", json_integer(conn->max_requests));
	json_object_set_new(
		client, "buffered_bytes", json_integer((json_int_t)conn->buffered_bytes));
	json_object_set_new(
		client, "max_buffered_bytes", json_integer((json_int_t)conn->max_buffered_bytes));
	put_counters(client, &conn->counters);
	return client;
}

struct nbd_progress nbd_export_progress(const struct nbd_export *export)
{
	struct nbd_progress progress = {
		.oldest_ns = reactor_now_ns(),
		.answered = export->answered,
	};

	list_for_each (link, &export->conns) {
		const struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);

		progress.running += conn->in_flight - conn->ready_count;
		if (!list_empty(&conn->running))
			progress.oldest_ns = MIN(progress.oldest_ns,
				list_entry(conn->running.next, struct nbd_request, link)
					->received_ns);
	}
	return progress;
}

json_t *nbd_export_status(struct nbd_export *export)
{
	json_t *status = json_object(), *clients = json_array();
	struct nbd_counters sum = export->counters;
	struct nbd_progress progress = nbd_export_progress(export);
	uint64_t oldest_age_ns = reactor_now_ns() - progress.oldest_ns;

	list_for_each (link, &export->conns) {
		struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);

		add_counters(&sum, &conn->counters);
		json_array_append_new(clients, nbd_conn_status(conn));
	}
	json_object_set_new(status, "running", json_integer(progress.running));
	json_object_set_new(
		status, "oldest_seconds", json_integer((json_int_t)(oldest_age_ns / NS_PER_SEC)));
	json_object_set_new(
		status, "connections", json_integer((json_int_t)json_array_size(clients)));
	put_counters(status, &sum);
	json_object_set_new(
		status, "latency", nbd_latency_status(&export->latency[NBD_FROM_LISTENER]));
	json_object_set_new(
		status, "kernel_latency", nbd_latency_status(&export->latency[NBD_FROM_KERNEL]));
	json_object_set_new(status, "clients", clients);
	return status;
}
