/*
 * Resizes a mirrored disk, both legs of it, while guests and the copy stand still.
 *
 * The secondary goes first: when it cannot, nothing has happened; when the primary cannot after it, the secondary
 * goes back, and is copied again where it was cut. What is added is zero on both legs, or dirty where a leg does not
 * promise that. A secondary that is given up half-way may be resized late: that ends the mirror
 * (mirror_child_resized()), as does one that does not go back.
 *
 * A crash between the two leaves legs of different lengths, which the next start refuses, with both and the way
 * out: the secondary is made as long as the primary. What was cut from it is noted in the log before.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "blk/mirror/mirror_private.h"

static int check(const struct mirror *mirror, uint64_t size, struct err *err)
{
	uint32_t block_size;

	if (!mirror_leg_used(mirror))
		return err_set(err, EAGAIN,
			"the secondary, which failed (%s), cannot be resized with it: try again "
			"when it is back, "
			"or end the mirror (mirror cancel)",
			mirror->secondary_failure.text);
	if (mirror->leg->given_up_count)
		return err_set(err, EAGAIN, "the secondary has not answered %u requests yet",
			mirror->leg->given_up_count);
	block_size = mirror->secondary->caps.block_size;
	if (!is_aligned(size, block_size))
		return err_set(err, EINVAL,
			"%llu bytes is no multiple of the secondary's block size, %u",
			(unsigned long long)size, block_size);
	return 0;
}

static suspends int resize_secondary(
	struct mirror *mirror, uint64_t size, unsigned flags, struct err *err)
{
	int ret = leg_end(leg_begin(mirror, LEG_RESIZE, 0, size, flags, NULL));

	if (ret == -ETIMEDOUT) {
		mirror_degrade(mirror, "resize", 0, 0, ret);
		return err_set(err, ETIMEDOUT, "the secondary did not answer within %lld s",
			(long long)mirror->timeout_s);
	}
	if (ret) {
		*err = mirror->leg->resize_err;
		return err_wrap(err, "the secondary cannot be resized");
	}
	return 0;
}

/* The primary could not: the secondary becomes as long as that again. */
static suspends void go_back(struct mirror *mirror, uint64_t size)
{
	uint64_t old_size = mirror->blk.caps.size;
	struct err err;

	if (resize_secondary(mirror, old_size, BLK_FORCE, &err)) {
		snprintf(mirror->note, sizeof(mirror->note), "ended: %.200s", err.text);
		mirror_set_phase(mirror, MIRROR_DETACHED);
		blk_notice(&mirror->blk, "the mirror has ended: %s", err.text);
		return;
	}
	if (size < old_size)
		mirror_dirty_set(mirror, size, old_size - size);
}

static suspends int resize_legs(
	struct mirror *mirror, uint64_t size, unsigned flags, struct err *err)
{
	struct err primary_err;
	int ret;

	mirror->resizing = true;
	ret = resize_secondary(mirror, size, flags, err);
	if (!ret) {
		ret = blk_resize(mirror->primary, size, flags, &primary_err);
		if (ret)
			go_back(mirror, size);
		if (ret && err)
			*err = primary_err;
	}
	mirror->resizing = false;
	return ret;
}

/* Who makes a secondary long again that a crash left short must not find it noted as equal. */
static suspends int note_cut(struct mirror *mirror, uint64_t size, struct err *err)
{
	uint64_t old_size = mirror->blk.caps.size;
	int ret = 0;

	if (size < old_size) {
		mirror_recent_mark(mirror, size, old_size - size);
		ret = mirror_log_require(mirror, size, old_size - size);
	}
	return ret ? err_sys(err, -ret, "intent-log \"%s\"", mirror->log_path) : 0;
}

static suspends int resize_locked(
	struct mirror *mirror, uint64_t size, unsigned flags, struct err *err)
{
	bool zeroes = mirror->primary->caps.grows && mirror->secondary->caps.grows;
	uint64_t old_size = mirror->blk.caps.size;
	struct mirror_map map;
	int ret = mirror_map_create(mirror, size, &map, err);

	if (ret)
		return ret;
	ret = note_cut(mirror, size, err);
	if (!ret)
		ret = resize_legs(mirror, size, flags, err);
	if (ret) {
		free(map.dirty);
		return ret;
	}
	mirror_map_replace(mirror, size, &map);
	blk_size_changed(&mirror->blk, size);
	if (size > old_size) {
		mirror_recent_mark(mirror, old_size, size - old_size);
		if (!zeroes)
			mirror_dirty_set(mirror, old_size, size - old_size);
	}
	mirror->cursor = mirror->data_until = 0;
	ret = mirror_log_rewrite(mirror);
	if (ret)
		mirror_degrade(mirror, "intent log: write", 0, 0, ret);
	return 0;
}

suspends int mirror_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct mirror *mirror = to_mirror(blk);
	struct err unwanted;
	struct range range;
	int ret;

	if (!err)
		err = &unwanted;
	if (mirror->phase == MIRROR_DETACHED)
		return blk_resize(mirror_main_leg(mirror), size, flags, err);
	range_lock_acquire(&mirror->writes, &range, 0, UINT64_MAX, true);
	co_mutex_lock(&mirror->settle_mutex);
	ret = check(mirror, size, err);
	if (!ret)
		ret = resize_locked(mirror, size, flags, err);
	co_mutex_unlock(&mirror->settle_mutex);
	range_lock_release(&mirror->writes, &range);
	co_queue_wake_all(&mirror->copy_wanted);
	return ret;
}
