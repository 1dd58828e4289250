/*
 * What a request may ask, what it does, and how its failure is called on the wire.
 *
 * Checks come first, in the order of blk.h (ill-formed, read-only, out of range), so that nothing is received
 * or allocated for a request that cannot succeed. Flags: "Command flags"; errors: "Error values".
 * Clients with structured replies also get a text.
 *
 * Each request runs in a coroutine of its own and answers when it is done, in any order
 * ("Ordering of messages and writes"): it waits for nobody but the layers.
 */
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "nbd/conn.h"
#include "nbd/trace.h"

/* What is read at a time for NBD_CMD_CACHE. */
#define CACHE_PIECE_BYTES (256U << 10)

/* What the commands are to us; a type that is not in here is unknown. */
static const struct command {
	uint16_t flags;                       /* that may be set */
	uint16_t chunk_flags, extended_flags; /* and with chunks, or extended headers, negotiated */
	bool known, writes, has_range;
	uint32_t max_len; /* of a range that takes memory; 0: any */
	enum nbd_counter counter;
	enum nbd_error beyond_end;
} commands[] = {
	/* FUA is allowed, and ignored, where nothing is written: "NBD_CMD_FLAG_FUA". */
	[NBD_CMD_READ] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.chunk_flags = NBD_CMD_FLAG_DF,
		.has_range = true,
		.max_len = BLK_REQUEST_MAX,
		.counter = NBD_COUNT_READ,
		.beyond_end = NBD_EINVAL },
	[NBD_CMD_WRITE] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.extended_flags = NBD_CMD_FLAG_PAYLOAD_LEN,
		.has_range = true,
		.writes = true,
		.max_len = BLK_REQUEST_MAX,
		.counter = NBD_COUNT_WRITE,
		.beyond_end = NBD_ENOSPC },
	[NBD_CMD_FLUSH] = { .known = true, .flags = NBD_CMD_FLAG_FUA, .counter = NBD_COUNT_FLUSH },
	[NBD_CMD_TRIM] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.has_range = true,
		.writes = true,
		.counter = NBD_COUNT_TRIM,
		.beyond_end = NBD_EINVAL },
	[NBD_CMD_CACHE] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA,
		.has_range = true,
		.max_len = BLK_REQUEST_MAX,
		.counter = NBD_COUNT_CACHE,
		.beyond_end = NBD_EINVAL },
	[NBD_CMD_WRITE_ZEROES] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
		.has_range = true,
		.writes = true,
		.counter = NBD_COUNT_ZERO,
		.beyond_end = NBD_ENOSPC },
	[NBD_CMD_BLOCK_STATUS] = { .known = true,
		.flags = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
		.extended_flags = NBD_CMD_FLAG_PAYLOAD_LEN,
		.has_range = true,
		.counter = NBD_COUNT_BLOCK_STATUS,
		.beyond_end = NBD_EINVAL },
};

static struct nbd_refusal refusal(enum nbd_error error, const char *text)
{
	return (struct nbd_refusal){ error, text };
}

