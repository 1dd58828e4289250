/*
 * Seats: the memory of a journal; see journal.h.
 */
#include "nbd/journal.h"

#include "base/util.h"
#include "nbd/journal_private.h"

/* --- sizes ------------------------------------------------------------------------------------ */

static uint64_t ring_bytes_of(unsigned connections, uint64_t arena_bytes)
{
	uint64_t bytes = MIN(arena_bytes, NBD_JOURNAL_ARENA_MAX_BYTES) / 2 / connections;

	bytes = MAX(bytes, JOURNAL_RING_MIN_BYTES);
	return UINT64_C(1) << (63 - __builtin_clzll(bytes));
}

static uint64_t connection_bytes(uint64_t ring_bytes)
{
	return JOURNAL_RINGS_OFF + 2 * ring_bytes;
}

size_t nbd_journal_size(unsigned connections, uint64_t arena_bytes)
{
	uint64_t ring_bytes = ring_bytes_of(connections, arena_bytes);

	return JOURNAL_PAGE_BYTES + connections * connection_bytes(ring_bytes);
}

/* Room in a ring for a little more than the longest request alone. */
uint32_t nbd_journal_max_request(unsigned connections, uint64_t arena_bytes)
{
	uint64_t ring_bytes = ring_bytes_of(connections, arena_bytes);

	return (uint32_t)MIN(ring_bytes / 4 * 3, (uint64_t)BLK_REQUEST_MAX);
}
