/*
 * The life of one of the nbd layer's connections.
 *
 *	connect		nbd_aio_connect_uri() and every step of the handshake run on the offload pool, since
 *			they look up names and read keys and certificates; between two steps the socket
 *			is waited for on the reactor. All of it takes at most CONNECT_MAX_NS.
 *	serve		ready: events of the socket drive libnbd on the reactor, whose callbacks wake requests
 *	lose		the server closed, sent nonsense, or was silent for `timeout` while requests waited:
 *			nobody takes the connection any more, and its keeper, a coroutine of its own, frees it
 *			and tells its requests, which go elsewhere
 *	again		the keeper connects anew: at once, then after pauses that double up to
 *			`reconnect-delay`, until it has worked or the layer is closed
 *	disconnect	NBD_CMD_DISC, and the server's own end of it waited for, at most DISCONNECT_MAX_NS
 *
 * libnbd closes the socket of a connection that dies, before anybody is told. So what is watched is a
 * descriptor of our own for it.
 * A connection is dead for libnbd before it is lost for us, so everything that calls libnbd settles
 * it afterwards. Callbacks of libnbd come with its lock held: they only note and wake.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "blk/nbd/remote.h"

#define CONNECT_MAX_NS    (10 * NS_PER_SEC) /* a server on the other side of the world needs one */
#define DISCONNECT_MAX_NS (2 * NS_PER_SEC)
#define FIRST_PAUSE_NS    (100 * NS_PER_MS)

/* A host that is gone is found out in half a minute, whatever `timeout` is. */
#define KEEPALIVE_IDLE_S   15
#define KEEPALIVE_PERIOD_S 5
#define KEEPALIVE_COUNT    3
#define UNACKNOWLEDGED_MS  30000

/* --- texts ------------------------------------------------------------------------------------ */

static const struct {
	const char *libnbd, *ours;
} texts[] = {
	{ "server did not send expected NBD magic", "the server there does not speak NBD" },
	{ "server is not either an oldstyle or fixed newstyle NBD server",
		"the server there does not speak NBD" },
	{ "server requires TLS encryption first",
		"the server requires TLS: the uri must begin with nbds:// or nbds+unix://" },
	{ "server refused TLS", "the server does not offer TLS" },
	{ "server disconnected unexpectedly", "the server closed the connection" },
	{ "server closed socket unexpectedly", "the server closed the connection" },
};

/* Fills err with what libnbd has to say of its last failure in this thread. */
static int libnbd_error(struct err *err)
{
	const char *text = nbd_get_error();
	int code = nbd_get_errno();

	code = code ? code : EIO;
	if (!text)
		return err_set(err, code, "the server closed the connection");
	for (size_t i = 0; i < ARRAY_LEN(texts); i++)
		if (strstr(text, texts[i].libnbd))
			return err_set(err, code, "%s", texts[i].ours);
	if (!strncmp(text, "nbd_", 4) && strstr(text, ": "))
		text = strstr(text, ": ") + 2;
	if (!strncmp(text, "gnutls", 6))
		return err_set(err, code,
			"the TLS handshake failed, keys or certificates may not match: %s", text);
	return err_set(err, code, "%s", text);
}

/* --- connecting ------------------------------------------------------------------------------- */

/* A piece of work with libnbd that may block, for the offload pool. */
struct step {
	struct remote_conn *conn;
	uint32_t events; /* 0: the first step */
	struct err *err;
	int ret;
};

/* Without this file libnbd would silently trust whom the system trusts. */
static int check_certificates(const struct remote *remote, struct err *err)
{
	CLEANUP(free) char *path = NULL;

	if (asprintf(&path, "%s/ca-cert.pem", remote->tls_certificates) < 0)
		return err_set(err, ENOMEM, "out of memory");
	if (access(path, R_OK))
		return err_sys(err, errno, "tls-certificates: \"%s\" cannot be read", path);
	return 0;
}

static int set_up(struct nbd_handle *handle, const struct remote *remote, struct err *err)
{
	if (remote->tls_certificates && check_certificates(remote, err))
		return -err->code;
	if (nbd_add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) ||
		nbd_set_tls_verify_peer(handle, remote->tls_verify) ||
		(remote->tls_certificates &&
			nbd_set_tls_certificates(handle, remote->tls_certificates)) ||
		(remote->tls_psk_file && nbd_set_tls_psk_file(handle, remote->tls_psk_file)) ||
		nbd_aio_connect_uri(handle, remote->uri))
		return libnbd_error(err);
	return 0;
}

