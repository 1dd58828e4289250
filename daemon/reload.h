/*
 * Changes of the whole while it runs: a new config, an export more, an export less.
 *
 * All on the main reactor. One change at a time (daemon_begin_change()); those of single exports, like a resize,
 * go on beside it, and are waited for where a step concerns their export.
 */
#pragma once

#include <jansson.h>

#include "base/err.h"
#include "rt/co.h"

struct daemon;

/*
 * Reads the config file again and does what lies between it and what runs: all of it, or nothing. An error of the
 * file is that of the start, -EBUSY a step that would take something from somebody (says what and from
 * whom). *steps is a new reference to what was done, or, with dry_run, to what there is to do, refusals
 * included; NULL after an error.
 */
suspends int reload(struct daemon *daemon, bool dry_run, json_t **steps, struct err *err);

/*
 * At a start, before clients are let in: from the exports as they were before a restart to those of the file, in
 * daemon->later. What is refused, and why, is logged, and everything goes on as it was.
 */
suspends void reload_exports_of_file(struct daemon *daemon);

/* Starts to find out whether the file says something else than what is in force, which is logged and noted. */
void reload_look_at_file(struct daemon *daemon);

/* Starts one and returns; what comes of it is told in the log. */
void reload_by_signal(struct daemon *daemon);

/*
 * One export more, until the daemon ends or it is removed: content as config_parse_export() takes it, source is what
 * places in errors are called by. *name is what it is called, the caller's.
 */
suspends int reload_add_export(struct daemon *daemon, const char *source, const char *content,
	char **name, struct err *err);

/* One less, as export_remove(). -ENOENT when there is none. The next reload brings back one that the file has. */
suspends int reload_remove_export(
	struct daemon *daemon, const char *name, bool force, struct err *err);
