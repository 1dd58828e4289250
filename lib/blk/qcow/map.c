/*
 * From guest offsets to host offsets (format, "Cluster mapping" and "Extended L2 Entries").
 *
 * Everything works on subclusters: an image without extended entries has one subcluster per cluster,
 * and its entry is decoded into the same two bit sets. So the rest of the layer knows one kind of entry.
 *
 * An entry found on disk is checked when it is used, never trusted: qcow_entry_fault() says what is
 * wrong, and the image is then marked corrupt and that request fails.
 */
#include "blk/qcow/qcow.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/* --- entries ---------------------------------------------------------------------------------- */

static uint64_t raw_get(const uint8_t *raw)
{
	be64 field;

	memcpy(&field, raw, sizeof(field));
	return be64_get(field);
}

static void raw_put(uint8_t *raw, uint64_t value)
{
	be64 field = be64_make(value);

	memcpy(raw, &field, sizeof(field));
}

struct l2_entry qcow_entry_decode(const struct qcow *q, const uint8_t *raw)
{
	uint64_t value = raw_get(raw);
	struct l2_entry entry = { 0 };

	if (value & QCOW_ENTRY_COMPRESSED) {
		/* Format, "Compressed Clusters Descriptor". */
		unsigned off_bits = 62 - (q->cluster_bits - 8);
		uint64_t off_mask = (UINT64_C(1) << off_bits) - 1;
		uint64_t more_sectors = (value & ~(QCOW_ENTRY_COMPRESSED | QCOW_ENTRY_COPIED)) >>
					off_bits;

		entry.compressed = true;
		entry.host_off = value & off_mask; /* with a bit above 55 it is beyond any file */
		entry.compressed_len = (uint32_t)((more_sectors + 1) * 512 -
						  (entry.host_off & 511));
		return entry;
	}
	entry.host_off = value & QCOW_ENTRY_OFF_MASK;
	entry.copied = value & QCOW_ENTRY_COPIED;
	if (q->subclusters > 1) {
		uint64_t bits = raw_get(raw + 8);

		entry.alloc_bits = (uint32_t)bits;
		entry.zero_bits = (uint32_t)(bits >> 32);
		return entry;
	}
	/* The zero flag does not exist in version 2 (format, "Standard Cluster Descriptor"). */
	entry.zero_bits = q->header.version == 3 && value & QCOW_ENTRY_ZERO;
	entry.alloc_bits = !entry.zero_bits && qcow_entry_has_host(q, &entry);
	return entry;
}

void qcow_entry_encode(const struct qcow *q, const struct l2_entry *entry, uint8_t *raw)
{
	uint64_t value = entry->host_off;

	assert(!entry->compressed);
	if (entry->copied)
		value |= QCOW_ENTRY_COPIED;
	if (q->subclusters > 1)
		raw_put(raw + 8, (uint64_t)entry->zero_bits << 32 | entry->alloc_bits);
	else if (entry->zero_bits)
		value |= QCOW_ENTRY_ZERO;
	raw_put(raw, value);
}

const char *qcow_entry_fault(const struct qcow *q, const struct l2_entry *entry, uint64_t guest_off)
{
	uint64_t file_size = blk_caps(q->blk.below)->size;

	if (entry->compressed) {
		if (q->data_file)
			return "compressed cluster in an image with a data file";
		return entry->host_off >= file_size ? "compressed data beyond the end of the file"
						    : NULL;
	}
	if (q->subclusters > 1 && entry->alloc_bits & entry->zero_bits)
		return "subclusters both allocated and zero";
	if (q->data_file) {
		bool mapped = entry->host_off || entry->alloc_bits;

		return mapped && entry->host_off != qcow_cluster_start(q, guest_off)
			       ? "host offset differs from the guest offset in a data file"
			       : NULL;
	}
	if (!entry->host_off)
		return entry->alloc_bits ? "allocated subclusters without a host cluster" : NULL;
	if (!is_aligned(entry->host_off, q->cluster_size))
		return "host offset not aligned to a cluster";
	if (entry->host_off >= file_size)
		return "host offset beyond the end of the file";
	if (qcow_is_metadata(q, entry->host_off >> q->cluster_bits))
		return "host cluster holds metadata";
	return NULL;
}

/* --- where an entry is ------------------------------------------------------------------------ */

static uint64_t l1_index_of(const struct qcow *q, uint64_t guest_off)
{
	return guest_off >> (q->cluster_bits + q->l2_bits);
}

/* Offset of guest_off's entry in its L2 table. */
static uint64_t entry_off_in_table(const struct qcow *q, uint64_t guest_off)
{
	uint64_t l2_index = (guest_off >> q->cluster_bits) & ((UINT64_C(1) << q->l2_bits) - 1);

	return l2_index * q->entry_size;
}

