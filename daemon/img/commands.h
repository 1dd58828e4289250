/*
 * The commands, each defined in the file of its name.
 */
#pragma once

#include "daemon/img/img.h"

extern const struct img_command img_create;
extern const struct img_command img_info;
extern const struct img_command img_check, img_repair; /* check.c */
extern const struct img_command img_snapshot;

/* info.c: the table of snapshots alone. */
suspends enum img_exit img_show_snapshots(struct img *img, const char *path);
