/*
 * The file layer on what only root can make: block devices (loop), full, read-only and peculiar file
 * systems, files of other users. In a mount namespace of its own; what it makes goes away with its processes.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "model.h"

#define LOOP_TRIES 20 /* others look for a free device too */

static void make_file(const char *name, uint64_t size)
{
	CLEANUP(fd) int fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0644);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
}

static int64_t allocated_bytes(const char *name)
{
	struct stat st;

	ck_assert_int_eq(stat(name, &st), 0);
	return (int64_t)st.st_blocks * 512;
}

static bool flush_failed(struct blk *blk)
{
	json_t *status = blk_status(blk);
	bool failed = json_is_true(json_object_get(status, "flush_failed"));

	json_decref(status);
	return failed;
}

/* --- loop devices ----------------------------------------------------------------------------- */

struct loop {
	int fd; /* the device goes away when this, and what the test opened, is closed */
	char name[32];
};

static bool loop_try(struct loop *loop, int file_fd, uint32_t block_size)
{
	CLEANUP(fd) int control_fd = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	struct loop_config config = { .fd = (uint32_t)file_fd,
		.block_size = block_size,
		.info.lo_flags = LO_FLAGS_AUTOCLEAR };
	int number = control_fd < 0 ? -1 : ioctl(control_fd, LOOP_CTL_GET_FREE);

	if (number < 0)
		return false;
	snprintf(loop->name, sizeof(loop->name), "/dev/loop%d", number);
	loop->fd = open(loop->name, O_RDWR | O_CLOEXEC);
	if (loop->fd >= 0 && !ioctl(loop->fd, LOOP_CONFIGURE, &config))
		return true;
	if (loop->fd >= 0)
		close(loop->fd);
	return false;
}

static bool loop_attach(struct loop *loop, const char *file, uint32_t block_size)
{
	CLEANUP(fd) int file_fd = open(file, O_RDWR | O_CLOEXEC);

	for (int i = 0; file_fd >= 0 && i < LOOP_TRIES; i++)
		if (loop_try(loop, file_fd, block_size))
			return true;
	return false;
}

static struct loop make_loop(const char *file, uint64_t size, uint32_t block_size)
{
	struct loop loop;

	make_file(file, size);
	ck_assert(loop_attach(&loop, file, block_size));
	return loop;
}

/* --- block devices ---------------------------------------------------------------------------- */

static suspends void devices_equal_the_model(void)
{
	static const char *const options[] = { "cache=buffered", "cache=direct",
		"cache=direct block-size=4K sync=drive" };
	struct loop loop = make_loop("backing", 1 << 20, 512);

	for (size_t i = 0; i < ARRAY_LEN(options); i++) {
		struct blk *blk = stack("file path=%s %s", loop.name, options[i]);
		struct model model;
		model_init(&model, 1 << 20);
		ck_assert_int_eq(blk_zero(blk, 0, 1 << 20, 0), 0);
		model_run(&model, blk, 150);
		stack_close(blk);
		blk = stack("file path=%s", loop.name);
		model_verify(&model, blk);
		stack_close(blk);
		model_fini(&model);
	}
	close(loop.fd);
}

static suspends void the_device_s_sector_is_the_smallest_block(void)
{
	struct loop loop = make_loop("backing", 1 << 20, 4096);
	struct blk *blk = stack("file path=%s", loop.name);
	char buf[3];

	ck_assert_uint_eq(blk_caps(blk)->block_size, 4096);
	ck_assert_int_eq(blk_write(blk, 4095, "abc", 3, 0), 0);
	ck_assert_int_eq(blk_read(blk, 4095, buf, 3), 0);
	ck_assert_mem_eq(buf, "abc", 3);
	stack_close(blk);
	stack_refused("block-size 512 is too small: the device \"/dev/loop",
		"file path=%s block-size=512", loop.name);
	close(loop.fd);
}

