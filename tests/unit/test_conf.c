/*
 * Configuration trees, option tables, nearest names, and errors that keep their place: what the user
 * reads when a config file is wrong is asserted word by word.
 */
#include <check.h>
#include <errno.h>

#include "base/conf.h"
#include "base/nearest.h"
#include "base/util.h"
#include "conf_build.h"
#include "testing.h"

/* --- errors ----------------------------------------------------------------------------------- */

START_TEST(test_place_stays_in_front)
{
	struct err err;

	err_set(&err, EINVAL, "l1 table is missing");
	err_wrap(&err, "qcow");
	err_place(&err, "a.conf:41");
	ck_assert_int_eq(err_wrap(&err, "export \"%s\"", "db"), -EINVAL);
	ck_assert_str_eq(err.text, "a.conf:41: export \"db\": qcow: l1 table is missing");
	err_place(&err, "a.conf:1");
	ck_assert_str_eq(err.text, "a.conf:41: export \"db\": qcow: l1 table is missing");
	err_set(&err, EIO, "new");
	err_wrap(&err, "old");
	ck_assert_str_eq(err.text, "old: new");
	err_place(NULL, "a.conf:1");
	err_place(&err, NULL);
	ck_assert_str_eq(err.text, "old: new");
}
END_TEST

START_TEST(test_long_texts_lose_their_end)
{
	struct err err;
	char place[2000];

	memset(place, 'p', sizeof(place) - 1);
	place[sizeof(place) - 1] = 0;
	err_set(&err, EIO, "%s", place);
	ck_assert_uint_eq(strlen(err.text), sizeof(err.text) - 1);
	err_place(&err, place);
	err_wrap(&err, "wrapped");
	ck_assert_uint_eq(strlen(err.text), sizeof(err.text) - 1);
	ck_assert_ptr_nonnull(strstr(err.text, "ppp: wrapped: ppp"));
}
END_TEST

/* --- trees ------------------------------------------------------------------------------------ */

static bool texts_equal(const char *a_text, const char *b_text)
{
	struct conf *a = conf_build("%s", a_text), *b = conf_build("%s", b_text);
	bool equal = conf_equal(a, b);

	ck_assert(conf_equal(b, a) == equal);
	conf_free(a);
	conf_free(b);
	return equal;
}

START_TEST(test_equal)
{
	ck_assert(texts_equal("{ a-b = 1; c = 'x' }", "{\n c = 'x'\n a_b = 1 }"));
	ck_assert(texts_equal("( 1, true, ( 'x' ), {} )", "[ 1, true, [ 'x' ], {} ]"));
	ck_assert(!texts_equal("( 1, 2 )", "( 2, 1 )"));
	ck_assert(!texts_equal("( 1 )", "( 1, 2 )"));
	ck_assert(!texts_equal("{ a = 1 }", "{ b = 1 }"));
	ck_assert(!texts_equal("{ a = 1 }", "{ a = '1' }"));
	ck_assert(!texts_equal("{ a = true }", "{ a = false }"));
	ck_assert(!texts_equal("{ a = 'x' }", "{ a = 'y' }"));
}
END_TEST

START_TEST(test_names)
{
	ck_assert(conf_name_equal("lazy-refcounts", "lazy_refcounts"));
	ck_assert(!conf_name_equal("size", "siz"));
	ck_assert(!conf_name_equal("siz", "size"));
	ck_assert(!conf_name_equal("Size", "size"));
}
END_TEST

START_TEST(test_nearest)
{
	static const struct {
		const char *wanted, *best;
	} cases[] = {
		{ "fiel", "file" },
		{ "pth", "path" },
		{ "read_onyl", "read-only" },
		{ "read_only", "read-only" },
		{ "cachee", "cache" },
		{ "size", NULL },
		{ "zzz", NULL },
		{ "", NULL },
		{ "a-name-that-is-much-longer-than-any-option-is", NULL },
	};
	static const char *const names[] = { "file", "path", "read-only", "cache" };

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		struct nearest nearest;

		nearest_init(&nearest, cases[i].wanted);
		for (size_t j = 0; j < ARRAY_LEN(names); j++)
			nearest_offer(&nearest, names[j]);
		ck_assert_pstr_eq(nearest.best, cases[i].best);
	}
}
END_TEST

/* --- options ---------------------------------------------------------------------------------- */

