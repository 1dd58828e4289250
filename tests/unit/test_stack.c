/*
 * Stacks: what a wrong list of layers is told, word by word, and what opening and closing leaves behind.
 */
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"
#include "co_test.h"

static const struct {
	const char *conf, *text;
} bad[] = {
	{ "{ layer = 'null' }", "test.conf:1: a stack is a list of layers, the top one first: "
				"( { layer = \"file\"; ... } )" },
	{ "()", "test.conf:1: the stack is empty: it needs a layer at least, such as \"file\"" },
	{ "( 'null' )", "test.conf:1: a layer is a group with a name: { layer = \"file\"; ... }" },
	{ "(\n{ size = 5 } )",
		"test.conf:2: a layer is a group with a name: { layer = \"file\"; ... }" },
	{ "( { layer = 5 } )", "test.conf:1: \"layer\" must be the name of a layer in quotes" },
	{ "( { layer = 'fiel' } )", "test.conf:1: unknown layer \"fiel\"; did you mean \"file\"?" },
	{ "( { layer = 'null' },\n { layer = 'null' } )",
		"test.conf:1: \"null\" stores the bytes itself: it must be the last layer of its "
		"stack" },
	{ "( { layer = 'padded' align = 512 } )",
		"test.conf:1: \"padded\" needs a layer below it: the last layer of a stack stores "
		"the bytes, such as \"file\"" },
	{ "( { layer = 'null'\nszie = 5 } )",
		"test.conf:2: null: unknown option \"szie\"; did you mean \"size\"?" },
	{ "( { layer = 'null'\nlayer = 'null' } )",
		"test.conf:2: null: unknown option \"layer\"; known are: size, block-size" },
	{ "( {\nlayer = 'padded' },\n { layer = 'null' } )",
		"test.conf:1: padded: give either \"size\" or \"align\"" },
	{ "( { layer = 'padded'\nalign = '3K' }, { layer = 'null' } )",
		"test.conf:2: padded: \"align\" is 3 KiB, it must be a power of two" },
	{ "( { layer = 'fault'\nops = 'reed' }, { layer = 'null' } )",
		"test.conf:2: fault: \"reed\" is no operation: read, write, flush, zero, discard, "
		"extents, resize, all" },
};

suspends CO_TEST(test_bad_stacks)
{
	struct test_stack stack;
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		ck_assert_int_eq(test_stack_try(&stack, &err, "%s", bad[i].conf), -EINVAL);
		ck_assert_str_eq(err.text, bad[i].text);
		ck_assert_ptr_null(stack.top);
		ck_assert_int_eq(stack_check(stack.conf, &err), -EINVAL);
		ck_assert_str_eq(err.text, bad[i].text);
		ck_assert_int_eq(stack_check(stack.conf, NULL), -EINVAL);
		test_stack_close(&stack);
	}
}

suspends CO_TEST(test_unknown_layer_lists_the_known)
{
	struct conf *conf = conf_build("( { layer = 'zzzzzz' } )");
	struct err err;

	ck_assert_int_eq(stack_check(conf, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.text, "unknown layer \"zzzzzz\"; known are: file, "));
	for (size_t i = 0; blk_layers[i]; i++)
		ck_assert_ptr_nonnull(strstr(err.text, blk_layers[i]->name));
	conf_free(conf);
}

/* What only open() can know: still with place and layer, and everything below is closed again. */
suspends CO_TEST(test_open_errors)
{
	struct test_stack stack;
	struct err err;

	ck_assert_int_lt(test_stack_try(&stack, &err,
				 "(\n{ layer = 'padded'\nsize = 1000 },\n"
				 "{ layer = 'null'; size = 4096; block-size = 512 } )"),
		0);
	ck_assert_str_eq(err.text, "test.conf:3: padded: \"size\" is 1000 B, it must be a multiple "
				   "of the block size, 512 B");
	ck_assert_ptr_null(stack.top);
	test_stack_close(&stack);

	ck_assert_int_eq(test_stack_try(&stack, &err,
				 "( { layer = 'padded' align = 512 },\n"
				 "{ layer = 'file'; path = '/nonexistent/image' } )"),
		-ENOENT);
	ck_assert_ptr_eq(strstr(err.text, "test.conf:2: file: \"/nonexistent/image\""), err.text);
	test_stack_close(&stack);

	/* as the daemon wraps it */
	err_wrap(&err, "export \"%s\"", "db");
	ck_assert_ptr_eq(strstr(err.text, "test.conf:2: export \"db\": file: "), err.text);
}

suspends CO_TEST(test_check_touches_nothing)
{
	struct conf *conf = conf_build(
		"( { layer = 'fault'; log = 'check.log' },"
		"  { layer = 'file'; path = 'check.img'; create = true; size = '1M' } )");
	struct err err;
	struct stat st;

	ck_assert_int_eq(stack_check(conf, &err), 0);
	ck_assert_int_eq(stat("check.log", &st), -1);
	ck_assert_int_eq(stat("check.img", &st), -1);
	conf_free(conf);
}

suspends CO_TEST(test_failed_start_removes_what_it_made)
{
	struct test_stack stack;
	struct stat st;

	test_stack_open(
		&stack, "( { layer = 'file'; path = 'made.img'; create = true; size = '1M' } )");
	ck_assert_int_eq(stat("made.img", &st), 0);
	stack.env.start_failed = true;
	test_stack_close(&stack);
	ck_assert_int_eq(stat("made.img", &st), -1);
}

