/*
 * Reference counts and allocation (format, "Host cluster management").
 *
 * Counts are changed in the cached refcount blocks only, under alloc_mutex; commits write them. A count
 * that is too high on disk is a leak, which is harmless; one that is too low never gets there, because
 * counts go up before anything points to the cluster (commit phase 1) and down only after nothing does.
 *
 * Where to allocate: first what was freed (from free_index on, a bounded search per call), else at the
 * end of the image, so that a fresh image is written from front to back. Clusters from fresh_index on
 * were never written, neither in this session nor before (the file ended there), so they read as zeroes.
 *
 * A refcount block that is missing for a region of the file is put at the first cluster wanted there. A
 * refcount table that is too short is replaced by a larger one right behind what the old one covers.
 */
#include "blk/qcow/qcow.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

/* Slices of refcount blocks looked through for a free cluster by one allocation. */
#define SEARCH_SLICES_MAX 16

/* Stretches of clusters given up that wait for a commit, at most. */
#define UNLINKED_MAX 16384

/* The file below grows by an eighth of its size, within these bounds, in one step. */
#define GROW_MIN_BYTES (UINT64_C(1) << 20)
#define GROW_MAX_BYTES (UINT64_C(128) << 20)

/* --- a count inside a slice ------------------------------------------------------------------- */

/* Widths below a byte: the first count is in the least significant bits. */
static uint64_t count_get(const struct qcow *q, const uint8_t *data, uint64_t i)
{
	uint64_t value = 0;

	if (q->refcount_bits < 8) {
		unsigned per_byte = 8 / q->refcount_bits;

		return data[i / per_byte] >> (i % per_byte * q->refcount_bits) &
		       ((1U << q->refcount_bits) - 1);
	}
	for (unsigned byte = 0, width = q->refcount_bits / 8; byte < width; byte++)
		value = value << 8 | data[i * width + byte];
	return value;
}

static void count_put(const struct qcow *q, uint8_t *data, uint64_t i, uint64_t value)
{
	if (q->refcount_bits < 8) {
		unsigned per_byte = 8 / q->refcount_bits;
		unsigned shift = (unsigned)(i % per_byte) * q->refcount_bits;
		unsigned mask = ((1U << q->refcount_bits) - 1) << shift;

		data[i / per_byte] = (uint8_t)((data[i / per_byte] & ~mask) | (unsigned)value
										      << shift);
		return;
	}
	for (unsigned width = q->refcount_bits / 8, byte = width; byte-- > 0; value >>= 8)
		data[i * width + byte] = (uint8_t)value;
}

static uint64_t count_max(const struct qcow *q)
{
	return q->refcount_bits == 64 ? UINT64_MAX : (UINT64_C(1) << q->refcount_bits) - 1;
}

static uint64_t counts_per_slice(const struct qcow *q)
{
	return (uint64_t)q->refcount_cache.slice_size * 8 / q->refcount_bits;
}

static uint64_t region_of(const struct qcow *q, uint64_t index)
{
	return index >> q->refblock_bits;
}

/* Offset in the image of the refcount block for cluster index, 0 when there is none. */
static uint64_t refblock_of(const struct qcow *q, uint64_t index)
{
	uint64_t region = region_of(q, index);

	return region < q->refcount_table_count ? q->refcount_table[region] & QCOW_REFTABLE_OFF_MASK
						: 0;
}

static suspends int get_slice(struct qcow *q, uint64_t index, struct slice **slice)
{
	uint64_t refblock_off = refblock_of(q, index);
	uint64_t in_region = index & ((UINT64_C(1) << q->refblock_bits) - 1);
	uint64_t slice_off = in_region / counts_per_slice(q) * q->refcount_cache.slice_size;

	if (!is_aligned(refblock_off, q->cluster_size) ||
		refblock_off >= blk_caps(q->blk.below)->size)
		return qcow_mark_corrupt(q, "refcount table entry %llu points to %llu",
			(unsigned long long)region_of(q, index), (unsigned long long)refblock_off);
	return cache_get(&q->refcount_cache, refblock_off + slice_off, slice);
}

