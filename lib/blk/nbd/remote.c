/*
 * nbd: an export of another NBD server as a disk, by libnbd.
 *
 * This file has the options, opening and closing, and what the server promised. Opening makes one
 * connection, in bounded time, and takes size, block sizes and abilities from it; more connections, where the
 * server announces that several see the same data (multi-conn), follow in the background.
 * Each connection has a keeper that makes it again when it is lost (remote_conn.c), and requests wait for
 * that (remote_request.c).
 *
 * A server that is there again must be the same disk: the same size, still writable, with blocks and
 * abilities no worse. Otherwise it is refused with the reason, requests fail at once, and the keeper
 * looks again later: perhaps somebody puts that right. Another size is taken over when a resize asks for it;
 * a resize to a size that the server does not have changes nothing, where it takes a connection more.
 *
 * Failure: a request fails with -EIO when no server is there for `reconnect` seconds, with what the server
 * says otherwise. The layer itself never fails for good.
 */
#include "blk/nbd/remote.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/units.h"
#include "base/util.h"
#include "blk/layers.h"

#define RESIZE_MIN_S 10 /* a new connection may take that, whatever `reconnect` is */

#define OPT(member) offsetof(struct remote, member)

static const struct opt remote_options[] = {
	{ "uri", OPT_STRING, OPT(uri), .required = true,
		.help = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds for "
			"TLS" },
	{ "read-only", OPT_BOOL, OPT(read_only), "false", .help = "only read from it" },
	{ "connections", OPT_INT, OPT(connections), "1", .min = 1, .max = REMOTE_CONNECTIONS_MAX,
		.help = "at most; more than 1 where the server allows it" },
	{ "reconnect", OPT_INT, OPT(reconnect_s), "60", .max = 86400,
		.help = "seconds that requests wait for a lost server before they fail" },
	{ "reconnect-delay", OPT_INT, OPT(reconnect_delay_s), "5", .min = 1, .max = 3600,
		.help = "longest pause between two attempts to connect, in seconds" },
	{ "timeout", OPT_INT, OPT(timeout_s), "300", .max = 86400,
		.help = "seconds of silence after which a server that should answer is lost; 0: "
			"never" },
	{ "write-through", OPT_BOOL, OPT(write_through), "false",
		.help = "every write is durable when it returns" },
	{ "tls-certificates", OPT_STRING, OPT(tls_certificates),
		.help = "folder with ca-cert.pem, client-cert.pem and client-key.pem" },
	{ "tls-psk-file", OPT_STRING, OPT(tls_psk_file), .help = "file with pre-shared keys" },
	{ "tls-verify", OPT_BOOL, OPT(tls_verify), "true",
		.help = "check who signed the server's certificate, and for which name" },
	{ 0 },
};

static struct remote *to_remote(struct blk *blk)
{
	return container_of(blk, struct remote, blk);
}

/* --- checking --------------------------------------------------------------------------------- */

static bool starts_with(const char *text, const char *start)
{
	return !strncmp(text, start, strlen(start));
}

static int remote_check(const struct blk *blk, struct err *err)
{
	const struct remote *remote = container_of(blk, struct remote, blk);
	const char *uri = remote->uri;
	bool is_unix = starts_with(uri, "nbd+unix://") || starts_with(uri, "nbds+unix://");
	bool tls_options = remote->tls_certificates || remote->tls_psk_file || !remote->tls_verify;

	if (!is_unix && !starts_with(uri, "nbd://") && !starts_with(uri, "nbds://"))
		return err_set(err, EINVAL,
			"uri \"%s\": it must begin with nbd://, nbds://, nbd+unix:// or "
			"nbds+unix://",
			uri);
	if (is_unix && !strstr(uri, "?socket=") && !strstr(uri, "&socket="))
		return err_set(err, EINVAL,
			"uri \"%s\": the socket is missing: nbd+unix:///EXPORT?socket=PATH", uri);
	if (tls_options && !starts_with(uri, "nbds"))
		return err_set(err, EINVAL,
			"uri \"%s\" is without TLS, but a tls option is given: it must begin with "
			"nbds:// or nbds+unix://",
			uri);
	if (remote->tls_certificates && remote->tls_psk_file)
		return err_set(err, EINVAL, "tls-certificates and tls-psk-file exclude each other");
	if (remote->write_through && remote->read_only)
		return err_set(err, EINVAL, "write-through and read-only exclude each other");
	return 0;
}

