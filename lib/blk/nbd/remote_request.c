/*
 * The nbd layer's requests: which connection takes them, what happens when it is lost, and what a flush
 * may promise.
 *
 * A request goes to the connection that has the fewest. When that is lost before the answer came, the
 * request is sent again on another one, or on the next one there is. To carry out a read, write, zero or trim
 * twice is the same as once. It waits for a connection, and goes on being repeated, for at most
 * `reconnect` seconds after the first loss; then it fails with -EIO. A server that answers ESHUTDOWN is
 * about to go: that is a loss too.
 * What no client can exclude: a server that lives on while the connection to it breaks may carry out the
 * lost copy of a write late, even after a newer write of the same bytes that it took on the next connection.
 *
 * Flush. A connection stands for a server that has been there all the time since it was established. Of
 * writes acknowledged before that, and not flushed then, nobody knows: the server may have crashed and
 * lost them. So acknowledged writes are counted (`acked`), a connection knows the count at its birth, and a flush
 * goes to the oldest connection and is good for what came after its birth. When anything older was not flushed
 * yet, that flush reports -EIO, once, as a disk does that lost its cache: whoever keeps a journal then
 * knows. Nothing of the kind happens to who had flushed before the loss, or with `write-through`, where
 * every write is durable when it is acknowledged. For several connections the server has promised (multi-conn)
 * that a flush on one covers the writes on all.
 *
 * Discard must leave zeroes and a trim need not: the trim is sent as a hint, and a zero after it.
 * Extents that the server cannot tell are data.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "blk/nbd/remote.h"

/*
 * The protocol has 32 bits for a length. Less than that, so that no answer takes as long as a server
 * without fast zeroes takes for gigabytes.
 */
#define ZERO_MAX_BYTES    (UINT64_C(128) << 20)
#define EXTENTS_MAX_BYTES (UINT64_C(2) << 30)
#define EXTENTS_MAX       64 /* taken over from one answer; more need another call */

static struct remote *to_remote(struct blk *blk)
{
	return container_of(blk, struct remote, blk);
}

/* --- one attempt ------------------------------------------------------------------------------ */

void remote_request_end(struct remote_request *request, int result)
{
	list_remove(&request->link);
	request->conn->request_count--;
	request->conn->completed++;
	request->result = result;
	request->done = true;
	if (request->waiter)
		co_wake(request->waiter);
}

/* Called by libnbd, which has its lock: only notes. 1: libnbd may forget the command. */
static int answered(void *user_data, int *error)
{
	struct remote_request *request = user_data;
	struct remote_conn *conn = request->conn;

	if (*error == ESHUTDOWN)
		remote_conn_lose(conn, ESHUTDOWN, "the server is shutting down");
	else if (*error != ENOTCONN)
		conn->answered = true;
	remote_request_end(request, *error == ESHUTDOWN ? -ENOTCONN : -*error);
	return 1;
}

/* Takes over the first answer alone: a second one for the same request has no place. */
static int got_extents(void *user_data, const char *context, uint64_t off, uint32_t *entries,
	size_t entry_count, int *error)
{
	struct remote_request *request = user_data;
	const uint32_t known = BLK_EXTENT_HOLE | BLK_EXTENT_ZERO;

	if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) || off != request->off ||
		request->extents->end != off)
		return 0;
	for (size_t i = 0; i + 1 < entry_count; i += 2)
		if (!blk_extents_add(request->extents, entries[i], entries[i + 1] & known))
			break;
	return 0;
}

/* Hands the request to libnbd, which sends it as soon as the socket takes it. */
static int64_t submit(struct nbd_handle *handle, struct remote_request *request)
{
	nbd_completion_callback done = { .callback = answered, .user_data = request };
	nbd_extent_callback extents = { .callback = got_extents, .user_data = request };

	switch (request->type) {
	case REMOTE_READ:
		return nbd_aio_pread(handle, request->buf, request->len, request->off, done, 0);
	case REMOTE_WRITE:
		return nbd_aio_pwrite(
			handle, request->buf, request->len, request->off, done, request->flags);
	case REMOTE_FLUSH:
		return nbd_aio_flush(handle, done, 0);
	case REMOTE_TRIM:
		return nbd_aio_trim(handle, request->len, request->off, done, 0);
	case REMOTE_ZERO:
		return nbd_aio_zero(handle, request->len, request->off, done, request->flags);
	default:
		assert(request->type == REMOTE_EXTENTS);
		return nbd_aio_block_status(handle, request->len, request->off, extents, done, 0);
	}
}

