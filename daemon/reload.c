/*
 * Reloads; see reload.h.
 *
 * First everything is found out that can be without a change: the file is read and checked whole, with the
 * exports that came by hand; the steps are listed (config-diff.c); those that would take something from
 * somebody are refused, and one refusal refuses the whole. New sockets are bound, certificates read. Then exports
 * go, change and come, in this order. Between what goes and what comes the next server is told what is in force: at
 * no instant does a device have another stack than it would find there. Only the last part cannot fail: what remains
 * is changed over, and the old config freed, but for what open stacks still need of it.
 *
 * Failure modes: a step can still fail half-way, by a disk that does not open, a device that somebody took, a mount
 * that came after the look. Then the steps are undone, last one first; what cannot be undone (an export that
 * somebody uses already, an old disk that does not open again) is logged, and is the only case in which a
 * reload is neither done nor undone. When the daemon is stopped meanwhile, the rest is left to that.
 */
#include "daemon/reload.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/config-diff.h"
#include "daemon/config-source.h"
#include "daemon/control.h"
#include "daemon/daemon.h"
#include "daemon/export-record.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "daemon/nbd_door.h"

struct reload {
	struct daemon *daemon;
	struct config *next;
	struct config_diff diff;
	struct nbd_door_change *nbd_door;
	struct control_change *control;
	int settings; /* of next, for the next server; -1: they stay */
};

/* --- what runs -------------------------------------------------------------------------------- */

struct running {
	struct config_running *list;
	size_t count;
};

/* Nothing is added or removed meanwhile. The stacks are to be freed. */
static suspends void look_at_running(struct daemon *daemon, struct running *running)
{
	size_t count = 0;

	list_for_each (link, &daemon->exports)
		count++;
	*running = (struct running){ .list = calloc(count + 1, sizeof(*running->list)) };
	if (!running->list)
		abort();
	list_for_each (link, &daemon->exports) {
		struct export *export = list_entry(link, struct export, link);

		running->list[running->count++] = (struct config_running){
			.config = export->config,
			.stack = export_running_stack(export),
			.device = export->kernel ? kernel_device(export->kernel) : NULL,
			.by_hand = export->by_hand,
		};
	}
}

/* From what runs to a config. */
static suspends void make_diff(
	struct daemon *daemon, const struct config *next, struct config_diff *diff)
{
	struct running running;

	look_at_running(daemon, &running);
	config_diff_make(diff, daemon->config, running.list, running.count, next);
	for (size_t i = 0; i < running.count; i++)
		conf_free(running.list[i].stack);
	free(running.list);
}

/* The exports of a config and those that came by hand and stay beside them, for config_check_together(). */
static int check_together(struct daemon *daemon, struct config_export *const *exports,
	size_t export_count, bool all, struct err *err)
{
	size_t count = export_count;

	list_for_each (link, &daemon->exports)
		count++;
	CLEANUP(free)
	struct config_export **list = calloc(count + 1, sizeof(struct config_export *));
	if (!list)
		abort();
	count = 0;
	list_for_each (link, &daemon->exports) {
		struct export *export = list_entry(link, struct export, link);
		bool replaced = !all && !export->by_hand;

		for (size_t i = 0; i < export_count && !all; i++)
			replaced = replaced || !strcmp(exports[i]->name, export->config->name);
		if (!replaced)
			list[count++] = export->config;
	}
	for (size_t i = 0; i < export_count; i++)
		list[count++] = exports[i];
	return config_check_together(list, count, err);
}

/* --- what stands in the way ------------------------------------------------------------------- */

/* Whether closing the stack loses what is on it. */
static bool forgets(const struct conf *conf)
{
	const struct conf *layer = conf_get(conf, "layer");
	bool found = layer && layer->type == CONF_STRING && !strcmp(layer->string, "memory") &&
		     !conf_get(conf, "name");

	for (size_t i = 0; i < conf->item_count && !found; i++)
		found = forgets(conf->items[i]);
	return found;
}

