/*
 * Commits: the order in which metadata reaches the disk, and what happens to clusters given up.
 *
 * The rules stand at the head of qcow.h. A commit copies everything that is dirty when it begins (no
 * suspension in between), then writes and flushes phase by phase. Slices that take part keep a user
 * until it is over, so a failed commit can mark them dirty again and nothing is lost.
 *
 * Commits run one at a time under commit_mutex and are numbered. Whoever wants its changes durable needs a
 * commit that began after its call; if somebody else's did, it is taken (group commit).
 *
 * Clusters: unlinked (entry changed in memory) -> committed (change durable) -> free. Between the last two
 * lies a grace period: q->pin_epoch is advanced and everybody who pinned the old epoch must have ended.
 *
 * Failure: a write that fails leaves all of it dirty; the error goes to everybody who waited, and the next commit
 * tries again: it may succeed, because it writes everything anew that the failed one had. A flush that fails may
 * have lost what no commit writes anew: guests' data, the first content of new tables. Often only the
 * commit timer hears of it, and a disk below says so once. So that freezes the layer: no flush
 * and no commit succeeds until the image is opened anew, which then is what the last good commit left.
 */
#include "blk/qcow/qcow.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

/* Tables in memory are written by sectors, which disks write whole. */
#define SECTOR_ENTRIES 64
#define SECTOR_BYTES   (SECTOR_ENTRIES * 8)

/* Adjacent writes are joined up to this length. */
#define JOINED_WRITE_MAX_BYTES (256 * 1024)

/* --- what one commit writes ------------------------------------------------------------------- */

struct item {
	uint64_t host_off;
	const uint8_t *data;
	uint32_t len;
};

struct phase {
	struct item *items;
	size_t count;
};

struct commit {
	struct phase phases[3];
	uint8_t *arena, *arena_next; /* copies of everything */
	struct item *items;
	struct slice **slices; /* that take part, each with one more user */
	size_t l2_slice_count, slice_count;
	uint64_t *l1_dirty, *refcount_table_dirty; /* the bits that were set */
	struct freed_list freed;
};

static size_t sectors_dirty(const uint64_t *dirty_bits, size_t entry_count)
{
	size_t count = 0;

	for (size_t word = 0; word < bitmap_words(entry_count); word++)
		count += !!dirty_bits[word]; /* a word of 64 bits is a sector of 64 entries */
	return count;
}

static void add_item(struct commit *c, struct phase *phase, uint64_t host_off, uint32_t len)
{
	phase->items[phase->count++] = (struct item){
		.host_off = host_off, .data = c->arena_next, .len = len
	};
	c->arena_next += len;
}

static void add_slice(
	struct commit *c, struct phase *phase, struct cache *cache, struct slice *slice)
{
	memcpy(c->arena_next, slice->data, cache->slice_size);
	add_item(c, phase, slice->host_off, cache->slice_size);
	cache_use(slice);
	cache_mark_clean(cache, slice);
	c->slices[c->slice_count++] = slice;
}

static void add_table(struct commit *c, struct phase *phase, uint64_t table_off,
	const uint64_t *table, uint64_t *dirty_bits, uint64_t *taken_bits, size_t entry_count)
{
	for (size_t word = 0; word < bitmap_words(entry_count); word++) {
		size_t first = word * SECTOR_ENTRIES;
		size_t count = MIN((size_t)SECTOR_ENTRIES, entry_count - first);

		taken_bits[word] = dirty_bits[word];
		if (!dirty_bits[word])
			continue;
		dirty_bits[word] = 0;
		for (size_t i = 0; i < count; i++)
			((be64 *)c->arena_next)[i] = be64_make(table[first + i]);
		add_item(c, phase, table_off + first * 8, (uint32_t)(count * 8));
	}
}

static int compare_items(const void *a, const void *b)
{
	const struct item *x = a, *y = b;

	return x->host_off < y->host_off ? -1 : x->host_off > y->host_off;
}

