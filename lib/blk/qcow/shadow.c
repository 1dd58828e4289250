/*
 * Changing many counts and tables of an image in one step. See shadow.h.
 *
 * The counts live in shadow->refs. A cluster is free for use here when its new count is 0 and it is not pinned:
 * pinned are those the old image needs and the new one does not. Writing the refcount blocks is a
 * search for a fixed point: a block that changes moves to another cluster, which changes counts, which may
 * change another block; each moves at most once, so it ends.
 */
#include "blk/qcow/shadow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/cleanup.h"

/* --- counts ----------------------------------------------------------------------------------- */

void shadow_init_with(struct shadow *shadow, struct image *image, struct refs *refs, bool rebuild)
{
	*shadow = (struct shadow){
		.image = image,
		.header = *image->header,
		.refs = *refs,
		.cursor = 1,
		.old_size = image->file_size,
		.rebuild = rebuild,
	};
	memset(refs, 0, sizeof(*refs));
	refs_init(&shadow->pinned, 0);
}

int shadow_reserve(struct shadow *shadow, struct refs *refs)
{
	uint64_t end = image_clusters_for(shadow->image, shadow->old_size);
	int ret = 0;

	refs_fini(&shadow->pinned);
	shadow->pinned = *refs;
	memset(refs, 0, sizeof(*refs));
	for (uint64_t i = end; i < shadow->pinned.count && !ret; i++)
		ret = refs_set(&shadow->refs, i, refs_get(&shadow->pinned, i));
	return ret;
}

static suspends int load_block(struct image *image, struct refs *refs, uint64_t block_index)
{
	const uint8_t *block;
	int ret = image_refcount_block(image, block_index, &block);

	for (uint64_t i = 0; i < image->block_entries && !ret && block; i++) {
		uint64_t count = refcount_entry_get(block, image->header->refcount_order, i);

		if (count)
			ret = refs_set(refs, block_index * image->block_entries + i, count);
	}
	return ret;
}

suspends int shadow_init(struct shadow *shadow, struct image *image, struct err *err)
{
	struct refs refs;
	int ret = 0;

	refs_init(&refs, image->header->refcount_order);
	for (uint64_t i = 0; i < image->refcount_table_count && !ret; i++)
		ret = load_block(image, &refs, i);
	shadow_init_with(shadow, image, &refs, false);
	if (!ret)
		return 0;
	shadow_fini(shadow);
	return ret == -ENOMEM
		       ? err_set(err, ENOMEM, "no memory for the refcounts")
		       : err_set(err, EUCLEAN,
				 "the refcounts cannot be read: the image needs to be repaired");
}

void shadow_fini(struct shadow *shadow)
{
	refs_fini(&shadow->refs);
	refs_fini(&shadow->pinned);
}

static int add_one(struct shadow *shadow, uint64_t index, int delta)
{
	uint64_t count = refs_get(&shadow->refs, index);
	int ret;

	if (delta < 0 && count < (uint64_t)-delta)
		return -ERANGE;
	count += (uint64_t)(int64_t)delta;
	ret = refs_set(&shadow->refs, index, count);
	return ret || count ? ret : refs_set(&shadow->pinned, index, 1);
}

int shadow_add(struct shadow *shadow, uint64_t host_off, uint64_t len, int delta)
{
	unsigned bits = shadow->image->cluster_bits;
	int ret = 0;

	for (uint64_t i = host_off >> bits; len && i <= (host_off + len - 1) >> bits && !ret; i++)
		ret = add_one(shadow, i, delta);
	return ret;
}

int shadow_give_up(struct shadow *shadow, uint64_t host_off, uint64_t len)
{
	unsigned bits = shadow->image->cluster_bits;
	int ret = 0;

	for (uint64_t i = host_off >> bits; len && i <= (host_off + len - 1) >> bits && !ret; i++)
		if (refs_get(&shadow->refs, i))
			ret = add_one(shadow, i, -1);
	return ret;
}

/* --- clusters --------------------------------------------------------------------------------- */

static bool is_free(const struct shadow *shadow, uint64_t index)
{
	return !refs_get(&shadow->refs, index) && !refs_get(&shadow->pinned, index);
}

static suspends int grow_file(struct shadow *shadow, uint64_t end)
{
	struct blk *file = shadow->image->file;

	if (end <= blk_caps(file)->size)
		return 0;
	int ret = blk_resize(file, end, 0, NULL);
	return blk_caps(file)->size >= end ? 0 : ret ? ret : -ENOSPC;
}

suspends int shadow_alloc(
	struct shadow *shadow, uint64_t count, uint64_t refcount, uint64_t *host_off)
{
	uint64_t first, run = 0;
	int ret;

