/*
 * The checked entry points: what doors and layers call. See blk.h for the contract.
 *
 * Every data call goes the same way: admit() waits while the disk is drained and refuses what is
 * wrong; the request is counted as in flight; it goes to the op as it is when it is aligned and short
 * enough, which is nearly always, else through align.c; finish() counts it.
 * The straight way allocates nothing and, where block_size is 1, links nothing.
 *
 * FUA where the op does not honour it, or more than one op is needed, becomes a flush after the writes.
 */
#include "blk/blk.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "base/units.h"
#include "base/util.h"
#include "blk/call.h"

/* Waits while the disk is drained, then looks whether the request is allowed. */
static inline suspends int admit(struct blk *blk, uint64_t off, uint64_t len, bool is_write)
{
	while (unlikely(blk->drained))
		co_queue_wait(&blk->undrained);
	if (unlikely(blk->disconnected))
		return -ESHUTDOWN;
	if (is_write && unlikely(blk->caps.read_only))
		return -EPERM;
	if (unlikely(!range_ok(off, len, blk->caps.size)))
		return is_write ? -ENOSPC : -EINVAL;
	return 0;
}

static void note_error(
	struct blk_counters *counters, enum blk_counter what, uint64_t off, uint64_t len, int ret)
{
	counters->errors[what]++;
	counters->last_error = -ret;
	counters->last_error_op = what;
	counters->last_error_off = off;
	counters->last_error_len = len;
	counters->last_error_time = time(NULL);
}

/* -EOPNOTSUPP is the answer to a BLK_FAST_ZERO, not an error. */
static inline int finish(
	struct blk *blk, enum blk_counter what, uint64_t off, uint64_t len, int ret)
{
	blk->counters.requests[what]++;
	if (likely(!ret))
		blk->counters.bytes[what] += len;
	else if (ret != -EOPNOTSUPP || what != BLK_COUNT_ZERO)
		note_error(&blk->counters, what, off, len, ret);
	co_group_leave(&blk->in_flight);
	return ret;
}

/* The op can take the request as it is. */
static inline bool is_direct(const struct blk *blk, uint64_t off, const void *buf, size_t len)
{
	return likely(len <= blk->caps.max_request && is_aligned(off | len, blk->caps.block_size) &&
		      is_aligned((uintptr_t)buf, blk->caps.mem_align));
}

suspends int blk_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	if (unlikely(len > BLK_REQUEST_MAX))
		return -EINVAL;

	int ret = admit(blk, off, len, false);

	if (unlikely(ret || !len))
		return ret;
	co_group_enter(&blk->in_flight);
	ret = is_direct(blk, off, buf, len) ? blk_op_read(blk, off, buf, len)
					    : blk_read_parts(blk, off, buf, len);
	return finish(blk, BLK_COUNT_READ, off, len, ret);
}

suspends int blk_write(struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	if (unlikely(len > BLK_REQUEST_MAX || flags & ~(unsigned)BLK_FUA))
		return -EINVAL;

	int ret = admit(blk, off, len, true);

	if (unlikely(ret || !len))
		return ret;
	co_group_enter(&blk->in_flight);

	bool direct = is_direct(blk, off, buf, len);
	bool flush_after = flags && !(direct && blk->caps.fua);

	if (flush_after)
		flags = 0;
	if (!direct)
		ret = blk_write_parts(blk, off, buf, len);
	else if (blk->caps.block_size > 1)
		ret = blk_write_aligned(blk, off, buf, len, flags);
	else
		ret = blk_op_write(blk, off, buf, len, flags);
	if (!ret && flush_after)
		ret = blk_op_flush(blk);
	return finish(blk, BLK_COUNT_WRITE, off, len, ret);
}

suspends int blk_flush(struct blk *blk)
{
	int ret = admit(blk, 0, 0, false);

	if (ret)
		return ret;
	co_group_enter(&blk->in_flight);
	return finish(blk, BLK_COUNT_FLUSH, 0, 0, blk_op_flush(blk));
}