/* What a server said it takes is not refused by libnbd, unless memory ran out or it is dead by now. */
static void refused(struct remote_request *request)
{
	int code = nbd_get_errno();

	if (nbd_aio_is_dead(request->conn->handle) || nbd_aio_is_closed(request->conn->handle))
		code = ENOTCONN;
	remote_request_end(request, code ? -code : -EIO);
}

/* -ENOTCONN: the connection was lost, ask again. */
static suspends int attempt(struct remote_conn *conn, struct remote_request *request)
{
	request->conn = conn;
	request->waiter = NULL;
	request->done = false;
	list_push_back(&conn->requests, &request->link);
	if (!conn->request_count++)
		conn->heard_ns = reactor_now_ns();
	/* libnbd sends at once and may find the connection dead: then it answers from inside. */
	if (submit(conn->handle, request) < 0 && !request->done)
		refused(request);
	remote_conn_settle(conn);
	if (!request->done) {
		request->waiter = co_self();
		co_suspend_outside();
	}
	return request->result;
}

/* --- until it is answered --------------------------------------------------------------------- */

/* The one with the fewest requests; for a flush the oldest. NULL: none is up. */
static struct remote_conn *choose(struct remote *remote, enum remote_type type)
{
	struct remote_conn *best = NULL;

	for (unsigned i = 0; i < remote->conn_count; i++) {
		struct remote_conn *conn = &remote->conns[i];

		if (!conn->ready)
			continue;
		if (!best || (type == REMOTE_FLUSH ? conn->born < best->born
						   : conn->request_count < best->request_count))
			best = conn;
	}
	return best;
}

suspends bool remote_wait_for_connection(struct remote *remote, uint64_t give_up_ns)
{
	while (!remote->ready_count) {
		if (remote->refused || remote->closing)
			return false;
		if (!co_queue_wait_until(&remote->waiting, MIN(give_up_ns, remote->give_up_ns)))
			return false;
	}
	return true;
}

/* Whether it may be sent once more; sets the limit at the first loss. */
static suspends bool may_repeat(struct remote *remote, uint64_t *give_up_ns)
{
	uint64_t now_ns = reactor_now_ns();

	if (*give_up_ns == NO_DEADLINE)
		*give_up_ns = now_ns + (uint64_t)remote->reconnect_s * NS_PER_SEC;
	else if (now_ns >= *give_up_ns)
		return false;
	remote->repeated++;
	return true;
}

/* 0, what the server answered, or -ENOTCONN when no server is there for too long. */
static suspends int ask(struct remote *remote, struct remote_request *request)
{
	uint64_t give_up_ns = NO_DEADLINE;

	for (;;) {
		struct remote_conn *conn = choose(remote, request->type);

		if (unlikely(!conn)) {
			if (!remote_wait_for_connection(remote, give_up_ns))
				return -ENOTCONN;
			continue;
		}
		int ret = attempt(conn, request);
		if (likely(ret != -ENOTCONN))
			return ret;
		if (!may_repeat(remote, &give_up_ns))
			return -ENOTCONN;
	}
}

/* What callers of the layer see. */
static int outcome(int ret)
{
	return ret == -ENOTCONN ? -EIO : ret;
}

/* --- the ops ---------------------------------------------------------------------------------- */

static uint32_t command_flags(const struct remote *remote, unsigned flags)
{
	return (flags & BLK_FUA || remote->write_through ? LIBNBD_CMD_FLAG_FUA : 0) |
	       (flags & BLK_NO_HOLE ? LIBNBD_CMD_FLAG_NO_HOLE : 0) |
	       (flags & BLK_FAST_ZERO ? LIBNBD_CMD_FLAG_FAST_ZERO : 0);
}

/* A write was acknowledged: from now on it counts for flush, unless it is durable already. */
static void count_write(struct remote *remote, const struct remote_request *request)
{
	if (!(request->flags & LIBNBD_CMD_FLAG_FUA))
		remote->acked++;
}

suspends int remote_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct remote_request request = { .type = REMOTE_READ, .off = off, .len = len, .buf = buf };

	return outcome(ask(to_remote(blk), &request));
}