/* --- what the server promised ----------------------------------------------------------------- */

static int read_block_sizes(struct nbd_handle *handle, struct remote_terms *terms, struct err *err)
{
	int64_t minimum = nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM);
	int64_t preferred = nbd_get_block_size(handle, LIBNBD_SIZE_PREFERRED);
	int64_t maximum = nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM);

	minimum = minimum > 0 ? minimum : 1;
	maximum = maximum > 0 ? MIN(maximum, (int64_t)BLK_REQUEST_MAX) : (int64_t)BLK_REQUEST_MAX;
	if (!is_pow2((uint64_t)minimum) || minimum > (int64_t)BLK_BLOCK_SIZE_MAX)
		return err_set(err, EINVAL,
			"the server's smallest block is %lld bytes: a power of two up to %u is "
			"supported",
			(long long)minimum, BLK_BLOCK_SIZE_MAX);
	if (maximum < minimum)
		return err_set(err, EINVAL,
			"the server's largest request, %lld bytes, is less than its block, %lld",
			(long long)maximum, (long long)minimum);
	if (!is_aligned(terms->size, (uint64_t)minimum))
		return err_set(err, EINVAL,
			"the server's disk of %llu bytes is no multiple of its smallest block, "
			"%lld bytes: its end could not be reached",
			(unsigned long long)terms->size, (long long)minimum);
	terms->block_size = (uint32_t)minimum;
	terms->max_request = (uint32_t)round_down((uint64_t)maximum, (uint64_t)minimum);
	/* A hint: one that is not sane is not taken. */
	if (preferred > 0 && is_pow2((uint64_t)preferred) && preferred <= (int64_t)BLK_REQUEST_MAX)
		terms->preferred_size = (uint32_t)preferred;
	return 0;
}

int remote_read_terms(struct nbd_handle *handle, struct remote_terms *terms, struct err *err)
{
	int64_t size = nbd_get_size(handle);

	if (size < 0 || size > (int64_t)BLK_SIZE_MAX)
		return err_set(err, EFBIG, "the server's disk is larger than what is supported");
	*terms = (struct remote_terms){
		.size = (uint64_t)size,
		.read_only = nbd_is_read_only(handle) == 1,
		.flush = nbd_can_flush(handle) == 1,
		.fua = nbd_can_fua(handle) == 1,
		.trim = nbd_can_trim(handle) == 1,
		.zero = nbd_can_zero(handle) == 1,
		.fast_zero = nbd_can_fast_zero(handle) == 1,
		.multi_conn = nbd_can_multi_conn(handle) == 1,
		.extents = nbd_can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1,
	};
	return read_block_sizes(handle, terms, err);
}

int remote_check_terms(
	const struct remote *remote, const struct remote_terms *terms, struct err *err)
{
	const struct remote_terms *old = &remote->terms;

	/* Another size must be everybody's: connections that are up have the old one. */
	bool resized = terms->size == remote->resize_to && !remote->ready_count;

	if (terms->size != old->size && !resized)
		return err_set(err, ESTALE,
			"the server is back with a disk of %llu bytes, it had %llu: it is refused",
			(unsigned long long)terms->size, (unsigned long long)old->size);
	if (terms->read_only && !remote->blk.caps.read_only)
		return err_set(err, EROFS, "the server is back read-only: it is refused");
	if (terms->block_size > old->block_size || terms->max_request < old->max_request)
		return err_set(err, ESTALE,
			"the server is back with blocks of %u and requests up to %u bytes, they "
			"were %u and %u: it is refused",
			terms->block_size, terms->max_request, old->block_size, old->max_request);
	if (terms->flush < old->flush || terms->fua < old->fua || terms->zero < old->zero ||
		terms->trim < old->trim || terms->fast_zero < old->fast_zero ||
		terms->extents < old->extents || (remote->conn_count > 1 && !terms->multi_conn))
		return err_set(err, ESTALE,
			"the server is back without an ability it had (flush, FUA, trim, zero, "
			"fast zero, block status or several connections): it is refused");
	return 0;
}