static suspends int check_reopen(struct export *export, struct err *err)
{
	struct conf *stack = export_running_stack(export);
	bool forgetful = forgets(stack), replaced = !conf_equal(stack, export->config->stack);

	conf_free(stack);
	if (export->kernel && !*export->config->device)
		return err_set(err, EBUSY,
			"its stack changed, and it was attached to %s by hand: detach it first",
			kernel_device(export->kernel));
	if (forgetful)
		return err_set(err, EBUSY,
			"its stack changed, and what is in its memory layer would be lost: remove "
			"it first if you mean that");
	if (replaced)
		return err_set(err, EBUSY,
			"its stack changed, but it runs on what a mirror put in its place: write "
			"that stack into the file, or remove the export first");
	return export_check_unused(export, false, err);
}

static suspends int check_step(struct daemon *daemon, struct config_step *step)
{
	struct export *export = step->subject == CONFIG_EXPORT ? export_find(daemon, step->name)
							       : NULL;
	struct err *err = &step->refusal;

	if (!export)
		return 0;
	if (step->action == CONFIG_REMOVE)
		return export_check_unused(export, false, err);
	if (step->action == CONFIG_REOPEN)
		return check_reopen(export, err);
	if (step->action == CONFIG_DETACH || step->action == CONFIG_REATTACH)
		return export_check_unused(export, true, err);
	return 0;
}

/* The first refusal becomes the error; the others are counted in it. */
static suspends int check_steps(struct reload *reload, struct err *err)
{
	const struct config_step *first = NULL;
	unsigned count = 0;
	char more[64] = "";

	for (size_t i = 0; i < reload->diff.step_count; i++) {
		struct config_step *step = &reload->diff.steps[i];

		if (!check_step(reload->daemon, step))
			continue;
		if (!count++)
			first = step;
	}
	if (!first)
		return 0;
	if (count > 1)
		snprintf(more, sizeof(more), " (and %u more: see reload --dry-run)", count - 1);
	return err_set(err, EBUSY, "export \"%s\": %s%s", first->name, first->refusal.text, more);
}

/* --- exports go, change and come -------------------------------------------------------------- */

static suspends int take_away(
	struct daemon *daemon, const struct config_step *step, struct err *err)
{
	struct export *export = export_find(daemon, step->name);
	int ret = 0;

	if (!export)
		return 0;
	if (step->action == CONFIG_REMOVE || step->action == CONFIG_REOPEN)
		return export_remove(export, daemon_stop_timeout_ns(daemon), false, err);
	if ((step->action == CONFIG_DETACH || step->action == CONFIG_REATTACH) && export->kernel)
		ret = export_detach(export, false, err);
	if (ret)
		return err_wrap(err, "export \"%s\"", step->name);
	export_set_config(export, step->to);
	return 0;
}

static suspends int attach(struct export *export, struct err *err)
{
	export_take_up_left(export);
	if (export->kernel || !*export->config->device)
		return 0;
	int ret = export_attach(export, NULL, err);
	if (ret) {
		err_wrap(err, "export \"%s\"", export->config->name);
		err_place(err, conf_get(export->config->conf, "device")->where);
	}
	return ret;
}

static suspends int bring(struct daemon *daemon, const struct config_step *step, struct err *err)
{
	struct export *export = export_find(daemon, step->name);
	int ret = 0;

	if (step->action != CONFIG_REOPEN && step->action != CONFIG_REATTACH &&
		step->action != CONFIG_ADD && step->action != CONFIG_ATTACH)
		return 0;
	if (!export)
		ret = export_start(daemon, step->to, &export, err);
	return ret ? ret : attach(export, err);
}

typedef suspends int step_fn(
	struct daemon *daemon, const struct config_step *step, struct err *err);

static suspends int each_export(struct reload *reload, step_fn *fn, struct err *err)
{
	for (size_t i = 0; i < reload->diff.step_count; i++) {
		const struct config_step *step = &reload->diff.steps[i];
		int ret = 0;

		if (reload->daemon->stopping)
			return err_set(err, ESHUTDOWN, "the daemon is stopping");
		if (step->subject == CONFIG_EXPORT)
			ret = fn(reload->daemon, step, err);
		if (ret)
			return ret;
	}
	return 0;
}

/* The exports stand in the order of the file: the first one is what a client gets that names none. */
static void put_in_order(struct daemon *daemon, const struct config *config)
{
	for (size_t i = config->export_count; i--;) {
		struct export *export = export_find(daemon, config->exports[i]->name);

		if (!export)
			continue;
		list_remove(&export->link);
		list_push_front(&daemon->exports, &export->link);
		nbd_make_first(nbd_door_server(daemon->nbd_door), &export->nbd);
	}
}