/* Reading first, as a reply is older than what waits to be sent. */
static int notify(struct nbd_handle *handle, uint32_t events)
{
	unsigned direction = nbd_aio_get_direction(handle);

	if (events & ~(uint32_t)EPOLLOUT && direction & LIBNBD_AIO_DIRECTION_READ)
		return nbd_aio_notify_read(handle);
	if (direction & LIBNBD_AIO_DIRECTION_WRITE)
		return nbd_aio_notify_write(handle);
	return 0;
}

static bool is_over(struct nbd_handle *handle)
{
	return nbd_aio_is_dead(handle) || nbd_aio_is_closed(handle);
}

static void step_job(void *arg)
{
	struct step *step = arg;
	struct remote_conn *conn = step->conn;

	if (step->events)
		step->ret = notify(conn->handle, step->events) ? libnbd_error(step->err) : 0;
	else if (libnbd_load(step->err))
		step->ret = -step->err->code;
	else if (!(conn->handle = nbd_create()))
		step->ret = libnbd_error(step->err);
	else
		step->ret = set_up(conn->handle, conn->remote, step->err);
	if (!step->ret && is_over(conn->handle))
		step->ret = err_set(step->err, ECONNRESET, "the server closed the connection");
}

static void note_events(struct watch *watch, uint32_t events)
{
	struct remote_conn *conn = container_of(watch, struct remote_conn, watch);

	conn->events = events;
	co_queue_wake_all(&conn->changed);
}

static uint32_t wanted_events(struct nbd_handle *handle)
{
	unsigned direction = nbd_aio_get_direction(handle);

	return (direction & LIBNBD_AIO_DIRECTION_READ ? EPOLLIN : 0) |
	       (direction & LIBNBD_AIO_DIRECTION_WRITE ? EPOLLOUT : 0);
}

/*
 * What of the socket is ready for libnbd; 0: nothing until the deadline (or, in a handshake, until the layer
 * is closed). Watched anew each time: libnbd goes from one address of a host to the next, with a new socket.
 */
static suspends uint32_t wait_for_socket(
	struct remote_conn *conn, uint64_t deadline_ns, const bool *stop)
{
	conn->events = 0;
	if (watch_add(&conn->watch, nbd_aio_get_fd(conn->handle), wanted_events(conn->handle),
		    note_events))
		return 0;
	while (!conn->events && !(stop && *stop))
		if (!co_queue_wait_until(&conn->changed, deadline_ns))
			break;
	watch_remove(&conn->watch);
	return conn->events;
}

static suspends int handshake(struct remote_conn *conn, struct err *err)
{
	uint64_t deadline_ns = reactor_now_ns() + CONNECT_MAX_NS;
	struct step step = { .conn = conn, .err = err };

	for (;;) {
		co_offload(step_job, &step);
		if (step.ret || nbd_aio_is_ready(conn->handle))
			return step.ret;
		step.events = wait_for_socket(conn, deadline_ns, &conn->remote->closing);
		if (!step.events)
			return err_set(err, ETIMEDOUT, "the server did not answer within %u s",
				(unsigned)(CONNECT_MAX_NS / NS_PER_SEC));
	}
}

/* Helps where the other host dies without a word. Not for unix sockets, which refuse it. */
static void keep_alive(int fd)
{
	const struct {
		int level, name, value;
	} options[] = {
		{ SOL_SOCKET, SO_KEEPALIVE, 1 },
		{ IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S },
		{ IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_PERIOD_S },
		{ IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_COUNT },
		{ IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS },
	};

	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		setsockopt(fd, options[i].level, options[i].name, &options[i].value,
			sizeof(options[i].value));
}

suspends int remote_conn_connect(struct remote_conn *conn, struct err *err)
{
	int ret = handshake(conn, err);

	if (ret) {
		if (conn->handle) /* else libnbd may not even be loaded */
			nbd_close(conn->handle);
		conn->handle = NULL;
		return ret;
	}
	keep_alive(nbd_aio_get_fd(conn->handle));
	return 0;
}

