/*
 * padded: makes a disk look longer, up to a size or to the next multiple of an alignment, with zeroes
 * behind its end. For images of odd sizes, which doors and the kernel round down or refuse.
 *
 * What lies beyond the end of what is below reads as zeroes and takes no space. A write that reaches
 * there first grows what is below to the size seen (grow = true), or fails with -ENOSPC and writes
 * nothing. What is below may also be grown by others; it is never hidden: the size seen is the larger one.
 *
 * It takes requests as they come, and leaves to what is below to align and split them: so a write is
 * refused whole. All sizes are multiples of the block size below, though.
 *
 * A resize changes what is below; of a shrink that stays beyond its end only the padding is affected.
 */
#include <errno.h>
#include <string.h>

#include "base/units.h"
#include "base/util.h"
#include "blk/blk.h"
#include "blk/layers.h"

struct padded {
	struct blk blk;
	uint64_t size;  /* at least so much is seen; 0 when align is given */
	uint64_t align; /* what is seen is a multiple of this; 0 when size is given */
	bool grow;
	struct co_mutex growing;
};

static const struct opt padded_options[] = {
	{ "size", OPT_SIZE, offsetof(struct padded, size), .min = 1, .max = BLK_SIZE_MAX,
		.help = "size to pad to (more is seen when what is below is larger)" },
	{ "align", OPT_SIZE, offsetof(struct padded, align), .min = 1, .max = 1 << 30, .pow2 = true,
		.help = "pad to a multiple of this" },
	{ "grow", OPT_BOOL, offsetof(struct padded, grow), .fallback = "false",
		.help = "a write into the padding grows what is below, instead of failing" },
	{ 0 },
};

static struct padded *to_padded(struct blk *blk)
{
	return container_of(blk, struct padded, blk);
}

static uint64_t below_size(const struct blk *blk)
{
	return blk_caps(blk->below)->size;
}

/* How much of [off, off + len) what is below has. */
static uint64_t len_below(const struct blk *blk, uint64_t off, uint64_t len)
{
	uint64_t end = below_size(blk);

	return off < end ? MIN(len, end - off) : 0;
}

static uint64_t padded_size(struct blk *blk)
{
	struct padded *padded = to_padded(blk);

	return padded->align ? round_up(below_size(blk), padded->align)
			     : MAX(below_size(blk), padded->size);
}

static int padded_check(const struct blk *blk, struct err *err)
{
	const struct padded *padded = container_of(blk, struct padded, blk);

	if (!padded->size == !padded->align)
		return err_set(err, EINVAL, "give either \"size\" or \"align\"");
	return 0;
}

static suspends int padded_open(struct blk *blk, struct err *err)
{
	struct padded *padded = to_padded(blk);
	uint32_t block_size = blk_caps(blk->below)->block_size;

	co_mutex_init(&padded->growing);
	if (padded->align && padded->align < block_size)
		return err_set(err, EINVAL, "\"align\" is less than the block size below it, %u",
			block_size);
	blk->caps.size = padded_size(blk);
	blk->caps.block_size = blk->caps.mem_align = 1;
	blk->caps.max_request = BLK_REQUEST_MAX;
	return blk_check_size(blk->conf, padded->size, block_size, err);
}

static suspends int padded_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	size_t len_there = len_below(blk, off, len);

	memset((char *)buf + len_there, 0, len - len_there);
	return len_there ? blk_read(blk->below, off, buf, len_there) : 0;
}

/* Makes sure that what is below reaches to end. Others may grow it while we wait. */
static suspends int reach(struct blk *blk, uint64_t end)
{
	struct padded *padded = to_padded(blk);
	int ret = 0;

	if (likely(end <= below_size(blk)))
		return 0;
	if (!padded->grow)
		return -ENOSPC;
	co_mutex_lock(&padded->growing);
	if (end > below_size(blk))
		ret = blk_resize(blk->below, blk->caps.size, 0, NULL);
	co_mutex_unlock(&padded->growing);
	return ret < 0 ? -ENOSPC : 0;
}

static suspends int padded_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	int ret = reach(blk, off + len);

	return ret ? ret : blk_write(blk->below, off, buf, len, flags);
}

/* The padding is zero already. Where it may become space, BLK_NO_HOLE asks for that. */
static suspends int padded_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	int ret = flags & BLK_NO_HOLE && to_padded(blk)->grow ? reach(blk, off + len) : 0;
	uint64_t len_there = len_below(blk, off, len);

	return ret || !len_there ? ret : blk_zero(blk->below, off, len_there, flags);
}

static suspends int padded_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t len_there = len_below(blk, off, len);

	return len_there ? blk_discard(blk->below, off, len_there, flags) : 0;
}

static suspends int padded_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	uint64_t len_there = len_below(blk, off, len);
	int ret = len_there ? blk_extents(blk->below, off, len_there, extents) : 0;

	if (!ret && extents->end == off + len_there)
		blk_extents_add(extents, len - len_there, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	return ret;
}

static suspends int padded_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct padded *padded = to_padded(blk);
	uint64_t old_size = padded->size;
	int ret = 0;

	size = round_up(size, blk_caps(blk->below)->block_size);
	if (!padded->align)
		padded->size = size;
	if (size < below_size(blk) || size > blk->caps.size)
		ret = blk_resize(blk->below, size, flags, err);
	if (ret < 0)
		padded->size = old_size;
	blk_size_changed(blk, padded_size(blk));
	return ret;
}

static void padded_child_resized(struct blk *blk, struct blk *child)
{
	blk_size_changed(blk, padded_size(blk));
}

const struct blk_ops padded_ops = {
	.name = "padded",
	.summary = "zeroes behind the end of a disk, up to a size or alignment",
	.options = padded_options,
	.struct_size = sizeof(struct padded),
	.check = padded_check,
	.open = padded_open,
	.read = padded_read,
	.write = padded_write,
	.zero = padded_zero,
	.discard = padded_discard,
	.extents = padded_extents,
	.resize = padded_resize,
	.child_resized = padded_child_resized,
};
