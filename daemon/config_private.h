/*
 * What config.c and config-listen.c share. Errors have the place of the value, named key within its group.
 */
#pragma once

#include "daemon/config.h"

/* "0660" */
int config_parse_mode(
	const struct conf *group, const char *key, const char *text, mode_t *mode, struct err *err);
/* A name or a number; text NULL: -1. */
int config_parse_user(
	const struct conf *group, const char *key, const char *text, uid_t *uid, struct err *err);
int config_parse_group(
	const struct conf *group, const char *key, const char *text, gid_t *gid, struct err *err);

/* The value of `listen`, with the defaults in config set; NULL: none. */
int config_take_listen(struct config *config, const struct conf *listen, struct err *err);
/* That no file is written by one layer and used by another. */
int config_check_files(struct config_export *const *exports, size_t export_count, struct err *err);

/* When the exports are known. */
int config_check_listen(const struct config *config, struct err *err);
