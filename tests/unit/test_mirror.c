/*
 * The mirror layer: what it refuses, the copy, and that both legs are the same whatever a guest does.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mirror_rig.h"

static const char *scratch(const char *name)
{
	static char path[4][256];
	static int next;
	const char *folder = getenv("SCRATCH");

	next = (next + 1) % 4;
	snprintf(path[next], sizeof(path[next]), "%s/%s", folder ? folder : "/tmp", name);
	return path[next];
}

__attribute__((format(printf, 2, 3))) static suspends void refused(
	const char *expected, const char *fmt, ...)
{
	struct test_stack stack;
	struct err err;
	va_list ap;

	va_start(ap, fmt);
	stack.conf = conf_vbuild(fmt, ap);
	va_end(ap);
	blk_env_init(&stack.env);
	ck_assert_int_lt(stack_open(stack.conf, &stack.env, false, &stack.top, &err), 0);
	ck_assert_msg(
		strstr(err.text, expected) != NULL, "\"%s\" lacks \"%s\"", err.text, expected);
	test_stack_close(&stack);
}

suspends CO_TEST(test_refused)
{
	const char *a = scratch("a.img"), *b = scratch("b.img");

	ck_assert_int_eq(close(open(a, O_CREAT | O_RDWR, 0600)), 0);
	ck_assert_int_eq(truncate(a, 1 << 20), 0);
	unlink(b);
	ck_assert_int_eq(symlink(a, b), 0);
	refused("say overwrite = true",
		"( { layer = 'mirror'; secondary = ( { layer = 'memory'; size = '1M' } ) },"
		"  { layer = 'memory'; size = '1M' } )");
	refused("lengths differ: the primary has 1048576 bytes",
		"( { layer = 'mirror'; overwrite = true;"
		"    secondary = ( { layer = 'memory'; size = '1025K' } ) },"
		"  { layer = 'memory'; size = '1M' } )");
	refused("block size, 4096, does not fit: the primary's length, 1049088",
		"( { layer = 'mirror'; overwrite = true;"
		"    secondary = ( { layer = 'memory'; size = '1028K'; block-size = 4096 } ) },"
		"  { layer = 'memory'; size = 1049088 } )");
	refused("the secondary is read-only",
		"( { layer = 'mirror'; overwrite = true;"
		"    secondary = ( { layer = 'file'; path = '%s'; read-only = true } ) },"
		"  { layer = 'memory'; size = '1M' } )",
		a);
	refused("the secondary is the primary itself",
		"( { layer = 'mirror'; overwrite = true;"
		"    secondary = ( { layer = 'file'; path = '%s' } ) },"
		"  { layer = 'file'; path = '%s' } )",
		b, a);
	refused("the secondary is the primary itself",
		"( { layer = 'mirror'; overwrite = true;"
		"    secondary = ( { layer = 'memory'; name = 'x'; size = '1M' } ) },"
		"  { layer = 'padded'; align = 4096 }, { layer = 'memory'; name = 'x'; size = '1M' "
		"} )");
	refused("a mirror as the secondary of a mirror",
		"( { layer = 'mirror'; overwrite = true; secondary = ("
		"      { layer = 'mirror'; overwrite = true;"
		"        secondary = ( { layer = 'memory'; size = '1M' } ) },"
		"      { layer = 'memory'; size = '1M' } ) },"
		"  { layer = 'memory'; size = '1M' } )");
	refused("there is a mirror below already",
		"( { layer = 'mirror'; overwrite = true; secondary = ( { layer = 'memory'; size = "
		"'1M' } ) },"
		"  { layer = 'mirror'; overwrite = true; secondary = ( { layer = 'memory'; size = "
		"'1M' } ) },"
		"  { layer = 'memory'; size = '1M' } )");
	refused("secondary: ",
		"( { layer = 'mirror'; overwrite = true; secondary = ( { layer = 'file'; path = "
		"'%s.gone' } ) },"
		"  { layer = 'memory'; size = '1M' } )",
		a);
}

/* The primary is as it was, and the secondary like it, at every size. */
suspends CO_TEST(test_copy_of_sizes)
{
	static const uint64_t sizes[] = { 512, 4096, 1 << 20, (2 << 20) + 512, UINT64_C(3) << 30 };
	struct test_stack stack;

	for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
		uint64_t size = sizes[i];

		test_stack_open(&stack,
			"( { layer = 'mirror'; overwrite = true; paused = true;"
			"    secondary = ( { layer = 'memory'; size = %llu } ) },"
			"  { layer = 'memory'; size = %llu } )",
			(unsigned long long)size, (unsigned long long)size);

		struct mirror *mirror = mirror_of(&stack);
		uint64_t some = MIN(size, UINT64_C(300000));

		/* data at the start and the end; old data of the secondary where the primary has none */
		fill_leg(mirror->primary, 0, some / 2, 'p');
		fill_leg(mirror->primary, size - some / 3, some / 3, 'q');
		fill_leg(mirror->secondary, size / 2, some / 4, 's');
		ck_assert_uint_eq(mirror_bytes_dirty(&mirror->blk), size);
		mirror_resume(&mirror->blk);
		wait_phase(mirror, MIRROR_IN_SYNC);
		ck_assert(mirror_in_sync(&mirror->blk));
		ck_assert_uint_eq(mirror->completed_count, 1);
		if (size < 1 << 30)
			check_legs_equal(mirror);
		else
			ck_assert_uint_lt(mirror->copied_bytes, 8 << 20);
		ck_assert(leg_holds(mirror->secondary, 0, some / 2, 'p'));
		ck_assert(leg_holds(mirror->secondary, size - some / 3, some / 3, 'q'));
		test_stack_close(&stack);
	}
}

