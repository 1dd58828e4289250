/*
 * Memory of kernel devices; see kernel-memory.h.
 *
 * The file has its size, and all its pages, before it has its name: what is found under the name is whole. Nobody is killed
 * because a page that he maps cannot be had.
 */
#include "daemon/kernel-memory.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/cleanup.h"

#define FOLDER_PARENT "/run/blkstack"
#define FOLDER        FOLDER_PARENT "/memory"

static void file_path(const char *name, char path[PATH_MAX])
{
	snprintf(path, PATH_MAX, FOLDER "/%s", name);
}

static int make_folder(struct err *err)
{
	struct statfs fs;

	if ((mkdir(FOLDER_PARENT, 0755) && errno != EEXIST) ||
		(mkdir(FOLDER, 0700) && errno != EEXIST) || statfs(FOLDER, &fs))
		return err_sys(err, errno, "cannot create " FOLDER);
	if (fs.f_type != TMPFS_MAGIC)
		return err_set(err, EOPNOTSUPP, FOLDER " is not on a tmpfs");
	return 0;
}

static int make_file(const char *path, size_t size_bytes, int *fd, struct err *err)
{
	char unnamed[64];

	CLEANUP(fd) int file = open(FOLDER, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);

	if (file < 0 || fallocate(file, 0, 0, (off_t)size_bytes))
		return err_sys(err, errno, "cannot allocate %zu bytes in " FOLDER, size_bytes);
	snprintf(unnamed, sizeof(unnamed), "/proc/self/fd/%d", file);
	if (linkat(AT_FDCWD, unnamed, AT_FDCWD, path, AT_SYMLINK_FOLLOW))
		return err_sys(err, errno, "cannot create %s", path);
	*fd = take_fd(&file);
	return 0;
}

int kernel_memory_open(const char *name, size_t size_bytes, int *fd, struct err *err)
{
	char path[PATH_MAX];
	int ret = make_folder(err);

	if (ret)
		return ret;
	file_path(name, path);
	*fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
	if (*fd >= 0)
		return 0;
	if (errno != ENOENT)
		return err_sys(err, errno, "cannot open %s", path);
	return make_file(path, size_bytes, fd, err);
}

void kernel_memory_forget(const char *name)
{
	char path[PATH_MAX];

	file_path(name, path);
	unlink(path);
}