	while (!is_free(shadow, shadow->cursor))
		shadow->cursor++;
	for (first = shadow->cursor; run < count;) {
		if (is_free(shadow, first + run)) {
			run++;
		} else {
			first += run + 1;
			run = 0;
		}
	}
	if ((first + count) << shadow->image->cluster_bits > QCOW_HOST_OFF_MAX)
		return -EFBIG;
	ret = grow_file(shadow, (first + count) << shadow->image->cluster_bits);
	for (uint64_t i = 0; i < count && !ret; i++)
		ret = refs_set(&shadow->refs, first + i, refcount);
	*host_off = first << shadow->image->cluster_bits;
	return ret;
}

suspends int shadow_write(struct shadow *shadow, uint64_t host_off, const void *buf, uint64_t len)
{
	int ret = 0;

	for (uint64_t at = 0; at < len && !ret; at += BLK_REQUEST_MAX)
		ret = blk_write(shadow->image->file, host_off + at, (const uint8_t *)buf + at,
			MIN(len - at, BLK_REQUEST_MAX), 0);
	return ret;
}

suspends int shadow_write_words(
	struct shadow *shadow, uint64_t host_off, const uint64_t *words, uint64_t count)
{
	uint64_t len = round_up(count * 8, shadow->image->cluster_size);
	CLEANUP(free) be64 *table = calloc(1, len);

	if (!table)
		return -ENOMEM;
	for (uint64_t i = 0; i < count; i++)
		table[i] = be64_make(words[i]);
	return shadow_write(shadow, host_off, table, len);
}

/* --- refcount structures ---------------------------------------------------------------------- */

/* The blocks of the new image while they are placed. */
struct placement {
	uint64_t *table; /* the new refcount table */
	uint64_t count;  /* its entries */
	uint64_t *moved; /* bitmap: blocks that are written anew */
	uint64_t table_off, table_clusters;
	uint8_t *block; /* a buffer */
};

static uint64_t blocks_needed(const struct shadow *shadow)
{
	uint64_t entries = shadow->image->block_entries;

	return shadow->refs.count / entries + !!(shadow->refs.count % entries);
}

/* False when all its counts are 0. */
static bool encode_block(const struct shadow *shadow, uint64_t index, uint8_t *block)
{
	const struct image *image = shadow->image;
	uint64_t first = index * image->block_entries;
	bool any = false;

	memset(block, 0, image->cluster_size);
	for (uint64_t i = 0; i < image->block_entries; i++) {
		if (refs_chunk_empty(&shadow->refs, first + i)) {
			i = ((first + i) | (REFS_CHUNK - 1)) - first;
			continue;
		}
		uint64_t count = refs_get(&shadow->refs, first + i);
		if (!count)
			continue;
		any = true;
		refcount_entry_put(block, image->header->refcount_order, i, count);
	}
	return any;
}

static bool entry_is_sound(const struct shadow *shadow, uint64_t entry)
{
	return !(entry & IMAGE_REFTABLE_RESERVED) &&
	       is_aligned(entry, shadow->image->cluster_size) && entry < shadow->image->file_size;
}

static int make_room(const struct shadow *shadow, struct placement *place)
{
	uint64_t count = MAX(blocks_needed(shadow), shadow->image->refcount_table_count);
	uint64_t *table, *moved;

	if (count <= place->count)
		return 0;
	table = realloc(place->table, count * sizeof(*table));
	if (!table)
		return -ENOMEM;
	place->table = table;
	moved = realloc(place->moved, bitmap_words(count) * sizeof(*moved));
	if (!moved)
		return -ENOMEM;
	memset(moved + bitmap_words(place->count), 0,
		(bitmap_words(count) - bitmap_words(place->count)) * sizeof(*moved));
	memset(table + place->count, 0, (count - place->count) * sizeof(*table));
	place->moved = moved;
	place->count = count;
	return 0;
}

/* Does the block on disk differ from the counts? Its old place is given up, and a new one found. */
static suspends int place_block(
	struct shadow *shadow, struct placement *place, uint64_t index, bool *changed)
{
	struct image *image = shadow->image;
	uint64_t old_entry = index < image->refcount_table_count ? image->refcount_table[index] : 0;
	const uint8_t *on_disk = NULL;
	bool any = false;
	int ret = 0;

	if (!old_entry && index >= blocks_needed(shadow))
		return 0;
	if (!shadow->rebuild)
		ret = image_refcount_block(image, index, &on_disk);
	if (ret)
		return ret;
	if (on_disk || index < blocks_needed(shadow))
		any = encode_block(shadow, index, place->block);
	if (!shadow->rebuild &&
		(on_disk ? !memcmp(on_disk, place->block, image->cluster_size) : !any))
		return 0;
	*changed = true;
	bitmap_set(place->moved, index, 1);
	place->table[index] = 0;
	if (old_entry && entry_is_sound(shadow, old_entry))
		ret = shadow_give_up(shadow, old_entry, image->cluster_size);
	return ret || !any ? ret : shadow_alloc(shadow, 1, 1, &place->table[index]);
}

