/*
 * Compaction of a live image: moves what lies at the end of the file into free clusters further down, and
 * cuts the file.
 *
 * Everything goes through the same machinery as guest writes: a cluster is copied under an exclusive hold of
 * its guest range, linked in memory, and the old one given back when that is durable. So it is as
 * crash-safe as a write, guests go on meanwhile, and stopping at any point leaves a sound image.
 *
 * Steps are short and hold q->moving; between them guests, resizes, checks and snapshots get their turn, after
 * which it looks again.
 *
 * The mark is the number of clusters in use: what lies behind it is moved before it, as long as there is
 * room there. Moved are guest clusters, L2 tables, refcount blocks and the refcount table. What internal
 * snapshots share, what is compressed, and the L1 tables stay where they are.
 */
#include <errno.h>
#include <string.h>

#include "blk/qcow/compact.h"
#include "blk/qcow/qcow.h"
#include "rt/buf.h"

#define NAP_NS (100 * NS_PER_MS)

struct compaction {
	struct qcow *q;
	struct qcow_compact *job;
	uint64_t mark; /* host clusters from here on are to be moved */
	uint64_t started_ns, copied_bytes;
};

/* --- pace ------------------------------------------------------------------------------------- */

static bool is_over(const struct compaction *c)
{
	return c->job->cancelled || c->q->closing;
}

/* Sleeps in short naps, so that a cancel need not wait for the rate. */
static suspends void keep_to_rate(struct compaction *c)
{
	uint64_t rate = c->job->rate_bytes_s;
	uint64_t due_ns = c->started_ns +
			  (uint64_t)((double)c->copied_bytes / (double)rate * (double)NS_PER_SEC);

	while (!is_over(c) && due_ns > reactor_now_ns())
		co_sleep_ns(MIN(due_ns - reactor_now_ns(), NAP_NS));
}

/* Between two steps: lets guests go first, and whoever wants the image to keep still. */
static suspends int pause_between_steps(struct compaction *c, uint64_t bytes)
{
	c->copied_bytes += bytes;
	co_mutex_unlock(&c->q->moving);
	co_yield ();
	if (c->job->rate_bytes_s && bytes)
		keep_to_rate(c);
	co_mutex_lock(&c->q->moving);
	return is_over(c) ? -ECANCELED : c->q->corrupt ? -EIO : 0;
}

/* After each step: tells how far it came. */
static suspends int step_done(struct compaction *c, uint64_t bytes, uint64_t guest_off)
{
	c->job->total = c->q->header.size;
	c->job->done = MAX(c->job->done, MIN(guest_off, c->job->total));
	if (c->job->progress)
		c->job->progress(c->job);
	return pause_between_steps(c, bytes);
}

/* --- moving ----------------------------------------------------------------------------------- */

static suspends int copy_cluster(struct qcow *q, uint64_t from_off, uint64_t to_off)
{
	size_t step = (size_t)MIN(q->cluster_size, (uint64_t)BUF_POOLED_MAX_BYTES);
	void *buf = buf_get(step);
	int ret = buf ? 0 : -ENOMEM;

	for (uint64_t at = 0; !ret && at < q->cluster_size; at += step) {
		ret = qcow_read_host(q, from_off + at, buf, step);
		if (!ret)
			ret = blk_write(q->blk.below, to_off + at, buf, step, 0);
	}
	if (buf)
		buf_put(buf, step);
	return ret;
}

static bool is_movable(const struct compaction *c, const struct l2_entry *entry)
{
	return !entry->compressed && entry->copied &&
	       entry->host_off >> c->q->cluster_bits >= c->mark;
}

/* Moves the guest cluster's host cluster; -ENOSPC: no room further down. Holds the range. */
static suspends int move_held(struct compaction *c, uint64_t guest_off)
{
	struct qcow *q = c->q;
	struct slice *slice;
	uint64_t new_off;
	uint8_t *raw;
	int ret = qcow_entry_get(q, guest_off, &slice, &raw);

	if (ret)
		return ret;
	struct l2_entry entry = qcow_entry_decode(q, raw);
	if (!is_movable(c, &entry) || qcow_entry_fault(q, &entry, guest_off)) {
		cache_put(&q->l2_cache, slice);
		return 0;
	}
	ret = qcow_alloc_below(q, c->mark, &new_off);
	if (!ret && (ret = copy_cluster(q, entry.host_off, new_off)))
		qcow_free_unused(q, new_off, 1);
	if (ret) {
		cache_put(&q->l2_cache, slice);
		return ret;
	}
	qcow_free_entry(q, &entry);
	entry.host_off = new_off;
	qcow_entry_encode(q, &entry, raw);
	qcow_entry_put_dirty(q, slice);
	c->job->moved++;
	return 0;
}

/* Does the run lie behind the mark, in part at least, and is it ours to move? */
static bool worth_moving(const struct compaction *c, const struct run *run)
{
	bool ours = (run->kind == RUN_DATA && run->in_place) || run->has_host;

	return ours && !run->entry.compressed &&
	       (run->host_off + run->len) >> c->q->cluster_bits > c->mark;
}

