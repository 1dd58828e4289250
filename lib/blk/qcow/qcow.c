/*
 * qcow: disks in qcow2 images, versions 2 and 3. This file has the op table, open and close.
 *
 * How the layer works stands at the head of qcow.h. Opening reads the header and the two top-level tables
 * (L1, refcount table) into memory, checks them, and finds the end of what is allocated; nothing is
 * written until the first request that changes something. Closing commits everything and cuts the file
 * behind the last cluster in use.
 *
 * An image that is marked corrupt is served read-only. One whose refcounts are stale (dirty bit) is
 * repaired first when it is opened for writing.
 */
#include "blk/qcow/qcow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "blk/layers.h"
#include "blk/qcow/check.h"
#include "blk/qcow/compact.h"

#define MAX_PREFERRED_SIZE 65536

static const struct opt qcow_options[] = {
	{ "backing", OPT_LIST, offsetof(struct qcow, backing_conf),
		.help = "the stack that is the image's backing file" },
	{ "data-file", OPT_LIST, offsetof(struct qcow, data_file_conf),
		.help = "the stack that is the image's external data file" },
	{ "allow-backing", OPT_STRINGS, offsetof(struct qcow, allow_backing_conf),
		.help = "folders in which files named inside the image may lie" },
	{ "backing-depth", OPT_INT, offsetof(struct qcow, opt_backing_depth), .fallback = "32",
		.max = QCOW_BACKING_DEPTH_MAX,
		.help = "how many files that images name may follow each other" },
	{ "cache", OPT_SIZE, offsetof(struct qcow, opt_cache_size), .fallback = "32M", .min = 65536,
		.max = INT64_C(1) << 34, .help = "memory for tables, at most" },
	{ "lazy-refcounts", OPT_BOOL, offsetof(struct qcow, opt_lazy_refcounts),
		.fallback = "false",
		.help = "mark the image dirty while in use: repaired after a crash (version 3)" },
	{ "discard", OPT_BOOL, offsetof(struct qcow, opt_discard), .fallback = "true",
		.help = "punch clusters that become free out of the file, or data file" },
	{ "commit-interval", OPT_INT, offsetof(struct qcow, opt_commit_interval_s), .fallback = "5",
		.min = 1, .max = 3600, .help = "seconds until metadata nobody flushed is written" },
	{ "compact-after", OPT_STRING, offsetof(struct qcow, opt_compact_after),
		.help = "compact when more than so much (\"10G\") or such a share (\"25%\") of the "
			"file is free" },
	{ "compact-idle", OPT_INT, offsetof(struct qcow, opt_compact_idle_s), .fallback = "10",
		.min = 1, .max = 86400,
		.help = "seconds without a request before a compaction starts by itself" },
	{ "compact-rate", OPT_SIZE, offsetof(struct qcow, opt_compact_rate), .fallback = "32M",
		.min = 4096, .max = INT64_MAX, .help = "bytes per second that it copies at most" },
	{ 0 },
};

/* --- opening ---------------------------------------------------------------------------------- */

static void set_geometry(struct qcow *q)
{
	const struct qcow_header *header = &q->header;
	bool extended = header->incompatible & QCOW_INCOMPAT_EXTENDED_L2;

	q->cluster_bits = header->cluster_bits;
	q->cluster_size = UINT64_C(1) << q->cluster_bits;
	q->entry_size = extended ? 16 : 8;
	q->l2_bits = q->cluster_bits - (extended ? 4 : 3);
	q->subclusters = extended ? QCOW_SUBCLUSTERS : 1;
	q->subcluster_bits = q->cluster_bits - (extended ? 5 : 0);
	q->refcount_bits = 1U << header->refcount_order;
	q->refblock_bits = q->cluster_bits + 3 - header->refcount_order;
}

/* Reads a table of 64-bit entries; the array has room for `capacity`, zeroes behind the last one. */
static suspends int load_table(struct qcow *q, const char *name, uint64_t off, uint64_t count,
	uint64_t capacity, uint64_t **table, uint64_t **dirty, struct err *err)
{
	*table = calloc(MAX(capacity, UINT64_C(1)), sizeof(**table));
	*dirty = calloc(bitmap_words(capacity) + 1, sizeof(**dirty));
	if (!*table || !*dirty)
		return err_set(err, ENOMEM, "no memory for the %s", name);
	for (uint64_t at = 0, step; at < count; at += step) {
		step = MIN(count - at, (uint64_t)BLK_REQUEST_MAX / 8);
		int ret = qcow_read_host(q, off + at * 8, *table + at, (size_t)step * 8);

		if (ret)
			return err_sys(err, -ret, "cannot read the %s at %llu", name,
				(unsigned long long)off);
	}
	for (uint64_t i = 0; i < count; i++)
		(*table)[i] = be64_get(((be64 *)*table)[i]);
	return 0;
}

