/*
 * Zero and discard: changes to the mapping, no data written, but at the ragged edges.
 *
 * Whole subclusters become zeroes by their entry; the parts of a subcluster at either end are written
 * as zeroes, unless they read so already. Without a backing an entry of nothing reads as zeroes,
 * so that is what discard leaves; over a backing it leaves the zero flag, which version 2 does not
 * have: there the answer is -EOPNOTSUPP, and zeroes are written instead.
 */
#include "blk/qcow/qcow.h"

#include <errno.h>
#include <string.h>

/* The longest stretch of a ragged edge: less than the largest subcluster. */
static const uint8_t zeroes[64 * 1024];

struct zeroing {
	bool unmap;     /* give host clusters back */
	bool zero_flag; /* entries must say zero: there is a backing, or the cluster stays allocated */
};

/* What an entry becomes when the subclusters in mask are to read as zeroes. */
static struct l2_entry zeroed_entry(
	const struct qcow *q, const struct l2_entry *old, uint32_t mask, const struct zeroing *z)
{
	struct l2_entry new = *old;

	if (old->compressed)
		memset(&new, 0, sizeof(new)); /* only ever whole */
	new.alloc_bits &= ~mask;
	new.zero_bits = z->zero_flag || new.alloc_bits ? new.zero_bits | mask
						       : new.zero_bits & ~mask;
	if (!new.alloc_bits && (z->unmap || !new.copied)) {
		new.host_off = 0;
		new.copied = false;
	}
	if (qcow_entry_has_host(q, &new) && !new.alloc_bits && q->subclusters == 1)
		new.zero_bits = 1; /* an allocated cluster without the flag would be data */
	return new;
}

static bool same_entry(const struct l2_entry *a, const struct l2_entry *b)
{
	return a->host_off == b->host_off && a->copied == b->copied &&
	       a->compressed == b->compressed && a->alloc_bits == b->alloc_bits &&
	       a->zero_bits == b->zero_bits;
}

/* Applies mask to one entry. Returns true when it changed. */
static bool zero_entry(struct qcow *q, uint8_t *raw, uint32_t mask, const struct zeroing *z)
{
	struct l2_entry old = qcow_entry_decode(q, raw);
	struct l2_entry new = zeroed_entry(q, &old, mask, z);

	if (same_entry(&old, &new))
		return false;
	qcow_entry_encode(q, &new, raw);
	if (old.compressed || (old.host_off && !new.host_off))
		qcow_free_entry(q, &old);
	return true;
}

/* Can the subclusters in mask be zeroed in the entry alone? */
static bool entry_allows(
	const struct qcow *q, const struct l2_entry *entry, uint32_t mask, bool keep)
{
	bool whole = mask == (q->subclusters == 32 ? UINT32_MAX : 1);

	if (keep && !(entry->host_off && entry->copied && !entry->compressed))
		return false; /* NO_HOLE wants space that is not there */
	return whole || (!entry->compressed && (!entry->host_off || entry->copied));
}

static uint32_t mask_of(const struct qcow *q, uint64_t cluster_off, uint64_t off, uint64_t end)
{
	uint64_t from = MAX(off, cluster_off) - cluster_off;
	uint64_t to = MIN(end, cluster_off + q->cluster_size) - cluster_off;
	unsigned first = (unsigned)(from >> q->subcluster_bits);
	unsigned past = (unsigned)(to >> q->subcluster_bits);

	return (uint32_t)(((UINT64_C(1) << past) - 1) & ~((UINT64_C(1) << first) - 1));
}

/*
 * [off, end): whole subclusters with their entries in one slice, held exclusively. *done_end: how far it
 * came; the entry there does not allow it, when not the end.
 */
static suspends int zero_in_slice(struct qcow *q, uint64_t off, uint64_t end,
	const struct zeroing *z, bool keep, uint64_t *done_end)
{
	struct slice *slice;
	const char *fault = NULL;
	bool changed = false;
	uint8_t *raw;
	int ret = qcow_entry_get(q, off, &slice, &raw);

	*done_end = off;
	if (ret)
		return ret;
	/* Nothing suspends from the first change until the slice is dirty: a commit has both, or neither. */
	while (*done_end < end) {
		uint64_t cluster_off = qcow_cluster_start(q, *done_end);
		uint32_t mask = mask_of(q, cluster_off, *done_end, end);
		struct l2_entry entry = qcow_entry_decode(q, raw);

		fault = qcow_entry_fault(q, &entry, cluster_off);
		if (fault || !entry_allows(q, &entry, mask, keep))
			break;
		changed |= zero_entry(q, raw, mask, z);
		raw += q->entry_size;
		*done_end = MIN(end, cluster_off + q->cluster_size);
	}
	if (changed)
		qcow_entry_put_dirty(q, slice);
	else
		cache_put(&q->l2_cache, slice);
	return fault ? qcow_mark_corrupt(q, "L2 entry for guest offset %llu: %s",
			       (unsigned long long)*done_end, fault)
		     : 0;
}

/* True when the range reads as zeroes already and need not be touched (nor keep its space). */
static bool is_zero_already(const struct qcow *q, const struct run *run, bool keep)
{
	if (keep)
		return run->kind == RUN_ZERO && run->has_host && run->in_place;
	return (run->kind == RUN_HOLE && !q->backing) || (run->kind == RUN_ZERO && !run->has_host);
}

