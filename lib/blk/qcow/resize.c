/*
 * Resize of a qcow2 disk. Called drained: no request is under way; a compaction waits.
 *
 * Growing: an L1 table with room gets more entries; one without moves to new clusters. Size and L1
 * table change with one store of the header, after the new table is durable. What lay hidden behind the old end
 * is zeroed first, so that it does not appear: the rest of a longer backing, and what others that shrank
 * the image, such as qemu-img, left in its last cluster.
 *
 * Shrinking: what lies beyond is discarded, and that is made durable, before the size changes. So it reads
 * as zeroes if the disk grows again, and a crash in between only loses what was to be lost.
 *
 * An external data file grows before the disk and is cut after it.
 */
#include "blk/qcow/qcow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

static uint64_t l1_entries_for(const struct qcow *q, uint64_t size)
{
	unsigned span_bits = q->cluster_bits + q->l2_bits;

	return (size >> span_bits) + !!(size & ((UINT64_C(1) << span_bits) - 1));
}

/* Writes q->l1 as it is to host_off, zeroes behind it up to the end of its clusters. */
static suspends int write_l1_copy(struct qcow *q, uint64_t host_off, uint64_t entry_count)
{
	size_t len = (size_t)round_up(entry_count * 8, q->cluster_size);
	CLEANUP(free) be64 *copy = calloc(1, len);

	if (!copy)
		return -ENOMEM;
	for (size_t i = 0; i < q->header.l1_entry_count; i++)
		copy[i] = be64_make(q->l1[i]);
	for (size_t at = 0, step; at < len; at += step) {
		step = MIN(len - at, (size_t)BLK_REQUEST_MAX);
		int ret = blk_write(q->blk.below, host_off + at, (uint8_t *)copy + at, step, 0);

		if (ret)
			return ret;
	}
	return 0;
}

/* Stores a header with another size and L1 table, durably; on failure the old one stays. */
static suspends int store_geometry(
	struct qcow *q, uint64_t size, uint64_t l1_off, uint32_t l1_entry_count)
{
	struct qcow_header old = q->header;

	q->header.size = size;
	q->header.l1_off = l1_off;
	q->header.l1_entry_count = l1_entry_count;
	return qcow_header_switch(q, &old);
}

/* Makes the copy at new_off the L1 table, on disk and in memory, or neither. No commit may see it half done. */
static suspends int switch_l1(
	struct qcow *q, uint64_t size, uint64_t new_off, uint64_t entry_count, uint64_t capacity)
{
	uint64_t *l1 = calloc(capacity, sizeof(*l1));
	uint64_t *dirty = calloc(bitmap_words(capacity) + 1, sizeof(*dirty));
	int ret = l1 && dirty ? 0 : -ENOMEM;

	if (!ret) {
		memcpy(l1, q->l1, q->header.l1_entry_count * sizeof(*l1));
		co_mutex_lock(&q->commit_mutex);
		ret = store_geometry(q, size, new_off, (uint32_t)entry_count);
		if (!ret) {
			free(q->l1);
			free(q->l1_dirty);
			q->l1 = take_ptr(l1);
			q->l1_dirty = take_ptr(dirty);
			q->l1_capacity = (uint32_t)capacity;
		}
		co_mutex_unlock(&q->commit_mutex);
	}
	free(l1);
	free(dirty);
	return ret;
}

/* Moves the L1 table to where it has room for entry_count. Nothing of it is dirty. */
static suspends int move_l1(struct qcow *q, uint64_t size, uint64_t entry_count)
{
	uint64_t clusters = round_up(entry_count * 8, q->cluster_size) >> q->cluster_bits;
	uint64_t old_off = q->header.l1_off, new_off;
	uint64_t old_clusters = round_up(q->l1_capacity * UINT64_C(8), q->cluster_size) >>
				q->cluster_bits;
	bool fresh;
	int ret = qcow_alloc_exactly(q, clusters, &new_off, &fresh);

	if (ret)
		return ret;
	ret = write_l1_copy(q, new_off, entry_count);
	if (!ret)
		ret = qcow_commit(
			q); /* the new clusters' counts are durable before the header points there */
	if (!ret)
		ret = switch_l1(q, size, new_off, entry_count, clusters * (q->cluster_size / 8));
	if (ret) {
		qcow_free_unused(q, new_off, clusters);
		return ret;
	}
	if (old_off)
		qcow_free_unlinked(q, old_off, old_clusters);
	return qcow_commit(q);
}

