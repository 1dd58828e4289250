/*
 * Telling udev of a kernel NBD device, and waiting until it has done its part.
 */
#pragma once

#include "base/err.h"

/*
 * Sends a "change" event for the disk and each of its partitions, whose nodes must be there soon, and
 * waits until udev is done with all of them, where it runs. -ETIMEDOUT says what is missing. May block.
 */
int kernel_udev_announce(const char *name, struct err *err);
