/*
 * blkstack-img: what its files share.
 *
 *	main.c		the command line and its help
 *	open.c		files, formats, stacks
 *	output.c	JSON, tables, the progress bar
 *	one file per command, or per family of commands
 *
 * A command runs as a coroutine on a reactor of its own and uses the same library as the daemon, so
 * the same locks: an image that blkstackd or qemu has in use is refused.
 */
#pragma once

#include <string.h>

#include <jansson.h>

#include "base/util.h"
#include "blk/blk.h"

/* Exit statuses, as the manual page tells them. */
enum img_exit {
	IMG_OK = 0,
	IMG_FAILED = 1,
	IMG_USAGE = 2,
	IMG_CORRUPT = 3, /* check, repair: corruptions are left; compare: the contents differ */
	IMG_LEAKS = 4,   /* check, repair: leaks are left, nothing worse */
	IMG_BUSY = 5,    /* somebody else has the image in use */
};

struct img_option {
	char short_name; /* 0: none */
	const char *name;
	const char *arg; /* NULL: a flag */
	const char *help;
};

struct img_command;

struct img {
	const struct img_command *command;
	const char **operands;
	int operand_count;
	/* What was given, in order. */
	struct {
		const struct img_option *option;
		const char *value;
	} * given;
	size_t given_count;
	bool json, quiet;
	struct blk_env env;
	struct conf *confs; /* of all stacks, freed at the end */
	struct err err;     /* of the command when it fails */
};

/* Returns an exit status; with IMG_FAILED, img->err says why (and turns into IMG_BUSY when it is EBUSY). */
typedef enum img_exit img_run(struct img *img);

struct img_command {
	const char *name, *operands, *summary;
	const char *help; /* NULL: the summary says all */
	int operands_min, operands_max;
	const struct img_option
		*options; /* ended by a row without a name; NULL: none but the common ones */
	suspends img_run *run;
};

/* The last value given for the option, "" for a flag; NULL when it was not given. */
const char *img_value(const struct img *img, const char *name);
static inline bool img_flag(const struct img *img, const char *name)
{
	return img_value(img, name);
}
/* The n-th value of an option that may be given several times; NULL: no more. */
const char *img_nth_value(const struct img *img, const char *name, size_t n);
/* A size option; *size is left as it is when it was not given. False with img->err filled. */
bool img_size_value(struct img *img, const char *name, uint64_t *size);
/* "on" or "off", or given without a value. False with img->err filled. */
bool img_choice(struct img *img, const char *name, const char *const *choices, unsigned *index);

/* Puts the path before img->err, unless that has it already. Returns -errno, as err_wrap(). */
int img_wrap_path(struct img *img, const char *path);

/* A failed read of a disk at off; what begins the text. Returns -errno. */
int img_cannot_read(struct img *img, const char *what, uint64_t off, int ret);

/* --- open.c ----------------------------------------------------------------------------------- */

enum img_format { IMG_RAW, IMG_QCOW2 };

/* -f or another option with a format's name; -1 when not given. False with img->err filled. */
bool img_format_value(struct img *img, const char *option, int *format);

/* The file itself. Closed with stack_close(). -errno with img->err filled, as for all here. */
suspends int img_open_file(struct img *img, const char *path, bool read_only, struct blk **file);
/* A new file of `size` bytes, or an existing one that is at least that long afterwards; overwriting needs --force. */
suspends int img_create_file(struct img *img, const char *path, uint64_t size, struct blk **file);

/* What the file starts with; a file that is not qcow2 is raw. */
suspends int img_probe(struct img *img, struct blk *file, enum img_format *format);

/*
 * The disk in the image at path: format -1 is found by its first bytes. *found (may be NULL) tells. Files
 * named inside the image are opened when --allow-backing lists their folder.
 */
suspends int img_open_disk(struct img *img, const char *path, int format, bool read_only,
	struct blk **disk, enum img_format *found);

/*
 * The next stretch [start, end) of a disk that may hold data, remembered, for going through it once. Zeroed but for
 * disk to begin with.
 */
struct img_mapped {
	struct blk *disk;
	uint64_t start, end;
};
/* The first at or after off, which grows from call to call; start is the disk's size when there is none. */
suspends int img_mapped_find(struct img_mapped *mapped, uint64_t off);

/* Where the name of a backing file inside the image at `image` leads, by the same rules; the caller's to free. */
suspends int img_resolve_backing(struct img *img, const char *image, const char *name, char **path);

#define IMG_OPTION_FORMAT                                                                   \
	{                                                                                   \
		'f', "format", "FORMAT", "raw or qcow2; found by its first bytes otherwise" \
	}
#define IMG_OPTION_ALLOW                                                                        \
	{                                                                                       \
		'b', "allow-backing", "FOLDER",                                                 \
			"open files named inside the image that lie in FOLDER; may be repeated" \
	}

/* len is not 0. */
static inline bool img_is_zero(const uint8_t *data, size_t len)
{
	return !data[0] && !memcmp(data, data + 1, len - 1);
}

/* --- output.c --------------------------------------------------------------------------------- */

void img_print_json(json_t *value); /* takes the reference */
/* A JSON string of what may not be UTF-8: bytes that are not become U+FFFD. */
json_t *img_json_text(const char *text);
/* The same for a terminal: control characters become '?'. Returns out. */
char *img_plain_text(const char *text, char *out, size_t out_size);

/* A bar on standard error when that is a terminal and neither --quiet nor --json was given. */
struct img_progress {
	const char *label;
	int shown; /* percent; -1: nothing is shown */
	bool enabled;
};
void img_progress_init(struct img_progress *progress, const struct img *img, const char *label);
void img_progress(struct img_progress *progress, uint64_t done, uint64_t total);
void img_progress_end(struct img_progress *progress); /* removes the bar */

/* --- commands --------------------------------------------------------------------------------- */

extern const struct img_command *const img_commands[]; /* commands.c; ended by NULL */
