/*
 * Exports: starting, changing and stopping them; see export.h.
 *
 * What happens on the export's home reactor is a struct call handed over with co_call_on(); everything
 * else runs on the main reactor. A call counts itself in `users` and looks at `stopping` after every wait,
 * so that export_stop() can free the export when the last one is gone.
 *
 * The kernel learns of a size after the stack has grown and before it shrinks; in between it knows
 * less than there is, never more. A size that changes by itself (a memory disk resized through another
 * export) comes as an event on home and is passed on by a task on the main reactor.
 */
#include "daemon/export.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/units.h"
#include "base/util.h"
#include "daemon/daemon.h"
#include "daemon/export-record.h"
#include "daemon/kernel.h"
#include "daemon/nbd_door.h"
#include "daemon/record.h"
#include "nbd/journal.h"

#define KERNEL_BLOCK_SIZE_MIN 512U
#define KERNEL_BLOCK_SIZE_MAX 4096U /* the page size of every processor we run on, at least */

/* Something to do on the export's home reactor. */
struct call {
	struct export *export;
	uint64_t off, len;
	unsigned flags;
	struct err *err;
	json_t *stack, *nbd;
	int ret;
};

struct export *export_find(struct daemon *daemon, const char *name)
{
	list_for_each (link, &daemon->exports) {
		struct export *export = list_entry(link, struct export, link);
		if (!strcmp(export->config->name, name))
			return export;
	}
	return NULL;
}

/* --- calls under way -------------------------------------------------------------------------- */

static int refuse(const struct export *export, struct err *err)
{
	return err_set(err, ESHUTDOWN, "export \"%s\" is being stopped", export->config->name);
}

static int begin(struct export *export, struct err *err)
{
	if (export->stopping)
		return refuse(export, err);
	co_group_enter(&export->users);
	return 0;
}

static void end(struct export *export)
{
	co_group_leave(&export->users);
}

suspends int export_begin_change(struct export *export, struct err *err)
{
	int ret = begin(export, err);

	if (ret)
		return ret;
	co_mutex_lock(&export->change);
	if (!export->stopping)
		return 0;
	co_mutex_unlock(&export->change);
	end(export);
	return refuse(export, err);
}

void export_end_change(struct export *export)
{
	co_mutex_unlock(&export->change);
	end(export);
}

/* --- size ------------------------------------------------------------------------------------- */

/* The logical block size of the kernel device, attached or not. */
static uint32_t kernel_block_size(const struct export *export)
{
	if (export->config->device_block_size)
		return (uint32_t) export->config->device_block_size;
	return MIN(MAX(export->block_size, KERNEL_BLOCK_SIZE_MIN), KERNEL_BLOCK_SIZE_MAX);
}

static suspends int tell_kernel(struct export *export, uint64_t size, struct err *err)
{
	if (!export->kernel || export->kernel_size == size)
		return 0;
	int ret = kernel_resize(export->kernel, size, err);
	if (!ret)
		export->kernel_size = size;
	return ret;
}

static suspends void resized_by_itself(void *arg)
{
	struct export *export = arg;
	struct err err;

	if (export_begin_change(export, &err))
		return;
	if (tell_kernel(export, export->size, &err))
		log_error("export \"%s\": %s", export->config->name, err.text);
	export_end_change(export);
}

static void resized_task(struct task *task)
{
	struct export *export = container_of(task, struct export, resized);

	atomic_store(&export->resized_posted, false);
	co_start(resized_by_itself, export);
}

/* On home. */
static void size_changed(struct blk_listener *listener, uint64_t size)
{
	struct export *export = container_of(listener, struct export, listener);

	export->size = size;
	if (!atomic_exchange(&export->resized_posted, true))
		reactor_post(export->daemon->reactors[0], &export->resized);
}

static suspends void resize_call(void *arg)
{
	struct call *call = arg;

	call->ret = blk_resize(call->export->top, call->len, call->flags, call->err);
	if (!call->ret) /* nothing that was cut off comes back after a crash */
		nbd_journal_settle(&call->export->nbd);
}

