/*
 * mirror: two disks that hold the same. The layers below, the primary, serve; the secondary, a stack of its own,
 * becomes equal to it and is kept so.
 *
 *	guest -> mirror -> primary (below)
 *	             \--> secondary (leg.c)		copy.c: primary -> secondary
 *
 * A guest's change holds its range of bytes exclusively until both legs are through, so both see
 * overlapping changes in one order, and never at the same time as a copy step. It goes to both legs at
 * once, and ends when both have ended, where any chunk it touches is clean; where all are dirty it goes to the
 * primary alone, since the copy is still to come (dirty.c).
 *
 * So the copy always ends, and a heavy writer is slowed to what the secondary can take, but only for the part that
 * is copied already. A secondary that does not answer within `timeout`, or with an error, is degraded: the
 * guest goes on with the primary, and what it changes is dirty.
 *
 * Reads are the primary's. One that fails is answered by the secondary, if it is in sync there: that is
 * counted, and told by status. A flush is one of both legs, once they hold the same.
 *
 * When the mirror ends (promote, cancel) it is detached: it passes everything on to the leg that is left,
 * until it has been taken out of the stack.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blk/layers.h"
#include "blk/mirror/mirror_private.h"

#define OPT(member) offsetof(struct mirror, member)

static const char *const on_error_names[] = { "degrade", "stop", NULL };

static const struct opt mirror_options[] = {
	{ "secondary", OPT_LIST, OPT(secondary_conf), .required = true,
		.help = "the stack that becomes the copy" },
	{ "overwrite", OPT_BOOL, OPT(overwrite), "false",
		.help = "what the secondary holds may be destroyed" },
	{ "intent-log", OPT_STRING, OPT(log_path),
		.help = "file or device that notes what is being written, so that after a crash "
			"only that is copied again" },
	{ "rate", OPT_SIZE, OPT(rate), "0", .help = "bytes per second for the copy; 0: no limit" },
	{ "chunk", OPT_SIZE, OPT(chunk_size), "64K", .min = MIRROR_CHUNK_MIN,
		.max = MIRROR_CHUNK_MAX, .pow2 = true,
		.help = "the unit of what may differ and is copied" },
	{ "timeout", OPT_INT, OPT(timeout_s), "5", .min = 1, .max = 3600,
		.help = "seconds that the secondary may take for a request" },
	{ "on-error", OPT_ENUM, OPT(on_error), "degrade", .choices = on_error_names,
		.help = "when the secondary fails: degrade (and try it again), or stop (until it "
			"is resumed)" },
	{ "start-degraded", OPT_BOOL, OPT(start_degraded), "false",
		.help = "start without the secondary when it cannot be opened, and try it again" },
	{ "paused", OPT_BOOL, OPT(paused), "false", .help = "copy nothing until it is resumed" },
	{ 0 },
};

/* --- changes ---------------------------------------------------------------------------------- */

struct change {
	enum leg_kind kind;
	uint64_t off, len;
	unsigned flags;
	const void *buf; /* of writes */
};

static suspends int change_leg(struct blk *leg, const struct change *change)
{
	if (change->kind == LEG_WRITE)
		return blk_write(leg, change->off, change->buf, change->len, change->flags);
	if (change->kind == LEG_DISCARD)
		return blk_discard(leg, change->off, change->len, change->flags);
	return blk_zero(leg, change->off, change->len, change->flags);
}

/* Until both are the same nobody relies on the secondary, so what it has need not be durable. */
static unsigned leg_flags(const struct mirror *mirror, unsigned flags)
{
	flags &= ~(unsigned)BLK_FAST_ZERO;
	return mirror->phase == MIRROR_IN_SYNC ? flags : flags & ~(unsigned)BLK_FUA;
}

