/*
 * The small things of lib/base: ranges, rounding, checked sums, big-endian fields, lists, cleanup, names of
 * processes.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/list.h"
#include "base/process.h"
#include "base/util.h"
#include "tests/unit/testing.h"

/* --- ranges and sums -------------------------------------------------------------------------- */

#define SMALL 7

/* All pairs of small ranges, at the start and at the very end of the space. */
START_TEST(overlap_means_a_byte_in_common)
{
	uint64_t base = _i ? UINT64_MAX - SMALL + 1 : 0;

	for (unsigned a = 0; a < SMALL; a++) {
		for (unsigned b = 0; b < SMALL; b++) {
			for (unsigned a_len = 0; a_len <= SMALL - a; a_len++) {
				for (unsigned b_len = 0; b_len <= SMALL - b; b_len++) {
					unsigned a_bits = ((1U << a_len) - 1) << a;
					unsigned b_bits = ((1U << b_len) - 1) << b;

					require(ranges_overlap(base + a, a_len, base + b, b_len) ==
						!!(a_bits & b_bits));
				}
			}
		}
	}
}
END_TEST

START_TEST(a_range_is_within_a_size_without_overflow)
{
	ck_assert(range_ok(0, 0, 0));
	ck_assert(range_ok(4096, 0, 4096));
	ck_assert(range_ok(0, 4096, 4096));
	ck_assert(range_ok(4095, 1, 4096));
	ck_assert(!range_ok(4095, 2, 4096));
	ck_assert(!range_ok(4097, 0, 4096));
	ck_assert(!range_ok(UINT64_MAX, 2, 4096));
	ck_assert(!range_ok(1, UINT64_MAX, 4096));
	ck_assert(range_ok(0, UINT64_MAX, UINT64_MAX));
	ck_assert(!range_ok(1, UINT64_MAX, UINT64_MAX));
}
END_TEST

START_TEST(rounding_and_powers)
{
	ck_assert_uint_eq(round_down(4097, 4096), 4096);
	ck_assert_uint_eq(round_up(4097, 4096), 8192);
	ck_assert_uint_eq(round_up(4096, 4096), 4096);
	ck_assert_uint_eq(round_up(0, 4096), 0);
	ck_assert(is_aligned(8192, 4096) && !is_aligned(8191, 4096));
	ck_assert(is_pow2(1) && is_pow2(UINT64_C(1) << 63) && !is_pow2(0) && !is_pow2(6));
}
END_TEST

START_TEST(sums_and_products_know_their_overflow)
{
	uint64_t result;

	ck_assert(!add_overflows(UINT64_MAX, 0, &result) && result == UINT64_MAX);
	ck_assert(add_overflows(UINT64_MAX, 1, &result));
	ck_assert(!mul_overflows(UINT32_MAX, UINT32_MAX, &result));
	ck_assert(mul_overflows(UINT64_C(1) << 32, UINT64_C(1) << 32, &result));
	ck_assert(!mul_overflows(UINT64_MAX, 0, &result) && result == 0);
}
END_TEST

/* --- big-endian fields ------------------------------------------------------------------------ */

START_TEST(fields_are_big_endian_and_packed)
{
	struct {
		be16 a;
		be64 b;
		be32 c;
	} fields = { be16_make(0x0102), be64_make(UINT64_C(0x030405060708090a)),
		be32_make(0x0b0c0d0e) };
	unsigned char expected[14];

	for (int i = 0; i < 14; i++)
		expected[i] = (unsigned char)(i + 1);
	ck_assert_uint_eq(sizeof(fields), 14);
	ck_assert_mem_eq(&fields, expected, 14);
	ck_assert_uint_eq(be16_get(fields.a), 0x0102);
	ck_assert_uint_eq(be64_get(fields.b), UINT64_C(0x030405060708090a));
	ck_assert_uint_eq(be32_get(fields.c), 0x0b0c0d0e);
}
END_TEST

/* --- lists ------------------------------------------------------------------------------------ */

struct element {
	char letter;
	struct list link;
};

static void assert_order(struct list *head, const char *expected)
{
	char forward[16] = "", backward[16] = "";
	size_t count = strlen(expected);

	list_for_each (link, head)
		forward[strlen(forward)] = list_entry(link, struct element, link)->letter;
	ck_assert_str_eq(forward, expected);
	for (struct list *link = head->prev; link != head; link = link->prev)
		backward[strlen(backward)] = list_entry(link, struct element, link)->letter;
	ck_assert_uint_eq(strlen(backward), count);
	for (size_t i = 0; i < count; i++)
		ck_assert_int_eq(backward[i], expected[count - 1 - i]);
}

START_TEST(lists_keep_their_order)
{
	struct element e[5] = { { 'a' }, { 'b' }, { 'c' }, { 'd' }, { 'e' } };
	struct list head, other;

	list_init(&head);
	list_init(&other);
	ck_assert(list_empty(&head));
	ck_assert_ptr_null(list_pop_front(&head));
	list_push_back(&head, &e[1].link);
	list_push_back(&head, &e[2].link);
	list_push_front(&head, &e[0].link);
	assert_order(&head, "abc");
	list_remove(&e[1].link);
	list_remove(&e[1].link); /* harmless */
	assert_order(&head, "ac");
	list_splice_back(&head, &other);
	assert_order(&head, "ac");
	list_push_back(&other, &e[3].link);
	list_push_back(&other, &e[4].link);
	list_splice_back(&head, &other);
	assert_order(&head, "acde");
	assert_order(&other, "");
	ck_assert_ptr_eq(list_pop_front(&head), &e[0].link);
	list_for_each_safe (link, &head)
		if (list_entry(link, struct element, link)->letter != 'd')
			list_remove(link);
	assert_order(&head, "d");
}
END_TEST

/* --- cleanup ---------------------------------------------------------------------------------- */

static int open_in_scope(bool keep)
{
	CLEANUP(fd) int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	CLEANUP(free) char *text = malloc(16);
	char *taken = take_ptr(text);

	ck_assert_ptr_null(text);
	free(taken);
	return keep ? take_fd(&fd) : fd;
}

START_TEST(cleanup_ends_what_was_not_taken)
{
	int kept = open_in_scope(true);

	ck_assert_int_ge(fcntl(kept, F_GETFD), 0);
	close(kept);
	ck_assert_int_eq(fcntl(open_in_scope(false), F_GETFD), -1);
}
END_TEST

/* --- processes -------------------------------------------------------------------------------- */

START_TEST(a_process_has_the_name_that_it_gave_itself)
{
	char name[PROCESS_NAME_LEN];

	prctl(PR_SET_NAME, "a+b (c) ~");
	ck_assert(process_name(getpid(), name));
	ck_assert_str_eq(name, "a+b (c) ~");
	prctl(PR_SET_NAME, "");
	ck_assert(!process_name(getpid(), name));
	ck_assert(!process_name(-1, name));
	ck_assert_str_eq(name, "");
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_loop_test(tcase, overlap_means_a_byte_in_common, 0, 2);
	tcase_add_test(tcase, a_range_is_within_a_size_without_overflow);
	tcase_add_test(tcase, rounding_and_powers);
	tcase_add_test(tcase, sums_and_products_know_their_overflow);
	tcase_add_test(tcase, fields_are_big_endian_and_packed);
	tcase_add_test(tcase, lists_keep_their_order);
	tcase_add_test(tcase, cleanup_ends_what_was_not_taken);
	tcase_add_test(tcase, a_process_has_the_name_that_it_gave_itself);
}

int main(void)
{
	return test_run_suite("util", fill);
}
