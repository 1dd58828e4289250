/*
 * A tree of configuration values, each knowing where it stands, and tables of the options that are
 * expected in it.
 *
 * The library does not know the syntax of config files: daemon/config.c turns libconfig's tree into this
 * one, the tools and tests build it by hand. A group has named items, a list has unnamed ones.
 * In names, '-' and '_' are the same.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum conf_type { CONF_BOOL, CONF_INT, CONF_STRING, CONF_LIST, CONF_GROUP };

struct conf {
	enum conf_type type;
	char *name;  /* in a group; else NULL */
	char *where; /* "blkstack.conf:41", or NULL when made by hand */
	bool boolean;
	int64_t integer;
	char *string;
	struct conf **items; /* of a list or group, owned */
	size_t item_count;
};

/* Texts are copied; where and name may be NULL. Never return NULL (abort when memory is exhausted). */
struct conf *conf_new(enum conf_type type, const char *name, const char *where);
struct conf *conf_new_string(const char *name, const char *where, const char *string);
struct conf *conf_new_int(const char *name, const char *where, int64_t integer);
struct conf *conf_new_bool(const char *name, const char *where, bool boolean);
struct conf *conf_copy(const struct conf *conf); /* with all below */
void conf_free(struct conf *conf);               /* with all below; NULL is fine */

struct conf *conf_add(struct conf *parent,
	struct conf *item); /* item is owned by parent from now; returns item */
struct conf *conf_take_first(struct conf *parent); /* the caller's from now; NULL when empty */
const struct conf *conf_get(const struct conf *group, const char *name); /* NULL when absent */
bool conf_name_equal(const char *a, const char *b);
bool conf_equal(
	const struct conf *a, const struct conf *b); /* same values; where does not matter */

/* Fills err with the message and, as its place, where conf stands; returns -EINVAL. */
int conf_error(const struct conf *conf, struct err *err, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

/* --- options ---------------------------------------------------------------------------------- */

enum opt_type {
	OPT_BOOL,   /* bool */
	OPT_INT,    /* int64_t, within min..max */
	OPT_SIZE,   /* uint64_t bytes; an integer or "10G"; within min..max */
	OPT_STRING, /* const char *, points into the conf tree; not empty */
	OPT_ENUM,   /* int: the index in choices */
	OPT_STRINGS, /* const struct conf *: a list of strings, or one alone; see conf_strings_get() */
	OPT_LIST,    /* const struct conf *: a list of groups (a stack, the exports) */
	OPT_MIXED, /* const struct conf *: a list of strings and groups, or one alone */
};

/* What an OPT_STRINGS field holds, item by item; NULL (not given) has no items. */
size_t conf_strings_count(const struct conf *strings);
const char *conf_strings_get(const struct conf *strings, size_t index);

/* One row of an options table; a table ends with a row without a name. */
struct opt {
	const char *name;
	enum opt_type type;
	size_t field;         /* offsetof() in the struct that receives the value */
	const char *fallback; /* the default, as text; NULL: zero, or see required */
	bool required;
	int64_t min, max;           /* for OPT_INT and OPT_SIZE; max 0: no upper bound */
	bool pow2;                  /* for OPT_SIZE: a power of two */
	const char *const *choices; /* for OPT_ENUM, ended by NULL */
	const char *help;
};

/*
 * Sets every field that the table names, from group or from the fallback (without one: zero, false,
 * NULL, the first choice). Errors, each with its place: unknown name (with the nearest known one),
 * wrong type, out of range, missing, given twice.
 * The strings and lists point into group's items, which must live as long as they are used.
 */
int opts_parse(const struct opt *table, const struct conf *group, void *fields, struct err *err);