static suspends void discard_reaches_the_device(void)
{
	struct loop loop = make_loop("backing", 8 << 20, 512);
	struct blk *blk = stack("file path=%s", loop.name);
	struct model model;

	ck_assert(blk_caps(blk)->discard);
	model_init(&model, 8 << 20);
	model_write(&model, blk, 0, 8 << 20, 0);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_ge(allocated_bytes("backing"), 8 << 20);
	ck_assert_int_eq(blk_discard(blk, 1 << 20, 6 << 20, 0), 0);
	memset(model.bytes + (1 << 20), 0, 6 << 20);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_le(allocated_bytes("backing"), 3 << 20);
	model_verify(&model, blk);
	stack_close(blk);
	model_fini(&model);
	close(loop.fd);
}

static suspends void a_device_is_resized_first(void)
{
	struct loop loop = make_loop("backing", 1 << 20, 512);
	struct blk *blk = stack("file path=%s", loop.name);
	struct err err;
	char byte = 1;

	ck_assert_int_eq(blk_resize(blk, 2 << 20, 0, &err), -EINVAL);
	ck_assert_msg(strstr(err.text, "is a block device of 1048576 bytes, not 2097152: resize "
				       "the device first, then to exactly its size") != NULL,
		"%s", err.text);
	ck_assert_uint_eq(blk_caps(blk)->size, 1 << 20);
	ck_assert_int_eq(truncate("backing", 2 << 20), 0);
	ck_assert_int_eq(ioctl(loop.fd, LOOP_SET_CAPACITY), 0);
	ck_assert_msg(!blk_resize(blk, 2 << 20, 0, &err), "%s", err.text);
	ck_assert_uint_eq(blk_caps(blk)->size, 2 << 20);
	ck_assert_int_eq(blk_read(blk, (2 << 20) - 1, &byte, 1), 0);
	ck_assert_int_eq(byte, 0);
	stack_close(blk);
	close(loop.fd);
}

static suspends void busy_devices_are_refused(void)
{
	struct loop loop = make_loop("backing", 4 << 20, 512);
	struct blk *blk = stack("file path=%s", loop.name);
	char command[128];

	stack_refused("is in use by another export of this", "file path=%s", loop.name);
	stack_refused(
		"is in use by another export of this", "file path=%s read-only=true", loop.name);
	stack_close(blk);

	CLEANUP(fd) int claim_fd = open(loop.name, O_RDWR | O_EXCL | O_CLOEXEC);
	ck_assert_int_ge(claim_fd, 0);
	stack_refused("opened exclusively", "file path=%s", loop.name);
	close(take_fd(&claim_fd));

	snprintf(command, sizeof(command), "mkfs.ext4 -q -O ^has_journal %s", loop.name);
	ck_assert_int_eq(system(command), 0);
	ck_assert_int_eq(mkdir("mounted here", 0700), 0);
	ck_assert_int_eq(mount(loop.name, "mounted here", "ext4", 0, ""), 0);
	stack_refused("is mounted on /", "file path=%s", loop.name);
	stack_close(stack("file path=%s read-only=true", loop.name));
	ck_assert_int_eq(umount("mounted here"), 0);
	stack_close(stack("file path=%s", loop.name));
	close(loop.fd);
}

/* --- file systems ----------------------------------------------------------------------------- */

static void make_mount(const char *kind, unsigned long flags, const char *options)
{
	ck_assert(!mkdir("fs", 0700) || errno == EEXIST);
	ck_assert_int_eq(mount("none", "fs", kind, flags, options), 0);
}

static suspends void a_full_file_system_fails_the_write_alone(void)
{
	make_mount("tmpfs", 0, "size=1m");
	make_file("fs/disk", 8 << 20);
	struct blk *blk = stack("file path=fs/disk");
	char *buf = calloc(1, 1 << 20);

	memset(buf, 7, 1 << 20);
	ck_assert_int_eq(blk_write(blk, 0, buf, 512 << 10, 0), 0);
	ck_assert_int_eq(blk_write(blk, 2 << 20, buf, 1 << 20, 0), -ENOSPC);
	ck_assert_int_eq(blk_write(blk, 4 << 20, buf, 1 << 20, BLK_FUA), -ENOSPC);
	ck_assert_int_eq(blk_flush(blk), 0);
	memset(buf, 0, 1 << 20);
	ck_assert_int_eq(blk_read(blk, 0, buf, 512 << 10), 0);
	ck_assert(all_bytes_are(buf, 512 << 10, 7));

	json_t *status = blk_status(blk);
	json_t *error = json_object_get(status, "last_error");
	ck_assert_int_eq(json_integer_value(json_object_get(error, "code")), ENOSPC);
	json_decref(status);

	ck_assert_int_eq(blk_discard(blk, 512 << 10, (8 << 20) - (512 << 10), 0), 0);
	ck_assert_int_eq(blk_write(blk, 2 << 20, buf, 256 << 10, BLK_FUA), 0);
	free(buf);
	stack_close(blk);
}