static suspends int change_both(struct mirror *mirror, const struct change *change)
{
	static const char *const names[] = {
		[LEG_WRITE] = "write", [LEG_ZERO] = "zero", [LEG_DISCARD] = "discard"
	};
	unsigned flags = leg_flags(mirror, change->flags);
	bool in_turn = change->flags & BLK_FAST_ZERO; /* the primary may refuse */
	uint64_t start_ns = reactor_now_ns(), primary_ns;
	struct leg_op *op = NULL;
	int ret, leg_ret;

	if (!in_turn)
		op = leg_begin(mirror, change->kind, change->off, change->len, flags, change->buf);
	ret = change_leg(mirror->primary, change);
	if (in_turn && !ret)
		op = leg_begin(mirror, change->kind, change->off, change->len, flags, NULL);
	if (in_turn && ret == -EOPNOTSUPP)
		return ret;
	primary_ns = reactor_now_ns();
	leg_ret = in_turn && ret ? 0 : leg_end(op);
	mirror_meter_add(&mirror->wait_ns, reactor_now_ns() - primary_ns);
	mirror_meter_add(&mirror->change_ns, reactor_now_ns() - start_ns);
	if (leg_ret)
		mirror_degrade(mirror, names[change->kind], change->off, change->len, leg_ret);
	if (ret) {
		/* Nobody knows what the primary holds there now; the copy makes them equal. */
		mirror_dirty_set(mirror, change->off, change->len);
		co_queue_wake_all(&mirror->copy_wanted);
	}
	return ret;
}

/* The range is held. */
static suspends int change_locked(struct mirror *mirror, const struct change *change)
{
	int ret;

	if (unlikely(mirror->phase == MIRROR_DETACHED)) {
		/* It may have ended by itself, when a leg got another size: nothing is noted any more. */
		mirror_log_end(mirror, false);
		return change_leg(mirror_main_leg(mirror), change);
	}
	if (mirror_dirty_all(mirror, change->off, change->len))
		return change_leg(mirror->primary, change);
	mirror_recent_mark(mirror, change->off, change->len);
	ret = mirror_log_require(mirror, change->off, change->len);
	if (unlikely(ret))
		mirror_degrade(mirror, "intent log: write", change->off, change->len, ret);
	if (likely(mirror_leg_used(mirror)))
		return change_both(mirror, change);
	mirror_dirty_set(mirror, change->off, change->len);
	return change_leg(mirror->primary, change);
}

static suspends int change_any(struct mirror *mirror, const struct change *change)
{
	struct range range;
	bool left;
	int ret;

	mirror->guest_count++;
	mirror->guest_written += change->len;
	mirror_meter_add(&mirror->written, change->len);
	do {
		left = mirror->primary_left;
		range_lock_acquire(&mirror->writes, &range, change->off, change->len, true);
		ret = change_locked(mirror, change);
		range_lock_release(&mirror->writes, &range);
	} while (unlikely(ret) && mirror_ask_again(mirror, left));
	return ret;
}

static suspends int mirror_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct change change = { LEG_WRITE, off, len, flags, buf };

	return change_any(to_mirror(blk), &change);
}

/*
 * In parts: a whole disk at once could take the secondary longer than the time it has. When the first part could
 * be zeroed fast and another one cannot, it is zeroed as it goes.
 */
static suspends int clear(
	struct mirror *mirror, enum leg_kind kind, uint64_t off, uint64_t len, unsigned flags)
{
	int ret = 0;

	while (len && !ret) {
		uint64_t part_max = mirror_clear_max(mirror);
		uint64_t part = MIN(len, part_max - off % part_max);
		struct change change = { kind, off, part, flags, NULL };

		ret = change_any(mirror, &change);
		flags &= ~(unsigned)BLK_FAST_ZERO;
		off += part;
		len -= part;
	}
	return ret;
}

static suspends int mirror_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return clear(to_mirror(blk), LEG_ZERO, off, len, flags);
}

static suspends int mirror_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return clear(to_mirror(blk), LEG_DISCARD, off, len, flags);
}

/* --- the other requests ----------------------------------------------------------------------- */

static bool secondary_knows(const struct mirror *mirror, uint64_t off, uint64_t len)
{
	return mirror_leg_used(mirror) && !mirror_dirty_any(mirror, off, len);
}

/* A secondary that lost its power meanwhile may have lost what it had not flushed: a flush brings that out. */
static suspends void flush_if_recent(struct mirror *mirror, uint64_t off, uint64_t len)
{
	int ret;

	if (!mirror_recent_any(mirror, off, len))
		return;
	ret = leg_end(leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL));
	if (ret)
		mirror_degrade(mirror, "flush", 0, 0, ret);
}

/* The primary could not read it. What changes meanwhile may be read old or new, but not half dirty. */
static suspends int read_secondary(
	struct mirror *mirror, uint64_t off, void *buf, size_t len, int primary_ret)
{
	if (secondary_knows(mirror, off, len))
		flush_if_recent(mirror, off, len);
	if (!secondary_knows(mirror, off, len))
		return primary_ret;

