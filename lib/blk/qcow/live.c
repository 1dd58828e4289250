/*
 * Checks and snapshots of an image that is in use.
 *
 * What check.c and snapshot.c want is an image at rest: so requests are drained (new ones wait), a compaction
 * is kept between two of its steps, everything is committed, what was given up is free, and no commit can
 * start. Then memory and disk say the same, and the caches are clean.
 *
 * A snapshot changes tables on disk behind the layer's back, in one atomic step. Afterwards the layer reads its
 * tables again and forgets what it had cached, so the copied flags that are gone are gone in memory too,
 * before the first guest write is let in.
 *
 * When it fails, the old header is stored again: then the image is the old one for certain. If that fails as well,
 * the layer refuses writes; if the new tables cannot be read, everything. The image itself is sound then, the
 * old or the new one.
 */
#include "blk/qcow/live.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "blk/qcow/compact.h"
#include "blk/qcow/snapshot.h"

/* --- an image at rest ------------------------------------------------------------------------- */

static void rest_end(struct qcow *q)
{
	co_mutex_unlock(&q->commit_mutex);
	co_mutex_unlock(&q->moving);
	blk_drain_end(&q->blk);
}

static suspends int rest_begin(struct qcow *q, struct err *err)
{
	blk_drain_begin(&q->blk);
	co_mutex_lock(&q->moving);
	int ret = q->began_writing && !q->corrupt ? qcow_settle(q) : 0;
	co_mutex_lock(&q->commit_mutex);
	if (!ret)
		return 0;
	rest_end(q);
	return err_sys(err, -ret, "cannot write what is pending");
}

/* --- check ------------------------------------------------------------------------------------ */

suspends int qcow_live_check(struct blk *blk, struct qcow_check_watch *watch,
	struct qcow_check_result *result, struct err *err)
{
	struct qcow *q = qcow_of(blk);
	int ret = rest_begin(q, err);

	if (ret)
		return ret;
	ret = qcow_check(blk->below, &q->header, watch, result, err);
	rest_end(q);
	return ret;
}

/* --- snapshots -------------------------------------------------------------------------------- */

suspends int qcow_live_snapshots(struct blk *blk, struct qcow_snapshots *list, struct err *err)
{
	struct qcow *q = qcow_of(blk);
	struct image image;

	memset(list, 0, sizeof(*list));
	co_mutex_lock(&q->moving);
	int ret = image_init(&image, blk->below, &q->header, err);
	if (!ret) {
		ret = qcow_snapshots_load(&image, list, err);
		image_fini(&image);
	}
	co_mutex_unlock(&q->moving);
	return ret;
}

static int find_shown(const struct qcow *q, const struct qcow_snapshots *list,
	const char *id_or_name, struct qcow_header *shown, struct err *err)
{
	const struct qcow_snapshot *snapshot = qcow_snapshots_find(list, id_or_name);

	if (!snapshot)
		return err_set(err, ENOENT, "there is no snapshot \"%s\"", id_or_name);
	*shown = q->header;
	shown->size = snapshot->disk_size;
	shown->l1_off = snapshot->l1_off;
	shown->l1_entry_count = snapshot->l1_entry_count;
	int ret = shown->size ? qcow_header_check_disk(shown, blk_caps(q->blk.below)->size, err)
			      : err_set(err, EINVAL, "its disk has size 0");
	return ret ? err_wrap(err, "snapshot \"%s\"", id_or_name) : 0;
}

suspends int qcow_live_show(struct blk *blk, const char *id_or_name, struct err *err)
{
	struct qcow *q = qcow_of(blk);
	struct qcow_header old = q->header, shown;
	struct qcow_snapshots list;

	if (!q->read_only)
		return err_set(err, EINVAL, "a snapshot is shown read-only");
	int ret = qcow_live_snapshots(blk, &list, err);
	if (ret)
		return ret;
	ret = find_shown(q, &list, id_or_name, &shown, err);
	qcow_snapshots_fini(&list);
	if (ret)
		return ret;
	q->header = shown;
	ret = qcow_load_tables(q, err);
	if (ret)
		q->header = old;
	else
		blk_size_changed(blk, shown.size);
	return ret;
}

/* What the old tables point to may be gone already, so without the new ones nothing can be read either. */
static suspends int reload(struct qcow *q, struct err *err)
{
	qcow_inflated_forget(q);
	cache_forget_all(&q->l2_cache);
	cache_forget_all(&q->refcount_cache);
	q->free_index = q->counted_to = q->used_clusters = 0;
	int ret = qcow_load_tables(q, err);
	if (!ret)
		return 0;
	q->blk.disconnected = q->frozen = q->corrupt = true;
	snprintf(q->corrupt_text, sizeof(q->corrupt_text), "after a snapshot: %s", err->text);
	return err_wrap(err, "the disk is gone until the image is opened anew");
}

/* Makes certain that the image is the old one. Free clusters may have been written to, all over the file. */
static suspends int restore(struct qcow *q, struct err *err)
{
	uint64_t file_size = blk_caps(q->blk.below)->size;

	q->fresh_index = MAX(q->fresh_index, (file_size + q->cluster_size - 1) >> q->cluster_bits);
	if (qcow_header_restore(q))
		return err_wrap(err, "no more writes until the image is opened anew");
	return -err->code;
}

static suspends int change_at_rest(
	struct qcow *q, enum qcow_snapshot_change change, const char *name, struct err *err)
{
	struct blk *file = q->blk.below;
	int ret = -EINVAL;

	switch (change) {
	case QCOW_SNAPSHOT_CREATE:
		ret = qcow_snapshot_create(file, &q->header, name, q->opt_discard, err);
		break;
	case QCOW_SNAPSHOT_APPLY:
		ret = qcow_snapshot_apply(file, &q->header, name, q->opt_discard, err);
		break;
	case QCOW_SNAPSHOT_DELETE:
		ret = qcow_snapshot_delete(file, &q->header, name, q->opt_discard, err);
		break;
	}
	return ret ? restore(q, err) : reload(q, err);
}

suspends int qcow_live_snapshot(
	struct blk *blk, enum qcow_snapshot_change change, const char *name, struct err *err)
{
	struct qcow *q = qcow_of(blk);

	if (q->read_only || q->corrupt)
		return err_set(err, EROFS, "the image is read-only");
	int ret = rest_begin(q, err);
	if (ret)
		return ret;
	ret = qcow_begin_writing(q);
	if (ret)
		err_sys(err, -ret, "cannot write the header");
	else
		ret = change_at_rest(q, change, name, err);
	if (!ret && q->header.size != blk->caps.size)
		blk_size_changed(blk, q->header.size);
	rest_end(q);
	return ret;
}