/* --- guests while it copies ------------------------------------------------------------------- */

struct guests {
	struct mirror *mirror;
	struct seed seed;
	unsigned steps;
	uint64_t align;
	bool aligned_to_frontier;
};

/* Mostly around the place that the copy has come to. */
static void choose_range(struct guests *guests, uint64_t *off, uint64_t *len)
{
	uint64_t size = guests->mirror->blk.caps.size, align = guests->align;
	uint64_t longest = seed_below(&guests->seed, 8) ? 3 * 4096 : 300000;
	uint64_t around = guests->mirror->cursor;

	*len = MIN(size, round_up(1 + seed_below(&guests->seed, longest), align));
	around = around > *len ? around - seed_below(&guests->seed, *len + 1) : 0;
	if (!seed_below(&guests->seed, 3))
		around = seed_below(&guests->seed, size);
	*off = round_down(MIN(around, size - *len), align);
}

static suspends void guest_step(struct guests *guests)
{
	struct blk *blk = &guests->mirror->blk;
	uint64_t off, len;
	char *buf;

	choose_range(guests, &off, &len);
	switch (seed_below(&guests->seed, 8)) {
	case 0:
		ck_assert_int_eq(blk_zero(blk, off, len, 0), 0);
		break;
	case 1:
		ck_assert_int_eq(blk_discard(blk, off, len, 0), 0);
		break;
	case 2:
		ck_assert_int_eq(blk_flush(blk), 0);
		break;
	default:
		buf = malloc(len);
		seed_fill(&guests->seed, buf, len);
		ck_assert_int_eq(blk_write(blk, off, buf, len, 0), 0);
		free(buf);
	}
}

static suspends void guest_run(void *arg)
{
	struct guests *guests = arg;

	while (guests->steps) {
		guests->steps--;
		guest_step(guests);
		if (!seed_below(&guests->seed, 4))
			co_sleep_ns(seed_below(&guests->seed, 200) * 1000);
	}
}

