/*
 * Replies: gathered, so that many share one system call.
 *
 * A reply that is ready waits in conn->ready. It is sent when the receiver has run its batch, when
 * enough has come together, or at the end of the reactor's turn. What the socket does not take is left to
 * the sender: a coroutine that runs only while the socket is full. While it does (`sending`), nobody else sends,
 * so replies never interleave; their order is the order of `ready`, which is the order of completion.
 *
 * A request's slot and payload are given back when its last byte is in the socket.
 */
#include <errno.h>

#include "base/util.h"
#include "nbd/conn.h"

/* Replies in one system call; each takes two iovecs at most. */
#define REPLIES_PER_SEND_MAX 64

/*
 * Sent even in the middle of a batch, so that the client can go on while the rest of the batch runs.
 * Measured: see tests/bench.
 */
#define SEND_AT_REPLIES 32
#define SEND_AT_BYTES   (256U << 10)

static size_t reply_bytes(const struct nbd_request *request)
{
	return sizeof(request->reply) + (request->payload ? request->len : 0);
}

/* Gives slot and memory back, and lets the receiver know. */
static void release(struct nbd_request *request)
{
	struct nbd_conn *conn = request->conn;

	nbd_payload_put(request);
	list_push_front(&conn->free, &request->link);
	conn->in_flight--;
	co_queue_wake_all(&conn->room);
}

/* --- sending ---------------------------------------------------------------------------------- */

struct gathered {
	struct iovec iov[2 * REPLIES_PER_SEND_MAX];
	int count;
	size_t bytes;
};

/* The replies that are ready, from the first unsent byte on, as far as they fit into one call. */
static void gather(const struct nbd_conn *conn, struct gathered *all)
{
	size_t skip_bytes = conn->sent_bytes;

	all->count = 0;
	all->bytes = 0;
	list_for_each (link, &conn->ready) {
		struct nbd_request *request = list_entry(link, struct nbd_request, link);
		size_t header_bytes = sizeof(request->reply) -
				      MIN(skip_bytes, sizeof(request->reply));

		if (all->count + 2 > 2 * REPLIES_PER_SEND_MAX)
			break;
		if (header_bytes)
			all->iov[all->count++] = (struct iovec){
				(char *)&request->reply + skip_bytes, header_bytes
			};
		skip_bytes -= sizeof(request->reply) - header_bytes;
		if (request->payload)
			all->iov[all->count++] = (struct iovec){ request->payload + skip_bytes,
				request->len - skip_bytes };
		all->bytes += reply_bytes(request);
		skip_bytes = 0;
	}
	all->bytes -= conn->sent_bytes;
}

/* So many more bytes are in the socket. */
static void sent(struct nbd_conn *conn, size_t bytes)
{
	conn->ready_bytes -= bytes;
	conn->sent_bytes += bytes;
	while (!list_empty(&conn->ready)) {
		struct nbd_request *first = list_entry(conn->ready.next, struct nbd_request, link);
		size_t first_bytes = reply_bytes(first);

		if (conn->sent_bytes < first_bytes)
			break;
		conn->sent_bytes -= first_bytes;
		conn->ready_count--;
		list_remove(&first->link);
		release(first);
	}
}

static void forget_replies(struct nbd_conn *conn)
{
	struct list *link;

	while ((link = list_pop_front(&conn->ready)))
		release(list_entry(link, struct nbd_request, link));
	conn->ready_count = 0;
	conn->ready_bytes = conn->sent_bytes = 0;
}

void nbd_conn_break(struct nbd_conn *conn, int error)
{
	if (!conn->error)
		conn->error = error;
	stream_cancel(&conn->stream);
	if (!conn->sending) /* else the sender does, on its way out */
		forget_replies(conn);
	co_queue_wake_all(&conn->room);
}

/* Runs while the socket is full. */
static suspends void sender(void *arg)
{
	struct nbd_conn *conn = arg;

	while (!conn->error && !list_empty(&conn->ready)) {
		struct gathered all;

		gather(conn, &all);
		size_t bytes = all.bytes;
		int ret = stream_send(&conn->stream, all.iov, all.count, NO_DEADLINE);
		if (ret)
			nbd_conn_break(conn, ret);
		else
			sent(conn, bytes);
	}
	conn->sending = false;
	if (conn->error)
		forget_replies(conn);
	co_queue_wake_all(&conn->room);
}

void nbd_reply_send(struct nbd_conn *conn)
{
	while (!conn->sending && !list_empty(&conn->ready)) {
		struct gathered all;

		gather(conn, &all);
		ssize_t bytes = stream_send_some(&conn->stream, all.iov, all.count);
		if (bytes < 0) {
			nbd_conn_break(conn, (int)bytes);
			return;
		}
		sent(conn, (size_t)bytes);
		if ((size_t)bytes < all.bytes) {
			conn->sending = true;
			co_start(sender, conn);
		}
	}
}

/* --- replies ---------------------------------------------------------------------------------- */

static void send_ready(struct task *task)
{
	nbd_reply_send(container_of(task, struct nbd_conn, send_ready));
}

void nbd_reply_init(struct nbd_conn *conn)
{
	list_init(&conn->ready);
	task_init(&conn->send_ready, send_ready);
}

void nbd_reply(struct nbd_request *request, enum nbd_error error)
{
	struct nbd_conn *conn = request->conn;

	if (error)
		conn->counters.errors++;
	if (conn->error) {
		release(request);
		return;
	}
	request->reply.magic = be32_make(NBD_SIMPLE_REPLY_MAGIC);
	request->reply.error = be32_make(error);
	list_push_back(&conn->ready, &request->link);
	conn->ready_count++;
	conn->ready_bytes += reply_bytes(request);
	if (conn->ready_count >= SEND_AT_REPLIES || conn->ready_bytes >= SEND_AT_BYTES)
		nbd_reply_send(conn);
	else if (!conn->batching)
		reactor_defer(&conn->send_ready);
}
