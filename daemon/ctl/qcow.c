/*
 * The commands for exports with a qcow layer: compact, check, snapshot; see ctl.h.
 *
 * compact asks for progress where a terminal shows it. Ending this command does not end the compaction: what the
 * daemon has begun goes on, and `compact EXPORT --cancel` ends it.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/units.h"
#include "daemon/ctl/ctl.h"

#define BAR_WIDTH 40

static uint64_t number(const json_t *object, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(object, key));
}

/* Text from an image, for a terminal: nothing in it acts on that. */
static void print_plain(const char *text)
{
	for (; text && *text; text++)
		putchar((unsigned char)*text < ' ' || *text == 127 ? '?' : *text);
}

/* --- compact ---------------------------------------------------------------------------------- */

static void show_bar(const json_t *progress)
{
	uint64_t done = number(progress, "done"), total = number(progress, "total");
	int percent = total ? (int)((double)done * 100 / (double)total) : 0;
	int filled = percent * BAR_WIDTH / 100;

	fprintf(stderr, "\rcompacting [%.*s%*s] %3d %%", filled,
		"########################################", BAR_WIDTH - filled, "", percent);
}

static void show_compaction(const char *name, const json_t *reply)
{
	char before[UNITS_SIZE_TEXT_LEN], after[UNITS_SIZE_TEXT_LEN];

	printf("%s: %llu clusters moved, the image went from %s to %s\n", name,
		(unsigned long long)number(reply, "moved"),
		units_format_size(number(reply, "size_before"), before),
		units_format_size(number(reply, "size_after"), after));
}

static enum ctl_exit cancel(struct ctl *ctl, const char *name)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(
		ctl, "CancelCompact", json_pack("{s:s}", "export", name), &reply);

	if (!status && ctl->json)
		show_json(reply);
	json_decref(reply);
	return status;
}

enum ctl_exit ctl_compact(struct ctl *ctl, const char **operands, int operand_count)
{
	bool bar = !ctl->json && isatty(STDERR_FILENO), continues = true;
	json_t *reply = NULL;

	if (ctl->cancel)
		return cancel(ctl, operands[0]);
	enum ctl_exit status = ctl_send(ctl, "Compact",
		json_pack(
			"{s:s, s:I}", "export", operands[0], "rate", (json_int_t)ctl->rate_bytes_s),
		bar || ctl->more);
	while (!status && continues) {
		json_decref(reply);
		status = ctl_receive(ctl, &reply, &continues);
		if (status)
			break;
		if (bar && continues)
			show_bar(reply);
		else if (ctl->json && continues)
			show_json(reply);
	}
	if (bar)
		fputs("\r\033[K", stderr);
	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		show_compaction(operands[0], reply);
	json_decref(reply);
	return status;
}

/* --- check ------------------------------------------------------------------------------------ */

static void show_check(const char *name, const json_t *reply)
{
	const json_t *finding;
	size_t i;

	json_array_foreach(json_object_get(reply, "findings"), i, finding)
	{
		printf("%s: ", json_string_value(json_object_get(finding, "kind")));
		print_plain(json_string_value(json_object_get(finding, "text")));
		putchar('\n');
	}
	printf("%s: %llu corruptions, %llu leaked clusters, %llu errors; %llu of %llu clusters "
	       "allocated, %llu fragmented, %llu compressed\n",
		name, (unsigned long long)number(reply, "corruptions"),
		(unsigned long long)number(reply, "leaks"),
		(unsigned long long)number(reply, "errors"),
		(unsigned long long)number(reply, "allocated_clusters"),
		(unsigned long long)number(reply, "total_clusters"),
		(unsigned long long)number(reply, "fragmented_clusters"),
		(unsigned long long)number(reply, "compressed_clusters"));
}

enum ctl_exit ctl_check(struct ctl *ctl, const char **operands, int operand_count)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(
		ctl, "Check", json_pack("{s:s}", "export", operands[0]), &reply);

	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		show_check(operands[0], reply);
	if (!status && (number(reply, "corruptions") || number(reply, "errors")))
		status = ctl_fail(CTL_FAILED, "the image of export \"%s\" is damaged", operands[0]);
	json_decref(reply);
	return status;
}

/* --- snapshots -------------------------------------------------------------------------------- */

static void show_snapshots(const json_t *snapshots)
{
	const json_t *snapshot;
	size_t i;

	if (json_array_size(snapshots))
		printf("%-5s %-19s %10s  %s\n", "ID", "TAKEN", "SIZE", "NAME");
	json_array_foreach(snapshots, i, snapshot)
	{
		time_t when = (time_t)number(snapshot, "time");
		char time_text[32] = "?", size[UNITS_SIZE_TEXT_LEN];
		struct tm tm;

		if (localtime_r(&when, &tm))
			strftime(time_text, sizeof(time_text), "%F %T", &tm);
		printf("%-5s %-19s %10s  ", json_string_value(json_object_get(snapshot, "id")),
			time_text, units_format_size(number(snapshot, "size"), size));
		print_plain(json_string_value(json_object_get(snapshot, "name")));
		putchar('\n');
	}
}

static enum ctl_exit list_snapshots(struct ctl *ctl, const char *name)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(
		ctl, "Snapshots", json_pack("{s:s}", "export", name), &reply);

	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		show_snapshots(json_object_get(reply, "snapshots"));
	json_decref(reply);
	return status;
}

static const struct {
	const char *verb, *method;
} changes[] = {
	{ "create", "CreateSnapshot" },
	{ "apply", "ApplySnapshot" },
	{ "delete", "DeleteSnapshot" },
};

enum ctl_exit ctl_snapshot(struct ctl *ctl, const char **operands, int operand_count)
{
	const char *method = NULL;
	json_t *parameters, *reply;

	if (!strcmp(operands[0], "list") && operand_count == 2 && !ctl->force)
		return list_snapshots(ctl, operands[1]);
	for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++)
		if (!strcmp(operands[0], changes[i].verb) && operand_count == 3)
			method = changes[i].method;
	if (!method)
		return ctl_fail(CTL_USAGE,
			"usage: blkstackctl snapshot list EXPORT, or create, apply, delete EXPORT "
			"NAME");
	if (ctl->force && strcmp(operands[0], "apply") != 0)
		return ctl_fail(CTL_USAGE, "snapshot %s knows no --force", operands[0]);
	parameters = json_pack("{s:s, s:s}", "export", operands[1], "name", operands[2]);
	if (parameters && ctl->force)
		json_object_set_new(parameters, "force", json_true());
	if (!parameters)
		return ctl_fail(CTL_USAGE, "a name is text in UTF-8");
	enum ctl_exit status = ctl_call(ctl, method, parameters, &reply);
	if (!status && ctl->json)
		show_json(reply);
	json_decref(reply);
	return status;
}
