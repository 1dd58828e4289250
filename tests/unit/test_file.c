/*
 * The file layer on regular files, on the disk and on tmpfs: every option, every error's text, equality
 * with a model, space given back, what happens to a file that others change.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "model.h"

/* --- files ------------------------------------------------------------------------------------ */

/* A sparse file of this size in the current folder (or on tmpfs); the name, of static storage. */
static const char *make_file_in(const char *folder, uint64_t size)
{
	static char names[8][128];
	static unsigned next;
	char *name = names[next++ % ARRAY_LEN(names)];

	snprintf(name, sizeof(names[0]), "%s/disk.%d.%u", folder, getpid(), next);
	CLEANUP(fd) int fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	return name;
}

static const char *make_file(uint64_t size)
{
	return make_file_in(".", size);
}

static const char *name_of_none(void)
{
	const char *name = make_file(0);

	ck_assert_int_eq(unlink(name), 0);
	return name;
}

static struct stat look(const char *name)
{
	struct stat st;

	ck_assert_msg(!stat(name, &st), "%s is not there", name);
	return st;
}

static bool exists(const char *name)
{
	return !access(name, F_OK);
}

static bool status_true(struct blk *blk, const char *key)
{
	json_t *status = blk_status(blk);
	json_t *value = json_object_get(status, key);

	ck_assert_msg(json_is_boolean(value), "no truth value \"%s\" in the status", key);
	bool is_true = json_is_true(value);
	json_decref(status);
	return is_true;
}

static void status_text_is(struct blk *blk, const char *key, const char *expected)
{
	json_t *status = blk_status(blk);
	const char *text = json_string_value(json_object_get(status, key));

	ck_assert_msg(text && !strcmp(text, expected), "\"%s\" is %s, not %s", key,
		text ? text : "absent", expected);
	json_decref(status);
}

/* --- data ------------------------------------------------------------------------------------- */

static suspends void what_is_written_is_in_the_file(void)
{
	const char *name = make_file(1 << 20);
	struct blk *blk = stack("file path=%s", name);
	char buf[7];

	ck_assert_int_eq(blk_write(blk, 12345, "written", 7, 0), 0);
	ck_assert_int_eq(blk_flush(blk), 0);
	CLEANUP(fd) int fd = open(name, O_RDONLY);
	ck_assert_int_eq(pread(fd, buf, 7, 12345), 7);
	ck_assert_mem_eq(buf, "written", 7);
	stack_close(blk);
	blk = stack("file path=%s read-only=true", name);
	ck_assert_int_eq(blk_read(blk, 12345, buf, 7), 0);
	ck_assert_mem_eq(buf, "written", 7);
	stack_close(blk);
}

/* Random operations, then the same content after a reopening. */
static suspends void compare_with_model(
	const char *folder, const char *options, uint64_t size, unsigned steps)
{
	const char *name = make_file_in(folder, size);
	struct blk *blk = stack("file path=%s %s", name, options);
	struct model model;

	model_init(&model, size);
	model_run(&model, blk, steps);
	stack_close(blk);
	blk = stack("file path=%s %s", name, options);
	model_verify(&model, blk);
	stack_close(blk);
	model_fini(&model);
	unlink(name);
}

static suspends void buffered_equals_the_model(void)
{
	compare_with_model(".", "cache=buffered", 1000003, 500);
}

static suspends void blocks_of_512_equal_the_model(void)
{
	compare_with_model(".", "block-size=512", 1 << 20, 500);
}

static suspends void large_blocks_equal_the_model(void)
{
	compare_with_model(".", "block-size=64K", 1 << 20, 300);
}

/* With buffers, offsets and lengths of any alignment. */
static suspends void direct_equals_the_model(void)
{
	compare_with_model(".", "cache=direct", 1 << 20, 300);
}

static suspends void syncing_the_drive_equals_the_model(void)
{
	compare_with_model(".", "sync=drive", 1 << 20, 100);
}

static suspends void not_syncing_equals_the_model(void)
{
	compare_with_model(".", "sync=none", 1 << 20, 300);
}

static suspends void tmpfs_equals_the_model(void)
{
	compare_with_model("/dev/shm", "cache=buffered", 1000003, 1000);
	compare_with_model("/dev/shm", "block-size=4K", 1 << 20, 500);
}

