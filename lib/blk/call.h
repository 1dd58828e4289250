/*
 * How blk.c and its parts call the ops of a layer. Private to them (and to tests with layers of their own).
 *
 * A missing op of a layer with a child passes the call on; that of a leaf is -EOPNOTSUPP, but flush,
 * which has nothing to do then. A leaf has read, and write unless it is read-only.
 */
#pragma once

#include <errno.h>

#include "blk/blk.h"

static inline suspends int blk_op_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	return blk->ops->read ? blk->ops->read(blk, off, buf, len)
			      : blk_read(blk->below, off, buf, len);
}

static inline suspends int blk_op_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return blk->ops->write ? blk->ops->write(blk, off, buf, len, flags)
			       : blk_write(blk->below, off, buf, len, flags);
}

static inline suspends int blk_op_flush(struct blk *blk)
{
	if (blk->ops->flush)
		return blk->ops->flush(blk);
	return blk->below ? blk_flush(blk->below) : 0;
}

static inline suspends int blk_op_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	if (blk->ops->zero)
		return blk->ops->zero(blk, off, len, flags);
	return blk->below ? blk_zero(blk->below, off, len, flags) : -EOPNOTSUPP;
}

static inline suspends int blk_op_discard(
	struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	if (blk->ops->discard)
		return blk->ops->discard(blk, off, len, flags);
	return blk->below ? blk_discard(blk->below, off, len, flags) : -EOPNOTSUPP;
}

static inline suspends int blk_op_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	if (blk->ops->extents)
		return blk->ops->extents(blk, off, len, extents);
	return blk->below ? blk_extents(blk->below, off, len, extents) : -EOPNOTSUPP;
}

/* Aligns requests to what the ops take; align.c. */
/* A write that fills its blocks, in the way of read-modify-writes only. */
suspends int blk_write_aligned(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags);
suspends int blk_read_parts(struct blk *blk, uint64_t off, char *buf, size_t len);
suspends int blk_write_parts(struct blk *blk, uint64_t off, const char *buf, size_t len);
suspends int blk_clear(
	struct blk *blk, enum blk_counter what, uint64_t off, uint64_t len, unsigned flags);

/* blk_extents() behind its checks; extents.c. */
suspends int blk_extents_within(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents);

/*
 * Opens a layer on top of *top (NULL for a leaf), which it owns from then on, and makes it *top; stack.c.
 * On an error *top stays as it is. err is not NULL.
 */
suspends int blk_open_layer(const struct blk_ops *ops, const struct conf *group,
	struct blk_env *env, bool read_only, struct blk **top, struct err *err);