/* Finds the end of what is allocated: behind the last count that is not 0. */
static suspends int find_end(struct qcow *q, struct err *err)
{
	uint64_t region = q->refcount_table_count, file_size = blk_caps(q->blk.below)->size;

	q->end_index = 1;
	q->fresh_index = (file_size + q->cluster_size - 1) >> q->cluster_bits;
	while (region-- > 0) {
		uint64_t first = region << q->refblock_bits, refcount;

		if (!(q->refcount_table[region] & QCOW_REFTABLE_OFF_MASK))
			continue;
		for (uint64_t i = UINT64_C(1) << q->refblock_bits; i-- > 0;) {
			int ret = qcow_refcount_get(q, first + i, &refcount);

			if (ret)
				return err_sys(err, -ret, "cannot read the refcounts");
			if (refcount) {
				q->end_index = first + i + 1;
				q->fresh_index = MAX(q->fresh_index, q->end_index);
				return 0;
			}
		}
	}
	return 0;
}

static void find_metadata(struct qcow *q)
{
	free(q->metadata.keys);
	memset(&q->metadata, 0, sizeof(q->metadata));
	for (uint32_t i = 0; i < q->header.l1_entry_count; i++)
		if (q->l1[i] & QCOW_ENTRY_OFF_MASK)
			cluster_set_add(
				&q->metadata, (q->l1[i] & QCOW_ENTRY_OFF_MASK) >> q->cluster_bits);
	for (uint32_t i = 0; i < q->refcount_table_count; i++)
		if (q->refcount_table[i])
			cluster_set_add(&q->metadata,
				(q->refcount_table[i] & QCOW_REFTABLE_OFF_MASK) >> q->cluster_bits);
}

static void exchange(uint64_t **a, uint64_t **b)
{
	uint64_t *old = *a;

	*a = *b;
	*b = old;
}

suspends int qcow_load_tables(struct qcow *q, struct err *err)
{
	uint64_t l1_len = q->header.l1_entry_count * UINT64_C(8);
	uint64_t l1_capacity = round_up(l1_len, q->cluster_size) / 8;
	uint64_t table_count = q->header.refcount_table_clusters * (q->cluster_size / 8);
	uint64_t *l1 = NULL, *l1_dirty = NULL, *table = NULL, *table_dirty = NULL;
	int ret = load_table(q, "L1 table", q->header.l1_off, q->header.l1_entry_count, l1_capacity,
		&l1, &l1_dirty, err);

	if (!ret)
		ret = load_table(q, "refcount table", q->header.refcount_table_off, table_count,
			table_count, &table, &table_dirty, err);
	if (!ret) {
		exchange(&q->l1, &l1);
		exchange(&q->l1_dirty, &l1_dirty);
		exchange(&q->refcount_table, &table);
		exchange(&q->refcount_table_dirty, &table_dirty);
		q->l1_capacity = (uint32_t)l1_capacity;
		q->refcount_table_count = (uint32_t)table_count;
		find_metadata(q);
		if (!q->read_only)
			ret = find_end(q, err);
	}
	free(l1);
	free(l1_dirty);
	free(table);
	free(table_dirty);
	return ret;
}

/* The image was not closed properly: its refcounts are made anew from what points to the clusters. */
static suspends int repair_dirty(struct qcow *q, struct err *err)
{
	struct qcow_check_result result;

	log_debug("qcow: the image was not closed properly: repairing its refcounts");
	int ret = qcow_repair(q->blk.below, &q->header, QCOW_REPAIR_ALL, NULL, &result, err);
	if (ret)
		return err_wrap(err, "the image was not closed properly, and its repair failed");
	if (result.corruptions || result.errors)
		return err_set(err, EUCLEAN,
			"the image was not closed properly, and %llu errors cannot be repaired: "
			"see "
			"blkstack-img check",
			(unsigned long long)(result.corruptions + result.errors));
	return 0;
}

static suspends int refuse_or_repair(struct qcow *q, struct err *err)
{
	uint64_t incompatible = q->header.incompatible;

	if (incompatible & QCOW_INCOMPAT_CORRUPT) {
		q->read_only = q->blk.caps.read_only = true;
		log_debug("qcow: the image is marked corrupt: read-only until it is repaired");
		return 0;
	}
	if (incompatible & QCOW_INCOMPAT_DIRTY && !q->read_only)
		return repair_dirty(q, err);
	return 0;
}

struct place {
	const char *name;
	uint64_t off, len;
};