suspends int qcow_refcount_get(struct qcow *q, uint64_t index, uint64_t *refcount)
{
	struct slice *slice;

	*refcount = 0;
	if (!refblock_of(q, index))
		return 0;
	int ret = get_slice(q, index, &slice);
	if (ret)
		return ret;
	*refcount = count_get(q, slice->data, index % counts_per_slice(q));
	cache_put(&q->refcount_cache, slice);
	return 0;
}

/* The count of a cluster became 0 (by -1), or is 0 no longer (1). */
static void note_used(struct qcow *q, uint64_t index, int change)
{
	if (index < q->counted_to)
		q->used_clusters += (uint64_t)(int64_t)change;
}

/* Adds delta to the counts from index on that lie in one slice; *done says how many. */
static suspends int add_in_slice(
	struct qcow *q, uint64_t index, uint64_t count, int64_t delta, uint64_t *done)
{
	uint64_t first = index % counts_per_slice(q);
	struct slice *slice;
	int ret = 0;

	*done = 0;
	if (!refblock_of(q, index))
		return qcow_mark_corrupt(q, "cluster %llu is in use but has no refcount block",
			(unsigned long long)index);
	ret = get_slice(q, index, &slice);
	if (ret)
		return ret;
	for (; *done < MIN(count, counts_per_slice(q) - first); ++*done) {
		uint64_t old = count_get(q, slice->data, first + *done);
		uint64_t new = old + (uint64_t)delta;

		if (delta < 0 ? old < (uint64_t)-delta : new < old || new > count_max(q)) {
			ret = -ERANGE;
			break;
		}
		count_put(q, slice->data, first + *done, new);
		note_used(q, index + *done, (new != 0) - (old != 0));
		if (!new)
			q->free_index = MIN(q->free_index, index + *done);
	}
	cache_mark_dirty(&q->refcount_cache, slice);
	cache_put(&q->refcount_cache, slice);
	return ret;
}

suspends int qcow_refcount_add(struct qcow *q, uint64_t index, uint64_t count, int64_t delta)
{
	uint64_t total = 0, done;

	while (total < count) {
		int ret = add_in_slice(q, index + total, count - total, delta, &done);

		total += done;
		if (ret) {
			/* Undo what went well: all or nothing. */
			for (uint64_t undone = 0; undone < total; undone += done)
				if (add_in_slice(q, index + undone, total - undone, -delta, &done))
					break;
			return ret;
		}
	}
	return 0;
}

#define COUNT_AT_ONCE 65536

suspends int qcow_count_used(struct qcow *q)
{
	uint64_t refcount;

	/* Whoever holds the mutex goes on where the count stands; a snapshot begins it anew. */
	while (q->counted_to < q->end_index) {
		int ret = qcow_refcount_get(q, q->counted_to, &refcount);

		if (ret)
			return ret;
		/* Nothing suspends from here on: who changes a count later notes it. */
		q->counted_to++;
		q->used_clusters += refcount != 0;
		if (q->counted_to % COUNT_AT_ONCE)
			continue;
		co_mutex_unlock(&q->moving);
		co_yield ();
		co_mutex_lock(&q->moving);
	}
	q->counted_to = UINT64_MAX;
	return 0;
}

/* --- metadata --------------------------------------------------------------------------------- */

static bool in_table(const struct qcow *q, uint64_t index, uint64_t off, uint64_t len)
{
	uint64_t first = off >> q->cluster_bits;

	return index >= first && index < first + ((len + q->cluster_size - 1) >> q->cluster_bits);
}

bool qcow_is_metadata(const struct qcow *q, uint64_t index)
{
	return !index ||
	       in_table(q, index, q->header.l1_off, q->header.l1_entry_count * UINT64_C(8)) ||
	       in_table(q, index, q->header.refcount_table_off,
		       (uint64_t)q->header.refcount_table_clusters << q->cluster_bits) ||
	       (q->header.snapshot_count && index == q->header.snapshots_off >> q->cluster_bits) ||
	       cluster_set_has(&q->metadata, index);
}

/* --- room in the file and in the tables ------------------------------------------------------- */

