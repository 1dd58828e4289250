/*
 * What a request may ask, what it does, and how its failure is called on the wire.
 *
 * Checks come first, in the order of blk.h (ill-formed, read-only, out of range), so that nothing is received
 * or allocated for a request that cannot succeed. Flags: "Command flags"; errors: "Error values".
 *
 * Each request runs in a coroutine of its own and answers when it is done, in any order
 * ("Ordering of messages and writes"): it waits for nobody but the layers.
 */
#include <errno.h>

#include "base/util.h"
#include "nbd/conn.h"

/* What the commands are to us; a type that is not in here is unknown. */
static const struct command {
	uint16_t flags; /* that may be set */
	bool known, writes, has_range;
	enum nbd_counter counter;
	enum nbd_error beyond_end;
} commands[] = {
	/* FUA is allowed, and ignored, where nothing is written: "NBD_CMD_FLAG_FUA". */
	[NBD_CMD_READ] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.has_range = true,
		.counter = NBD_COUNT_READ,
		.beyond_end = NBD_EINVAL },
	[NBD_CMD_WRITE] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.has_range = true,
		.writes = true,
		.counter = NBD_COUNT_WRITE,
		.beyond_end = NBD_ENOSPC },
	[NBD_CMD_FLUSH] = { .known = true, .flags = NBD_CMD_FLAG_FUA, .counter = NBD_COUNT_FLUSH },
	[NBD_CMD_TRIM] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.has_range = true,
		.writes = true,
		.counter = NBD_COUNT_TRIM,
		.beyond_end = NBD_EINVAL },
	[NBD_CMD_WRITE_ZEROES] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
		.has_range = true,
		.writes = true,
		.counter = NBD_COUNT_ZERO,
		.beyond_end = NBD_ENOSPC },
};

enum nbd_error nbd_request_check(const struct nbd_conn *conn, const struct nbd_request *request)
{
	uint64_t size = blk_caps(conn->export->blk)->size;
	bool has_payload = request->type == NBD_CMD_READ || request->type == NBD_CMD_WRITE;

	if (request->type >= ARRAY_LEN(commands) || !commands[request->type].known)
		return NBD_EINVAL;
	const struct command *command = &commands[request->type];
	if (request->flags & ~command->flags)
		return NBD_EINVAL;
	if (!command->has_range)
		return request->off || request->len ? NBD_EINVAL : NBD_SUCCESS;
	if (has_payload && request->len > BLK_REQUEST_MAX)
		return NBD_EINVAL;
	if (command->writes && conn->read_only)
		return NBD_EPERM;
	if (!range_ok(request->off, request->len, size))
		return command->beyond_end;
	return NBD_SUCCESS;
}

static enum nbd_error error_of(const struct nbd_request *request, int ret)
{
	switch (-ret) {
	case 0:
		return NBD_SUCCESS;
	case EPERM:
	case EROFS:
	case EACCES:
		return NBD_EPERM;
	case ENOMEM:
		return NBD_ENOMEM;
	case EINVAL:
		return NBD_EINVAL;
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		return NBD_ENOSPC;
	case ESHUTDOWN:
		return NBD_ESHUTDOWN;
	case EOPNOTSUPP: /* reserved for the answer to this flag */
		return request->flags & NBD_CMD_FLAG_FAST_ZERO ? NBD_ENOTSUP : NBD_EINVAL;
	default:
		return NBD_EIO;
	}
}

static suspends int run_read(struct nbd_request *request)
{
	request->payload = nbd_buffer_get(request->conn, request->len);
	if (!request->payload)
		return -ENOMEM;
	int ret = blk_read(
		request->conn->export->blk, request->off, request->payload, request->len);
	if (ret)
		nbd_payload_put(request); /* an error comes without data: "Simple reply message" */
	return ret;
}

static suspends int run_write(struct nbd_request *request, unsigned flags)
{
	int ret = blk_write(
		request->conn->export->blk, request->off, request->payload, request->len, flags);

	nbd_payload_put(request);
	return ret;
}

static suspends void run(void *arg)
{
	struct nbd_request *request = arg;
	struct nbd_counters *counters = &request->conn->counters;
	struct blk *blk = request->conn->export->blk;
	unsigned flags = request->flags & NBD_CMD_FLAG_FUA ? BLK_FUA : 0;
	int ret = -EINVAL;

	switch (request->type) {
	case NBD_CMD_READ:
		ret = request->len ? run_read(request) : 0;
		break;
	case NBD_CMD_WRITE:
		ret = run_write(request, flags);
		break;
	case NBD_CMD_FLUSH:
		ret = blk_flush(blk);
		break;
	case NBD_CMD_TRIM:
		ret = blk_discard(blk, request->off, request->len, flags);
		break;
	case NBD_CMD_WRITE_ZEROES:
		flags |= request->flags & NBD_CMD_FLAG_NO_HOLE ? BLK_NO_HOLE : 0;
		flags |= request->flags & NBD_CMD_FLAG_FAST_ZERO ? BLK_FAST_ZERO : 0;
		ret = blk_zero(blk, request->off, request->len, flags);
		break;
	}
	counters->requests[commands[request->type].counter]++;
	if (!ret)
		counters->bytes[commands[request->type].counter] += request->len;
	nbd_reply(request, error_of(request, ret));
}

void nbd_request_start(struct nbd_request *request)
{
	co_start(run, request);
}
