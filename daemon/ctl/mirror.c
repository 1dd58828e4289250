/*
 * blkstackctl mirror: starts, watches, steers and ends the mirror of an export.
 *
 * Each action is a method of the control interface. `wait` and `verify` show a bar while the daemon tells of
 * progress, on a terminal; with --json each of its replies is printed as it comes.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/units.h"
#include "base/util.h"
#include "daemon/ctl/ctl.h"

#define BAR_COLUMNS 30

const char ctl_mirror_help[] =
	"Actions:\n"
	"  start EXPORT --to LAYERS   begin to copy to LAYERS, written as in the config file:\n"
	"                             --to '{ layer = \"file\"; path = \"/mnt/copy.img\"; }'\n"
	"  status EXPORT              how far it is, and what is wrong\n"
	"  wait EXPORT                return when both hold the same\n"
	"  pause, resume EXPORT       stop copying; go on, or try a failed secondary again\n"
	"  rate EXPORT RATE           bytes per second for the copy (50M), 0: no limit\n"
	"  promote EXPORT             serve from the secondary from now on\n"
	"  cancel EXPORT              end the mirror; serve from the primary alone\n"
	"  forget EXPORT              the next start follows the config again, not what these did\n"
	"  verify EXPORT              read and compare both, in use\n\n"
	"      --to LAYERS         start: the secondary\n"
	"      --overwrite         start: what the secondary holds may be destroyed\n"
	"      --intent-log FILE   start: note what is being written, for after a crash\n"
	"      --paused            start: copy nothing until it is resumed\n"
	"      --keep              promote: go on mirroring, to the old primary\n";

/* --- options ---------------------------------------------------------------------------------- */

enum ctl_exit ctl_mirror_option(struct ctl_mirror *options, char ***words, bool *taken)
{
	const struct {
		const char *name;
		const char **text;
		bool *flag;
	} known[] = {
		{ "--to", &options->to, NULL },
		{ "--intent-log", &options->intent_log, NULL },
		{ "--overwrite", NULL, &options->overwrite },
		{ "--paused", NULL, &options->paused },
		{ "--keep", NULL, &options->keep },
	};
	const char *word = **words;

	*taken = false;
	for (size_t i = 0; i < ARRAY_LEN(known); i++) {
		size_t len = strlen(known[i].name);
		bool joined = !strncmp(word, known[i].name, len) && word[len] == '=';

		if (strcmp(word, known[i].name) && !(joined && known[i].text))
			continue;
		*taken = true;
		options->given = options->given ? options->given : known[i].name;
		if (known[i].flag)
			*known[i].flag = true;
		else if (joined)
			*known[i].text = word + len + 1;
		else if ((*words)[1])
			*known[i].text = *++*words;
		else
			return ctl_fail(CTL_USAGE, "%s needs an argument", word);
	}
	return CTL_OK;
}

/* --- what is shown ---------------------------------------------------------------------------- */

static uint64_t get_number(const json_t *object, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(object, key));
}

static const char *get_text(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "?";
}

static const char *phase_words(const json_t *mirror)
{
	const char *phase = get_text(mirror, "phase");

	return strcmp(phase, "in_sync") ? phase : "in sync";
}

static void print_time(uint64_t seconds)
{
	time_t time = (time_t)seconds;
	struct tm tm;
	char text[32];

	strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", localtime_r(&time, &tm));
	fputs(text, stdout);
}

static void print_error(const char *leg, const json_t *error)
{
	if (!json_is_object(error))
		return;
	printf("  %-12s %s, ", leg, get_text(error, "text"));
	print_time(get_number(error, "time"));
	printf(", %llu in all\n", (unsigned long long)get_number(error, "count"));
}

static void show_log(const json_t *log)
{
	char text[UNITS_SIZE_TEXT_LEN];

	if (!json_is_object(log)) {
		puts("  intent log   none: everything is copied again after a restart");
		return;
	}
	printf("  intent log   %s, %llu of %llu regions of %s to be copied after a crash%s\n",
		get_text(log, "path"), (unsigned long long)get_number(log, "regions_set"),
		(unsigned long long)get_number(log, "regions"),
		units_format_size(get_number(log, "region_size"), text),
		json_is_true(json_object_get(log, "broken")) ? "; CANNOT BE WRITTEN" : "");
}