suspends CO_TEST(test_caps_are_inherited)
{
	struct test_stack stack;
	const struct blk_caps *caps;

	test_stack_open(&stack,
		"( { layer = 'fault' }, { layer = 'null'; size = '1M'; block_size = '8K' } )");
	caps = blk_caps(stack.top);
	ck_assert_uint_eq(caps->size, 1 << 20);
	ck_assert_uint_eq(caps->block_size, 8192);
	ck_assert_uint_eq(caps->preferred_size, 8192);
	ck_assert_uint_eq(caps->max_request, BLK_REQUEST_MAX);
	ck_assert_uint_eq(caps->mem_align, 1);
	ck_assert(caps->fua && caps->zero_fast && caps->discard && !caps->read_only);
	test_stack_close(&stack);
}

/* What a death of the process costs: each layer adds its own to those of its children. */
suspends CO_TEST(test_caps_of_a_dying_process)
{
	static const struct {
		const char *conf;
		bool caches_writes, dies_with_process;
	} stacks[] = {
		{ "( { layer = 'padded'; align = 512 }, { layer = 'file'; path = 'a.img' } )" },
		{ "( { layer = 'padded'; align = 512 }, { layer = 'null' } )", false, true },
		{ "( { layer = 'fault' }, { layer = 'memory'; size = '1M' } )", false, true },
		{ "( { layer = 'fault' }, { layer = 'qcow' },"
		  "  { layer = 'file'; path = 'a.qcow2' } )",
			true, false },
		{ "( { layer = 'qcow' }, { layer = 'file'; path = 'a.qcow2'; read-only = true } "
		  ")" },
		{ "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = 'qcow' },"
		  "    { layer = 'file'; path = 'a.qcow2' } ) }, { layer = 'file'; path = 'a.img' "
		  "} )",
			true, false },
		{ "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = 'memory';"
		  "    size = '1M' } ) }, { layer = 'file'; path = 'a.img' } )",
			false, true },
	};
	struct test_stack stack;

	ck_assert_int_eq(system("qemu-img create -q -f qcow2 a.qcow2 1M"), 0);
	test_stack_open(
		&stack, "( { layer = 'file'; path = 'a.img'; create = true; size = '1M' } )");
	test_stack_close(&stack);
	for (size_t i = 0; i < ARRAY_LEN(stacks); i++) {
		test_stack_open(&stack, "%s", stacks[i].conf);
		ck_assert_msg(blk_caps(stack.top)->caches_writes == stacks[i].caches_writes &&
				      blk_caps(stack.top)->dies_with_process ==
					      stacks[i].dies_with_process,
			"%s", stacks[i].conf);
		test_stack_close(&stack);
	}
	remove("a.qcow2");
	remove("a.img");
}

suspends CO_TEST(test_read_only)
{
	struct conf *conf = conf_build("( { layer = 'padded'; align = 512 }, { layer = 'null' } )");
	struct blk_env env;
	struct blk *top;
	struct err err;
	char byte = 0;

	blk_env_init(&env);
	ck_assert_int_eq(stack_open(conf, &env, true, &top, &err), 0);
	ck_assert(blk_caps(top)->read_only && blk_caps(top->below)->read_only);
	ck_assert_int_eq(blk_write(top, 0, &byte, 1, 0), -EPERM);
	ck_assert_int_eq(blk_read(top, 0, &byte, 1), 0);
	stack_close(top);

	env.read_only = true;
	ck_assert_int_eq(stack_open(conf, &env, false, &top, &err), 0);
	ck_assert(blk_caps(top)->read_only);
	stack_close(top);
	blk_env_fini(&env);
	conf_free(conf);
}

/* Closing waits for the requests under way, and flushes what they wrote. */
struct slow_write {
	struct blk *top;
	int ret;
	bool done;
};

static suspends void slow_write(void *arg)
{
	struct slow_write *write = arg;

	write->ret = blk_write(write->top, 0, "x", 1, 0);
	write->done = true;
}

suspends CO_TEST(test_close_waits)
{
	struct test_stack stack;
	struct slow_write write = { 0 };

	test_stack_open(&stack, "( { layer = 'fault'; delay-us = 2000; delay-ops = 'write' },"
				"  { layer = 'memory'; size = '1M' } )");
	write.top = stack.top;
	co_start(slow_write, &write);
	ck_assert(!write.done);
	test_stack_close(&stack);
	ck_assert(write.done);
	ck_assert_int_eq(write.ret, 0);
}

int main(void)
{
	Suite *suite = suite_create("stack");
	TCase *tcase = tcase_create("stack");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	suite_add_tcase(suite, tcase);
	tcase_add_test(tcase, test_bad_stacks);
	tcase_add_test(tcase, test_unknown_layer_lists_the_known);
	tcase_add_test(tcase, test_open_errors);
	tcase_add_test(tcase, test_check_touches_nothing);
	tcase_add_test(tcase, test_failed_start_removes_what_it_made);
	tcase_add_test(tcase, test_caps_are_inherited);
	tcase_add_test(tcase, test_caps_of_a_dying_process);
	tcase_add_test(tcase, test_read_only);
	tcase_add_test(tcase, test_close_waits);
	return test_suite(suite);
}