/* Copies everything that is dirty into c. Does not suspend. */
static int collect(struct qcow *q, struct commit *c)
{
	size_t l2_count = q->l2_cache.dirty_count, refcount_count = q->refcount_cache.dirty_count;
	size_t l1_words = bitmap_words(q->l1_capacity);
	size_t table_words = bitmap_words(q->refcount_table_count);
	size_t l1_sectors = q->l1_any_dirty ? sectors_dirty(q->l1_dirty, q->l1_capacity) : 0;
	size_t table_sectors = q->refcount_table_any_dirty ? sectors_dirty(q->refcount_table_dirty,
								     q->refcount_table_count)
							   : 0;
	size_t slices = l2_count + refcount_count;
	size_t item_count = slices + l1_sectors + table_sectors;

	/* Room for all in each phase. */
	c->items = calloc(3 * item_count + 1, sizeof(*c->items));
	c->slices = calloc(slices + 1, sizeof(*c->slices));
	c->l1_dirty = calloc(l1_words + table_words + 1, sizeof(*c->l1_dirty));
	c->arena = malloc(l2_count * q->l2_cache.slice_size +
			  refcount_count * q->refcount_cache.slice_size +
			  (l1_sectors + table_sectors) * SECTOR_BYTES + 1);
	if (!c->items || !c->slices || !c->l1_dirty || !c->arena)
		return -ENOMEM;
	c->refcount_table_dirty = c->l1_dirty + l1_words;
	c->arena_next = c->arena;
	for (int i = 0; i < 3; i++)
		c->phases[i].items = c->items + (size_t)i * item_count;

	while (!list_empty(&q->l2_cache.dirty))
		add_slice(c, &c->phases[2], &q->l2_cache,
			list_entry(q->l2_cache.dirty.next, struct slice, link));
	c->l2_slice_count = c->slice_count;
	while (!list_empty(&q->refcount_cache.dirty))
		add_slice(c, &c->phases[0], &q->refcount_cache,
			list_entry(q->refcount_cache.dirty.next, struct slice, link));
	if (table_sectors)
		add_table(c, &c->phases[1], q->header.refcount_table_off, q->refcount_table,
			q->refcount_table_dirty, c->refcount_table_dirty, q->refcount_table_count);
	if (l1_sectors)
		add_table(c, &c->phases[2], q->header.l1_off, q->l1, q->l1_dirty, c->l1_dirty,
			q->l1_capacity);
	q->l1_any_dirty = q->refcount_table_any_dirty = false;
	c->freed = q->unlinked;
	memset(&q->unlinked, 0, sizeof(q->unlinked));
	for (int i = 0; i < 3; i++)
		qsort(c->phases[i].items, c->phases[i].count, sizeof(struct item), compare_items);
	return 0;
}

static void commit_fini(struct commit *c)
{
	free(c->items);
	free(c->slices);
	free(c->l1_dirty);
	free(c->arena);
	free(c->freed.items);
}

/* --- writing ---------------------------------------------------------------------------------- */

/* Writes items [*next...] that are neighbours on disk and in memory as one. */
static suspends int write_joined(struct qcow *q, const struct phase *phase, size_t *next)
{
	const struct item *first = &phase->items[*next];
	size_t len = first->len, i = *next + 1;

	while (i < phase->count && len < JOINED_WRITE_MAX_BYTES &&
		phase->items[i].host_off == first->host_off + len &&
		phase->items[i].data == first->data + len)
		len += phase->items[i++].len;
	*next = i;
	return blk_write(q->blk.below, first->host_off, first->data, len, 0);
}

static suspends int write_phase(struct qcow *q, const struct phase *phase)
{
	int ret = 0;

	for (size_t next = 0; !ret && next < phase->count;)
		ret = write_joined(q, phase, &next);
	return ret;
}

static suspends int flush_or_freeze(struct qcow *q, struct blk *blk)
{
	int ret = blk_flush(blk);

	if (ret && !q->frozen) {
		q->frozen = true;
		snprintf(q->frozen_text, sizeof(q->frozen_text),
			"a flush failed (%s): nothing is allocated, and no flush succeeds, until "
			"the image is opened anew",
			strerror(-ret));
		blk_notice(&q->blk,
			"what was lost is not known: %s. Restart the daemon, or remove the export "
			"and add it again",
			q->frozen_text);
	}
	return ret;
}