/* A writer that is faster than the secondary is slowed to it: that has to be seen. */
static void show_guests(const json_t *mirror)
{
	double slowed = json_real_value(json_object_get(mirror, "guests_slowed"));
	char rate[UNITS_SIZE_TEXT_LEN];

	printf("  guests       write %s/s",
		units_format_size(get_number(mirror, "guest_rate"), rate));
	if (slowed >= 0.01)
		printf(", %.0f %% of it is waiting for the secondary", 100 * slowed);
	if (get_number(mirror, "dirty_rate"))
		printf("; %s/s become dirty",
			units_format_size(get_number(mirror, "dirty_rate"), rate));
	putchar('\n');
}

static void show_mirror(const json_t *mirror)
{
	char dirty[UNITS_SIZE_TEXT_LEN], size[UNITS_SIZE_TEXT_LEN], rate[UNITS_SIZE_TEXT_LEN];
	const json_t *left = json_object_get(mirror, "seconds_left");
	const json_t *retry = json_object_get(mirror, "retry_seconds");

	printf("%s since ", phase_words(mirror));
	print_time(get_number(mirror, "phase_since"));
	printf("\n  equal        %.1f %%, %s of %s may differ\n",
		json_real_value(json_object_get(mirror, "percent")),
		units_format_size(get_number(mirror, "bytes_dirty"), dirty),
		units_format_size(get_number(mirror, "bytes"), size));
	printf("  copy         %s/s", units_format_size(get_number(mirror, "rate"), rate));
	if (get_number(mirror, "rate_limit"))
		printf(" (at most %s/s)",
			units_format_size(get_number(mirror, "rate_limit"), rate));
	if (json_is_integer(left))
		printf(", %llu s left", (unsigned long long)json_integer_value(left));
	printf("%s\n", json_is_true(json_object_get(mirror, "converges")) ? "" : ", stands still");
	show_guests(mirror);
	printf("  because      %s\n", get_text(mirror, "note"));
	print_error("secondary", json_object_get(mirror, "secondary_error"));
	print_error("primary", json_object_get(mirror, "primary_error"));
	if (get_number(mirror, "reads_from_secondary"))
		printf("  reads        %llu that the primary could not answer\n",
			(unsigned long long)get_number(mirror, "reads_from_secondary"));
	if (json_is_integer(retry))
		printf("  next try     in %llu s\n", (unsigned long long)json_integer_value(retry));
	show_log(json_object_get(mirror, "intent_log"));
}

static void show_bar(double percent, const char *what)
{
	int full = (int)(percent * BAR_COLUMNS / 100);

	printf("\r[%.*s%*s] %5.1f %%  %-30.30s", full, "##############################",
		BAR_COLUMNS - full, "", percent, what);
}

static void show_wait_progress(const json_t *reply)
{
	const json_t *mirror = json_object_get(reply, "mirror");
	const json_t *left = json_object_get(mirror, "seconds_left");
	char what[64], rate[UNITS_SIZE_TEXT_LEN];

	if (json_is_integer(left))
		snprintf(what, sizeof(what), "%s/s, %llu s left",
			units_format_size(get_number(mirror, "rate"), rate),
			(unsigned long long)json_integer_value(left));
	else
		snprintf(what, sizeof(what), "%s", phase_words(mirror));
	show_bar(json_real_value(json_object_get(mirror, "percent")), what);
}

static void show_verify_progress(const json_t *reply)
{
	double bytes = (double)MAX(get_number(reply, "bytes"), UINT64_C(1));
	char what[64];

	snprintf(what, sizeof(what), "%llu bytes differ",
		(unsigned long long)get_number(reply, "different"));
	show_bar((double)get_number(reply, "done") * 100 / bytes, what);
}

/* --- actions ---------------------------------------------------------------------------------- */

/* A call with progress. *last: the closing reply, NULL on failure. */
static enum ctl_exit follow(struct ctl *ctl, const char *method, const char *export,
	void (*show_progress)(const json_t *reply), json_t **last)
{
	bool bar = !ctl->json && isatty(STDOUT_FILENO), continues = true;
	enum ctl_exit status = ctl_send(ctl, method, json_pack("{s:s}", "export", export), true);

	*last = NULL;
	while (!status && continues) {
		json_decref(*last);
		status = ctl_receive(ctl, last, &continues);
		if (bar && *last)
			show_progress(*last);
		if (ctl->json && *last)
			show_json(*last);
		fflush(stdout);
	}
	if (bar)
		putchar('\n');
	return status;
}