uint64_t qcow_clusters_in_slice(const struct qcow *q, uint64_t guest_off)
{
	uint64_t at = entry_off_in_table(q, guest_off) % q->l2_cache.slice_size;

	return (q->l2_cache.slice_size - at) / q->entry_size;
}

static suspends int check_l1_entry(struct qcow *q, uint64_t l1_index)
{
	uint64_t table_off = q->l1[l1_index] & QCOW_ENTRY_OFF_MASK;

	if (is_aligned(table_off, q->cluster_size) && table_off < blk_caps(q->blk.below)->size)
		return 0;
	return qcow_mark_corrupt(q, "L1 entry %llu points to %llu: not a cluster of the file",
		(unsigned long long)l1_index, (unsigned long long)table_off);
}

/* The slice that has guest_off's entry; *slice NULL when there is no L2 table. With one user when `keep`. */
static suspends int find_slice(
	struct qcow *q, uint64_t guest_off, bool keep, struct slice **slice, uint8_t **raw)
{
	uint64_t l1_index = l1_index_of(q, guest_off);
	uint64_t table_off = q->l1[l1_index] & QCOW_ENTRY_OFF_MASK;
	uint64_t at = entry_off_in_table(q, guest_off);
	uint64_t slice_off = table_off + round_down(at, q->l2_cache.slice_size);

	*slice = NULL;
	if (!table_off)
		return 0;
	if (!keep && (*slice = cache_peek(&q->l2_cache, slice_off)) && !(*slice)->load_error) {
		*raw = (*slice)->data + at % q->l2_cache.slice_size;
		return 0;
	}
	int ret = check_l1_entry(q, l1_index);
	if (!ret)
		ret = cache_get(&q->l2_cache, slice_off, slice);
	if (ret)
		return ret;
	*raw = (*slice)->data + at % q->l2_cache.slice_size;
	if (!keep)
		cache_put(&q->l2_cache, *slice); /* stays valid until the caller suspends */
	return 0;
}

/* --- runs ------------------------------------------------------------------------------------- */

static enum run_kind kind_of(const struct l2_entry *entry, unsigned subcluster)
{
	if (entry->compressed)
		return RUN_COMPRESSED;
	if (entry->zero_bits >> subcluster & 1)
		return RUN_ZERO;
	return entry->alloc_bits >> subcluster & 1 ? RUN_DATA : RUN_HOLE;
}

/* How many subclusters from `first` on are of the same kind. */
static unsigned same_kind(const struct qcow *q, const struct l2_entry *entry, unsigned first)
{
	unsigned next = first + 1;

	while (next < q->subclusters && kind_of(entry, next) == kind_of(entry, first))
		next++;
	return next - first;
}

/* Does `entry`, whose first subcluster follows the run's end, continue it? */
static bool continues(const struct qcow *q, const struct run *run, const struct l2_entry *entry)
{
	if (run->kind == RUN_COMPRESSED || kind_of(entry, 0) != run->kind)
		return false;
	if (run->kind == RUN_DATA)
		return entry->host_off == run->host_off + run->len &&
		       entry->copied == run->in_place;
	if (run->kind == RUN_ZERO)
		return qcow_entry_has_host(q, entry) == run->has_host;
	return true;
}

/* Extends the run over the entries that follow in the same slice. */
static void extend_run(const struct qcow *q, uint64_t guest_off, const uint8_t *raw, uint64_t left,
	uint64_t max_len, struct run *run)
{
	for (; left && run->len < max_len; left--) {
		raw += q->entry_size;
		struct l2_entry entry = qcow_entry_decode(q, raw);

		if (!continues(q, run, &entry) || qcow_entry_fault(q, &entry, guest_off + run->len))
			return;
		unsigned same = same_kind(q, &entry, 0);
		run->len += (uint64_t)same << q->subcluster_bits;
		if (same < q->subclusters)
			return;
	}
}

suspends int qcow_map(struct qcow *q, uint64_t guest_off, uint64_t max_len, struct run *run)
{
	uint64_t in_cluster = guest_off & (q->cluster_size - 1);
	unsigned subcluster = (unsigned)(in_cluster >> q->subcluster_bits);
	struct slice *slice;
	uint8_t *raw;
	int ret = find_slice(q, guest_off, false, &slice, &raw);

	if (ret)
		return ret;
	memset(run, 0, sizeof(*run));
	if (!slice) {
		uint64_t table_span = q->cluster_size << q->l2_bits;

		run->kind = RUN_HOLE;
		run->len = MIN(max_len, table_span - (guest_off & (table_span - 1)));
		return 0;
	}
	run->entry = qcow_entry_decode(q, raw);
	const char *fault = qcow_entry_fault(q, &run->entry, guest_off);
	if (unlikely(fault))
		return qcow_mark_corrupt(q, "L2 entry for guest offset %llu: %s",
			(unsigned long long)guest_off, fault);
	run->kind = kind_of(&run->entry, subcluster);
	if (run->kind == RUN_COMPRESSED) {
		run->len = MIN(max_len, q->cluster_size - in_cluster);
		return 0;
	}
	run->host_off = run->entry.host_off + in_cluster;
	run->in_place = run->entry.copied;
	run->has_host = qcow_entry_has_host(q, &run->entry);

	unsigned same = same_kind(q, &run->entry, subcluster);
	run->len = ((uint64_t)(subcluster + same) << q->subcluster_bits) - in_cluster;
	if (subcluster + same == q->subclusters)
		extend_run(
			q, guest_off, raw, qcow_clusters_in_slice(q, guest_off) - 1, max_len, run);
	run->len = MIN(run->len, max_len);
	return 0;
}

