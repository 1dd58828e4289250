/*
 * Requests that a layer cannot take as they are: too long, not aligned to its blocks, in memory that
 * is not aligned, or zeroes that it cannot make. blk.c comes here when the straight way is not open.
 *
 * A request is cut into parts. A part that is aligned goes to the op as it is; any other goes through a
 * bounce buffer of at most BOUNCE_MAX_BYTES. A write that does not fill its first or last block reads
 * that block first (read-modify-write).
 *
 * Two read-modify-writes of one block, or one and an aligned write (or zero, or discard), would lose
 * one of the two although their bytes do not overlap. So where block_size > 1, everything that writes
 * holds its range of blocks in blk->writes: shared when it fills its blocks, exclusive when it must read
 * them first. Nobody holds two ranges of one layer, so nobody waits for himself. Reads need no lock: the
 * bytes around a partial write do not change.
 *
 * Failure: the first error ends a request, and the parts before it have happened.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "blk/blk.h"
#include "blk/call.h"
#include "rt/buf.h"

#define BOUNCE_MAX_BYTES (256U << 10)

static_assert(BOUNCE_MAX_BYTES >= 2 * BLK_BLOCK_SIZE_MAX, "a write within two blocks is one part");

/* What zeroes are written from. Constant, but in .bss, where it takes no room in the program file. */
static char zeroes[BOUNCE_MAX_BYTES] __attribute__((aligned(4096)));

static suspends void lock_range(
	struct blk *blk, struct range *range, uint64_t off, uint64_t len, bool exclusive)
{
	if (blk->caps.block_size > 1)
		range_lock_acquire(&blk->writes, range, off, len, exclusive);
}

static void unlock_range(struct blk *blk, struct range *range)
{
	if (blk->caps.block_size > 1)
		range_lock_release(&blk->writes, range);
}

/* A write that fills its blocks. */
suspends int blk_write_aligned(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct range range;

	lock_range(blk, &range, off, len, false);

	int ret = blk_op_write(blk, off, buf, len, flags);

	unlock_range(blk, &range);
	return ret;
}

/* How much from the start of the request the op can take as it is; 0 when nothing. */
static size_t direct_part(const struct blk *blk, uint64_t off, const void *buf, size_t len)
{
	if (!is_aligned(off, blk->caps.block_size) ||
		!is_aligned((uintptr_t)buf, blk->caps.mem_align))
		return 0;
	return MIN(round_down(len, blk->caps.block_size), blk->caps.max_request);
}

/* How much from the start of the request goes through one bounce buffer; ends at a block if not the last. */
static size_t bounced_part(const struct blk *blk, uint64_t off, size_t len)
{
	size_t within_block = off & (blk->caps.block_size - 1);
	size_t room = MIN(BOUNCE_MAX_BYTES, blk->caps.max_request) - within_block;

	return MIN(len, room);
}

static suspends int read_bounced(struct blk *blk, uint64_t off, char *buf, size_t len)
{
	uint64_t start = round_down(off, blk->caps.block_size);
	size_t whole_len = round_up(off + len, blk->caps.block_size) - start;
	char *bounce = buf_get(whole_len);

	if (!bounce)
		return -ENOMEM;

	int ret = blk_op_read(blk, start, bounce, whole_len);

	if (!ret)
		memcpy(buf, bounce + (off - start), len);
	buf_put(bounce, whole_len);
	return ret;
}

suspends int blk_read_parts(struct blk *blk, uint64_t off, char *buf, size_t len)
{
	int ret = 0;

	while (len && !ret) {
		size_t part = direct_part(blk, off, buf, len);

		if (part) {
			ret = blk_op_read(blk, off, buf, part);
		} else {
			part = bounced_part(blk, off, len);
			ret = read_bounced(blk, off, buf, part);
		}
		off += part;
		buf += part;
		len -= part;
	}
	return ret;
}

/*
 * Reads what [off, off + len) does not fill of the first and last block of [start, end), to its place at
 * bounce. All of it where the last block's place is not aligned.
 */
static suspends int read_edges(
	struct blk *blk, char *bounce, uint64_t start, uint64_t end, uint64_t off, size_t len)
{
	uint32_t block_size = blk->caps.block_size;
	bool head = off > start, tail = off + len < end;
	uint64_t last = end - block_size;
	int ret = 0;

