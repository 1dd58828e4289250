/*
 * Repairing an image.
 *
 * A check counts what there is to point to each cluster; those counts become the image's. What else follows
 * from them (copied flags), or can only be wrong, is put right on the way. All of it is one step of
 * shadow.c: the old structures stay as they are until the new ones are complete and durable.
 *
 * One round may not be enough: where a refcount block lay on top of data, the count of that cluster is only
 * right once the block has moved. So it goes on while rounds help (one that does not may prepare the next), ROUNDS_MAX
 * at most, and what a last check finds is the result. What nobody can know is left alone, such as where lost data was: an entry that points beyond
 * the end of the file stays, and nothing new is put where it points to.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "blk/qcow/check_private.h"
#include "blk/qcow/shadow.h"

#define ROUNDS_MAX  8
#define USELESS_MAX 2 /* rounds in a row that did not help */

static suspends int repair_snapshot_table(struct shadow *shadow, struct qcow_snapshots *list)
{
	bool incomplete = false;

	for (uint32_t i = 0; i < list->count; i++)
		incomplete |= qcow_snapshot_incomplete(shadow->image, &list->items[i]);
	return incomplete ? shadow_replace_snapshots(shadow, list, list->len) : 0;
}

static suspends int repair_active_tree(struct shadow *shadow, struct err *err)
{
	const struct qcow_header *header = shadow->image->header;
	CLEANUP(free) uint64_t *words = NULL, *old = NULL;
	size_t len = (size_t)header->l1_entry_count * 8;
	int ret = shadow_load_l1(shadow, header->l1_off, header->l1_entry_count, &words, err);

	if (ret)
		return ret;
	old = malloc(len + 1);
	if (!old)
		return err_set(err, ENOMEM, "no memory for the L1 table");
	memcpy(old, words, len);
	ret = shadow_fix_tree(shadow, words, header->l1_entry_count, 1, true);
	if (!ret && memcmp(old, words, len) != 0)
		ret = shadow_replace_l1(shadow, words, header->l1_entry_count);
	return ret ? err_sys(err, -ret, "cannot repair the tables") : 0;
}

static suspends int repair_round(struct check *check, struct qcow_header *header, struct err *err)
{
	struct shadow shadow;
	bool unknown;
	int ret;

	shadow_init_with(&shadow, &check->image, &check->refs, check->rebuild);
	if (check->bitmaps_broken)
		shadow.header.autoclear &= ~(uint64_t)QCOW_AUTOCLEAR_BITMAPS;
	ret = shadow_reserve(&shadow, &check->dangling);
	ret = ret ? err_sys(err, -ret, "cannot count references")
		  : repair_active_tree(&shadow, err);
	if (!ret) {
		ret = repair_snapshot_table(&shadow, &check->snapshots);
		if (!ret)
			ret = shadow_commit(&shadow, false, &unknown);
		else
			shadow_abort(&shadow);
		if (ret)
			err_sys(err, -ret, "cannot write the repaired tables");
	}
	if (!ret) {
		qcow_header_take(header, &shadow.header);
		header->autoclear = shadow.header.autoclear;
	}
	shadow_fini(&shadow);
	return ret;
}

static suspends int clear_bits(struct blk *file, struct qcow_header *header, struct err *err)
{
	uint64_t cleared = header->incompatible &
			   ~(uint64_t)(QCOW_INCOMPAT_DIRTY | QCOW_INCOMPAT_CORRUPT);
	int ret;

	if (cleared == header->incompatible)
		return 0;
	header->incompatible = cleared;
	ret = qcow_header_write(file, header);
	if (!ret)
		ret = blk_flush(file);
	return ret ? err_sys(err, -ret, "cannot clear the dirty and corrupt bits") : 0;
}

static bool is_clean(const struct qcow_check_result *result)
{
	return !result->corruptions && !result->errors;
}

static bool is_better(const struct qcow_check_result *now, const struct qcow_check_result *before)
{
	return now->corruptions + now->errors + now->leaks <
	       before->corruptions + before->errors + before->leaks;
}

static bool worth_repairing(const struct check *check, enum qcow_repair mode)
{
	const struct qcow_check_result *result = check->result;

	if (mode == QCOW_REPAIR_LEAKS)
		return result->leaks && is_clean(result);
	return result->corruptions || result->errors || result->leaks;
}

static suspends int repair_rounds(struct check *check, struct blk *file, struct qcow_header *header,
	enum qcow_repair mode, struct err *err)
{
	struct qcow_check_result *result = check->result, best = *result;
	int ret = 0;

	for (int round = 0, useless = 0; round < ROUNDS_MAX && useless < USELESS_MAX; round++) {
		if (!worth_repairing(check, mode))
			return 0;
		if (check->unreadable)
			return err_set(err, EIO,
				"metadata cannot be read: repairing would give up what it points "
				"to");
		ret = repair_round(check, header, err);
		if (ret)
			return ret;
		check_fini(check);
		ret = check_run(check, file, header, NULL, result, err);
		if (ret)
			return ret;
		useless = is_better(result, &best) ? 0 : useless + 1;
		if (!useless)
			best = *result;
	}
	return 0;
}

suspends int qcow_repair(struct blk *file, struct qcow_header *header, enum qcow_repair mode,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err)
{
	struct qcow_check_result first;
	struct check check;
	int ret = check_run(&check, file, header, watch, result, err);

	first = *result;
	if (!ret)
		ret = repair_rounds(&check, file, header, mode, err);
	check_fini(&check);
	if (ret)
		return ret;
	result->corruptions_fixed = first.corruptions > result->corruptions
					    ? first.corruptions - result->corruptions
					    : 0;
	result->leaks_fixed = first.leaks > result->leaks ? first.leaks - result->leaks : 0;
	return is_clean(result) ? clear_bits(file, header, err) : 0;
}
