/*
 * Whether the driver receives on each connection of a new device. It may not, for good: see kernel-receivers.c.
 */
#pragma once

#include <stdbool.h>

/* device: "nbd0". False: within wait_ms not all have begun. True as well where that cannot be told. */
bool kernel_receivers_run(const char *device, unsigned connections, unsigned wait_ms);
