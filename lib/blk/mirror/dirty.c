/*
 * What may differ between the legs, and what may differ after a failure.
 *
 * Dirty: a bit per chunk. Clear means: every byte of the chunk is the same on both legs, or a change of it
 * is under way to both. A chunk becomes clean by a copy step alone, and dirty by a failure alone: while the
 * secondary works, guests' changes of clean chunks go to both legs. So dirty_count falls steadily, whatever
 * guests do.
 *
 * Recent: a bit per region (of 1 MiB or more, at most 65536 of them) that was written on the secondary and
 * perhaps is not durable there. When the secondary fails, it may come back without these writes (its machine lost
 * power): then they are dirty. The settler makes them durable every few seconds, by a flush (of both legs where
 * there is a log, which may forget only what is durable on both): what
 * was recent when it began is `settling` meanwhile, and nothing afterwards. A change that is under way when
 * it begins may be missed by the flush, so it is marked again then.
 *
 * With an intent log, what is dirty or recent is on the disk before the first leg is written.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blk/mirror/mirror_private.h"

int mirror_map_create(
	const struct mirror *mirror, uint64_t size, struct mirror_map *map, struct err *err)
{
	/* A secondary that is not there yet may have any block size. */
	uint32_t secondary_block = mirror->secondary ? mirror->secondary->caps.block_size
						     : BLK_BLOCK_SIZE_MAX;
	uint64_t chunk_size = MAX(mirror->chunk_size, (uint64_t)mirror->primary->caps.block_size);

	*map = (struct mirror_map){ .chunk_size = MAX(chunk_size, (uint64_t)secondary_block) };
	while (size / map->chunk_size > MIRROR_CHUNKS_MAX)
		map->chunk_size *= 2;
	if (map->chunk_size > MIRROR_CHUNK_MAX)
		return err_set(err, EFBIG, "the disk is too large to be mirrored");
	map->chunk_count = (size + map->chunk_size - 1) / map->chunk_size;
	map->region_size = MAX((uint64_t)MIRROR_REGION_MIN, map->chunk_size);
	while (size / map->region_size >= MIRROR_REGIONS_MAX)
		map->region_size *= 2;
	map->region_count = (size + map->region_size - 1) / map->region_size;
	map->dirty = calloc(bitmap_words(map->chunk_count) + 1, sizeof(*map->dirty));
	return map->dirty ? 0
			  : err_set(err, ENOMEM, "no memory for a bitmap of %llu chunks",
				    (unsigned long long)map->chunk_count);
}

static void take_map(struct mirror *mirror, const struct mirror_map *map)
{
	free(mirror->dirty);
	mirror->dirty = map->dirty;
	mirror->dirty_count = 0;
	mirror->chunk_size = map->chunk_size;
	mirror->chunk_count = map->chunk_count;
	mirror->region_size = map->region_size;
	mirror->region_count = map->region_count;
}

int mirror_dirty_init(struct mirror *mirror, struct err *err)
{
	struct mirror_map map;
	int ret = mirror_map_create(mirror, mirror->blk.caps.size, &map, err);

	if (!ret)
		take_map(mirror, &map);
	return ret;
}

/* The units of unit_size that [off, off + len) touches. len is not 0. */
static void units_touched(
	uint64_t unit_size, uint64_t off, uint64_t len, uint64_t *first, uint64_t *count)
{
	*first = off / unit_size;
	*count = (off + len - 1) / unit_size - *first + 1;
}

/* --- dirty ------------------------------------------------------------------------------------ */

/* Sets or clears the chunks, keeping count. */
static void change(struct mirror *mirror, uint64_t first, uint64_t count, bool dirty)
{
	while (count) {
		uint64_t run = bitmap_run(mirror->dirty, first, count);

		if (bitmap_test(mirror->dirty, first) != dirty) {
			mirror->dirty_count += dirty ? run : -run;
			if (dirty)
				mirror_meter_add(&mirror->dirtied, run * mirror->chunk_size);
		}
		if (dirty)
			bitmap_set(mirror->dirty, first, run);
		else
			bitmap_clear(mirror->dirty, first, run);
		first += run;
		count -= run;
	}
}

void mirror_dirty_set(struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first, count;

	if (!len)
		return;
	units_touched(mirror->chunk_size, off, len, &first, &count);
	change(mirror, first, count, true);
}

/* Of chunks that the range covers; the disk may end in the midst of the last one. */
void mirror_dirty_clear(struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t end = off + len;
	uint64_t first = (off + mirror->chunk_size - 1) / mirror->chunk_size;
	uint64_t last = end == mirror->blk.caps.size ? mirror->chunk_count
						     : end / mirror->chunk_size;

	if (first < last)
		change(mirror, first, last - first, false);
}

bool mirror_dirty_all(const struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first, count;

	if (!mirror->dirty_count)
		return false;
	units_touched(mirror->chunk_size, off, len, &first, &count);
	return bitmap_test(mirror->dirty, first) &&
	       bitmap_run(mirror->dirty, first, count) == count;
}

bool mirror_dirty_any(const struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first, count;

	if (!mirror->dirty_count)
		return false;
	units_touched(mirror->chunk_size, off, len, &first, &count);
	return bitmap_test(mirror->dirty, first) || bitmap_run(mirror->dirty, first, count) < count;
}

