/*
 * Configuration trees and option tables; see conf.h.
 *
 * The second half parses: every item of a group is looked up in the table (so that nothing is silently
 * ignored), then every row of the table is filled from its item or its fallback. A row's value is
 * stored by its type through `field`, an offset in the receiver's struct.
 *
 * Running out of memory here aborts: configurations are small and read at start or on a command.
 */
#include "base/conf.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/nearest.h"
#include "base/units.h"
#include "base/util.h"

static void *must(void *memory)
{
	if (!memory)
		abort();
	return memory;
}

static char *copy_text(const char *text)
{
	return text ? must(strdup(text)) : NULL;
}

struct conf *conf_new(enum conf_type type, const char *name, const char *where)
{
	struct conf *conf = must(calloc(1, sizeof(*conf)));

	conf->type = type;
	conf->name = copy_text(name);
	conf->where = copy_text(where);
	return conf;
}

struct conf *conf_new_string(const char *name, const char *where, const char *string)
{
	struct conf *conf = conf_new(CONF_STRING, name, where);

	conf->string = copy_text(string);
	return conf;
}

struct conf *conf_new_int(const char *name, const char *where, int64_t integer)
{
	struct conf *conf = conf_new(CONF_INT, name, where);

	conf->integer = integer;
	return conf;
}

struct conf *conf_new_bool(const char *name, const char *where, bool boolean)
{
	struct conf *conf = conf_new(CONF_BOOL, name, where);

	conf->boolean = boolean;
	return conf;
}

struct conf *conf_copy(const struct conf *conf)
{
	struct conf *copy = conf_new(conf->type, conf->name, conf->where);

	copy->boolean = conf->boolean;
	copy->integer = conf->integer;
	copy->string = copy_text(conf->string);
	for (size_t i = 0; i < conf->item_count; i++)
		conf_add(copy, conf_copy(conf->items[i]));
	return copy;
}

void conf_free(struct conf *conf)
{
	if (!conf)
		return;
	for (size_t i = 0; i < conf->item_count; i++)
		conf_free(conf->items[i]);
	free(conf->items);
	free(conf->string);
	free(conf->where);
	free(conf->name);
	free(conf);
}

struct conf *conf_add(struct conf *parent, struct conf *item)
{
	assert(parent->type == CONF_LIST || (parent->type == CONF_GROUP && item->name));
	parent->items = must(
		reallocarray(parent->items, parent->item_count + 1, sizeof(*parent->items)));
	parent->items[parent->item_count++] = item;
	return item;
}

struct conf *conf_take_first(struct conf *parent)
{
	struct conf *first;

	if (!parent->item_count)
		return NULL;
	first = parent->items[0];
	memmove(parent->items, parent->items + 1, --parent->item_count * sizeof(*parent->items));
	return first;
}

bool conf_name_equal(const char *a, const char *b)
{
	for (; *a && *b; a++, b++)
		if ((*a == '_' ? '-' : *a) != (*b == '_' ? '-' : *b))
			return false;
	return *a == *b;
}

const struct conf *conf_get(const struct conf *group, const char *name)
{
	if (group->type == CONF_GROUP)
		for (size_t i = 0; i < group->item_count; i++)
			if (conf_name_equal(group->items[i]->name, name))
				return group->items[i];
	return NULL;
}

static bool items_equal(const struct conf *a, const struct conf *b)
{
	if (a->item_count != b->item_count)
		return false;
	for (size_t i = 0; i < a->item_count; i++) {
		const struct conf *other = a->type == CONF_GROUP ? conf_get(b, a->items[i]->name)
								 : b->items[i];
		if (!other || !conf_equal(a->items[i], other))
			return false;
	}
	return true;
}

bool conf_equal(const struct conf *a, const struct conf *b)
{
	if (a->type != b->type)
		return false;
	switch (a->type) {
	case CONF_BOOL:
		return a->boolean == b->boolean;
	case CONF_INT:
		return a->integer == b->integer;
	case CONF_STRING:
		return !strcmp(a->string, b->string);
	case CONF_LIST:
	case CONF_GROUP:
		return items_equal(a, b);
	}
	abort();
}

int conf_error(const struct conf *conf, struct err *err, const char *fmt, ...)
{
	if (err) {
		char text[sizeof(err->text)];
		va_list ap;

		va_start(ap, fmt);
		vsnprintf(text, sizeof(text), fmt, ap);
		va_end(ap);
		err_set(err, EINVAL, "%s", text);
		err_place(err, conf->where);
	}
	return -EINVAL;
}

size_t conf_strings_count(const struct conf *strings)
{
	if (!strings)
		return 0;
	return strings->type == CONF_STRING ? 1 : strings->item_count;
}

const char *conf_strings_get(const struct conf *strings, size_t index)
{
	assert(index < conf_strings_count(strings));
	return strings->type == CONF_STRING ? strings->string : strings->items[index]->string;
}

