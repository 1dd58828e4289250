/*
 * Guest reads and writes, and copy on write.
 *
 * A write first tries to go in place: under a shared hold of its range it maps the disk and overwrites
 * what is ours alone. What is not (holes, zeroes, compressed or shared clusters) is allocated under an exclusive
 * hold of whole clusters: new host clusters, filled with the old content around the new data, and
 * linked in memory once the data is written below. The old clusters are given back when that is durable.
 *
 * Filling is done in one write together with the data when it is small. Where the new cluster was never
 * written (it reads as zeroes) and the old content is zeroes too, nothing is filled at all.
 */
#include "blk/qcow/qcow.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "rt/buf.h"

/* Data and filling up to this size are put together in memory and written at once. */
#define FILL_BOUNCE_MAX_BYTES BUF_POOLED_MAX_BYTES

/* --- reading ---------------------------------------------------------------------------------- */

/* Reads `file`; what lies beyond its end reads as zeroes (format: image files may end anywhere). */
static suspends int read_clipped(struct blk *file, uint64_t off, uint8_t *buf, size_t len)
{
	uint64_t size = blk_caps(file)->size;
	size_t inside = off >= size ? 0 : (size_t)MIN(len, size - off);

	if (unlikely(inside < len))
		memset(buf + inside, 0, len - inside);
	return inside ? blk_read(file, off, buf, inside) : 0;
}

suspends int qcow_read_host(struct qcow *q, uint64_t host_off, void *buf, size_t len)
{
	return read_clipped(q->blk.below, host_off, buf, len);
}

static suspends int read_run(
	struct qcow *q, const struct run *run, uint64_t off, uint8_t *buf, size_t len)
{
	switch (run->kind) {
	case RUN_DATA:
		return read_clipped(q->data, run->host_off, buf, len);
	case RUN_HOLE:
		if (q->backing)
			return read_clipped(q->backing, off, buf, len);
		memset(buf, 0, len);
		return 0;
	case RUN_ZERO:
		memset(buf, 0, len);
		return 0;
	case RUN_COMPRESSED:
		return qcow_read_compressed(q, &run->entry, off & (q->cluster_size - 1), buf, len);
	}
	return -EIO;
}

suspends int qcow_read_guest(struct qcow *q, uint64_t off, void *buf, size_t len)
{
	uint8_t *at = buf;

	while (len) {
		struct run run;
		int ret = qcow_map(q, off, len, &run);

		if (!ret)
			ret = read_run(q, &run, off, at, (size_t)run.len);
		if (ret)
			return ret;
		off += run.len;
		at += run.len;
		len -= (size_t)run.len;
	}
	return 0;
}

suspends int qcow_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct qcow *q = qcow_of(blk);
	unsigned pin = qcow_pin(q);
	int ret = qcow_read_guest(q, off, buf, len);

	qcow_unpin(q, pin);
	return ret;
}

/* True when the guest range is known to read as zeroes, without looking into the backing. */
static suspends bool reads_zero(struct qcow *q, uint64_t off, uint64_t len)
{
	while (len) {
		struct run run;

		if (qcow_map(q, off, len, &run))
			return false;
		bool hole_is_zero = !q->backing || off >= blk_caps(q->backing)->size;
		if (run.kind != RUN_ZERO && !(run.kind == RUN_HOLE && hole_is_zero))
			return false;
		off += run.len;
		len -= run.len;
	}
	return true;
}

/* --- filling ---------------------------------------------------------------------------------- */

/* A write into host clusters whose mapping is about to change. */
struct placement {
	uint64_t guest_off, len; /* the data */
	const uint8_t *buf;
	uint64_t fill_off,
		fill_end;  /* guest range that must be right in the host, around the data */
	uint64_t host_off; /* where fill_off goes */
	bool fresh;        /* the host range reads as zeroes */
};

