/*
 * Error texts: set, system errors, wrapping, bounds.
 */
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "tests/unit/testing.h"

START_TEST(an_error_has_code_and_text)
{
	struct err err;

	ck_assert_int_eq(err_set(&err, EINVAL, "table at %d", 8192), -EINVAL);
	ck_assert_int_eq(err.code, EINVAL);
	ck_assert_str_eq(err.text, "table at 8192");
	ck_assert_int_eq(err_sys(&err, ENOENT, "cannot open \"%s\"", "x"), -ENOENT);
	ck_assert_str_eq(err.text, "cannot open \"x\": No such file or directory");
}
END_TEST

START_TEST(callers_wrap_and_the_code_stays)
{
	struct err err;

	err_set(&err, ENOSPC, "no room");
	ck_assert_int_eq(err_wrap(&err, "qcow \"%s\"", "a.img"), -ENOSPC);
	ck_assert_int_eq(err_wrap(&err, "export \"%s\"", "db"), -ENOSPC);
	ck_assert_str_eq(err.text, "export \"db\": qcow \"a.img\": no room");
}
END_TEST

START_TEST(a_text_may_quote_the_error_it_replaces)
{
	struct err err;

	err_set(&err, EIO, "first");
	err_set(&err, EINVAL, "%s, then second", err.text);
	ck_assert_str_eq(err.text, "first, then second");
	err_wrap(&err, "(%s)", err.text);
	ck_assert_str_eq(err.text, "(first, then second): first, then second");
}
END_TEST

START_TEST(a_long_text_loses_its_end)
{
	struct {
		struct err err;
		char canary[8];
	} guarded = { .canary = "canary" };
	char longer[2 * sizeof(guarded.err.text)];

	memset(longer, 'x', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	err_set(&guarded.err, EIO, "%s", longer);
	ck_assert_uint_eq(strlen(guarded.err.text), sizeof(guarded.err.text) - 1);
	err_wrap(&guarded.err, "begin");
	ck_assert(!strncmp(guarded.err.text, "begin: xxx", 10));
	ck_assert_uint_eq(strlen(guarded.err.text), sizeof(guarded.err.text) - 1);
	err_sys(&guarded.err, EIO, "%s", longer);
	ck_assert_uint_eq(strlen(guarded.err.text), sizeof(guarded.err.text) - 1);
	ck_assert_str_eq(guarded.canary, "canary");
}
END_TEST

START_TEST(who_wants_the_code_alone_passes_null)
{
	ck_assert_int_eq(err_set(NULL, EPERM, "x"), -EPERM);
	ck_assert_int_eq(err_sys(NULL, EPERM, "x"), -EPERM);
	ck_assert_int_lt(err_wrap(NULL, "x"), 0);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, an_error_has_code_and_text);
	tcase_add_test(tcase, callers_wrap_and_the_code_stays);
	tcase_add_test(tcase, a_text_may_quote_the_error_it_replaces);
	tcase_add_test(tcase, a_long_text_loses_its_end);
	tcase_add_test(tcase, who_wants_the_code_alone_passes_null);
}

int main(void)
{
	return test_run_suite("err", fill);
}
