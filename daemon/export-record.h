/*
 * What an export remembers of changes of its stack beyond its own life; the files are record.h's.
 */
#pragma once

#include "daemon/export.h"

/* At the start: finds the record, if it holds; export_stack() follows it. -EINVAL: it contradicts the config. */
suspends int export_recall(struct export *export, struct err *err);

/* What the export is made of: what the config says, or the record. */
const struct conf *export_stack(const struct export *export);

/* Any reactor. Durable when it returns: the export is `stack` now. Not told to `export` yet. */
suspends int export_remember(
	struct export *export, const char *reason, const struct conf *stack, struct err *err);
/* Main reactor, after that: for status. */
suspends void export_remembered(struct export *export);

/* The config changed: perhaps it names now what the record does. */
suspends void export_review_record(struct export *export);

/* The next start follows the config again. -ENOENT: it would anyhow. */
suspends int export_forget(struct export *export, struct err *err);

/* The type Record of org.blkstack.varlink, a new reference; NULL when there is none. */
json_t *export_record_status(const struct export *export);
