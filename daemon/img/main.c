/*
 * blkstack-img: creates, looks at, repairs and converts disk images, while nobody else uses them.
 *
 * Here is the command line; commands.c lists the commands, img.h the exit statuses. Options may stand
 * anywhere behind the command. Every command has --help, made from its tables.
 */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/nearest.h"
#include "base/units.h"
#include "daemon/img/img.h"
#include "rt/reactor.h"

static const struct img_option common_options[] = {
	{ 'j', "json", NULL, "print the answer as JSON" },
	{ 'q', "quiet", NULL, "no progress bar, and only what was asked for" },
	{ 'h', "help", NULL, "this help" },
	{},
};

static int usage_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static int usage_error(const char *fmt, ...)
{
	va_list ap;

	fputs("blkstack-img: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputs("; see blkstack-img --help\n", stderr);
	return IMG_USAGE;
}

/* --- help ------------------------------------------------------------------------------------- */

static void show_options(const struct img_option *options)
{
	for (const struct img_option *option = options; option && option->name; option++) {
		char names[40], short_name[4] = "   ";

		if (option->short_name)
			snprintf(short_name, sizeof(short_name), "-%c,", option->short_name);
		snprintf(names, sizeof(names), "--%s%s%s", option->name, option->arg ? " " : "",
			option->arg ? option->arg : "");
		printf("  %s %-24s %s\n", short_name, names, option->help);
	}
}

static void show_command_help(const struct img_command *command)
{
	printf("Usage: blkstack-img %s [OPTION...] %s\n%c%s.\n", command->name, command->operands,
		toupper((unsigned char)command->summary[0]), command->summary + 1);
	if (command->help)
		printf("\n%s", command->help);
	puts("\nOptions:");
	show_options(command->options);
	show_options(common_options);
}

static void show_help(void)
{
	puts("Usage: blkstack-img COMMAND [OPTION...] OPERAND...\n"
	     "Works on disk images that nobody has in use.\n\nCommands:");
	for (const struct img_command *const *command = img_commands; *command; command++)
		printf("  %-11s %s\n", (*command)->name, (*command)->summary);
	puts("\nblkstack-img COMMAND --help has more on each.\n\n"
	     "Exit status: 0 success, 1 failure, 2 wrong usage, 3 corruptions are left (check, "
	     "repair)\nor the contents differ (compare), 4 leaks are left, 5 the image is in use. "
	     "See\nblkstack-img(1).");
}

/* --- options ---------------------------------------------------------------------------------- */

const char *img_nth_value(const struct img *img, const char *name, size_t n)
{
	for (size_t i = 0; i < img->given_count; i++)
		if (!strcmp(img->given[i].option->name, name) && !n--)
			return img->given[i].value;
	return NULL;
}

const char *img_value(const struct img *img, const char *name)
{
	const char *value = NULL;

	for (size_t i = 0; img_nth_value(img, name, i); i++)
		value = img_nth_value(img, name, i);
	return value;
}

bool img_size_value(struct img *img, const char *name, uint64_t *size)
{
	const char *value = img_value(img, name);

	if (value && units_parse_size(value, size, &img->err) < 0) {
		err_wrap(&img->err, "--%s", name);
		return false;
	}
	return true;
}

bool img_choice(struct img *img, const char *name, const char *const *choices, unsigned *index)
{
	const char *value = img_value(img, name);
	char known[128] = "";
	size_t used = 0;

	for (*index = 0; choices[*index]; ++*index) {
		if (!strcmp(choices[*index], value))
			return true;
		if (used < sizeof(known))
			used += (size_t)snprintf(known + used, sizeof(known) - used, "%s%s",
				used ? ", " : "", choices[*index]);
	}
	err_set(&img->err, EINVAL, "--%s \"%s\" is not one of: %s", name, value, known);
	return false;
}

static const struct img_option *find_option(const struct img_option *options, const char *word)
{
	for (const struct img_option *option = options; option && option->name; option++) {
		size_t len = strlen(option->name);

		if (word[1] != '-' && option->short_name && word[1] == option->short_name)
			return option;
		if (word[1] == '-' && !strncmp(word + 2, option->name, len) &&
			(!word[2 + len] || word[2 + len] == '='))
			return option;
	}
	return NULL;
}

static int unknown_option(const struct img *img, const char *word)
{
	struct nearest nearest;

	nearest_init(&nearest, word + 1 + (word[1] == '-'));
	for (const struct img_option *option = img->command->options; option && option->name;
		option++)
		nearest_offer(&nearest, option->name);
	for (const struct img_option *option = common_options; option->name; option++)
		nearest_offer(&nearest, option->name);
	return nearest.best
		       ? usage_error("unknown option %s; did you mean --%s?", word, nearest.best)
		       : usage_error("unknown option %s", word);
}

/* Takes the option at argv[*at]; its value may be in the same word or the next. -1: taken. */
static int take_option(struct img *img, int argc, char **argv, int *at)
{
	const char *word = argv[*at], *value;
	const struct img_option *option = find_option(img->command->options, word);

	if (!option)
		option = find_option(common_options, word);
	if (!option)
		return unknown_option(img, word);
	value = word[1] == '-' ? strchr(word, '=') : word + 1;
	value = value && value[0] && value[1] ? value + 1 : NULL;
	if (!option->arg && value)
		return usage_error("--%s takes no value", option->name);
	if (option->arg && !value) {
		if (*at + 1 == argc)
			return usage_error("--%s needs a value: %s", option->name, option->arg);
		value = argv[++*at];
	}
	img->given[img->given_count].option = option;
	img->given[img->given_count++].value = option->arg ? value : "";
	return -1;
}

static int parse(struct img *img, int argc, char **argv)
{
	bool operands_only = false;

	for (int i = 2; i < argc; i++) {
		if (!operands_only && !strcmp(argv[i], "--")) {
			operands_only = true;
		} else if (!operands_only && argv[i][0] == '-' && argv[i][1] &&
			   !isdigit((unsigned char)argv[i][1])) {
			int status = take_option(img, argc, argv, &i);

			if (status >= 0)
				return status;
		} else {
			img->operands[img->operand_count++] = argv[i];
		}
	}
	img->json = img_flag(img, "json");
	img->quiet = img_flag(img, "quiet");
	if (img_flag(img, "help"))
		return -1;
	if (img->operand_count < img->command->operands_min)
		return usage_error("%s needs: %s", img->command->name, img->command->operands);
	if (img->operand_count > img->command->operands_max)
		return usage_error(
			"%s takes no more than: %s", img->command->name, img->command->operands);
	return -1;
}

/* --- running ---------------------------------------------------------------------------------- */

struct run {
	struct img *img;
	enum img_exit status;
};

static suspends void run_command(void *arg)
{
	struct run *run = arg;

	run->status = run->img->command->run(run->img);
}

static int run(struct img *img)
{
	struct run job = { .img = img, .status = IMG_FAILED };
	struct reactor *reactor;

	if (blk_env_init(&img->env)) {
		fputs("blkstack-img: out of memory\n", stderr);
		return IMG_FAILED;
	}
	img->env.command_line = true;
	if (reactor_create(&reactor, "auto", &img->err) == 0) {
		reactor_run_main(reactor, run_command, &job);
		reactor_free(reactor);
	}
	blk_env_fini(&img->env);
	conf_free(img->confs);
	if (fflush(stdout) || ferror(stdout)) {
		fprintf(stderr, "blkstack-img: cannot write the output: %s\n", strerror(errno));
		return IMG_FAILED;
	}
	if (job.status == IMG_FAILED || job.status == IMG_USAGE)
		fprintf(stderr, "blkstack-img: %s\n", img->err.text);
	return job.status == IMG_FAILED && img->err.code == EBUSY ? IMG_BUSY : (int)job.status;
}

static const struct img_command *find_command(const char *name)
{
	for (const struct img_command *const *command = img_commands; *command; command++)
		if (!strcmp((*command)->name, name))
			return *command;
	return NULL;
}

static int unknown_command(const char *name)
{
	struct nearest nearest;

	nearest_init(&nearest, name);
	for (const struct img_command *const *command = img_commands; *command; command++)
		nearest_offer(&nearest, (*command)->name);
	return nearest.best ? usage_error("unknown command \"%s\"; did you mean \"%s\"?", name,
				      nearest.best)
			    : usage_error("unknown command \"%s\"", name);
}

int main(int argc, char **argv)
{
	struct img img = { 0 };

	if (argc < 2)
		return usage_error("no command");
	if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
		show_help();
		return IMG_OK;
	}
	if (!strcmp(argv[1], "--version")) {
		puts("blkstack-img " BLKSTACK_VERSION);
		return IMG_OK;
	}
	img.command = find_command(argv[1]);
	if (!img.command)
		return unknown_command(argv[1]);
	img.operands = calloc((size_t)argc, sizeof(*img.operands));
	img.given = calloc((size_t)argc, sizeof(*img.given));
	int status = img.operands && img.given ? parse(&img, argc, argv) : IMG_FAILED;
	if (status < 0 && img_flag(&img, "help")) {
		show_command_help(img.command);
		status = IMG_OK;
	}
	if (status < 0)
		status = run(&img);
	free(img.operands);
	free(img.given);
	return status;
}