struct writer {
	struct blk *blk;
	struct co_group *group;
	uint64_t off, len;
	unsigned random;
};

static suspends void write_part(void *arg)
{
	struct writer *writer = arg;
	struct model model = { .random = writer->random, .size = writer->len, .align = 1 };
	uint8_t *bytes = calloc(1, writer->len), *buf = malloc(writer->len);

	for (int i = 0; i < 40; i++) {
		uint64_t off, len;
		model_range(&model, writer->len / 2, &off, &len);
		random_fill(&model.random, bytes + off, len);
		ck_assert_int_eq(blk_write(writer->blk, writer->off + off, bytes + off, len,
					 i % 5 ? 0 : BLK_FUA),
			0);
		if (i % 7 == 0)
			ck_assert_int_eq(blk_flush(writer->blk), 0);
		ck_assert_int_eq(blk_read(writer->blk, writer->off, buf, writer->len), 0);
		ck_assert_int_eq(memcmp(buf, bytes, writer->len), 0);
	}
	free(bytes);
	free(buf);
}

/* Parts that share blocks at their edges, written at the same time. */
static suspends void concurrent_writers_keep_to_their_parts(void)
{
	static const char *const options[] = { "cache=buffered", "cache=direct",
		"block-size=4K sync=drive" };
	enum { WRITERS = 8, PART = 50003 };

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		const char *name = make_file(round_up(WRITERS * PART, 4096));
		struct blk *blk = stack("file path=%s %s", name, options[i]);
		struct writer writers[WRITERS];
		struct co_group group;
		co_group_init(&group);
		for (unsigned n = 0; n < WRITERS; n++) {
			writers[n] = (struct writer){ .blk = blk,
				.off = n * PART,
				.len = PART,
				.random = (unsigned)unit_seed + n };
			co_group_start(&group, write_part, &writers[n]);
		}
		co_group_wait(&group);
		stack_close(blk);
	}
}

