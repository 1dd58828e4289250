/*
 * Trees of L1 and L2 tables in an image that is being changed in one step: their references, their
 * copied flags, their new places. See shadow.h.
 *
 * The copied flag of an L1 or L2 entry says that the count of what it points to is exactly 1, and must be right in
 * the active tree, and only there. So after counts have changed, the active tree is gone through and its flags
 * are made to fit; a table is only written when one of its flags changes.
 */
#include "blk/qcow/shadow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "blk/qcow/snapshot_table.h"

typedef unsigned long long ull;

suspends int shadow_load_l1(const struct shadow *shadow, uint64_t l1_off, uint32_t entry_count,
	uint64_t **words, struct err *err)
{
	const struct image *image = shadow->image;

	if (!is_aligned(l1_off, image->cluster_size) || entry_count > QCOW_L1_LEN_MAX_BYTES / 8 ||
		!range_ok(l1_off, (uint64_t)entry_count * 8, image->file_size))
		return err_set(err, EUCLEAN,
			"L1 table of %u entries at %llu is not valid: the image needs to be "
			"repaired",
			entry_count, (ull)l1_off);
	*words = calloc((size_t)entry_count + 1, 8);
	int ret = *words ? image_read_words(image, l1_off, *words, entry_count) : -ENOMEM;
	if (!ret)
		return 0;
	free(take_ptr(*words));
	return err_sys(err, -ret, "cannot read the L1 table at %llu", (ull)l1_off);
}

/* --- references ------------------------------------------------------------------------------- */

static int add_entry(struct shadow *shadow, uint64_t entry, int delta)
{
	const struct image *image = shadow->image;
	uint64_t host_off = entry & QCOW_ENTRY_OFF_MASK, len = image->cluster_size;

	switch (image_entry_kind(image, entry)) {
	case ENTRY_COMPRESSED:
		image_compressed_range(image, entry, &host_off, &len);
		break;
	case ENTRY_NORMAL:
	case ENTRY_ZERO_ALLOCATED:
		if (!is_aligned(host_off, len))
			return -EUCLEAN;
		break;
	case ENTRY_UNALLOCATED:
	case ENTRY_ZERO_PLAIN:
		return 0;
	}
	/* The file's last cluster need not be whole. */
	if (host_off >= image->file_size ||
		host_off + len >= image->file_size + image->cluster_size)
		return -EUCLEAN;
	return shadow_add(shadow, host_off, len, delta);
}

static suspends int add_l2(struct shadow *shadow, uint64_t table_off, int delta, uint64_t *words)
{
	const struct image *image = shadow->image;
	int ret;

	if (!is_aligned(table_off, image->cluster_size) || table_off >= image->file_size)
		return -EUCLEAN;
	ret = image_read_words(image, table_off, words, image->cluster_size / 8);
	for (uint32_t i = 0; i < image->l2_entries && !ret; i++)
		ret = add_entry(shadow, words[(size_t)i * image->entry_words], delta);
	return ret ? ret : shadow_add(shadow, table_off, image->cluster_size, delta);
}

suspends int shadow_add_tree(struct shadow *shadow, const uint64_t *words, uint32_t entry_count,
	int delta, struct err *err)
{
	CLEANUP(free) uint64_t *table = malloc(shadow->image->cluster_size);
	int ret = table ? 0 : -ENOMEM;

	for (uint32_t i = 0; i < entry_count && !ret; i++)
		if (words[i] & QCOW_ENTRY_OFF_MASK)
			ret = add_l2(shadow, words[i] & QCOW_ENTRY_OFF_MASK, delta, table);
	if (ret == -ERANGE && delta > 0)
		return err_set(err, EOVERFLOW,
			"a cluster has more references than refcounts of %u bits can count",
			1U << shadow->image->header->refcount_order);
	if (ret == -ERANGE || ret == -EUCLEAN)
		return err_set(err, EUCLEAN,
			"the tables and refcounts do not fit: the image needs to be repaired");
	return ret ? err_sys(err, -ret, "cannot count references") : 0;
}

/* --- flags ------------------------------------------------------------------------------------ */

static bool is_single(const struct shadow *shadow, uint64_t host_off)
{
	return refs_get(&shadow->refs, host_off >> shadow->image->cluster_bits) == 1;
}

/* What can only be wrong: a flag that compressed clusters never have, a preallocation without a place. */
static uint64_t repaired_entry(const struct shadow *shadow, uint64_t entry, uint64_t bitmap)
{
	const struct image *image = shadow->image;
	enum entry_kind kind = image_entry_kind(image, entry);

	if (kind == ENTRY_COMPRESSED)
		return entry & ~QCOW_ENTRY_COPIED;
	if (is_aligned(entry & QCOW_ENTRY_OFF_MASK, image->cluster_size))
		return entry;
	if (kind == ENTRY_ZERO_ALLOCATED)
		return QCOW_ENTRY_ZERO;
	return image->entry_words > 1 && !(uint32_t)bitmap ? 0 : entry;
}

