/*
 * Compares what runs with what a config file says now; see config-diff.h.
 *
 * Two groups are compared key by key, along the table of the options that there are: so whatever can be
 * configured is seen, and named, without a line of its own here. What a key means for the step is said by
 * a few short lists. A key that is spelled out in one and left to its default in the other counts as changed,
 * which does no harm: applying what is so already changes nothing.
 *
 * Order: what goes away, then what changes, then what comes. So a device or a file can move from one export to
 * another within one reload.
 */
#include "daemon/config-diff.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "daemon/listen.h"
#include "daemon/record.h"

/* --- the list --------------------------------------------------------------------------------- */

static char *copy(const char *text)
{
	char *copied = strdup(text);

	if (!copied)
		abort();
	return copied;
}

static struct config_step *add(struct config_diff *diff, enum config_action action,
	enum config_subject subject, const char *name, const char *detail)
{
	diff->steps = reallocarray(diff->steps, diff->step_count + 1, sizeof(*diff->steps));
	if (!diff->steps)
		abort();
	struct config_step *step = &diff->steps[diff->step_count++];
	*step = (struct config_step){ .action = action,
		.subject = subject,
		.name = copy(name),
		.detail = detail && *detail ? copy(detail) : NULL };
	return step;
}

/* running is NULL for one that comes, to for one that goes. */
static void add_export(struct config_diff *diff, enum config_action action,
	const struct config_running *running, struct config_export *to, const char *detail)
{
	struct config_export *from = running ? running->config : NULL;
	const struct config_export *named = from ? from : to;
	struct config_step *step = add(diff, action, CONFIG_EXPORT, named->name, detail);

	step->from = from ? config_export_get(from) : NULL;
	step->by_hand = running && running->by_hand;
	step->to = to ? config_export_get(to) : NULL;
}

void config_diff_fini(struct config_diff *diff)
{
	for (size_t i = 0; i < diff->step_count; i++) {
		config_export_put(diff->steps[i].from);
		config_export_put(diff->steps[i].to);
		free(diff->steps[i].name);
		free(diff->steps[i].detail);
	}
	free(diff->steps);
	*diff = (struct config_diff){};
}

/* --- comparing -------------------------------------------------------------------------------- */

static bool is_one_of(const char *name, const char *const *names)
{
	for (; *names; names++)
		if (!strcmp(*names, name))
			return true;
	return false;
}

/* Either may be NULL: not given. */
static bool same_value(const struct conf *a, const struct conf *b)
{
	return a && b ? conf_equal(a, b) : a == b;
}

struct names {
	char text[256];
	size_t len;
};

static void append(struct names *names, const char *name)
{
	int len = snprintf(names->text + names->len, sizeof(names->text) - names->len, "%s%s",
		names->len ? ", " : "", name);

	names->len = MIN(names->len + (size_t)len, sizeof(names->text) - 1);
}

/* The keys of the table that differ, but those in `except`. */
static void append_changed(struct names *names, const struct opt *table, const struct conf *a,
	const struct conf *b, const char *const *except)
{
	for (const struct opt *opt = table; opt->name; opt++)
		if (!is_one_of(opt->name, except) &&
			!same_value(conf_get(a, opt->name), conf_get(b, opt->name)))
			append(names, opt->name);
}

/* --- exports ---------------------------------------------------------------------------------- */

static struct config_export *find_export(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->export_count; i++)
		if (!strcmp(config->exports[i]->name, name))
			return config->exports[i];
	return NULL;
}

static const struct config_running *find_running(
	const struct config_running *running, size_t running_count, const char *name)
{
	for (size_t i = 0; i < running_count; i++)
		if (!strcmp(running[i].config->name, name))
			return &running[i];
	return NULL;
}

/* What is open already needs no file to be created. */
static bool same_when_open(const struct conf *a, const struct conf *b)
{
	struct conf *open_a = record_to_open(a), *open_b = record_to_open(b);
	bool same = conf_equal(open_a, open_b);

	conf_free(open_a);
	conf_free(open_b);
	return same;
}

/*
 * The stack of the file is compared with that of the file before: one that a mirror has replaced since goes
 * on, as long as the file is silent about it, and also when the file has come to say what runs.
 */