/* Makes the file below long enough for clusters up to end_index. */
static suspends int grow_file(struct qcow *q, uint64_t end_index)
{
	uint64_t needed = end_index << q->cluster_bits, size = blk_caps(q->blk.below)->size;
	uint64_t step = MIN(MAX(size / 8, GROW_MIN_BYTES), GROW_MAX_BYTES);

	if (needed <= size)
		return 0;
	if (needed >= QCOW_HOST_OFF_MAX)
		return -EFBIG;
	if (!q->below_grows)
		return -ENOSPC;
	return blk_resize(
		q->blk.below, round_up(MAX(needed, size + step), q->cluster_size), 0, NULL);
}

/* Counts clusters [index, index + count) for the first time; their refcount blocks exist. */
static suspends int claim(struct qcow *q, uint64_t index, uint64_t count)
{
	int ret = grow_file(q, index + count);

	if (!ret)
		ret = qcow_refcount_add(q, index, count, 1);
	if (ret)
		return ret;
	q->end_index = MAX(q->end_index, index + count);
	q->fresh_index = MAX(q->fresh_index, index + count);
	return 0;
}

/* The new block counts itself. From the table entry on nothing suspends: a commit takes both or neither. */
static suspends int link_own_refblock(struct qcow *q, uint64_t region, uint64_t index)
{
	uint64_t host_off = index << q->cluster_bits;
	uint64_t in_region = index & ((UINT64_C(1) << q->refblock_bits) - 1);
	uint64_t slice_off = in_region / counts_per_slice(q) * q->refcount_cache.slice_size;
	struct slice *slice;
	int ret = cache_get_new(&q->refcount_cache, host_off + slice_off, &slice);

	if (ret)
		return ret;
	q->refcount_table[region] = host_off;
	count_put(q, slice->data, in_region % counts_per_slice(q), 1);
	note_used(q, index, 1);
	cache_mark_dirty(&q->refcount_cache, slice);
	cache_put(&q->refcount_cache, slice);
	q->end_index = MAX(q->end_index, index + 1);
	q->fresh_index = MAX(q->fresh_index, index + 1);
	return 0;
}

/* A refcount block for `region`, at cluster index: in that region itself, or in one that has its block. */
static suspends int create_refblock(struct qcow *q, uint64_t region, uint64_t index)
{
	uint64_t host_off = index << q->cluster_bits;
	bool fresh = index >= q->fresh_index && q->below_grows;
	int ret = grow_file(q, index + 1);

	if (!ret && !fresh)
		ret = blk_zero(q->blk.below, host_off, q->cluster_size, BLK_NO_HOLE);
	if (ret)
		return ret;
	cache_forget(&q->refcount_cache, host_off, q->cluster_size);
	if (region == region_of(q, index)) {
		ret = link_own_refblock(q, region, index);
	} else {
		ret = claim(q, index, 1);
		if (!ret)
			q->refcount_table[region] = host_off;
	}
	if (ret)
		return ret;
	bitmap_set(q->refcount_table_dirty, region, 1);
	q->refcount_table_any_dirty = true;
	cluster_set_add(&q->metadata, index);
	return 0;
}

/* --- a larger refcount table ------------------------------------------------------------------ */

struct table_growth {
	uint64_t first; /* cluster index where table and new blocks go */
	uint64_t table_clusters, blocks;
	uint64_t entry_count;
};

/* The new table covers at least half as much again, and `needed` clusters. */
static struct table_growth plan_growth(const struct qcow *q, uint64_t needed)
{
	uint64_t per_cluster = q->cluster_size / 8, per_block = UINT64_C(1) << q->refblock_bits;
	struct table_growth plan = { .first = (uint64_t)q->refcount_table_count
					      << q->refblock_bits };
	uint64_t total = 0, entries = 0;

	do {
		uint64_t last = region_of(q, MAX(needed, plan.first + total)) + 2;

		plan.blocks = total / per_block + 1;
		entries = MAX(q->refcount_table_count * UINT64_C(3) / 2, last);
		plan.table_clusters = (entries + per_cluster - 1) / per_cluster;
	} while (total < plan.table_clusters + plan.blocks &&
		 (total = plan.table_clusters + plan.blocks));
	plan.entry_count = plan.table_clusters * per_cluster;
	return plan;
}

