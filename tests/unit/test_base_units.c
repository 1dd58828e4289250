/*
 * Sizes as text: what is understood, what is refused and why, and how they are shown.
 */
#include <errno.h>
#include <string.h>

#include "base/units.h"
#include "base/util.h"
#include "tests/unit/testing.h"

#define KIB UINT64_C(1024)
#define MIB (KIB * 1024)
#define GIB (MIB * 1024)
#define TIB (GIB * 1024)
#define EIB (TIB * 1024 * 1024)

static const struct {
	const char *text;
	uint64_t size_bytes;
} understood[] = {
	{ "0", 0 },
	{ "512", 512 },
	{ "512B", 512 },
	{ "4K", 4 * KIB },
	{ "4k", 4 * KIB },
	{ "4KiB", 4 * KIB },
	{ "4kB", 4 * KIB },
	{ "10G", 10 * GIB },
	{ "10GiB", 10 * GIB },
	{ "1.5T", TIB + TIB / 2 },
	{ "0.5K", 512 },
	{ "1.25M", MIB + MIB / 4 },
	{ "15E", 15 * EIB },
	{ "18446744073709551615", UINT64_MAX },
	{ "007", 7 },
	{ "1.0", 1 },
};

START_TEST(sizes_are_understood)
{
	struct err err;
	uint64_t size_bytes;

	ck_assert_msg(!units_parse_size(understood[_i].text, &size_bytes, &err), "\"%s\": %s",
		understood[_i].text, err.text);
	ck_assert_uint_eq(size_bytes, understood[_i].size_bytes);
}
END_TEST

static const struct {
	const char *text;
	int code;
} refused[] = {
	{ "", EINVAL },
	{ " 1", EINVAL },
	{ "1 ", EINVAL },
	{ "-1", EINVAL },
	{ "+1", EINVAL },
	{ "K", EINVAL },
	{ "1X", EINVAL },
	{ "1KK", EINVAL },
	{ "1KiBs", EINVAL },
	{ "1.", EINVAL },
	{ "1.K", EINVAL },
	{ ".5K", EINVAL },
	{ "1.2.3K", EINVAL },
	{ "0x10", EINVAL },
	{ "1e3", EINVAL },
	{ "1.5", EINVAL },
	{ "0.3K", EINVAL },
	{ "1.5B", EINVAL },
	{ "16E", ERANGE },
	{ "18446744073709551616", ERANGE },
	{ "99999999999999999999999", ERANGE },
	{ "1.00000000000000000000000000000000001K", EINVAL },
};

START_TEST(what_is_no_size_is_refused_and_quoted)
{
	struct err err;
	uint64_t size_bytes = 4711;

	ck_assert_int_eq(units_parse_size(refused[_i].text, &size_bytes, &err), -refused[_i].code);
	ck_assert_int_eq(err.code, refused[_i].code);
	ck_assert_ptr_nonnull(strstr(err.text, refused[_i].text));
	ck_assert_uint_eq(size_bytes, 4711);
}
END_TEST

static const struct {
	uint64_t size_bytes;
	const char *text;
} shown[] = {
	{ 0, "0 B" },
	{ 512, "512 B" },
	{ 1023, "1023 B" },
	{ 4 * KIB, "4 KiB" },
	{ 1000001, "1000001 B" },
	{ 10 * GIB, "10 GiB" },
	{ GIB + GIB / 2, "1.50 GiB" },
	{ UINT64_MAX, "16.00 EiB" },
};

START_TEST(sizes_are_shown)
{
	char text[UNITS_SIZE_TEXT_LEN];

	ck_assert_str_eq(units_format_size(shown[_i].size_bytes, text), shown[_i].text);
}
END_TEST

/* What is shown without a point is exact, and reads back as the same size. */
START_TEST(whole_sizes_read_back)
{
	test_seed();
	for (int i = 0; i < 1000; i++) {
		char text[UNITS_SIZE_TEXT_LEN], *space;
		uint64_t size_bytes = (uint64_t)(1 + test_random(1023)) << (10 * test_random(6)),
			 back;
		struct err err;

		units_format_size(size_bytes, text);
		require(!strchr(text, '.'));
		space = strchr(text, ' ');
		memmove(space, space + 1, strlen(space));
		require(!units_parse_size(text, &back, &err) && back == size_bytes);
	}
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_loop_test(tcase, sizes_are_understood, 0, ARRAY_LEN(understood));
	tcase_add_loop_test(tcase, what_is_no_size_is_refused_and_quoted, 0, ARRAY_LEN(refused));
	tcase_add_loop_test(tcase, sizes_are_shown, 0, ARRAY_LEN(shown));
	tcase_add_test(tcase, whole_sizes_read_back);
}

int main(void)
{
	return test_run_suite("units", fill);
}
