/*
 * Mirrors of exports in use; see export-mirror.h.
 *
 * The graph changes on the export's home reactor, between two requests: the new top is opened while the old one
 * serves, then export->top and the NBD door's disk are exchanged, which no request can see half done. What
 * went to the old top before is waited for by the layer that needs to (mirror_begin_live(), stack_close()).
 * The kernel device stays, since it comes in by the NBD door and the size is the same.
 *
 * What a change makes of the stack is remembered for the next start (export-record.h): a promotion before it takes
 * place, since an old disk must never be served again by mistake; a start and a cancellation when they are done.
 *
 * Changes wait for each other (export_begin_change()); status, progress and comparing do not, and look for
 * the mirror anew each time.
 */
#include "daemon/export-mirror.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "blk/mirror/mirror.h"
#include "daemon/config.h"
#include "daemon/daemon.h"
#include "daemon/export-record.h"
#include "daemon/record.h"

#define WAIT_NS (200 * NS_PER_MS)

/* Something to do on the export's home reactor. */
struct call {
	struct export *export;
	const struct mirror_request *request;
	struct conf *group;
	enum mirror_order order;
	uint64_t rate, *off;
	bool force, keep;
	unsigned clients;
	struct mirror_comparison *sum;
	json_t *status, *layers;
	struct conf *stack; /* what it is now, to be remembered */
	const char *reason;
	struct err *err;
	int ret;
};

static struct blk *find(struct call *call)
{
	struct blk *mirror = mirror_find(call->export->top);

	if (!mirror)
		call->ret = err_set(call->err, ENOENT, "there is no mirror");
	return mirror;
}

/* On home, after a change: what there is now. */
static void note_stack(struct call *call)
{
	call->layers = export_layers(call->export);
	call->stack = conf_new(CONF_LIST, NULL, NULL);
	stack_describe(call->export->top, NULL, call->stack);
}

/* undo: on home, when what fn did cannot be remembered; NULL: it stays. */
static suspends void remember(struct call *call, co_fn *undo)
{
	struct conf *stack = take_ptr(call->stack);

	if (!stack)
		return;
	call->ret = export_remember(call->export, call->reason, stack, call->err);
	conf_free(stack);
	if (call->ret && undo) {
		json_decref(call->layers);
		co_call_on(call->export->home, undo, call);
		conf_free(call->stack);
	}
}

/* A change, from begin to end: fn on home, then the names of the layers as they are now. */
static suspends int change(struct call *call, co_fn *fn, co_fn *undo)
{
	struct export *export = call->export;
	int ret = export_begin_change(export, call->err);

	if (ret)
		return ret;
	co_call_on(export->home, fn, call);
	remember(call, undo);
	if (call->reason)
		export_remembered(export);
	if (call->layers) {
		json_decref(export->layers);
		export->layers = call->layers;
	}
	export_end_change(export);
	if (call->ret)
		err_wrap(call->err, "export \"%s\"", export->config->name);
	return call->ret;
}

/* --- start ------------------------------------------------------------------------------------ */

/* The options of a mirror layer whose secondary is request->to. */
static int make_group(const struct mirror_request *request, struct conf **group, struct err *err)
{
	const char *to = request->to + strspn(request->to, " \t\n");
	bool listed = *to == '(';
	CLEANUP(free) char *content = NULL;
	int ret;

	if (asprintf(&content, "secondary = %s%s%s;", listed ? "" : "( ", to, listed ? "" : " )") <
		0)
		return err_sys(err, ENOMEM, "mirror");
	ret = config_parse_snippet("secondary", content, group, err);
	if (ret)
		return ret;
	if ((*group)->item_count != 1) {
		conf_free(*group);
		*group = NULL;
		return err_set(err, EINVAL, "secondary: expected one list of layers, top first");
	}
	conf_add(*group, conf_new_string("layer", NULL, "mirror"));
	conf_add(*group, conf_new_bool("overwrite", NULL, request->overwrite));
	conf_add(*group, conf_new_int("rate", NULL, (int64_t)request->rate));
	if (request->intent_log)
		conf_add(*group, conf_new_string("intent-log", NULL, request->intent_log));
	return 0;
}

/* On home. Requests go to what is left before the rest is closed. */
static suspends void take_out(struct export *export, struct blk *mirror)
{
	struct blk *top = export->top;

	mirror_unlink(mirror, &top);
	export_set_top(export, top);
	stack_close(mirror);
}

/* --- is the secondary the export itself? ------------------------------------------------------ */

/* Whether the uri may name an export so. Sockets and hosts have too many names to be compared. */
static bool may_name(const char *uri, const char *export)
{
	const char *host = strstr(uri, "://");
	const char *name = host ? strchr(host + 3, '/') : NULL;
	size_t len = name ? strcspn(++name, "?") : 0;

	return !len || memchr(name, '%', len) ||
	       (len == strlen(export) && !strncmp(name, export, len));
}

static suspends void count_clients(void *arg)
{
	struct call *call = arg;

	call->clients = call->export->nbd.clients.running;
}

/*
 * A mirror to itself would copy old data over new. It is found out by what it does: while an nbd layer that asks
 * for an export of this name was opened, this export got a client.
 */
