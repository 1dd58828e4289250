/*
 * The write-intent log of a mirror: what is copied after a clean end, after a crash, with a damaged log; and the
 * order of log and legs.
 *
 * A crash is made by copying the files as they are, while the mirror runs.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk/mirror/log_format.h"
#include "mirror_rig.h"

#define DISK_BYTES (8 << 20)

static char folder[200];

static void go_to_scratch(void)
{
	const char *scratch = getenv("SCRATCH");

	snprintf(folder, sizeof(folder), "%s/log.XXXXXX", scratch ? scratch : "/tmp");
	ck_assert_ptr_nonnull(mkdtemp(folder));
	ck_assert_int_eq(chdir(folder), 0);
}

static void leave_scratch(void)
{
	static const char *const names[] = { "a", "b", "log", "a2", "b2", "log2", "faults" };

	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		unlink(names[i]);
	ck_assert_int_eq(rmdir(folder), 0);
}

/* Files of the generation ("" or "2"): a crash leaves the second. */
static suspends int try_open(
	struct test_stack *stack, const char *generation, const char *more, struct err *err)
{
	return test_stack_try(stack, err,
		"( { layer = 'mirror'; paused = true; timeout = 3600; intent-log = 'log%s'; %s "
		"secondary ="
		"    ( { layer = 'fault' },"
		"      { layer = 'file'; path = 'b%s'; create = true; size = %d; lock = false } ) "
		"},"
		"  { layer = 'file'; path = 'a%s'; create = true; size = %d; lock = false } )",
		generation, more, generation, DISK_BYTES, generation, DISK_BYTES);
}

static suspends struct mirror *open_mirror(
	struct test_stack *stack, const char *generation, const char *more)
{
	struct err err;

	if (try_open(stack, generation, more, &err))
		ck_abort_msg("%s", err.text);
	return mirror_of(stack);
}

static void copy_file(const char *from, const char *to)
{
	char command[600];

	snprintf(command, sizeof(command), "cp --sparse=always %s %s", from, to);
	ck_assert_int_eq(system(command), 0);
}

static void crash(void)
{
	copy_file("log", "log2");
	copy_file("a", "a2");
	copy_file("b", "b2");
}

/*
 * The secondary of generation 2 has the same identity only if its config is the same: so the copies take
 * the first one's names.
 */
static void reboot(void)
{
	ck_assert_int_eq(rename("log2", "log"), 0);
	ck_assert_int_eq(rename("a2", "a"), 0);
	ck_assert_int_eq(rename("b2", "b"), 0);
}

static suspends void make_synced(struct test_stack *stack)
{
	struct mirror *mirror = open_mirror(stack, "", "overwrite = true;");

	ck_assert_ptr_nonnull(strstr(mirror->note, "the intent log is new"));
	ck_assert_uint_eq(mirror_bytes_dirty(&mirror->blk), DISK_BYTES);
	fill_leg(&mirror->blk, 0, DISK_BYTES, 'x');
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
}

/* And its log cannot be written then. */
static suspends struct mirror *make_synced_without_log(struct test_stack *stack)
{
	go_to_scratch();
	make_synced(stack);

	struct mirror *mirror = mirror_of(stack);

	mirror_settle(mirror);
	mirror->log.blk->disconnected = true;
	return mirror;
}

suspends CO_TEST(test_clean_end)
{
	struct test_stack stack;

	go_to_scratch();
	make_synced(&stack);
	test_stack_close(&stack);

	/* not even `overwrite` is needed: nothing that is different is there to be destroyed */
	struct mirror *mirror = open_mirror(&stack, "", "");

	ck_assert_str_eq(
		mirror->note, "only what the intent log names is copied: 0 of 8388608 bytes");
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_uint_eq(mirror->copied_bytes, 0);
	check_legs_equal(mirror);
	test_stack_close(&stack);
	leave_scratch();
}

