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
 * Whether a server that starts now finds a file that it can start with, and takes nothing from anybody by it: an
 * error as reload(), as far as it can be found out without a change. Within daemon_begin_change(). What only
 * root may read or bind is not looked at by a server that is not root: its successor begins as root.
 */
suspends int reload_check(struct daemon *daemon, struct err *err);

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