static suspends void extents_follow_the_file(void)
{
	const char *name = make_file(1 << 20);
	struct blk *blk = stack("file path=%s", name);
	struct blk_extent list[8];
	struct blk_extents extents;
	char buf[65536] = { 1 };

	ck_assert_int_eq(blk_write(blk, 256 << 10, buf, sizeof(buf), 0), 0);
	blk_extents_init(&extents, list, ARRAY_LEN(list));
	ck_assert_int_eq(blk_extents(blk, 0, 1 << 20, &extents), 0);
	ck_assert_uint_eq(extents.count, 3);
	ck_assert_uint_eq(list[0].len, 256 << 10);
	ck_assert_uint_eq(list[0].flags, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	ck_assert_uint_eq(list[1].len, sizeof(buf));
	ck_assert_uint_eq(list[1].flags, BLK_EXTENT_DATA);
	ck_assert_uint_eq(list[2].len, (1 << 20) - (320 << 10));
	ck_assert_uint_eq(list[2].flags, BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
	stack_close(blk);
}

static suspends void check_discard_frees(const char *folder, const char *options)
{
	const char *name = make_file_in(folder, 8 << 20);
	struct blk *blk = stack("file path=%s %s", name, options);
	struct model model;

	model_init(&model, 8 << 20);
	model_write(&model, blk, 0, 8 << 20, 0);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_ge(look(name).st_blocks, (8 << 20) / 512);
	ck_assert_int_eq(blk_discard(blk, (1 << 20) + 1, 6 << 20, 0), 0);
	memset(model.bytes + (1 << 20) + 1, 0, 6 << 20);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_le(look(name).st_blocks, (3 << 20) / 512);
	ck_assert_int_eq(look(name).st_size, 8 << 20);
	model_verify(&model, blk);
	ck_assert_int_eq(blk_zero(blk, 0, 8 << 20, 0), 0);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_le(look(name).st_blocks, (1 << 20) / 512);
	ck_assert_int_eq(look(name).st_size, 8 << 20);
	stack_close(blk);
	model_fini(&model);
	unlink(name);
}

static suspends void discard_frees_space(void)
{
	check_discard_frees(".", "cache=buffered");
	check_discard_frees(".", "cache=direct");
	check_discard_frees("/dev/shm", "cache=buffered");
}

static suspends void zero_without_holes_stays_allocated(void)
{
	static const char *const folders[] = { ".", "/dev/shm" };

	for (size_t i = 0; i < ARRAY_LEN(folders); i++) {
		const char *name = make_file_in(folders[i], 4 << 20);
		struct blk *blk = stack("file path=%s", name);
		ck_assert_int_eq(blk_zero(blk, 0, 4 << 20, BLK_NO_HOLE), 0);
		ck_assert_int_eq(blk_flush(blk), 0);
		ck_assert_int_ge(look(name).st_blocks, (4 << 20) / 512);
		stack_close(blk);
		unlink(name);
	}
}

/* --- opening ---------------------------------------------------------------------------------- */

static suspends void refuses_what_is_no_disk(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "a-socket" };
	CLEANUP(fd) int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	ck_assert_int_eq(mkdir("a-folder", 0700), 0);
	ck_assert_int_eq(mkfifo("a-fifo", 0600), 0);
	ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	ck_assert_int_eq(symlink("nowhere", "a-link"), 0);
	stack_refused(
		"file: \"a-folder\" is a directory: a regular file or a block device is needed",
		"file path=a-folder");
	stack_refused("\"a-fifo\" is a fifo", "file path=a-fifo");
	stack_refused("\"a-socket\" is a socket", "file path=a-socket");
	stack_refused("\"/dev/null\" is a character device", "file path=/dev/null");
	stack_refused("\"not/there\" does not exist (create = true and a size would create it)",
		"file path=not/there");
	stack_refused("\"not/there\" cannot be created: No such file or directory",
		"file path=not/there create=true size=1M");
	stack_refused("\"a-link\" is a symbolic link that leads to nothing",
		"file path=a-link create=true size=1M");
	stack_refused("\"a-fifo/x\" cannot be opened: Not a directory", "file path=a-fifo/x");
	stack_refused("file: option \"path\" is missing", "file");
}

static suspends void refuses_sizes_that_do_not_fit(void)
{
	const char *empty = make_file(0), *odd = make_file(1000);

	stack_refused("is empty: give it a size first (truncate -s), or remove it and set "
		      "create = true and a size",
		"file path=%s", empty);
	stack_refused("has 1000 bytes, not a multiple of the block size 512: leave block-size out "
		      "and put a \"padded\" layer above it",
		"file path=%s block-size=512", odd);
	stack_refused("lengthen it with \"truncate -s %", "file path=%s cache=direct", odd);
	stack_refused("or set cache = \"buffered\" and put a \"padded\" layer above it",
		"file path=%s cache=direct", odd);
	stack_refused("power of two", "file path=%s block-size=1000", odd);
	stack_refused("block-size 1 is too small: direct I/O on",
		"file path=%s cache=direct block-size=1", odd);

	struct blk *blk = stack("file path=%s", odd);
	ck_assert_uint_eq(blk_caps(blk)->size, 1000);
	ck_assert_uint_eq(blk_caps(blk)->block_size, 1);
	stack_close(blk);
}

static suspends void refuses_options_that_do_not_fit(void)
{
	stack_refused("create = true needs a size", "file path=x create=true");
	stack_refused("size is for create = true", "file path=x size=1M");
	stack_refused("create and read-only exclude each other",
		"file path=x create=true size=1M read-only=true");
	stack_refused("\"size\" is 1000 B, it must be a multiple of the block size",
		"file path=x create=true size=1000 block-size=512");
	stack_refused("must be one of \"buffered\", \"direct\"", "file path=x cache=some");
	stack_refused("must be one of \"none\", \"os\", \"drive\"", "file path=x sync=always");
	ck_assert(!exists("x"));
}

static suspends void unwritable_needs_read_only(void)
{
	/* Not even root may write to a program that runs. */
	stack_refused("cannot be opened for writing: Text file busy (read-only = true opens it for "
		      "reading alone)",
		"file path=/proc/self/exe");
	struct blk *blk = stack("file path=/proc/self/exe read-only=true");
	char buf[4];
	struct err err;

	ck_assert(blk_caps(blk)->read_only);
	ck_assert_int_eq(blk_read(blk, 0, buf, 4), 0);
	ck_assert_mem_eq(buf, "\177ELF", 4);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4, 0), -EPERM);
	ck_assert_int_eq(blk_zero(blk, 0, 4, 0), -EPERM);
	ck_assert_int_eq(blk_discard(blk, 0, 4, 0), -EPERM);
	ck_assert_int_eq(blk_resize(blk, 1 << 20, BLK_FORCE, &err), -EPERM);
	ck_assert_int_eq(blk_flush(blk), 0);
	stack_close(blk);
}

