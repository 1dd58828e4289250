/*
 * A kernel device as a door has it, whoever holds it: this process, on threads, or the keeper, which holds
 * it beyond this process's death.
 *
 * All functions run in coroutines on one reactor, the main one. One call for a device at a time.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "daemon/keeper-link.h"
#include "daemon/kernel-dev.h"
#include "rt/lock.h"
#include "rt/reactor.h"

struct kernel_hold {
	struct keeper_link *keeper; /* NULL: held by this process */
	/* Once claimed, with the mode and the connections that it has. The export's name lives as long. */
	struct kernel_dev_opts opts;
	char name[KERNEL_NAME_LEN]; /* "nbd0", once claimed */
	struct kernel_ends ends;    /* the door's to use and to close */
	int journal;         /* from the keeper: what the servers before wrote; -1: nothing */
	unsigned taken_over; /* servers that had it before this one */
	bool adopted; /* a process that is gone attached it, the keeper of its time included */

	bool by_hand; /* the export came by a command: no config has it */
	bool settled;
	bool ended; /* the driver gave it up */
	int end_reason;
	void (*on_end)(struct kernel_hold *hold);
	struct co_queue end;

	struct kernel_dev *dev; /* held here */
	struct reactor *reactor;
	struct task ended_task;
	struct keeper_device kept; /* held there */
};

/* Sets keeper, opts and on_end; nothing is held yet. */
void kernel_hold_init(struct kernel_hold *hold, struct keeper_link *keeper,
	const struct kernel_dev_opts *opts, void (*on_end)(struct kernel_hold *hold));

/* As kernel_dev_claim(). */
suspends int kernel_hold_claim(struct kernel_hold *hold, struct err *err);

/*
 * The first device that the keeper holds in slot *slot or later, which becomes the slot behind it; -ENOENT: no more.
 * hold is as after a claim, but for hold->export, which is to be set to the name in export_name.
 */
suspends int kernel_hold_take_over(struct kernel_hold *hold, struct keeper_link *keeper,
	uint32_t *slot, char export_name[KEEPER_EXPORT_LEN], struct err *err);

/* The keeper keeps the memory for the next server; fd stays the caller's. */
suspends int kernel_hold_set_journal(struct kernel_hold *hold, int fd, struct err *err);

/*
 * With a keeper, netlink only: other connections, on which the driver repeats what was not answered. The journal
 * is gone, and kernel_hold_settle() is due again. As kernel_dev_reconnect().
 */
suspends int kernel_hold_reconnect(struct kernel_hold *hold, struct err *err);

/* As kernel_dev_settle(), and the device's name is made known to udev. */
suspends int kernel_hold_settle(struct kernel_hold *hold, struct err *err);
suspends int kernel_hold_resize(struct kernel_hold *hold, uint64_t size_bytes, struct err *err);
/* As kernel_dev_users(); the second one, with a keeper only, for a device that nobody serves. */
suspends int kernel_hold_check_unused(struct kernel_hold *hold, struct err *err);
suspends int kernel_hold_look_for_users(struct kernel_hold *hold, struct err *err);
suspends int kernel_hold_release(struct kernel_hold *hold, bool force, struct err *err);

/*
 * Disconnects if need be, and returns when nothing is held any more. The ends stay open. lost: as
 * kernel_dev_disown().
 */
suspends void kernel_hold_disconnect(struct kernel_hold *hold, bool lost);
/* The last call. Closes the ends; the keeper goes on holding what was not disconnected. */
void kernel_hold_leave(struct kernel_hold *hold);
/* What a door that took over tells that a claim would have been told. */
void kernel_hold_rename(
	struct kernel_hold *hold, const char *export, void (*on_end)(struct kernel_hold *hold));
