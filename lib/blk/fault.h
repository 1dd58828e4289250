/*
 * fault: the layer that makes things go wrong, for tests; what it does can be changed while it runs.
 *
 * The rules come from the options (blkstackd with `layer = "fault"` in a config) or from fault_set().
 * An operation that matches all conditions given counts; the triggers choose among those that count.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/endian.h"
#include "blk/blk.h"

/* Bits of fault_rules.ops. */
enum fault_op {
	FAULT_READ = 1 << 0,
	FAULT_WRITE = 1 << 1,
	FAULT_FLUSH = 1 << 2,
	FAULT_ZERO = 1 << 3,
	FAULT_DISCARD = 1 << 4,
	FAULT_EXTENTS = 1 << 5,
	FAULT_RESIZE = 1 << 6,
	FAULT_ALL = (1 << 7) - 1,
};

struct fault_rules {
	unsigned ops;       /* these can fail; 0: none */
	uint64_t from, to;  /* that touch [from, to); to 0: no end. Flush and resize always do */
	int error;          /* a positive errno that they fail with */
	uint64_t every;     /* trigger: every n-th; 0: not this one */
	uint64_t countdown; /* trigger: the n-th from now, and with sticky all after it */
	bool sticky;        /* what countdown began never ends */
	unsigned permille;  /* trigger: that many of 1000, at random */
	bool torn; /* a failing write lets a random prefix through, in units of FAULT_SECTOR */
	unsigned delay_ops;                 /* these are delayed before they go on */
	uint64_t delay_us, delay_random_us; /* fixed, and up to so much more at random */
	unsigned hang_ops;                  /* these wait for fault_release() */
};

#define FAULT_SECTOR 512 /* or the block size, if that is larger */

/* The nearest fault layer from blk down; NULL when there is none. */
struct blk *fault_find(struct blk *blk);
/* Replaces the rules of a fault layer; countdown and every start anew. NULL: nothing goes wrong any more. */
void fault_set(struct blk *fault, const struct fault_rules *rules);
/* What hangs goes on. What comes later hangs as the rules say. */
void fault_release(struct blk *fault);
/* How many operations counted since fault_set(), and how many of them failed. */
uint64_t fault_counted(const struct blk *fault);
uint64_t fault_failed(const struct blk *fault);

/* --- the write log ---------------------------------------------------------------------------- */

/*
 * Option `log` names a file that is created or emptied, and gets a record, all big-endian, when an
 * operation that changes the disk is handed to what is below, and another when it has returned. So each
 * prefix of the file is a possible moment of a power cut. What may then be on the disk:
 *
 * - an operation begun is there wholly, partly (any sectors of it), or not at all, unless
 * - it had returned with success before a flush began that has returned with success, or it had FUA and
 *   has returned with success: then it is there wholly, below whatever of later ones is there.
 *
 * Disks that belong together can share a log, which then has the order of all of their changes: option `log-disk`
 * gives each of them a number. The one with 0 is to be opened first, and begins the log. A flush is of one disk.
 *
 * A write that the layer fails without passing it on leaves no record; a torn one leaves its prefix.
 */
#define FAULT_LOG_MAGIC      0x42534c47U /* "BSLG", at the start of each record */
#define FAULT_LOG_DISK_SHIFT 56

enum fault_log_kind {
	FAULT_LOG_WRITE = 1,   /* followed by len bytes of data */
	FAULT_LOG_ZERO = 2,    /* [off, off + len) becomes zeroes */
	FAULT_LOG_DISCARD = 3, /* the same */
	FAULT_LOG_FLUSH = 4,
	FAULT_LOG_RESIZE = 5, /* len is the new size */
	FAULT_LOG_RETURN = 6, /* of the operation with this id; off is 0 or the positive errno */
	FAULT_LOG_OPEN = 7,   /* the first record of a disk: len is its size */
};

struct fault_log_record {
	be32 magic;
	be16 kind;  /* enum fault_log_kind */
	be16 flags; /* enum blk_flags */
	be64 id; /* counts the operations of a disk from 1; above FAULT_LOG_DISK_SHIFT: of which */
	be64 off, len;
};

_Static_assert(sizeof(struct fault_log_record) == 32, "the format is fixed");
