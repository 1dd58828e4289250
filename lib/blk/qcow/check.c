/*
 * Checking an image: counts how often everything points to each host cluster, and compares that with the counts
 * on disk.
 *
 *	check.c		the course, refcount structures, comparison
 *	check_tables.c	L1 and L2 tables, with their copied flags
 *	check_bitmaps.c	persistent bitmaps
 *
 * A damaged image is the normal case here: nothing that is read may do more than be counted as a finding.
 * References beyond the end of the file are findings; those that a repair could make the file grow into are
 * counted too, apart, so that nothing new is put there. So memory is bounded by the size of the file: refs.h
 * takes what the clusters in use need, check_tables.c a record per L2 table.
 */
#include "blk/qcow/check_private.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

/* A repair makes a file grow by no more than the metadata it has, and a snapshot table. */
#define GROWTH_MAX_BYTES (UINT64_C(16) << 20)

typedef unsigned long long ull;

/* --- findings --------------------------------------------------------------------------------- */

void check_found(struct check *check, enum qcow_finding kind, uint64_t weight, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	switch (kind) {
	case QCOW_FINDING_CORRUPTION:
		check->result->corruptions += weight;
		break;
	case QCOW_FINDING_LEAK:
		check->result->leaks += weight;
		break;
	case QCOW_FINDING_ERROR:
		check->result->errors += weight;
		break;
	}
	if (!check->watch || !check->watch->finding || check->told++ >= QCOW_FINDINGS_MAX)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	check->watch->finding(check->watch, kind, text);
}

void check_progress(struct check *check, uint64_t done)
{
	check->done += done;
	if (check->watch && check->watch->progress)
		check->watch->progress(check->watch, MIN(check->done, check->total), check->total);
}

/* --- references ------------------------------------------------------------------------------- */

static int add_dangling(struct check *check, uint64_t host_off, uint64_t len, uint64_t weight)
{
	const struct image *image = &check->image;
	uint64_t limit = 2 * image->file_size + GROWTH_MAX_BYTES;
	uint64_t end = add_overflows(host_off, len, &end) ? limit : MIN(end, limit);
	int ret = 0;

	for (uint64_t at = host_off & -image->cluster_size; at < end && !ret;
		at += image->cluster_size) {
		uint64_t index = at >> image->cluster_bits;
		uint64_t count = refs_get(&check->dangling, index) + weight;

		ret = refs_set(&check->dangling, index, MIN(count, check->dangling.max));
	}
	return ret;
}

int check_reference(
	struct check *check, uint64_t host_off, uint64_t len, uint64_t weight, const char *what)
{
	const struct image *image = &check->image;
	uint64_t end;

	if (!len)
		return 0;
	/* The last cluster of the file need not be whole. */
	if (add_overflows(host_off, len, &end) ||
		(end > image->file_size && end - image->file_size >= image->cluster_size)) {
		check_found(check, QCOW_FINDING_CORRUPTION, weight,
			"%s at %llu (%llu bytes) lies beyond the end of the file (%llu)", what,
			(ull)host_off, (ull)len, (ull)image->file_size);
		return add_dangling(check, host_off, len, weight);
	}
	for (uint64_t at = host_off >> image->cluster_bits; at <= (end - 1) >> image->cluster_bits;
		at++) {
		uint64_t count = refs_get(&check->refs, at) + weight;

		if (count > check->refs.max) {
			check_found(check, QCOW_FINDING_CORRUPTION, count - check->refs.max,
				"%s at %llu: more references than refcounts of %u bits hold", what,
				(ull)host_off, 1U << image->header->refcount_order);
			count = check->refs.max;
		}
		int ret = refs_set(&check->refs, at, count);
		if (ret)
			return ret;
	}
	return 0;
}

/* --- snapshots -------------------------------------------------------------------------------- */

static suspends int check_snapshot(struct check *check, const struct qcow_snapshot *snapshot)
{
	char name[96];

	snprintf(name, sizeof(name), "L1 table of snapshot \"%.60s\"", snapshot->name);
	if (!is_aligned(snapshot->l1_off, check->image.cluster_size)) {
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"%s at %llu is not aligned to a cluster", name, (ull)snapshot->l1_off);
		return 0;
	}
	if (snapshot->l1_entry_count > QCOW_L1_LEN_MAX_BYTES / 8) {
		check_found(check, QCOW_FINDING_CORRUPTION, 1, "%s has too many entries: %u", name,
			snapshot->l1_entry_count);
		return 0;
	}
	return check_l1(check, snapshot->l1_off, snapshot->l1_entry_count, false, name);
}