static suspends int write_all(struct qcow *q, const struct commit *c)
{
	int ret = q->data_file ? flush_or_freeze(q, q->data) : 0;

	if (!ret)
		ret = write_phase(q, &c->phases[0]);
	/* With nothing to link, one flush does for the data and the counts. */
	if (!ret)
		ret = flush_or_freeze(q, q->blk.below);
	for (int i = 1; !ret && i < 3; i++) {
		if (!c->phases[i].count)
			continue;
		ret = write_phase(q, &c->phases[i]);
		if (!ret)
			ret = flush_or_freeze(q, q->blk.below);
	}
	return ret;
}

/* --- afterwards ------------------------------------------------------------------------------- */

static void release_slices(struct qcow *q, struct commit *c, bool failed)
{
	for (size_t i = 0; i < c->slice_count; i++) {
		struct cache *cache = i < c->l2_slice_count ? &q->l2_cache : &q->refcount_cache;

		/* One that was forgotten meanwhile belongs to a cluster that is free: nothing to save. */
		if (failed && c->slices[i]->host_off)
			cache_mark_dirty(cache, c->slices[i]);
		cache_put(cache, c->slices[i]);
	}
}

static void restore_bits(uint64_t *bits, const uint64_t *taken, size_t entry_count, bool *any)
{
	for (size_t word = 0; word < bitmap_words(entry_count); word++) {
		bits[word] |= taken[word];
		*any |= taken[word] != 0;
	}
}

static void move_freed(struct freed_list *to, const struct freed_list *from)
{
	for (size_t i = 0; i < from->count; i++)
		freed_list_add(to, from->items[i].index, from->items[i].count);
}

static void undo_collect(struct qcow *q, struct commit *c)
{
	restore_bits(q->l1_dirty, c->l1_dirty, q->l1_capacity, &q->l1_any_dirty);
	restore_bits(q->refcount_table_dirty, c->refcount_table_dirty, q->refcount_table_count,
		&q->refcount_table_any_dirty);
	move_freed(&q->unlinked, &c->freed);
	q->stats.commit_errors++;
	qcow_commit_later(q);
}

/* --- freeing ---------------------------------------------------------------------------------- */

void qcow_unpin(struct qcow *q, unsigned epoch)
{
	assert(q->pins[epoch]);
	if (!--q->pins[epoch])
		co_queue_wake_all(&q->unpinned);
}

/* Lowers the counts of clusters nobody points to or uses any more. */
static suspends void release_clusters(struct qcow *q, uint64_t index, uint64_t count)
{
	for (; count; index++, count--) {
		uint64_t refcount, run = 0;
		int ret = 0;

		/* The longest stretch that is only ours is discarded at once. Nobody allocates it meanwhile. */
		while (run < count && !(ret = qcow_refcount_get(q, index + run, &refcount)) &&
			refcount == 1)
			run++;
		if (ret)
			return; /* they leak; the error has been counted below */
		uint64_t host_off = index << q->cluster_bits;
		if (run && q->opt_discard)
			blk_discard(q->blk.below, host_off, run << q->cluster_bits, 0);
		co_mutex_lock(&q->alloc_mutex);
		ret = qcow_refcount_add(q, index, MAX(run, UINT64_C(1)), -1);
		for (uint64_t i = 0; !ret && i < run; i++)
			cluster_set_remove(&q->metadata, index + i);
		if (!ret && run)
			cache_forget(&q->l2_cache, host_off, run << q->cluster_bits);
		co_mutex_unlock(&q->alloc_mutex);
		if (ret)
			return;
		if (run) {
			q->stats.freed += run;
			index += run - 1;
			count -= run - 1;
		}
	}
}

