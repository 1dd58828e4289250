/*
 * What is done with a mirror while guests use it: begin, pause, promote, cancel, compare; see mirror.h.
 *
 * To end it, the whole disk is locked like by a guest's change: that waits for the changes and copy steps
 * under way and lets reads pass. What waits for the lock meanwhile, and what comes later, looks at the phase
 * after it has it, and goes to the leg that serves from now on. So nothing is lost, and nothing is drained.
 *
 * A primary that hangs would hold the lock for good. A forced promotion gives it up after a while, which ends the
 * requests of layers that can (blk_abandon()); those that fail for it wait for the promotion and are asked again.
 * That is done for a secondary that could be flushed; else the promotion fails, and nothing has happened.
 * It stays left when the promotion fails then: what it would still carry out of what it was sent, nobody knows.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/units.h"
#include "blk/call.h"
#include "blk/layers.h"
#include "blk/mirror/mirror_private.h"
#include "rt/buf.h"

struct blk *mirror_find(struct blk *blk)
{
	while (blk && blk->ops != &mirror_ops)
		blk = blk->below;
	return blk;
}

bool mirror_in_sync(const struct blk *blk)
{
	const struct mirror *mirror = to_mirror(blk);

	return mirror->phase == MIRROR_IN_SYNC && !mirror->dirty_count;
}

uint64_t mirror_bytes_dirty(const struct blk *blk)
{
	const struct mirror *mirror = to_mirror(blk);
	uint64_t bytes = mirror->dirty_count * mirror->chunk_size, size = blk->caps.size;

	/* The last chunk may be a short one. */
	if (mirror->dirty_count && bitmap_test(mirror->dirty, mirror->chunk_count - 1))
		bytes -= mirror->chunk_count * mirror->chunk_size - size;
	return bytes;
}

suspends void mirror_wait_change(struct blk *blk, uint64_t deadline_ns)
{
	struct mirror *mirror = to_mirror(blk);

	if (!mirror->closing)
		co_queue_wait_until(&mirror->changed, deadline_ns);
}

suspends int mirror_insert(struct blk **top, struct conf *group, struct err *err)
{
	struct blk *below = *top;
	struct blk_env *env = below->env;
	int ret;

	conf_add(group, conf_new_bool("paused", NULL, true));
	ret = blk_open_layer(&mirror_ops, group, env, false, top, err);
	if (ret) {
		err_place(err, group->where);
		return ret;
	}
	(*top)->listener = below->listener;
	below->listener = NULL;
	return 0;
}

suspends int mirror_begin_live(struct blk *blk, bool paused, struct err *err)
{
	struct mirror *mirror = to_mirror(blk);
	int ret;

	mirror_dirty_set(mirror, 0, blk->caps.size);
	mirror->dirtied =
		(struct mirror_meter){}; /* nothing became dirty, it only was not copied yet */
	snprintf(mirror->note, sizeof(mirror->note), "everything is copied: the mirror is new");
	ret = mirror_log_rewrite(mirror);
	if (ret)
		return err_sys(err, -ret, "mirror: intent-log \"%s\"", mirror->log_path);
	blk_drain_begin(mirror->primary);
	blk_drain_end(mirror->primary);
	if (!paused)
		mirror_resume(blk);
	return 0;
}

/* --- pause, resume, rate ---------------------------------------------------------------------- */

void mirror_pause(struct blk *blk)
{
	struct mirror *mirror = to_mirror(blk);

	mirror->paused = true;
	co_queue_wake_all(&mirror->copy_wanted);
	co_queue_wake_all(&mirror->changed);
}

void mirror_resume(struct blk *blk)
{
	struct mirror *mirror = to_mirror(blk);

	mirror->paused = false;
	mirror->retry_at_ns = 0;
	mirror->began_ns = reactor_now_ns();
	mirror->began_bytes = mirror->copied_bytes + mirror->skipped_bytes;
	co_queue_wake_all(&mirror->copy_wanted);
	co_queue_wake_all(&mirror->changed);
}

void mirror_set_rate(struct blk *blk, uint64_t bytes_per_s)
{
	struct mirror *mirror = to_mirror(blk);

	mirror->rate = bytes_per_s;
	mirror->rate_allowed_ns = reactor_now_ns();
	co_queue_wake_all(&mirror->copy_wanted);
}

/* --- the end ---------------------------------------------------------------------------------- */