static suspends int resize(struct export *export, uint64_t size, bool force, struct err *err)
{
	const char *name = export->opened->name;
	char old_text[UNITS_SIZE_TEXT_LEN], new_text[UNITS_SIZE_TEXT_LEN];
	struct call call = {
		.export = export, .len = size, .flags = force ? BLK_FORCE : 0, .err = err
	};
	uint64_t old_size = export->size;

	if (export->read_only)
		return err_set(err, EPERM, "export \"%s\" is read-only", name);
	if (size > BLK_SIZE_MAX)
		return err_set(err, EFBIG, "export \"%s\": the size is beyond all bounds", name);
	call.len = size = round_up(size, export->block_size);
	if (export->kernel && !is_aligned(size, kernel_block_size(export)))
		return err_set(err, EINVAL,
			"export \"%s\": %" PRIu64
			" bytes is no multiple of the kernel device's block size, %u",
			name, size, kernel_block_size(export));
	if (size < old_size) {
		if (!force)
			return err_set(err, EINVAL,
				"export \"%s\": to shrink from %s to %s loses what lies beyond; it "
				"needs force",
				name, units_format_size(old_size, old_text),
				units_format_size(size, new_text));
		int ret = tell_kernel(export, size, err);
		if (ret)
			return ret;
	}
	co_call_on(export->home, resize_call, &call);
	if (call.ret) {
		err_wrap(err, "export \"%s\"", name);
		struct err again;
		if (tell_kernel(export, export->size, &again))
			log_error("export \"%s\": %s", name, again.text);
		return call.ret;
	}
	return tell_kernel(export, export->size, err);
}

suspends int export_resize(struct export *export, uint64_t size, bool force, struct err *err)
{
	int ret = export_begin_change(export, err);

	if (ret)
		return ret;
	ret = resize(export, size, force, err);
	export_end_change(export);
	return ret;
}

/* --- flush, discard, status ------------------------------------------------------------------- */

static suspends void flush_call(void *arg)
{
	struct call *call = arg;

	call->ret = blk_flush(call->export->top);
}

suspends int export_flush(struct export *export, struct err *err)
{
	struct call call = { .export = export };
	int ret = begin(export, err);

	if (ret)
		return ret;
	co_call_on(export->home, flush_call, &call);
	if (call.ret)
		err_sys(err, -call.ret, "export \"%s\": flush", export->config->name);
	end(export);
	return call.ret;
}

static suspends void discard_call(void *arg)
{
	struct call *call = arg;

	if (!call->len && call->off < call->export->size)
		call->len = call->export->size - call->off;
	call->ret = blk_discard(call->export->top, call->off, call->len, 0);
	if (!call->ret)
		call->ret = nbd_journal_settle(&call->export->nbd);
}

suspends int export_discard(struct export *export, uint64_t off, uint64_t len, struct err *err)
{
	struct call call = { .export = export, .off = off, .len = len };
	int ret = begin(export, err);

	if (ret)
		return ret;
	co_call_on(export->home, discard_call, &call);
	if (call.ret)
		err_sys(err, -call.ret, "export \"%s\": discard of %" PRIu64 " bytes at %" PRIu64,
			export->config->name, call.len, off);
	end(export);
	return call.ret;
}

static suspends void status_call(void *arg)
{
	struct call *call = arg;

	call->stack = blk_status(call->export->top);
	call->nbd = nbd_export_status(&call->export->nbd);
	json_object_set_new(call->nbd, "stuck_seconds",
		json_integer((json_int_t)stuck_seconds(&call->export->stuck)));
}

suspends void export_status(struct export *export, json_t **stack, json_t **nbd)
{
	struct call call = { .export = export };

	if (!begin(export, NULL)) {
		co_call_on(export->home, status_call, &call);
		end(export);
	}
	*stack = call.stack ? call.stack : json_object();
	*nbd = call.nbd ? call.nbd : json_object();
}