/* Tables that the header names must not lie on top of each other: changing one would destroy the other. */
static int check_overlaps(const struct qcow_header *header, struct err *err)
{
	uint64_t cluster_size = UINT64_C(1) << header->cluster_bits;
	const struct place places[] = {
		{ "l1 table", header->l1_off, header->l1_entry_count * UINT64_C(8) },
		{ "refcount table", header->refcount_table_off,
			header->refcount_table_clusters * cluster_size },
		{ "snapshot table", header->snapshots_off, header->snapshot_count },
	};

	for (size_t i = 0; i < ARRAY_LEN(places); i++)
		for (size_t j = 0; j < i; j++) {
			const struct place *a = &places[j], *b = &places[i];

			if (a->len && b->len && a->off < b->off + b->len &&
				b->off < a->off + a->len)
				return err_set(err, EUCLEAN,
					"the %s at %llu and the %s at %llu overlap", a->name,
					(unsigned long long)a->off, b->name,
					(unsigned long long)b->off);
		}
	return 0;
}

static suspends int open_image(struct qcow *q, struct err *err)
{
	struct blk_caps *caps = &q->blk.caps;
	int ret = qcow_header_load(q->blk.below, &q->header, err);

	if (!ret)
		ret = check_overlaps(&q->header, err);
	if (!ret)
		ret = refuse_or_repair(q, err);
	if (ret)
		return ret;
	set_geometry(q);
	if (q->opt_lazy_refcounts && q->header.version < 3)
		return err_set(
			err, ENOTSUP, "lazy-refcounts needs version 3; the image has version 2");
	q->opt_lazy_refcounts |= q->header.compatible & QCOW_COMPAT_LAZY_REFCOUNTS;
	if (cache_init(&q->l2_cache, q, q->opt_cache_size / 8 * 7) ||
		cache_init(&q->refcount_cache, q, q->opt_cache_size / 8))
		return err_set(err, ENOMEM, "no memory for a cache of %llu bytes",
			(unsigned long long)q->opt_cache_size);
	ret = qcow_open_data_file(q, err);
	if (!ret)
		ret = qcow_open_backing(q, err);
	if (!ret)
		ret = qcow_load_tables(q, err);
	if (ret)
		return ret;
	if (!q->header.size)
		return err_set(err, EINVAL, "the disk in the image has size 0: resize it first");
	caps->size = q->header.size;
	caps->block_size = 1;
	caps->mem_align = 1;
	caps->max_request = BLK_REQUEST_MAX;
	caps->preferred_size = (uint32_t)MIN(q->cluster_size, (uint64_t)MAX_PREFERRED_SIZE);
	caps->fua = true;
	caps->zero_fast = q->header.version == 3;
	caps->discard = true;
	caps->grows = true;
	caps->multi_reactor = false;
	caps->maps_cheaply = !q->backing || blk_caps(q->backing)->maps_cheaply;
	caps->caches_writes = !q->read_only || blk_caps(q->data)->caches_writes; /* the tables */
	caps->dies_with_process |= blk_caps(q->data)->dies_with_process;
	caps->dies_with_process |= q->backing && blk_caps(q->backing)->dies_with_process;
	return 0;
}

static suspends int qcow_open(struct blk *blk, struct err *err)
{
	struct qcow *q = qcow_of(blk);

	q->read_only = blk->caps.read_only;
	q->below_grows = blk_caps(blk->below)->grows && !q->read_only;
	co_mutex_init(&q->alloc_mutex);
	co_mutex_init(&q->l2_mutex);
	co_mutex_init(&q->moving);
	co_mutex_init(&q->header_mutex);
	co_mutex_init(&q->beginning);
	range_lock_init(&q->writes);
	qcow_commit_init(q);
	qcow_compact_auto_init(q);
	int ret = open_image(q, err);
	if (!ret)
		qcow_compact_auto_start(q);
	return ret;
}

static int qcow_check_options(const struct blk *blk, struct err *err)
{
	const char *text = container_of(blk, struct qcow, blk)->opt_compact_after;
	uint64_t bytes;
	unsigned percent;

	return text ? qcow_compact_after_parse(text, &bytes, &percent, err) : 0;
}

/* --- closing ---------------------------------------------------------------------------------- */

/* The file ends where the image does: what growing in steps left behind goes. */
static suspends void cut_file(struct qcow *q)
{
	uint64_t end = q->end_index << q->cluster_bits;

	if (q->below_grows && end < blk_caps(q->blk.below)->size)
		blk_resize(q->blk.below, end, BLK_FORCE, NULL);
}

static suspends void finish_writing(struct qcow *q)
{
	int ret = qcow_settle(q);

	if (!ret && q->header.incompatible & QCOW_INCOMPAT_DIRTY) {
		q->header.incompatible &= ~(uint64_t)QCOW_INCOMPAT_DIRTY;
		ret = qcow_header_store(q);
	}
	if (!ret && !q->corrupt)
		cut_file(q);
	if (ret)
		log_debug("qcow: closing: %s", strerror(-ret));
}