static bool must_reopen(const struct config_running *running, const struct config_export *next)
{
	const struct config_export *now = running->config;

	if (now->read_only != next->read_only)
		return true;
	return !conf_equal(now->stack, next->stack) && !same_when_open(running->stack, next->stack);
}

/* What has to happen to the device; CONFIG_CHANGE: nothing. */
static enum config_action device_action(
	const struct config_running *running, const struct config_export *next)
{
	const struct config_export *now = running->config;
	bool same_device = !strcmp(now->device, next->device);

	if (!running->device)
		return !*next->device || same_device ? CONFIG_CHANGE : CONFIG_ATTACH;
	if (!*next->device && !same_device)
		return CONFIG_DETACH;
	if (now->device_block_size != next->device_block_size ||
		now->device_timeout_s != next->device_timeout_s ||
		now->device_mode != next->device_mode ||
		now->device_connections != next->device_connections ||
		now->device_dead_timeout_s != next->device_dead_timeout_s)
		return CONFIG_REATTACH;
	if (same_device || !strcmp(next->device, "auto") || !strcmp(next->device, running->device))
		return CONFIG_CHANGE;
	return CONFIG_REATTACH;
}

static void add_device_step(
	struct config_diff *diff, const struct config_running *running, struct config_export *next)
{
	enum config_action action = device_action(running, next);
	const char *detail = action == CONFIG_ATTACH ? next->device : running->device;

	if (action != CONFIG_CHANGE)
		add_export(diff, action, running, next, detail);
}

static void compare_export(
	struct config_diff *diff, const struct config_running *running, struct config_export *next)
{
	static const char *const handled[] = { "name", "device", "read-only", "stack", NULL };
	struct config_export *now = running->config;
	struct names names = {};

	if (must_reopen(running, next)) {
		add_export(diff, CONFIG_REOPEN, running, next,
			now->read_only != next->read_only ? "read-only" : "stack");
		return;
	}
	append_changed(&names, config_export_options, now->conf, next->conf, handled);
	if (!conf_equal(now->stack, next->stack))
		append(&names, "stack, as it runs already");
	if (names.len)
		add_export(diff, CONFIG_CHANGE, running, next, names.text);
	add_device_step(diff, running, next);
}

static void compare_exports(struct config_diff *diff, const struct config_running *running,
	size_t running_count, const struct config *next)
{
	for (size_t i = 0; i < running_count; i++) {
		struct config_export *to = find_export(next, running[i].config->name);

		if (to)
			compare_export(diff, &running[i], to);
		else if (!running[i].by_hand)
			add_export(diff, CONFIG_REMOVE, &running[i], NULL, NULL);
	}
	for (size_t i = 0; i < next->export_count; i++)
		if (!find_running(running, running_count, next->exports[i]->name))
			add_export(diff, CONFIG_ADD, NULL, next->exports[i], NULL);
}

/* --- listeners -------------------------------------------------------------------------------- */

static const struct config_listen *find_listen(const struct config *config, const char *address)
{
	for (size_t i = 0; i < config->listen_count; i++)
		if (listener_same_address(config->listen[i].address, address))
			return &config->listen[i];
	return NULL;
}

static void compare_listener(
	struct config_diff *diff, const struct config_listen *now, const struct config_listen *next)
{
	static const char *const handled[] = { "address", "mode", "group", NULL };
	struct names names = {};

	/* One that is a text alone has no keys. */
	if (now->conf && next->conf)
		append_changed(&names, config_listen_options, now->conf, next->conf, handled);
	if (now->mode != next->mode)
		append(&names, "mode");
	if (now->gid != next->gid)
		append(&names, "group");
	if (names.len)
		add(diff, CONFIG_CHANGE, CONFIG_LISTENER, next->address, names.text);
}

static void compare_listeners(
	struct config_diff *diff, const struct config *now, const struct config *next)
{
	for (size_t i = 0; i < now->listen_count; i++)
		if (!find_listen(next, now->listen[i].address))
			add(diff, CONFIG_REMOVE, CONFIG_LISTENER, now->listen[i].address, NULL);
	for (size_t i = 0; i < next->listen_count; i++) {
		const struct config_listen *was = find_listen(now, next->listen[i].address);

		if (was)
			compare_listener(diff, was, &next->listen[i]);
		else
			add(diff, CONFIG_ADD, CONFIG_LISTENER, next->listen[i].address, NULL);
	}
}