/* --- options ---------------------------------------------------------------------------------- */

static const char *const opt_type_texts[] = {
	[OPT_BOOL] = "true or false",
	[OPT_INT] = "a number",
	[OPT_SIZE] = "a size such as 512, \"64K\" or \"10G\"",
	[OPT_STRING] = "a text in quotes",
	[OPT_ENUM] = "a text in quotes",
	[OPT_STRINGS] = "a list of texts in quotes",
	[OPT_LIST] = "a list of groups: ( { ... }, { ... } )",
	[OPT_MIXED] = "a list of texts and groups: ( \"...\", { ... } )",
};

static int wrong_type(const struct opt *opt, const struct conf *item, struct err *err)
{
	return conf_error(item, err, "\"%s\" must be %s", opt->name, opt_type_texts[opt->type]);
}

static int check_number(
	const struct opt *opt, const struct conf *item, int64_t number, struct err *err)
{
	if (number >= opt->min && (number <= opt->max || !opt->max))
		return 0;
	if (!opt->max)
		return conf_error(item, err,
			"\"%s\" is %" PRId64 ", at least %" PRId64 " is needed", opt->name, number,
			opt->min);
	return conf_error(item, err, "\"%s\" is %" PRId64 ", allowed are %" PRId64 " to %" PRId64,
		opt->name, number, opt->min, opt->max);
}

static int check_size(
	const struct opt *opt, const struct conf *item, uint64_t size, struct err *err)
{
	uint64_t min = (uint64_t)opt->min;
	uint64_t max = opt->max ? (uint64_t)opt->max : UINT64_MAX;
	char size_text[UNITS_SIZE_TEXT_LEN], min_text[UNITS_SIZE_TEXT_LEN];
	char max_text[UNITS_SIZE_TEXT_LEN];

	units_format_size(size, size_text);
	if (size < min && !opt->max)
		return conf_error(item, err, "\"%s\" is %s, at least %s is needed", opt->name,
			size_text, units_format_size(min, min_text));
	if (size < min || size > max)
		return conf_error(item, err, "\"%s\" is %s, allowed are %s to %s", opt->name,
			size_text, units_format_size(min, min_text),
			units_format_size(max, max_text));
	if (opt->pow2 && !is_pow2(size))
		return conf_error(
			item, err, "\"%s\" is %s, it must be a power of two", opt->name, size_text);
	return 0;
}

static int parse_size(
	const struct opt *opt, const struct conf *item, uint64_t *size, struct err *err)
{
	struct err why;

	if (item->type == CONF_INT && item->integer >= 0) {
		*size = (uint64_t)item->integer;
	} else if (item->type == CONF_STRING) {
		if (units_parse_size(item->string, size, &why) < 0)
			return conf_error(item, err, "\"%s\": %s", opt->name, why.text);
	} else {
		return wrong_type(opt, item, err);
	}
	return check_size(opt, item, *size, err);
}

static int parse_enum(const struct opt *opt, const struct conf *item, int *index, struct err *err)
{
	char known[256] = "";
	size_t len = 0;

	for (int i = 0; opt->choices[i]; i++) {
		if (conf_name_equal(opt->choices[i], item->string)) {
			*index = i;
			return 0;
		}
		if (len < sizeof(known))
			len += (size_t)snprintf(known + len, sizeof(known) - len, "%s\"%s\"",
				i ? ", " : "", opt->choices[i]);
	}
	return conf_error(
		item, err, "\"%s\" is \"%s\", must be one of %s", opt->name, item->string, known);
}

static int check_items(
	const struct opt *opt, const struct conf *list, enum conf_type type, struct err *err)
{
	for (size_t i = 0; i < list->item_count; i++)
		if (list->items[i]->type != type)
			return wrong_type(opt, list->items[i], err);
	return 0;
}

static bool is_text_or_group(const struct conf *item)
{
	return item->type == CONF_STRING || item->type == CONF_GROUP;
}

static int parse_mixed(
	const struct opt *opt, const struct conf *item, const struct conf **field, struct err *err)
{
	*field = item;
	if (is_text_or_group(item))
		return 0;
	if (item->type != CONF_LIST)
		return wrong_type(opt, item, err);
	for (size_t i = 0; i < item->item_count; i++)
		if (!is_text_or_group(item->items[i]))
			return wrong_type(opt, item->items[i], err);
	return 0;
}