suspends CO_TEST(test_crash_copies_the_dirty_regions_alone)
{
	struct fault_rules lost = { .ops = FAULT_WRITE, .every = 1, .error = EIO };
	struct test_stack stack;
	char buf[4096];

	go_to_scratch();
	make_synced(&stack);

	struct mirror *mirror = mirror_of(&stack);

	mirror_settle(mirror);
	memset(buf, 'y', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 3 << 20, buf, sizeof(buf), 0), 0);
	fault_set(fault_find(mirror->secondary), &lost);
	ck_assert_int_eq(blk_write(&mirror->blk, 5 << 20, buf, sizeof(buf), 0), 0);
	crash();
	test_stack_close(&stack);
	reboot();

	mirror = open_mirror(&stack, "", "");
	ck_assert_str_eq(
		mirror->note, "only what the intent log names is copied: 2097152 of 8388608 bytes");
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_uint_eq(mirror->copied_bytes, 2 << 20);
	check_legs_equal(mirror);
	ck_assert(leg_holds(mirror->secondary, 5 << 20, sizeof(buf), 'y'));
	test_stack_close(&stack);
	leave_scratch();
}

/* At whatever moment: after it the log names all that differs. */
suspends CO_TEST(test_crashes_while_guests_write)
{
	struct seed seed = seed_start("crashes");
	struct test_stack stack;
	char buf[4096];

	go_to_scratch();
	make_synced(&stack);
	test_stack_close(&stack);
	for (int i = 0; i < 12; i++) {
		struct mirror *mirror = open_mirror(&stack, "", "");
		struct fault_rules lost = { .ops = FAULT_WRITE | FAULT_FLUSH,
			.countdown = 1 + seed_below(&seed, 20),
			.sticky = true,
			.error = EIO };

		mirror_resume(&mirror->blk);
		if (seed_below(&seed, 2))
			fault_set(fault_find(mirror->secondary), &lost);
		for (int n = (int)seed_below(&seed, 30); n >= 0; n--) {
			memset(buf, (int)seed_below(&seed, 256), sizeof(buf));
			ck_assert_int_eq(
				blk_write(&mirror->blk, seed_below(&seed, DISK_BYTES - sizeof(buf)),
					buf, sizeof(buf), 0),
				0);
			if (!seed_below(&seed, 6))
				mirror_settle(mirror);
		}
		crash();
		test_stack_close(&stack);
		reboot();
		mirror = open_mirror(&stack, "", "");
		mirror_resume(&mirror->blk);
		wait_phase(mirror, MIRROR_IN_SYNC);
		check_legs_equal(mirror);
		test_stack_close(&stack);
	}
	leave_scratch();
}

suspends CO_TEST(test_copy_resumes_where_it_was)
{
	struct test_stack stack;

	go_to_scratch();

	struct mirror *mirror = open_mirror(&stack, "", "overwrite = true; rate = '16M';");

	fill_leg(&mirror->blk, 0, DISK_BYTES, 'x');
	mirror_resume(&mirror->blk);
	while (mirror_bytes_dirty(&mirror->blk) > DISK_BYTES / 2)
		mirror_wait_change(&mirror->blk, NO_DEADLINE);
	mirror_pause(&mirror->blk);
	co_sleep_ns(30 * NS_PER_MS);
	mirror_settle(mirror);
	crash();
	test_stack_close(&stack);
	reboot();
	mirror = open_mirror(&stack, "", "");
	ck_assert_uint_le(mirror_bytes_dirty(&mirror->blk), DISK_BYTES / 2 + (1 << 20));
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	check_legs_equal(mirror);
	test_stack_close(&stack);
	leave_scratch();
}

/* --- logs that must not be believed ----------------------------------------------------------- */

static void damage(const char *path, off_t off, char xor)
{
	int fd = open(path, O_RDWR);
	char byte;

	ck_assert_int_eq(pread(fd, &byte, 1, off), 1);
	byte ^= xor;
	ck_assert_int_eq(pwrite(fd, &byte, 1, off), 1);
	close(fd);
}