/* Writes the blocks that count the new table and themselves, and the new table. */
static suspends int write_grown_table(
	struct qcow *q, const struct table_growth *plan, const uint64_t *table)
{
	uint64_t total = plan->table_clusters + plan->blocks;
	uint64_t per_block = UINT64_C(1) << q->refblock_bits;
	uint64_t table_len = plan->table_clusters << q->cluster_bits;
	CLEANUP(free) uint8_t *buf = calloc(1, MAX(table_len, q->cluster_size));
	int ret = buf ? 0 : -ENOMEM;

	for (uint64_t block = 0; !ret && block < plan->blocks; block++) {
		memset(buf, 0, q->cluster_size);
		for (uint64_t i = 0; i < per_block && block * per_block + i < total; i++)
			count_put(q, buf, i, 1);
		ret = blk_write(q->blk.below,
			(plan->first + plan->table_clusters + block) << q->cluster_bits, buf,
			q->cluster_size, 0);
	}
	for (uint64_t i = 0; !ret && i < plan->entry_count; i++)
		((be64 *)buf)[i] = be64_make(table[i]);
	return ret ? ret
		   : blk_write(q->blk.below, plan->first << q->cluster_bits, buf, table_len, 0);
}

/* Switches the header to the grown table. Holds commit_mutex: nothing of the old table is dirty. */
static suspends int switch_table(struct qcow *q, const struct table_growth *plan, uint64_t *table)
{
	struct qcow_header old = q->header;
	int ret = grow_file(q, plan->first + plan->table_clusters + plan->blocks);

	if (!ret)
		ret = write_grown_table(q, plan, table);
	if (!ret)
		ret = blk_flush(q->blk.below);
	if (ret)
		return ret;
	q->header.refcount_table_off = plan->first << q->cluster_bits;
	q->header.refcount_table_clusters = (uint32_t)plan->table_clusters;
	ret = qcow_header_switch(q, &old);
	if (ret)
		return ret;
	freed_list_add(&q->committed, old.refcount_table_off >> q->cluster_bits,
		old.refcount_table_clusters);
	return 0;
}

/* Under alloc_mutex. Afterwards the table covers clusters up to `needed`. */
static suspends int grow_table(struct qcow *q, uint64_t needed)
{
	struct table_growth plan = plan_growth(q, needed);
	int ret;

	if (plan.table_clusters << q->cluster_bits > QCOW_REFTABLE_LEN_MAX_BYTES)
		return -EFBIG;
	uint64_t *table = calloc(plan.entry_count, sizeof(*table));
	uint64_t *dirty = calloc(bitmap_words(plan.entry_count), sizeof(*dirty));
	if (!table || !dirty) {
		free(table);
		free(dirty);
		return -ENOMEM;
	}
	co_mutex_lock(&q->commit_mutex);
	ret = qcow_commit_locked(q); /* counts and table on disk are now what they are in memory */
	memcpy(table, q->refcount_table, q->refcount_table_count * sizeof(*table));
	for (uint64_t block = 0; block < plan.blocks; block++)
		table[region_of(q, plan.first) + block] = (plan.first + plan.table_clusters + block)
							  << q->cluster_bits;
	if (!ret)
		ret = switch_table(q, &plan, table);
	co_mutex_unlock(&q->commit_mutex);
	if (ret) {
		free(table);
		free(dirty);
		return ret;
	}
	free(q->refcount_table);
	free(q->refcount_table_dirty);
	q->refcount_table = table;
	q->refcount_table_dirty = dirty;
	q->refcount_table_count = (uint32_t)plan.entry_count;
	for (uint64_t i = 0; i < plan.table_clusters + plan.blocks; i++)
		note_used(q, plan.first + i, 1);
	for (uint64_t block = 0; block < plan.blocks; block++)
		cluster_set_add(&q->metadata, plan.first + plan.table_clusters + block);
	q->free_index = MIN(q->free_index, q->end_index);
	q->end_index = plan.first + plan.table_clusters + plan.blocks;
	q->fresh_index = MAX(q->fresh_index, q->end_index);
	return 0;
}