static suspends void who_only_looks_changes_nothing(void)
{
	const char *name = make_file(1 << 20), *none = name_of_none();

	unit_env.read_only = true;
	struct blk *blk = stack("file path=%s", name);
	ck_assert(blk_caps(blk)->read_only);
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), -EPERM);
	stack_close(blk);
	stack_refused("does not exist", "file path=%s create=true size=1M", none);
	ck_assert(!exists(none));
}

/* --- creating --------------------------------------------------------------------------------- */

static suspends void creates_sparse(void)
{
	const char *name = name_of_none();
	struct blk *blk = stack("file path=%s create=true size=1G", name);

	ck_assert_uint_eq(blk_caps(blk)->size, 1 << 30);
	ck_assert_int_eq(look(name).st_size, 1 << 30);
	ck_assert_int_eq(look(name).st_blocks, 0);
	ck_assert_uint_eq(look(name).st_mode & 0777, 0600);
	ck_assert_int_eq(blk_write(blk, 5, "kept", 4, 0), 0);
	stack_close(blk);

	/* What exists is opened as it is, also when the config asks for another size. */
	blk = stack("file path=%s create=true size=2G", name);
	char buf[4];
	ck_assert_uint_eq(blk_caps(blk)->size, 1 << 30);
	ck_assert_int_eq(blk_read(blk, 5, buf, 4), 0);
	ck_assert_mem_eq(buf, "kept", 4);
	stack_close(blk);
}

static suspends void a_failed_start_removes_what_it_created(void)
{
	const char *created = name_of_none(), *found = make_file(1 << 20);
	struct blk *a = stack("file path=%s create=true size=1M", created);
	struct blk *b = stack("file path=%s create=true size=1M", found);

	unit_env.start_failed = true;
	stack_close(a);
	stack_close(b);
	ck_assert(!exists(created));
	ck_assert(exists(found));
	unit_env.start_failed = false;

	/* The same when only this stack fails, further up. */
	stack_refused("padded: \"align\"",
		"padded align=512 | file path=%s create=true size=1M block-size=4K", created);
	stack_refused("padded: \"align\"",
		"padded align=512 | file path=%s create=true size=1M block-size=4K", found);
	ck_assert(!exists(created));
	ck_assert(exists(found));
}

static suspends void a_replaced_file_is_not_removed(void)
{
	const char *created = name_of_none(), *other = make_file(1 << 20);
	struct blk *blk = stack("file path=%s create=true size=1M", created);

	ck_assert_int_eq(rename(other, created), 0);
	unit_env.start_failed = true;
	stack_close(blk);
	ck_assert(exists(created));
}

static suspends void a_failed_creation_leaves_nothing(void)
{
	const char *name = name_of_none();

	/* Direct I/O needs whole blocks: known only once the file is there. */
	stack_refused("not a multiple of", "file path=%s create=true size=1000 cache=direct", name);
	ck_assert(!exists(name));
	/* More than any file system here can have in one file. */
	stack_refused("cannot be created with", "file path=%s create=true size=4095P", name);
	ck_assert(!exists(name));
}

/* --- a file that others change ---------------------------------------------------------------- */