static void detach(struct mirror *mirror, bool promoted)
{
	mirror->promoted = promoted;
	mirror->flush_untold &= !promoted; /* what the primary lost, the secondary has */
	mirror->leg_lost = mirror->phase == MIRROR_DEGRADED;
	snprintf(mirror->note, sizeof(mirror->note), promoted ? "promoted" : "cancelled");
	mirror_set_phase(mirror, MIRROR_DETACHED);
}

struct patience {
	struct leg *leg;
	struct co_queue over;
};

static suspends void lose_patience(void *arg)
{
	struct patience *patience = arg;

	if (!co_queue_wait_until(&patience->over, reactor_now_ns() + MIRROR_LEG_GRACE_NS))
		leg_hurry(patience->leg);
}

/* The whole disk, without waiting long for the secondary. */
static suspends void lock_in_a_hurry(struct mirror *mirror, struct range *range)
{
	struct patience patience = { .leg = mirror->leg };
	struct co_group group;

	co_group_init(&group);
	co_queue_init(&patience.over);
	if (mirror->leg)
		co_group_start(&group, lose_patience, &patience);
	range_lock_acquire(&mirror->writes, range, 0, UINT64_MAX, true);
	co_queue_wake_all(&patience.over);
	co_group_wait(&group);
}

suspends void mirror_cancel(struct blk *blk)
{
	struct mirror *mirror = to_mirror(blk);
	struct range range;

	lock_in_a_hurry(mirror, &range);
	mirror_log_end(mirror, false);
	detach(mirror, false);
	range_lock_release(&mirror->writes, &range);
}

static int refuse_promote(const struct mirror *mirror, struct err *err)
{
	char text[UNITS_SIZE_TEXT_LEN];

	units_format_size(mirror_bytes_dirty(&mirror->blk), text);
	if (mirror->phase == MIRROR_DEGRADED)
		return err_set(err, EAGAIN,
			"not in sync: the secondary failed (%s), and %s may differ",
			mirror->secondary_failure.text, text);
	return err_set(err, EAGAIN, "not in sync: %s %s", text,
		mirror->paused ? "are to be copied, and the mirror is paused"
			       : "are still to be copied");
}

/* The legs change places; requests under way have theirs in hand. */
static suspends void exchange(struct mirror *mirror)
{
	struct blk *old = mirror->primary;
	int ret;

	list_remove(&mirror->secondary->extra_link);
	list_push_back(&mirror->blk.extra_children, &old->extra_link);
	mirror->primary = mirror->blk.below = mirror->secondary;
	mirror->secondary = old;
	ret = mirror_log_turn(mirror);
	if (ret)
		mirror_degrade(mirror, "intent log: write", 0, 0, ret);
}

/* It does not wait for a primary that hangs. */
static bool is_impatient(const struct mirror_promotion *promotion)
{
	return promotion->force && !promotion->keep;
}

/* --- a primary that hangs --------------------------------------------------------------------- */

/* The secondary has been flushed: the primary is not left for nothing. */
static void leave_primary(struct mirror *mirror)
{
	blk_notice(&mirror->blk,
		"the primary has not answered within %lld s, and is left for the secondary",
		(long long)mirror->timeout_s);
	mirror->primary_left = true;
	blk_abandon(mirror->primary);
}

static uint64_t last_chance_ns(const struct mirror *mirror)
{
	return reactor_now_ns() + (uint64_t)mirror->timeout_s * NS_PER_SEC;
}

struct last_chance {
	struct mirror *mirror;
	struct co_queue over;
};

static suspends void leave_if_not_over(void *arg)
{
	struct last_chance *chance = arg;

	if (!co_queue_wait_until(&chance->over, last_chance_ns(chance->mirror)))
		leave_primary(chance->mirror);
}

static suspends int flush_or_leave_primary(struct mirror *mirror)
{
	struct last_chance chance = { .mirror = mirror };
	struct co_group group;
	int ret;

	co_queue_init(&chance.over);
	co_group_init(&group);
	co_group_start(&group, leave_if_not_over, &chance);
	ret = blk_flush(mirror->primary);
	co_queue_wake_all(&chance.over);
	co_group_wait(&group);
	return ret;
}

suspends bool mirror_ask_again(struct mirror *mirror, bool left_before)
{
	struct range range;

	if (left_before || !mirror->primary_left)
		return false;
	range_lock_acquire(&mirror->writes, &range, 0, UINT64_MAX, false);
	range_lock_release(&mirror->writes, &range);
	return true;
}

