/*
 * The commands "reload", "add", "remove" and "upgrade".
 *
 * What to add is read here and sent as a text, so that a file is read with the rights of who asks; only its
 * name goes along, for the places of errors.
 *
 * "reload --upgrade" reloads first: a successor goes on with what is in force, and does not look at the file.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "daemon/ctl/ctl.h"

#define UPGRADE_TRIES     50         /* a call waits in the socket until somebody serves */
#define SNIPPET_MAX_BYTES (30 << 10) /* doubled by escapes it still fits into a call */

static const char *text_of(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "";
}

/* "change export db: description"; a step of the next start reads like a note. Returns whether it is refused. */
static bool show_step(const json_t *step)
{
	const char *action = text_of(step, "action"), *detail = text_of(step, "detail"),
		   *refused = text_of(step, "refused");

	printf("%s %s %s%s%s\n", strcmp(action, "next_start") ? action : "at the next start:",
		text_of(step, "subject"), text_of(step, "name"), *detail ? ": " : "", detail);
	if (*refused)
		printf("  refused: %s\n", refused);
	return *refused;
}

static enum ctl_exit reload_config(struct ctl *ctl)
{
	bool refused = false;
	json_t *reply, *step;
	size_t i;
	enum ctl_exit status = ctl_call(
		ctl, "Reload", json_pack("{s:b}", "dry_run", ctl->dry_run), &reply);

	if (status)
		return status;
	if (ctl->json)
		show_json(reply);
	json_array_foreach(json_object_get(reply, "steps"), i, step)
	{
		if (ctl->json)
			refused = refused || *text_of(step, "refused");
		else
			refused = show_step(step) || refused;
	}
	if (!ctl->json && !i)
		puts("nothing changed");
	json_decref(reply);
	return refused ? CTL_BUSY : CTL_OK;
}

/* All of the file, "-" is standard input; NULL with an error said. */
static char *read_settings(const char *path)
{
	CLEANUP(free) char *text = malloc(SNIPPET_MAX_BYTES + 1);
	CLEANUP(file) FILE *file = strcmp(path, "-") ? fopen(path, "re") : fdopen(dup(0), "r");
	size_t len_bytes;

	if (!text || !file) {
		ctl_fail(CTL_FAILED, "add: cannot open \"%s\": %s", path, strerror(errno));
		return NULL;
	}
	len_bytes = fread(text, 1, SNIPPET_MAX_BYTES + 1, file);
	if (ferror(file)) {
		ctl_fail(CTL_FAILED, "add: cannot read \"%s\": %s", path, strerror(errno));
		return NULL;
	}
	if (len_bytes > SNIPPET_MAX_BYTES) {
		ctl_fail(
			CTL_FAILED, "add: \"%s\" is longer than %d bytes", path, SNIPPET_MAX_BYTES);
		return NULL;
	}
	text[len_bytes] = '\0';
	if (strlen(text) != len_bytes) {
		ctl_fail(CTL_FAILED, "add: \"%s\" holds a NUL byte: it is not a text", path);
		return NULL;
	}
	return take_ptr(text);
}

enum ctl_exit ctl_add(struct ctl *ctl, const char **operands, int operand_count)
{
	const char *path = operand_count ? operands[0] : "config-snippet";
	char size[UNITS_SIZE_TEXT_LEN];
	json_t *reply;

	if (!operand_count == !ctl->snippet)
		return ctl_fail(CTL_USAGE, "add: expected a FILE, or - or --config-snippet TEXT");
	CLEANUP(free) char *text = ctl->snippet ? strdup(ctl->snippet) : read_settings(path);
	if (!text)
		return CTL_FAILED;
	json_t *parameters = json_pack("{s:s, s:s}", "config", text, "source",
		strcmp(path, "-") ? path : "standard input");
	if (!parameters)
		return ctl_fail(CTL_FAILED, "add: \"%s\" is not in UTF-8", path);
	enum ctl_exit status = ctl_call(ctl, "Add", parameters, &reply);
	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		printf("%s: %s%s%s\n", text_of(reply, "export"),
			units_format_size(
				(uint64_t)json_integer_value(json_object_get(reply, "size")), size),
			*text_of(reply, "device") ? ", " : "", text_of(reply, "device"));
	json_decref(reply);
	return status;
}