	struct leg_op *op = leg_begin(mirror, LEG_READ, off, len, 0, NULL);
	int ret = leg_wait(op);

	if (ret) {
		mirror_degrade(mirror, "read", off, 0, ret);
		ret = primary_ret;
	} else if (!secondary_knows(mirror, off, len)) {
		ret = primary_ret;
	} else {
		memcpy(buf, op->buf, len);
		mirror->served_by_secondary++;
	}
	leg_put(op);
	return ret;
}

static suspends int mirror_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct mirror *mirror = to_mirror(blk);
	struct blk *leg;
	bool left;
	int ret;

	mirror->guest_count++;
	/* A leg that failed may have been replaced meanwhile. */
	do {
		left = mirror->primary_left;
		leg = mirror_main_leg(mirror);
		ret = blk_read(leg, off, buf, len);
	} while (unlikely(ret) &&
		 (mirror_ask_again(mirror, left) || leg != mirror_main_leg(mirror)));
	if (likely(!ret) || mirror->phase == MIRROR_DETACHED)
		return ret;
	mirror_primary_failed(mirror, off, len, ret);
	return read_secondary(mirror, off, buf, len, ret);
}

/* While it copies, the flush at the end of the copy is early enough for the secondary. */
static suspends int flush_once(struct mirror *mirror)
{
	if (mirror->phase != MIRROR_IN_SYNC)
		return blk_flush(mirror_main_leg(mirror));

	struct leg_op *op = leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL);
	int ret = blk_flush(mirror->primary);
	int leg_ret = leg_end(op);

	if (leg_ret)
		mirror_degrade(mirror, "flush", 0, 0, leg_ret);
	return ret;
}

static suspends int mirror_flush(struct blk *blk)
{
	struct mirror *mirror = to_mirror(blk);
	bool left;
	int ret;

	mirror->guest_count++;
	do {
		left = mirror->primary_left;
		ret = flush_once(mirror);
	} while (unlikely(ret) && mirror_ask_again(mirror, left));
	if (unlikely(ret) && mirror->phase != MIRROR_DETACHED)
		mirror_primary_flush_failed(mirror, ret);
	/* A disk may say only once that it lost what it had not flushed: then the settler has heard it. */
	if (unlikely(mirror->flush_untold) && !ret)
		ret = -EIO;
	mirror->flush_untold = false;
	return ret;
}

static suspends int mirror_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	return blk_extents(mirror_main_leg(to_mirror(blk)), off, len, extents);
}

/* Somebody else changed the size of a leg: they are not two of a kind any more. */
static void mirror_child_resized(struct blk *blk, struct blk *child)
{
	struct mirror *mirror = to_mirror(blk);

	if (mirror->resizing || (child != mirror->primary && child != mirror->secondary))
		return;
	if (mirror->phase != MIRROR_DETACHED) {
		snprintf(mirror->note, sizeof(mirror->note),
			"ended: the %s was resized to %llu bytes",
			child == mirror->primary ? "primary" : "secondary",
			(unsigned long long)child->caps.size);
		mirror_set_phase(mirror, MIRROR_DETACHED);
	}
	if (child == mirror_main_leg(mirror))
		blk_size_changed(blk, child->caps.size);
}

/* --- open and close --------------------------------------------------------------------------- */

static int mirror_check(const struct blk *blk, struct err *err)
{
	const struct mirror *mirror = to_mirror(blk);

	if (mirror_conf_nests(mirror->secondary_conf))
		return conf_error(mirror->secondary_conf, err,
			"a mirror as the secondary of a mirror is not supported");
	if (!mirror->overwrite && !mirror->log_path)
		return err_set(err, EPERM,
			"what the secondary holds would be destroyed: say overwrite = true");
	return 0;
}

static void init(struct mirror *mirror)
{
	mirror->primary = mirror->blk.below;
	mirror->phase_time = time(NULL);
	mirror->step_max = MIRROR_STEP_MAX_BYTES;
	range_lock_init(&mirror->writes);
	co_queue_init(&mirror->settle_wanted);
	co_mutex_init(&mirror->settle_mutex);
	co_group_init(&mirror->tasks);
	co_queue_init(&mirror->copy_wanted);
	co_queue_init(&mirror->changed);
	co_mutex_init(&mirror->claiming);
	co_mutex_init(&mirror->log.mutex);
}

