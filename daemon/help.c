/*
 * blkstackd --help; see help.h.
 *
 * A row of an option table becomes a line: name, type, help text, choices and default.
 */
#include "daemon/help.h"

#include <string.h>

#include "base/conf.h"
#include "blk/blk.h"
#include "daemon/config.h"

#define NAME_COLUMNS 19
#define TYPE_COLUMNS 9

static const char usage[] =
	"blkstackd - serve disks composed of layers, as /dev/nbdX and on NBD sockets\n"
	"\n"
	"    blkstackd --config FILE            run in the foreground, log to standard error\n"
	"    blkstackd --config FILE --check    check the file, print the stacks, change nothing\n"
	"\n"
	"    -c, --config FILE       the config file, see blkstack.conf(5)\n"
	"    -n, --check             only check\n"
	"    -e, --engine ENGINE     auto, uring or threads; instead of what the config says\n"
	"    -l, --log-level LEVEL   error, warning, info or debug; instead of what the config "
	"says\n"
	"    -h, --help              this text\n"
	"    -V, --version           the version\n"
	"\n"
	"Signals: SIGTERM and SIGINT end it: requests in flight finish, everything is flushed.\n"
	"SIGHUP makes it read the config file again, as \"blkstackctl reload\" does.\n"
	"Exit status: 0 a clean end, 1 a config or a start that failed, 2 a wrong command line.\n";

static const char *type_text(const struct opt *opt)
{
	static const char *const texts[] = {
		[OPT_BOOL] = "BOOL",
		[OPT_INT] = "NUMBER",
		[OPT_SIZE] = "SIZE",
		[OPT_STRING] = "TEXT",
		[OPT_ENUM] = "TEXT",
		[OPT_STRINGS] = "TEXTS",
		[OPT_LIST] = "({...})",
		[OPT_MIXED] = "(...)",
	};

	return texts[opt->type];
}

/* What is said in brackets after the help text. */
static void print_limits(FILE *out, const struct opt *opt)
{
	const char *separator = " (";

	for (int i = 0; opt->type == OPT_ENUM && opt->choices[i]; i++) {
		fprintf(out, "%s\"%s\"", separator, opt->choices[i]);
		separator = ", ";
	}
	if (opt->required || (opt->fallback && *opt->fallback)) {
		fprintf(out, "%s%s%s", separator, opt->required ? "required" : "default ",
			opt->required ? "" : opt->fallback);
		separator = ", ";
	}
	if (*separator == ',')
		fputc(')', out);
}

static void print_options(FILE *out, const struct opt *table)
{
	for (const struct opt *opt = table; opt && opt->name; opt++) {
		fprintf(out, "    %-*s %-*s %s", NAME_COLUMNS, opt->name, TYPE_COLUMNS,
			type_text(opt), opt->help ? opt->help : "");
		print_limits(out, opt);
		fputc('\n', out);
	}
}

void help_print(FILE *out)
{
	fputs(usage, out);
	fputs("\nThe config file. In names, - and _ are the same; a SIZE is a number of bytes or "
	      "\"10G\".\n",
		out);
	print_options(out, config_options);
	fputs("\nA listener, an item of `listen` that is more than its address:\n", out);
	print_options(out, config_listen_options);
	fputs("\nAn export, an item of `exports`:\n", out);
	print_options(out, config_export_options);
	fputs("\nLayers, the items of `stack`, top first; the last one stores the bytes.\n", out);
	for (const struct blk_ops *const *ops = blk_layers; *ops; ops++) {
		fprintf(out, "\n  layer = \"%s\": %s%s\n", (*ops)->name, (*ops)->summary,
			(*ops)->is_leaf ? " (stands last)" : "");
		print_options(out, (*ops)->options);
	}
}
