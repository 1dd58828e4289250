/*
 * Tells udev which export a kernel device is; see kernel-name.h.
 *
 * A device that was attached by ioctl has no attribute that could say it, so the daemon leaves a file per
 * device, /run/blkstack/devices/nbd0, with the line BLKSTACK_EXPORT=NAME, which a rule imports. The
 * config allows no character in a name that would need quoting. Without udev nobody reads the files.
 */
#include "daemon/kernel-name.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/kernel-sysfs.h"

#define FOLDER_PARENT "/run/blkstack"
#define FOLDER        FOLDER_PARENT "/devices"

static void file_path(const char *name, char path[PATH_MAX])
{
	snprintf(path, PATH_MAX, FOLDER "/%s", name);
}

int kernel_name_publish(const char *name, const char *export_name, struct err *err)
{
	char path[PATH_MAX], text[512];
	int len_bytes = snprintf(text, sizeof(text), "BLKSTACK_EXPORT=%s\n", export_name);

	file_path(name, path);
	if ((mkdir(FOLDER_PARENT, 0755) && errno != EEXIST) ||
		(mkdir(FOLDER, 0755) && errno != EEXIST))
		return err_sys(err, errno, "cannot create " FOLDER);
	CLEANUP(fd)
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, (size_t)len_bytes) != len_bytes)
		return err_sys(err, errno, "cannot write %s", path);
	return 0;
}

void kernel_name_forget(const char *name)
{
	char path[PATH_MAX];

	file_path(name, path);
	if (!unlink(path))
		kernel_sysfs_write(name, "uevent", "change");
}
