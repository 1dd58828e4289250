/*
 * Extents: what of a disk is data, zero or hole; see blk.h.
 *
 * A layer describes its disk in bytes. Where its block_size is larger than 1, the answer is rounded to
 * blocks: data outward, holes and zeroes inward, so that nobody skips a byte that may be data.
 * The list that the caller gave may already hold something: everything here only appends.
 */
#include <assert.h>
#include <errno.h>

#include "base/util.h"
#include "blk/blk.h"
#include "blk/call.h"

#define ROUNDED_EXTENTS_MAX 32 /* looked at in one call; more need another call */
#define SEEK_FIRST_BYTES    UINT64_C(65536)

void blk_extents_init(struct blk_extents *extents, struct blk_extent *list, unsigned max_count)
{
	*extents = (struct blk_extents){
		.limit = UINT64_MAX, .list = list, .max_count = max_count
	};
}

bool blk_extents_add(struct blk_extents *extents, uint64_t len, uint32_t flags)
{
	struct blk_extent *last = extents->count ? &extents->list[extents->count - 1] : NULL;
	uint32_t depth = extents->tells_depth && !(flags & BLK_EXTENT_HOLE) ? extents->depth : 0;

	len = MIN(len, extents->limit - extents->end);
	if (!len)
		return extents->end < extents->limit;
	if (last && last->flags == flags && last->depth == depth)
		last->len += len;
	else if (extents->count < extents->max_count)
		extents->list[extents->count++] = (struct blk_extent){ len, flags, depth };
	else
		return false;
	extents->end += len;
	return extents->end < extents->limit;
}

/* Appends what is missing up to `to`, with these flags, as far as the caller's list goes. */
static bool add_until(struct blk_extents *extents, uint64_t to, uint32_t flags)
{
	return to <= extents->end || blk_extents_add(extents, to - extents->end, flags);
}

/*
 * Appends one, which starts at off, as far as it fills blocks; false when the caller's list is full. Where depths
 * are not told, data fills up to the next hole.
 */
static bool add_rounded_extent(struct blk_extents *extents, uint64_t off,
	const struct blk_extent *extent, uint32_t block_size)
{
	uint64_t start = round_up(off, block_size);
	uint64_t end = round_down(off + extent->len, block_size);

	if (extent->flags == BLK_EXTENT_DATA)
		return !extents->tells_depth || add_until(extents, end, BLK_EXTENT_DATA);
	return start >= end || (add_until(extents, start, BLK_EXTENT_DATA) &&
				       add_until(extents, end, extent->flags));
}

/*
 * Appends found to extents, rounded to blocks. found may start before the end of extents. A block that data of
 * several depths share is of the depth of the last of them.
 */
static void add_rounded(
	struct blk_extents *extents, const struct blk_extents *found, uint32_t block_size)
{
	uint64_t off = found->off;
	uint64_t known_end = round_down(found->end, block_size);
	uint32_t own_depth = extents->depth;
	bool has_room = true;

	if (!found->count)
		return;
	for (unsigned i = 0; has_room && i < found->count; off += found->list[i++].len) {
		extents->depth = found->list[i].depth;
		has_room = add_rounded_extent(extents, off, &found->list[i], block_size);
	}
	if (known_end <= extents->end || found->list[found->count - 1].flags == BLK_EXTENT_DATA)
		known_end = round_up(found->end, block_size);
	if (has_room)
		add_until(extents, known_end, BLK_EXTENT_DATA);
	extents->depth = own_depth;
}

static suspends int rounded_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct blk_extent list[ROUNDED_EXTENTS_MAX];
	struct blk_extents found;
	uint64_t start = round_down(off, blk->caps.block_size);
	uint64_t end = round_up(off + len, blk->caps.block_size);

	blk_extents_init(&found, list, ARRAY_LEN(list));
	found.off = found.end = start;
	found.limit = end;
	found.tells_depth = extents->tells_depth;
	found.depth = extents->depth;

	int ret = blk_op_extents(blk, start, end - start, &found);

	if (!ret)
		add_rounded(extents, &found, blk->caps.block_size);
	return ret;
}

/* The checked call's inside: extents->limit is the end of the range. */
suspends int blk_extents_within(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	int ret = blk->caps.block_size == 1 ? blk_op_extents(blk, off, len, extents)
					    : rounded_extents(blk, off, len, extents);

	if (ret == -EOPNOTSUPP)
		ret = 0;
	if (!ret && extents->end == off)
		blk_extents_add(extents, len, BLK_EXTENT_DATA);
	return ret;
}

/*
 * Asks for twice as much each time: a layer describes all that it is asked for, and who looks for one chunk
 * after another must not pay for the rest of the disk each time.
 */
static suspends int seek(struct blk *blk, uint64_t off, bool mapped, uint64_t *found_off)
{
	uint64_t size = blk->caps.size, window = SEEK_FIRST_BYTES;

	if (off > size)
		return -EINVAL;
	while (off < size) {
		struct blk_extent list[ROUNDED_EXTENTS_MAX];
		struct blk_extents extents;

		blk_extents_init(&extents, list, ARRAY_LEN(list));

		int ret = blk_extents(blk, off, MIN(size - off, window), &extents);

		if (ret < 0)
			return ret;
		window = MIN(2 * window, BLK_SIZE_MAX);
		for (unsigned i = 0; i < extents.count; off += list[i++].len) {
			if (!(list[i].flags & BLK_EXTENT_ZERO) == mapped) {
				*found_off = off;
				return 0;
			}
		}
	}
	*found_off = size;
	return 0;
}

suspends int blk_seek_mapped(struct blk *blk, uint64_t off, uint64_t *found_off)
{
	return seek(blk, off, true, found_off);
}

suspends int blk_seek_unmapped(struct blk *blk, uint64_t off, uint64_t *found_off)
{
	return seek(blk, off, false, found_off);
}