enum ctl_exit ctl_remove(struct ctl *ctl, const char **operands, int operand_count)
{
	return ctl_call_quietly(
		ctl, "Remove", json_pack("{s:s, s:b}", "export", operands[0], "force", ctl->force));
}

/* --- upgrade ---------------------------------------------------------------------------------- */

/* The new server is there when another process answers. */
static enum ctl_exit wait_for_successor(struct ctl *ctl, json_int_t old_pid, json_t **info)
{
	const struct timespec pause = { .tv_nsec = 20000000 };
	enum ctl_exit status;

	for (int try = 0; try < UPGRADE_TRIES; try++) {
		ctl_close(ctl);
		nanosleep(&pause, NULL);
		/* The old one may have taken the connection and leave without a word. */
		status = ctl_call(ctl, "Info", NULL, info);
		if (!status && json_integer_value(json_object_get(*info, "server_pid")) != old_pid)
			return CTL_OK;
		json_decref(*info);
		*info = NULL;
	}
	return ctl_fail(CTL_FAILED, "no other server answers yet; see the log of blkstackd");
}

static enum ctl_exit hand_over(struct ctl *ctl, json_int_t old_pid, bool *begun)
{
	json_t *info, *reply;
	enum ctl_exit status = ctl_call(
		ctl, "Upgrade", json_pack("{s:b}", "force", ctl->force), &reply);

	if (status)
		return status;
	*begun = json_is_true(json_object_get(reply, "begun"));
	json_decref(reply);
	if (!*begun)
		return CTL_OK;
	status = wait_for_successor(ctl, old_pid, &info);
	if (status)
		return status;
	const char *end = text_of(info, "last_end");
	if (!strncmp(end, "upgrade failed", strlen("upgrade failed")))
		status = ctl_fail(CTL_FAILED, "%s", end);
	else
		printf("blkstackd %s serves (pid %lld)\n", text_of(info, "version"),
			(long long)json_integer_value(json_object_get(info, "server_pid")));
	json_decref(info);
	return status;
}

/* What there is to know before: without a keeper nobody could hold the devices meanwhile. */
static enum ctl_exit ask_for_server(struct ctl *ctl, json_int_t *pid, bool *keeper)
{
	json_t *info;
	enum ctl_exit status = ctl_call(ctl, "Info", NULL, &info);

	if (status)
		return status;
	*pid = json_integer_value(json_object_get(info, "server_pid"));
	*keeper = json_is_true(json_object_get(info, "keeper"));
	json_decref(info);
	return CTL_OK;
}

enum ctl_exit ctl_upgrade(struct ctl *ctl, const char **operands, int operand_count)
{
	bool keeper, begun = true;
	json_int_t pid;
	enum ctl_exit status = ask_for_server(ctl, &pid, &keeper);

	if (!status)
		status = hand_over(ctl, pid, &begun);
	if (!begun)
		puts("the program that is installed runs already (--force hands over all the "
		     "same)");
	return status;
}

enum ctl_exit ctl_reload(struct ctl *ctl, const char **operands, int operand_count)
{
	bool keeper = false, begun;
	json_int_t pid = 0;
	enum ctl_exit status;

	if (ctl->upgrade && ctl->dry_run)
		return ctl_fail(CTL_USAGE, "reload: --upgrade is no part of a --dry-run");
	status = reload_config(ctl);
	if (!status && ctl->upgrade)
		status = ask_for_server(ctl, &pid, &keeper);
	return !status && keeper ? hand_over(ctl, pid, &begun) : status;
}
