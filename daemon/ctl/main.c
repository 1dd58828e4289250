/*
 * blkstackctl: looks at a running blkstackd and changes its exports, by the control socket.
 *
 * Here is the command line: options may stand anywhere, before or after the command; "-1G" is an
 * operand, since sizes may be negative. Commands are in commands.c, exit statuses in ctl.h.
 */
#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "daemon/ctl/ctl.h"

#define OPERANDS_MAX 4 /* the command's name, and what it takes at most */

struct command_line {
	const char *operands[OPERANDS_MAX];
	int operand_count;
	bool help, version, force, more, cancel;
	const char *rate;
};

enum ctl_exit ctl_fail(enum ctl_exit status, const char *fmt, ...)
{
	va_list ap;

	fflush(stdout);
	fputs("blkstackctl: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	return status;
}

/* --- help ------------------------------------------------------------------------------------- */

static const char options_help[] =
	"  -s, --socket PATH   the daemon's control socket (" CTL_DEFAULT_SOCKET ")\n"
	"  -j, --json          print the daemon's answer as JSON\n"
	"  -h, --help          help, also on one command: blkstackctl resize --help\n";

static void show_help(void)
{
	puts("Usage: blkstackctl [OPTION...] COMMAND [OPERAND...]\n"
	     "Looks at a running blkstackd and changes its exports.\n\nCommands:");
	for (const struct ctl_command *command = ctl_commands; command->name; command++) {
		char usage[64];

		snprintf(usage, sizeof(usage), "%s %s", command->name, command->operands);
		printf("  %-31s %s\n", usage, command->summary);
	}
	printf("\nOptions:\n%s"
	       "      --version       the version of this command\n\n"
	       "Exit status: 0 success, 1 failure, 2 wrong usage, 3 no daemon to connect to,\n"
	       "4 not permitted, 5 no such export, 6 busy. See blkstackctl(1).\n",
		options_help);
}

static void show_command_help(const struct ctl_command *command)
{
	printf("Usage: blkstackctl %s%s%s%s%s%s%s%s%s\n%c%s.\n%s%s\nOptions:\n", command->name,
		*command->operands ? " " : "", command->operands,
		command->options & CTL_FORCE ? " [--force]" : "",
		command->options & CTL_MORE ? " [--more]" : "",
		command->options & CTL_RATE ? " [--rate BYTES]" : "",
		command->options & CTL_CANCEL ? " [--cancel]" : "",
		command->options & CTL_DRY_RUN ? " [--dry-run]" : "",
		command->options & CTL_UPGRADE ? " [--upgrade]" : "", toupper(command->summary[0]),
		command->summary + 1, command->help ? "\n" : "",
		command->help ? command->help : "");
	if (command->options & CTL_FORCE)
		puts("  -f, --force         do it although something may be lost");
	if (command->options & CTL_MORE)
		puts("  -m, --more          ask for progress");
	if (command->options & CTL_RATE)
		puts("  -r, --rate BYTES    move at most so much per second, like 50M");
	if (command->options & CTL_CANCEL)
		puts("  -c, --cancel        end the one that runs");
	if (command->options & CTL_DRY_RUN)
		puts("  -n, --dry-run       only tell what there is to do, and what stands in the "
		     "way");
	if (command->options & CTL_UPGRADE)
		puts("  -u, --upgrade       then hand over, if another program is installed by "
		     "now");
	if (command->options & CTL_SNIPPET)
		puts("  --config-snippet TEXT\n                      the settings themselves");
	fputs(options_help, stdout);
}

/* --- the command line ------------------------------------------------------------------------- */

static bool is_option(const char *word, const char *short_name, const char *long_name)
{
	return !strcmp(word, short_name) || !strcmp(word, long_name);
}

/* The argument of --socket: what follows "=", or the next word. NULL when there is none. */
static const char *option_argument(const char *word, char ***words)
{
	const char *equals = word[1] == '-' ? strchr(word, '=') : NULL;

	if (equals)
		return equals + 1;
	if ((*words)[1])
		(*words)++;
	else
		return NULL;
	return **words;
}

static enum ctl_exit parse_option(struct ctl *ctl, struct command_line *line, char ***words)
{
	const char *word = **words;
	bool taken;
	enum ctl_exit status = ctl_mirror_option(&ctl->mirror, words, &taken);

