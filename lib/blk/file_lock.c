/*
 * Locks that keep two programs from writing one image, in the convention of QEMU: so each refuses what
 * the other has in use.
 *
 * A permission is a number: 0 read consistently, 1 write, 3 resize. Whoever uses permission n holds a
 * lock on byte 100 + n of the file; whoever does not want others to use it holds one on byte 200 + n. All
 * are read locks, so they never exclude each other; a conflict is found by asking, after one's own locks are
 * taken, whether a write lock would fail. Two that start at the same moment may so both be refused, but
 * never both admitted. The bytes need not exist. The locks are OFD locks: they belong to the open file, so
 * two exports in one process exclude each other too, and go away when it is closed.
 *
 * A writer reads, writes and resizes and wants nobody else to write or resize; a reader reads and
 * wants nobody to write or resize: readers share.
 *
 * The holder of an OFD lock has no pid: it is found by looking through /proc for the same file with the
 * lock in its fdinfo. Without the right to look, the text says "another process".
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/process.h"
#include "base/util.h"
#include "blk/file.h"

#define LOCK_USES_BASE     100
#define LOCK_EXCLUDES_BASE 200

#define PERMISSION_READ   0
#define PERMISSION_WRITE  1
#define PERMISSION_RESIZE 3

static const unsigned writer_uses[] = { PERMISSION_READ, PERMISSION_WRITE, PERMISSION_RESIZE };
static const unsigned reader_uses[] = { PERMISSION_READ };
static const unsigned excludes[] = { PERMISSION_WRITE, PERMISSION_RESIZE };

#define WHO_LEN 128

/* --- who holds it ----------------------------------------------------------------------------- */

/* True when the fdinfo at path lists an OFD lock that covers the byte. */
static bool fdinfo_locks(const char *path, off_t byte)
{
	CLEANUP(file) FILE *fdinfo = fopen(path, "re");
	char line[256], end_text[32];
	long long start;

	while (fdinfo && fgets(line, sizeof(line), fdinfo)) {
		/* lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101 */
		if (sscanf(line, "lock: %*d: OFDLCK %*s %*s %*d %*s %lld %31s", &start, end_text) !=
			2)
			continue;
		long long end = strcmp(end_text, "EOF") ? atoll(end_text) : LLONG_MAX;
		if (start <= byte && byte <= end)
			return true;
	}
	return false;
}

/* True when the process has the file open, other than as own_fd, with a lock on the byte. */
static bool process_locks(const char *pid, const struct stat *file, off_t byte, int own_fd)
{
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	CLEANUP(dir) DIR *dir = opendir(path);
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == own_fd)
			continue;
		snprintf(path, sizeof(path), "/proc/%s/fd/%s", pid, entry->d_name);
		if (stat(path, &st) || st.st_dev != file->st_dev || st.st_ino != file->st_ino)
			continue;
		snprintf(path, sizeof(path), "/proc/%s/fdinfo/%s", pid, entry->d_name);
		if (fdinfo_locks(path, byte))
			return true;
	}
	return false;
}

static void name_process(const char *pid, char who[WHO_LEN])
{
	char name[PROCESS_NAME_LEN];

	if (atoi(pid) == getpid()) {
		snprintf(who, WHO_LEN, "another export of this %s", program_invocation_short_name);
		return;
	}
	snprintf(who, WHO_LEN, "%s (pid %s)", process_name(atoi(pid), name) ? name : "a process",
		pid);
}

static void name_holder(int fd, off_t byte, char who[WHO_LEN])
{
	CLEANUP(dir) DIR *proc = opendir("/proc");
	struct stat st;

	snprintf(who, WHO_LEN, "another process");
	if (fstat(fd, &st))
		return;
	for (struct dirent *entry; proc && (entry = readdir(proc));) {
		const char *pid = entry->d_name;
		if (!isdigit((unsigned char)pid[0]))
			continue;
		int own_fd = atoi(pid) == getpid() ? fd : -1;
		if (process_locks(pid, &st, byte, own_fd)) {
			name_process(pid, who);
			return;
		}
	}
}

/* --- locking ---------------------------------------------------------------------------------- */

