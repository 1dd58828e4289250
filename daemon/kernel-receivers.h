/*
 * Whether the driver receives on each of the connections that it was just given. It may not, for good: see
 * kernel-receivers.c.
 */
#pragma once

#include <stdbool.h>

/* device: "nbd0". False: not all have begun in good time. True as well where that cannot be told, and of a single one. */
bool kernel_receivers_run(const char *device, unsigned connections);
