/*
 * Where the daemon's config comes from, at the start and at every reload.
 */
#pragma once

#include "daemon/config.h"
#include "daemon/in-force.h"

/* What the command line says. Texts live as long as the program. */
struct config_source {
	const char *path;
	const char *engine, *log_level; /* instead of what the file says; NULL: nothing */
	/* From the keeper: what the server before had in force, before a restart of the service or in this one. */
	struct in_force in_force;
	bool restarted;
};

/*
 * The file, with what was said in its place, and with sockets that the service manager passed as its listen and
 * control when it has none. Also makes room for as many descriptors as it takes. Plain code, may block on
 * files and look-ups of names. Errors as config_load().
 */
int config_source_load(const struct config_source *source, struct config **config, struct err *err);

/* What to start with. */
struct config_start {
	struct config *config;
	struct config
		*later; /* not NULL: its exports, of the file, are to be applied as by a reload */
	bool inherited; /* config is what a server before this one had */
	bool unknown;   /* there was one, and what it had cannot be read */
	uid_t owner;    /* whose rights the settings are worth; (uid_t)-1: ours */
	gid_t group;
};

/*
 * A server that replaces a dead one goes on with what that one had, whatever is in the file now. After a restart the file's
 * settings hold, but exports go on as they were first, and the file is applied to them as by a reload: so no device
 * that is in use gets another disk. A restart over a file with an error goes on with what was. Errors as above.
 */
int config_source_start(
	const struct config_source *source, struct config_start *start, struct err *err);
void config_start_free(struct config_start *start);