/* --- settings --------------------------------------------------------------------------------- */

/*
 * Compared as the file has them, but those that the command line can overrule or the service manager stand in for:
 * these as they are in force.
 */
static void compare_settings(
	struct config_diff *diff, const struct config *now, const struct config *next)
{
	static const char *const handled[] = { "exports", "listen", "listen-mode", "listen-group",
		"engine", "log-level", "control", NULL };
	static const char *const at_start[] = { "reactors", "keeper", "user", "group", NULL };

	for (const struct opt *opt = config_options; opt->name; opt++)
		if (!is_one_of(opt->name, handled) && !is_one_of(opt->name, at_start) &&
			!same_value(
				conf_get(now->root, opt->name), conf_get(next->root, opt->name)))
			add(diff, CONFIG_CHANGE, CONFIG_SETTING, opt->name, NULL);
	if (!listener_same_address(now->control, next->control))
		add(diff, CONFIG_CHANGE, CONFIG_SETTING, "control", next->control);
	if (strcmp(now->log_level, next->log_level))
		add(diff, CONFIG_CHANGE, CONFIG_SETTING, "log-level", next->log_level);
	if (strcmp(now->engine, next->engine))
		add(diff, CONFIG_NEXT_START, CONFIG_SETTING, "engine", next->engine);
	for (const char *const *name = at_start; *name; name++)
		if (!same_value(conf_get(now->root, *name), conf_get(next->root, *name)))
			add(diff, CONFIG_NEXT_START, CONFIG_SETTING, *name, NULL);
}

/* --- the whole -------------------------------------------------------------------------------- */

/* By action, otherwise as found: that is the order of the actions' names. */
static void sort(struct config_diff *diff)
{
	for (size_t i = 1; i < diff->step_count; i++) {
		struct config_step step = diff->steps[i];
		size_t j = i;

		for (; j && diff->steps[j - 1].action > step.action; j--)
			diff->steps[j] = diff->steps[j - 1];
		diff->steps[j] = step;
	}
}

void config_diff_make(struct config_diff *diff, const struct config *now,
	const struct config_running *running, size_t running_count, const struct config *next)
{
	*diff = (struct config_diff){};
	compare_exports(diff, running, running_count, next);
	compare_listeners(diff, now, next);
	compare_settings(diff, now, next);
	sort(diff);
}

/* --- telling ---------------------------------------------------------------------------------- */

static const char *const action_names[] = {
	[CONFIG_REMOVE] = "remove",
	[CONFIG_REOPEN] = "reopen",
	[CONFIG_DETACH] = "detach",
	[CONFIG_REATTACH] = "reattach",
	[CONFIG_CHANGE] = "change",
	[CONFIG_ADD] = "add",
	[CONFIG_ATTACH] = "attach",
	[CONFIG_NEXT_START] = "next_start",
};

static const char *const subject_names[] = {
	[CONFIG_EXPORT] = "export",
	[CONFIG_LISTENER] = "listener",
	[CONFIG_SETTING] = "setting",
};

void config_step_text(const struct config_step *step, char *text, size_t text_bytes)
{
	const char *action = step->action == CONFIG_NEXT_START ? "at the next start:"
							       : action_names[step->action];

	snprintf(text, text_bytes, "%s %s %s%s%s", action, subject_names[step->subject], step->name,
		step->detail ? ": " : "", step->detail ? step->detail : "");
}

json_t *config_diff_json(const struct config_diff *diff)
{
	json_t *steps = json_array();

	for (size_t i = 0; i < diff->step_count; i++) {
		const struct config_step *step = &diff->steps[i];
		const char *refusal = step->refusal.code ? step->refusal.text : NULL;

		json_array_append_new(steps,
			json_pack("{s:s, s:s, s:s, s:s?, s:s?}", "action",
				action_names[step->action], "subject", subject_names[step->subject],
				"name", step->name, "detail", step->detail, "refused", refusal));
	}
	return steps;
}
