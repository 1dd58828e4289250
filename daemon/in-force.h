/*
 * The configuration in force, as a server leaves it to the next one: two sealed memories that the keeper keeps, the
 * settings and the exports (config-write.h).
 *
 * What is in them is worth the rights of who wrote it, which is the owner of the memory: a server that is an
 * ordinary user must not become root by them.
 */
#pragma once

#include <sys/types.h>

#include "daemon/config-write.h"

/* -1: none. */
struct in_force {
	int settings, exports;
};

/* A new descriptor, or an error. Plain code. */
int in_force_settings(const struct config *config, struct err *err);
int in_force_exports(const struct config_written_export *exports, size_t count, struct err *err);

/*
 * What they say; path: of the config file. -EPERM: an ordinary user wrote exports that are not for the user that
 * serves them. *owner, *group: who wrote the settings; (uid_t)-1: one with our rights.
 */
int in_force_load(const struct in_force *in_force, const char *path, struct config **config,
	uid_t *owner, gid_t *group, struct err *err);
/* Whether the exports may be served by the user that the config names. */
int in_force_check_owner(const struct in_force *in_force, uid_t user, struct err *err);