/* Things may have changed since the run was found: resized, a snapshot taken. */
static suspends int move_cluster(struct compaction *c, uint64_t guest_off)
{
	struct qcow *q = c->q;
	struct range range;
	struct run run;

	if (guest_off >= q->header.size)
		return 0;
	int ret = qcow_map(q, guest_off, q->cluster_size, &run);
	if (ret || !worth_moving(c, &run))
		return ret;
	unsigned pin = qcow_pin(q);
	range_lock_acquire(&q->writes, &range, guest_off, q->cluster_size, true);
	ret = move_held(c, guest_off);
	range_lock_release(&q->writes, &range);
	qcow_unpin(q, pin);
	return ret ? ret : step_done(c, q->cluster_size, guest_off);
}

/* Moves what lies behind the mark in a run that starts at guest_off. */
static suspends int move_run(struct compaction *c, uint64_t guest_off, const struct run *run)
{
	struct qcow *q = c->q;

	for (uint64_t at = guest_off; at < guest_off + run->len; at += q->cluster_size) {
		int ret = move_cluster(c, at);

		if (ret)
			return ret;
	}
	return 0;
}

static suspends int move_guest_clusters(struct compaction *c)
{
	struct qcow *q = c->q;

	for (uint64_t off = 0; off < q->header.size;) {
		struct run run;
		int ret = qcow_map(q, off, q->header.size - off, &run);

		if (ret)
			return ret;
		/* One entry decides about its whole cluster, of however many runs it consists. */
		run.len = round_up(off + run.len, q->cluster_size) - off;
		if (worth_moving(c, &run))
			ret = move_run(c, off, &run);
		else if (run.kind == RUN_DATA || run.kind == RUN_COMPRESSED)
			ret = step_done(c, 0, off);
		if (ret)
			return ret;
		off += run.len;
	}
	return 0;
}

static suspends int move_l2_tables(struct compaction *c)
{
	struct qcow *q = c->q;
	uint64_t span = q->cluster_size << q->l2_bits;

	for (uint64_t i = 0; i < q->header.l1_entry_count; i++) {
		uint64_t table_off = q->l1[i] & QCOW_ENTRY_OFF_MASK, new_off;
		struct range range;

		if (!(q->l1[i] & QCOW_ENTRY_COPIED) || table_off >> q->cluster_bits < c->mark)
			continue;
		int ret = qcow_alloc_below(q, c->mark, &new_off);
		if (ret)
			return ret;
		range_lock_acquire(&q->writes, &range, i * span, span, true);
		ret = qcow_move_l2_table(q, i, new_off);
		range_lock_release(&q->writes, &range);
		if (!ret)
			ret = step_done(c, q->cluster_size, q->header.size);
		if (ret)
			return ret;
		c->job->moved++;
	}
	return 0;
}

/* --- the whole -------------------------------------------------------------------------------- */

static suspends int move_everything(struct compaction *c)
{
	int ret = move_guest_clusters(c);

	if (!ret)
		ret = move_l2_tables(c);
	if (!ret)
		ret = qcow_settle(c->q);
	if (!ret)
		ret = qcow_move_refcount_table(c->q, c->mark);
	if (!ret)
		ret = qcow_move_refblocks(c->q, c->mark);
	return ret == -ENOSPC ? 0
			      : ret; /* no room left further down: that is all that can be done */
}

/* Holds q->moving but between steps. */
static suspends int compact_held(struct compaction *c)
{
	struct qcow *q = c->q;
	int ret = qcow_begin_writing(q);

	if (!ret)
		ret = qcow_settle(q);
	if (!ret)
		ret = qcow_count_used(q);
	if (!ret) {
		c->mark = q->used_clusters;
		qcow_search_anew(q);
		ret = move_everything(c);
	}
	if (!ret || ret == -ECANCELED) {
		int cut = qcow_settle(q);

		if (!cut)
			cut = qcow_cut_end(q);
		ret = ret ? ret : cut;
	}
	if (!ret)
		c->job->done = c->job->total = q->header.size;
	return ret;
}

suspends int qcow_compact(struct blk *blk, struct qcow_compact *job, struct err *err)
{
	struct qcow *q = qcow_of(blk);
	struct compaction c = { .q = q, .job = job, .started_ns = reactor_now_ns() };

	if (q->read_only || q->corrupt)
		return err_set(err, EROFS, "the image is read-only");
	if (q->data_file)
		return err_set(
			err, ENOTSUP, "an image with an external data file has nothing to move");
	if (q->compacting)
		return err_set(err, EBUSY, "a compaction is running already");
	q->compacting = job;
	job->size_before = q->end_index << q->cluster_bits;
	co_mutex_lock(&q->moving);
	int ret = compact_held(&c);
	co_mutex_unlock(&q->moving);
	q->compacting = NULL;
	job->size_after = q->end_index << q->cluster_bits;
	if (ret == -ECANCELED)
		return err_set(
			err, ECANCELED, "the compaction was cancelled; what it moved stays moved");
	return ret ? err_sys(err, -ret, "the compaction stopped") : 0;
}

struct qcow_compact *qcow_compaction(struct blk *blk)
{
	return qcow_of(blk)->compacting;
}