static suspends void report_stuck(void *arg)
{
	struct call call = { .export = arg };
	size_t index;
	json_t *client;

	co_group_enter(&call.export->users);
	co_call_on(call.export->home, status_call, &call);
	json_array_foreach(json_object_get(call.nbd, "clients"), index, client)
	{
		json_int_t count = json_integer_value(json_object_get(client, "in_flight"));
		if (count)
			log_error("export \"%s\": %lld request%s of %s cannot finish",
				call.export->config->name, (long long)count, count == 1 ? "" : "s",
				json_string_value(json_object_get(client, "peer")));
	}
	json_decref(call.stack);
	json_decref(call.nbd);
	co_group_leave(&call.export->users);
}

void export_report_stuck(struct export *export)
{
	if (export->drained)
		log_warning("export \"%s\": still being flushed and closed", export->config->name);
	else
		co_start(report_stuck, export);
}

/* --- the kernel device ------------------------------------------------------------------------ */

static suspends int attach(struct export *export, const char *device, struct err *err)
{
	struct config_export *config = export->config;
	const char *configured = *config->device ? config->device : "auto";
	struct kernel_opts opts = {
		.keeper = export->daemon->keeper,
		.by_hand = export->by_hand,
		.nbd = &export->nbd,
		.device = device ? device : configured,
		.size_bytes = export->size,
		.block_size = kernel_block_size(export),
		.timeout_s = (uint32_t)config->device_timeout_s,
		.mode = (enum kernel_dev_mode)config->device_mode,
		.connections = (unsigned)config->device_connections,
		.dead_timeout_s = (uint32_t)config->device_dead_timeout_s,
	};

	if (export->kernel)
		return err_set(
			err, EALREADY, "attached to %s already", kernel_device(export->kernel));
	if (!is_aligned(opts.size_bytes, opts.block_size))
		return err_set(err, EINVAL,
			"the size, %" PRIu64
			" bytes, is no multiple of the kernel device's block size, %u; a layer "
			"\"padded\" on top makes it one",
			opts.size_bytes, opts.block_size);
	config_export_get(config);
	int ret = kernel_attach(&opts, &export->kernel, err);
	config_export_put(config);
	if (ret) {
		export->kernel = NULL;
		return ret;
	}
	export->kernel_size = opts.size_bytes;
	daemon_note_detached(export->daemon, config->name, false);
	log_info("export \"%s\": attached to %s", export->config->name,
		kernel_device(export->kernel));
	return 0;
}

suspends int export_attach(struct export *export, const char *device, struct err *err)
{
	int ret = export_begin_change(export, err);

	if (ret)
		return ret;
	ret = attach(export, device, err);
	export_end_change(export);
	return ret;
}

suspends void export_take_up_left(struct export *export)
{
	const char *name = export->config->name;
	char device[KERNEL_NAME_LEN + 8];
	struct err err;

	if (export->kernel || *export->config->device || !kernel_find_left(name, device))
		return;
	log_info("export \"%s\": %s was attached to it by hand, before the daemon died: taking it "
		 "up",
		name, device);
	if (export_attach(export, device, &err))
		log_error("export \"%s\": %s is not taken up, and its users wait: %s; after "
			  "mending that: "
			  "blkstackctl attach %s %s",
			name, device, err.text, name, device);
}

static suspends int detach(struct export *export, bool force, struct err *err)
{
	if (!export->kernel)
		return err_set(err, ENOENT, "not attached to a kernel device");
	int ret = kernel_detach(export->kernel, force, err);
	if (ret)
		return ret;
	export->kernel = NULL;
	log_info("export \"%s\": detached from the kernel", export->config->name);
	return 0;
}

suspends int export_detach(struct export *export, bool force, struct err *err)
{
	int ret = export_begin_change(export, err);

	if (ret)
		return ret;
	ret = detach(export, force, err);
	export_end_change(export);
	return ret;
}