static suspends int flush_secondary(struct mirror *mirror, struct err *err)
{
	int ret = leg_end(leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL));

	if (!ret)
		return 0;
	mirror_degrade(mirror, "flush", 0, 0, ret);
	return err_sys(err, -ret, "the secondary cannot be flushed");
}

/* Both legs hold the same, and durably so, if need be. The secondary comes first: it always answers in time. */
static suspends int flush_legs(
	struct mirror *mirror, const struct mirror_promotion *promotion, struct err *err)
{
	int ret = flush_secondary(mirror, err);

	if (ret)
		return ret;
	ret = is_impatient(promotion) ? flush_or_leave_primary(mirror) : blk_flush(mirror->primary);
	/* Else its errors are a reason to promote, not to refuse. */
	if (!promotion->keep || !ret)
		return 0;
	mirror_primary_flush_failed(mirror, ret);
	mirror->flush_untold = true;
	return err_sys(err, -ret, "the primary, which is to be kept, cannot be flushed");
}

static suspends int commit(
	struct mirror *mirror, const struct mirror_promotion *promotion, struct err *err)
{
	struct conf *stack;
	int ret;

	if (!promotion->commit)
		return 0;
	stack = mirror_describe_promoted(mirror, promotion->keep);
	ret = promotion->commit(promotion->arg, stack, err);
	conf_free(stack);
	return ret;
}

static int may_promote(
	const struct mirror *mirror, const struct mirror_promotion *promotion, struct err *err)
{
	bool in_sync = mirror_in_sync(&mirror->blk);

	if (mirror->phase == MIRROR_DETACHED)
		return err_set(err, EINVAL, "the mirror has ended: %s", mirror->note);
	if (!mirror->secondary || (!in_sync && (!promotion->force || promotion->keep)))
		return refuse_promote(mirror, err);
	if (mirror->leg->given_up_count)
		return err_set(err, EAGAIN,
			"the secondary has not answered %u requests yet, and a late one could undo "
			"what is written after it took over",
			mirror->leg->given_up_count);
	return 0;
}

static suspends int promote_locked(
	struct mirror *mirror, const struct mirror_promotion *promotion, struct err *err)
{
	int ret = may_promote(mirror, promotion, err);

	if (!ret)
		ret = flush_legs(mirror, promotion, err);
	if (!ret)
		ret = commit(mirror, promotion, err);
	if (ret && mirror->primary_left)
		err_wrap(err, "the primary was left already, and requests fail until a promotion "
			      "succeeds: mend this, and promote again with --force");
	if (ret)
		return ret;
	if (promotion->keep) {
		exchange(mirror);
		return 0;
	}
	mirror_log_end(mirror, true);
	detach(mirror, true);
	return 0;
}

/* The whole disk; the primary is left if it keeps a part of it in use. */
static suspends int lock_or_leave_primary(struct mirror *mirror,
	const struct mirror_promotion *promotion, struct range *range, struct err *err)
{
	int ret;

	if (range_lock_acquire_all_until(&mirror->writes, range, last_chance_ns(mirror)))
		return 0;
	ret = flush_secondary(mirror, err);
	if (!ret)
		ret = may_promote(mirror, promotion, err);
	if (ret)
		return err_wrap(err, "the primary does not answer, and was not left yet");
	leave_primary(mirror);
	/* In this very turn, ahead of those whose requests fail now (mirror_ask_again()). */
	range_lock_acquire(&mirror->writes, range, 0, UINT64_MAX, true);
	return 0;
}

suspends int mirror_promote(
	struct blk *blk, const struct mirror_promotion *promotion, struct err *err)
{
	struct mirror *mirror = to_mirror(blk);
	struct range range;
	int ret = may_promote(mirror, promotion, err);

	if (ret)
		return ret;
	if (is_impatient(promotion))
		ret = lock_or_leave_primary(mirror, promotion, &range, err);
	else
		range_lock_acquire(&mirror->writes, &range, 0, UINT64_MAX, true);
	if (ret)
		return ret;
	ret = promote_locked(mirror, promotion, err);
	range_lock_release(&mirror->writes, &range);
	return ret;
}

