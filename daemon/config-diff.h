/*
 * What lies between what runs and what a config file says now: a list of steps, in the order they are carried out.
 *
 * Plain data about plain data: nothing is looked at but the two configs and what the caller tells of the
 * exports that run. Whether a step is possible (nobody uses what is to go) is for the caller to find out.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

#include "base/err.h"
#include "daemon/config.h"

enum config_action {
	CONFIG_REMOVE,     /* an export or a listener */
	CONFIG_REOPEN,     /* an export: its stack is closed, and another one opened */
	CONFIG_DETACH,     /* an export from its kernel device */
	CONFIG_REATTACH,   /* an export: to another device, or with other properties */
	CONFIG_CHANGE,     /* whatever changes while it is used */
	CONFIG_ADD,        /* an export or a listener */
	CONFIG_ATTACH,     /* an export to a kernel device */
	CONFIG_NEXT_START, /* a setting that takes effect then */
};

enum config_subject { CONFIG_EXPORT, CONFIG_LISTENER, CONFIG_SETTING };

struct config_step {
	enum config_action action;
	enum config_subject subject;
	char *name;   /* of the export or setting, address of the listener; owned */
	char *detail; /* what changes: "description, allow"; owned, may be NULL */
	struct config_export *from, *to; /* of exports; references. NULL where there is none */
	bool by_hand;                    /* `from` came by hand */
	struct err refusal;              /* the caller's to fill; code 0: the step is possible */
};

struct config_diff {
	struct config_step *steps;
	size_t step_count;
};

/* An export as it runs. */
struct config_running {
	struct config_export *config;
	struct conf *stack; /* what it is made of now */
	const char *device; /* the kernel device that is attached, or NULL */
	bool by_hand;       /* goes on when the file has no export of its name */
};

/* now: the config in force. The lists are of all that runs; diff is to be ended by config_diff_fini(). */
void config_diff_make(struct config_diff *diff, const struct config *now,
	const struct config_running *running, size_t running_count, const struct config *next);
void config_diff_fini(struct config_diff *diff);

/* "change export db: description, allow". */
void config_step_text(const struct config_step *step, char *text, size_t text_bytes);

/* The type Step of org.blkstack.varlink, all of them; a new reference. */
json_t *config_diff_json(const struct config_diff *diff);