	if (!status && !taken)
		status = ctl_doctor_option(&ctl->doctor, words, &taken);
	if (status || taken)
		return status;
	if (is_option(word, "-h", "--help"))
		line->help = true;
	else if (is_option(word, "-V", "--version"))
		line->version = true;
	else if (is_option(word, "-j", "--json"))
		ctl->json = true;
	else if (is_option(word, "-f", "--force"))
		line->force = true;
	else if (is_option(word, "-m", "--more"))
		line->more = true;
	else if (is_option(word, "-c", "--cancel"))
		line->cancel = true;
	else if (is_option(word, "-n", "--dry-run"))
		ctl->dry_run = true;
	else if (is_option(word, "-u", "--upgrade"))
		ctl->upgrade = true;
	else if (!strcmp(word, "--config-snippet") || !strncmp(word, "--config-snippet=", 17)) {
		ctl->snippet = option_argument(word, words);
		if (!ctl->snippet)
			return ctl_fail(CTL_USAGE, "%s needs the settings of an export", word);
	} else if (is_option(word, "-r", "--rate") || !strncmp(word, "--rate=", 7)) {
		line->rate = option_argument(word, words);
		if (!line->rate)
			return ctl_fail(CTL_USAGE, "%s needs bytes per second, like 50M", word);
	} else if (is_option(word, "-s", "--socket") || !strncmp(word, "--socket=", 9))
		ctl->socket_path = option_argument(word, words);
	else
		return ctl_fail(CTL_USAGE, "unknown option %s (see blkstackctl --help)", word);
	if (!ctl->socket_path)
		return ctl_fail(CTL_USAGE, "%s needs the path of a socket", word);
	return CTL_OK;
}

static enum ctl_exit parse_command_line(struct ctl *ctl, struct command_line *line, char **words)
{
	bool options = true;

	for (; *words; words++) {
		const char *word = *words;

		if (options && !strcmp(word, "--")) {
			options = false;
		} else if (options && word[0] == '-' && word[1] &&
			   !isdigit((unsigned char)word[1])) {
			enum ctl_exit status = parse_option(ctl, line, &words);
			if (status)
				return status;
		} else if (line->operand_count == OPERANDS_MAX) {
			return ctl_fail(CTL_USAGE, "too many words from \"%s\" on", word);
		} else {
			line->operands[line->operand_count++] = word;
		}
	}
	return CTL_OK;
}

static const struct ctl_command *find_command(const char *name)
{
	for (const struct ctl_command *command = ctl_commands; command->name; command++)
		if (!strcmp(command->name, name))
			return command;
	return NULL;
}

static enum ctl_exit check_usage(const struct ctl *ctl, const struct command_line *line)
{
	const struct ctl_command *command = ctl->command;
	int given = line->operand_count - 1;
	const struct {
		bool given;
		enum ctl_option option;
		const char *name;
	} options[] = {
		{ line->force, CTL_FORCE, "--force" },
		{ line->more, CTL_MORE, "--more" },
		{ ctl->mirror.given, CTL_MIRROR, ctl->mirror.given },
		{ ctl->doctor.given, CTL_DOCTOR, ctl->doctor.given },
		{ line->cancel, CTL_CANCEL, "--cancel" },
		{ line->rate, CTL_RATE, "--rate" },
		{ ctl->dry_run, CTL_DRY_RUN, "--dry-run" },
		{ ctl->upgrade, CTL_UPGRADE, "--upgrade" },
		{ ctl->snippet, CTL_SNIPPET, "--config-snippet" },
	};

	if (given < command->min_operands || given > command->max_operands)
		return ctl_fail(CTL_USAGE, "usage: blkstackctl %s%s%s", command->name,
			*command->operands ? " " : "", command->operands);
	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		if (options[i].given && !(command->options & options[i].option))
			return ctl_fail(
				CTL_USAGE, "%s knows no %s", command->name, options[i].name);
	return CTL_OK;
}

static enum ctl_exit run_command(struct ctl *ctl, struct command_line *line)
{
	const char *name = line->operands[0];

	if (!name)
		return ctl_fail(CTL_USAGE, "no command given (see blkstackctl --help)");
	ctl->command = find_command(name);
	if (!ctl->command)
		return ctl_fail(CTL_USAGE, "unknown command \"%s\" (see blkstackctl --help)", name);
	if (line->help) {
		show_command_help(ctl->command);
		return CTL_OK;
	}
	enum ctl_exit status = check_usage(ctl, line);
	if (!status && line->rate)
		status = ctl_parse_size(line->rate, &ctl->rate_bytes_s);
	if (status)
		return status;
	ctl->force = line->force;
	ctl->more = line->more;
	ctl->cancel = line->cancel;
	return ctl->command->run(ctl, line->operands + 1, line->operand_count - 1);
}

int main(int argc, char **argv)
{
	struct ctl ctl = { .socket_path = CTL_DEFAULT_SOCKET, .fd = -1 };
	struct command_line line = {};
	enum ctl_exit status = parse_command_line(&ctl, &line, argv + 1);

	if (!status && line.version)
		printf("blkstackctl %s\n", BLKSTACK_VERSION);
	else if (!status && line.help && !line.operand_count)
		show_help();
	else if (!status)
		status = run_command(&ctl, &line);
	ctl_close(&ctl);
	if (fflush(stdout) || ferror(stdout))
		status = status ? status : ctl_fail(CTL_FAILED, "cannot write the output");
	return status;
}
