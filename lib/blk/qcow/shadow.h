/*
 * Changing many counts and tables of an image at rest in one step.
 *
 * Everything that changes is written to clusters that are free: L2 tables, L1 tables, the snapshot table, and at
 * the end the refcount blocks with the new counts and the refcount table. After a flush, one write of the
 * header's first sector makes all of it count; what it replaces is free from then on. So at any moment
 * the image is the old or the new one, whole, without even a leak.
 */
#pragma once

#include "blk/qcow/image.h"
#include "blk/qcow/refs.h"

struct shadow {
	struct image *image;       /* as it is on disk */
	struct qcow_header header; /* as it will be; names not owned */
	struct refs refs;          /* counts as they will be */
	struct refs
		pinned;  /* clusters that are in use until the header is written, and freed then */
	uint64_t cursor; /* no free cluster lies below */
	uint64_t old_size; /* of the file */
	bool rebuild;      /* the refcount blocks on disk are not believed: all are written anew */
};

/* Starts with the counts on disk; -EUCLEAN with a text when they cannot be read. */
suspends int shadow_init(struct shadow *shadow, struct image *image, struct err *err);
/* Starts with these counts, which are moved out of *refs. */
void shadow_init_with(struct shadow *shadow, struct image *image, struct refs *refs, bool rebuild);
/* Nothing is put into these clusters; what they count beyond the end of the file is counted on disk. Moved out of *refs. */
int shadow_reserve(struct shadow *shadow, struct refs *refs);
void shadow_fini(struct shadow *shadow);

/* One reference more or less for each cluster of the host range. -ERANGE: below 0, or more than the width holds. */
int shadow_add(struct shadow *shadow, uint64_t host_off, uint64_t len, int delta);

/* One reference less for each, where there is one: for structures that are replaced, damaged ones too. */
int shadow_give_up(struct shadow *shadow, uint64_t host_off, uint64_t len);

/* count contiguous clusters, each with `refcount`, within the file; it grows as needed. */
suspends int shadow_alloc(
	struct shadow *shadow, uint64_t count, uint64_t refcount, uint64_t *host_off);
suspends int shadow_write(struct shadow *shadow, uint64_t host_off, const void *buf, uint64_t len);
/* Writes count words as a big-endian table, with zeroes up to the end of its last cluster. */
suspends int shadow_write_words(
	struct shadow *shadow, uint64_t host_off, const uint64_t *words, uint64_t count);

/*
 * Makes it all durable and gives back (discards) what became free, when `discard`. On an error the image
 * is as it was, unless writing the header itself failed (-EIO with *unknown set: either).
 */
suspends int shadow_commit(struct shadow *shadow, bool discard, bool *unknown);
/* Instead: forgets everything; the file gets its old size back. */
suspends void shadow_abort(struct shadow *shadow);

/* --- trees of tables: shadow_tables.c --------------------------------------------------------- */

/* An L1 table in host byte order; *words is the caller's. -EUCLEAN when it cannot be one. */
suspends int shadow_load_l1(const struct shadow *shadow, uint64_t l1_off, uint32_t entry_count,
	uint64_t **words, struct err *err);

/* delta references more for everything the L1 table points to: L2 tables, and what these point to. */
suspends int shadow_add_tree(struct shadow *shadow, const uint64_t *words, uint32_t entry_count,
	int delta, struct err *err);

/*
 * Makes the copied flags in the tree fit the new counts. An L2 table that changes moves when exactly `users` tables
 * point to it, which all are this one or copies to be made of it: words then has its new place. Others
 * are changed where they are. With `repair`, entries that can only be wrong are put right too.
 */
suspends int shadow_fix_tree(
	struct shadow *shadow, uint64_t *words, uint32_t entry_count, unsigned users, bool repair);

/* Writes the table to new clusters and makes it the active one; the old one's are given up. */
suspends int shadow_replace_l1(struct shadow *shadow, const uint64_t *words, uint32_t entry_count);

/* Likewise for the snapshot table, whose old one had old_len bytes. */
struct qcow_snapshots;
suspends int shadow_replace_snapshots(
	struct shadow *shadow, struct qcow_snapshots *list, uint64_t old_len);
