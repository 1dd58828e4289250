/*
 * One kernel NBD device, driven by ioctl. Nothing in here needs a reactor, and everything may block:
 * call it on threads that serve nobody, so that the device's own requests can be answered meanwhile.
 *
 *	kernel_dev_claim()	takes a free device; its requests come in on the sockets handed out
 *	kernel_dev_settle()	once they are served: queue tuned, partitions read, nodes in /dev
 *	kernel_dev_resize()
 *	kernel_dev_reconnect()	other sockets, the same device
 *	kernel_dev_release()	flush, refuse while in use, disconnect
 *	kernel_dev_free()	whatever the state
 *
 * The driver ends the device when the process that attached it dies; see tests/kernel/ for what
 * users of the device see then.
 */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "daemon/kernel-sysfs.h"

struct kernel_dev;

/* And the name of the export: the attribute `backend` of our devices by netlink. */
#define KERNEL_DEV_IDENTIFIER "blkstack:"

#define KERNEL_CONNECTIONS_MAX 16

enum kernel_dev_mode { KERNEL_DEV_AUTO, KERNEL_DEV_IOCTL, KERNEL_DEV_NETLINK };

struct kernel_dev_opts {
	const char *device; /* "/dev/nbd0", or "auto" for the first one that is free */
	const char *export; /* whose it is; by netlink we know it again by that */
	enum kernel_dev_mode mode;
	uint64_t size_bytes;  /* a multiple of block_size */
	uint32_t block_size;  /* logical block size: 512 to 4096, a power of two */
	unsigned connections; /* 1 to KERNEL_CONNECTIONS_MAX */
	uint32_t timeout_s;   /* a request older than that fails its connection; 0: never, or as
				      good as never where several connections need one */
	uint32_t
		dead_timeout_s; /* netlink: how long requests wait for kernel_dev_reconnect(), or for
				      the next process to claim the device */
	uint16_t flags;         /* NBD transmission flags; those that the driver can use count */
};

#define KERNEL_DEV_RELEASED ECANCELED /* which the driver has no use for */

/* Both ends of each connection. */
struct kernel_ends {
	unsigned count;
	int server
		[KERNEL_CONNECTIONS_MAX]; /* the driver sends requests: transmission phase, no handshake */
	int driver
		[KERNEL_CONNECTIONS_MAX]; /* duplicates of the driver's own, to look at, not to read */
};

/*
 * On success the ends are the caller's to serve and to close. on_end comes once, from another thread,
 * when the driver gives the device up for whatever reason; reason is 0 (somebody asked it to), KERNEL_DEV_RELEASED
 * (kernel_dev_release() did) or an errno.
 *
 * Errors: -ENODEV no driver or no such device, -EBUSY in use (says by whom) or none free, -EPERM,
 * -EINVAL for options out of range.
 */
int kernel_dev_claim(const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason),
	void *arg, struct kernel_dev **dev, struct kernel_ends *ends, struct err *err);

/*
 * A device that another process attached by netlink, and whose ends were kept: it goes on as it is, and is settled
 * already. The ends stay the caller's, as after a claim. -ENODEV: the driver does not have it for that export.
 */
int kernel_dev_adopt(const struct kernel_dev_opts *opts, const char *name,
	const struct kernel_ends *ends, void (*on_end)(void *arg, int reason), void *arg,
	struct kernel_dev **dev, struct err *err);

/*
 * One that was attached by netlink for that export, and whose keeper is gone: to be claimed by its name. Asks sysfs
 * only, so that one which was disconnected, but is still open somewhere, is found as well; the claim sees the difference.
 */
bool kernel_dev_find_left(const char *export, char name[KERNEL_NAME_LEN]);

/* Closes those that are left: entries of -1 were taken. */
void kernel_ends_close(struct kernel_ends *ends);

/*
 * Netlink only (else -EOPNOTSUPP): breaks all connections and makes new ones, on which the driver repeats
 * what was not answered. A user of the device sees a delay. What the old connections were asked must be
 * finished, or never happen, before the new ends are served. Then kernel_dev_settle() is due again.
 */
int kernel_dev_reconnect(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err);

/* The device works already; an error says which of the comforts is missing. */
int kernel_dev_settle(struct kernel_dev *dev, struct err *err);

/* Waits for requests in flight on some kernels: they must be served meanwhile. Mounted file systems see it. */
int kernel_dev_resize(struct kernel_dev *dev, uint64_t size_bytes, struct err *err);

/*
 * -EBUSY as kernel_dev_release(), or 0. Who comes later is not kept out. Without opening it, which waits for a device that
 * nobody serves, a mount in another mount namespace is not seen.
 */
int kernel_dev_users(const struct kernel_dev *dev, bool open_it, struct err *err);

/*
 * Writes the device's cache back, then disconnects. Refused with -EBUSY and the names of the users while
 * mounted, held or open, unless force. The server must answer NBD_CMD_DISC by closing its socket.
 * -EIO when the cache could not be written (not disconnected then, unless force). With broken connections it
 * cannot, and that is not tried.
 */
int kernel_dev_release(struct kernel_dev *dev, bool force, struct err *err);

/* What was on it is lost: breaks its connections now, and kernel_dev_free() disconnects it. */
void kernel_dev_disown(struct kernel_dev *dev);

/* Whether kernel_dev_free() leaves it connected: the next process to claim it goes on with it. */
bool kernel_dev_stays(const struct kernel_dev *dev);

/*
 * Disconnects if need be (without a flush), waits for the driver, frees. By netlink a device that somebody may use stays,
 * unless it was disowned. NULL is fine.
 */
void kernel_dev_free(struct kernel_dev *dev);

const char *kernel_dev_name(const struct kernel_dev *dev);          /* "nbd0" */
enum kernel_dev_mode kernel_dev_mode(const struct kernel_dev *dev); /* not AUTO */
bool kernel_dev_adopted(const struct kernel_dev *dev); /* attached by a process that is gone */
