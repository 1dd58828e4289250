/*
 * The copy in the background: passes over what is dirty, in steps, at a pace that leaves room for guests.
 *
 * A step takes a run of dirty chunks, holds the range of bytes exclusively against guests' changes, carries
 * the primary's content over, and marks the chunks clean. At most 512 KiB of data, or 64 MiB of zeroes: what
 * the primary knows to be zero is not read, and not written either where the secondary knows the same. Several
 * steps run side by side, since a far secondary takes its time; a guest's change waits for one of them at
 * most, and only if it overlaps it.
 *
 * It ends: a chunk that was copied stays clean, because guests' changes of it go to both legs from then on, and
 * no guest's change makes a chunk dirty while the secondary works. A guest that writes faster than the
 * secondary can is slowed down by exactly that (it waits for both legs), never the copy.
 *
 * Pace: where a step did not wait for anything it kept the reactor from everybody else. After such a step
 * guests have a part of that time for themselves, if there are any (GUEST_TIME): the copy pauses until it is
 * up, or none of them has come for a moment (QUIET_NS). Alone, it runs at full speed, with one turn of the reactor
 * between steps. A writer that keeps the reactor busy has half of it, and the copy takes twice as long as alone.
 *
 * Failures. Of the secondary: degraded, see leg.c; after a delay that doubles up to a minute, and when nothing
 * that was given up is under way, one step is tried (probe()), and only when it succeeds guests' changes go to
 * the secondary again. Of a read of the primary: the step's chunks stay dirty, the others are copied; the next
 * pass, after the same delay, takes chunks one by one. No step leaves its range locked.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "blk/mirror/mirror_private.h"
#include "rt/buf.h"

#define QUIET_NS            UINT64_C(50000)
#define GUEST_TIME(step_ns) (step_ns)

static uint64_t clock_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_SEC + (uint64_t)now.tv_nsec;
}

void mirror_set_phase(struct mirror *mirror, enum mirror_phase phase)
{
	if (mirror->phase == phase)
		return;
	mirror->phase = phase;
	mirror->phase_time = time(NULL);
	mirror->cursor = mirror->data_until = 0;
	mirror->began_ns = reactor_now_ns();
	mirror->began_bytes = mirror->copied_bytes + mirror->skipped_bytes;
	co_queue_wake_all(&mirror->copy_wanted);
	co_queue_wake_all(&mirror->changed);
}

/* --- one step --------------------------------------------------------------------------------- */

struct step {
	uint64_t off, len;
	bool data; /* the primary was seen to be data there */
};

void mirror_primary_failed(struct mirror *mirror, uint64_t off, uint64_t len, int ret)
{
	mirror_failed(&mirror->primary_failure, "read of %llu bytes at %llu: %s",
		(unsigned long long)len, (unsigned long long)off, strerror(-ret));
}

void mirror_primary_flush_failed(struct mirror *mirror, int ret)
{
	mirror_failed(&mirror->primary_failure,
		"flush: %s; where it had not been flushed before, the disks may differ, which a "
		"comparison (mirror verify) finds and mends",
		strerror(-ret));
}

static int secondary_failed(
	struct mirror *mirror, const char *what, uint64_t off, uint64_t len, int ret)
{
	mirror_degrade(mirror, what, off, len, ret);
	return ret;
}

static suspends int copy_data(struct mirror *mirror, uint64_t off, uint64_t len)
{
	int ret = 0;

	while (len && !ret) {
		uint64_t part = MIN(len, mirror->step_max);
		char *buf = buf_get(part);

		if (!buf)
			return -ENOMEM;
		ret = blk_read(mirror->primary, off, buf, part);
		if (ret) {
			mirror_primary_failed(mirror, off, part, ret);
			buf_put(buf, part);
		} else {
			ret = leg_end(leg_begin_write(mirror, off, part, buf));
			if (ret)
				secondary_failed(mirror, "copy: write", off, part, ret);
		}
		if (!ret)
			mirror->copied_bytes += part;
		off += part;
		len -= part;
	}
	return ret;
}

static suspends int clear_range(struct mirror *mirror, uint64_t off, uint64_t len, bool hole)
{
	bool discard = hole && blk_caps(mirror->secondary)->discard;
	enum leg_kind kind = discard ? LEG_DISCARD : LEG_ZERO;
	int ret = 0;

	for (uint64_t part; len && !ret; off += part, len -= part) {
		part = MIN(len, mirror_clear_max(mirror));
		ret = leg_end(leg_begin(mirror, kind, off, part, 0, NULL));
		if (ret)
			secondary_failed(mirror, "copy: zero", off, part, ret);
	}
	return ret;
}

