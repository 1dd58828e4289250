/*
 * mirror: what may be done with a mirror while it runs; for the control socket and for tests.
 *
 * A mirror is a layer like others (options in mirror.c); its state is read with blk_status(). Everything here is
 * called on the home reactor of the stack, one call of a mirror at a time.
 *
 * A mirror comes into a running stack in two steps: mirror_insert() opens it on top; when all new requests go to it,
 * mirror_begin_live(). It goes again by mirror_cancel() or mirror_promote(), then mirror_unlink(), which says
 * what takes its place, then stack_close().
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "blk/blk.h"

/* The first mirror from blk down; NULL when there is none. */
struct blk *mirror_find(struct blk *blk);

/*
 * Opens a mirror on *top, which may be in use and stays as it is, and makes it *top. group: options, as in a
 * config file, the layer's name included; it outlives the stack.
 */
suspends int mirror_insert(struct blk **top, struct conf *group, struct err *err);

/*
 * What is below was used directly until now: waits for those requests, takes the whole disk for dirty, and
 * copies, unless paused.
 */
suspends int mirror_begin_live(struct blk *blk, bool paused, struct err *err);

/* No copying until mirror_resume(), which also tries a degraded secondary again at once. */
void mirror_pause(struct blk *blk);
void mirror_resume(struct blk *blk);

/* bytes/s for the copy; 0: as fast as it goes. */
void mirror_set_rate(struct blk *blk, uint64_t bytes_per_s);

/* Every byte of both legs is the same, and stays so. */
bool mirror_in_sync(const struct blk *blk);

/* How many bytes may differ, and whether the mirror has finished a copy since it began; for progress. */
uint64_t mirror_bytes_dirty(const struct blk *blk);

/* The keys that the mirror adds to blk_status(), alone; a new reference. */
json_t *mirror_status(struct blk *blk);

/* Waits until something changed that status tells (a phase, some progress) or deadline_ns has come. */
suspends void mirror_wait_change(struct blk *blk, uint64_t deadline_ns);

/* The secondary gets nothing more: requests go to the primary alone. */
suspends void mirror_cancel(struct blk *blk);

/*
 * The secondary takes the primary's place; no request is lost or waits for long. Without force, both
 * legs have to be the same (-EAGAIN says what is missing); the rest of the secondary is old otherwise.
 * keep: the mirror stays, with exchanged legs; for mirrors in sync only. Else it only passes requests on now,
 * and is to be unlinked.
 */
struct mirror_promotion {
	bool force, keep;
	/*
	 * Called when both legs are still and flushed: makes it durable that the export is `stack` (a CONF_LIST) from
	 * now on. When it fails nothing has changed, but for a primary that hung and was left: that fails its
	 * requests, until a promotion succeeds. NULL: nobody remembers.
	 */
	suspends int (*commit)(void *arg, const struct conf *stack, struct err *err);
	void *arg;
};
suspends int mirror_promote(
	struct blk *blk, const struct mirror_promotion *promotion, struct err *err);

/*
 * After one of these two: takes the mirror out of its stack; *top is changed if it was the mirror. What is
 * left, for stack_close(), is the mirror with the leg that is not used any more.
 */
void mirror_unlink(struct blk *blk, struct blk **top);

/*
 * Compares both legs in [off, off + *len), or a part from off on: then *len is set to it. What is known to be
 * dirty is left out. What differs is taken for dirty, and so copied again. -errno when a leg cannot be read.
 */
struct mirror_comparison {
	uint64_t compared, different; /* bytes */
	uint64_t first_off;           /* of a difference, if there is one */
};
suspends int mirror_compare(struct blk *blk, uint64_t off, uint64_t *len,
	struct mirror_comparison *sum, struct err *err);