__attribute__((format(printf, 3, 4))) static suspends void run_guests(
	const char *name, uint64_t align, const char *fmt, ...)
{
	struct test_stack stack;
	struct co_group group;
	struct err err;
	va_list ap;

	va_start(ap, fmt);
	stack.conf = conf_vbuild(fmt, ap);
	va_end(ap);
	blk_env_init(&stack.env);
	if (stack_open(stack.conf, &stack.env, false, &stack.top, &err))
		ck_abort_msg("%s", err.text);

	struct mirror *mirror = mirror_of(&stack);
	struct guests guests = { mirror, seed_start(name), 600, align, true };

	fill_leg(mirror->primary, 0, mirror->blk.caps.size / 2, 'p');
	fill_leg(mirror->secondary, mirror->blk.caps.size / 3, mirror->blk.caps.size / 3, 's');
	mirror_resume(&mirror->blk);
	co_group_init(&group);
	for (int i = 0; i < 6; i++)
		co_group_start(&group, guest_run, &guests);
	co_group_wait(&group);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_uint_eq(mirror->completed_count, 1);
	check_legs_equal(mirror);
	/* and from now on */
	guests.steps = 200;
	for (int i = 0; i < 4; i++)
		co_group_start(&group, guest_run, &guests);
	co_group_wait(&group);
	ck_assert(mirror_in_sync(&mirror->blk));
	check_legs_equal(mirror);
	test_stack_close(&stack);
}

suspends CO_TEST(test_guests_around_the_frontier)
{
	run_guests("frontier", 1,
		"( { layer = 'mirror'; overwrite = true; paused = true; chunk = 4096; secondary ="
		"    ( { layer = 'fault'; delay-us = 100; delay-random-us = 300 },"
		"      { layer = 'memory'; size = 2097664 } ) },"
		"  { layer = 'fault'; delay-random-us = 100 }, { layer = 'memory'; size = 2097664 "
		"} )");
}

suspends CO_TEST(test_unequal_block_sizes)
{
	static const int sizes[][2] = { { 1, 4096 }, { 4096, 1 }, { 512, 65536 }, { 65536, 512 } };

	for (size_t i = 0; i < ARRAY_LEN(sizes); i++)
		run_guests("blocks", 1,
			"( { layer = 'mirror'; overwrite = true; paused = true; secondary ="
			"    ( { layer = 'fault'; delay-random-us = 200 },"
			"      { layer = 'memory'; size = '1M'; block-size = %d } ) },"
			"  { layer = 'memory'; size = '1M'; block-size = %d } )",
			sizes[i][1], sizes[i][0]);
}

suspends CO_TEST(test_fast_zero_refused_changes_nothing)
{
	struct test_stack stack;

	test_stack_open(&stack, "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = "
				"'memory'; size = '1M' } ) },"
				"  { layer = 'fault'; }, { layer = 'memory'; size = '1M' } )");

	struct mirror *mirror = mirror_of(&stack);
	struct fault_rules rules = { .ops = FAULT_ZERO, .every = 1, .error = EOPNOTSUPP };

	fill_leg(&mirror->blk, 0, 1 << 20, 'x');
	wait_phase(mirror, MIRROR_IN_SYNC);
	fault_set(fault_find(mirror->primary), &rules);
	ck_assert_int_eq(blk_zero(&mirror->blk, 4096, 4096, BLK_FAST_ZERO), -EOPNOTSUPP);
	ck_assert(mirror_in_sync(&mirror->blk));
	check_legs_equal(mirror);
	ck_assert(leg_holds(mirror->secondary, 4096, 4096, 'x'));
	fault_set(fault_find(mirror->primary), NULL);
	ck_assert_int_eq(blk_zero(&mirror->blk, 4096, 4096, BLK_FAST_ZERO), 0);
	check_legs_equal(mirror);
	ck_assert(leg_holds(mirror->secondary, 4096, 4096, 0));
	test_stack_close(&stack);
}

suspends CO_TEST(test_pause_and_rate)
{
	struct test_stack stack;

	test_stack_open(&stack,
		"( { layer = 'mirror'; overwrite = true; paused = true; rate = '4M';"
		"    secondary = ( { layer = 'memory'; size = '4M' } ) },"
		"  { layer = 'memory'; size = '4M' } )");

	struct mirror *mirror = mirror_of(&stack);

	fill_leg(mirror->primary, 0, 4 << 20, 'p');
	co_sleep_ns(20 * NS_PER_MS);
	ck_assert_uint_eq(mirror->copied_bytes, 0);
	mirror_resume(&mirror->blk);
	co_sleep_ns(100 * NS_PER_MS);
	ck_assert_uint_gt(mirror->copied_bytes, 0);
	ck_assert_uint_lt(mirror->copied_bytes, 4 << 20);
	mirror_pause(&mirror->blk);
	co_sleep_ns(10 * NS_PER_MS); /* steps under way end */

	uint64_t copied = mirror->copied_bytes;

	co_sleep_ns(50 * NS_PER_MS);
	ck_assert_uint_eq(mirror->copied_bytes, copied);
	mirror_set_rate(&mirror->blk, 0);
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	test_stack_close(&stack);
}

