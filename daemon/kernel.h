/*
 * The kernel door: an export as a block device of this machine, /dev/nbdN.
 *
 * A socket pair joins the two sides: the kernel's NBD driver has one end, the export's own NBD
 * transmission code serves the other like any client's. So the door itself moves no data; it claims,
 * sets up, resizes and gives back the device.
 *
 * All functions run in coroutines on one reactor (the one that attached); the blocking work goes to
 * threads of its own, never to the offload pool, because most of it waits for the device's own requests.
 * attach, resize and detach of one door must not run at the same time: the export's lock sees to that.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "base/list.h"
#include "daemon/kernel-dev.h"
#include "rt/co.h"

struct keeper_link;
struct kernel_door;
struct nbd_export;

struct kernel_opts {
	struct keeper_link *keeper; /* who holds the device; NULL: this process */
	struct nbd_export *nbd;     /* what it serves, on its home reactor; outlives the door */
	bool by_hand;               /* the export is in no config */
	const char *device;         /* "/dev/nbd0", or "auto" for the first one that is free */
	uint64_t size_bytes;
	uint32_t block_size; /* logical block size: 512, 1024, 2048 or 4096 */
	uint32_t timeout_s;  /* a request older than that fails the device; 0: never */
	enum kernel_dev_mode mode;
	unsigned connections;
	uint32_t
		dead_timeout_s; /* by netlink: how long requests wait for the next daemon when this one dies */
};

/*
 * Returns when the device is ready to use: partitions read, their nodes in /dev, udev at rest.
 * Errors as kernel_dev_claim(); nothing stays attached then.
 */
suspends int kernel_attach(
	const struct kernel_opts *opts, struct kernel_door **door, struct err *err);

/* The device of that export which a daemon that is gone, keeper and all, has left, and which nobody keeps. */
bool kernel_find_left(const char *export, char device[KERNEL_NAME_LEN + 8]);

/*
 * Writes the device's cache back and disconnects; the door is freed on success and stays on an error:
 * -EBUSY while the device is in use (says by whom), -EIO when its cache cannot be written, neither with
 * force; -ETIMEDOUT when requests in flight do not end. A door that was lost is only freed. One that is held needs
 * force, and its cache is not written back.
 */
suspends int kernel_detach(struct kernel_door *door, bool force, struct err *err);

/* Who uses the device, as kernel_detach() would refuse: -EBUSY, or 0. Changes nothing. */
suspends int kernel_check_unused(struct kernel_door *door, struct err *err);

/* After the stack has grown, or before it shrinks. Requests are served meanwhile. */
suspends int kernel_resize(struct kernel_door *door, uint64_t size_bytes, struct err *err);

/*
 * With a keeper: the devices that it holds from servers before this one, as doors in a list. Each is resumed by the
 * export of its name, or abandoned.
 */
suspends int kernel_find_kept(struct keeper_link *keeper, struct list *doors, struct err *err);
const char *kernel_kept_export(const struct list *link);
struct kernel_door *kernel_kept_door(struct list *link);
bool kernel_kept_by_hand(const struct list *link);
/*
 * As far as can be seen without opening it, which would wait for somebody to serve it. users: who. The keeper looks: an
 * ordinary user does not see who has it open.
 */
suspends bool kernel_kept_is_used(struct list *link, struct err *users);

/*
 * Goes on where the last server was; before nbd has other clients. On an error the door stays in its list:
 * -ENODEV the driver gave it up, -ENOTRECOVERABLE the disk's content died with the last server; -EIO and others of
 * the disk may go away. When the last server's journal is damaged, or of another version, a device by netlink goes on
 * with new connections, if its disk forgets nothing that was acknowledged; another one is held: it stays
 * attached, nobody serves it, and its users wait.
 */
suspends int kernel_resume(struct kernel_door *door, struct nbd_export *nbd, struct err *err);
bool kernel_is_held(const struct kernel_door *door);
uint64_t kernel_size(const struct kernel_door *door);

/* Disconnects without a flush: users of the device get errors. Frees the door. */
suspends void kernel_abandon(struct kernel_door *door);
/* Whether users of the device wait for the next start when it is let go. */
bool kernel_outlives(const struct kernel_door *door);
bool kernel_was_left(const struct kernel_door *door); /* and it did wait for this start */
suspends void kernel_let_go(struct kernel_door *door);
/* After nbd_export_close() with a keeper: the device waits for another server. Frees the door. */
suspends void kernel_leave(struct kernel_door *door);

const char *kernel_device(const struct kernel_door *door); /* "/dev/nbd0" */
bool kernel_lost(const struct kernel_door *door);          /* the driver gave it up */

/* device, state ("attached", "held" or "lost"), reason, size, block_size, read_only, timeout; new reference. */
json_t *kernel_status(const struct kernel_door *door);

/*
 * Once, before the first thread, when there may be a kernel door: the kernel must not wait for this
 * process's devices on behalf of this process's memory. lock_memory: also keep all of it from being paged
 * out. An error names the missing privilege; the daemon works without, but can deadlock when memory is short.
 */
int kernel_guard_reclaim(bool lock_memory, struct err *err);