/* --- allocation ------------------------------------------------------------------------------- */

/* Looks in one slice, from free_index on, for up to want free clusters; *got 0: none, free_index moved on. */
static suspends int search_slice(struct qcow *q, uint64_t want, uint64_t *index, uint64_t *got)
{
	uint64_t first = q->free_index % counts_per_slice(q);
	uint64_t slice_end = q->free_index - first + counts_per_slice(q);
	uint64_t end = MIN(slice_end, q->end_index); /* alloc_mutex keeps both where they are */
	struct slice *slice;

	*got = 0;
	if (!refblock_of(q, q->free_index)) {
		/* A region without a block inside the image: leave it, the end is good enough. */
		q->free_index = MIN(
			(region_of(q, q->free_index) + 1) << q->refblock_bits, q->end_index);
		return 0;
	}
	int ret = get_slice(q, q->free_index, &slice);
	if (ret)
		return ret;
	while (q->free_index < end &&
		count_get(q, slice->data, q->free_index % counts_per_slice(q)))
		q->free_index++;
	*index = q->free_index;
	while (*got < want && *index + *got < end &&
		!count_get(q, slice->data, (*index + *got) % counts_per_slice(q)))
		++*got;
	cache_put(&q->refcount_cache, slice);
	return 0;
}

/* At the end of the image: makes the tables cover the place and returns where it is. */
static suspends int prepare_end(struct qcow *q, uint64_t count, uint64_t *index)
{
	for (;;) {
		uint64_t covered = (uint64_t)q->refcount_table_count << q->refblock_bits;
		uint64_t region = region_of(q, q->end_index), last;
		int ret = 0;

		/* One cluster more per region: its block may have to go there too. */
		last = q->end_index + count + region_of(q, count) + 2;
		if (last > covered) {
			ret = grow_table(q, last);
			if (ret)
				return ret;
			continue;
		}
		last = region_of(q, q->end_index + count - 1);
		while (region <= last && q->refcount_table[region])
			region++;
		if (region > last) {
			*index = q->end_index;
			return 0;
		}
		ret = create_refblock(q, region, q->end_index);
		if (ret)
			return ret;
	}
}

static suspends int alloc_locked(
	struct qcow *q, uint64_t want, bool search, uint64_t *index, uint64_t *got)
{
	int ret = 0;

	*got = 0;
	for (int i = 0; search && i < SEARCH_SLICES_MAX && q->free_index < q->end_index; i++) {
		ret = search_slice(q, want, index, got);
		if (ret || *got)
			break;
	}
	if (!ret && !*got) {
		ret = prepare_end(q, want, index);
		*got = want;
	}
	return ret;
}

static suspends int alloc(
	struct qcow *q, uint64_t want, bool search, uint64_t *host_off, uint64_t *got, bool *fresh)
{
	uint64_t index = 0;

	co_mutex_lock(&q->alloc_mutex);
	int ret = q->frozen ? -EIO : alloc_locked(q, want, search, &index, got);
	if (!ret) {
		*fresh = index >= q->fresh_index && q->below_grows;
		ret = claim(q, index, *got);
	}
	if (!ret) {
		if (q->free_index == index)
			q->free_index = index + *got;
		*host_off = index << q->cluster_bits;
		q->stats.allocated += *got;
	}
	co_mutex_unlock(&q->alloc_mutex);
	return ret;
}

suspends int qcow_alloc(
	struct qcow *q, uint64_t want, uint64_t *host_off, uint64_t *got, bool *fresh)
{
	return alloc(q, want, true, host_off, got, fresh);
}

suspends int qcow_alloc_exactly(struct qcow *q, uint64_t count, uint64_t *host_off, bool *fresh)
{
	uint64_t got;

	return alloc(q, count, count == 1, host_off, &got, fresh);
}

/* --- compaction ------------------------------------------------------------------------------- */