suspends CO_TEST(test_read_only_leaves_the_secondary_alone)
{
	struct test_stack stack = {
		.conf = conf_build(
			"( { layer = 'mirror'; overwrite = true;"
			"    secondary = ( { layer = 'file'; path = '/nonexistent/x' } ) },"
			"  { layer = 'memory'; size = '1M' } )")
	};
	char buf[512];
	struct err err;

	blk_env_init(&stack.env);
	ck_assert_int_eq(stack_open(stack.conf, &stack.env, true, &stack.top, &err), 0);
	ck_assert_int_eq(blk_read(stack.top, 0, buf, sizeof(buf)), 0);
	ck_assert_int_eq(blk_write(stack.top, 0, buf, sizeof(buf), 0), -EPERM);
	test_stack_close(&stack);
}

/* Somebody else resizes a leg: the mirror ends, and nobody is harmed. */
suspends CO_TEST(test_leg_resized_by_somebody_else)
{
	struct conf *conf = conf_build("( { layer = 'memory'; name = 'x'; } )");
	struct test_stack stack;
	struct blk *other;
	struct err err;
	char buf[512] = "";

	test_stack_open(&stack, "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = "
				"'memory'; size = '1M' } ) },"
				"  { layer = 'memory'; name = 'x'; size = '1M' } )");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_int_eq(stack_open(conf, &stack.env, false, &other, &err), 0);
	ck_assert_int_eq(blk_resize(other, 3 << 20, 0, &err), 0);
	while (mirror->phase != MIRROR_DETACHED)
		mirror_wait_change(&mirror->blk, reactor_now_ns() + NS_PER_MS);
	ck_assert_str_eq(mirror->note, "ended: the primary was resized to 3145728 bytes");
	ck_assert_uint_eq(blk_caps(stack.top)->size, 3 << 20);
	ck_assert_int_eq(blk_write(stack.top, 2 << 20, buf, sizeof(buf), 0), 0);
	ck_assert_int_eq(blk_flush(stack.top), 0);
	stack_close(other);
	test_stack_close(&stack);
	conf_free(conf);
}

/* mkfs does that. */
suspends CO_TEST(test_whole_disk_at_once)
{
	uint64_t size = UINT64_C(3) << 30;
	struct test_stack stack;

	test_stack_open(&stack, "( { layer = 'mirror'; overwrite = true; secondary = ( { layer = "
				"'memory'; size = '3G' } ) },"
				"  { layer = 'memory'; size = '3G' } )");

	struct mirror *mirror = mirror_of(&stack);

	wait_phase(mirror, MIRROR_IN_SYNC);
	fill_leg(&mirror->blk, size - 100000, 100000, 'z');
	fill_leg(&mirror->blk, 1000, 100000, 'z');
	ck_assert_int_eq(blk_discard(&mirror->blk, 1001, size - 1001, 0), 0);
	ck_assert(leg_holds(mirror->secondary, 1000, 1, 'z'));
	ck_assert(leg_holds(mirror->secondary, 1001, 200000, 0));
	ck_assert(leg_holds(mirror->secondary, size - 200000, 200000, 0));
	ck_assert(leg_holds(mirror->primary, size - 200000, 200000, 0));
	ck_assert(mirror_in_sync(&mirror->blk));
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("mirror");
	TCase *tcase = tcase_create("mirror");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_refused);
	tcase_add_test(tcase, test_copy_of_sizes);
	tcase_add_test(tcase, test_guests_around_the_frontier);
	tcase_add_test(tcase, test_unequal_block_sizes);
	tcase_add_test(tcase, test_fast_zero_refused_changes_nothing);
	tcase_add_test(tcase, test_pause_and_rate);
	tcase_add_test(tcase, test_leg_resized_by_somebody_else);
	tcase_add_test(tcase, test_whole_disk_at_once);
	tcase_add_test(tcase, test_read_only_leaves_the_secondary_alone);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