/* --- opening and closing ---------------------------------------------------------------------- */

static int take_terms(struct remote *remote, struct err *err)
{
	const struct remote_terms *terms = &remote->terms;
	struct blk_caps *caps = &remote->blk.caps;

	if (terms->read_only && !caps->read_only)
		return err_set(
			err, EROFS, "the server offers it read-only, which needs read-only = true");
	if (remote->write_through && !terms->fua)
		return err_set(err, EOPNOTSUPP,
			"write-through needs a server that supports FUA, and this one does not");
	caps->size = terms->size;
	caps->block_size = terms->block_size;
	caps->preferred_size = terms->preferred_size;
	caps->max_request = terms->max_request;
	caps->fua = terms->fua;
	caps->zero_fast = terms->zero; /* sends no data, however long the server takes */
	caps->discard = terms->trim && terms->zero;
	return 0;
}

static suspends int remote_open(struct blk *blk, struct err *err)
{
	struct remote *remote = to_remote(blk);

	blk->caps.read_only |= remote->read_only;
	co_group_init(&remote->keepers);
	co_queue_init(&remote->waiting);
	for (unsigned i = 0; i < REMOTE_CONNECTIONS_MAX; i++)
		remote_conn_init(&remote->conns[i], remote);

	int ret = remote_conn_connect(&remote->conns[0], err);

	if (!ret)
		ret = remote_read_terms(remote->conns[0].handle, &remote->terms, err);
	if (!ret)
		ret = take_terms(remote, err);
	if (!ret)
		ret = remote_conn_start(&remote->conns[0], err);
	if (ret)
		return err_wrap(err, "\"%s\"", remote->uri);
	remote->conn_count = remote->terms.multi_conn ? (unsigned)remote->connections : 1;
	for (unsigned i = 0; i < remote->conn_count; i++)
		co_group_start(&remote->keepers, remote_conn_keep, &remote->conns[i]);
	return 0;
}

/* Requests end when the keepers have cleared up. The server may carry out what it has got. */
static void remote_abandon(struct blk *blk)
{
	struct remote *remote = to_remote(blk);

	remote->closing = true;
	for (unsigned i = 0; i < remote->conn_count; i++) {
		remote_conn_lose(&remote->conns[i], ESHUTDOWN, "the disk is not used any more");
		co_queue_wake_all(&remote->conns[i].changed);
	}
	co_queue_wake_all(&remote->waiting);
}

/* Takes as long as one goodbye, and the look-up of a name that may be under way. */
static suspends void remote_close(struct blk *blk)
{
	struct remote *remote = to_remote(blk);

	remote->closing = true;
	for (unsigned i = 0; i < remote->conn_count; i++)
		co_queue_wake_all(&remote->conns[i].changed);
	co_group_wait(&remote->keepers);
	remote_conn_disconnect(&remote->conns[0]); /* open() failed with a connection */
}

/* --- another size ----------------------------------------------------------------------------- */

/* A server tells its size in the handshake alone. */
static suspends int ask_size(struct remote *remote, uint64_t wanted, struct err *err)
{
	bool up;
	int ret = remote->ready_count ? remote_flush_known(remote) : 0;

	if (ret)
		return err_sys(err, -ret, "it cannot be flushed");
	remote->resize_to = wanted;
	remote->sizes_asked++;
	for (unsigned i = 0; i < remote->conn_count; i++) {
		remote_conn_lose(&remote->conns[i], ESTALE, "it is made anew, to ask for the size");
		co_queue_wake_all(&remote->conns[i].changed);
	}
	remote->refused = false;
	remote->give_up_ns = reactor_now_ns() + MAX(remote->reconnect_s, RESIZE_MIN_S) * NS_PER_SEC;
	up = remote_wait_for_connection(remote, NO_DEADLINE);
	remote->resize_to = 0;
	return up ? 0 : err_set(err, EIO, "%s", remote->trouble.text);
}