static suspends int check_snapshots(struct check *check)
{
	const struct qcow_header *header = check->image.header;
	struct qcow_snapshots *list = &check->snapshots;
	struct err text;
	int ret = 0;

	if (qcow_snapshots_load(&check->image, list, &text)) {
		check->unreadable = true;
		check_found(check, QCOW_FINDING_ERROR, 1, "%s", text.text);
		return 0;
	}
	if (list->count && check->image.data_file)
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"%u snapshots in an image with a data file", list->count);
	for (uint32_t i = 0; i < list->count && !ret; i++) {
		if (qcow_snapshot_incomplete(&check->image, &list->items[i]))
			check_found(check, QCOW_FINDING_CORRUPTION, 1,
				"snapshot table entry %u lacks what version 3 demands", i);
		ret = check_snapshot(check, &list->items[i]);
	}
	return ret ? ret
		   : check_reference(check, header->snapshots_off, list->len, 1, "snapshot table");
}

/* --- refcount structures ---------------------------------------------------------------------- */

/* Blocks are judged once everything else is counted: then a block pointed to twice shows. */
static suspends int check_blocks(struct check *check)
{
	const struct image *image = &check->image;
	uint64_t cluster_count = image_clusters_for(image, image->file_size);

	for (uint64_t i = 0; i < image->refcount_table_count; i++) {
		uint64_t entry = image->refcount_table[i];
		uint64_t host_off = entry & QCOW_REFTABLE_OFF_MASK;
		uint64_t index = host_off >> image->cluster_bits;
		const char *fault = entry & IMAGE_REFTABLE_RESERVED ? "has reserved bits set"
				    : !is_aligned(host_off, image->cluster_size)
					    ? "is not aligned to a cluster"
				    : index >= MAX(cluster_count, check->refs.count)
					    ? "points beyond the end of the file"
					    : NULL;

		if (!entry)
			continue;
		if (fault) {
			check_found(check, QCOW_FINDING_CORRUPTION, 1,
				"refcount table: entry %llu (%#llx) %s", (ull)i, (ull)entry, fault);
			check->rebuild = true;
			continue;
		}
		int ret = check_reference(
			check, host_off, image->cluster_size, 1, "refcount block");
		if (ret)
			return ret;
		if (refs_get(&check->refs, index) != 1) {
			check_found(check, QCOW_FINDING_CORRUPTION, 1,
				"refcount block %llu at %llu is used for something else too",
				(ull)i, (ull)host_off);
			check->rebuild = true;
		}
	}
	return 0;
}

/* --- comparing -------------------------------------------------------------------------------- */

/* Neighbours with the same finding are told together. */
struct mismatch {
	uint64_t first, count;
	uint64_t on_disk, counted;
};

static void tell_mismatch(struct check *check, struct mismatch *run)
{
	bool leak = run->on_disk > run->counted;
	enum qcow_finding kind = leak ? QCOW_FINDING_LEAK : QCOW_FINDING_CORRUPTION;

	char range[48];

	if (run->count > 1)
		snprintf(range, sizeof(range), "clusters %llu-%llu", (ull)run->first,
			(ull)(run->first + run->count - 1));
	else
		snprintf(range, sizeof(range), "cluster %llu", (ull)run->first);
	if (run->count)
		check_found(check, kind, run->count, "%s: refcount %llu, but %llu references%s",
			range, (ull)run->on_disk, (ull)run->counted, leak ? " (leaked)" : "");
	run->count = 0;
}

static void compare_cluster(struct check *check, struct mismatch *run, uint64_t index,
	uint64_t on_disk, uint64_t counted)
{
	if (on_disk || counted)
		check->result->image_end_off = (index + 1) << check->image.cluster_bits;
	if (on_disk == counted) {
		tell_mismatch(check, run);
		return;
	}
	if (!on_disk)
		check->rebuild = true;
	if (run->count && run->on_disk == on_disk && run->counted == counted) {
		run->count++;
		return;
	}
	tell_mismatch(check, run);
	*run = (struct mismatch){ index, 1, on_disk, counted };
}