static suspends int clear(
	struct blk *blk, enum blk_counter what, uint64_t off, uint64_t len, unsigned flags)
{
	int ret = admit(blk, off, len, true);

	if (ret || !len)
		return ret;
	co_group_enter(&blk->in_flight);
	return finish(blk, what, off, len, blk_clear(blk, what, off, len, flags));
}

suspends int blk_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	if (flags & ~(unsigned)(BLK_FUA | BLK_NO_HOLE | BLK_FAST_ZERO))
		return -EINVAL;
	return clear(blk, BLK_COUNT_ZERO, off, len, flags);
}

suspends int blk_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	if (flags & ~(unsigned)BLK_FUA)
		return -EINVAL;
	return clear(blk, BLK_COUNT_DISCARD, off, len, flags);
}

suspends int blk_extents(struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	int ret = admit(blk, off, len, false);

	if (ret || !len)
		return ret;
	co_group_enter(&blk->in_flight);

	uint64_t limit = extents->limit;

	if (!extents->count)
		extents->off = extents->end = off;
	assert(extents->end == off);
	extents->limit = MIN(limit, off + len);
	ret = blk_extents_within(blk, off, len, extents);
	extents->limit = limit;
	return finish(blk, BLK_COUNT_EXTENTS, off, len, ret);
}

suspends int blk_readv(struct blk *blk, uint64_t off, const struct iovec *iov, int iov_count)
{
	int ret = 0;

	for (int i = 0; i < iov_count && !ret; off += iov[i++].iov_len)
		ret = blk_read(blk, off, iov[i].iov_base, iov[i].iov_len);
	return ret;
}

suspends int blk_writev(
	struct blk *blk, uint64_t off, const struct iovec *iov, int iov_count, unsigned flags)
{
	int ret = 0;

	for (int i = 0; i < iov_count && !ret; off += iov[i++].iov_len)
		ret = blk_write(blk, off, iov[i].iov_base, iov[i].iov_len, flags);
	return ret;
}

/* --- drain, resize, size changes -------------------------------------------------------------- */

suspends void blk_drain_begin(struct blk *blk)
{
	blk->drained++;
	co_group_wait(&blk->in_flight);
}

void blk_drain_end(struct blk *blk)
{
	assert(blk->drained);
	if (!--blk->drained)
		co_queue_wake_all(&blk->undrained);
}

static int check_resize(const struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	char new_text[UNITS_SIZE_TEXT_LEN], old_text[UNITS_SIZE_TEXT_LEN];

	if (flags & ~(unsigned)BLK_FORCE)
		return err_set(err, EINVAL, "resize: unknown flags 0x%x", flags);
	if (!size)
		return err_set(err, EINVAL, "resize: a disk of size 0 is of no use");
	if (size > BLK_SIZE_MAX)
		return err_set(err, EINVAL, "resize: %s is more than the largest size, %s",
			units_format_size(size, new_text),
			units_format_size(BLK_SIZE_MAX, old_text));
	if (blk->disconnected)
		return err_set(err, ESHUTDOWN, "resize: the disk is gone");
	if (blk->caps.read_only)
		return err_set(err, EPERM, "resize: the disk is read-only");
	if (round_up(size, blk->caps.block_size) < blk->caps.size && !(flags & BLK_FORCE))
		return err_set(err, EINVAL,
			"resize: %s is less than the present %s, what lies beyond would be lost: "
			"to shrink must be forced",
			units_format_size(size, new_text),
			units_format_size(blk->caps.size, old_text));
	return 0;
}

static suspends int resize_op(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	if (!blk->ops->resize && blk->below)
		return blk_resize(blk->below, size, flags, err);

	int ret = blk->ops->resize ? blk->ops->resize(blk, size, flags, err)
				   : err_set(err, EOPNOTSUPP, "it has a fixed size");

	if (ret < 0 && err)
		err_wrap(err, "%s", blk->ops->name);
	return ret;
}