static suspends int write_in_pieces(struct qcow *q, const struct placement *p)
{
	uint64_t head = p->guest_off - p->fill_off, tail_off = p->guest_off + p->len;
	uint64_t edges[2][2] = { { p->fill_off, p->guest_off }, { tail_off, p->fill_end } };
	int ret = blk_write(q->data, p->host_off + head, p->buf, p->len, 0);

	for (int i = 0; i < 2; i++) {
		for (uint64_t off = edges[i][0], step; !ret && off < edges[i][1]; off += step) {
			step = MIN(edges[i][1] - off, (uint64_t)BUF_POOLED_MAX_BYTES);
			void *bounce = buf_get(step);

			ret = bounce ? qcow_read_guest(q, off, bounce, step) : -ENOMEM;
			if (!ret)
				ret = blk_write(q->data, p->host_off + (off - p->fill_off), bounce,
					step, 0);
			if (bounce)
				buf_put(bounce, step);
		}
	}
	return ret;
}

static suspends int write_bounced(struct qcow *q, const struct placement *p)
{
	size_t total = (size_t)(p->fill_end - p->fill_off),
	       head = (size_t)(p->guest_off - p->fill_off);
	uint64_t tail_off = p->guest_off + p->len;
	uint8_t *bounce = buf_get(total);

	if (!bounce)
		return -ENOMEM;
	int ret = qcow_read_guest(q, p->fill_off, bounce, head);
	if (!ret)
		ret = qcow_read_guest(
			q, tail_off, bounce + head + p->len, (size_t)(p->fill_end - tail_off));
	if (!ret) {
		memcpy(bounce + head, p->buf, p->len);
		ret = blk_write(q->data, p->host_off, bounce, total, 0);
	}
	buf_put(bounce, total);
	return ret;
}

/* Writes the data and what must surround it; the mapping still shows the old content meanwhile. */
static suspends int write_placement(struct qcow *q, const struct placement *p)
{
	uint64_t head = p->guest_off - p->fill_off;
	uint64_t tail_off = p->guest_off + p->len, tail = p->fill_end - tail_off;

	if ((!head && !tail) ||
		(p->fresh && reads_zero(q, p->fill_off, head) && reads_zero(q, tail_off, tail)))
		return blk_write(q->data, p->host_off + head, p->buf, p->len, 0);
	q->stats.cow_bytes += head + tail;
	if (p->fill_end - p->fill_off <= FILL_BOUNCE_MAX_BYTES)
		return write_bounced(q, p);
	return write_in_pieces(q, p);
}

/* --- allocating writes ------------------------------------------------------------------------ */

static uint32_t all_subclusters(const struct qcow *q)
{
	return q->subclusters == 32 ? UINT32_MAX : (1U << q->subclusters) - 1;
}

/* The subclusters of the cluster at cluster_off that [off, end) touches. */
static uint32_t touched_subclusters(
	const struct qcow *q, uint64_t cluster_off, uint64_t off, uint64_t end)
{
	uint64_t from = off > cluster_off ? off - cluster_off : 0;
	uint64_t to = MIN(end - cluster_off, q->cluster_size);
	unsigned first = (unsigned)(from >> q->subcluster_bits);
	unsigned last = (unsigned)((to - 1) >> q->subcluster_bits);

	return (uint32_t)(((UINT64_C(2) << last) - 1) & ~((UINT64_C(1) << first) - 1));
}

/* Does the entry have a host cluster that only needs some subclusters written? */
static bool has_own_cluster(const struct qcow *q, const struct l2_entry *entry)
{
	return !entry->compressed && entry->copied && (entry->host_off || q->data_file);
}

