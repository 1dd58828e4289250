/*
 * Internal snapshots: create, apply, delete.
 *
 * A snapshot is a second L1 table; what both reach has a count of 2 or more and loses its copied flags in the active
 * tree. The flags stand in L2 tables and the counts in refcount blocks, so no order of single writes keeps
 * them in step. Therefore all of it is one step of shadow.c: L2 tables whose flags change are written to new
 * clusters, like everything else, and the header switches. Both trees go on sharing L2 tables.
 *
 * Only what is not shared yet changes: a second snapshot rewrites the tables that were written to since the first.
 * The state of a virtual machine that QEMU kept in a snapshot stays in it; it does not come into the active disk.
 */
#include "blk/qcow/snapshot.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "blk/qcow/shadow.h"
#include "blk/qcow/snapshot_table.h"

/* One operation under way. */
struct work {
	struct image image;
	struct shadow shadow;
	struct qcow_snapshots list;
	uint64_t list_len; /* of the table on disk */
	uint64_t *active;  /* the active L1 table */
};

static void work_fini(struct work *work)
{
	free(work->active);
	qcow_snapshots_fini(&work->list);
	shadow_fini(&work->shadow);
	image_fini(&work->image);
}

static suspends int work_init(
	struct work *work, struct blk *file, const struct qcow_header *header, struct err *err)
{
	int ret;

	memset(work, 0, sizeof(*work));
	if (header->incompatible & QCOW_INCOMPAT_DATA_FILE)
		return err_set(err, ENOTSUP, "an image with a data file cannot have snapshots");
	if (header->incompatible & QCOW_INCOMPAT_CORRUPT)
		return err_set(err, EUCLEAN, "the image is marked corrupt: repair it first");
	ret = image_init(&work->image, file, header, err);
	if (!ret)
		ret = qcow_snapshots_load(&work->image, &work->list, err);
	if (!ret)
		ret = shadow_init(&work->shadow, &work->image, err);
	work->list_len = work->list.len;
	if (!ret)
		ret = shadow_load_l1(
			&work->shadow, header->l1_off, header->l1_entry_count, &work->active, err);
	return ret;
}

/* ret is of the preparations: commits, or gives up. err is filled already when it is not 0. */
static suspends int work_finish(
	struct work *work, struct qcow_header *header, bool discard, int ret, struct err *err)
{
	const struct qcow_header *changed = &work->shadow.header;
	bool unknown = false;

	if (ret) {
		if (work->shadow.image)
			shadow_abort(&work->shadow);
		return ret;
	}
	ret = shadow_commit(&work->shadow, discard, &unknown);
	if (ret)
		return err_sys(err, -ret, "%s",
			unknown ? "cannot store the header; the image is as before or changed, but "
				  "whole"
				: "cannot write the new tables");
	qcow_header_take(header, changed);
	header->autoclear = changed->autoclear;
	return 0;
}

static int cannot_write(int ret, struct err *err)
{
	return ret ? err_sys(err, -ret, "cannot write the new tables") : 0;
}

/* --- create ----------------------------------------------------------------------------------- */

static int check_new_name(const struct qcow_snapshots *list, const char *name, struct err *err)
{
	if (!*name || strlen(name) > QCOW_SNAPSHOT_NAME_MAX_BYTES)
		return err_set(err, EINVAL, "a snapshot's name has 1 to %d bytes",
			QCOW_SNAPSHOT_NAME_MAX_BYTES);
	if (qcow_snapshots_find(list, name))
		return err_set(err, EEXIST, "there is a snapshot \"%s\" already", name);
	if (list->count >= QCOW_SNAPSHOTS_MAX)
		return err_set(err, ENOSPC, "the image has %u snapshots, more are not possible",
			list->count);
	return 0;
}

static unsigned long next_id(const struct qcow_snapshots *list)
{
	unsigned long id, max = 0;

	for (uint32_t i = 0; i < list->count; i++) {
		id = strtoul(list->items[i].id, NULL, 10);
		max = MAX(max, id);
	}
	return max + 1;
}

/* A new row at the end of the list; its L1 table is the caller's to set. */
static int append(struct qcow_snapshots *list, const struct qcow_header *header, const char *name)
{
	struct qcow_snapshot *items = realloc(list->items, (list->count + 1) * sizeof(*items));
	struct qcow_snapshot *snapshot;
	struct timespec now;
	char id[24];

	if (!items)
		return -ENOMEM;
	list->items = items;
	clock_gettime(CLOCK_REALTIME, &now);
	snprintf(id, sizeof(id), "%lu", next_id(list));
	snapshot = &items[list->count];
	*snapshot = (struct qcow_snapshot){
		.l1_entry_count = header->l1_entry_count,
		.id = strdup(id),
		.name = strdup(name),
		.id_len = (uint16_t)strlen(id),
		.name_len = (uint16_t)strlen(name),
		.time_s = (uint32_t)now.tv_sec,
		.time_ns = (uint32_t)now.tv_nsec,
		.disk_size = header->size,
		.extra = calloc(1, sizeof(struct qcow_disk_snapshot_extra)),
		.extra_len = sizeof(struct qcow_disk_snapshot_extra),
	};
	list->count++;
	return snapshot->id && snapshot->name && snapshot->extra ? 0 : -ENOMEM;
}

static suspends int prepare_create(
	struct work *work, const struct qcow_header *header, const char *name, struct err *err)
{
	uint32_t count = header->l1_entry_count;
	uint64_t clusters = image_clusters_for(&work->image, (uint64_t)count * 8);
	int ret = check_new_name(&work->list, name, err);