/* The primary is zero there: makes the secondary so where it is not known to be already. */
static suspends int copy_zeroes(struct mirror *mirror, uint64_t off, uint64_t len, bool hole)
{
	uint64_t end = off + len;
	int ret = 0;

	while (off < end && !ret) {
		struct leg_op *op = leg_begin(mirror, LEG_EXTENTS, off, end - off, 0, NULL);

		ret = leg_wait(op);
		if (ret)
			secondary_failed(mirror, "copy: extents", off, end - off, ret);
		for (unsigned i = 0; !ret && i < op->extents.count; i++) {
			const struct blk_extent *extent = &op->list[i];

			if (!(extent->flags & BLK_EXTENT_ZERO))
				ret = clear_range(mirror, off, extent->len, hole);
			off += extent->len;
			mirror->skipped_bytes += extent->len;
		}
		leg_put(op);
	}
	return ret;
}

/* Part by part as the primary describes itself; what it cannot describe is data. */
static suspends int copy_range(struct mirror *mirror, const struct step *step)
{
	uint64_t off = step->off, end = off + step->len;
	int ret = 0;

	if (step->data)
		return copy_data(mirror, off, step->len);
	while (off < end && !ret) {
		struct blk_extent list[MIRROR_EXTENTS];
		struct blk_extents extents;

		blk_extents_init(&extents, list, ARRAY_LEN(list));
		if (blk_extents(mirror->primary, off, end - off, &extents))
			return copy_data(mirror, off, end - off);
		for (unsigned i = 0; i < extents.count && !ret; off += list[i++].len) {
			uint32_t flags = list[i].flags;

			ret = flags & BLK_EXTENT_ZERO ? copy_zeroes(mirror, off, list[i].len,
								flags & BLK_EXTENT_HOLE)
						      : copy_data(mirror, off, list[i].len);
		}
	}
	return ret;
}

/* The range is locked as long as it takes, failed or not. */
static suspends int copy_step(struct mirror *mirror, const struct step *step)
{
	struct range range;
	unsigned degradations;
	int ret;

	range_lock_acquire(&mirror->writes, &range, step->off, step->len, true);
	/* The mirror may have ended while it waited (then it may be the secondary that serves), or been resized. */
	if (mirror->phase == MIRROR_DETACHED || step->off + step->len > mirror->blk.caps.size) {
		range_lock_release(&mirror->writes, &range);
		return 0;
	}
	degradations = mirror->degradations;
	mirror_recent_mark(mirror, step->off, step->len);
	ret = copy_range(mirror, step);
	/* A secondary that failed meanwhile may have lost what it was given. */
	if (!ret && degradations != mirror->degradations)
		ret = -EIO;
	if (!ret && mirror->phase != MIRROR_DETACHED)
		mirror_dirty_clear(mirror, step->off, step->len);
	range_lock_release(&mirror->writes, &range);
	co_queue_wake_all(&mirror->changed);
	return ret;
}

/* --- which step is next ----------------------------------------------------------------------- */

/* Looks at the primary from the run's start: what the step is, and how far. */
static suspends void look_ahead(struct mirror *mirror, struct step *step, uint64_t run_len)
{
	struct blk_extent list[1];
	struct blk_extents extents;
	uint64_t asked_len = MIN(run_len, MIRROR_LOOK_AHEAD_BYTES);

	blk_extents_init(&extents, list, ARRAY_LEN(list));
	step->data = step->off < mirror->data_until;
	if (!step->data) {
		if (blk_extents(mirror->primary, step->off, asked_len, &extents))
			extents.count = 0;
		if (!extents.count || !(list[0].flags & BLK_EXTENT_ZERO)) {
			step->data = true;
			mirror->data_until = step->off + (extents.count ? list[0].len : run_len);
		}
	}
	if (mirror->single_chunks)
		step->len = MIN(run_len, mirror->chunk_size);
	else if (step->data)
		step->len = MIN(run_len, MAX(mirror->chunk_size, mirror->step_max));
	else
		step->len = MIN(MIN(run_len, (uint64_t)MIRROR_PASS_MAX_BYTES),
			round_up(list[0].len, mirror->chunk_size));
}

static suspends bool claim_step(struct mirror *mirror, struct step *step)
{
	uint64_t run_len;
	bool found;

	co_mutex_lock(&mirror->claiming);
	found = mirror_dirty_next(mirror, mirror->cursor, &step->off, &run_len);
	if (found) {
		look_ahead(mirror, step, run_len);
		mirror->cursor = step->off + step->len;
	}
	co_mutex_unlock(&mirror->claiming);
	return found;
}

/* --- pace ------------------------------------------------------------------------------------- */

/*
 * One turn of the reactor, and more until it is the guests' turn no longer, or none of them comes any more. All
 * steps share one account of time, so whoever wakes up looks again: another step may have been faster, and while
 * that ran nobody could come.
 */
static suspends void let_guests_run(struct mirror *mirror)
{
	uint64_t slice_ns = 0, now_ns, seen, allowed_ns;
	bool quiet;

	do {
		seen = mirror->guest_count;
		allowed_ns = mirror->copy_allowed_ns;
		co_sleep_ns(slice_ns);
		now_ns = clock_now_ns();
		slice_ns = mirror->copy_allowed_ns > now_ns
				   ? MIN(mirror->copy_allowed_ns - now_ns, QUIET_NS)
				   : 0;
		quiet = seen == mirror->guest_count && allowed_ns == mirror->copy_allowed_ns;
	} while (slice_ns && !quiet && !mirror->closing);
}