/* The write into one cluster that we have already, or that lies at a given place in the data file. */
static suspends int write_own_cluster(struct qcow *q, uint64_t off, const uint8_t *buf,
	uint64_t len, struct slice *slice, uint8_t *raw)
{
	uint64_t cluster_off = qcow_cluster_start(q, off);
	uint64_t subcluster_size = UINT64_C(1) << q->subcluster_bits;
	struct l2_entry entry = qcow_entry_decode(q, raw);
	uint32_t touched = touched_subclusters(q, cluster_off, off, off + len);
	struct placement p = { .guest_off = off,
		.len = len,
		.buf = buf,
		.fill_off = round_down(off, subcluster_size),
		.fill_end = round_up(off + len, subcluster_size) };

	if (q->data_file) {
		entry.host_off = cluster_off;
		/* It may end within the disk's last cluster; what it later grows by reads as zeroes. */
		p.fill_end = MIN(p.fill_end, MAX(blk_caps(q->data)->size, off + len));
	}
	p.host_off = entry.host_off + (p.fill_off - cluster_off);
	int ret = write_placement(q, &p);
	if (ret) {
		cache_put(&q->l2_cache, slice);
		return ret;
	}
	entry.copied = true;
	entry.alloc_bits |= touched;
	entry.zero_bits &= ~touched;
	qcow_entry_encode(q, &entry, raw);
	qcow_entry_put_dirty(q, slice);
	return 0;
}

/* Must the whole old cluster be carried over, not only the subclusters touched? */
static bool keeps_rest(const struct qcow *q, const struct l2_entry *old)
{
	return q->subclusters == 1 || old->compressed || old->alloc_bits;
}

static void set_fill_range(const struct qcow *q, struct placement *p, const struct l2_entry *first,
	const struct l2_entry *last)
{
	uint64_t end = p->guest_off + p->len, subcluster_size = UINT64_C(1) << q->subcluster_bits;

	p->fill_off = keeps_rest(q, first) ? qcow_cluster_start(q, p->guest_off)
					   : round_down(p->guest_off, subcluster_size);
	p->fill_end = keeps_rest(q, last) ? round_up(end, q->cluster_size)
					  : round_up(end, subcluster_size);
}

/* Points the entries of `count` clusters to the new host clusters and gives the old ones back. */
static void link_clusters(
	struct qcow *q, const struct placement *p, uint64_t host_off, uint64_t count, uint8_t *raw)
{
	uint64_t cluster_off = qcow_cluster_start(q, p->guest_off);

	for (uint64_t i = 0; i < count; i++, raw += q->entry_size, cluster_off += q->cluster_size) {
		struct l2_entry old = qcow_entry_decode(q, raw), new = { 0 };
		uint32_t touched = touched_subclusters(
			q, cluster_off, p->guest_off, p->guest_off + p->len);

		new.host_off = host_off + i * q->cluster_size;
		new.copied = true;
		new.alloc_bits = old.compressed ? all_subclusters(q) : old.alloc_bits | touched;
		new.zero_bits = old.compressed ? 0 : old.zero_bits & ~touched;
		qcow_entry_encode(q, &new, raw);
		qcow_free_entry(q, &old);
	}
}

/* The write into `want` clusters, none of them ours; *done says how much of len went. */
static suspends int write_new_clusters(struct qcow *q, uint64_t off, const uint8_t *buf,
	uint64_t len, uint64_t want, struct slice *slice, uint8_t *raw, uint64_t *done)
{
	uint64_t in_cluster = off & (q->cluster_size - 1), host_off, got;
	struct placement p = { .guest_off = off, .buf = buf };
	int ret = qcow_alloc(q, want, &host_off, &got, &p.fresh);

	if (ret) {
		cache_put(&q->l2_cache, slice);
		return ret;
	}
	p.len = MIN(len, got * q->cluster_size - in_cluster);
	struct l2_entry first = qcow_entry_decode(q, raw);
	struct l2_entry last = qcow_entry_decode(q, raw + (got - 1) * q->entry_size);
	set_fill_range(q, &p, &first, &last);
	p.host_off = host_off + (p.fill_off - qcow_cluster_start(q, off));
	ret = write_placement(q, &p);
	if (ret) {
		cache_put(&q->l2_cache, slice);
		qcow_free_unused(q, host_off, got);
		return ret;
	}
	link_clusters(q, &p, host_off, got, raw);
	qcow_entry_put_dirty(q, slice);
	*done = p.len;
	return 0;
}