	if (!ret)
		ret = shadow_add_tree(&work->shadow, work->active, count, 1, err);
	if (ret)
		return ret;
	/* Tables that change had one user, and will have two: the disk and the snapshot. */
	ret = shadow_fix_tree(&work->shadow, work->active, count, 2, false);
	if (!ret)
		ret = append(&work->list, header, name);
	struct qcow_snapshot *snapshot = ret ? NULL : &work->list.items[work->list.count - 1];
	if (!ret && clusters)
		ret = shadow_alloc(&work->shadow, clusters, 1, &snapshot->l1_off);
	if (!ret)
		ret = shadow_write_words(&work->shadow, snapshot->l1_off, work->active, count);
	if (!ret)
		ret = shadow_replace_l1(&work->shadow, work->active, count);
	if (!ret)
		ret = shadow_replace_snapshots(&work->shadow, &work->list, work->list_len);
	return cannot_write(ret, err);
}

suspends int qcow_snapshot_create(struct blk *file, struct qcow_header *header, const char *name,
	bool discard, struct err *err)
{
	struct work work;
	int ret = work_init(&work, file, header, err);

	if (!ret)
		ret = prepare_create(&work, header, name, err);
	ret = work_finish(&work, header, discard, ret, err);
	work_fini(&work);
	return ret;
}

/* --- apply and delete ------------------------------------------------------------------------- */

static suspends int find(struct work *work, const char *id_or_name, struct qcow_snapshot **snapshot,
	uint64_t **words, struct err *err)
{
	*snapshot = qcow_snapshots_find(&work->list, id_or_name);
	if (!*snapshot)
		return err_set(err, ENOENT, "there is no snapshot \"%s\"", id_or_name);
	return shadow_load_l1(
		&work->shadow, (*snapshot)->l1_off, (*snapshot)->l1_entry_count, words, err);
}

/* The L1 entries that describe the disk; what lies behind is the state of a virtual machine. */
static int disk_entries(const struct work *work, const struct qcow_snapshot *snapshot,
	uint32_t *count, struct err *err)
{
	uint64_t span = work->image.l2_entries * work->image.cluster_size;
	uint64_t needed = snapshot->disk_size / span + !!(snapshot->disk_size % span);

	if (needed > snapshot->l1_entry_count)
		return err_set(err, EUCLEAN,
			"the snapshot's L1 table of %u entries is too small for its size %llu",
			snapshot->l1_entry_count, (unsigned long long)snapshot->disk_size);
	*count = (uint32_t)needed;
	return 0;
}

static suspends int prepare_apply(struct work *work, const struct qcow_header *header,
	const char *id_or_name, struct err *err)
{
	CLEANUP(free) uint64_t *words = NULL;
	struct qcow_snapshot *snapshot;
	uint32_t count = 0;
	int ret = find(work, id_or_name, &snapshot, &words, err);

	if (!ret)
		ret = disk_entries(work, snapshot, &count, err);
	/* Down first: what both share would have one reference too many in between for narrow counts. */
	if (!ret)
		ret = shadow_add_tree(&work->shadow, work->active, header->l1_entry_count, -1, err);
	if (!ret)
		ret = shadow_add_tree(&work->shadow, words, count, 1, err);
	if (ret)
		return ret;
	/*
	 * Everything has two users at least, so no flag may be set. Where one is, in a table that the disk does
	 * not reach yet, it means nothing so far and is cleared in place: no table has 0 users, so none moves.
	 */
	ret = shadow_fix_tree(&work->shadow, words, count, 0, false);
	if (!ret)
		ret = shadow_replace_l1(&work->shadow, words, count);
	work->shadow.header.size = snapshot->disk_size;
	work->shadow.header.autoclear &= QCOW_AUTOCLEAR_RAW_DATA_FILE; /* bitmaps are stale now */
	return cannot_write(ret, err);
}

suspends int qcow_snapshot_apply(struct blk *file, struct qcow_header *header,
	const char *id_or_name, bool discard, struct err *err)
{
	struct work work;
	int ret = work_init(&work, file, header, err);

	if (!ret)
		ret = prepare_apply(&work, header, id_or_name, err);
	ret = work_finish(&work, header, discard, ret, err);
	work_fini(&work);
	return ret;
}

static void remove_row(struct qcow_snapshots *list, struct qcow_snapshot *snapshot)
{
	size_t behind = (size_t)(list->items + list->count - (snapshot + 1));

	qcow_snapshot_fini(snapshot);
	memmove(snapshot, snapshot + 1, behind * sizeof(*snapshot));
	list->count--;
}

static suspends int prepare_delete(struct work *work, const struct qcow_header *header,
	const char *id_or_name, struct err *err)
{
	CLEANUP(free) uint64_t *words = NULL;
	struct qcow_snapshot *snapshot;
	int ret = find(work, id_or_name, &snapshot, &words, err);

	if (!ret)
		ret = shadow_add_tree(&work->shadow, words, snapshot->l1_entry_count, -1, err);
	if (ret)
		return ret;
	ret = shadow_give_up(
		&work->shadow, snapshot->l1_off, (uint64_t)snapshot->l1_entry_count * 8);
	if (!ret)
		ret = shadow_fix_tree(
			&work->shadow, work->active, header->l1_entry_count, 1, false);
	if (!ret)
		ret = shadow_replace_l1(&work->shadow, work->active, header->l1_entry_count);
	remove_row(&work->list, snapshot);
	if (!ret)
		ret = shadow_replace_snapshots(&work->shadow, &work->list, work->list_len);
	return cannot_write(ret, err);
}

suspends int qcow_snapshot_delete(struct blk *file, struct qcow_header *header,
	const char *id_or_name, bool discard, struct err *err)
{
	struct work work;
	int ret = work_init(&work, file, header, err);

	if (!ret)
		ret = prepare_delete(&work, header, id_or_name, err);
	ret = work_finish(&work, header, discard, ret, err);
	work_fini(&work);
	return ret;
}