/* --- changing entries ------------------------------------------------------------------------- */

static void set_l1(struct qcow *q, uint64_t l1_index, uint64_t value)
{
	q->l1[l1_index] = value;
	bitmap_set(q->l1_dirty, l1_index, 1);
	q->l1_any_dirty = true;
	qcow_commit_later(q);
}

/* Writes the whole new table below: zeroes, or a copy of the table at old_off. Phase 1 makes it durable. */
static suspends int fill_new_table(struct qcow *q, uint64_t new_off, uint64_t old_off, bool fresh)
{
	if (!old_off)
		return fresh ? 0 : blk_zero(q->blk.below, new_off, q->cluster_size, BLK_NO_HOLE);
	for (uint64_t at = 0; at < q->cluster_size; at += q->l2_cache.slice_size) {
		struct slice *slice;
		int ret = cache_get(&q->l2_cache, old_off + at, &slice);

		if (ret)
			return ret;
		ret = blk_write(q->blk.below, new_off + at, slice->data, q->l2_cache.slice_size, 0);
		cache_put(&q->l2_cache, slice);
		if (ret)
			return ret;
	}
	return 0;
}

/* In a damaged image the flag may stand beside no table at all. */
static bool table_is_ours(const struct qcow *q, uint64_t l1_index)
{
	return q->l1[l1_index] & QCOW_ENTRY_COPIED && q->l1[l1_index] & QCOW_ENTRY_OFF_MASK;
}

/* Gives l1_index an L2 table that is ours alone. */
static suspends int own_l2_table(struct qcow *q, uint64_t l1_index)
{
	uint64_t old_off, new_off;
	bool fresh;
	int ret = 0;

	co_mutex_lock(&q->l2_mutex);
	old_off = q->l1[l1_index] & QCOW_ENTRY_OFF_MASK;
	if (table_is_ours(q, l1_index))
		goto out;
	ret = old_off ? check_l1_entry(q, l1_index) : 0;
	if (!ret)
		ret = qcow_alloc_exactly(q, 1, &new_off, &fresh);
	if (ret)
		goto out;
	cache_forget(&q->l2_cache, new_off, q->cluster_size);
	ret = fill_new_table(q, new_off, old_off, fresh);
	if (ret) {
		qcow_free_unused(q, new_off, 1);
		goto out;
	}
	cluster_set_add(&q->metadata, new_off >> q->cluster_bits);
	set_l1(q, l1_index, new_off | QCOW_ENTRY_COPIED);
	if (old_off)
		qcow_free_unlinked(q, old_off, 1);
out:
	co_mutex_unlock(&q->l2_mutex);
	return ret;
}

suspends int qcow_move_l2_table(struct qcow *q, uint64_t l1_index, uint64_t new_off)
{
	uint64_t old_off = q->l1[l1_index] & QCOW_ENTRY_OFF_MASK;

	cache_forget(&q->l2_cache, new_off, q->cluster_size);
	int ret = fill_new_table(q, new_off, old_off, false);
	if (ret) {
		qcow_free_unused(q, new_off, 1);
		return ret;
	}
	/* Changes not yet committed are in the new table; the old one stays as it is on disk, where L1 leads. */
	cache_forget(&q->l2_cache, old_off, q->cluster_size);
	cluster_set_add(&q->metadata, new_off >> q->cluster_bits);
	set_l1(q, l1_index, new_off | QCOW_ENTRY_COPIED);
	qcow_free_unlinked(q, old_off, 1);
	return 0;
}

suspends int qcow_entry_get(struct qcow *q, uint64_t guest_off, struct slice **slice, uint8_t **raw)
{
	uint64_t l1_index = l1_index_of(q, guest_off);

	while (!table_is_ours(q, l1_index)) {
		int ret = own_l2_table(q, l1_index);

		if (ret)
			return ret;
	}
	return find_slice(q, guest_off, true, slice, raw);
}

void qcow_entry_put_dirty(struct qcow *q, struct slice *slice)
{
	cache_mark_dirty(&q->l2_cache, slice);
	cache_put(&q->l2_cache, slice);
}