/* --- and the way back ------------------------------------------------------------------------- */

/* What came goes again, unless somebody uses it already. */
static suspends int undo_bring(
	struct daemon *daemon, const struct config_step *step, struct err *err)
{
	struct export *export = export_find(daemon, step->name);
	bool added = step->action == CONFIG_ADD, reopened = step->action == CONFIG_REOPEN;
	int ret = 0;

	if (!export)
		return 0;
	if (added || (reopened && export->opened == step->to)) {
		daemon->env.start_failed = added; /* files that it created go too */
		ret = export_remove(export, daemon_stop_timeout_ns(daemon), false, err);
		daemon->env.start_failed = false;
	} else if ((step->action == CONFIG_ATTACH || step->action == CONFIG_REATTACH) &&
		   export->config == step->to && export->kernel) {
		ret = export_detach(export, false, err);
	}
	return ret;
}

static suspends int undo_take_away(
	struct daemon *daemon, const struct config_step *step, struct err *err)
{
	struct export *export = export_find(daemon, step->name);
	int ret = 0;

	if (!step->from || (export && export->opened == step->to))
		return 0;
	if (!export) {
		ret = export_start(daemon, step->from, &export, err);
		if (ret)
			return ret;
		export->by_hand = step->by_hand;
		return attach(export, err);
	}
	export_set_config(export, step->from);
	if ((step->action == CONFIG_DETACH || step->action == CONFIG_REATTACH) && !export->kernel)
		ret = export_attach(export, step->detail, err);
	return ret;
}

static suspends void each_undone(struct reload *reload, step_fn *fn)
{
	struct err err;

	for (size_t i = reload->diff.step_count; i--;) {
		const struct config_step *step = &reload->diff.steps[i];

		if (step->subject == CONFIG_EXPORT && !reload->daemon->stopping &&
			fn(reload->daemon, step, &err))
			log_error("reload: what was changed cannot be undone: %s", err.text);
	}
}

static suspends void go_back(struct reload *reload)
{
	struct err err;

	each_undone(reload, undo_bring);
	if (daemon_leave_config(reload->daemon, reload->daemon->config, -1, &err))
		log_error("reload: what was changed cannot be undone: %s", err.text);
	each_undone(reload, undo_take_away);
	put_in_order(reload->daemon, reload->daemon->config);
}

/* --- changing over ---------------------------------------------------------------------------- */

static void take_configs(struct daemon *daemon, const struct config *config)
{
	for (size_t i = 0; i < config->export_count; i++) {
		struct export *export = export_find(daemon, config->exports[i]->name);

		export_set_config(export, config->exports[i]);
		export->by_hand = false;
	}
}

static void change_over(struct reload *reload)
{
	struct daemon *daemon = reload->daemon;
	struct config *old = daemon->config;

	nbd_door_commit(reload->nbd_door);
	control_commit(reload->control);
	reload->nbd_door = NULL;
	reload->control = NULL;
	if (daemon->settings >= 0)
		close(daemon->settings);
	daemon->settings = take_fd(&reload->settings);
	take_configs(daemon, reload->next);
	put_in_order(daemon, reload->next);
	daemon->config = reload->next;
	daemon->config_note[0] = '\0';
	daemon_apply_config(daemon);
	reload->next = NULL;
	config_free(old);
}

/* --- the whole -------------------------------------------------------------------------------- */

struct reading {
	struct daemon *daemon;
	struct config **config;
	struct err *err;
	int ret;
};

static void read_offloaded(void *arg)
{
	struct reading *reading = arg;

	reading->ret = config_source_load(reading->daemon->source, reading->config, reading->err);
}

static suspends int prepare(struct reload *reload, struct err *err)
{
	struct daemon *daemon = reload->daemon;
	int ret = nbd_door_prepare(daemon->nbd_door, reload->next, &reload->nbd_door, err);

	if (!ret)
		ret = control_prepare(daemon->control, reload->next, &reload->control, err);
	if (ret || !daemon->keeper)
		return ret;
	reload->settings = in_force_settings(reload->next, err);
	return reload->settings < 0 ? reload->settings : 0;
}

static suspends int change_exports(struct reload *reload, struct err *err)
{
	struct daemon *daemon = reload->daemon;
	int ret = each_export(reload, take_away, err);

	if (!ret) {
		daemon->unknown = false; /* who reloads has decided */
		ret = daemon_leave_config(daemon, reload->next, reload->settings, err);
	}
	if (!ret)
		ret = each_export(reload, bring, err);
	if (ret)
		go_back(reload);
	return ret;
}