/* Under alloc_mutex. count contiguous clusters below limit; fewer in a row are passed over. */
static suspends int alloc_below_locked(
	struct qcow *q, uint64_t limit, uint64_t count, uint64_t *index)
{
	uint64_t end = MIN(limit, q->end_index), got = 0, first_free = UINT64_MAX;
	int ret = -ENOSPC;

	while (q->free_index + count <= end) {
		ret = search_slice(q, count, index, &got);
		if (ret || got == count)
			break;
		ret = -ENOSPC;
		if (got) {
			first_free = MIN(first_free, *index);
			q->free_index = *index + got;
		}
	}
	if (!ret)
		ret = *index + count <= end ? claim(q, *index, count) : -ENOSPC;
	q->free_index = MIN(q->free_index, first_free);
	return ret;
}

suspends void qcow_search_anew(struct qcow *q)
{
	co_mutex_lock(&q->alloc_mutex);
	q->free_index = 0;
	co_mutex_unlock(&q->alloc_mutex);
}

suspends int qcow_alloc_below(struct qcow *q, uint64_t limit, uint64_t *host_off)
{
	uint64_t index;

	co_mutex_lock(&q->alloc_mutex);
	int ret = alloc_below_locked(q, limit, 1, &index);
	co_mutex_unlock(&q->alloc_mutex);
	if (!ret)
		*host_off = index << q->cluster_bits;
	return ret;
}

/* Under alloc_mutex, so the counts stand still. The old block is free once the table is durable. */
static suspends int move_refblock(struct qcow *q, uint64_t region, uint64_t index)
{
	uint64_t old_off = q->refcount_table[region] & QCOW_REFTABLE_OFF_MASK;
	uint64_t new_off = index << q->cluster_bits;
	uint32_t step = q->refcount_cache.slice_size;

	cache_forget(&q->refcount_cache, new_off, q->cluster_size);
	for (uint64_t at = 0; at < q->cluster_size; at += step) {
		struct slice *slice;
		int ret = cache_get(&q->refcount_cache, old_off + at, &slice);

		if (ret)
			return ret;
		ret = blk_write(q->blk.below, new_off + at, slice->data, step, 0);
		cache_put(&q->refcount_cache, slice);
		if (ret)
			return ret;
	}
	cache_forget(&q->refcount_cache, old_off, q->cluster_size);
	q->refcount_table[region] = new_off;
	bitmap_set(q->refcount_table_dirty, region, 1);
	q->refcount_table_any_dirty = true;
	cluster_set_add(&q->metadata, index);
	qcow_free_unlinked(q, old_off, 1);
	return 0;
}

/* Writes the refcount table as it is to host_off and has the header point there. Holds both mutexes. */
static suspends int store_table_at(struct qcow *q, uint64_t host_off)
{
	size_t len = (size_t)q->header.refcount_table_clusters << q->cluster_bits;
	struct qcow_header old = q->header;
	CLEANUP(free) be64 *copy = malloc(len);
	int ret = copy ? qcow_commit_locked(q) : -ENOMEM;

	if (ret)
		return ret;
	for (size_t i = 0; i < q->refcount_table_count; i++)
		copy[i] = be64_make(q->refcount_table[i]);
	ret = blk_write(q->blk.below, host_off, copy, len, 0);
	if (!ret)
		ret = blk_flush(q->blk.below);
	if (ret)
		return ret;
	q->header.refcount_table_off = host_off;
	return qcow_header_switch(q, &old);
}

suspends int qcow_move_refcount_table(struct qcow *q, uint64_t mark)
{
	uint64_t old_off = q->header.refcount_table_off, index;
	uint32_t clusters = q->header.refcount_table_clusters;

	if (old_off >> q->cluster_bits < mark)
		return 0;
	co_mutex_lock(&q->alloc_mutex);
	q->free_index = 0; /* several in a row may be where single ones were looked for in vain */
	int ret = alloc_below_locked(q, mark, clusters, &index);
	if (!ret) {
		co_mutex_lock(&q->commit_mutex);
		ret = store_table_at(q, index << q->cluster_bits);
		co_mutex_unlock(&q->commit_mutex);
		freed_list_add(ret ? &q->unlinked : &q->committed,
			ret ? index : old_off >> q->cluster_bits, clusters);
	}
	co_mutex_unlock(&q->alloc_mutex);
	return ret;
}