static int check_size(const struct remote *remote, uint64_t there, uint64_t wanted, struct err *err)
{
	if (there == wanted)
		return 0;
	return err_set(err, EINVAL,
		"\"%s\" has %llu bytes on its server, not %llu: resize it there first, "
		"then here to exactly its size",
		remote->uri, (unsigned long long)there, (unsigned long long)wanted);
}

/*
 * By one more connection, so that a wrong size does not cost those that work: they may be of a size that the
 * server has no longer. No answer is no obstacle.
 */
static suspends int look_first(struct remote *remote, uint64_t wanted, struct err *err)
{
	struct remote_terms terms;
	struct remote_conn extra = {};
	struct err unwanted;
	int ret = 0;

	if (!remote->ready_count || !remote->terms.multi_conn)
		return 0;
	remote_conn_init(&extra, remote);
	if (remote_conn_connect(&extra, &unwanted))
		return 0;
	if (!remote_read_terms(extra.handle, &terms, &unwanted))
		ret = check_size(remote, terms.size, wanted, err);
	remote_conn_disconnect(&extra);
	return ret;
}

/* The protocol has no request for it: the server must have done it. */
static suspends int remote_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct remote *remote = to_remote(blk);
	int ret = look_first(remote, size, err);

	if (ret)
		return ret;
	ret = ask_size(remote, size, err);
	if (ret)
		return err_wrap(err, "\"%s\"", remote->uri);
	ret = check_size(remote, remote->terms.size, size, err);
	if (!ret)
		blk_size_changed(blk, size);
	return ret;
}

/* --- status ----------------------------------------------------------------------------------- */

void remote_note_trouble(struct remote *remote, const struct err *err)
{
	bool is_news = strcmp(err->text, remote->trouble.text) != 0;

	remote->trouble = *err;
	remote->trouble_time = time(NULL);
	if (is_news)
		blk_notice(&remote->blk, "\"%s\": %s", remote->uri, err->text);
}

static const char *state_name(const struct remote *remote)
{
	if (remote->ready_count)
		return "connected";
	if (remote->refused)
		return "refused";
	return reactor_now_ns() < remote->give_up_ns ? "reconnecting" : "down";
}

static void remote_status(struct blk *blk, json_t *object)
{
	struct remote *remote = to_remote(blk);

	json_object_set_new(object, "uri", json_string(remote->uri));
	json_object_set_new(object, "state", json_string(state_name(remote)));
	json_object_set_new(object, "connections", json_integer(remote->ready_count));
	json_object_set_new(object, "connections_wanted", json_integer(remote->conn_count));
	json_object_set_new(object, "extents", json_boolean(remote->terms.extents));
	json_object_set_new(object, "unflushed", json_boolean(remote->acked != remote->flushed));
	json_object_set_new(object, "reconnects", json_integer((json_int_t)remote->reconnects));
	json_object_set_new(
		object, "repeated_requests", json_integer((json_int_t)remote->repeated));
	json_object_set_new(
		object, "refused_flushes", json_integer((json_int_t)remote->flushes_refused));
	if (remote->trouble.code)
		json_object_set_new(object, "last_trouble",
			json_pack("{s:s, s:I}", "text", remote->trouble.text, "time",
				(json_int_t)remote->trouble_time));
}

const struct blk_ops nbd_ops = {
	.name = "nbd",
	.summary = "an export of another NBD server",
	.options = remote_options,
	.struct_size = sizeof(struct remote),
	.is_leaf = true,
	.check = remote_check,
	.open = remote_open,
	.close = remote_close,
	.abandon = remote_abandon,
	.read = remote_read,
	.write = remote_write,
	.flush = remote_flush,
	.zero = remote_zero,
	.discard = remote_discard,
	.extents = remote_extents,
	.resize = remote_resize,
	.status = remote_status,
};
