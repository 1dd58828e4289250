/*
 * Reference counts in memory, and the entries of refcount blocks on disk. See refs.h.
 *
 * The counters are host integers in chunks of REFS_CHUNK; a chunk that does not exist is all zeroes. Nothing here
 * knows how the counts came about: check.c computes them from the tables, shadow.c loads and stores them.
 */
#include "blk/qcow/refs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"

void refs_init(struct refs *refs, uint32_t refcount_order)
{
	memset(refs, 0, sizeof(*refs));
	refs->width = refcount_order <= 3 ? 1 : refcount_order == 4 ? 2 : 4;
	refs->max = refcount_order >= 5 ? UINT32_MAX : (UINT64_C(1) << (1U << refcount_order)) - 1;
}

void refs_fini(struct refs *refs)
{
	for (size_t i = 0; i < refs->chunk_count; i++)
		free(refs->chunks[i]);
	free(take_ptr(refs->chunks));
	refs->chunk_count = 0;
	refs->count = 0;
}

static uint8_t *counter_at(const struct refs *refs, uint64_t index)
{
	uint64_t chunk = index >> REFS_CHUNK_BITS;

	if (chunk >= refs->chunk_count || !refs->chunks[chunk])
		return NULL;
	return refs->chunks[chunk] + (index & (REFS_CHUNK - 1)) * refs->width;
}

uint64_t refs_get(const struct refs *refs, uint64_t index)
{
	const uint8_t *counter = counter_at(refs, index);

	if (!counter)
		return 0;
	switch (refs->width) {
	case 1:
		return *counter;
	case 2:
		return *(const uint16_t *)(const void *)counter;
	default:
		return *(const uint32_t *)(const void *)counter;
	}
}

bool refs_chunk_empty(const struct refs *refs, uint64_t index)
{
	uint64_t chunk = index >> REFS_CHUNK_BITS;

	return chunk >= refs->chunk_count || !refs->chunks[chunk];
}

static int make_chunk(struct refs *refs, uint64_t chunk)
{
	if (chunk >= refs->chunk_count) {
		size_t count = MAX(chunk + 1, refs->chunk_count * 2);
		uint8_t **chunks = realloc(refs->chunks, count * sizeof(*chunks));

		if (!chunks)
			return -ENOMEM;
		memset(chunks + refs->chunk_count, 0,
			(count - refs->chunk_count) * sizeof(*chunks));
		refs->chunks = chunks;
		refs->chunk_count = count;
	}
	refs->chunks[chunk] = calloc(REFS_CHUNK, refs->width);
	return refs->chunks[chunk] ? 0 : -ENOMEM;
}

int refs_set(struct refs *refs, uint64_t index, uint64_t value)
{
	uint8_t *counter = counter_at(refs, index);

	if (value > refs->max)
		return -ERANGE;
	if (index >= REFS_INDEX_MAX)
		return -EFBIG;
	if (!counter) {
		if (!value)
			return 0;
		int ret = make_chunk(refs, index >> REFS_CHUNK_BITS);
		if (ret)
			return ret;
		counter = counter_at(refs, index);
	}
	refs->count = MAX(refs->count, index + 1);
	if (refs->width == 1)
		*counter = (uint8_t)value;
	else if (refs->width == 2)
		*(uint16_t *)(void *)counter = (uint16_t)value;
	else
		*(uint32_t *)(void *)counter = (uint32_t)value;
	return 0;
}

/* --- on disk ---------------------------------------------------------------------------------- */

uint64_t refcount_entry_get(const uint8_t *block, uint32_t refcount_order, uint64_t index)
{
	unsigned bits = 1U << refcount_order;
	uint64_t value = 0;

	if (bits < 8) {
		unsigned shift = (unsigned)(index * bits % 8);

		return block[index * bits / 8] >> shift & ((1U << bits) - 1);
	}
	for (unsigned i = 0; i < bits / 8; i++)
		value = value << 8 | block[index * (bits / 8) + i];
	return value;
}

void refcount_entry_put(uint8_t *block, uint32_t refcount_order, uint64_t index, uint64_t value)
{
	unsigned bits = 1U << refcount_order;

	if (bits < 8) {
		unsigned shift = (unsigned)(index * bits % 8), mask = (1U << bits) - 1;
		uint8_t *byte = block + index * bits / 8;

		*byte = (uint8_t)((*byte & ~(mask << shift)) | (value & mask) << shift);
		return;
	}
	for (unsigned i = bits / 8; i-- > 0; value >>= 8)
		block[index * (bits / 8) + i] = (uint8_t)value;
}
