/*
 * Who may open an image that somebody has open: ourselves, and QEMU's programs, both ways round.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "model.h"

#define QEMU_START_TRIES 20000 /* of 10 ms */

static const char *const image = "image.raw";

static void make_image(void)
{
	CLEANUP(fd) int fd = open(image, O_RDWR | O_CREAT, 0600);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, 1 << 20), 0);
}

/* --- ourselves -------------------------------------------------------------------------------- */

static suspends void writers_exclude_each_other(void)
{
	make_image();
	struct blk *blk = stack("file path=%s", image);

	stack_refused("\"image.raw\" is in use by another export of this ", "file path=%s", image);
	stack_refused("is in use by another export", "file path=%s read-only=true", image);
	stack_refused("is in use by another export", "file path=./%s create=true size=1M", image);
	stack_close(blk);
	blk = stack("file path=%s", image);
	stack_close(blk);
}

static suspends void links_do_not_help(void)
{
	make_image();
	ck_assert_int_eq(symlink(image, "soft"), 0);
	ck_assert_int_eq(link(image, "hard"), 0);
	struct blk *blk = stack("file path=soft");

	stack_refused("\"hard\" is in use by another export", "file path=hard");
	stack_close(blk);
}

static suspends void readers_share(void)
{
	make_image();
	struct blk *a = stack("file path=%s read-only=true", image);
	struct blk *b = stack("file path=%s read-only=true", image);

	stack_refused("is in use by another export", "file path=%s", image);
	stack_close(a);
	stack_refused("is in use by another export", "file path=%s", image);
	stack_close(b);
	stack_close(stack("file path=%s", image));
}

static suspends void lock_off_is_on_your_own(void)
{
	make_image();
	struct blk *a = stack("file path=%s", image);
	struct blk *b = stack("file path=%s lock=false", image);

	stack_close(b);
	/* The lock is a's still. */
	stack_refused("is in use by another export", "file path=%s", image);
	stack_close(a);
}

/* Somebody else, at a moment that is hard to meet: when a file is there, and not locked yet. */
static struct {
	bool armed;
	int fd, result;
} intruder = { .fd = -1 };

/* In the place of the C library's. */
int fsync(int fd)
{
	struct flock lock = { .l_type = F_RDLCK, .l_start = 100, .l_len = 200 };

	if (!intruder.armed)
		return (int)syscall(SYS_fsync, fd);
	intruder.armed = false;
	CLEANUP(fd) int found = open(image, O_RDWR | O_CLOEXEC);
	require(found >= 0 && !fcntl(found, F_OFD_SETLK, &lock));
	require(dup3(found, intruder.fd, O_CLOEXEC) == intruder.fd);
	errno = EIO;
	return intruder.result;
}

static suspends void what_others_found_is_not_removed(void)
{
	for (int result = -1; result <= 0; result++) {
		intruder.armed = true;
		intruder.fd = open("/dev/null", O_RDONLY | O_CLOEXEC); /* no leak of the layer's */
		intruder.result = result;
		stack_refused(result ? "cannot be created with 1048576 bytes" : "is in use by",
			"file path=%s create=true size=1M", image);
		ck_assert_int_eq(access(image, F_OK), 0);

		/* Nor later, when it could be had, but was in other hands meanwhile. */
		close(intruder.fd);
		stack_close(stack("file path=%s create=true size=1M", image));
		ck_assert_int_eq(unlink(image), 0);
	}
}

/* --- QEMU ------------------------------------------------------------------------------------- */

/* Runs a command; its output is in text, and its success the result. */
static bool runs(const char *command, char *text, size_t text_size)
{
	FILE *output = popen(command, "re");

	ck_assert_ptr_nonnull(output);
	size_t len = fread(text, 1, text_size - 1, output);
	text[len] = '\0';
	return pclose(output) == 0;
}

static void qemu_refused(const char *command)
{
	char text[4096];

	ck_assert_msg(!runs(command, text, sizeof(text)), "%s: allowed", command);
	ck_assert_msg(strstr(text, "lock") != NULL, "%s: %s", command, text);
}

static void qemu_allowed(const char *command)
{
	char text[4096];

	ck_assert_msg(runs(command, text, sizeof(text)), "%s: %s", command, text);
}