suspends void remote_conn_disconnect(struct remote_conn *conn)
{
	uint64_t deadline_ns = reactor_now_ns() + DISCONNECT_MAX_NS;
	struct nbd_handle *handle = conn->handle;

	if (!handle)
		return;
	if (!is_over(handle) && !nbd_aio_disconnect(handle, 0)) {
		while (!is_over(handle)) {
			uint32_t events = wait_for_socket(conn, deadline_ns, NULL);

			if (!events || notify(handle, events))
				break;
		}
	}
	nbd_close(handle);
	conn->handle = NULL;
}

/* --- serving ---------------------------------------------------------------------------------- */

static void stop_watching(struct remote_conn *conn)
{
	watch_remove(&conn->watch);
	close(conn->watch.fd);
}

void remote_conn_lose(struct remote_conn *conn, int code, const char *why)
{
	struct remote *remote = conn->remote;
	struct err err;

	if (!conn->ready)
		return;
	conn->ready = false;
	conn->lost = true;
	stop_watching(conn);
	timer_cancel(&conn->silence);
	if (!--remote->ready_count)
		remote->give_up_ns = reactor_now_ns() + (uint64_t)remote->reconnect_s * NS_PER_SEC;
	err_set(&err, code, "the connection is lost: %s", why);
	remote_note_trouble(remote, &err);
	co_queue_wake_all(&conn->changed);
}

void remote_conn_settle(struct remote_conn *conn)
{
	struct remote *remote = conn->remote;

	if (!conn->ready)
		return;
	if (unlikely(is_over(conn->handle))) {
		struct err err;

		libnbd_error(&err);
		remote_conn_lose(conn, err.code, err.text);
		return;
	}
	uint32_t wanted = wanted_events(conn->handle);
	if (wanted != conn->watched) {
		conn->watched = wanted;
		watch_modify(&conn->watch, wanted);
	}
	if (remote->timeout_s && conn->request_count && conn->silence.heap_index == TIMER_IDLE)
		timer_arm(
			&conn->silence, conn->heard_ns + (uint64_t)remote->timeout_s * NS_PER_SEC);
}

static bool is_readable(int fd)
{
	int len = 0;

	return !ioctl(fd, FIONREAD, &len) && len;
}

/*
 * libnbd reads one reply per call: we go on as long as there is more. It must not be told to read when there is
 * nothing: it would then wait for a reply before anything else, even in the middle of sending a request. Where
 * that happened although the socket was readable (TLS talking to itself), the connection is of no use.
 */
static void serve_events(struct watch *watch, uint32_t events)
{
	struct remote_conn *conn = container_of(watch, struct remote_conn, watch);
	uint64_t completed;

	conn->heard_ns = reactor_now_ns();
	do {
		completed = conn->completed;
		if (notify(conn->handle, events))
			break;
	} while (conn->ready && conn->completed != completed && conn->request_count &&
		 is_readable(watch->fd));
	if (conn->ready && events & EPOLLOUT &&
		nbd_aio_get_direction(conn->handle) & LIBNBD_AIO_DIRECTION_WRITE)
		nbd_aio_notify_write(conn->handle);
	remote_conn_settle(conn);
	if (conn->ready && !conn->request_count && !nbd_aio_is_ready(conn->handle))
		remote_conn_lose(conn, EPROTO, "the server sent what nobody had asked for");
}

static void check_silence(struct timer *timer)
{
	struct remote_conn *conn = container_of(timer, struct remote_conn, silence);
	uint64_t limit_ns = (uint64_t)conn->remote->timeout_s * NS_PER_SEC;
	char why[64];

	if (!conn->request_count)
		return;
	if (reactor_now_ns() < conn->heard_ns + limit_ns) {
		timer_arm(timer, conn->heard_ns + limit_ns);
		return;
	}
	snprintf(why, sizeof(why), "the server has not answered for %llu s",
		(unsigned long long)conn->remote->timeout_s);
	remote_conn_lose(conn, ETIMEDOUT, why);
}

void remote_conn_init(struct remote_conn *conn, struct remote *remote)
{
	conn->remote = remote;
	list_init(&conn->requests);
	co_queue_init(&conn->changed);
	timer_init(&conn->silence, check_silence);
}