static suspends void a_truncated_file_fails_beyond_its_end(void)
{
	static const char *const options[] = { "cache=buffered", "cache=direct" };

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		const char *name = make_file(1 << 20);
		struct blk *blk = stack("file path=%s %s", name, options[i]);
		struct model model;
		model_init(&model, 1 << 20);
		model_write(&model, blk, 0, 1 << 20, 0);
		ck_assert(!status_true(blk, "truncated"));

		ck_assert_int_eq(truncate(name, 512 << 10), 0);
		ck_assert(status_true(blk, "truncated"));
		char buf[8192];
		ck_assert_int_eq(blk_read(blk, 768 << 10, buf, sizeof(buf)), -EIO);
		ck_assert_int_eq(blk_read(blk, (512 << 10) - 4096, buf, sizeof(buf)), -EIO);
		model_read(&model, blk, 0, 512 << 10);

		/* What is lost is not called zero. */
		struct blk_extent list[8];
		struct blk_extents extents;
		blk_extents_init(&extents, list, ARRAY_LEN(list));
		ck_assert_int_eq(blk_extents(blk, 0, 1 << 20, &extents), 0);
		ck_assert_uint_eq(extents.end, 1 << 20);
		ck_assert_uint_eq(extents.count, 1);
		ck_assert_uint_eq(list[0].flags, BLK_EXTENT_DATA);

		ck_assert_int_eq(blk_write(blk, 768 << 10, buf, sizeof(buf), 0), 0);
		ck_assert_int_eq(blk_read(blk, 768 << 10, buf, sizeof(buf)), 0);
		ck_assert_int_eq(blk_flush(blk), 0);
		ck_assert(status_true(blk, "truncated"));
		stack_close(blk);
		model_fini(&model);
	}
}

/* --- resize ----------------------------------------------------------------------------------- */

static suspends void resizes_like_the_model(void)
{
	const char *name = make_file(1 << 20);
	struct blk *blk = stack("file path=%s", name);
	struct model model;

	model_init(&model, 1 << 20);
	for (int i = 0; i < 20; i++) {
		model_run(&model, blk, 20);
		model_resize(&model, blk, 1 + random_below(&model.random, 2 << 20));
		model_verify(&model, blk);
		ck_assert_uint_eq(look(name).st_size, model.size);
	}
	stack_close(blk);
	model_fini(&model);
}

static suspends void a_resize_that_fails_changes_nothing(void)
{
	const char *name = make_file(1 << 20);
	struct blk *blk = stack("file path=%s", name);
	struct err err;

	ck_assert_int_lt(blk_resize(blk, UINT64_C(1) << 61, 0, &err), 0);
	ck_assert_msg(strstr(err.text, "cannot be resized to 2305843009213693952 bytes") != NULL,
		"%s", err.text);
	ck_assert_uint_eq(blk_caps(blk)->size, 1 << 20);
	ck_assert_int_eq(look(name).st_size, 1 << 20);
	stack_close(blk);
}

static suspends void status_tells(void)
{
	const char *name = make_file(1 << 20);
	struct blk *blk = stack("file path=%s cache=direct sync=drive lock=false", name);

	status_text_is(blk, "path", name);
	status_text_is(blk, "kind", "regular");
	status_text_is(blk, "cache", "direct");
	status_text_is(blk, "io", "direct");
	status_text_is(blk, "sync", "drive");
	ck_assert(!status_true(blk, "lock"));
	ck_assert(!status_true(blk, "truncated"));
	ck_assert(!status_true(blk, "flush_failed"));
	stack_close(blk);
}

static const struct unit_case cases[] = {
	CASE(what_is_written_is_in_the_file),
	CASE(buffered_equals_the_model),
	CASE(blocks_of_512_equal_the_model),
	CASE(large_blocks_equal_the_model),
	CASE(direct_equals_the_model),
	CASE(syncing_the_drive_equals_the_model),
	CASE(not_syncing_equals_the_model),
	CASE(tmpfs_equals_the_model),
	CASE(concurrent_writers_keep_to_their_parts),
	CASE(extents_follow_the_file),
	CASE(discard_frees_space),
	CASE(zero_without_holes_stays_allocated),
	CASE(refuses_what_is_no_disk),
	CASE(refuses_sizes_that_do_not_fit),
	CASE(refuses_options_that_do_not_fit),
	CASE(unwritable_needs_read_only),
	CASE(who_only_looks_changes_nothing),
	CASE(creates_sparse),
	CASE(a_failed_start_removes_what_it_created),
	CASE(a_replaced_file_is_not_removed),
	CASE(a_failed_creation_leaves_nothing),
	CASE(a_truncated_file_fails_beyond_its_end),
	CASE(resizes_like_the_model),
	CASE(a_resize_that_fails_changes_nothing),
	CASE(status_tells),
};

int main(void)
{
	return unit_main("file", cases, ARRAY_LEN(cases));
}
