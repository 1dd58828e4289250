/*
 * An export: a stack with a name, its home reactor, and the doors it is served through.
 *
 * All functions are called on the main reactor and go to the export's home where they need to. Changes to
 * one export (resize, attach, detach, stop) wait for each other; reads and writes wait for none of
 * them but where the stack itself must be still.
 *
 * Which thread touches what: `top` and what is below it only on `home`; `size` is written there and
 * read anywhere; the rest belongs to the main reactor. An export may be gone when a call with it has
 * returned: look it up again, by name.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "base/list.h"
#include "blk/blk.h"
#include "nbd/server.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#include "daemon/config.h"
#include "daemon/stuck.h"

struct daemon;
struct kernel_door;
struct record;

struct export
{
	struct list link; /* in daemon->exports, or daemon->closing */
	struct daemon *daemon;
	struct config_export *config; /* name, description, device, ... */
	struct config_export *opened; /* what it was opened by; its name is kept elsewhere too */
	bool by_hand;                 /* came by the control socket: reloads leave it alone */
	bool stopping;                /* calls are refused */
	bool drained; /* of clients, while stopping: only flushing and closing are left */

	struct reactor *home;
	struct blk *top;       /* home only */
	json_t *layers;        /* names, top first */
	struct record *record; /* of changes that outlive it, see export-record.h; NULL: none */
	_Atomic uint64_t size; /* bytes */
	uint32_t block_size;   /* the stack's smallest unit: 1 = any byte */
	bool read_only;
	struct blk_listener listener;

	struct stuck stuck;
	struct nbd_export nbd;      /* what both doors serve; counters and connections: on home */
	struct kernel_door *kernel; /* NULL while no kernel device is attached */
	uint64_t kernel_size;       /* what it was last told */

	struct co_mutex change; /* held by whoever resizes, attaches, detaches, stops */
	struct co_group users;  /* calls under way; freed after the last one */
	struct task resized;    /* posted by home when the size changed */
	atomic_bool resized_posted;
};

/* NULL when there is none of that name. */
struct export *export_find(struct daemon *daemon, const char *name);

/*
 * Opens the stack on the least used reactor, puts the export into daemon->exports and publishes it to NBD
 * clients; the kernel device is left to export_attach(). Errors name file, line, export and layer.
 */
suspends int export_start(struct daemon *daemon, struct config_export *config,
	struct export **export, struct err *err);

/*
 * Takes the export out of the list, detaches the kernel device (a device in use too: that is logged),
 * ends the connections, flushes, closes the stack, frees. Requests in flight have grace_ns before their
 * connection is cut; how long their layers then take to give up is not bounded.
 */
suspends void export_stop(struct export *export, uint64_t grace_ns);

/*
 * Takes an export out of a daemon that goes on: -EBUSY, naming by whom, while anybody uses it, and then nothing has
 * changed. With force its users get errors, after grace_ns for what is under way.
 */
suspends int export_remove(struct export *export, uint64_t grace_ns, bool force, struct err *err);

/*
 * -EBUSY when taking the export away would take it from somebody: a mounted, held or open device, and, unless
 * device_only, NBD clients and a mirror that was started on it. A look: who comes later is not kept out.
 */
suspends int export_check_unused(struct export *export, bool device_only, struct err *err);

/* The layers that the stack is made of now, as a config has them; a list that the caller frees. */
suspends struct conf *export_running_stack(struct export *export);

/* What another config says of the export; of the stack nothing, and of the device for the next attach. */
void export_set_config(struct export *export, struct config_export *config);

/*
 * For calls that change an export: one at a time, and none once it is being stopped (-ESHUTDOWN). The export
 * is not freed in between.
 */
suspends int export_begin_change(struct export *export, struct err *err);
void export_end_change(struct export *export);

/* Home. Whose graph changed: requests go to top from now on. */
void export_set_top(struct export *export, struct blk *top);
/* Home. The names of the layers, a new reference. */
json_t *export_layers(const struct export *export);

/* Logs what keeps an export that is being stopped: the clients with requests in flight, or its flush. */
void export_report_stuck(struct export *export);

/*
 * Resizes the stack and the kernel device, in the order that never shows a byte that is not there;
 * NBD clients that connect from now on see it too. size is rounded up to the block size. To shrink
 * needs force.
 */
suspends int export_resize(struct export *export, uint64_t size, bool force, struct err *err);

/* Everything written so far is durable at return. */
suspends int export_flush(struct export *export, struct err *err);

/* The range reads as zeroes afterwards and its space is given back. len 0: to the end. */
suspends int export_discard(struct export *export, uint64_t off, uint64_t len, struct err *err);

/*
 * Attaches a kernel device: "/dev/nbd0", "auto", or NULL for what the config says ("auto" when it says
 * nothing). Returns when the device is ready to use. -EALREADY when one is attached.
 */
suspends int export_attach(struct export *export, const char *device, struct err *err);
/*
 * A device that was attached by hand and whose daemon died as a whole: the driver keeps it, and its users wait. That it
 * cannot be taken up is logged, and no reason not to serve the export.
 */
suspends void export_take_up_left(struct export *export);
/* -EBUSY, naming by whom, while the device is in use and not force; -ENOENT when none is attached. */
suspends int export_detach(struct export *export, bool force, struct err *err);

/* Of the one that serves nbd: the driver gave its device up. */
void export_device_lost(struct nbd_export *nbd);

/* The stack as a tree, as blk_status() gives it, and what nbd_export_status() tells; new references. */
suspends void export_status(struct export *export, json_t **stack, json_t **nbd);
