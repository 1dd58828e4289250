/*
 * Configuration trees for tests, written as text:
 *
 *	conf_build("( { layer = 'padded'; align = '4K' }, { layer = 'memory'; size = %d } )", size)
 *
 * The syntax is that of config files, in little: lists in ( ) or [ ], groups in { }, texts in ' or ", numbers,
 * true and false; ; and , are the same and may be left out. Every value knows its place: "test.conf:LINE".
 * What cannot be parsed aborts.
 */
#pragma once

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/conf.h"

struct conf_text {
	const char *pos;
	int line;
};

static inline char conf_text_peek(struct conf_text *text)
{
	for (; *text->pos && strchr(" \t\n,;", *text->pos); text->pos++)
		text->line += *text->pos == '\n';
	return *text->pos;
}

static inline void conf_text_error(const struct conf_text *text, const char *what)
{
	fprintf(stderr, "conf_build: line %d: %s is missing before: %s\n", text->line, what,
		text->pos);
	abort();
}

/* A name or a number: letters, digits, '-' and '_'. */
static inline char *conf_text_word(struct conf_text *text)
{
	const char *start = text->pos;

	while (isalnum((unsigned char)*text->pos) || *text->pos == '-' || *text->pos == '_')
		text->pos++;
	if (text->pos == start)
		conf_text_error(text, "a word");
	return strndup(start, (size_t)(text->pos - start));
}

static inline struct conf *conf_text_value(struct conf_text *text, const char *name);

static inline struct conf *conf_text_items(
	struct conf_text *text, enum conf_type type, const char *name, const char *where, char end)
{
	struct conf *conf = conf_new(type, name, where);

	text->pos++;
	while (conf_text_peek(text) != end) {
		char *item_name = type == CONF_GROUP ? conf_text_word(text) : NULL;

		if (type == CONF_GROUP && conf_text_peek(text) != '=')
			conf_text_error(text, "=");
		text->pos += type == CONF_GROUP;
		conf_add(conf, conf_text_value(text, item_name));
		free(item_name);
	}
	text->pos++;
	return conf;
}

static inline struct conf *conf_text_string(
	struct conf_text *text, const char *name, const char *where)
{
	const char *start = text->pos + 1, *end = strchr(start, *text->pos);

	if (!end)
		conf_text_error(text, "the closing quote");

	char *string = strndup(start, (size_t)(end - start));
	struct conf *conf = conf_new_string(name, where, string);

	free(string);
	text->pos = end + 1;
	return conf;
}

static inline struct conf *conf_text_value(struct conf_text *text, const char *name)
{
	char start = conf_text_peek(text), where[32];

	snprintf(where, sizeof(where), "test.conf:%d", text->line);
	if (start == '(' || start == '[')
		return conf_text_items(text, CONF_LIST, name, where, start == '(' ? ')' : ']');
	if (start == '{')
		return conf_text_items(text, CONF_GROUP, name, where, '}');
	if (start == '\'' || start == '"')
		return conf_text_string(text, name, where);

	char *word = conf_text_word(text);
	struct conf *conf = !strcmp(word, "true") || !strcmp(word, "false")
				    ? conf_new_bool(name, where, *word == 't')
				    : conf_new_int(name, where, strtoll(word, NULL, 0));

	free(word);
	return conf;
}

/* The caller frees it. */
static inline struct conf *conf_vbuild(const char *fmt, va_list ap)
{
	char *text;

	if (vasprintf(&text, fmt, ap) < 0)
		abort();

	struct conf_text rest = { .pos = text, .line = 1 };
	struct conf *conf = conf_text_value(&rest, NULL);

	if (conf_text_peek(&rest))
		conf_text_error(&rest, "the end");
	free(text);
	return conf;
}

__attribute__((format(printf, 1, 2))) static inline struct conf *conf_build(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	struct conf *conf = conf_vbuild(fmt, ap);
	va_end(ap);
	return conf;
}
