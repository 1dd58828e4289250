/*
 * Bitmaps against an array of bools.
 */
#include <string.h>

#include "base/bitmap.h"
#include "tests/unit/testing.h"

#define BIT_COUNT 300 /* ends within a word */

static uint64_t words[5];
static bool naive[BIT_COUNT];

static void compare(void)
{
	for (size_t bit = 0; bit < BIT_COUNT; bit++)
		require(bitmap_test(words, bit) == naive[bit]);
	require(!(words[4] >> (BIT_COUNT % 64))); /* nothing beyond the end */
}

static void compare_run(size_t first_bit, size_t bit_count)
{
	size_t run = 1;

	while (run < bit_count && naive[first_bit + run] == naive[first_bit])
		run++;
	require(bitmap_run(words, first_bit, bit_count) == run);
}

START_TEST(random_changes_agree_with_an_array)
{
	test_seed();
	for (int i = 0; i < 20000; i++) {
		size_t first_bit = test_random(BIT_COUNT);
		size_t bit_count = test_random((unsigned)(BIT_COUNT - first_bit) + 1);
		bool value = test_random(2);

		(value ? bitmap_set : bitmap_clear)(words, first_bit, bit_count);
		memset(&naive[first_bit], value, bit_count);
		if (i % 16 == 0)
			compare();
		compare_run(first_bit, BIT_COUNT - first_bit);
		if (bit_count)
			compare_run(first_bit, bit_count);
	}
}
END_TEST

START_TEST(words_are_counted)
{
	ck_assert_uint_eq(bitmap_words(0), 0);
	ck_assert_uint_eq(bitmap_words(1), 1);
	ck_assert_uint_eq(bitmap_words(64), 1);
	ck_assert_uint_eq(bitmap_words(65), 2);
	ck_assert_uint_eq(bitmap_words(SIZE_MAX), SIZE_MAX / 64 + 1);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, random_changes_agree_with_an_array);
	tcase_add_test(tcase, words_are_counted);
}

int main(void)
{
	return test_run_suite("bitmap", fill);
}