/* The table has the room; entries that come into use must be zero on disk. */
static suspends int extend_l1(struct qcow *q, uint64_t size, uint64_t entry_count)
{
	uint32_t old_count = q->header.l1_entry_count;
	int ret = 0;

	if (entry_count > old_count) {
		ret = blk_zero(q->blk.below, q->header.l1_off + old_count * UINT64_C(8),
			(entry_count - old_count) * 8, BLK_NO_HOLE);
		if (!ret)
			ret = blk_flush(q->blk.below);
	}
	return ret ? ret
		   : store_geometry(
			     q, size, q->header.l1_off, (uint32_t)MAX(entry_count, old_count));
}

/* Makes [from, to) read as zeroes, durably, whatever lay hidden there. */
static suspends int hide_old_content(struct qcow *q, uint64_t from, uint64_t to)
{
	uint64_t backing_size = q->backing ? blk_caps(q->backing)->size : 0;
	int ret = qcow_write_zeroes(q, from, MIN(to, round_up(from, q->cluster_size)));

	if (!ret && backing_size > from)
		ret = qcow_zero(&q->blk, from, MIN(to, backing_size) - from, 0);
	return ret ? ret : qcow_commit(q);
}

/* A data file is as long as the disk; what it has behind the disk's present end must not appear. */
static suspends int grow_data_file(struct qcow *q, uint64_t size, struct err *err)
{
	uint64_t old_size = q->header.size, have = blk_caps(q->data)->size;
	int ret = 0;

	if (have > old_size)
		ret = blk_discard(q->data, old_size, MIN(have, size) - old_size, 0);
	if (ret)
		return err_sys(err, -ret,
			"data-file: what it has behind the disk's end cannot be made zeroes");
	if (have < size)
		ret = blk_resize(q->data, size, 0, err);
	if (ret)
		return err_wrap(err, "data-file: must grow before the disk");
	ret = blk_flush(q->data);
	return ret ? err_sys(err, -ret, "data-file: cannot be flushed") : 0;
}

static suspends int grow(struct qcow *q, uint64_t size)
{
	uint64_t entry_count = l1_entries_for(q, size), old_size = q->header.size;
	int ret = qcow_commit(q);

	if (!ret && entry_count > q->l1_capacity)
		ret = move_l1(q, old_size, entry_count);
	else if (!ret)
		ret = extend_l1(q, old_size, entry_count);
	if (!ret)
		ret = hide_old_content(q, old_size, size);
	if (!ret)
		ret = store_geometry(q, size, q->header.l1_off, q->header.l1_entry_count);
	if (!ret)
		blk_size_changed(&q->blk, size);
	return ret;
}

static suspends int shrink(struct qcow *q, uint64_t size)
{
	uint64_t len = q->header.size - size;
	int ret = qcow_discard(&q->blk, size, len, 0);

	/* Version 2 over a backing has no zeroes; where they would be missed, it does not grow again either. */
	if (ret == -EOPNOTSUPP)
		ret = qcow_unmap(q, size, len);
	if (!ret)
		ret = qcow_settle(q);
	if (!ret)
		ret = store_geometry(q, size, q->header.l1_off, q->header.l1_entry_count);
	if (ret)
		return ret;
	/* One that stays longer does no harm. */
	if (q->data_file && blk_caps(q->data)->grows && blk_caps(q->data)->size > size)
		blk_resize(q->data, size, BLK_FORCE, NULL);
	blk_size_changed(&q->blk, size);
	return 0;
}

static suspends int resize(struct qcow *q, uint64_t size, struct err *err)
{
	bool grows = size > q->header.size;
	int ret = qcow_begin_writing(q);

	if (!ret && q->data_file && grows) {
		ret = grow_data_file(q, size, err);
		if (ret)
			return ret;
	}
	if (!ret)
		ret = grows ? grow(q, size) : shrink(q, size);
	return ret ? err_sys(err, -ret, "cannot change the size of the disk") : 0;
}

suspends int qcow_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct qcow *q = qcow_of(blk);
	uint64_t entries = l1_entries_for(q, size);

	if (entries * 8 > QCOW_L1_LEN_MAX_BYTES)
		return err_set(err, EFBIG, "%llu bytes need an L1 table beyond the format's limit",
			(unsigned long long)size);
	if (size % 512)
		return err_set(err, EINVAL, "the size of a qcow2 disk is a multiple of 512");
	if (size > q->header.size && q->backing && blk_caps(q->backing)->size > q->header.size &&
		q->header.version == 2)
		return err_set(err, ENOTSUP,
			"the backing is longer than the disk, and version 2 cannot hide it");
	co_mutex_lock(&q->moving);
	int ret = resize(q, size, err);
	co_mutex_unlock(&q->moving);
	return ret;
}