suspends CO_TEST(test_damaged_log)
{
	static const struct {
		off_t off;
		const char *text;
	} cases[] = {
		{ 9, "checksum of the header" },
		{ 511, "checksum of the header" },
		{ LOG_SECTOR + 3, "checksum of the map" },
		{ LOG_SECTOR + 100, "checksum of the map" },
	};
	struct test_stack stack;
	struct err err;

	go_to_scratch();
	make_synced(&stack);
	test_stack_close(&stack);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		damage("log", cases[i].off, 0x10);
		ck_assert_int_eq(try_open(&stack, "", "", &err), -EPERM);
		ck_assert_msg(strstr(err.text, cases[i].text) != NULL, "%s", err.text);
		test_stack_close(&stack);

		struct mirror *mirror = open_mirror(&stack, "", "overwrite = true;");

		ck_assert_msg(strstr(mirror->note, cases[i].text) != NULL, "%s", mirror->note);
		ck_assert_uint_eq(mirror_bytes_dirty(&mirror->blk), DISK_BYTES);
		mirror_resume(&mirror->blk);
		wait_phase(mirror, MIRROR_IN_SYNC);
		test_stack_close(&stack);
	}
	/* what is no log at all is left alone */
	damage("log", 0, 0x10);
	ck_assert_int_eq(try_open(&stack, "", "overwrite = true;", &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.text, "is no intent log, but something else"));
	test_stack_close(&stack);
	leave_scratch();
}

/* Of a disk that ends in the midst of a chunk. */
suspends CO_TEST(test_short_last_chunk)
{
	struct test_stack stack;

	go_to_scratch();
	for (int i = 0; i < 2; i++) {
		test_stack_open(&stack,
			"( { layer = 'mirror'; overwrite = true; paused = true; intent-log = 'log';"
			"    secondary = ( { layer = 'file'; path = 'b'; create = true; size = "
			"2097664 } ) },"
			"  { layer = 'file'; path = 'a'; create = true; size = 2097664 } )");

		struct mirror *mirror = mirror_of(&stack);

		ck_assert_uint_eq(mirror_bytes_dirty(&mirror->blk), 2097664);
		if (i) {
			mirror_resume(&mirror->blk);
			wait_phase(mirror, MIRROR_IN_SYNC);
		}
		test_stack_close(&stack);
	}
	leave_scratch();
}

suspends CO_TEST(test_other_disks_log)
{
	struct test_stack stack;
	struct err err;

	go_to_scratch();
	make_synced(&stack);
	test_stack_close(&stack);
	ck_assert_int_eq(truncate("a", DISK_BYTES / 2), 0);
	ck_assert_int_eq(truncate("b", DISK_BYTES / 2), 0);
	ck_assert_int_eq(try_open(&stack, "", "", &err), -EPERM);
	ck_assert_ptr_nonnull(strstr(err.text, "of another size"));
	test_stack_close(&stack);
	leave_scratch();
}

suspends CO_TEST(test_promoted_and_cancelled)
{
	struct test_stack stack;
	struct err err;

	go_to_scratch();
	make_synced(&stack);
	mirror_cancel(stack.top);
	test_stack_close(&stack);
	ck_assert_int_eq(try_open(&stack, "", "", &err), -EPERM);
	ck_assert_ptr_nonnull(strstr(err.text, "the legs went separate ways"));
	test_stack_close(&stack);

	struct mirror *mirror = open_mirror(&stack, "", "overwrite = true;");

	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert_int_eq(promote(stack.top, false, false, &err), 0);
	test_stack_close(&stack);
	/* with the old roles, the new data would be overwritten */
	ck_assert_int_eq(try_open(&stack, "", "overwrite = true;", &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.text, "was promoted"));
	test_stack_close(&stack);
	leave_scratch();
}

/* A mirror that ended by itself notes nothing any more, and the log must not say that little has changed. */
suspends CO_TEST(test_ended_by_a_resize)
{
	struct test_stack stack;
	char buf[4096] = "n";
	struct err err;

	go_to_scratch();
	make_synced(&stack);

	struct mirror *mirror = mirror_of(&stack);

	mirror_settle(mirror);
	ck_assert_int_eq(blk_resize(mirror->secondary, 2 * DISK_BYTES, 0, &err), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DETACHED);
	ck_assert_int_eq(blk_write(&mirror->blk, 1 << 20, buf, sizeof(buf), 0), 0);
	test_stack_close(&stack);
	/* as the refusal to start advises */
	ck_assert_int_eq(truncate("b", DISK_BYTES), 0);
	ck_assert_int_eq(try_open(&stack, "", "", &err), -EPERM);
	ck_assert_ptr_nonnull(strstr(err.text, "the legs went separate ways"));
	test_stack_close(&stack);
	leave_scratch();
}