struct fields {
	bool flag;
	int64_t number;
	uint64_t size, block;
	const char *path;
	int mode;
	const struct conf *names, *stack;
};

static const char *const modes[] = { "off", "read-ahead", "on", NULL };

static const struct opt table[] = {
	{ "flag", OPT_BOOL, offsetof(struct fields, flag), "true" },
	{ "number", OPT_INT, offsetof(struct fields, number), "7", .min = -3, .max = 10 },
	{ "size", OPT_SIZE, offsetof(struct fields, size), "64K", .min = 512, .max = 1 << 20 },
	{ "block", OPT_SIZE, offsetof(struct fields, block), .min = 1, .pow2 = true },
	{ "path", OPT_STRING, offsetof(struct fields, path), .required = true },
	{ "mode", OPT_ENUM, offsetof(struct fields, mode), "on", .choices = modes },
	{ "names", OPT_STRINGS, offsetof(struct fields, names) },
	{ "stack", OPT_LIST, offsetof(struct fields, stack) },
	{ 0 },
};

START_TEST(test_defaults)
{
	struct conf *conf = conf_build("{ path = 'x' }");
	struct fields fields;
	struct err err;

	memset(&fields, 0xff, sizeof(fields));
	ck_assert_int_eq(opts_parse(table, conf, &fields, &err), 0);
	ck_assert(fields.flag);
	ck_assert_int_eq(fields.number, 7);
	ck_assert_uint_eq(fields.size, 64 << 10);
	ck_assert_uint_eq(fields.block, 0);
	ck_assert_str_eq(fields.path, "x");
	ck_assert_int_eq(fields.mode, 2);
	ck_assert_ptr_null(fields.names);
	ck_assert_ptr_null(fields.stack);
	ck_assert_uint_eq(conf_strings_count(fields.names), 0);
	conf_free(conf);
}
END_TEST

START_TEST(test_values)
{
	struct conf *conf = conf_build("{ path = 'x' flag = false number = -3 size = 1048576"
				       " block = '2K' mode = 'read_ahead' names = 'one'"
				       " stack = ( { a = 1 } ) }");
	struct fields fields;
	struct err err;

	ck_assert_int_eq(opts_parse(table, conf, &fields, &err), 0);
	ck_assert(!fields.flag);
	ck_assert_int_eq(fields.number, -3);
	ck_assert_uint_eq(fields.size, 1 << 20);
	ck_assert_uint_eq(fields.block, 2048);
	ck_assert_int_eq(fields.mode, 1);
	ck_assert_uint_eq(conf_strings_count(fields.names), 1);
	ck_assert_str_eq(conf_strings_get(fields.names, 0), "one");
	ck_assert_ptr_eq(fields.stack, conf_get(conf, "stack"));
	conf_free(conf);

	conf = conf_build("{ path = 'x' names = ['a', 'b'] }");
	ck_assert_int_eq(opts_parse(table, conf, &fields, &err), 0);
	ck_assert_uint_eq(conf_strings_count(fields.names), 2);
	ck_assert_str_eq(conf_strings_get(fields.names, 1), "b");
	conf_free(conf);
}
END_TEST