/* How many clusters from raw on need a new host cluster, at most max_count (>= 1). */
static uint64_t count_foreign(const struct qcow *q, const uint8_t *raw, uint64_t max_count)
{
	uint64_t count = 1;

	while (count < max_count) {
		struct l2_entry entry = qcow_entry_decode(q, raw + count * q->entry_size);

		if (has_own_cluster(q, &entry))
			break;
		count++;
	}
	return count;
}

/* Writes a first part of [off, off + len), changing the mapping. Holds the range exclusively. */
static suspends int write_mapping(
	struct qcow *q, uint64_t off, const uint8_t *buf, uint64_t len, uint64_t *done)
{
	uint64_t in_cluster = off & (q->cluster_size - 1);
	uint64_t in_slice = qcow_clusters_in_slice(q, off);
	struct slice *slice;
	uint8_t *raw;
	int ret = qcow_entry_get(q, off, &slice, &raw);

	if (ret)
		return ret;
	len = MIN(len, in_slice * q->cluster_size - in_cluster);
	struct l2_entry entry = qcow_entry_decode(q, raw);
	const char *fault = qcow_entry_fault(q, &entry, off);
	if (fault) {
		cache_put(&q->l2_cache, slice);
		return qcow_mark_corrupt(
			q, "L2 entry for guest offset %llu: %s", (unsigned long long)off, fault);
	}
	if (q->data_file || has_own_cluster(q, &entry)) {
		*done = MIN(len, q->cluster_size - in_cluster);
		return write_own_cluster(q, off, buf, *done, slice, raw);
	}
	uint64_t clusters = (in_cluster + len + q->cluster_size - 1) >> q->cluster_bits;
	return write_new_clusters(
		q, off, buf, len, count_foreign(q, raw, clusters), slice, raw, done);
}

/* Like write_mapping(), with the clusters held; *done 0: try in place again. */
static suspends int write_exclusively(
	struct qcow *q, uint64_t off, const uint8_t *buf, uint64_t len, uint64_t *done)
{
	uint64_t start = qcow_cluster_start(q, off);
	struct range range;

	range_lock_acquire(
		&q->writes, &range, start, round_up(off + len, q->cluster_size) - start, true);
	/* Whoever was before us may have allocated it: then it goes in place after all. */
	struct run run;
	int ret = qcow_map(q, off, len, &run);
	*done = 0;
	if (!ret && !(run.kind == RUN_DATA && run.in_place))
		ret = write_mapping(q, off, buf, len, done);
	range_lock_release(&q->writes, &range);
	return ret;
}

/* Overwrites what can be overwritten from off on; *done 0 when the first byte cannot. */
static suspends int write_in_place(struct qcow *q, uint64_t off, const uint8_t *buf, uint64_t len,
	unsigned flags, uint64_t *done, uint64_t *blocked)
{
	struct range range;
	int ret = 0;

	*done = *blocked = 0;
	range_lock_acquire(&q->writes, &range, off, len, false);
	while (*done < len) {
		struct run run;

		ret = qcow_map(q, off + *done, len - *done, &run);
		if (ret)
			break;
		if (run.kind != RUN_DATA || !run.in_place) {
			*blocked = run.len;
			break;
		}
		ret = blk_write(q->data, run.host_off, buf + *done, (size_t)run.len, flags);
		if (ret)
			break;
		*done += run.len;
	}
	range_lock_release(&q->writes, &range);
	return ret;
}

suspends int qcow_write(struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct qcow *q = qcow_of(blk);
	const uint8_t *at = buf;
	int ret = qcow_begin_writing(q);

	if (ret)
		return ret;
	unsigned pin = qcow_pin(q);
	while (len) {
		uint64_t done, blocked;

		ret = write_in_place(q, off, at, len, flags & BLK_FUA, &done, &blocked);
		if (!ret && !done)
			ret = write_exclusively(q, off, at, blocked, &done);
		if (ret)
			break;
		off += done;
		at += done;
		len -= (size_t)done;
	}
	qcow_unpin(q, pin);
	if (!ret && flags & BLK_FUA && qcow_metadata_dirty(q))
		ret = qcow_commit(q);
	return ret;
}