suspends int blk_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	co_mutex_lock(&blk->resizing);
	blk_drain_begin(blk);

	int ret = check_resize(blk, size, flags, err);

	size = round_up(size, blk->caps.block_size);
	if (!ret && size != blk->caps.size)
		ret = resize_op(blk, size, flags, err);
	blk_drain_end(blk);
	co_mutex_unlock(&blk->resizing);
	return ret;
}

void blk_size_changed(struct blk *blk, uint64_t size)
{
	struct blk *parent = blk->parent;

	assert(size <= BLK_SIZE_MAX && is_aligned(size, blk->caps.block_size));
	if (size == blk->caps.size)
		return;
	blk->caps.size = size;
	if (parent && parent->ops->child_resized)
		parent->ops->child_resized(parent, blk);
	else if (parent && parent->below == blk)
		blk_size_changed(parent, size);
	if (blk->listener)
		blk->listener->size_changed(blk->listener, size);
}

void blk_set_listener(struct blk *top, struct blk_listener *listener)
{
	top->listener = listener;
}

void blk_notice(const struct blk *blk, const char *fmt, ...)
{
	char text[sizeof(((struct err *)NULL)->text)];
	va_list ap;

	if (!blk->env->notice)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	blk->env->notice(blk, text);
}

/* --- status ----------------------------------------------------------------------------------- */

const struct blk_caps *blk_caps(const struct blk *blk)
{
	return &blk->caps;
}

static const char *const counter_names[BLK_COUNTERS] = {
	[BLK_COUNT_READ] = "read",
	[BLK_COUNT_WRITE] = "write",
	[BLK_COUNT_FLUSH] = "flush",
	[BLK_COUNT_ZERO] = "zero",
	[BLK_COUNT_DISCARD] = "discard",
	[BLK_COUNT_EXTENTS] = "extents",
};

static json_t *counters_status(const struct blk_counters *counters)
{
	json_t *object = json_object();

	for (int i = 0; i < BLK_COUNTERS; i++)
		json_object_set_new(object, counter_names[i],
			json_pack("{s:I, s:I, s:I}", "requests", (json_int_t)counters->requests[i],
				"bytes", (json_int_t)counters->bytes[i], "errors",
				(json_int_t)counters->errors[i]));
	return object;
}

static json_t *last_error_status(const struct blk_counters *counters)
{
	return json_pack("{s:s, s:i, s:s, s:I, s:I, s:I}", "op",
		counter_names[counters->last_error_op], "code", counters->last_error, "text",
		strerror(counters->last_error), "off", (json_int_t)counters->last_error_off, "len",
		(json_int_t)counters->last_error_len, "time",
		(json_int_t)counters->last_error_time);
}

json_t *blk_status(struct blk *blk)
{
	const struct blk_caps *caps = &blk->caps;
	json_t *children = json_array();
	json_t *object = json_pack("{s:s, s:I, s:I, s:I, s:I, s:b, s:b, s:b, s:b, s:I}", "layer",
		blk->ops->name, "size", (json_int_t)caps->size, "block_size",
		(json_int_t)caps->block_size, "preferred_size", (json_int_t)caps->preferred_size,
		"max_request", (json_int_t)caps->max_request, "read_only", caps->read_only, "fua",
		caps->fua, "zero_fast", caps->zero_fast, "discard", caps->discard, "in_flight",
		(json_int_t)blk->in_flight.running);

	json_object_set_new(object, "counters", counters_status(&blk->counters));
	if (blk->counters.last_error)
		json_object_set_new(object, "last_error", last_error_status(&blk->counters));
	if (blk->ops->status)
		blk->ops->status(blk, object);
	if (blk->below)
		json_array_append_new(children, blk_status(blk->below));
	list_for_each (item, &blk->extra_children)
		json_array_append_new(
			children, blk_status(list_entry(item, struct blk, extra_link)));
	json_object_set_new(object, "children", children);
	return object;
}