static suspends void wait_for_rate(struct mirror *mirror, uint64_t len)
{
	while (mirror->rate && !mirror->closing && !mirror->paused &&
		reactor_now_ns() < mirror->rate_allowed_ns) {
		if (!co_queue_wait_until(&mirror->copy_wanted, mirror->rate_allowed_ns))
			break;
	}
	if (mirror->rate)
		mirror->rate_allowed_ns = MAX(reactor_now_ns(), mirror->rate_allowed_ns) +
					  (uint64_t)((double)len / (double)mirror->rate *
						     (double)NS_PER_SEC);
}

static bool may_copy(const struct mirror *mirror)
{
	return !mirror->closing && !mirror->paused && mirror->phase == MIRROR_COPYING;
}

/* One of several that work on a pass. */
static suspends void pass_run(void *arg)
{
	struct mirror *mirror = arg;
	struct step step;

	while (may_copy(mirror) && claim_step(mirror, &step)) {
		wait_for_rate(mirror, step.data ? step.len : 0);
		if (!may_copy(mirror))
			break;

		uint64_t turn_ns = reactor_now_ns(), start_ns = clock_now_ns();

		if (copy_step(mirror, &step))
			mirror->pass_failed = true;

		uint64_t end_ns = clock_now_ns();
		bool waited = reactor_now_ns() != turn_ns;

		mirror->copy_allowed_ns = end_ns + (waited ? 0 : GUEST_TIME(end_ns - start_ns));
		let_guests_run(mirror);
	}
}

/* --- the whole -------------------------------------------------------------------------------- */

static suspends void complete(struct mirror *mirror)
{
	mirror_settle(mirror);
	if (mirror->phase != MIRROR_COPYING || mirror->dirty_count)
		return;
	mirror->retry_delay_ns = 0;
	mirror->single_chunks = false;
	if (mirror->secondary_failure.count)
		blk_notice(&mirror->blk, "the secondary is in sync again");
	mirror->completed_count++;
	mirror_set_phase(mirror, MIRROR_IN_SYNC);
}

static suspends void pass(struct mirror *mirror)
{
	struct co_group group;

	co_group_init(&group);
	mirror->cursor = mirror->data_until = 0;
	mirror->pass_failed = false;
	for (int i = 0; i < MIRROR_STEPS; i++)
		co_group_start(&group, pass_run, mirror);
	co_group_wait(&group);
	if (!may_copy(mirror))
		return;
	if (!mirror->dirty_count) {
		complete(mirror);
	} else if (mirror->pass_failed) {
		mirror->single_chunks = true;
		mirror_retry_later(mirror);
	}
}

/* It was not there when the mirror was opened. */
static suspends int open_again(struct mirror *mirror)
{
	struct err err;
	int ret = mirror_open_secondary(mirror, &err);

	if (ret)
		mirror_failed(&mirror->secondary_failure, "it cannot be opened: %s", err.text);
	return ret;
}

/* Tries the secondary again, by something that guests do not wait for. */
static suspends void probe(struct mirror *mirror)
{
	struct step step;
	uint64_t run_len;
	int ret = 0;

	if (!mirror->secondary)
		ret = open_again(mirror);
	if (!ret && mirror->log.broken)
		ret = mirror_log_rewrite(mirror);
	if (!ret && mirror_dirty_next(mirror, 0, &step.off, &run_len)) {
		step.len = MIN(run_len, mirror->chunk_size);
		step.data = false;
		ret = copy_step(mirror, &step);
	} else if (!ret) {
		ret = leg_end(leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL));
	}
	if (mirror->phase != MIRROR_DEGRADED)
		return;
	if (ret)
		mirror_retry_later(mirror);
	else
		mirror_set_phase(mirror, MIRROR_COPYING);
}

suspends void mirror_copier_run(void *arg)
{
	struct mirror *mirror = arg;

	while (!mirror->closing && mirror->phase != MIRROR_DETACHED) {
		bool busy = mirror->phase == MIRROR_DEGRADED || mirror->phase == MIRROR_COPYING ||
			    mirror->dirty_count;

		bool unanswered = mirror->phase == MIRROR_DEGRADED && mirror->leg->given_up_count;

		if (mirror->paused || !busy || unanswered)
			co_queue_wait(&mirror->copy_wanted);
		else if (reactor_now_ns() < mirror->retry_at_ns)
			co_queue_wait_until(&mirror->copy_wanted, mirror->retry_at_ns);
		else if (mirror->phase == MIRROR_DEGRADED)
			probe(mirror);
		else if (mirror->phase == MIRROR_IN_SYNC)
			mirror_set_phase(mirror, MIRROR_COPYING);
		else
			pass(mirror);
	}
}
