/*
 * File I/O by both engines, on a tmpfs, on a disk file and on one opened with O_DIRECT: content against
 * an oracle in memory, ends of files, errors, and more requests than a ring holds.
 *
 * Where the system forbids io_uring the tests run with "threads" alone and the program counts as skipped.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "rt/io.h"
#include "rt/lock.h"
#include "tests/unit/testing.h"

static const char *const engine_names[] = { "threads", "uring" };
static int engine_count;

/* Where the file lies; each test runs for every place and engine, numbered by _i. */
enum place { MEMORY, BUFFERED, DIRECT, PLACES };

/* A fresh file without a name, so that nothing is left behind. */
static int open_file(enum place place)
{
	const char *folder = place == MEMORY ? "/dev/shm" : ".";
	int fd = open(
		folder, O_TMPFILE | O_RDWR | O_CLOEXEC | (place == DIRECT ? O_DIRECT : 0), 0600);

	ck_assert_msg(fd >= 0, "cannot open a file in %s: %s", folder, strerror(errno));
	return fd;
}

static struct io_test {
	enum place place;
	struct io_file file;
} the;

/* Runs fn with the.file open at the place, on the engine, that number stands for. */
static void run_numbered(int number, co_fn *fn)
{
	struct reactor *reactor = test_reactor(engine_names[number / PLACES]);
	int fd;

	the.place = (enum place)(number % PLACES);
	fd = open_file(the.place);
	io_file_init(&the.file, fd, the.place == DIRECT);
	reactor_run_main(reactor, fn, NULL);
	reactor_free(reactor);
	close(fd);
}

static char *block_alloc(size_t size_bytes)
{
	return aligned_alloc(4096, round_up(size_bytes, 4096));
}

/* --- content ---------------------------------------------------------------------------------- */

#define WORKER_COUNT  16
#define REGION_BLOCKS 16
#define BLOCK_BYTES   4096
#define REGION_BYTES  (REGION_BLOCKS * BLOCK_BYTES)
#define OPS_PER_ONE   60

/* Has a region of the file to itself, and the oracle of it. */
struct worker {
	uint64_t region_off;
	unsigned char *oracle, *buf;
};

static suspends void do_random_op(struct worker *worker)
{
	unsigned first = test_random(REGION_BLOCKS), count = 1 + test_random(REGION_BLOCKS - first);
	size_t off = first * BLOCK_BYTES, len_bytes = count * BLOCK_BYTES;
	unsigned char *expected = worker->oracle + off;

	if (the.place != DIRECT) { /* any byte then */
		off += test_random(BLOCK_BYTES);
		len_bytes = 1 + test_random((unsigned)(REGION_BYTES - off));
		expected = worker->oracle + off;
	}
	switch (test_random(5)) {
	case 0:
		require(!io_fdatasync(&the.file));
		break;
	case 1:
		memset(expected, 0, len_bytes);
		require(!io_fallocate(&the.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			worker->region_off + off, len_bytes));
		break;
	case 2:
	case 3:
		memset(expected, 1 + (int)test_random(255), len_bytes);
		memcpy(worker->buf, expected, len_bytes);
		require(io_write(&the.file, worker->buf, len_bytes, worker->region_off + off,
				test_random(8) ? 0 : RWF_DSYNC) == (ssize_t)len_bytes);
		break;
	case 4:
		memset(worker->buf, 0xee, len_bytes);
		require(io_read(&the.file, worker->buf, len_bytes, worker->region_off + off) ==
			(ssize_t)len_bytes);
		require(!memcmp(worker->buf, expected, len_bytes));
		break;
	}
}

static suspends void work(void *arg)
{
	struct worker *worker = arg;

	worker->oracle = calloc(1, REGION_BYTES);
	worker->buf = (unsigned char *)block_alloc(REGION_BYTES);
	for (int i = 0; i < OPS_PER_ONE; i++)
		do_random_op(worker);
	require(io_read(&the.file, worker->buf, REGION_BYTES, worker->region_off) == REGION_BYTES);
	require(!memcmp(worker->buf, worker->oracle, REGION_BYTES));
	free(worker->oracle);
	free(worker->buf);
}

static suspends void random_ops(void *arg)
{
	struct worker workers[WORKER_COUNT];
	struct co_group group;

	ck_assert(!ftruncate(the.file.fd, WORKER_COUNT * REGION_BYTES));
	co_group_init(&group);
	for (int i = 0; i < WORKER_COUNT; i++) {
		workers[i].region_off = (uint64_t)i * REGION_BYTES;
		co_group_start(&group, work, &workers[i]);
	}
	co_group_wait(&group);
}

START_TEST(random_operations_agree_with_the_oracle)
{
	test_seed();
	run_numbered(_i, random_ops);
}
END_TEST

/* --- the mode --------------------------------------------------------------------------------- */