static suspends int compare_block(
	struct check *check, struct mismatch *run, uint64_t block_index, uint64_t end)
{
	struct image *image = &check->image;
	uint64_t first = block_index * image->block_entries;
	const uint8_t *block;
	int ret = image_refcount_block(image, block_index, &block);

	if (ret == -ENOMEM)
		return ret;
	if (ret) {
		check->rebuild = true;
		check_found(check, QCOW_FINDING_ERROR, end - first,
			"refcounts of clusters %llu-%llu cannot be read", (ull)first,
			(ull)(end - 1));
		return 0;
	}
	for (uint64_t i = first; i < end; i++) {
		/* Most of a sparse file: nothing on either side. */
		if (!block && refs_chunk_empty(&check->refs, i)) {
			tell_mismatch(check, run);
			i |= REFS_CHUNK - 1;
			continue;
		}
		uint64_t on_disk = block ? refcount_entry_get(
						   block, image->header->refcount_order, i - first)
					 : 0;

		compare_cluster(check, run, i, on_disk, refs_get(&check->refs, i));
	}
	return 0;
}

static suspends int compare(struct check *check)
{
	const struct image *image = &check->image;
	uint64_t cluster_count = MAX(
		image_clusters_for(image, image->file_size), check->refs.count);
	struct mismatch run = { 0 };
	int ret = 0;

	for (uint64_t i = 0; i * image->block_entries < cluster_count && !ret; i++) {
		uint64_t end = MIN((i + 1) * image->block_entries, cluster_count);

		ret = compare_block(check, &run, i, end);
		if (i < image->refcount_table_count && image->refcount_table[i])
			check_progress(check, 1);
	}
	tell_mismatch(check, &run);
	/* As QEMU has it: the header's cluster is always in use. */
	check->result->image_end_off = MAX(check->result->image_end_off, image->cluster_size);
	return ret;
}

/* --- the course ------------------------------------------------------------------------------- */

static suspends int count_references(struct check *check)
{
	const struct qcow_header *header = check->image.header;
	uint64_t cluster_size = check->image.cluster_size;
	int ret = check_reference(check, 0, cluster_size, 1, "header");

	if (!ret)
		ret = check_l1(
			check, header->l1_off, header->l1_entry_count, true, "active L1 table");
	if (!ret)
		ret = check_snapshots(check);
	if (!ret)
		ret = check_l2_tables(check);
	if (!ret)
		ret = check_reference(check, header->refcount_table_off,
			header->refcount_table_clusters * cluster_size, 1, "refcount table");
	if (!ret)
		ret = check_bitmaps(check);
	return ret ? ret : check_blocks(check);
}

suspends int check_run(struct check *check, struct blk *file, const struct qcow_header *header,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err)
{
	memset(check, 0, sizeof(*check));
	memset(result, 0, sizeof(*result));
	check->watch = watch;
	check->result = result;
	refs_init(&check->refs, header->refcount_order);
	refs_init(&check->dangling, header->refcount_order);
	int ret = image_init(&check->image, file, header, err);
	if (ret)
		return ret;
	result->total_clusters = image_clusters_for(&check->image, header->size);
	if (image_clusters_for(&check->image, check->image.file_size) >= REFS_INDEX_MAX)
		return err_set(err, EFBIG, "the file of %llu bytes has too many clusters to check",
			(ull)check->image.file_size);
	for (uint64_t i = 0; i < check->image.refcount_table_count; i++)
		check->total += !!check->image.refcount_table[i];
	ret = count_references(check);
	if (!ret)
		ret = compare(check);
	if (ret == -ELOOP)
		return err_set(err, EINVAL,
			"the L1 or bitmap tables together are longer than the file: they overlap");
	return ret ? err_sys(err, -ret, "cannot check the image") : 0;
}

void check_fini(struct check *check)
{
	image_fini(&check->image);
	refs_fini(&check->refs);
	refs_fini(&check->dangling);
	free(take_ptr(check->tables.items));
	qcow_snapshots_fini(&check->snapshots);
}

suspends int qcow_check(struct blk *file, const struct qcow_header *header,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err)
{
	struct check check;
	int ret = check_run(&check, file, header, watch, result, err);

	check_fini(&check);
	return ret;
}
