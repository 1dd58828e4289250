/*
 * Bitmaps over caller-owned arrays of 64-bit words.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The words (of 8 bytes) that hold bit_count bits. */
static inline size_t bitmap_words(size_t bit_count)
{
	return bit_count / 64 + !!(bit_count % 64);
}

static inline bool bitmap_test(const uint64_t *words, size_t bit)
{
	return words[bit / 64] >> (bit % 64) & 1;
}

void bitmap_set(uint64_t *words, size_t first_bit, size_t bit_count);
void bitmap_clear(uint64_t *words, size_t first_bit, size_t bit_count);

/* How many bits from first_bit on, at most bit_count (>= 1), have the same value as first_bit. */
size_t bitmap_run(const uint64_t *words, size_t first_bit, size_t bit_count);