static struct nbd_refusal check_flags(const struct nbd_conn *conn,
	const struct nbd_request *request, const struct command *command)
{
	uint16_t allowed = command->flags;

	allowed |= conn->form != NBD_SIMPLE ? command->chunk_flags : 0;
	allowed |= conn->form == NBD_EXTENDED ? command->extended_flags : 0;
	if (request->flags & ~allowed)
		return refusal(NBD_EINVAL, "a flag is set that the command does not have");
	if (request->type == NBD_CMD_WRITE && conn->form == NBD_EXTENDED &&
		!(request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
		return refusal(NBD_EINVAL, "a write without its payload length flag");
	if (request->type == NBD_CMD_BLOCK_STATUS && !conn->contexts)
		return refusal(NBD_EINVAL, "no metadata context was selected for block status");
	return refusal(NBD_SUCCESS, NULL);
}

/* "Error values": too long a read can be told as such where chunks are, a hint anywhere. */
static enum nbd_error too_long(const struct nbd_conn *conn, const struct nbd_request *request)
{
	if (request->type == NBD_CMD_CACHE)
		return NBD_EOVERFLOW;
	return request->type == NBD_CMD_READ && conn->form != NBD_SIMPLE ? NBD_EOVERFLOW
									 : NBD_EINVAL;
}

struct nbd_refusal nbd_request_check(const struct nbd_conn *conn, const struct nbd_request *request)
{
	uint64_t size = blk_caps(conn->export->blk)->size;

	if (request->type >= ARRAY_LEN(commands) || !commands[request->type].known)
		return refusal(NBD_EINVAL, "unknown command");
	const struct command *command = &commands[request->type];
	struct nbd_refusal wrong = check_flags(conn, request, command);
	if (wrong.error)
		return wrong;
	if (!command->has_range && (request->off || request->len))
		return refusal(NBD_EINVAL, "the command has neither offset nor length");
	if (!command->has_range)
		return wrong;
	if (command->max_len && request->len > MIN(command->max_len, conn->max_len))
		return refusal(too_long(conn, request), "longer than 32 MiB");
	if (request->type == NBD_CMD_BLOCK_STATUS && !request->len)
		return refusal(NBD_EINVAL, "a block status needs a length");
	if (command->writes && conn->read_only)
		return refusal(NBD_EPERM, "the export is read-only");
	if (!range_ok(request->off, request->len, size))
		return refusal(command->beyond_end, "beyond the end of the export");
	return wrong;
}

uint32_t nbd_request_buffer_bytes(const struct nbd_request *request)
{
	switch (request->type) {
	case NBD_CMD_READ:
		return (uint32_t)request->len;
	case NBD_CMD_CACHE:
		return (uint32_t)MIN(request->len, (uint64_t)CACHE_PIECE_BYTES);
	case NBD_CMD_BLOCK_STATUS:
		return NBD_STATUS_BUFFER_BYTES;
	default:
		return 0;
	}
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

struct nbd_refusal nbd_refusal_of(const struct nbd_request *request, int ret)
{
	const char *text = ret == -ESHUTDOWN ? "the disk is gone" : strerrordesc_np(-ret);

	return refusal(error_of(request, ret), text ? text : "unknown error");
}

struct nbd_change nbd_change_of(const struct nbd_request *request)
{
	return (struct nbd_change){
		.type = request->type,
		.flags = request->flags,
		.off = request->off,
		.len = request->len,
		.payload = request->payload,
	};
}

suspends int nbd_change(struct blk *blk, const struct nbd_change *change)
{
	unsigned flags = change->flags & NBD_CMD_FLAG_FUA ? BLK_FUA : 0;

	switch (change->type) {
	case NBD_CMD_WRITE:
		return blk_write(blk, change->off, change->payload, change->len, flags);
	case NBD_CMD_TRIM:
		return blk_discard(blk, change->off, change->len, flags);
	case NBD_CMD_WRITE_ZEROES:
		flags |= change->flags & NBD_CMD_FLAG_NO_HOLE ? BLK_NO_HOLE : 0;
		flags |= change->flags & NBD_CMD_FLAG_FAST_ZERO ? BLK_FAST_ZERO : 0;
		return blk_zero(blk, change->off, change->len, flags);
	default:
		return -EINVAL;
	}
}

static suspends int run_change(struct nbd_request *request)
{
	struct nbd_export *export = request->conn->export;
	const struct nbd_change change = nbd_change_of(request);
	int ret = export->journal ? nbd_journal_change(export->journal, request)
				  : nbd_change(export->blk, &change);

	nbd_payload_put(request);
	return ret;
}

static suspends int run_flush(struct nbd_request *request)
{
	struct nbd_export *export = request->conn->export;

	return export->journal ? nbd_journal_flush(export->journal) : blk_flush(export->blk);
}

/* Reads into nothing: whatever the layers keep of what they read is at hand then. */
static suspends int run_cache(struct nbd_request *request)
{
	uint32_t piece_bytes = nbd_request_buffer_bytes(request);
	int ret = 0;

	if (!piece_bytes)
		return 0;
	if (!nbd_payload_get(request, piece_bytes))
		return -ENOMEM;
	for (uint64_t done = 0; done < request->len && !ret; done += piece_bytes)
		ret = blk_read(request->conn->export->blk, request->off + done, request->payload,
			MIN(request->len - done, (uint64_t)piece_bytes));
	nbd_payload_put(request);
	return ret;
}

/* What has no data in its reply. */
static suspends int run_plain(struct nbd_request *request)
{
	switch (request->type) {
	case NBD_CMD_FLUSH:
		return run_flush(request);
	case NBD_CMD_CACHE:
		return run_cache(request);
	default:
		return run_change(request);
	}
}

static suspends void run(void *arg)
{
	struct nbd_request *request = arg;
	struct nbd_counters *counters = &request->conn->counters;
	enum nbd_counter counter = commands[request->type].counter;
	int ret;

	request->kind = counter;
	if (request->type == NBD_CMD_READ) {
		ret = nbd_read(request);
	} else if (request->type == NBD_CMD_BLOCK_STATUS) {
		ret = nbd_status(request);
	} else {
		ret = run_plain(request);
		if (ret)
			nbd_form_error(request, nbd_refusal_of(request, ret), NULL);
		else
			nbd_form_success(request);
	}
	counters->requests[counter]++;
	counters->bytes[counter] += ret ? 0 : request->len;
	counters->errors += ret != 0;
	if (nbd_traced(request->conn->trace))
		nbd_trace_end(request, nbd_refusal_of(request, ret));
	nbd_reply(request);
}

void nbd_request_start(struct nbd_request *request)
{
	co_start(run, request);
}

void nbd_refuse(struct nbd_request *request, struct nbd_refusal why)
{
	request->kind = NBD_COUNTERS;
	request->conn->counters.errors++;
	if (nbd_traced(request->conn->trace))
		nbd_trace_end(request, why);
	nbd_form_error(request, why, NULL);
	nbd_reply(request);
}
