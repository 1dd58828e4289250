/*
 * Reference counts of all host clusters in memory, for check, repair and snapshots.
 *
 * A counter takes 1, 2 or 4 bytes, as many as the image's refcount width asks for; memory is taken in chunks
 * when a counter in it becomes non-zero, so it grows with what the image uses, not with what it claims.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct refs {
	uint64_t count; /* clusters: the highest index that was ever set, plus one */
	uint64_t max;   /* the largest count: what the width holds, at most UINT32_MAX */
	unsigned width; /* bytes per counter */
	uint8_t **chunks;
	size_t chunk_count;
};

#define REFS_CHUNK_BITS 16
#define REFS_CHUNK      (UINT64_C(1) << REFS_CHUNK_BITS) /* counters per chunk */
/* Clusters beyond are refused: the list of chunks alone would take more than 8 MiB. */
#define REFS_INDEX_MAX  (UINT64_C(1) << 36)

void refs_init(struct refs *refs, uint32_t refcount_order);
void refs_fini(struct refs *refs);

/* 0 for what was never set, and beyond the end. */
uint64_t refs_get(const struct refs *refs, uint64_t index);
/* -EFBIG: index too large; -ENOMEM; -ERANGE: value above max (nothing is set). */
int refs_set(struct refs *refs, uint64_t index, uint64_t value);
/* Are all counters of the chunk that holds index zero? */
bool refs_chunk_empty(const struct refs *refs, uint64_t index);

/* Entry `index` of a refcount block as it is on disk (format, "Refcount block entry"). */
uint64_t refcount_entry_get(const uint8_t *block, uint32_t refcount_order, uint64_t index);
void refcount_entry_put(uint8_t *block, uint32_t refcount_order, uint64_t index, uint64_t value);
