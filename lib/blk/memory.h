/*
 * The named disks of the memory layer: they outlive the layers that use them.
 */
#pragma once

#include "base/err.h"

struct blk_env;
struct memory_disks;

/* For blk_env: the registry. NULL when memory is exhausted. Freed when no layer uses it any more. */
struct memory_disks *memory_disks_create(void);
void memory_disks_free(struct memory_disks *disks); /* with all content; NULL is fine */

/*
 * Destroys the disk and its content. -ENOENT: there is none of that name; -EBUSY: a layer uses it.
 * Any thread.
 */
int memory_forget(struct blk_env *env, const char *name, struct err *err);
