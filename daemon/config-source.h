/*
 * Where the daemon's config comes from, at the start and at every reload.
 */
#pragma once

#include "daemon/config.h"

/* What the command line says. Texts live as long as the program. */
struct config_source {
	const char *path;
	const char *engine, *log_level; /* instead of what the file says; NULL: nothing */
};

/*
 * The file, with what was said in its place, and with sockets that the service manager passed as its listen and
 * control when it has none. Also makes room for as many descriptors as it takes. Plain code, may block on
 * files and look-ups of names. Errors as config_load().
 */
int config_source_load(const struct config_source *source, struct config **config, struct err *err);