void export_device_lost(struct nbd_export *nbd)
{
	daemon_status_changed(container_of(nbd, struct export, nbd)->daemon);
}

/* Errors after which no second try will help. */
static bool is_final(int ret)
{
	static const int codes[] = { ENODEV, ENOTRECOVERABLE, EPROTONOSUPPORT, EUCLEAN, EINVAL,
		EOPNOTSUPP };

	for (size_t i = 0; i < ARRAY_LEN(codes); i++)
		if (ret == -codes[i])
			return true;
	return false;
}

/* The device that a server before this one served under this name, if there is one. */
static suspends int take_over(struct export *export, struct err *err)
{
	const char *name = export->config->name;

	list_for_each (link, &export->daemon->kept_doors) {
		struct kernel_door *door = kernel_kept_door(link);

		if (strcmp(kernel_kept_export(link), name))
			continue;
		int ret = kernel_resume(door, &export->nbd, err);
		if (!ret) {
			export->kernel = door;
			export->kernel_size = kernel_size(door);
			if (!kernel_is_held(door))
				log_info("export \"%s\": %s goes on", name, kernel_device(door));
			co_start(resized_by_itself, export);
			return 0;
		}
		if (!is_final(ret))
			return err_wrap(err, "export \"%s\": %s", name, kernel_device(door));
		log_error("export \"%s\": %s is disconnected, and its users get errors: %s", name,
			kernel_device(door), err->text);
		kernel_abandon(door);
		return 0;
	}
	return 0;
}

/* What the end of an export means for its device. */
enum device_end {
	NO_DEVICE,
	LEFT,     /* for the next server, or the next start */
	PUT_BACK, /* as this start found it, which fails: its users wait for one that does not */
	DETACHED,
};

static enum device_end device_end(const struct export *export)
{
	if (!export->kernel)
		return NO_DEVICE;
	if (daemon_leaves(export->daemon, export->kernel))
		return LEFT;
	if (export->daemon->env.start_failed && kernel_was_left(export->kernel))
		return PUT_BACK;
	return DETACHED;
}

/* The daemon ends: a device in use is detached all the same, after saying whose data is at stake. */
static suspends void detach_for_good(struct export *export)
{
	struct err err;

	if (!detach(export, false, &err))
		return;
	log_error("export \"%s\": %s; detaching it all the same, since the daemon stops",
		export->config->name, err.text);
	if (detach(export, true, &err))
		log_error("export \"%s\": %s", export->config->name, err.text);
}

/* --- starting and stopping -------------------------------------------------------------------- */

static suspends void open_call(void *arg)
{
	struct call *call = arg;
	struct export *export = call->export;
	const struct config_export *config = export->config;
	struct conf *recorded = export->record ? record_to_open(export->record->stack) : NULL;

	call->ret = stack_open(recorded ? recorded : config->stack, &export->daemon->env,
		config->read_only, &export->top, call->err);
	conf_free(recorded);
	if (call->ret)
		return;
	const struct blk_caps *caps = blk_caps(export->top);
	export->size = caps->size;
	export->block_size = caps->block_size;
	export->read_only = config->read_only || caps->read_only;
	export->listener.size_changed = size_changed;
	blk_set_listener(export->top, &export->listener);
	export->layers = export_layers(export);
}

json_t *export_layers(const struct export *export)
{
	json_t *names = json_array();

	for (const struct blk *blk = export->top; blk; blk = blk->below)
		json_array_append_new(names, json_string(blk->ops->name));
	return names;
}

void export_set_top(struct export *export, struct blk *top)
{
	export->top = export->nbd.blk = top;
}

static void export_free(struct export *export)
{
	json_decref(export->layers);
	record_free(export->record);
	config_export_put(export->config);
	config_export_put(export->opened);
	free(export);
}

static suspends void watch_call(void *arg)
{
	stuck_watch(((struct call *)arg)->export);
}

static suspends void close_call(void *arg)
{
	struct call *call = arg;

	stuck_unwatch(call->export);
	blk_set_listener(call->export->top, NULL);
	stack_close(call->export->top);
}