suspends int remote_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct remote *remote = to_remote(blk);
	struct remote_request request = {
		.type = REMOTE_WRITE,
		.off = off,
		.len = len,
		.buf = (void *)buf,
		.flags = command_flags(remote, flags),
	};
	int ret = ask(remote, &request);

	if (!ret)
		count_write(remote, &request);
	return outcome(ret);
}

/* The flush itself, on the oldest connection there is when it is asked. *good: it covers all writes. */
static suspends int flush_oldest(struct remote *remote, bool *good)
{
	struct remote_request request = { .type = REMOTE_FLUSH };
	uint64_t give_up_ns = NO_DEADLINE;

	for (;;) {
		if (!remote_wait_for_connection(remote, give_up_ns))
			return -ENOTCONN;

		struct remote_conn *conn = choose(remote, REMOTE_FLUSH);
		uint64_t acked = remote->acked;

		*good = remote->flushed >= conn->born;
		int ret = attempt(conn, &request);
		if (!ret)
			remote->flushed = MAX(remote->flushed, acked);
		if (ret != -ENOTCONN)
			return ret;
		if (!may_repeat(remote, &give_up_ns))
			return ret;
	}
}

suspends int remote_flush_known(struct remote *remote)
{
	uint64_t flushed = remote->flushed;
	bool good = true;
	int ret = 0;

	if (remote->terms.flush && remote->acked != flushed)
		ret = flush_oldest(remote, &good);
	if (!good)
		remote->flushed = flushed;
	return outcome(ret);
}

suspends int remote_flush(struct blk *blk)
{
	struct remote *remote = to_remote(blk);
	struct err lost;
	bool good;

	if (!remote->terms.flush)
		return 0;

	int ret = flush_oldest(remote, &good);

	if (ret || good)
		return outcome(ret);
	err_set(&lost, EIO,
		"a flush was refused: the connection was lost after writes that had not been "
		"flushed, "
		"and whether the server still has them cannot be known");
	remote_note_trouble(remote, &lost);
	remote->flushes_refused++;
	return -EIO;
}

suspends int remote_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct remote *remote = to_remote(blk);
	struct remote_request request = {
		.type = REMOTE_ZERO,
		.flags = command_flags(remote, flags),
	};
	int ret = 0;

	if (!remote->terms.zero || (flags & BLK_FAST_ZERO && !remote->terms.fast_zero))
		return -EOPNOTSUPP;
	for (uint64_t done = 0; done < len && !ret; done += request.len) {
		request.off = off + done;
		request.len = MIN(len - done, ZERO_MAX_BYTES);
		ret = ask(remote, &request);
		if (!ret)
			count_write(remote, &request);
	}
	return outcome(ret);
}

/* A trim that fails, or does nothing, is no harm: the zero after it decides. */
static suspends int trim(struct remote *remote, uint64_t off, uint64_t len)
{
	struct remote_request request = { .type = REMOTE_TRIM };
	int ret = 0;

	for (uint64_t done = 0; done < len && ret != -ENOTCONN; done += request.len) {
		request.off = off + done;
		request.len = MIN(len - done, ZERO_MAX_BYTES);
		ret = ask(remote, &request);
	}
	return ret == -ENOTCONN ? -EIO : 0;
}

suspends int remote_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct remote *remote = to_remote(blk);

	if (!remote->terms.zero)
		return -EOPNOTSUPP;

	int ret = remote->terms.trim ? trim(remote, off, len) : 0;

	return ret ? ret : remote_zero(blk, off, len, flags);
}

/* Whatever the server answers, it is no error: what it does not tell is data. */
suspends int remote_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct remote *remote = to_remote(blk);
	struct blk_extent list[EXTENTS_MAX];
	struct blk_extents found;
	struct remote_request request = {
		.type = REMOTE_EXTENTS,
		.off = off,
		.len = MIN(len, EXTENTS_MAX_BYTES),
		.extents = &found,
	};

	if (!remote->terms.extents)
		return 0;
	blk_extents_init(&found, list, ARRAY_LEN(list));
	found.off = found.end = off;
	found.limit = off + request.len;

	int ret = ask(remote, &request);

	if (ret == -ENOTCONN)
		return outcome(ret);
	for (unsigned i = 0; !ret && i < found.count; i++)
		if (!blk_extents_add(extents, found.list[i].len, found.list[i].flags))
			break;
	return 0;
}