static suspends int apply(struct reload *reload, struct err *err)
{
	int ret = prepare(reload, err);

	if (!ret)
		ret = change_exports(reload, err);
	if (!ret)
		change_over(reload);
	return ret;
}

static void log_steps(const struct config_diff *diff)
{
	char text[512];

	for (size_t i = 0; i < diff->step_count; i++) {
		config_step_text(&diff->steps[i], text, sizeof(text));
		log_info("reload: %s", text);
	}
	if (!diff->step_count)
		log_info("reload: nothing changed");
}

static suspends void review_records(struct daemon *daemon)
{
	list_for_each (link, &daemon->exports)
		export_review_record(list_entry(link, struct export, link));
}

/* Reads the file, and finds the steps. */
static suspends int compare(struct reload *reload, struct err *err)
{
	struct daemon *daemon = reload->daemon;
	struct reading reading = { .daemon = daemon, .config = &reload->next, .err = err };

	co_offload(read_offloaded, &reading);
	int ret = reading.ret;
	if (!ret)
		ret = check_together(
			daemon, reload->next->exports, reload->next->export_count, false, err);
	if (!ret)
		make_diff(daemon, reload->next, &reload->diff);
	return ret;
}

static suspends int reload_locked(
	struct reload *reload, bool dry_run, json_t **steps, struct err *err)
{
	struct daemon *daemon = reload->daemon;
	int ret = compare(reload, err);

	if (ret)
		return ret;
	ret = check_steps(reload, err);
	if (ret)
		err_wrap(err, "reload: nothing was changed");
	if (!dry_run) {
		if (!ret)
			ret = apply(reload, err);
		if (ret)
			return ret;
		log_steps(&reload->diff);
		review_records(daemon);
	}
	*steps = config_diff_json(&reload->diff);
	return 0;
}

static void reload_fini(struct reload *reload)
{
	nbd_door_discard(reload->nbd_door);
	control_discard(reload->control);
	config_diff_fini(&reload->diff);
	config_free(reload->next);
	if (reload->settings >= 0)
		close(reload->settings);
}

suspends int reload(struct daemon *daemon, bool dry_run, json_t **steps, struct err *err)
{
	struct reload reload = { .daemon = daemon, .settings = -1 };
	int ret = daemon_begin_change(daemon, err);

	*steps = NULL;
	if (ret)
		return ret;
	if (!dry_run)
		keeper_tell(daemon->keeper, KEEPER_RELOADING, "Reloading the config");
	ret = reload_locked(&reload, dry_run, steps, err);
	reload_fini(&reload);
	if (!dry_run)
		daemon_keep_listeners(daemon);
	if (!dry_run && !daemon->stopping)
		keeper_tell(daemon->keeper, KEEPER_READY, "%s", "");
	daemon_end_change(daemon);
	return ret;
}

/* --- a config file that is not in force --------------------------------------------------------- */

static __attribute__((format(printf, 2, 3))) void note(struct daemon *daemon, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(daemon->config_note, sizeof(daemon->config_note), fmt, ap);
	va_end(ap);
	log_warning("%s", daemon->config_note);
}

/* A device that waits for its disk must not get another one without being asked. */
static int check_waiting(struct reload *reload, struct err *err)
{
	struct daemon *daemon = reload->daemon;

	for (size_t i = 0; i < reload->diff.step_count; i++) {
		const struct config_step *step = &reload->diff.steps[i];

		if (step->action != CONFIG_ADD || step->subject != CONFIG_EXPORT)
			continue;
		for (size_t j = 0; j < daemon->config->export_count; j++) {
			const struct config_export *last = daemon->config->exports[j];

			if (!strcmp(last->name, step->name) &&
				!conf_equal(last->stack, step->to->stack))
				return err_set(err, EBUSY,
					"export \"%s\": its stack changed, and the old one does "
					"not "
					"open yet: reload if the new one is the same disk",
					step->name);
		}
	}
	return 0;
}

/* As change_over(), of the exports alone. */
static void change_over_exports(struct daemon *daemon, struct config *later)
{
	struct config *config = daemon->config;
	const struct config was = *config;

	take_configs(daemon, later);
	config->exports = later->exports;
	config->export_count = later->export_count;
	later->exports = was.exports;
	later->export_count = was.export_count;
	put_in_order(daemon, config);
}

