/*
 * Checking and repairing an image that nobody else writes to meanwhile: offline, or below a drained layer.
 *
 * The counts mean what they mean in `qemu-img check`, and agree with it.
 */
#pragma once

#include "blk/qcow/qcow.h"

enum qcow_finding {
	QCOW_FINDING_CORRUPTION, /* the image is damaged: data may be wrong, or become so by writing */
	QCOW_FINDING_LEAK,       /* space is lost, nothing else */
	QCOW_FINDING_ERROR,      /* something could not be checked */
};

struct qcow_check_result {
	uint64_t corruptions, leaks, errors;     /* by kind of finding */
	uint64_t corruptions_fixed, leaks_fixed; /* by qcow_repair() */
	/* of the active disk, in clusters */
	uint64_t total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
	uint64_t image_end_off; /* where the last cluster in use ends; 0 when that is not known */
};

/* Findings are told one by one, at most this many; all are counted. */
#define QCOW_FINDINGS_MAX 1000

/* Embedded in the caller's struct; either function may be NULL. They must not suspend. */
struct qcow_check_watch {
	void (*finding)(struct qcow_check_watch *watch, enum qcow_finding kind, const char *text);
	/* done grows to total, both in arbitrary units. */
	void (*progress)(struct qcow_check_watch *watch, uint64_t done, uint64_t total);
};

/*
 * Reads all metadata of the image in `file`, changes nothing. watch may be NULL. 0 also when something was
 * found; an error only when the check itself could not be done (-ENOMEM, -EFBIG, -EIO).
 */
suspends int qcow_check(struct blk *file, const struct qcow_header *header,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err);

enum qcow_repair {
	QCOW_REPAIR_LEAKS, /* lower counts that are too high; nothing when there are corruptions */
	QCOW_REPAIR_ALL, /* counts, copied flags, broken refcount structures, entries without data */
};

/*
 * Checks, repairs, and checks again: `result` says what is left, and how much was fixed. `watch` hears of what
 * the first check finds. When nothing is wrong any more the dirty and corrupt bits are cleared.
 *
 * Crash-safe: what changes is written to free clusters, and one write of the header makes it count.
 * header is updated; the caller's other copies of the tables are stale then.
 */
suspends int qcow_repair(struct blk *file, struct qcow_header *header, enum qcow_repair mode,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err);
