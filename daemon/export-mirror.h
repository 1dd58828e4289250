/*
 * Mirrors of exports in use: starting, steering and ending them. All on the main reactor, like export.h; the
 * export is found by its mirror layer, whether the config has it or it came later.
 */
#pragma once

#include <jansson.h>

#include "daemon/export.h"

struct mirror_request {
	const char *to;         /* layers of the secondary, as in a config file */
	const char *intent_log; /* path; NULL: none */
	bool overwrite, paused;
	uint64_t rate; /* bytes/s, 0: no limit */
};

/* A mirror on top of the export's stack, copying when it returns. -EEXIST: there is one. */
suspends int export_mirror_start(
	struct export *export, const struct mirror_request *request, struct err *err);

/* The type Mirror of org.blkstack.varlink, a new reference; NULL with err filled when there is none. */
suspends json_t *export_mirror_status(struct export *export, struct err *err);

/* Returns after some progress, or a while. */
suspends void export_mirror_wait(struct export *export);

enum mirror_order { MIRROR_ORDER_PAUSE, MIRROR_ORDER_RESUME, MIRROR_ORDER_RATE };
/* rate: for the last one. */
suspends int export_mirror_order(
	struct export *export, enum mirror_order order, uint64_t rate, struct err *err);

/* The mirror layer leaves the stack; the primary goes on. */
suspends int export_mirror_cancel(struct export *export, struct err *err);

/* The secondary serves from now on. -EAGAIN: not in sync, unless force. keep: the old primary mirrors it. */
suspends int export_mirror_promote(struct export *export, bool force, bool keep, struct err *err);

/* Compares a part from *off on, and moves *off behind it. */
struct mirror_comparison;
suspends int export_mirror_compare(
	struct export *export, uint64_t *off, struct mirror_comparison *sum, struct err *err);
