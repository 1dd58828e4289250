/*
 * What sysfs and /dev say of the kernel's NBD devices. All of it may block; none of it needs a reactor.
 *
 * A device is named as the kernel names it: "nbd0", not "/dev/nbd0".
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"

#define KERNEL_NAME_LEN 32 /* with the final NUL: "nbd" and a number, or a partition of it */

/* 0, or -ENODEV with what to do about it: driver not loaded, or not there at all. */
int kernel_sysfs_probe(struct err *err);

/* The numbers of all NBD devices, ascending; the caller frees *indices. */
int kernel_sysfs_list(unsigned **indices, size_t *count, struct err *err);

/* The content of /sys/block/NAME/ATTR without the newline; -errno (-ENOENT: no such attribute). */
int kernel_sysfs_read(const char *name, const char *attr, char *text, size_t text_len_bytes);
int kernel_sysfs_write(const char *name, const char *attr, const char *text);
/* The number in an attribute; false when it is not there or no number. */
bool kernel_sysfs_number(const char *name, const char *attr, uint64_t *number);

/* Nothing is under way on the device. */
bool kernel_sysfs_is_idle(const char *name);

/* The process that serves (or served) the device; 0: the device is not connected. */
pid_t kernel_sysfs_server(const char *name);

/* Calls fn for each partition ("nbd0p1"); stops when fn returns other than 0, and returns that. */
int kernel_sysfs_partitions(
	const char *name, int (*fn)(const char *partition, void *arg), void *arg);

/* True when the block device number is NAME or a partition of it. */
bool kernel_sysfs_owns(const char *name, dev_t rdev);