int remote_conn_start(struct remote_conn *conn, struct err *err)
{
	struct remote *remote = conn->remote;
	int fd = fcntl(nbd_aio_get_fd(conn->handle), F_DUPFD_CLOEXEC, 0);

	conn->lost = conn->answered = false;
	conn->born = remote->acked;
	conn->watched = wanted_events(conn->handle);
	if (fd < 0 || watch_add(&conn->watch, fd, conn->watched, serve_events)) {
		err_sys(err, errno, "the connection cannot be watched");
		if (fd >= 0)
			close(fd);
		return -err->code;
	}
	if (conn->was_up) {
		remote->reconnects++;
		blk_notice(&remote->blk, "connected to \"%s\" again", remote->uri);
	}
	conn->ready = conn->was_up = true;
	remote->ready_count++;
	remote->refused = false;
	co_queue_wake_all(&remote->waiting);
	return 0;
}

/* --- keeping it up ---------------------------------------------------------------------------- */

/* The requests the server has not answered go elsewhere; libnbd has no use for their buffers any more. */
static void clear_up(struct remote_conn *conn)
{
	conn->lost = false;
	nbd_close(conn->handle);
	conn->handle = NULL;
	while (!list_empty(&conn->requests))
		remote_request_end(
			list_entry(conn->requests.next, struct remote_request, link), -ENOTCONN);
}

/* A handshake that was under way when a resize asked may bring the size of before. */
static suspends int connect_after_resize(struct remote_conn *conn, struct err *err)
{
	const struct remote *remote = conn->remote;

	for (;;) {
		conn->asked = remote->sizes_asked;
		int ret = remote_conn_connect(conn, err);

		if (ret || conn->asked == remote->sizes_asked)
			return ret;
		remote_conn_disconnect(conn);
	}
}

static suspends int connect_again(struct remote_conn *conn, struct err *err)
{
	struct remote *remote = conn->remote;
	struct remote_terms terms;
	int ret = connect_after_resize(conn, err);

	if (ret)
		return err_wrap(err, "no new connection");
	ret = remote_read_terms(conn->handle, &terms, err);
	if (!ret)
		ret = remote_check_terms(remote, &terms, err);
	if (ret) {
		/* Connections that work say otherwise; when they are lost, the next attempt tells. */
		remote->refused = !remote->ready_count;
		remote_note_trouble(remote, err);
		co_queue_wake_all(&remote->waiting);
	} else {
		ret = remote_conn_start(conn, err);
		if (!ret) /* in the same turn, before anybody who waited for it */
			remote->terms.size = terms.size;
	}
	if (ret)
		remote_conn_disconnect(conn);
	return ret;
}

/* A resize does not wait for the end of it. */
static suspends void pause_for(struct remote_conn *conn, uint64_t pause_ns)
{
	uint64_t deadline_ns = reactor_now_ns() + pause_ns;

	while (!conn->remote->closing && conn->asked == conn->remote->sizes_asked)
		if (!co_queue_wait_until(&conn->changed, deadline_ns))
			return;
}

static uint64_t longer_pause(const struct remote *remote, uint64_t pause_ns)
{
	return MIN(MAX(2 * pause_ns, FIRST_PAUSE_NS),
		(uint64_t)remote->reconnect_delay_s * NS_PER_SEC);
}

suspends void remote_conn_keep(void *arg)
{
	struct remote_conn *conn = arg;
	struct remote *remote = conn->remote;
	uint64_t pause_ns = 0;
	struct err err;

	while (!remote->closing) {
		if (conn->ready) {
			co_queue_wait(&conn->changed);
		} else if (conn->lost) {
			clear_up(conn);
			pause_ns = conn->answered ? 0 : longer_pause(remote, pause_ns);
			pause_for(conn, pause_ns);
		} else if (connect_again(conn, &err) && !remote->closing) {
			remote_note_trouble(remote, &err);
			pause_ns = longer_pause(remote, pause_ns);
			pause_for(conn, pause_ns);
		}
	}
	if (conn->ready) {
		stop_watching(conn);
		remote->ready_count--;
	}
	conn->ready = false;
	timer_cancel(&conn->silence);
	if (conn->lost)
		clear_up(conn);
	remote_conn_disconnect(conn);
}
