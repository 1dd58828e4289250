/*
 * Who uses a kernel NBD device; see kernel-users.h.
 *
 * Five places are looked at, and a device number counts when it is the disk or one of its partitions:
 *	/proc/self/mountinfo	the device number, or (btrfs, overlays of several devices) the source's
 *	/proc/swaps
 *	/sys/block/nbdN/.../holders	device mapper, md, bcache
 *	/sys/block/loopN/loop/backing_file
 *	/proc/PID/fd		every process: an open descriptor is use, even when idle
 * Mounts in other mount namespaces are not seen here: the caller's O_EXCL open finds those. Processes
 * that end during the walk, and those we may not look at, are passed over.
 */
#include "daemon/kernel-users.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/process.h"
#include "daemon/kernel-sysfs.h"

struct users {
	const char *name;
	const int *own_fds;
	unsigned own_fd_count;
	char text[384]; /* what goes into the error; the rest of many is cut */
};

static void __attribute__((format(printf, 2, 3)))
users_add(struct users *users, const char *fmt, ...)
{
	size_t used = strlen(users->text);
	va_list ap;

	if (used)
		used += (size_t)snprintf(users->text + used, sizeof(users->text) - used, ", ");
	if (used >= sizeof(users->text))
		return;
	va_start(ap, fmt);
	vsnprintf(users->text + used, sizeof(users->text) - used, fmt, ap);
	va_end(ap);
}

static bool owns_path(const struct users *users, const char *path)
{
	struct statx status;

	return !statx(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_TYPE, &status) &&
	       S_ISBLK(status.stx_mode) &&
	       kernel_sysfs_owns(
		       users->name, makedev(status.stx_rdev_major, status.stx_rdev_minor));
}

/* In place: mountinfo and swaps write blanks as \040 and the like. */
static void unescape(char *text)
{
	char *to = text;

	for (const char *from = text; *from;) {
		unsigned code;
		int digits = 0;

		if (*from == '\\' && sscanf(from + 1, "%3o%n", &code, &digits) == 1) {
			*to++ = (char)code;
			from += 1 + digits;
		} else {
			*to++ = *from++;
		}
	}
	*to = '\0';
}

/* "36 35 43:0 / /srv rw,noatime shared:1 - ext4 /dev/nbd0 rw": fields 3, 5, and the second after "-". */
static void find_mounts(struct users *users)
{
	CLEANUP(file) FILE *list = fopen("/proc/self/mountinfo", "re");
	CLEANUP(free) char *line = NULL;
	size_t size = 0;

	while (list && getline(&line, &size, list) > 0) {
		unsigned dev_major, dev_minor;
		int where_at = 0, source_at = 0;
		char *tail = strstr(line, " - ");

		if (!tail || sscanf(line, "%*d %*d %u:%u %*s %n", &dev_major, &dev_minor,
				     &where_at) != 2)
			continue;
		(void)sscanf(tail, " - %*s %n", &source_at);

		char *source = tail + source_at;

		source[strcspn(source, " \n")] = '\0';
		line[where_at + (int)strcspn(line + where_at, " ")] = '\0';
		unescape(line + where_at);
		unescape(source);
		if (kernel_sysfs_owns(users->name, makedev(dev_major, dev_minor)) ||
			(source[0] == '/' && owns_path(users, source)))
			users_add(users, "mounted on %s", line + where_at);
	}
}

static void find_swap(struct users *users)
{
	CLEANUP(file) FILE *list = fopen("/proc/swaps", "re");
	CLEANUP(free) char *line = NULL;
	size_t size = 0;

	while (list && getline(&line, &size, list) > 0) {
		line[strcspn(line, " \t\n")] = '\0';
		unescape(line);
		if (line[0] == '/' && owns_path(users, line))
			users_add(users, "used as swap");
	}
}

static int find_holders_of(const char *partition, void *arg)
{
	struct users *users = arg;
	char path[256];

	/* The disk itself comes as "". */
	snprintf(path, sizeof(path), "/sys/block/%s/%s/holders", users->name, partition);

	CLEANUP(dir) DIR *dir = opendir(path);
	struct dirent *entry;

	while (dir && (entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			users_add(users, "held by %s", entry->d_name);
	return 0;
}

static void find_loops(struct users *users)
{
	CLEANUP(dir) DIR *dir = opendir("/sys/block");
	struct dirent *entry;
	char path[4096];

	while (dir && (entry = readdir(dir)))
		if (!strncmp(entry->d_name, "loop", 4) &&
			!kernel_sysfs_read(
				entry->d_name, "loop/backing_file", path, sizeof(path)) &&
			owns_path(users, path))
			users_add(users, "held by %s", entry->d_name);
}

static bool is_own_fd(const struct users *users, const char *fd_name)
{
	for (unsigned i = 0; i < users->own_fd_count; i++)
		if (users->own_fds[i] == atoi(fd_name))
			return true;
	return false;
}

/* At most one word per process, however many descriptors it has. */
static void find_open_files_of(struct users *users, const char *pid)
{
	char path[64], process[PROCESS_NAME_LEN];
	bool is_self = atoi(pid) == getpid();

	snprintf(path, sizeof(path), "/proc/%.16s/fd", pid);

	CLEANUP(dir) DIR *dir = opendir(path);
	struct dirent *entry;

	while (dir && (entry = readdir(dir))) {
		struct statx status;

		if (!isdigit((unsigned char)entry->d_name[0]) ||
			(is_self && is_own_fd(users, entry->d_name)))
			continue;
		if (statx(dirfd(dir), entry->d_name, AT_STATX_DONT_SYNC, STATX_TYPE, &status) ||
			!S_ISBLK(status.stx_mode) ||
			!kernel_sysfs_owns(
				users->name, makedev(status.stx_rdev_major, status.stx_rdev_minor)))
			continue;

		users_add(users, "open by %s (%.16s)",
			process_name(atoi(pid), process) ? process : "?", pid);
		return;
	}
}

static void find_open_files(struct users *users)
{
	CLEANUP(dir) DIR *dir = opendir("/proc");
	struct dirent *entry;

	while (dir && (entry = readdir(dir)))
		if (isdigit((unsigned char)entry->d_name[0]))
			find_open_files_of(users, entry->d_name);
}

int kernel_users_check(const char *name, const int *own_fds, unsigned own_fd_count, struct err *err)
{
	struct users users = { .name = name, .own_fds = own_fds, .own_fd_count = own_fd_count };

	find_mounts(&users);
	find_swap(&users);
	find_holders_of("", &users);
	kernel_sysfs_partitions(name, find_holders_of, &users);
	find_loops(&users);
	find_open_files(&users);
	return users.text[0] ? err_set(err, EBUSY, "%s", users.text) : 0;
}