static int lock_byte(int fd, off_t byte)
{
	struct flock lock = {
		.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1
	};

	return fcntl(fd, F_OFD_SETLK, &lock) ? -errno : 0;
}

/* -EBUSY, with a text, when somebody else has a lock on the byte; who it is takes a look at every process. */
static int check_byte(int fd, const char *path, off_t byte, bool name_them, struct err *err)
{
	struct flock lock = {
		.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1
	};
	char who[WHO_LEN], pid[16];

	if (fcntl(fd, F_OFD_GETLK, &lock))
		return err_sys(err, errno, "the locks of \"%s\" cannot be read", path);
	if (lock.l_type == F_UNLCK)
		return 0;
	if (!name_them)
		return err_set(err, EBUSY, "\"%s\" is in use", path);
	snprintf(pid, sizeof(pid), "%d", (int)lock.l_pid);
	if (lock.l_pid > 0)
		name_process(pid, who);
	else
		name_holder(fd, byte, who);
	return err_set(err, EBUSY, "\"%s\" is in use by %s", path, who);
}

int file_lock(int fd, const char *path, bool read_only, bool name_them, struct err *err)
{
	const unsigned *uses = read_only ? reader_uses : writer_uses;
	size_t use_count = read_only ? ARRAY_LEN(reader_uses) : ARRAY_LEN(writer_uses);
	int result = 0;

	for (size_t i = 0; !result && i < use_count; i++)
		result = lock_byte(fd, LOCK_USES_BASE + uses[i]);
	for (size_t i = 0; !result && i < ARRAY_LEN(excludes); i++)
		result = lock_byte(fd, LOCK_EXCLUDES_BASE + excludes[i]);
	if (result == -EAGAIN || result == -EACCES)
		return err_set(err, EBUSY, "\"%s\" is locked as a whole by another process", path);
	if (result)
		return err_set(err, -result,
			"\"%s\" cannot be locked: %s (lock = false does without)", path,
			strerror(-result));

	for (size_t i = 0; !result && i < use_count; i++)
		result = check_byte(fd, path, LOCK_EXCLUDES_BASE + uses[i], name_them, err);
	for (size_t i = 0; !result && i < ARRAY_LEN(excludes); i++)
		result = check_byte(fd, path, LOCK_USES_BASE + excludes[i], name_them, err);
	return result;
}

/* --- block devices ---------------------------------------------------------------------------- */

/* Where the device is mounted; false when nowhere. */
static bool find_mount(dev_t device, char who[WHO_LEN])
{
	CLEANUP(file) FILE *mounts = fopen("/proc/self/mountinfo", "re");
	CLEANUP(free) char *line = NULL;
	size_t capacity = 0;
	unsigned dev_major, dev_minor;
	char mount_point[96];

	while (mounts && getline(&line, &capacity, mounts) > 0) {
		/* 36 35 98:0 / /mnt rw ... */
		if (sscanf(line, "%*d %*d %u:%u %*s %95s", &dev_major, &dev_minor, mount_point) !=
			3)
			continue;
		if (makedev(dev_major, dev_minor) == device) {
			snprintf(who, WHO_LEN, "mounted on %s", mount_point);
			return true;
		}
	}
	return false;
}

/* The device-mapper, md or other device built on this one; false when there is none. */
static bool find_device_above(dev_t device, char who[WHO_LEN])
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/holders", major(device), minor(device));
	CLEANUP(dir) DIR *holders = opendir(path);
	for (struct dirent *entry; holders && (entry = readdir(holders));) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(who, WHO_LEN, "part of /dev/%.32s", entry->d_name);
		return true;
	}
	return false;
}

int file_device_busy(const char *path, dev_t device, struct err *err)
{
	CLEANUP(fd) int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	char who[WHO_LEN];

	if (fd >= 0 && file_lock(fd, path, false, true, err) == -EBUSY)
		return -EBUSY;
	if (!find_mount(device, who) && !find_device_above(device, who))
		snprintf(who, sizeof(who),
			"(or a partition of it is) mounted, used as swap, or opened exclusively");
	return err_set(err, EBUSY, "\"%s\" is %s", path, who);
}