static enum ctl_exit run_wait(struct ctl *ctl, const char *export)
{
	json_t *last;
	enum ctl_exit status = follow(ctl, "MirrorWait", export, show_wait_progress, &last);

	json_decref(last);
	return status;
}

static enum ctl_exit run_verify(struct ctl *ctl, const char *export)
{
	json_t *last;
	enum ctl_exit status = follow(ctl, "MirrorVerify", export, show_verify_progress, &last);
	uint64_t different = get_number(last, "different");
	char text[UNITS_SIZE_TEXT_LEN];

	if (!status && different)
		status = ctl_fail(CTL_FAILED,
			"export \"%s\": %llu bytes differ, the first at %llu; they are copied "
			"again",
			export, (unsigned long long)different,
			(unsigned long long)get_number(last, "first_difference"));
	else if (!status && !ctl->json)
		printf("%s: %s compared, no difference\n", export,
			units_format_size(get_number(last, "compared"), text));
	json_decref(last);
	return status;
}

static enum ctl_exit run_start(struct ctl *ctl, const char *export)
{
	const struct ctl_mirror *options = &ctl->mirror;

	if (!options->to)
		return ctl_fail(CTL_USAGE, "mirror start: where to? Say --to 'LAYERS'");
	return ctl_call_quietly(ctl, "MirrorStart",
		json_pack("{s:s, s:s, s:b, s:b, s:I, s:s*}", "export", export, "to", options->to,
			"overwrite", options->overwrite, "paused", options->paused, "rate",
			(json_int_t)ctl->rate_bytes_s, "intent_log", options->intent_log));
}

static enum ctl_exit run_status(struct ctl *ctl, const char *export)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(
		ctl, "MirrorStatus", json_pack("{s:s}", "export", export), &reply);

	if (!status && ctl->json) {
		show_json(reply);
	} else if (!status) {
		printf("%s: ", export);
		show_mirror(json_object_get(reply, "mirror"));
	}
	json_decref(reply);
	return status;
}

static enum ctl_exit run_promote(struct ctl *ctl, const char *export)
{
	enum ctl_exit status = ctl_call_quietly(ctl, "MirrorPromote",
		json_pack("{s:s, s:b, s:b}", "export", export, "force", ctl->force, "keep",
			ctl->mirror.keep));

	if (!status && !ctl->json)
		printf("%s: serves from what was the secondary, also after a restart (see status), "
		       "until the\n"
		       "config file names it: change it there.\n",
			export);
	return status;
}

static enum ctl_exit run_rate(struct ctl *ctl, const char *export, const char *text)
{
	uint64_t rate;

	if (!text)
		return ctl_fail(CTL_USAGE, "mirror rate: how many bytes per second?");
	if (ctl_parse_size(text, &rate))
		return CTL_USAGE;
	return ctl_call_quietly(ctl, "MirrorRate",
		json_pack("{s:s, s:I}", "export", export, "rate", (json_int_t)rate));
}

enum ctl_exit ctl_mirror_run(struct ctl *ctl, const char **operands, int operand_count)
{
	static const struct {
		const char *name, *method; /* method: for those that need nothing but the export */
		enum ctl_exit (*run)(struct ctl *ctl, const char *export);
	} actions[] = {
		{ "start", NULL, run_start },
		{ "status", NULL, run_status },
		{ "wait", NULL, run_wait },
		{ "pause", "MirrorPause", NULL },
		{ "resume", "MirrorResume", NULL },
		{ "promote", NULL, run_promote },
		{ "cancel", "MirrorCancel", NULL },
		{ "forget", "MirrorForget", NULL },
		{ "verify", NULL, run_verify },
	};
	const char *action = operands[0], *export = operands[1];

	if (!strcmp(action, "rate"))
		return run_rate(ctl, export, operand_count > 2 ? operands[2] : NULL);
	if (operand_count > 2)
		return ctl_fail(CTL_USAGE, "mirror %s: too many words", action);
	for (size_t i = 0; i < ARRAY_LEN(actions); i++) {
		if (strcmp(action, actions[i].name))
			continue;
		return actions[i].run ? actions[i].run(ctl, export)
				      : ctl_call_quietly(ctl, actions[i].method,
						json_pack("{s:s}", "export", export));
	}
	return ctl_fail(CTL_USAGE,
		"mirror: unknown action \"%s\" (start, status, wait, pause, resume, rate, promote, "
		"cancel, forget, verify)",
		action);
}