static suspends void look_at_mode(void *arg)
{
	static const enum io_mode expected[] = { IO_INLINE, IO_BUFFERED, IO_DIRECT };

	ck_assert_int_eq(the.file.mode, expected[the.place]);
}

START_TEST(the_mode_fits_the_file)
{
	run_numbered(_i, look_at_mode);
}
END_TEST

START_TEST(a_device_is_not_taken_for_a_file_in_memory)
{
	struct io_file file;
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC); /* its node lies on a tmpfs */

	io_file_init(&file, fd, false);
	ck_assert_int_ne(file.mode, IO_INLINE);
	close(fd);
}
END_TEST

/* --- ends of files ---------------------------------------------------------------------------- */

static suspends void read_at_the_end(void *arg)
{
	static const struct {
		uint64_t file_bytes;
		uint64_t off;
		size_t len_bytes;
		ssize_t expected;
	} cases[] = {
		{ 0, 0, 4096, 0 },
		{ 10000, 8192, 4096, 1808 },
		{ 10000, 4096, 8192, 5904 },
		{ 10000, 12288, 4096, 0 },
		{ 10000, 1 << 20, 4096, 0 },
		{ 8192 + 512, 8192, 4096, 512 },
		{ 8192, 4096, 4096, 4096 },
		{ 8192, 0, 65536, 8192 },
		{ 8192, 0, 0, 0 },
	};
	char *buf = block_alloc(65536);

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		ck_assert(!ftruncate(the.file.fd, (off_t)cases[i].file_bytes));
		memset(buf, 0xee, 65536);
		ssize_t count = io_read(&the.file, buf, cases[i].len_bytes, cases[i].off);
		ck_assert_int_eq(count, cases[i].expected);
		for (ssize_t j = 0; j < count; j++)
			require(buf[j] == 0);
	}
	free(buf);
}

START_TEST(a_short_count_means_the_end_of_the_file)
{
	run_numbered(_i, read_at_the_end);
}
END_TEST

/* --- errors ----------------------------------------------------------------------------------- */

static suspends void wrong_descriptor(void *arg)
{
	struct io_file write_only = the.file, read_only = the.file, closed = the.file;
	char path[64], *buf = block_alloc(4096);
	int direct = the.place == DIRECT ? O_DIRECT : 0;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", the.file.fd);
	write_only.fd = open(path, O_WRONLY | O_CLOEXEC | direct);
	read_only.fd = open(path, O_RDONLY | O_CLOEXEC | direct);
	closed.fd = 1000000;
	memset(buf, 1, 4096);
	ck_assert_int_eq(io_read(&write_only, buf, 4096, 0), -EBADF);
	ck_assert_int_eq(io_write(&read_only, buf, 4096, 0, 0), -EBADF);
	ck_assert_int_eq(io_fallocate(&read_only, 0, 0, 4096), -EBADF);
	ck_assert_int_eq(io_read(&closed, buf, 4096, 0), -EBADF);
	ck_assert_int_eq(io_write(&closed, buf, 4096, 0, 0), -EBADF);
	ck_assert_int_eq(io_fdatasync(&closed), -EBADF);
	ck_assert_int_eq(io_fallocate(&the.file, 0, 0, 0), -EINVAL);
	ck_assert_int_eq(io_write(&the.file, buf, 4096, 0, 0), 4096); /* nothing sticks */
	close(write_only.fd);
	close(read_only.fd);
	free(buf);
}

START_TEST(errors_come_through)
{
	run_numbered(_i, wrong_descriptor);
}
END_TEST

/* The first part of the write fits: it must not be reported as a short count. */
static suspends void write_beyond_limit(void *arg)
{
	struct rlimit limit = { .rlim_cur = 8192, .rlim_max = RLIM_INFINITY };
	char *buf = block_alloc(16384);

	memset(buf, 1, 16384);
	signal(SIGXFSZ, SIG_IGN);
	getrlimit(RLIMIT_FSIZE, &limit);
	limit.rlim_cur = 8192;
	ck_assert(!setrlimit(RLIMIT_FSIZE, &limit));
	ck_assert_int_eq(io_write(&the.file, buf, 16384, 0, 0), -EFBIG);
	ck_assert_int_eq(io_write(&the.file, buf, 8192, 0, 0), 8192);
	free(buf);
}

START_TEST(a_write_that_fits_in_part_is_an_error)
{
	run_numbered(_i, write_beyond_limit);
}
END_TEST

static suspends void write_to_full_device(void *arg)
{
	struct io_file file;
	char *buf = block_alloc(4096);
	int fd = open("/dev/full", O_RDWR | O_CLOEXEC);

	memset(buf, 1, 4096);
	io_file_init(&file, fd, false);
	ck_assert_int_eq(io_write(&file, buf, 4096, 0, 0), -ENOSPC);
	close(fd);
	free(buf);
}

