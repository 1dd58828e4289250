/*
 * One kernel NBD device, driven by ioctl. Nothing in here needs a reactor, and everything may block:
 * call it on threads that serve nobody, so that the device's own requests can be answered meanwhile.
 *
 *	kernel_dev_claim()	takes a free device; its requests come in on the socket handed out
 *	kernel_dev_settle()	once they are served: queue tuned, partitions read, nodes in /dev
 *	kernel_dev_resize()
 *	kernel_dev_release()	flush, refuse while in use, disconnect
 *	kernel_dev_free()	whatever the state
 *
 * The driver ends the device when the process that attached it dies; see tests/kernel/ for what
 * users of the device see then.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "daemon/kernel-sysfs.h"

struct kernel_dev;

struct kernel_dev_opts {
	const char *device;  /* "/dev/nbd0", or "auto" for the first one that is free */
	uint64_t size_bytes; /* a multiple of block_size */
	uint32_t block_size; /* logical block size: 512 to 4096, a power of two */
	uint32_t timeout_s;  /* a request older than that fails the device; 0: never */
	uint16_t flags;      /* NBD transmission flags; those that the driver can use count */
};

/*
 * On success *server_fd is the connected socket on which the driver sends requests (transmission phase,
 * no handshake); the caller's to serve and to close. on_end comes once, from another thread, when
 * the driver gives the device up for whatever reason, kernel_dev_release() included; reason is 0
 * (asked to) or an errno.
 *
 * Errors: -ENODEV no driver or no such device, -EBUSY in use (says by whom) or none free, -EPERM,
 * -EINVAL for options out of range.
 */
int kernel_dev_claim(const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason),
	void *arg, struct kernel_dev **dev, int *server_fd, struct err *err);

/* The device works already; an error says which of the comforts is missing. */
int kernel_dev_settle(struct kernel_dev *dev, struct err *err);

/* Waits for requests in flight on some kernels: they must be served meanwhile. Mounted file systems see it. */
int kernel_dev_resize(struct kernel_dev *dev, uint64_t size_bytes, struct err *err);

/*
 * Writes the device's cache back, then disconnects. Refused with -EBUSY and the names of the users while
 * mounted, held or open, unless force. The server must answer NBD_CMD_DISC by closing its socket.
 * -EIO when the cache could not be written (not disconnected then, unless force).
 */
int kernel_dev_release(struct kernel_dev *dev, bool force, struct err *err);

/* Disconnects if need be (without a flush), waits for the driver, frees. NULL is fine. */
void kernel_dev_free(struct kernel_dev *dev);

const char *kernel_dev_name(const struct kernel_dev *dev); /* "nbd0" */
