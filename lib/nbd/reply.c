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
#include "nbd/latency.h"

/* In one system call: enough for 64 reads of one piece of data each, or two with all the holes allowed. */
#define PIECES_PER_SEND_MAX 128
_Static_assert(ARRAY_LEN(((struct nbd_fragments *)0)->pieces) <= PIECES_PER_SEND_MAX,
	"every reply fits into one call");

/*
 * Sent even in the middle of a batch, so that the client can go on while the rest of the batch runs.
 * Measured: see tests/bench.
 */
#define SEND_AT_REPLIES 32
#define SEND_AT_BYTES   (256U << 10)

/* What is waited for at once while the socket is full: a slow client is seen to get on. */
#define SENDER_STEP_BYTES (256U << 10)

/* Gives slot and memory back, and lets the receiver know. */
static void release(struct nbd_request *request)
{
	struct nbd_conn *conn = request->conn;

	nbd_payload_put(request);
	nbd_fragments_put(request);
	list_remove(&request->link);
	list_push_front(&conn->free, &request->link);
	conn->in_flight--;
	co_queue_wake_all(&conn->room);
}

/* --- sending ---------------------------------------------------------------------------------- */

struct gathered {
	struct iovec iov[PIECES_PER_SEND_MAX];
	int count;
	size_t bytes;
};

/*
 * The replies that are ready, from the first unsent byte on, as far as they fit into one call, and the first
 * max_bytes of them.
 */
static void gather(const struct nbd_conn *conn, struct gathered *all, size_t max_bytes)
{
	size_t skip_bytes = conn->sent_bytes;

	all->count = 0;
	all->bytes = 0;
	list_for_each (link, &conn->ready) {
		const struct nbd_request *request = list_entry(link, struct nbd_request, link);

		if ((unsigned)all->count + request->piece_count > PIECES_PER_SEND_MAX)
			break;
		for (unsigned i = 0; i < request->piece_count; i++) {
			const struct iovec *piece = &request->pieces[i];
			size_t skipped = MIN(skip_bytes, piece->iov_len);
			size_t bytes = MIN(piece->iov_len - skipped, max_bytes - all->bytes);

			skip_bytes -= skipped;
			if (bytes)
				all->iov[all->count++] = (struct iovec){
					(char *)piece->iov_base + skipped, bytes
				};
			all->bytes += bytes;
		}
	}
}

/* So many more bytes are in the socket. */
static int sent(struct nbd_conn *conn, size_t bytes)
{
	int ret = conn->line ? nbd_line_sent(conn->line, bytes) : 0;
	uint64_t now_ns = reactor_clock_ns();

	conn->moved += bytes != 0;
	conn->ready_bytes -= bytes;
	conn->sent_bytes += bytes;
	while (!list_empty(&conn->ready)) {
		struct nbd_request *first = list_entry(conn->ready.next, struct nbd_request, link);

		if (conn->sent_bytes < first->reply_bytes)
			break;
		conn->sent_bytes -= first->reply_bytes;
		conn->ready_count--;
		list_remove(&first->link);
		if (first->kind < NBD_COUNTERS)
			nbd_latency_count(conn->latency, first->kind, now_ns - first->received_ns);
		if (first->held)
			nbd_line_done(first);
		release(first);
	}
	return ret;
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

		gather(conn, &all, SENDER_STEP_BYTES);
		size_t bytes = all.bytes;
		int ret = stream_send(&conn->stream, all.iov, all.count, NO_DEADLINE);
		if (!ret)
			ret = sent(conn, bytes);
		if (ret)
			nbd_conn_break(conn, ret);
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

		gather(conn, &all, SIZE_MAX);
		ssize_t bytes = stream_send_some(&conn->stream, all.iov, all.count);
		int ret = bytes < 0 ? (int)bytes : sent(conn, (size_t)bytes);
		if (ret) {
			nbd_conn_break(conn, ret);
			return;
		}
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

static void push_ready(struct nbd_request *request)
{
	struct nbd_conn *conn = request->conn;

	list_remove(&request->link);
	list_push_back(&conn->ready, &request->link);
	conn->ready_count++;
	conn->ready_bytes += request->reply_bytes;
}

void nbd_reply_rest(struct nbd_request *request, size_t sent_bytes)
{
	push_ready(request);
	request->conn->sent_bytes = sent_bytes;
	request->conn->ready_bytes -= sent_bytes;
}

void nbd_reply(struct nbd_request *request)
{
	struct nbd_conn *conn = request->conn;

	conn->export->answered += request->kind < NBD_COUNTERS;
	if (conn->error) {
		release(request);
		return;
	}
	if (request->held)
		nbd_line_answer(request);
	push_ready(request);
	if (conn->ready_count >= SEND_AT_REPLIES || conn->ready_bytes >= SEND_AT_BYTES)
		nbd_reply_send(conn);
	else if (!conn->batching)
		reactor_defer(&conn->send_ready);
}