START_TEST(a_full_device_is_enospc)
{
	run_numbered(_i, write_to_full_device);
}
END_TEST

#define SMALL_TMPFS_BYTES (64 * 1024)

static suspends void fill_small_tmpfs(void *arg)
{
	struct io_file file;
	char *buf = block_alloc(SMALL_TMPFS_BYTES);
	int fd = open("small", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	ck_assert_int_ge(fd, 0);
	memset(buf, 1, SMALL_TMPFS_BYTES);
	io_file_init(&file, fd, false);
	ck_assert_int_eq(file.mode, IO_INLINE);
	ck_assert_int_eq(io_write(&file, buf, SMALL_TMPFS_BYTES, 4096, 0), SMALL_TMPFS_BYTES);
	ck_assert_int_eq(io_write(&file, buf, 4096, 1 << 20, 0), -ENOSPC);
	ck_assert_int_eq(io_fallocate(&file, 0, 0, 4096), -ENOSPC);
	ck_assert_int_eq(io_fallocate(&file, 0, 0, 4 << 20), -ENOSPC); /* by the engine */
	ck_assert_int_eq(io_write(&file, buf, 4096, 4096, 0), 4096);
	close(fd);
	free(buf);
}

START_TEST(a_full_tmpfs_is_enospc)
{
	if (geteuid())
		return;                   /* only root can mount a small one */
	ck_assert(!unshare(CLONE_NEWNS)); /* the mount ends with this process */
	ck_assert(!mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL));
	mkdir("small", 0700);
	ck_assert(!mount("small", "small", "tmpfs", 0, "size=64k"));
	run_numbered(_i, fill_small_tmpfs);
}
END_TEST

/* --- many ------------------------------------------------------------------------------------- */

/* The ring takes 256 at a time, and 1024 in all. */
#ifdef __SANITIZE_THREAD__
#define MANY_COUNT 1200 /* starting many coroutines takes it long */
#else
#define MANY_COUNT 3000
#endif

static unsigned char *many_content;

static suspends void read_one_of_many(void *arg)
{
	size_t block = (size_t)(uintptr_t)arg % 64;
	unsigned char *buf = (unsigned char *)block_alloc(BLOCK_BYTES);

	require(io_read(&the.file, buf, BLOCK_BYTES, block * BLOCK_BYTES) == BLOCK_BYTES);
	require(!memcmp(buf, many_content + block * BLOCK_BYTES, BLOCK_BYTES));
	free(buf);
}

static suspends void read_many(void *arg)
{
	struct co_group group;

	many_content = (unsigned char *)block_alloc(64 * BLOCK_BYTES);
	for (size_t i = 0; i < 64 * BLOCK_BYTES; i++)
		many_content[i] = (unsigned char)(i * 2654435761U >> 11);
	ck_assert_int_eq(
		io_write(&the.file, many_content, 64 * BLOCK_BYTES, 0, 0), 64 * BLOCK_BYTES);
	the.file.nowait = false; /* all of it by the engine */
	co_group_init(&group);
	for (uintptr_t i = 0; i < MANY_COUNT; i++)
		co_group_start(&group, read_one_of_many, (void *)i);
	co_group_wait(&group);
	free(many_content);
}

START_TEST(more_requests_than_the_ring_holds_all_complete)
{
	if (_i % PLACES != MEMORY) /* nothing goes to the engine there */
		run_numbered(_i, read_many);
}
END_TEST

static void fill(TCase *tcase)
{
	int numbers = engine_count * PLACES;

	tcase_add_loop_test(tcase, random_operations_agree_with_the_oracle, 0, numbers);
	tcase_add_loop_test(tcase, the_mode_fits_the_file, 0, numbers);
	tcase_add_test(tcase, a_device_is_not_taken_for_a_file_in_memory);
	tcase_add_loop_test(tcase, a_short_count_means_the_end_of_the_file, 0, numbers);
	tcase_add_loop_test(tcase, errors_come_through, 0, numbers);
	tcase_add_loop_test(tcase, a_write_that_fits_in_part_is_an_error, 0, numbers);
	tcase_add_loop_test(tcase, a_full_device_is_enospc, 0, numbers);
	tcase_add_loop_test(tcase, a_full_tmpfs_is_enospc, 0, numbers);
	tcase_add_loop_test(tcase, more_requests_than_the_ring_holds_all_complete, 0, numbers);
}

int main(void)
{
	struct reactor *reactor;
	struct err err;

	engine_count = reactor_create(&reactor, "uring", &err) ? 1 : 2;
	if (engine_count == 2)
		reactor_free(reactor);
	int status = test_run_suite("io", fill);
	if (status || engine_count == 2)
		return status;
	printf("tested without the engine uring: %s\n", err.text);
	return 77;
}