static suspends void qcow_close(struct blk *blk)
{
	struct qcow *q = qcow_of(blk);

	q->closing = true;
	qcow_compact_auto_stop(q);
	if (q->began_writing)
		finish_writing(q);
	qcow_commit_fini(q);
	cache_fini(&q->l2_cache);
	cache_fini(&q->refcount_cache);
	free(q->l1);
	free(q->l1_dirty);
	free(q->refcount_table);
	free(q->refcount_table_dirty);
	free(q->metadata.keys);
	qcow_inflated_free(q);
	qcow_header_fini(&q->header);
}

/* --- the other ops ---------------------------------------------------------------------------- */

static suspends int qcow_flush(struct blk *blk)
{
	struct qcow *q = qcow_of(blk);

	if (q->read_only)
		return 0;
	if (q->frozen)
		return -EIO;
	if (qcow_metadata_dirty(q))
		return qcow_commit(q);
	int ret = q->data_file ? blk_flush(q->data) : 0;
	return ret ? ret : blk_flush(blk->below);
}

/* A hole shows the backing, whose extents then tell. False ends the search. */
static suspends bool add_hole(
	struct qcow *q, uint64_t off, uint64_t len, struct blk_extents *extents, int *ret)
{
	uint64_t backing_size = q->backing ? blk_caps(q->backing)->size : 0;
	uint64_t inside = off < backing_size ? MIN(len, backing_size - off) : 0;

	if (inside) {
		uint64_t end = extents->end;

		extents->depth++;
		*ret = blk_extents(q->backing, off, inside, extents);
		extents->depth--;
		if (*ret || extents->end != end + inside)
			return false;
	}
	return inside == len ||
	       blk_extents_add(extents, len - inside, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
}

static suspends int qcow_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct qcow *q = qcow_of(blk);
	unsigned pin = qcow_pin(q);
	bool more = true;
	int ret = 0;

	while (more && len) {
		struct run run;

		ret = qcow_map(q, off, len, &run);
		if (ret)
			break;
		if (run.kind == RUN_HOLE)
			more = add_hole(q, off, run.len, extents, &ret);
		else if (run.kind == RUN_ZERO)
			more = blk_extents_add(extents, run.len,
				BLK_EXTENT_ZERO | (run.has_host ? 0 : BLK_EXTENT_HOLE));
		else
			more = blk_extents_add(extents, run.len, BLK_EXTENT_DATA);
		off += run.len;
		len -= run.len;
	}
	qcow_unpin(q, pin);
	return ret;
}

/* The file's size is qcow's own affair. */
static void qcow_child_resized(struct blk *blk, struct blk *child)
{
}

static void qcow_status(struct blk *blk, json_t *object)
{
	struct qcow *q = qcow_of(blk);
	json_t *own = json_pack("{s:i, s:I, s:b, s:i, s:i, s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
		"version", (int)q->header.version, "cluster_size", (json_int_t)q->cluster_size,
		"extended_l2", q->subclusters > 1, "refcount_bits", (int)q->refcount_bits,
		"snapshots", (int)q->header.snapshot_count, "lazy_refcounts", q->opt_lazy_refcounts,
		"clusters_allocated", (json_int_t)q->stats.allocated, "clusters_freed",
		(json_int_t)q->stats.freed, "cow_bytes", (json_int_t)q->stats.cow_bytes, "commits",
		(json_int_t)q->stats.commits, "commit_errors", (json_int_t)q->stats.commit_errors,
		"cache_hits", (json_int_t)q->l2_cache.hits, "cache_misses",
		(json_int_t)q->l2_cache.misses);

	if (q->header.backing_name)
		json_object_set_new(own, "backing_file", json_string(q->header.backing_name));
	if (q->corrupt || q->header.incompatible & QCOW_INCOMPAT_CORRUPT)
		json_object_set_new(own, "corrupt",
			json_string(q->corrupt ? q->corrupt_text : "marked so when it was opened"));
	if (*q->frozen_text)
		json_object_set_new(own, "frozen", json_string(q->frozen_text));
	if (q->compacting)
		json_object_set_new(own, "compaction",
			json_pack("{s:I, s:I, s:I}", "done", (json_int_t)q->compacting->done,
				"total", (json_int_t)q->compacting->total, "moved",
				(json_int_t)q->compacting->moved));
	json_object_update_new(object, own);
}

const struct blk_ops qcow_ops = {
	.name = "qcow",
	.summary = "a disk in a qcow2 image",
	.options = qcow_options,
	.struct_size = sizeof(struct qcow),
	.check = qcow_check_options,
	.open = qcow_open,
	.close = qcow_close,
	.read = qcow_read,
	.write = qcow_write,
	.flush = qcow_flush,
	.zero = qcow_zero,
	.discard = qcow_discard,
	.extents = qcow_extents,
	.resize = qcow_resize,
	.child_resized = qcow_child_resized,
	.status = qcow_status,
};