static unsigned notices;

static void note_it(const struct blk *blk, const char *text)
{
	notices++;
	ck_assert_msg(strstr(text, "add it again") != NULL, "%s", text);
}

/* A device whose written data cannot go anywhere: the first to notice is the flush. */
static suspends void a_failed_flush_is_remembered(void)
{
	make_mount("tmpfs", 0, "size=1m");
	struct loop loop = make_loop("fs/backing", 8 << 20, 4096);
	struct blk *blk = stack("file path=%s", loop.name);
	CLEANUP(fd) int other_fd = open(loop.name, O_RDONLY | O_CLOEXEC);
	char *buf = malloc(4 << 20);

	unit_env.notice = note_it;
	memset(buf, 7, 4 << 20);
	ck_assert_int_eq(blk_flush(blk), 0);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4 << 20, 0), 0);
	ck_assert_int_eq(blk_flush(blk), -EIO);
	/* What anybody else hears of it: once. */
	ck_assert_int_eq(fdatasync(other_fd), -1);
	ck_assert_int_eq(fdatasync(other_fd), 0);
	ck_assert_int_eq(blk_flush(blk), -EIO);
	ck_assert(flush_failed(blk));
	ck_assert_uint_eq(notices, 1);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4096, BLK_FUA), -EIO);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4096, 0), 0);
	ck_assert_int_eq(blk_read(blk, 0, buf, 4096), 0);
	stack_close(blk);

	blk = stack("file path=%s", loop.name);
	ck_assert(!flush_failed(blk));
	stack_close(blk);
	free(buf);
	close(loop.fd);
}

struct flusher {
	struct blk *blk;
	int result;
};

static suspends void flush_once(void *arg)
{
	struct flusher *flusher = arg;

	flusher->result = blk_flush(flusher->blk);
}

/* None of the flushes that run when the data is lost may say that it is not. */
static suspends void all_concurrent_flushes_fail(void)
{
	make_mount("tmpfs", 0, "size=1m");
	struct loop loop = make_loop("fs/backing", 8 << 20, 4096);
	struct blk *blk = stack("file path=%s", loop.name);
	struct flusher flushers[16];
	char *buf = calloc(1, 4 << 20);
	struct co_group group;

	memset(buf, 7, 4 << 20);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4 << 20, 0), 0);
	co_group_init(&group);
	for (size_t i = 0; i < ARRAY_LEN(flushers); i++) {
		flushers[i] = (struct flusher){ .blk = blk };
		co_group_start(&group, flush_once, &flushers[i]);
	}
	co_group_wait(&group);
	for (size_t i = 0; i < ARRAY_LEN(flushers); i++)
		ck_assert_int_eq(flushers[i].result, -EIO);
	stack_close(blk);
	free(buf);
	close(loop.fd);
}

/* The failure of a write with FUA does not use up what the flush has to hear. */
static suspends void a_failed_fua_write_leaves_the_flush_its_error(void)
{
	make_mount("tmpfs", 0, "size=1m");
	struct loop loop = make_loop("fs/backing", 8 << 20, 4096);
	struct blk *blk = stack("file path=%s", loop.name);
	char *buf = malloc(4 << 20);

	memset(buf, 7, 4 << 20);
	ck_assert_int_eq(blk_write(blk, 0, buf, 4 << 20, BLK_FUA), -EIO);
	ck_assert_int_eq(blk_flush(blk), -EIO);
	stack_close(blk);
	free(buf);
	close(loop.fd);
}