static enum log_state log_state(void)
{
	int fd = open("log", O_RDONLY | O_CLOEXEC);
	struct log_header header;

	ck_assert_int_eq(read(fd, &header, sizeof(header)), sizeof(header));
	close(fd);
	return (enum log_state)be32_get(header.state);
}

/* The log cannot be told of it at once: it is later, and guests do not wait for it. */
suspends CO_TEST(test_end_that_cannot_be_noted)
{
	struct test_stack stack;
	char buf[4096] = "n";
	struct err err;

	for (int promoted = 0; promoted < 2; promoted++) {
		for (int by_settler = 0; by_settler < 2; by_settler++) {
			enum log_state end = promoted ? LOG_PROMOTED : LOG_ENDED;
			struct mirror *mirror = make_synced_without_log(&stack);

			if (promoted)
				ck_assert_int_eq(promote(stack.top, false, false, &err), 0);
			else
				ck_assert_int_eq(
					blk_resize(mirror->secondary, 2 * DISK_BYTES, 0, &err), 0);
			ck_assert_int_eq(mirror->phase, MIRROR_DETACHED);
			ck_assert_int_eq(blk_write(&mirror->blk, 1 << 20, buf, sizeof(buf), 0), 0);
			ck_assert_int_eq(log_state(), LOG_IN_USE);
			co_mutex_lock(&mirror->log.mutex);
			ck_assert_int_eq(blk_write(&mirror->blk, 2 << 20, buf, sizeof(buf), 0), 0);
			co_mutex_unlock(&mirror->log.mutex);
			mirror->log.blk->disconnected = false;
			if (by_settler) {
				mirror_settle(mirror);
				ck_assert_int_eq(log_state(), end);
			}
			test_stack_close(&stack);
			ck_assert_int_eq(log_state(), end);
			leave_scratch();
		}
	}
}

/* A probe that was under way when the mirror ended must not make the log good again. */
suspends CO_TEST(test_cancelled_while_the_secondary_is_opened)
{
	struct test_stack stack;

	go_to_scratch();
	ck_assert_int_eq(system("qemu-img create -q -f qcow2 a2 8M"), 0);
	test_stack_open(&stack,
		"( { layer = 'mirror'; overwrite = true; start-degraded = true; intent-log = 'log';"
		"    secondary = ( { layer = 'qcow' }, { layer = 'file'; path = 'b' } ) },"
		"  { layer = 'memory'; size = '8M' } )");

	struct mirror *mirror = mirror_of(&stack);

	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	ck_assert_int_eq(rename("a2", "b"), 0);
	mirror->log.broken = true;
	mirror_resume(&mirror->blk);
	co_sleep_ns(0);
	mirror_cancel(&mirror->blk);
	test_stack_close(&stack);
	ck_assert_int_eq(log_state(), LOG_ENDED);
	leave_scratch();
}

/* --- order ------------------------------------------------------------------------------------ */

/* The log's write comes first: when it fails, the secondary is given up before it gets anything. */
suspends CO_TEST(test_log_that_cannot_be_written)
{
	struct test_stack stack;
	char buf[4096];
	struct mirror *mirror = make_synced_without_log(&stack);

	memset(buf, 'n', sizeof(buf));
	ck_assert_int_eq(blk_write(&mirror->blk, 1 << 20, buf, sizeof(buf), 0), 0);
	ck_assert_int_eq(mirror->phase, MIRROR_DEGRADED);
	ck_assert_ptr_nonnull(strstr(mirror->secondary_failure.text, "intent log"));
	ck_assert(leg_holds(mirror->secondary, 1 << 20, sizeof(buf), 'x'));
	ck_assert(leg_holds(mirror->primary, 1 << 20, sizeof(buf), 'n'));
	mirror->log.blk->disconnected = false;
	mirror_resume(&mirror->blk);
	wait_phase(mirror, MIRROR_IN_SYNC);
	ck_assert(!mirror->log.broken);
	check_legs_equal(mirror);
	test_stack_close(&stack);
	leave_scratch();
}

static suspends void write_at_3m(void *arg)
{
	struct mirror *mirror = arg;
	char buf[4096] = "w";

	ck_assert_int_eq(blk_write(&mirror->blk, 3 << 20, buf, sizeof(buf), 0), 0);
}

