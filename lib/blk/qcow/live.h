/*
 * Checks and snapshots of an image that a layer has open: guests wait meanwhile.
 *
 * blk is a qcow layer (blk->ops == &qcow_ops), on its home reactor. None may be called from inside an op;
 * err is not NULL.
 */
#pragma once

#include "blk/blk.h"
#include "blk/qcow/check.h"
#include "blk/qcow/snapshot_table.h"

/* qcow_check() of the image as it is at this moment, everything committed. Of a read-only one too. */
suspends int qcow_live_check(struct blk *blk, struct qcow_check_watch *watch,
	struct qcow_check_result *result, struct err *err);

enum qcow_snapshot_change { QCOW_SNAPSHOT_CREATE, QCOW_SNAPSHOT_APPLY, QCOW_SNAPSHOT_DELETE };

/*
 * As the functions of snapshot.h, whose errors it has; -EROFS when the image is read-only. Each works whole or
 * not at all; when storing fails so that nobody knows which, writes are refused until the image is opened anew, and
 * when its tables cannot be read again, reads too. Apply changes what the disk reads under its users, and its size.
 */
suspends int qcow_live_snapshot(
	struct blk *blk, enum qcow_snapshot_change change, const char *name, struct err *err);

/* The caller ends it with qcow_snapshots_fini(). */
suspends int qcow_live_snapshots(struct blk *blk, struct qcow_snapshots *list, struct err *err);

/*
 * The disk of a read-only layer that has served nothing yet becomes the one that the snapshot holds, by id, else by
 * name, with the size it had then. -ENOENT.
 */
suspends int qcow_live_show(struct blk *blk, const char *id_or_name, struct err *err);