	if (tail && !is_aligned(last - start, blk->caps.mem_align))
		return blk_op_read(blk, start, bounce, end - start);
	if (head || (tail && last == start))
		ret = blk_op_read(blk, start, bounce, block_size);
	if (!ret && tail && last != start)
		ret = blk_op_read(blk, last, bounce + (last - start), block_size);
	return ret;
}

static suspends int write_bounced(struct blk *blk, uint64_t off, const char *buf, size_t len)
{
	uint64_t start = round_down(off, blk->caps.block_size);
	uint64_t end = round_up(off + len, blk->caps.block_size);
	bool partial = off > start || off + len < end;
	char *bounce = buf_get(end - start);
	struct range range;
	int ret = 0;

	if (!bounce)
		return -ENOMEM;
	lock_range(blk, &range, start, end - start, partial);
	if (partial)
		ret = read_edges(blk, bounce, start, end, off, len);
	if (!ret) {
		memcpy(bounce + (off - start), buf, len);
		ret = blk_op_write(blk, start, bounce, end - start, 0);
	}
	unlock_range(blk, &range);
	buf_put(bounce, end - start);
	return ret;
}

suspends int blk_write_parts(struct blk *blk, uint64_t off, const char *buf, size_t len)
{
	int ret = 0;

	while (len && !ret) {
		size_t part = direct_part(blk, off, buf, len);

		if (part) {
			ret = blk_write_aligned(blk, off, buf, part, 0);
		} else {
			part = bounced_part(blk, off, len);
			ret = write_bounced(blk, off, buf, part);
		}
		off += part;
		buf += part;
		len -= part;
	}
	return ret;
}

/* Zeroes as data. Lets others run between the parts: the range may be the whole disk. */
static suspends int write_zeroes(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	size_t part_max = MIN(sizeof(zeroes), blk->caps.max_request);
	int ret = 0;

	while (len && !ret) {
		size_t part = MIN(len, part_max);

		ret = blk_op_write(blk, off, zeroes, part, 0);
		off += part;
		len -= part;
		co_yield ();
	}
	if (!ret && flags & BLK_FUA)
		ret = blk_op_flush(blk);
	return ret;
}

/* zero or discard of whole blocks: by the first of discard, zero, writing zeroes that the layer can do. */
static suspends int clear_blocks(
	struct blk *blk, enum blk_counter what, uint64_t off, uint64_t len, unsigned flags)
{
	struct range range;
	int ret = -EOPNOTSUPP;

	lock_range(blk, &range, off, len, false);
	if (what == BLK_COUNT_DISCARD)
		ret = blk_op_discard(blk, off, len, flags);
	if (ret == -EOPNOTSUPP)
		ret = blk_op_zero(blk, off, len, flags);
	if (ret == -EOPNOTSUPP && !(flags & BLK_FAST_ZERO))
		ret = write_zeroes(blk, off, len, flags);
	unlock_range(blk, &range);
	return ret;
}

/*
 * FUA goes to the op when the op does all of it and can; else a flush follows. With BLK_FAST_ZERO the
 * whole blocks come first: when they cannot be fast, nothing has been written.
 */
suspends int blk_clear(
	struct blk *blk, enum blk_counter what, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t start = round_up(off, blk->caps.block_size);
	uint64_t end = round_down(off + len, blk->caps.block_size);
	bool whole = start == off && end == off + len;
	bool flush_after = flags & BLK_FUA && !(whole && blk->caps.fua);
	int ret;

	if (flags & BLK_FAST_ZERO && (!blk->caps.zero_fast || start >= end))
		return -EOPNOTSUPP;
	if (flush_after)
		flags &= ~(unsigned)BLK_FUA;

	if (start >= end) {
		ret = blk_write_parts(blk, off, zeroes, len);
	} else {
		ret = clear_blocks(blk, what, start, end - start, flags);
		if (!ret && off < start)
			ret = write_bounced(blk, off, zeroes, start - off);
		if (!ret && end < off + len)
			ret = write_bounced(blk, end, zeroes, off + len - end);
	}
	if (!ret && flush_after)
		ret = blk_op_flush(blk);
	return ret;
}