void mirror_unlink(struct blk *blk, struct blk **top)
{
	struct mirror *mirror = to_mirror(blk);
	struct blk *parent = blk->parent, *rest = mirror_main_leg(mirror);

	assert(mirror->phase == MIRROR_DETACHED);
	if (mirror->promoted)
		list_remove(&rest->extra_link);
	else
		blk->below = NULL;
	rest->parent = parent;
	blk->parent = NULL;
	if (parent) {
		assert(parent->below == blk);
		parent->below = rest;
	} else {
		assert(*top == blk);
		rest->listener = blk->listener;
		blk->listener = NULL;
		*top = rest;
	}
}

/* --- comparing -------------------------------------------------------------------------------- */

/* How far from off on both legs are known to be zero; 0: not at all. */
static suspends uint64_t zero_run(struct mirror *mirror, uint64_t off, uint64_t len)
{
	struct blk_extent list[1];
	struct blk_extents extents;
	struct leg_op *op;
	uint64_t run = 0;

	blk_extents_init(&extents, list, ARRAY_LEN(list));
	if (blk_extents(mirror->primary, off, len, &extents) || !(list[0].flags & BLK_EXTENT_ZERO))
		return 0;
	op = leg_begin(mirror, LEG_EXTENTS, off, list[0].len, 0, NULL);
	if (!leg_wait(op) && op->list[0].flags & BLK_EXTENT_ZERO)
		run = op->list[0].len;
	leg_put(op);
	return run;
}

static suspends void note_difference(struct mirror *mirror, uint64_t off, const char *a,
	const char *b, uint64_t len, struct mirror_comparison *sum)
{
	for (uint64_t i = 0; i < len; i++) {
		if (a[i] == b[i])
			continue;
		if (!sum->different++)
			sum->first_off = off + i;
	}
	mirror_recent_mark(mirror, off, len);
	mirror_log_require(mirror, off, len);
	mirror_dirty_set(mirror, off, len);
	co_queue_wake_all(&mirror->copy_wanted);
}

static suspends int compare_data(struct mirror *mirror, uint64_t off, uint64_t len,
	struct mirror_comparison *sum, struct err *err)
{
	struct leg_op *op = leg_begin(mirror, LEG_READ, off, len, 0, NULL);
	char *buf = buf_get(len);
	int ret = buf ? blk_read(mirror->primary, off, buf, len) : -ENOMEM;
	int leg_ret = leg_wait(op);

	if (ret) {
		err_sys(err, -ret, "the primary cannot be read at %llu", (unsigned long long)off);
	} else if (leg_ret) {
		ret = leg_ret;
		err_sys(err, -ret, "the secondary cannot be read at %llu", (unsigned long long)off);
	} else {
		sum->compared += len;
		if (memcmp(buf, op->buf, len))
			note_difference(mirror, off, buf, op->buf, len, sum);
	}
	buf_put(buf, len);
	leg_put(op);
	return ret;
}

/* The range is locked. */
static suspends int compare_locked(struct mirror *mirror, uint64_t off, uint64_t *len,
	struct mirror_comparison *sum, struct err *err)
{
	uint64_t zeroes, size = mirror->blk.caps.size;

	/* It may have become shorter while the range was waited for, or before. */
	*len = off < size ? MIN(*len, size - off) : 0;
	if (!*len)
		return 0;
	if (!mirror_leg_used(mirror))
		return err_set(err, EAGAIN,
			"the secondary is not in use, so there is nothing to "
			"compare with");
	if (mirror_dirty_any(mirror, off, *len)) {
		uint64_t chunk_end = round_down(off, mirror->chunk_size) + mirror->chunk_size;

		*len = MIN(*len, chunk_end - off);
		if (mirror_dirty_any(mirror, off, *len))
			return 0;
	}
	zeroes = zero_run(mirror, off, *len);
	if (zeroes) {
		*len = zeroes;
		sum->compared += zeroes;
		return 0;
	}
	*len = MIN(*len, (uint64_t)MIRROR_STEP_MAX_BYTES);
	return compare_data(mirror, off, *len, sum, err);
}

suspends int mirror_compare(struct blk *blk, uint64_t off, uint64_t *len,
	struct mirror_comparison *sum, struct err *err)
{
	struct mirror *mirror = to_mirror(blk);
	struct range range;
	int ret;

	*len = MIN(*len, (uint64_t)MIRROR_PASS_MAX_BYTES);
	co_group_enter(&blk->in_flight); /* closing waits for it, as for a request */
	range_lock_acquire(&mirror->writes, &range, off, *len, false);
	ret = compare_locked(mirror, off, len, sum, err);
	range_lock_release(&mirror->writes, &range);
	co_group_leave(&blk->in_flight);
	return ret;
}