/* Checks item against its row and stores it; each case ends with the type that conf.h names. */
static int parse_item(const struct opt *opt, const struct conf *item, void *field, struct err *err)
{
	static const enum conf_type expected[] = { [OPT_BOOL] = CONF_BOOL,
		[OPT_INT] = CONF_INT,
		[OPT_STRING] = CONF_STRING,
		[OPT_ENUM] = CONF_STRING,
		[OPT_STRINGS] = CONF_LIST,
		[OPT_LIST] = CONF_LIST };

	if (opt->type == OPT_SIZE)
		return parse_size(opt, item, field, err);
	if (opt->type == OPT_MIXED)
		return parse_mixed(opt, item, field, err);
	if (opt->type == OPT_STRINGS && item->type == CONF_STRING) {
		*(const struct conf **)field = item;
		return 0;
	}
	if (item->type != expected[opt->type])
		return wrong_type(opt, item, err);

	switch (opt->type) {
	case OPT_BOOL:
		*(bool *)field = item->boolean;
		return 0;
	case OPT_INT:
		*(int64_t *)field = item->integer;
		return check_number(opt, item, item->integer, err);
	case OPT_STRING:
		*(const char **)field = item->string;
		return *item->string ? 0 : conf_error(item, err, "\"%s\" is empty", opt->name);
	case OPT_ENUM:
		return parse_enum(opt, item, field, err);
	case OPT_STRINGS:
	case OPT_LIST:
		*(const struct conf **)field = item;
		return check_items(
			opt, item, opt->type == OPT_LIST ? CONF_GROUP : CONF_STRING, err);
	case OPT_SIZE:
	case OPT_MIXED:
		break;
	}
	abort();
}

/* Stores the default. Tables are part of the program: a default that does not fit is a bug in it. */
static void store_fallback(const struct opt *opt, void *field)
{
	static const size_t sizes[] = { [OPT_BOOL] = sizeof(bool),
		[OPT_INT] = sizeof(int64_t),
		[OPT_SIZE] = sizeof(uint64_t),
		[OPT_STRING] = sizeof(char *),
		[OPT_ENUM] = sizeof(int),
		[OPT_STRINGS] = sizeof(struct conf *),
		[OPT_LIST] = sizeof(struct conf *),
		[OPT_MIXED] = sizeof(struct conf *) };
	struct conf text = { .type = CONF_STRING, .string = (char *)opt->fallback };
	int ret = 0;

	memset(field, 0, sizes[opt->type]);
	if (!opt->fallback)
		return;
	switch (opt->type) {
	case OPT_BOOL:
		*(bool *)field = !strcmp(opt->fallback, "true");
		break;
	case OPT_INT:
		*(int64_t *)field = strtoll(opt->fallback, NULL, 10);
		break;
	case OPT_STRING:
		*(const char **)field = opt->fallback;
		break;
	case OPT_SIZE:
	case OPT_ENUM:
		ret = parse_item(opt, &text, field, NULL);
		break;
	case OPT_STRINGS:
	case OPT_LIST:
	case OPT_MIXED:
		ret = -EINVAL;
	}
	if (ret < 0)
		abort();
}

static const struct opt *opt_find(const struct opt *table, const char *name)
{
	for (const struct opt *opt = table; opt && opt->name; opt++)
		if (conf_name_equal(opt->name, name))
			return opt;
	return NULL;
}

static int unknown_name(const struct opt *table, const struct conf *item, struct err *err)
{
	struct nearest nearest;
	char known[256] = "";
	size_t len = 0;

	nearest_init(&nearest, item->name);
	for (const struct opt *opt = table; opt && opt->name; opt++) {
		nearest_offer(&nearest, opt->name);
		if (len < sizeof(known))
			len += (size_t)snprintf(known + len, sizeof(known) - len, "%s%s",
				opt == table ? "" : ", ", opt->name);
	}
	if (nearest.best)
		return conf_error(item, err, "unknown option \"%s\"; did you mean \"%s\"?",
			item->name, nearest.best);
	if (!len)
		return conf_error(
			item, err, "unknown option \"%s\"; there are no options here", item->name);
	return conf_error(item, err, "unknown option \"%s\"; known are: %s", item->name, known);
}

static int check_names(const struct opt *table, const struct conf *group, struct err *err)
{
	for (size_t i = 0; i < group->item_count; i++) {
		const struct conf *item = group->items[i];
		const struct conf *first = conf_get(group, item->name);

		if (!opt_find(table, item->name))
			return unknown_name(table, item, err);
		if (first != item)
			return conf_error(item, err, "\"%s\" is given twice%s%s", item->name,
				first->where ? ", before at " : "",
				first->where ? first->where : "");
	}
	return 0;
}

int opts_parse(const struct opt *table, const struct conf *group, void *fields, struct err *err)
{
	if (group->type != CONF_GROUP)
		return conf_error(group, err, "must be a group of options: { ... }");

	int ret = check_names(table, group, err);

	for (const struct opt *opt = table; opt && opt->name && !ret; opt++) {
		const struct conf *item = conf_get(group, opt->name);
		void *field = (char *)fields + opt->field;

		if (item)
			ret = parse_item(opt, item, field, err);
		else if (opt->required)
			ret = conf_error(group, err, "option \"%s\" is missing", opt->name);
		else
			store_fallback(opt, field);
	}
	return ret;
}