static uint64_t fixed_entry(
	const struct shadow *shadow, uint64_t entry, uint64_t bitmap, bool repair)
{
	enum entry_kind kind;

	if (repair)
		entry = repaired_entry(shadow, entry, bitmap);
	kind = image_entry_kind(shadow->image, entry);
	if (kind != ENTRY_NORMAL && kind != ENTRY_ZERO_ALLOCATED)
		return entry;
	if (shadow->image->data_file || is_single(shadow, entry & QCOW_ENTRY_OFF_MASK))
		return entry | QCOW_ENTRY_COPIED;
	return entry & ~QCOW_ENTRY_COPIED;
}

/* Writes a changed L2 table, to another cluster if nobody else points to it. */
static suspends int store_l2(
	struct shadow *shadow, uint64_t *table_off, const uint64_t *words, unsigned users)
{
	const struct image *image = shadow->image;
	uint64_t old_off = *table_off;
	uint64_t refcount = refs_get(&shadow->refs, old_off >> image->cluster_bits);
	int ret = 0;

	if (refcount == users) {
		ret = shadow_alloc(shadow, 1, refcount, table_off);
		if (!ret)
			ret = shadow_add(shadow, old_off, image->cluster_size, -(int)users);
	}
	return ret ? ret : shadow_write_words(shadow, *table_off, words, image->cluster_size / 8);
}

static suspends int fix_l2(
	struct shadow *shadow, uint64_t *l1_entry, unsigned users, bool repair, uint64_t *words)
{
	const struct image *image = shadow->image;
	uint64_t table_off = *l1_entry & QCOW_ENTRY_OFF_MASK;
	bool changed = false;
	int ret = 0;

	if (!is_aligned(table_off, image->cluster_size) || table_off >= image->file_size)
		return 0; /* not a table: nothing a flag could be right about */
	ret = image_read_words(image, table_off, words, image->cluster_size / 8);
	for (uint32_t i = 0; i < image->l2_entries && !ret; i++) {
		uint64_t *entry = &words[(size_t)i * image->entry_words];
		uint64_t bitmap = image->entry_words > 1 ? entry[1] : 0;
		uint64_t fixed = fixed_entry(shadow, *entry, bitmap, repair);

		changed |= fixed != *entry;
		*entry = fixed;
	}
	if (!ret && changed)
		ret = store_l2(shadow, &table_off, words, users);
	*l1_entry = (*l1_entry & ~QCOW_ENTRY_OFF_MASK) | table_off;
	return ret;
}

suspends int shadow_fix_tree(
	struct shadow *shadow, uint64_t *words, uint32_t entry_count, unsigned users, bool repair)
{
	CLEANUP(free) uint64_t *table = malloc(shadow->image->cluster_size);
	int ret = table ? 0 : -ENOMEM;

	for (uint32_t i = 0; i < entry_count && !ret; i++) {
		if (!(words[i] & QCOW_ENTRY_OFF_MASK))
			continue;
		ret = fix_l2(shadow, &words[i], users, repair, table);
		if (is_single(shadow, words[i] & QCOW_ENTRY_OFF_MASK))
			words[i] |= QCOW_ENTRY_COPIED;
		else
			words[i] &= ~QCOW_ENTRY_COPIED;
	}
	return ret;
}

/* --- replacing -------------------------------------------------------------------------------- */

suspends int shadow_replace_l1(struct shadow *shadow, const uint64_t *words, uint32_t entry_count)
{
	const struct image *image = shadow->image;
	const struct qcow_header *old = image->header;
	uint64_t count = image_clusters_for(image, (uint64_t)entry_count * 8), l1_off = 0;
	int ret = 0;

	if (count)
		ret = shadow_alloc(shadow, count, 1, &l1_off);
	if (!ret)
		ret = shadow_write_words(shadow, l1_off, words, entry_count);
	if (!ret)
		ret = shadow_give_up(shadow, old->l1_off, (uint64_t)old->l1_entry_count * 8);
	shadow->header.l1_off = l1_off;
	shadow->header.l1_entry_count = entry_count;
	return ret;
}

suspends int shadow_replace_snapshots(
	struct shadow *shadow, struct qcow_snapshots *list, uint64_t old_len)
{
	const struct image *image = shadow->image;
	CLEANUP(free) uint8_t *table = NULL;
	uint64_t len = 0, host_off = 0;
	int ret = shadow_give_up(shadow, image->header->snapshots_off, old_len);

	if (!ret && list->count)
		ret = qcow_snapshots_encode(list, &table, &len);
	if (!ret && len)
		ret = shadow_alloc(shadow, image_clusters_for(image, len), 1, &host_off);
	if (!ret && len)
		ret = shadow_write(shadow, host_off, table, len);
	shadow->header.snapshots_off = host_off;
	shadow->header.snapshot_count = list->count;
	return ret;
}
