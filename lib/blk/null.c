/*
 * null: a disk of zeroes that forgets what is written to it.
 *
 * For measuring everything above it, and the example of a layer: a struct that begins with struct blk,
 * a table of options, the ops, and a line in registry.c.
 */
#include <string.h>

#include "base/util.h"
#include "blk/blk.h"
#include "blk/layers.h"

struct null {
	struct blk blk;
	uint64_t block_size; /* the size goes straight to caps */
};

static const struct opt null_options[] = {
	{ "size", OPT_SIZE, offsetof(struct blk, caps.size), "1G", .min = 1, .help = "its size" },
	{ "block-size", OPT_SIZE, offsetof(struct null, block_size), "1", .min = 1,
		.max = BLK_BLOCK_SIZE_MAX, .pow2 = true, .help = "smallest unit of access" },
	{ 0 },
};

static suspends int null_open(struct blk *blk, struct err *err)
{
	struct null *null = container_of(blk, struct null, blk);

	blk->caps.block_size = (uint32_t)null->block_size;
	blk->caps.fua = blk->caps.zero_fast = blk->caps.discard = blk->caps.grows = true;
	blk->caps.dies_with_process = true;
	return blk_check_size(blk->conf, blk->caps.size, null->block_size, err);
}

static suspends int null_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	memset(buf, 0, len);
	return 0;
}

static suspends int null_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return 0;
}

static suspends int null_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return 0;
}

static suspends int null_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	blk_extents_add(extents, len, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	return 0;
}

static suspends int null_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	blk_size_changed(blk, size);
	return 0;
}

const struct blk_ops null_ops = {
	.name = "null",
	.summary = "a disk of zeroes that forgets what is written to it",
	.options = null_options,
	.struct_size = sizeof(struct null),
	.is_leaf = true,
	.open = null_open,
	.read = null_read,
	.write = null_write,
	.zero = null_zero,
	.extents = null_extents,
	.resize = null_resize,
};