suspends void reload_exports_of_file(struct daemon *daemon)
{
	struct config *later = take_ptr(daemon->later);
	struct config next = *daemon->config;
	struct reload reload = { .daemon = daemon, .next = &next, .settings = -1 };
	struct err err;

	next.exports = later->exports;
	next.export_count = later->export_count;
	/* From now on the next server gets what we leave it. */
	keeper_tell(daemon->keeper, KEEPER_READY, "%s", "");
	int ret = check_together(daemon, next.exports, next.export_count, false, &err);
	if (!ret)
		make_diff(daemon, &next, &reload.diff);
	if (!ret)
		ret = check_waiting(&reload, &err);
	if (!ret)
		ret = check_steps(&reload, &err);
	if (!ret)
		ret = change_exports(&reload, &err);
	if (!ret) {
		change_over_exports(daemon, later);
		log_steps(&reload.diff);
		review_records(daemon);
	} else {
		note(daemon, "%s; the exports go on as before the restart", err.text);
	}
	config_diff_fini(&reload.diff);
	config_free(later);
}

static suspends void look_at_file(void *arg)
{
	struct daemon *daemon = arg;
	struct reload reload = { .daemon = daemon, .settings = -1 };
	struct err err;

	if (daemon_begin_change(daemon, &err))
		return;
	int ret = compare(&reload, &err);
	/* An ordinary user need not be able to read it. */
	if (ret && (ret != -EACCES || !geteuid()))
		note(daemon, "%s; what was in force goes on", err.text);
	else if (reload.diff.step_count)
		note(daemon,
			"%s has changed and is not reloaded; what was in force goes on (see "
			"blkstackctl reload --dry-run)",
			daemon->config->path);
	reload_fini(&reload);
	daemon_end_change(daemon);
}

void reload_look_at_file(struct daemon *daemon)
{
	co_start(look_at_file, daemon);
}

static suspends void signalled(void *arg)
{
	struct daemon *daemon = arg;
	struct err err;
	json_t *steps;

	if (reload(daemon, false, &steps, &err))
		log_error("%s", err.text);
	json_decref(steps);
}

void reload_by_signal(struct daemon *daemon)
{
	co_start(signalled, daemon);
}

/* --- one export ------------------------------------------------------------------------------- */

static suspends int add(struct daemon *daemon, struct config_export *config, struct err *err)
{
	struct export *export;
	struct err again;
	int ret;

	if (export_find(daemon, config->name))
		return err_set(err, EEXIST, "there is an export \"%s\" already", config->name);
	ret = check_together(daemon, &config, 1, true, err);
	if (!ret)
		ret = export_start(daemon, config, &export, err);
	if (ret)
		return ret;
	export->by_hand = true;
	ret = daemon_leave_config(daemon, daemon->config, -1, err);
	if (!ret)
		ret = attach(export, err);
	if (!ret)
		return 0;
	export_remove(export, 0, true, NULL);
	if (daemon_leave_config(daemon, daemon->config, -1, &again))
		log_error("%s", again.text);
	return ret;
}

suspends int reload_add_export(struct daemon *daemon, const char *source, const char *content,
	char **name, struct err *err)
{
	struct config_export *config = NULL;
	int ret = daemon_begin_change(daemon, err);

	*name = NULL;
	if (ret)
		return ret;
	ret = config_parse_export(source, content, &config, err);
	if (!ret)
		ret = add(daemon, config, err);
	if (!ret)
		*name = strdup(config->name);
	config_export_put(config);
	daemon_end_change(daemon);
	return ret;
}

suspends int reload_remove_export(
	struct daemon *daemon, const char *name, bool force, struct err *err)
{
	int ret = daemon_begin_change(daemon, err);
	struct export *export;

	if (ret)
		return ret;
	export = export_find(daemon, name);
	ret = export ? export_remove(export, daemon_stop_timeout_ns(daemon), force, err)
		     : err_set(err, ENOENT, "there is no export \"%s\"", name);
	if (!ret) {
		config_drop_export(daemon->config, name);
		ret = daemon_leave_config(daemon, daemon->config, -1, err);
	}
	daemon_end_change(daemon);
	return ret;
}