static suspends int check_not_self(struct call *call, const struct conf *secondary)
{
	const struct export *export = call->export;
	const struct conf *leaf = secondary->items[secondary->item_count - 1];
	const struct conf *uri = conf_get(leaf, "uri");
	unsigned before = call->clients;

	if (!uri || uri->type != CONF_STRING || !may_name(uri->string, export->config->name))
		return 0;
	co_call_on(export->daemon->reactors[0], count_clients, call);
	if (call->clients <= before)
		return 0;
	return err_set(call->err, EINVAL,
		"the secondary seems to be this export itself: it got a client when \"%s\" was "
		"opened. "
		"If that was somebody else, try again",
		uri->string);
}

static suspends void start_call(void *arg)
{
	struct call *call = arg;
	struct export *export = call->export;
	struct blk *top = export->top;

	if (mirror_find(top)) {
		call->ret = err_set(call->err, EEXIST, "there is a mirror already");
		return;
	}
	co_call_on(export->daemon->reactors[0], count_clients, call);
	call->ret = mirror_insert(&top, call->group, call->err);
	if (call->ret)
		return;
	export_set_top(export, top);
	call->ret = check_not_self(call, conf_get(call->group, "secondary"));
	if (!call->ret)
		call->ret = mirror_begin_live(top, call->request->paused, call->err);
	if (call->ret) {
		mirror_cancel(top);
		take_out(export, top);
	} else {
		note_stack(call);
	}
}

/* Keeps call->ret, which is why. */
static suspends void cancel_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = find(call);

	if (!mirror)
		return;
	mirror_cancel(mirror);
	take_out(call->export, mirror);
	note_stack(call);
}

suspends int export_mirror_start(
	struct export *export, const struct mirror_request *request, struct err *err)
{
	struct call call = {
		.export = export, .request = request, .reason = "mirror start", .err = err
	};
	int ret;

	if (export->read_only)
		return err_set(err, EPERM,
			"export \"%s\" is read-only: copy the image as it is instead",
			export->config->name);
	ret = make_group(request, &call.group, err);
	if (ret)
		return err_wrap(err, "export \"%s\"", export->config->name);
	ret = change(&call, start_call, cancel_call);
	conf_free(call.group);
	return ret;
}

/* --- looking ---------------------------------------------------------------------------------- */

static suspends void status_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = find(call);

	if (mirror)
		call->status = mirror_status(mirror);
}

suspends json_t *export_mirror_status(struct export *export, struct err *err)
{
	struct call call = { .export = export, .err = err };

	co_call_on(export->home, status_call, &call);
	if (!call.status)
		err_wrap(err, "export \"%s\"", export->config->name);
	return call.status;
}

static suspends void wait_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = mirror_find(call->export->top);

	if (mirror)
		mirror_wait_change(mirror, reactor_now_ns() + WAIT_NS);
}

suspends void export_mirror_wait(struct export *export)
{
	struct call call = { .export = export };

	co_call_on(export->home, wait_call, &call);
}

static suspends void compare_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = find(call);
	uint64_t len = call->export->size - *call->off;

	if (!mirror)
		return;
	call->ret = mirror_compare(mirror, *call->off, &len, call->sum, call->err);
	*call->off += len;
}

suspends int export_mirror_compare(
	struct export *export, uint64_t *off, struct mirror_comparison *sum, struct err *err)
{
	struct call call = { .export = export, .off = off, .sum = sum, .err = err };

	co_call_on(export->home, compare_call, &call);
	if (call.ret)
		err_wrap(err, "export \"%s\"", export->config->name);
	return call.ret;
}

/* --- steering and ending ---------------------------------------------------------------------- */

static suspends void order_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = find(call);

	if (!mirror)
		return;
	if (call->order == MIRROR_ORDER_PAUSE)
		mirror_pause(mirror);
	else if (call->order == MIRROR_ORDER_RESUME)
		mirror_resume(mirror);
	else
		mirror_set_rate(mirror, call->rate);
	if (call->export->record) { /* nobody changes it meanwhile */
		call->reason = call->export->record->reason;
		note_stack(call);
	}
}

suspends int export_mirror_order(
	struct export *export, enum mirror_order order, uint64_t rate, struct err *err)
{
	struct call call = { .export = export, .order = order, .rate = rate, .err = err };

	return change(&call, order_call, NULL);
}

suspends int export_mirror_cancel(struct export *export, struct err *err)
{
	struct call call = { .export = export, .reason = "mirror cancel", .err = err };
	int ret = change(&call, cancel_call, NULL);

	if (ret && call.layers)
		err_wrap(err, "the mirror has ended, but after a restart it may come back");
	return ret;
}

/* On home; on behalf of the promotion, before it takes place. */
static suspends int commit_promotion(void *arg, const struct conf *stack, struct err *err)
{
	struct call *call = arg;

	return export_remember(call->export, call->reason, stack, err);
}

static suspends void promote_call(void *arg)
{
	struct call *call = arg;
	struct blk *mirror = find(call);
	struct mirror_promotion promotion = {
		.force = call->force, .keep = call->keep, .commit = commit_promotion, .arg = call
	};

	if (!mirror)
		return;
	call->ret = mirror_promote(mirror, &promotion, call->err);
	if (call->ret)
		return;
	if (!call->keep)
		take_out(call->export, mirror);
	call->layers = export_layers(call->export);
}

suspends int export_mirror_promote(struct export *export, bool force, bool keep, struct err *err)
{
	struct call call = { .export = export,
		.force = force,
		.keep = keep,
		.reason = keep ? "mirror promote --keep" : "mirror promote",
		.err = err };

	return change(&call, promote_call, NULL);
}