/* A hole there shows nothing of a backing. */
static bool hole_is_zero(const struct qcow *q, uint64_t off)
{
	return !q->backing || off >= blk_caps(q->backing)->size;
}

suspends int qcow_write_zeroes(struct qcow *q, uint64_t off, uint64_t end)
{
	for (uint64_t step; off < end; off += step) {
		struct run run;
		int ret = qcow_map(q, off, end - off, &run);

		if (ret)
			return ret;
		step = MIN(run.len, sizeof(zeroes));
		if (run.kind == RUN_ZERO || (run.kind == RUN_HOLE && hole_is_zero(q, off))) {
			step = run.len;
			continue;
		}
		ret = qcow_write(&q->blk, off, zeroes, (size_t)step, 0);
		if (ret)
			return ret;
	}
	return 0;
}

/*
 * What [off, end) had in the data file goes. The range reads as zeroes already, and is held exclusively. After a
 * power cut the old entry may be back and find the hole: zeroes too. A failure costs space only.
 */
static suspends void punch_data_file(struct qcow *q, uint64_t off, uint64_t end)
{
	end = MIN(end, blk_caps(q->data)->size);
	if (q->opt_discard && off < end)
		blk_discard(q->data, off, end - off, 0);
}

/* A stretch of whole subclusters. */
static suspends int zero_mapped(
	struct qcow *q, uint64_t off, uint64_t end, const struct zeroing *z, bool keep)
{
	while (off < end) {
		uint64_t slice_end = qcow_cluster_start(q, off) +
				     qcow_clusters_in_slice(q, off) * q->cluster_size;
		uint64_t part_end = MIN(end, slice_end), done_end;
		uint64_t start = qcow_cluster_start(q, off);
		struct range range;
		struct run run;
		int ret = qcow_map(q, off, end - off, &run);

		if (ret)
			return ret;
		if (is_zero_already(q, &run, keep)) {
			off += run.len;
			continue;
		}
		range_lock_acquire(&q->writes, &range, start,
			round_up(part_end, q->cluster_size) - start, true);
		ret = zero_in_slice(q, off, part_end, z, keep, &done_end);
		if (!ret && q->data_file && z->unmap)
			punch_data_file(q, off, done_end);
		range_lock_release(&q->writes, &range);
		if (ret)
			return ret;
		off = done_end;
		if (off < part_end) {
			if (keep)
				return -EOPNOTSUPP; /* blk.c writes zeroes, which allocates */
			uint64_t cluster_end = qcow_cluster_start(q, off) + q->cluster_size;
			ret = qcow_write_zeroes(q, off, MIN(part_end, cluster_end));
			if (ret)
				return ret;
			off = MIN(part_end, cluster_end);
		}
	}
	return 0;
}

static suspends int zero_range(
	struct qcow *q, uint64_t off, uint64_t len, const struct zeroing *z, bool keep, bool fast)
{
	uint64_t subcluster_size = UINT64_C(1) << q->subcluster_bits, end = off + len;
	/* The last cluster of the disk counts as whole. */
	uint64_t first = round_up(off, subcluster_size);
	uint64_t last = end == q->blk.caps.size ? round_up(end, subcluster_size)
						: round_down(end, subcluster_size);
	int ret;

	if (first >= last)
		return fast ? -EOPNOTSUPP : qcow_write_zeroes(q, off, end);
	ret = qcow_write_zeroes(q, off, MIN(first, end));
	if (!ret)
		ret = zero_mapped(q, first, last, z, keep);
	if (!ret && last < end)
		ret = qcow_write_zeroes(q, last, end);
	return ret;
}

suspends int qcow_unmap(struct qcow *q, uint64_t off, uint64_t len)
{
	const struct zeroing z = { .unmap = true };
	unsigned pin = qcow_pin(q);
	int ret = zero_range(q, off, len, &z, false, false);

	qcow_unpin(q, pin);
	return ret;
}

static suspends int zero_or_discard(
	struct qcow *q, uint64_t off, uint64_t len, unsigned flags, bool unmap)
{
	bool keep = flags & BLK_NO_HOLE && !q->data_file;
	struct zeroing z = { .unmap = unmap && !keep, .zero_flag = q->backing || keep };
	int ret = qcow_begin_writing(q);

	if (ret)
		return ret;
	if (q->raw_data_file) /* the data file alone must tell the truth */
		return unmap ? blk_discard(q->data, off, len, flags)
			     : blk_zero(q->data, off, len, flags);
	if (q->header.version == 2 && (z.zero_flag || !z.unmap))
		return -EOPNOTSUPP;
	/* A cluster without space would come to light when those before it are zeroed. */
	if (keep && flags & BLK_FAST_ZERO)
		return -EOPNOTSUPP;
	unsigned pin = qcow_pin(q);
	ret = zero_range(q, off, len, &z, keep, flags & BLK_FAST_ZERO);
	qcow_unpin(q, pin);
	if (!ret && flags & BLK_FUA)
		ret = qcow_commit(q);
	return ret;
}

suspends int qcow_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return zero_or_discard(qcow_of(blk), off, len, flags, !(flags & BLK_NO_HOLE));
}

suspends int qcow_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return zero_or_discard(qcow_of(blk), off, len, flags, true);
}
