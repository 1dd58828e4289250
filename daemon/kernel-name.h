/*
 * Stable names of kernel devices: /dev/blkstack/NAME, made by udev (systemd/99-blkstack.rules) from what is
 * written here. All of it may block.
 */
#pragma once

#include "base/err.h"

/* Before the device is announced by a "change" event; name: of the kernel's device, "nbd0". */
int kernel_name_publish(const char *name, const char *export_name, struct err *err);
/* The device is an export's no more; tells udev. Harmless when nothing was published. */
void kernel_name_forget(const char *name);
