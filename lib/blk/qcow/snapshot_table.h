/*
 * The table of an image's internal snapshots (format, "Snapshots").
 */
#pragma once

#include "blk/qcow/image.h"

struct qcow_snapshot {
	uint64_t l1_off;
	uint32_t l1_entry_count;
	uint16_t id_len, name_len;
	char *id,
		*name; /* owned; ended by a NUL that is not counted, though others may be inside */
	uint32_t time_s, time_ns;
	uint64_t vm_clock_ns, vm_state_len;
	uint64_t disk_size; /* the image's when the snapshot does not say */
	uint8_t *extra;     /* owned; all extra data, what is not known too */
	uint32_t extra_len;
};

struct qcow_snapshots {
	struct qcow_snapshot *items;
	uint32_t count;
	uint64_t len; /* bytes of the table on disk */
};

/*
 * Reads and checks the table's own rules, not what it points to. -EINVAL with a text for a table that lies.
 * On an error the list is empty.
 */
suspends int qcow_snapshots_load(
	const struct image *image, struct qcow_snapshots *list, struct err *err);
void qcow_snapshots_fini(struct qcow_snapshots *list);

/* Version 3 demands the extra data up to the disk size. */
bool qcow_snapshot_incomplete(const struct image *image, const struct qcow_snapshot *snapshot);

/* The table as it stands on disk, every entry with the extra data that version 3 demands; *table is the caller's. */
int qcow_snapshots_encode(struct qcow_snapshots *list, uint8_t **table, uint64_t *len);

/* By id, else by name; NULL when there is none. */
struct qcow_snapshot *qcow_snapshots_find(
	const struct qcow_snapshots *list, const char *id_or_name);
void qcow_snapshot_fini(struct qcow_snapshot *snapshot);