bool mirror_dirty_next(const struct mirror *mirror, uint64_t off, uint64_t *start, uint64_t *len)
{
	/* Rounded up, for behind a short last chunk there is none. */
	uint64_t first = (off + mirror->chunk_size - 1) / mirror->chunk_size;

	if (!mirror->dirty_count || first >= mirror->chunk_count)
		return false;
	if (!bitmap_test(mirror->dirty, first))
		first += bitmap_run(mirror->dirty, first, mirror->chunk_count - first);
	if (first >= mirror->chunk_count)
		return false;

	uint64_t run = bitmap_run(mirror->dirty, first, mirror->chunk_count - first);
	uint64_t end = MIN((first + run) * mirror->chunk_size, mirror->blk.caps.size);

	*start = first * mirror->chunk_size;
	*len = end - *start;
	return true;
}

/* --- recent ----------------------------------------------------------------------------------- */

void mirror_want_settling(struct mirror *mirror)
{
	mirror->any_recent = true;
	co_queue_wake_all(&mirror->settle_wanted);
}

void mirror_recent_mark(struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first, count;

	units_touched(mirror->region_size, off, len, &first, &count);
	bitmap_set(mirror->recent, first, count);
	if (unlikely(!mirror->any_recent))
		mirror_want_settling(mirror);
}

bool mirror_recent_any(const struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first, count;

	units_touched(mirror->region_size, off, len, &first, &count);
	for (uint64_t i = first; i < first + count; i++)
		if (bitmap_test(mirror->recent, i) || bitmap_test(mirror->settling, i))
			return true;
	return false;
}

void mirror_recent_to_dirty(struct mirror *mirror)
{
	for (uint64_t i = 0; i < mirror->region_count; i++) {
		uint64_t off = i * mirror->region_size;
		uint64_t len = MIN(mirror->region_size, mirror->blk.caps.size - off);

		if (bitmap_test(mirror->recent, i) || bitmap_test(mirror->settling, i))
			mirror_dirty_set(mirror, off, len);
	}
}

void mirror_regions_needed(const struct mirror *mirror, uint64_t *regions)
{
	uint64_t start, len, first, count;

	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		regions[i] = mirror->recent[i] | mirror->settling[i];
	for (uint64_t off = 0; mirror_dirty_next(mirror, off, &start, &len); off = start + len) {
		units_touched(mirror->region_size, start, len, &first, &count);
		bitmap_set(regions, first, count);
	}
}

/* --- another size ----------------------------------------------------------------------------- */

/* What was recent in a region stays so in the one that has it now, or in all where that is not easily told. */
static void convert_recent(struct mirror *mirror, const struct mirror_map *map)
{
	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		mirror->recent[i] |= mirror->settling[i];
	memset(mirror->settling, 0, sizeof(mirror->settling));
	if (map->region_size != mirror->region_size)
		bitmap_set(mirror->recent, 0, map->region_count);
	else if (map->region_count < mirror->region_count)
		bitmap_clear(mirror->recent, map->region_count,
			mirror->region_count - map->region_count);
}

void mirror_map_replace(struct mirror *mirror, uint64_t size, const struct mirror_map *map)
{
	uint64_t start, len, first, count, dirty_count = 0;

	for (uint64_t off = 0; mirror_dirty_next(mirror, off, &start, &len); off = start + len) {
		if (start >= size)
			break;
		units_touched(map->chunk_size, start, MIN(len, size - start), &first, &count);
		bitmap_set(map->dirty, first, count);
	}
	for (uint64_t i = 0; i < bitmap_words(map->chunk_count); i++)
		dirty_count += (uint64_t)__builtin_popcountll(map->dirty[i]);
	convert_recent(mirror, map);
	take_map(mirror, map);
	mirror->dirty_count = dirty_count;
}

/* --- settling --------------------------------------------------------------------------------- */

/* What is recent becomes settling; what is being changed right now stays recent. */
static void begin_settling(struct mirror *mirror)
{
	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		mirror->settling[i] |= mirror->recent[i];
	memset(mirror->recent, 0, sizeof(mirror->recent));
	mirror->any_recent = false;
	list_for_each (link, &mirror->writes.held) {
		const struct range *range = list_entry(link, struct range, link);
		uint64_t end = MIN(range->off + range->len, mirror->blk.caps.size);

		if (range->off < end)
			mirror_recent_mark(mirror, range->off, end - range->off);
	}
}

static suspends void settle(struct mirror *mirror)
{
	unsigned degradations = mirror->degradations;

	if (mirror->log.end_untold)
		mirror_log_end_again(mirror);
	if (!mirror_leg_used(mirror))
		return;
	begin_settling(mirror);

	struct leg_op *op = leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL);
	int primary_ret = mirror->log.blk ? blk_flush(mirror->primary) : 0;
	int ret = leg_end(op);

	if (ret)
		mirror_degrade(mirror, "flush", 0, 0, ret);
	if (primary_ret) {
		mirror_primary_flush_failed(mirror, primary_ret);
		mirror->flush_untold = true;
	}
	if (ret || primary_ret || degradations != mirror->degradations) {
		/* Tried again with what comes then, or dirty by now. */
		for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
			mirror->recent[i] |= mirror->settling[i];
		mirror->any_recent = true;
	}
	memset(mirror->settling, 0, sizeof(mirror->settling));
	mirror_log_relax(mirror);
}

suspends void mirror_settle(struct mirror *mirror)
{
	co_mutex_lock(&mirror->settle_mutex);
	settle(mirror);
	co_mutex_unlock(&mirror->settle_mutex);
}

suspends void mirror_settler_run(void *arg)
{
	struct mirror *mirror = arg;

	while (!mirror->closing) {
		if (!mirror->any_recent) {
			co_queue_wait(&mirror->settle_wanted);
			continue;
		}
		uint64_t due_ns = reactor_now_ns() + MIRROR_SETTLE_NS;

		while (!mirror->closing && co_queue_wait_until(&mirror->settle_wanted, due_ns))
			;
		if (!mirror->closing)
			mirror_settle(mirror);
	}
}
