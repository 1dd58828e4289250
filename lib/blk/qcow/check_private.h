/*
 * A check under way, shared by check.c (the course of it), check_tables.c (what tables point to) and repair.c.
 */
#pragma once

#include "blk/qcow/check.h"
#include "blk/qcow/image.h"
#include "blk/qcow/refs.h"
#include "blk/qcow/snapshot_table.h"

/* An L2 table, and how often L1 tables point to it. */
struct l2_table {
	uint64_t host_off;
	uint32_t users;    /* in all L1 tables */
	uint32_t active;   /* in the active one */
	uint32_t judged;   /* of those, where the copied flags can be judged */
	uint32_t l1_index; /* in the active one, for messages */
};

/* Open addressing; the place of a table without users is free. */
struct l2_tables {
	struct l2_table *items;
	size_t count, capacity;
};

struct check {
	struct image image;
	struct refs refs; /* how often each host cluster is pointed to */
	struct refs
		dangling; /* the same for references beyond the end of the file, which refs has not */
	struct l2_tables tables;
	struct qcow_snapshots snapshots;
	struct qcow_check_result *result;
	struct qcow_check_watch *watch; /* may be NULL */
	uint64_t told;                  /* findings */
	uint64_t l1_bytes;              /* of L1 tables looked at */
	uint64_t unaligned_tables;      /*   L2 tables looked at that are */
	bool rebuild;                   /* the refcount structures themselves are broken */
	bool unreadable;                /* something that points to clusters could not be read */
	bool bitmaps_broken;            /* the bitmap directory is not valid */
	uint64_t done, total;           /* progress */
};

/* Counts `weight` findings, and tells of them once. */
void check_found(struct check *check, enum qcow_finding kind, uint64_t weight, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
void check_progress(struct check *check, uint64_t done);

/* Something points to host bytes, weight times. what and where are for the message. -ENOMEM, -EFBIG. */
int check_reference(
	struct check *check, uint64_t host_off, uint64_t len, uint64_t weight, const char *what);

/* check_tables.c: an L1 table and, later, all L2 tables that were found. */
suspends int check_l1(
	struct check *check, uint64_t l1_off, uint32_t entry_count, bool active, const char *name);
suspends int check_l2_tables(struct check *check);
/* check_bitmaps.c, format "Bitmaps". */
suspends int check_bitmaps(struct check *check);

/* The whole course; leaves everything in `check` for a repair. Ended by check_fini() in any case. */
suspends int check_run(struct check *check, struct blk *file, const struct qcow_header *header,
	struct qcow_check_watch *watch, struct qcow_check_result *result, struct err *err);
void check_fini(struct check *check);
