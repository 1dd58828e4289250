/*
 * Memory that outlives every process of ours, as the device does that was attached by netlink: a file on tmpfs,
 * /run/blkstack/memory/nbdN. It ends with the device, or with the machine.
 *
 * What is in it counts for one device from its attach to its disconnect, so both call kernel_memory_forget();
 * whoever calls has the device's lock (kernel-lock.h).
 */
#pragma once

#include <stddef.h>

#include "base/err.h"

/*
 * *fd: what is there, or size_bytes of zeroes, all of them allocated. An error leaves nothing behind: -ENOSPC, or
 * -EOPNOTSUPP where /run is no memory.
 */
int kernel_memory_open(const char *name, size_t size_bytes, int *fd, struct err *err);

void kernel_memory_forget(const char *name);