static suspends void qemu_refuses_what_we_write(void)
{
	make_image();
	struct blk *blk = stack("file path=%s", image);

	qemu_refused("qemu-img convert -f raw -O raw image.raw copy.raw 2>&1");
	qemu_refused("qemu-img resize -f raw image.raw 2M 2>&1");
	qemu_refused("qemu-nbd -r -f raw -t -k \"$PWD/nbd\" image.raw 2>&1");
	qemu_refused("qemu-io -f raw -c 'write 0 512' image.raw 2>&1");
	qemu_allowed("qemu-img convert -U -f raw -O raw image.raw copy.raw 2>&1");
	stack_close(blk);
	qemu_allowed("qemu-img convert -f raw -O raw image.raw copy.raw 2>&1");
}

static suspends void qemu_refuses_the_qcow2_that_we_write(void)
{
	qemu_allowed("qemu-img create -q -f qcow2 image.qcow2 1M 2>&1");
	struct blk *blk = stack("file path=image.qcow2");

	qemu_refused("qemu-img info image.qcow2 2>&1");
	qemu_refused("qemu-img check image.qcow2 2>&1");
	qemu_refused("qemu-io -r -c 'read 0 512' image.qcow2 2>&1");
	qemu_allowed("qemu-img info -U image.qcow2 2>&1");
	stack_close(blk);
}

static suspends void qemu_reads_what_we_read(void)
{
	make_image();
	struct blk *blk = stack("file path=%s read-only=true", image);

	qemu_allowed("qemu-img convert -f raw -O raw image.raw copy.raw 2>&1");
	qemu_refused("qemu-io -f raw -c 'write 0 512' image.raw 2>&1");
	stack_close(blk);
}

struct qemu {
	pid_t pid;
	int input; /* closing it ends qemu-io */
};

/* Whether anybody has a lock on this byte of the image. */
static bool is_locked(off_t byte)
{
	CLEANUP(fd) int fd = open(image, O_RDONLY);
	struct flock lock = {
		.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1
	};

	ck_assert_int_eq(fcntl(fd, F_OFD_GETLK, &lock), 0);
	return lock.l_type != F_UNLCK;
}

/* Starts qemu-io, with -r or without, and waits until it has its locks. */
static suspends struct qemu qemu_start(const char *option, off_t last_locked_byte)
{
	struct qemu qemu;
	int pipe_fds[2];
	char command[256];

	ck_assert_int_eq(pipe2(pipe_fds, O_CLOEXEC), 0);
	snprintf(command, sizeof(command), "exec qemu-io %s -f raw image.raw", option);
	qemu.pid = fork();
	if (!qemu.pid) {
		dup2(pipe_fds[0], STDIN_FILENO);
		execl("/bin/sh", "sh", "-c", command, (char *)NULL);
		_exit(127);
	}
	close(pipe_fds[0]);
	qemu.input = pipe_fds[1];
	for (int i = 0; i < QEMU_START_TRIES && !is_locked(last_locked_byte); i++)
		co_sleep_ns(10 * NS_PER_MS);
	ck_assert_msg(is_locked(last_locked_byte), "qemu-io did not start");
	return qemu;
}

static void qemu_stop(struct qemu *qemu)
{
	close(qemu->input);
	ck_assert_int_eq(waitpid(qemu->pid, NULL, 0), qemu->pid);
}

static suspends void we_refuse_what_qemu_writes(void)
{
	char expected[128];

	make_image();
	struct qemu qemu = qemu_start("", 101);
	snprintf(expected, sizeof(expected), "\"image.raw\" is in use by qemu-io (pid %d)",
		qemu.pid);
	stack_refused(expected, "file path=%s", image);
	stack_refused(expected, "file path=%s read-only=true", image);
	qemu_stop(&qemu);
	stack_close(stack("file path=%s", image));
}

static suspends void we_read_what_qemu_reads(void)
{
	make_image();
	struct qemu qemu = qemu_start("-r", 100);

	stack_close(stack("file path=%s read-only=true", image));
	qemu_stop(&qemu);
}

static const struct unit_case cases[] = {
	CASE(writers_exclude_each_other),
	CASE(links_do_not_help),
	CASE(readers_share),
	CASE(lock_off_is_on_your_own),
	CASE(what_others_found_is_not_removed),
	CASE(qemu_refuses_what_we_write),
	CASE(qemu_refuses_the_qcow2_that_we_write),
	CASE(qemu_reads_what_we_read),
	CASE(we_refuse_what_qemu_writes),
	CASE(we_read_what_qemu_reads),
};

int main(void)
{
	if (system("qemu-img --version >/dev/null && qemu-io --version >/dev/null")) {
		printf("qemu-img and qemu-io are not installed\n");
		return 77;
	}
	return unit_main("file_lock", cases, ARRAY_LEN(cases));
}