/* A mirror hides nothing of the primary; requests are cut for it, the secondary's calls align for themselves. */
static void set_caps(struct mirror *mirror)
{
	struct blk_caps *caps = &mirror->blk.caps;
	const struct blk_caps *secondary = mirror->secondary ? &mirror->secondary->caps : NULL;

	caps->fua = true; /* what a leg cannot do, its calls make up for */
	caps->grows = caps->multi_reactor = false;
	if (!secondary) {
		caps->zero_fast = false;
		caps->caches_writes = true;
		return;
	}
	caps->preferred_size = MAX(caps->preferred_size, secondary->preferred_size);
	caps->zero_fast &= secondary->zero_fast;
	caps->caches_writes |= secondary->caches_writes;
	caps->dies_with_process |= secondary->dies_with_process;
}

suspends int mirror_open_secondary(struct mirror *mirror, struct err *err)
{
	struct blk *secondary;
	int ret = blk_open_child(&mirror->blk, mirror->secondary_conf, false, &secondary, err);

	if (ret)
		return err_wrap(err, "secondary");
	ret = mirror_check_legs(mirror, secondary, err);
	if (!ret) {
		mirror->secondary = secondary;
	} else if (mirror->start_degraded) {
		list_remove(&secondary->extra_link);
		stack_close(secondary);
	}
	return ret;
}

static void start_without(struct mirror *mirror, const struct err *err)
{
	mirror->phase = MIRROR_DEGRADED;
	mirror_failed(&mirror->secondary_failure, "it cannot be opened: %s", err->text);
	blk_notice(&mirror->blk, "starts without the secondary: %s", err->text);
	mirror_retry_later(mirror);
}

static suspends int mirror_open(struct blk *blk, struct err *err)
{
	struct mirror *mirror = to_mirror(blk);
	int ret;

	init(mirror);
	if (blk->caps.read_only) {
		mirror->phase = MIRROR_DETACHED;
		snprintf(mirror->note, sizeof(mirror->note),
			"the secondary is left alone, since the primary is opened read-only");
		return 0;
	}
	ret = mirror_check_identity(mirror, err);
	if (ret)
		return err_wrap(err, "secondary");
	ret = mirror_open_secondary(mirror, err);
	if (ret && mirror->start_degraded)
		start_without(mirror, err);
	else if (ret)
		return ret;
	ret = mirror_dirty_init(mirror, err);
	if (ret)
		return ret;
	mirror_dirty_set(mirror, 0, blk->caps.size);
	mirror->dirtied = (struct mirror_meter){};
	ret = mirror_log_open(mirror, err);
	if (!ret && !(mirror->leg = leg_create(mirror)))
		ret = err_set(err, ENOMEM, "out of memory");
	if (ret)
		return ret;
	set_caps(mirror);
	mirror->began_ns = reactor_now_ns();
	co_group_start(&mirror->tasks, mirror_copier_run, mirror);
	co_group_start(&mirror->tasks, mirror_settler_run, mirror);
	return 0;
}

static suspends void mirror_close(struct blk *blk)
{
	struct mirror *mirror = to_mirror(blk);

	mirror->closing = true;
	co_queue_wake_all(&mirror->copy_wanted);
	co_queue_wake_all(&mirror->settle_wanted);
	co_queue_wake_all(&mirror->changed);
	co_group_wait(&mirror->tasks);
	if (mirror->leg)
		mirror_settle(mirror);
	if (mirror->log.end_untold)
		blk_notice(blk,
			"the intent log \"%s\" does not know that the mirror has ended: remove it "
			"before these disks are a mirror again",
			mirror->log_path);
	leg_release(mirror, mirror->leg_lost || mirror->phase == MIRROR_DEGRADED);
	free(mirror->dirty);
}

const struct blk_ops mirror_ops = {
	.name = "mirror",
	.summary = "keeps a second disk equal to the layers below",
	.options = mirror_options,
	.struct_size = sizeof(struct mirror),
	.check = mirror_check,
	.open = mirror_open,
	.close = mirror_close,
	.read = mirror_read,
	.write = mirror_write,
	.flush = mirror_flush,
	.zero = mirror_zero,
	.discard = mirror_discard,
	.extents = mirror_extents,
	.resize = mirror_resize,
	.child_resized = mirror_child_resized,
	.status = mirror_add_status,
	.describe = mirror_describe,
};