suspends int qcow_move_refblocks(struct qcow *q, uint64_t mark)
{
	int ret = 0;

	co_mutex_lock(&q->alloc_mutex);
	for (uint64_t region = 0; !ret && region < q->refcount_table_count; region++) {
		uint64_t old_index = q->refcount_table[region] >> q->cluster_bits, index;

		if (old_index < mark)
			continue;
		ret = alloc_below_locked(q, mark, 1, &index);
		if (!ret)
			ret = move_refblock(q, region, index);
	}
	co_mutex_unlock(&q->alloc_mutex);
	return ret;
}

/* The first cluster behind everything in use. */
static suspends int find_used_end(struct qcow *q, uint64_t *end)
{
	for (*end = q->end_index; *end > 1; --*end) {
		uint64_t refcount;
		int ret = qcow_refcount_get(q, *end - 1, &refcount);

		if (ret || refcount)
			return ret;
	}
	return 0;
}

/* Under alloc_mutex. Regions that lie wholly behind `end` lose their blocks. */
static suspends int drop_refblocks_behind(struct qcow *q, uint64_t end)
{
	uint64_t first = region_of(q, end - 1) + 1;

	for (uint64_t region = first; region < q->refcount_table_count; region++) {
		uint64_t block_off = q->refcount_table[region] & QCOW_REFTABLE_OFF_MASK;

		if (!block_off)
			continue;
		cluster_set_remove(&q->metadata, block_off >> q->cluster_bits);
		q->refcount_table[region] = 0;
		bitmap_set(q->refcount_table_dirty, region, 1);
		q->refcount_table_any_dirty = true;
		cache_forget(&q->refcount_cache, block_off, q->cluster_size);
		if (block_off >> q->cluster_bits < end)
			qcow_free_unlinked(q, block_off, 1);
	}
	return qcow_commit(q);
}

suspends int qcow_cut_end(struct qcow *q)
{
	uint64_t end;

	co_mutex_lock(&q->alloc_mutex);
	int ret = find_used_end(q, &end);
	if (!ret)
		ret = drop_refblocks_behind(q, end);
	if (!ret) {
		q->end_index = end;
		q->free_index = MIN(q->free_index, end);
		if (q->below_grows && end << q->cluster_bits < blk_caps(q->blk.below)->size)
			ret = blk_resize(q->blk.below, end << q->cluster_bits, BLK_FORCE, NULL);
		/* Without a cut, what lies behind may hold anything: fresh_index stays. */
		if (!ret && q->below_grows)
			q->fresh_index = end;
	}
	co_mutex_unlock(&q->alloc_mutex);
	return ret;
}

/* --- giving back ------------------------------------------------------------------------------ */

suspends void qcow_free_unused(struct qcow *q, uint64_t host_off, uint64_t count)
{
	co_mutex_lock(&q->alloc_mutex);
	if (!qcow_refcount_add(q, host_off >> q->cluster_bits, count, -1))
		q->stats.freed += count;
	co_mutex_unlock(&q->alloc_mutex);
}

/* The list must not grow without bounds while nobody flushes. */
static void give_up(struct qcow *q, uint64_t index, uint64_t count)
{
	freed_list_add(&q->unlinked, index, count);
	if (q->unlinked.count > UNLINKED_MAX)
		qcow_commit_soon(q);
}

void qcow_free_unlinked(struct qcow *q, uint64_t host_off, uint64_t count)
{
	give_up(q, host_off >> q->cluster_bits, count);
}

void qcow_free_entry(struct qcow *q, const struct l2_entry *entry)
{
	if (entry->compressed) {
		uint64_t first = entry->host_off >> q->cluster_bits;
		uint64_t last = (entry->host_off + entry->compressed_len - 1) >> q->cluster_bits;

		qcow_inflated_forget(q);
		give_up(q, first, last - first + 1);
	} else if (entry->host_off && !q->data_file) {
		qcow_free_unlinked(q, entry->host_off, 1);
	}
}
