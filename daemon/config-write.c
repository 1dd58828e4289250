/*
 * Values and whole configs as texts; see config-write.h.
 *
 * Canonical: no comments, nothing included, every value as it was read. With places, each value stands behind a
 * line `#@ NUMBER FILE` that says where it came from (config-text.c reads it), so that errors of the next server name
 * the line of the file that the value once had.
 */
#include "daemon/config-write.h"

#include <ctype.h>
#include <inttypes.h>
#include <string.h>

void config_write_text(const char *text, FILE *out)
{
	fputc('"', out);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fprintf(out, "\\%c", *text);
		else if ((unsigned char)*text < ' ')
			fprintf(out, "\\x%02x", (unsigned char)*text);
		else
			fputc(*text, out);
	}
	fputc('"', out);
}

/* where is "FILE:NUMBER", with what it is part of behind it. */
static void write_place(const char *where, FILE *out)
{
	const char *label = strstr(where, ": export ");
	size_t len = label ? (size_t)(label - where) : strlen(where);
	const char *colon = memrchr(where, ':', len);

	if (colon && isdigit((unsigned char)colon[1]) && !memchr(where, '\n', len))
		fprintf(out, "\n#@ %.*s %.*s\n", (int)(where + len - colon - 1), colon + 1,
			(int)(colon - where), where);
}

static void write_value(const struct conf *value, bool places, int depth, FILE *out)
{
	bool group = value->type == CONF_GROUP;

	switch (value->type) {
	case CONF_BOOL:
		fputs(value->boolean ? "true" : "false", out);
		return;
	case CONF_INT:
		fprintf(out, "%" PRId64, value->integer);
		return;
	case CONF_STRING:
		config_write_text(value->string, out);
		return;
	case CONF_LIST:
	case CONF_GROUP:
		break;
	}
	fputs(group ? "{" : "(", out);
	for (size_t i = 0; i < value->item_count; i++) {
		const struct conf *item = value->items[i];

		fputs(i && !group ? "," : "", out);
		if (places && item->where)
			write_place(item->where, out);
		if (group)
			fprintf(out, " %s = ", item->name);
		else if (!places)
			fprintf(out, "\n%*s", 2 * (depth + 1), "");
		write_value(item, places, depth + 1, out);
		fputs(group ? ";" : "", out);
	}
	fputs(group ? " }" : " )", out);
}

void config_write_value(const struct conf *value, FILE *out)
{
	write_value(value, false, 0, out);
}

void config_write_settings(const struct config *config, FILE *out)
{
	for (size_t i = 0; i < config->root->item_count; i++) {
		const struct conf *item = config->root->items[i];

		/* What has no place came from the service manager, and will again. */
		if (!item->where || conf_name_equal(item->name, "exports"))
			continue;
		write_place(item->where, out);
		fprintf(out, "%s = ", item->name);
		write_value(item, true, 0, out);
		fputs(";\n", out);
	}
}

void config_write_exports(const struct config_written_export *exports, size_t count, FILE *out)
{
	const char *comma = "";

	fputs("exports = (", out);
	for (size_t i = 0; i < count; i++) {
		fputs(i ? "," : "", out);
		if (exports[i].config->conf->where)
			write_place(exports[i].config->conf->where, out);
		write_value(exports[i].config->conf, true, 0, out);
	}
	fputs(");\n" CONFIG_BY_HAND " = (", out);
	for (size_t i = 0; i < count; i++) {
		if (!exports[i].by_hand)
			continue;
		fputs(comma, out);
		config_write_text(exports[i].config->name, out);
		comma = ", ";
	}
	fputs(");\n", out);
}