static suspends void file_systems_say_what_they_cannot(void)
{
	make_mount("ramfs", 0, "");
	make_file("fs/disk", 1 << 20);
	stack_refused(
		"\"fs/disk\" is on a file system without direct I/O: set cache = \"buffered\"",
		"file path=fs/disk cache=direct");
	struct model model;
	struct blk *blk = stack("file path=fs/disk");
	model_init(&model, 1 << 20);
	model_run(&model, blk, 200);
	stack_close(blk);
	model_fini(&model);

	make_mount("tmpfs", 0, "");
	make_file("fs/disk", 1 << 20);
	ck_assert_int_eq(mount("none", "fs", "tmpfs", MS_REMOUNT | MS_RDONLY, ""), 0);
	stack_refused("cannot be opened for writing: Read-only file system (read-only = true opens",
		"file path=fs/disk");
	stack_refused("\"fs/new\" cannot be created: Read-only file system",
		"file path=fs/new create=true size=1M");
	stack_close(stack("file path=fs/disk read-only=true"));

	/* Too small for the file that is to be created: nothing is left behind. */
	make_mount("tmpfs", 0, "nr_inodes=1");
	stack_refused("\"fs/new\" cannot be created: No space left on device",
		"file path=fs/new create=true size=1M");
}

/* --- users ------------------------------------------------------------------------------------ */

static suspends void other_users_files_are_refused(void)
{
	make_file("secret", 1 << 20);
	make_file("readable", 1 << 20);
	ck_assert_int_eq(chmod("secret", 0600), 0);
	ck_assert_int_eq(chmod(".", 0755), 0);
	ck_assert_int_eq(setresuid(65534, 65534, 65534), 0);
	stack_refused("\"readable\" cannot be opened for writing: Permission denied (read-only = "
		      "true opens it for reading alone)",
		"file path=readable");
	stack_refused("\"secret\" cannot be opened: Permission denied",
		"file path=secret read-only=true");
	stack_refused("\"new\" cannot be created: Permission denied",
		"file path=new create=true size=1M");
	stack_close(stack("file path=readable read-only=true"));
}

/* Another user's process holds the lock: who, is not ours to see. */
static suspends void an_unknown_holder_is_another_process(void)
{
	int ready[2];

	make_file("disk", 1 << 20);
	ck_assert_int_eq(chmod("disk", 0666), 0);
	ck_assert_int_eq(chmod(".", 0755), 0);
	ck_assert_int_eq(pipe2(ready, O_CLOEXEC), 0);
	pid_t holder = fork();
	if (!holder) {
		struct flock lock = {
			.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1
		};
		int fd = open("disk", O_RDWR);
		if (!fcntl(fd, F_OFD_SETLK, &lock) && write(ready[1], "x", 1) == 1)
			pause();
		_exit(1);
	}
	char byte;
	ck_assert_int_eq(read(ready[0], &byte, 1), 1);
	ck_assert_int_eq(setresuid(-1, 65534, -1), 0);
	stack_refused("\"disk\" is in use by another process", "file path=disk");
	ck_assert_int_eq(setresuid(-1, 0, -1), 0);
	kill(holder, SIGKILL);
}

static const struct unit_case cases[] = {
	CASE(devices_equal_the_model),
	CASE(the_device_s_sector_is_the_smallest_block),
	CASE(discard_reaches_the_device),
	CASE(a_device_is_resized_first),
	CASE(busy_devices_are_refused),
	CASE(a_full_file_system_fails_the_write_alone),
	CASE(a_failed_flush_is_remembered),
	CASE(all_concurrent_flushes_fail),
	CASE(a_failed_fua_write_leaves_the_flush_its_error),
	CASE(file_systems_say_what_they_cannot),
	CASE(other_users_files_are_refused),
	CASE(an_unknown_holder_is_another_process),
};

/* Whether this machine lets us have loop devices and mounts. */
static bool is_allowed(void)
{
	char name[] = "/tmp/blkstack-loop.XXXXXX";
	CLEANUP(fd) int fd = mkstemp(name);
	struct loop loop;

	if (fd < 0 || ftruncate(fd, 1 << 20) || unshare(CLONE_NEWNS) ||
		mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return false;
	bool allowed = loop_attach(&loop, name, 512);
	if (allowed)
		close(loop.fd);
	unlink(name);
	return allowed;
}

int main(void)
{
	if (!is_allowed()) {
		printf("mounts and loop devices need root, and a machine that has them\n");
		return 77;
	}
	return unit_main("file_device", cases, ARRAY_LEN(cases));
}