/* A flush does not cover a write that is under way when it begins: its bit stays. */
suspends CO_TEST(test_settling_during_a_write)
{
	struct fault_rules hangs = { .hang_ops = FAULT_WRITE };
	struct test_stack stack;
	struct co_group group;

	go_to_scratch();
	make_synced(&stack);

	struct mirror *mirror = mirror_of(&stack);

	mirror_settle(mirror);
	ck_assert(!bitmap_test(mirror->log.durable, 3));
	fault_set(fault_find(mirror->secondary), &hangs);
	co_group_init(&group);
	co_group_start(&group, write_at_3m, mirror);
	while (list_empty(&mirror->writes.held) || !bitmap_test(mirror->log.durable, 3))
		co_sleep_ns(0);
	mirror_settle(mirror);
	mirror_settle(mirror);
	ck_assert_uint_eq(group.running, 1);
	ck_assert(bitmap_test(mirror->log.durable, 3));
	fault_release(fault_find(mirror->secondary));
	co_group_wait(&group);
	mirror_settle(mirror);
	ck_assert(!bitmap_test(mirror->log.durable, 3));
	test_stack_close(&stack);
	leave_scratch();
}

/* The primary says once that it lost something, to a flush that no guest waits for. */
suspends CO_TEST(test_settling_that_fails_is_told)
{
	struct fault_rules once = { .ops = FAULT_FLUSH, .countdown = 1, .error = EIO };
	struct test_stack stack;
	struct err err;

	go_to_scratch();
	test_stack_open(&stack, "( { layer = 'mirror'; overwrite = true; intent-log = 'log';"
				"    secondary = ( { layer = 'memory'; size = '4M' } ) },"
				"  { layer = 'fault' }, { layer = 'memory'; size = '4M' } )");

	struct mirror *mirror = mirror_of(&stack);
	struct blk *fault = fault_find(mirror->primary);

	wait_phase(mirror, MIRROR_IN_SYNC);
	for (int keep = 0; keep < 2; keep++) {
		co_mutex_lock(&mirror->settle_mutex); /* not by itself */
		fill_leg(&mirror->blk, 0, 65536, 's');
		fault_set(fault, &once);
		if (keep)
			ck_assert_int_eq(promote(stack.top, false, true, &err), -EIO);
		co_mutex_unlock(&mirror->settle_mutex);
		if (!keep)
			mirror_settle(mirror);
		ck_assert_uint_eq(fault_failed(fault), 1);
		ck_assert_uint_eq(mirror->primary_failure.count, (uint64_t)keep + 1);
		ck_assert_ptr_nonnull(strstr(mirror->primary_failure.text,
			"flush: Input/output error; where it had not been flushed"));
		ck_assert_int_eq(blk_flush(&mirror->blk), -EIO);
		ck_assert_int_eq(blk_flush(&mirror->blk), 0);
	}
	fault_set(fault, &once);
	ck_assert_int_eq(blk_flush(&mirror->blk), -EIO);
	ck_assert_uint_eq(mirror->primary_failure.count, 3);
	ck_assert_int_eq(mirror->phase, MIRROR_IN_SYNC);
	test_stack_close(&stack);
	leave_scratch();
}

int main(void)
{
	Suite *suite = suite_create("mirror_log");
	TCase *tcase = tcase_create("mirror_log");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_clean_end);
	tcase_add_test(tcase, test_crash_copies_the_dirty_regions_alone);
	tcase_add_test(tcase, test_crashes_while_guests_write);
	tcase_add_test(tcase, test_copy_resumes_where_it_was);
	tcase_add_test(tcase, test_damaged_log);
	tcase_add_test(tcase, test_short_last_chunk);
	tcase_add_test(tcase, test_other_disks_log);
	tcase_add_test(tcase, test_promoted_and_cancelled);
	tcase_add_test(tcase, test_ended_by_a_resize);
	tcase_add_test(tcase, test_end_that_cannot_be_noted);
	tcase_add_test(tcase, test_cancelled_while_the_secondary_is_opened);
	tcase_add_test(tcase, test_settling_during_a_write);
	tcase_add_test(tcase, test_settling_that_fails_is_told);
	tcase_add_test(tcase, test_log_that_cannot_be_written);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
