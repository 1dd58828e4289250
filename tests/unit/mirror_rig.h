/*
 * What the tests of the mirror layer share: a mirror in a test stack, waiting for it, comparing its legs.
 */
#pragma once

#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/mirror/mirror_private.h"
#include "co_test.h"
#include "seed.h"

static inline struct mirror *mirror_of(struct test_stack *stack)
{
	struct blk *blk = mirror_find(stack->top);

	ck_assert_ptr_nonnull(blk);
	return to_mirror(blk);
}

/* Fails the test when it takes absurdly long. */
#define WAIT_MAX_NS (300 * NS_PER_SEC)

static inline suspends void wait_phase(struct mirror *mirror, enum mirror_phase phase)
{
	uint64_t deadline_ns = reactor_now_ns() + WAIT_MAX_NS;

	while (mirror->phase != phase || (phase == MIRROR_IN_SYNC && mirror->dirty_count)) {
		if (reactor_now_ns() >= deadline_ns)
			ck_abort_msg("phase %d instead of %d, %llu chunks dirty, %s", mirror->phase,
				phase, (unsigned long long)mirror->dirty_count,
				mirror->secondary_failure.text);
		mirror_wait_change(&mirror->blk, reactor_now_ns() + 10 * NS_PER_MS);
	}
}

/* Reads both legs, past the mirror; the first byte that differs aborts. */
static inline suspends void check_legs_equal(struct mirror *mirror)
{
	uint64_t size = mirror->blk.caps.size, part_max = MIN(size, UINT64_C(1) << 20);
	char *a = malloc(part_max), *b = malloc(part_max);

	for (uint64_t off = 0; off < size; off += part_max) {
		uint64_t len = MIN(part_max, size - off), i = 0;

		ck_assert_int_eq(blk_read(mirror->primary, off, a, len), 0);
		ck_assert_int_eq(blk_read(mirror->secondary, off, b, len), 0);
		if (!memcmp(a, b, len))
			continue;
		while (a[i] == b[i])
			i++;
		ck_abort_msg("byte %llu is %02x on the primary and %02x on the secondary",
			(unsigned long long)(off + i), (uint8_t)a[i], (uint8_t)b[i]);
	}
	free(a);
	free(b);
}

/* The range, read past the mirror, holds nothing but byte. */
static inline suspends bool leg_holds(struct blk *leg, uint64_t off, size_t len, char byte)
{
	char *buf = malloc(len);
	bool same = true;

	ck_assert_int_eq(blk_read(leg, off, buf, len), 0);
	for (size_t i = 0; i < len; i++)
		same &= buf[i] == byte;
	free(buf);
	return same;
}

static inline suspends void fill_leg(struct blk *leg, uint64_t off, uint64_t len, char byte)
{
	char buf[65536];

	memset(buf, byte, sizeof(buf));
	for (uint64_t done = 0; done < len; done += sizeof(buf))
		ck_assert_int_eq(
			blk_write(leg, off + done, buf, MIN(len - done, sizeof(buf)), 0), 0);
}

static inline suspends int promote(struct blk *blk, bool force, bool keep, struct err *err)
{
	struct mirror_promotion promotion = { .force = force, .keep = keep };

	return mirror_promote(blk, &promotion, err);
}

/* A string of the mirror's status; what it points to belongs to `status`. */
static inline json_t *status_of(struct mirror *mirror)
{
	return blk_status(&mirror->blk);
}
