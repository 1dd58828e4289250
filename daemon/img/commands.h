/*
 * The commands, each defined in the file of its name.
 */
#pragma once

#include "daemon/img/img.h"

extern const struct img_command img_create;
extern const struct img_command img_info;
extern const struct img_command img_check, img_repair; /* check.c */
extern const struct img_command img_snapshot;
extern const struct img_command img_convert;
extern const struct img_command img_compact;
extern const struct img_command img_dehydrate, img_rehydrate;      /* dehydrate.c */
extern const struct img_command img_compare, img_digest;           /* compare.c */
extern const struct img_command img_map, img_resize, img_sparsify; /* map.c */

/* create.c: the options that convert has too. False with img->err filled. */
struct qcow_create_options;
bool img_create_values(struct img *img, struct qcow_create_options *create);

/* info.c: the table of snapshots alone. */
suspends enum img_exit img_show_snapshots(struct img *img, const char *path);