static const struct {
	const char *conf, *text;
} bad[] = {
	{ "5", "test.conf:1: must be a group of options: { ... }" },
	{ "\n{ flag = true }", "test.conf:2: option \"path\" is missing" },
	{ "{\n path = 'x'\n pth = 'y' }",
		"test.conf:3: unknown option \"pth\"; did you mean \"path\"?" },
	{ "{ path = 'x'\n zzz = 1 }",
		"test.conf:2: unknown option \"zzz\"; known are: flag, number, size, block, path, "
		"mode, names, stack" },
	{ "{ path = 'x'\n size = 512\n size = 1024 }",
		"test.conf:3: \"size\" is given twice, before at test.conf:2" },
	{ "{ path = 5 }", "test.conf:1: \"path\" must be a text in quotes" },
	{ "{ path = '' }", "test.conf:1: \"path\" is empty" },
	{ "{ path = 'x', flag = 1 }", "test.conf:1: \"flag\" must be true or false" },
	{ "{ path = 'x', number = '1' }", "test.conf:1: \"number\" must be a number" },
	{ "{ path = 'x', number = 11 }", "test.conf:1: \"number\" is 11, allowed are -3 to 10" },
	{ "{ path = 'x', number = -4 }", "test.conf:1: \"number\" is -4, allowed are -3 to 10" },
	{ "{ path = 'x', size = -1 }",
		"test.conf:1: \"size\" must be a size such as 512, \"64K\" or \"10G\"" },
	{ "{ path = 'x', size = true }",
		"test.conf:1: \"size\" must be a size such as 512, \"64K\" or \"10G\"" },
	{ "{ path = 'x', size = 0 }", "test.conf:1: \"size\" is 0 B, allowed are 512 B to 1 MiB" },
	{ "{ path = 'x', size = '2M' }",
		"test.conf:1: \"size\" is 2 MiB, allowed are 512 B to 1 MiB" },
	{ "{ path = 'x', size = '2 apples' }",
		"test.conf:1: \"size\": \"2 apples\" is not a size (try 512, 64K, 10G)" },
	{ "{ path = 'x', block = 0 }", "test.conf:1: \"block\" is 0 B, at least 1 B is needed" },
	{ "{ path = 'x', block = '3K' }",
		"test.conf:1: \"block\" is 3 KiB, it must be a power of two" },
	{ "{ path = 'x', mode = 'offf' }", "test.conf:1: \"mode\" is \"offf\", must be one of "
					   "\"off\", \"read-ahead\", \"on\"" },
	{ "{ path = 'x', mode = 2 }", "test.conf:1: \"mode\" must be a text in quotes" },
	{ "{ path = 'x', names = (\n'a', 1 ) }",
		"test.conf:2: \"names\" must be a list of texts in quotes" },
	{ "{ path = 'x', names = 1 }", "test.conf:1: \"names\" must be a list of texts in quotes" },
	{ "{ path = 'x', stack = { a = 1 } }",
		"test.conf:1: \"stack\" must be a list of groups: ( { ... }, { ... } )" },
	{ "{ path = 'x', stack = ( 1 ) }",
		"test.conf:1: \"stack\" must be a list of groups: ( { ... }, { ... } )" },
};

START_TEST(test_bad_options)
{
	struct conf *conf = conf_build("%s", bad[_i].conf);
	struct fields fields;
	struct err err;

	ck_assert_int_eq(opts_parse(table, conf, &fields, &err), -EINVAL);
	ck_assert_str_eq(err.text, bad[_i].text);
	ck_assert_int_eq(opts_parse(table, conf, &fields, NULL), -EINVAL);
	conf_free(conf);
}
END_TEST

START_TEST(test_no_options)
{
	struct conf *conf = conf_build("{ size = 1 }"), *empty = conf_build("{}");
	struct err err;

	ck_assert_int_eq(opts_parse(NULL, empty, NULL, &err), 0);
	ck_assert_int_eq(opts_parse(NULL, conf, NULL, &err), -EINVAL);
	ck_assert_str_eq(
		err.text, "test.conf:1: unknown option \"size\"; there are no options here");
	conf_free(conf);
	conf_free(empty);
}
END_TEST

START_TEST(test_made_by_hand)
{
	struct conf *conf = conf_new(CONF_GROUP, NULL, NULL);
	struct err err;

	conf_add(conf, conf_new_int("flag", NULL, 1));
	conf_add(conf, conf_new_bool("flag", NULL, true));
	ck_assert_int_eq(opts_parse(table, conf, NULL, &err), -EINVAL);
	ck_assert_str_eq(err.text, "\"flag\" is given twice");
	conf_free(conf);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("conf");
	TCase *tcase = tcase_create("conf");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	suite_add_tcase(suite, tcase);
	tcase_add_test(tcase, test_place_stays_in_front);
	tcase_add_test(tcase, test_long_texts_lose_their_end);
	tcase_add_test(tcase, test_equal);
	tcase_add_test(tcase, test_names);
	tcase_add_test(tcase, test_nearest);
	tcase_add_test(tcase, test_defaults);
	tcase_add_test(tcase, test_values);
	tcase_add_loop_test(tcase, test_bad_options, 0, ARRAY_LEN(bad));
	tcase_add_test(tcase, test_no_options);
	tcase_add_test(tcase, test_made_by_hand);

	SRunner *runner = srunner_create(suite);

	srunner_run_all(runner, CK_ENV);

	int failed = srunner_ntests_failed(runner);

	srunner_free(runner);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
