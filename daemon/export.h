/*
 * An export: a stack with a name, its home reactor, and the doors it is served through.
 *
 * All functions are called on the main reactor and go to the export's home where they need to. Changes to
 * one export (resize, attach, detach, stop) wait for each other; reads and writes wait for none of
 * them but where the stack itself must be still.
 *
 * Which thread touches what: `top` and everything below only on `home`; `size` is written there and
 * read anywhere; the rest belongs to the main reactor and does not change while the export runs.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "base/list.h"
#include "blk/blk.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#include "daemon/config.h"

struct daemon;
struct nbd_export;
struct kernel_door;

enum export_state { EXPORT_STARTING, EXPORT_RUNNING, EXPORT_STOPPING };

struct export
{
	struct list link; /* in daemon->exports */
	struct daemon *daemon;
	const struct config_export *config; /* name, description, device, ... */
	enum export_state state;

	struct reactor *home;
	struct blk *top;       /* home only */
	_Atomic uint64_t size; /* bytes */
	uint32_t block_size;   /* smallest unit of the top layer: 1 = any byte */
	bool read_only;
	struct blk_listener listener;

	struct nbd_export *nbd;     /* what the NBD door and the kernel door serve */
	struct kernel_door *kernel; /* NULL while no kernel device is attached */

	struct co_mutex change; /* held by whoever resizes, attaches, detaches, stops */
	struct task resized;    /* the size changed by itself: tell the kernel */
	atomic_bool resized_posted;
};

/* The export of that name, whatever its state; NULL when there is none. */
struct export *export_find(struct daemon *daemon, const char *name);

/*
 * Opens the stack on the least used reactor and puts the export into daemon->exports; the kernel device
 * is left to export_attach(). Errors name file, line, export and layer.
 */
suspends int export_start(struct daemon *daemon, const struct config_export *config,
	struct export **export, struct err *err);

/*
 * Takes the export out of the list, ends its connections (requests in flight finish until
 * deadline_ns, reactor clock), detaches the kernel device, flushes, closes the stack, frees.
 */
suspends void export_stop(struct export *export, uint64_t deadline_ns);

/*
 * Resizes the stack and then, in the order that never shows a byte that is not there, the kernel
 * device; NBD clients that connect from now on see it too. To shrink needs force.
 */
suspends int export_resize(struct export *export, uint64_t size, bool force, struct err *err);

/* Everything written so far is durable at return. */
suspends int export_flush(struct export *export, struct err *err);

/* The range reads as zeroes afterwards and its space is given back; len 0: all from off to the end. */
suspends int export_discard(struct export *export, uint64_t off, uint64_t len, struct err *err);

/*
 * Attaches a kernel device: "/dev/nbd0", "auto", or NULL for what the config says. Returns when the
 * device is ready to use.
 */
suspends int export_attach(struct export *export, const char *device, struct err *err);
/* -EBUSY, naming by whom, while the device is in use and not force; -ENOENT when none is attached. */
suspends int export_detach(struct export *export, bool force, struct err *err);

/* The stack as a tree, as blk_status() gives it; new reference. */
suspends json_t *export_stack_status(struct export *export);
