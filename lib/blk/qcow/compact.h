/*
 * Compaction of a live qcow image; how it works stands at the head of compact.c.
 */
#pragma once

#include "blk/blk.h"

/* One compaction: what is wanted, and how far it is. Lives as long as qcow_compact() runs. */
struct qcow_compact {
	uint64_t rate_bytes_s; /* copy at most so much; 0: as fast as guests leave room for */
	void (*progress)(
		struct qcow_compact *job); /* after each step, may be NULL; must not suspend */
	bool cancelled;                    /* set it to end the compaction after the current step */

	uint64_t done, total; /* guest bytes looked at, and the disk's size; done only grows */
	uint64_t moved;       /* clusters */
	uint64_t size_before, size_after; /* of the image, bytes */
};

extern const struct blk_ops qcow_ops;

/* blk is a qcow layer (blk->ops == &qcow_ops). One at a time: -EBUSY. -ECANCELED when cancelled. */
suspends int qcow_compact(struct blk *blk, struct qcow_compact *job, struct err *err);
/* The one that runs, NULL when none does; valid until the caller suspends. */
struct qcow_compact *qcow_compaction(struct blk *blk);