/* Frees what is committed, batch by batch, each after its grace period. */
static suspends void grace_run(void *arg)
{
	struct qcow *q = arg;

	while (q->committed.count) {
		struct freed_list batch = q->committed;
		unsigned old_epoch = q->pin_epoch & 1;

		memset(&q->committed, 0, sizeof(q->committed));
		q->pin_epoch++;
		while (q->pins[old_epoch])
			co_queue_wait(&q->unpinned);
		for (size_t i = 0; i < batch.count; i++)
			release_clusters(q, batch.items[i].index, batch.items[i].count);
		free(batch.items);
	}
	q->grace_running = false;
	co_queue_wake_all(&q->settled);
}

static void start_grace(struct qcow *q)
{
	if (!q->committed.count || q->grace_running)
		return;
	q->grace_running = true;
	co_group_start(&q->background, grace_run, q);
}

/* --- committing ------------------------------------------------------------------------------- */

bool qcow_metadata_dirty(const struct qcow *q)
{
	/* A commit under way has taken its changes already, but they are not durable. */
	return q->l2_cache.dirty_count || q->refcount_cache.dirty_count || q->l1_any_dirty ||
	       q->refcount_table_any_dirty || q->unlinked.count || q->commit_mutex.locked;
}

suspends int qcow_commit_locked(struct qcow *q)
{
	uint64_t number = ++q->commits_begun;
	struct commit c = { 0 };
	int ret = q->frozen ? -EIO : collect(q, &c);

	if (ret) {
		q->stats.commit_errors++;
		goto out;
	}
	ret = write_all(q, &c);
	release_slices(q, &c, ret);
	if (ret) {
		undo_collect(q, &c);
	} else {
		q->commits_done = number;
		q->stats.commits++;
		move_freed(&q->committed, &c.freed);
		start_grace(q);
	}
out:
	commit_fini(&c);
	co_queue_wake_all(&q->l2_cache.evictable);
	co_queue_wake_all(&q->refcount_cache.evictable);
	return ret;
}

suspends int qcow_commit(struct qcow *q)
{
	uint64_t wanted = q->commits_begun + 1;
	int ret = 0;

	co_mutex_lock(&q->commit_mutex);
	if (q->commits_done < wanted)
		ret = qcow_commit_locked(q);
	co_mutex_unlock(&q->commit_mutex);
	return ret;
}

static suspends void commit_in_background(void *arg)
{
	struct qcow *q = arg;

	int ret = qcow_commit(q);
	q->commit_scheduled = false;
	if (ret)
		log_debug("qcow: commit failed: %s", strerror(-ret));
}

static void commit_task(struct task *task)
{
	struct qcow *q = container_of(task, struct qcow, commit_task);

	co_group_start(&q->background, commit_in_background, q);
}

static void commit_timer_over(struct timer *timer)
{
	qcow_commit_soon(container_of(timer, struct qcow, commit_timer));
}

void qcow_commit_init(struct qcow *q)
{
	co_mutex_init(&q->commit_mutex);
	co_queue_init(&q->unpinned);
	co_queue_init(&q->settled);
	co_group_init(&q->background);
	task_init(&q->commit_task, commit_task);
	timer_init(&q->commit_timer, commit_timer_over);
}

suspends void qcow_commit_fini(struct qcow *q)
{
	q->closing = true;
	timer_cancel(&q->commit_timer);
	reactor_defer_cancel(&q->commit_task);
	co_group_wait(&q->background);
	free(q->unlinked.items);
	free(q->committed.items);
}

void qcow_commit_soon(struct qcow *q)
{
	if (q->commit_scheduled)
		return;
	q->commit_scheduled = true;
	reactor_defer(&q->commit_task);
}

void qcow_commit_later(struct qcow *q)
{
	if (q->commit_timer.heap_index == TIMER_IDLE && !q->closing)
		timer_arm(&q->commit_timer,
			reactor_now_ns() + (uint64_t)q->opt_commit_interval_s * NS_PER_SEC);
}

suspends int qcow_settle(struct qcow *q)
{
	int ret = 0;

	do {
		ret = qcow_commit(q);
		while (!ret && q->grace_running)
			co_queue_wait(&q->settled);
	} while (!ret && (q->unlinked.count || q->committed.count));
	/* Freeing lowered counts: write those too. */
	return ret ? ret : qcow_commit(q);
}
