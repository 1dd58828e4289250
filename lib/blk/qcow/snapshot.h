/*
 * Internal snapshots of an image at rest: offline, or below a layer that is drained and has committed
 * everything (which then loads its tables again).
 *
 * Each call changes the image in one atomic step (shadow.h), or not at all. header is updated. Refused: images with a
 * data file (-ENOTSUP), and whose counts do not fit (-EUCLEAN: repair first). discard: clusters that become
 * free are punched out of the file.
 */
#pragma once

#include "blk/qcow/qcow.h"

#define QCOW_SNAPSHOT_NAME_MAX_BYTES 255

/* Keeps the disk as it is now under a name that no snapshot has yet (-EEXIST). */
suspends int qcow_snapshot_create(struct blk *file, struct qcow_header *header, const char *name,
	bool discard, struct err *err);

/* The disk becomes what it was then, with the size it had then. By id, else by name; -ENOENT. */
suspends int qcow_snapshot_apply(struct blk *file, struct qcow_header *header,
	const char *id_or_name, bool discard, struct err *err);

/* Gives back the space that only the snapshot used. */
suspends int qcow_snapshot_delete(struct blk *file, struct qcow_header *header,
	const char *id_or_name, bool discard, struct err *err);