/* The reactor that is home to the fewest exports. */
static struct reactor *least_used_reactor(const struct daemon *daemon)
{
	struct reactor *least = NULL;
	unsigned least_count = 0;

	for (unsigned i = 0; i < daemon->reactor_count; i++) {
		unsigned count = 0;
		list_for_each (link, &daemon->exports)
			count += list_entry(link, struct export, link)->home == daemon->reactors[i];
		if (!least || count < least_count) {
			least = daemon->reactors[i];
			least_count = count;
		}
	}
	return least;
}

/* The name is the same, and the old one's is in use elsewhere: it stays. */
void export_set_config(struct export *export, struct config_export *config)
{
	config_export_get(config);
	config_export_put(export->config);
	export->config = config;
	export->nbd.description = config->description;
	export->nbd.tls_required = config->tls_required;
	export->nbd.max_clients = (unsigned)config->max_connections;
}

suspends int export_start(struct daemon *daemon, struct config_export *config,
	struct export **started, struct err *err)
{
	struct export *export = calloc(1, sizeof(*export));
	struct call call = { .export = export, .err = err };

	*started = NULL;
	if (!export)
		return err_sys(err, ENOMEM, "export \"%s\"", config->name);
	export->daemon = daemon;
	export->config = config_export_get(config);
	export->opened = config_export_get(config);
	export->by_hand = config->by_hand;
	export->home = least_used_reactor(daemon);
	co_mutex_init(&export->change);
	co_group_init(&export->users);
	task_init(&export->resized, resized_task);

	call.ret = export_recall(export, err);
	if (!call.ret)
		co_call_on(export->home, open_call, &call);
	if (call.ret) {
		export_free(export);
		return call.ret;
	}
	nbd_export_init(&export->nbd, config->name, config->description, export->top, export->home,
		export->read_only);
	co_call_on(export->home, watch_call, &call);
	export_set_config(export, config);
	list_push_back(&daemon->exports, &export->link);
	call.ret = take_over(export, err);
	if (!call.ret)
		call.ret = nbd_door_publish(daemon->nbd_door, export, err);
	if (call.ret) {
		export_stop(export, 0);
		return call.ret;
	}
	*started = export;
	return 0;
}

suspends void export_stop(struct export *export, uint64_t grace_ns)
{
	struct call call = { .export = export };

	co_mutex_lock(&export->change);
	export->stopping = true;
	list_remove(&export->link);
	list_push_back(&export->daemon->closing, &export->link);
	const enum device_end ending = device_end(export);
	if (ending == DETACHED)
		detach_for_good(export);
	nbd_withdraw(&export->nbd, grace_ns);
	if (ending == LEFT)
		kernel_leave(take_ptr(export->kernel));
	else if (ending == PUT_BACK)
		kernel_let_go(take_ptr(export->kernel));
	else if (export->kernel) /* it did not let itself be detached */
		kernel_abandon(take_ptr(export->kernel));
	co_mutex_unlock(&export->change);
	export->drained = true;
	co_group_wait(&export->users);

	co_call_on(export->home, close_call, &call);
	while (atomic_load(&export->resized_posted))
		co_sleep_ns(NS_PER_MS);
	co_group_wait(&export->users); /* somebody may have asked what is stuck */
	list_remove(&export->link);
	log_debug("export \"%s\": closed", export->config->name);
	export_free(export);
}

suspends int export_remove(struct export *export, uint64_t grace_ns, bool force, struct err *err)
{
	int ret = export_begin_change(export, err);

	if (ret)
		return ret;
	if (!force)
		ret = export_check_unused(export, false, err);
	if (!ret && export->kernel)
		ret = detach(export, force, err);
	export->stopping = !ret;
	export_end_change(export);
	if (ret)
		return err_wrap(err, "export \"%s\"", export->config->name);
	export_stop(export, grace_ns);
	return 0;
}
