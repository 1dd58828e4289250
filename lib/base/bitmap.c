/*
 * Bitmap ranges, a word at a time; see bitmap.h.
 */
#include "base/bitmap.h"

#include "base/util.h"

/* The bits of the word holding first_bit that belong to the range; *count says how many. */
static uint64_t word_mask(size_t first_bit, size_t bit_count, size_t *count)
{
	size_t shift = first_bit % 64;

	*count = MIN(bit_count, 64 - shift);
	return (*count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << *count) - 1) << shift;
}

void bitmap_set(uint64_t *words, size_t first_bit, size_t bit_count)
{
	for (size_t step; bit_count; first_bit += step, bit_count -= step)
		words[first_bit / 64] |= word_mask(first_bit, bit_count, &step);
}

void bitmap_clear(uint64_t *words, size_t first_bit, size_t bit_count)
{
	for (size_t step; bit_count; first_bit += step, bit_count -= step)
		words[first_bit / 64] &= ~word_mask(first_bit, bit_count, &step);
}

size_t bitmap_run(const uint64_t *words, size_t first_bit, size_t bit_count)
{
	uint64_t flip = bitmap_test(words, first_bit) ? ~UINT64_C(0) : 0;
	size_t run = 0, step;

	while (run < bit_count) {
		size_t bit = first_bit + run;
		uint64_t differing = (words[bit / 64] ^ flip) &
				     word_mask(bit, bit_count - run, &step);

		if (differing)
			return run + (size_t)__builtin_ctzll(differing) - bit % 64;
		run += step;
	}
	return bit_count;
}
