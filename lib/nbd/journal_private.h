/*
 * What a journal is made of; private to lib/nbd. The rules are in journal.c.
 *
 * In the shared memory, page by page:
 *
 *	struct journal_head				what it is, and how large its parts are
 *	per connection:	struct journal_line		where the connection is
 *			struct journal_entry [...]	requests received and not yet done with
 *			ring of what comes in		request headers and payloads, as received
 *			ring of what goes out		data of reads, as sent
 *
 * Integers are the machine's own: a journal never leaves its machine.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "nbd/conn.h"
#include "nbd/journal.h"

#define JOURNAL_MAGIC      UINT64_C(0x626c6b7365617401) /* "blkseat" 1 */
#define JOURNAL_VERSION    1U                           /* of everything in this file */
#define JOURNAL_ENTRIES    2048U                        /* per connection */
#define JOURNAL_PAGE_BYTES 4096U

#define JOURNAL_RING_MIN_BYTES (UINT64_C(2) << 20)

struct journal_head {
	uint64_t magic; /* written last */
	uint32_t version;
	uint32_t connections;
	uint64_t memory_bytes;
	uint64_t ring_bytes; /* of each ring; a power of two */
};
_Static_assert(sizeof(struct journal_head) <= JOURNAL_PAGE_BYTES, "fits into its page");

/* Where everything of one connection lies, relative to its part of the memory. */
#define JOURNAL_ENTRIES_OFF JOURNAL_PAGE_BYTES
#define JOURNAL_RINGS_OFF   (JOURNAL_ENTRIES_OFF + JOURNAL_ENTRIES * 64U)