/* A new table when a block has moved: of the old size, or what is needed. */
static suspends int place_table(struct shadow *shadow, struct placement *place)
{
	const struct image *image = shadow->image;
	uint64_t needed = image_clusters_for(image, blocks_needed(shadow) * 8);
	int ret;

	needed = MAX(needed, (uint64_t)image->header->refcount_table_clusters);
	if (place->table_off && needed <= place->table_clusters)
		return 0;
	if (needed * image->cluster_size > QCOW_REFTABLE_LEN_MAX_BYTES)
		return -EFBIG;
	if (place->table_off)
		ret = shadow_add(
			shadow, place->table_off, place->table_clusters * image->cluster_size, -1);
	else
		ret = shadow_give_up(shadow, image->header->refcount_table_off,
			image->header->refcount_table_clusters * image->cluster_size);
	place->table_clusters = needed;
	return ret ? ret : shadow_alloc(shadow, needed, 1, &place->table_off);
}

/* Until no block changes any more. */
static suspends int place_all(struct shadow *shadow, struct placement *place)
{
	bool changed = true;
	int ret = make_room(shadow, place);

	for (uint64_t i = 0; i < shadow->image->refcount_table_count && !ret; i++)
		place->table[i] = shadow->rebuild ? 0 : shadow->image->refcount_table[i];
	while (changed && !ret) {
		changed = false;
		ret = place_table(shadow, place);
		for (uint64_t i = 0; i < place->count && !ret; i++)
			if (!bitmap_test(place->moved, i))
				ret = place_block(shadow, place, i, &changed);
		/* A block that had nothing to count may have got something meanwhile. */
		for (uint64_t i = 0; i < place->count && !ret; i++)
			if (bitmap_test(place->moved, i) && !place->table[i] &&
				i < blocks_needed(shadow) &&
				encode_block(shadow, i, place->block)) {
				changed = true;
				ret = shadow_alloc(shadow, 1, 1, &place->table[i]);
			}
		if (!ret)
			ret = make_room(shadow, place);
		changed |= image_clusters_for(shadow->image, blocks_needed(shadow) * 8) >
			   place->table_clusters;
	}
	return ret;
}

static suspends int write_refcounts(struct shadow *shadow, struct placement *place)
{
	uint64_t cluster_size = shadow->image->cluster_size;
	uint64_t count = place->table_clusters * cluster_size / 8;
	int ret = 0;

	for (uint64_t i = 0; i < place->count && !ret; i++) {
		if (!bitmap_test(place->moved, i) || !place->table[i])
			continue;
		encode_block(shadow, i, place->block);
		ret = shadow_write(shadow, place->table[i], place->block, cluster_size);
	}
	shadow->header.refcount_table_off = place->table_off;
	shadow->header.refcount_table_clusters = (uint32_t)place->table_clusters;
	return ret ? ret
		   : shadow_write_words(
			     shadow, place->table_off, place->table, MIN(place->count, count));
}

/* --- the step --------------------------------------------------------------------------------- */

static suspends int prepare(struct shadow *shadow)
{
	struct placement place = { .block = malloc(shadow->image->cluster_size) };
	int ret = place.block ? place_all(shadow, &place) : -ENOMEM;

	if (!ret)
		ret = write_refcounts(shadow, &place);
	free(place.block);
	free(place.table);
	free(place.moved);
	return ret ? ret : blk_flush(shadow->image->file);
}

/* Failing to give space back harms nobody. */
static suspends void discard_freed(struct shadow *shadow)
{
	struct blk *file = shadow->image->file;
	unsigned bits = shadow->image->cluster_bits;
	uint64_t size = blk_caps(file)->size, run = 0, i;

	for (i = 0; i <= shadow->pinned.count; i++) {
		bool freed = refs_get(&shadow->pinned, i) && !refs_get(&shadow->refs, i);

		if (freed) {
			run++;
		} else if (run) {
			uint64_t host_off = (i - run) << bits;

			if (host_off < size)
				blk_discard(file, host_off, MIN(run << bits, size - host_off), 0);
			run = 0;
		}
	}
}

suspends int shadow_commit(struct shadow *shadow, bool discard, bool *unknown)
{
	struct blk *file = shadow->image->file;
	int ret = prepare(shadow);

	*unknown = false;
	if (ret) {
		shadow_abort(shadow);
		return ret;
	}
	ret = qcow_header_write(file, &shadow->header);
	if (!ret)
		ret = blk_flush(file);
	*unknown = ret;
	if (!ret && discard)
		discard_freed(shadow);
	return ret;
}

suspends void shadow_abort(struct shadow *shadow)
{
	if (blk_caps(shadow->image->file)->size > shadow->old_size)
		blk_resize(shadow->image->file, shadow->old_size, BLK_FORCE, NULL);
}
