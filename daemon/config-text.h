/*
 * The text of a config file with its includes put in place, ready for libconfig, and where each line of
 * it came from.
 */
#pragma once

#include <stddef.h>

#include "base/err.h"

struct config_line {
	const char *file; /* as the user wrote it; owned by the text */
	unsigned number;  /* from 1 */
};

struct config_text {
	char *text;
	struct config_line *lines; /* one for every line of text */
	size_t line_count;
	char **files;
	size_t file_count;
};

/* Names in `@include "NAME"` are relative to the file they stand in. The error names its place. */
int config_text_read(struct config_text *text, const char *path, struct err *err);
/* The same from content at hand; name is what places are called by. */
int config_text_take(
	struct config_text *text, const char *name, const char *content, struct err *err);
/*
 * The same from content that a server wrote for the next one (config-write.c): a line `#@ NUMBER FILE` says where the
 * one behind it came from, and nothing is included.
 */
int config_text_take_written(
	struct config_text *text, const char *name, const char *content, struct err *err);
void config_text_fini(struct config_text *text);

/* Where line number `line` (from 1) of the text came from; never NULL. */
const struct config_line *config_text_place(const struct config_text *text, unsigned line);
