/*
 * Locks of kernel devices; see kernel-lock.h.
 *
 * A lock of an open file description: a record lock of the process would be lost as soon as anything in it closes
 * the file, asking who holds it included. It does not tell the holder's number, so that is in
 * the file: "KEEPER CONNECTIONS ATTACHER". The files stay: one that is removed can be locked by two.
 */
#include "daemon/kernel-lock.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"

#define FOLDER_PARENT "/run/blkstack"
#define FOLDER        FOLDER_PARENT "/lock"

static void file_path(const char *name, char path[PATH_MAX])
{
	snprintf(path, PATH_MAX, FOLDER "/%s", name);
}

static void read_note(int fd, struct kernel_lock_note *note)
{
	char text[64] = "";

	*note = (struct kernel_lock_note){ 0 };
	if (pread(fd, text, sizeof(text) - 1, 0) <= 0 ||
		sscanf(text, "%d %u %d\n", &note->keeper, &note->connections, &note->attacher) != 3)
		*note = (struct kernel_lock_note){ 0 };
}

pid_t kernel_lock_holder(const char *name, struct kernel_lock_note *note)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct kernel_lock_note unused;
	char path[PATH_MAX];

	note = note ? note : &unused;
	*note = (struct kernel_lock_note){ 0 };
	file_path(name, path);

	CLEANUP(fd) int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	read_note(fd, note);
	if (fcntl(fd, F_OFD_GETLK, &lock) || lock.l_type == F_UNLCK)
		return 0;
	return note->keeper ? note->keeper : -1;
}

int kernel_lock_take(const char *name, int *fd, struct kernel_lock_note *last, struct err *err)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char path[PATH_MAX];

	file_path(name, path);
	if ((mkdir(FOLDER_PARENT, 0755) && errno != EEXIST) ||
		(mkdir(FOLDER, 0755) && errno != EEXIST))
		return err_sys(err, errno, "cannot create " FOLDER);

	CLEANUP(fd) int file = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);

	if (file < 0)
		return err_sys(err, errno, "cannot create %s", path);
	read_note(file, last);
	if (!fcntl(file, F_OFD_SETLK, &lock)) {
		*fd = take_fd(&file);
		return 0;
	}
	if (errno != EAGAIN && errno != EACCES)
		return err_sys(err, errno, "cannot lock %s", path);
	return err_set(err, EBUSY, "in use: kept by process %d", (int)last->keeper);
}

void kernel_lock_note(int fd, const struct kernel_lock_note *note)
{
	char text[64];
	int len_bytes = snprintf(text, sizeof(text), "%d %u %d\n", (int)getpid(), note->connections,
		(int)note->attacher);

	/* Too short a note reads as no note. */
	if (ftruncate(fd, 0) || pwrite(fd, text, (size_t)len_bytes, 0) != len_bytes)
		(void)!ftruncate(fd, 0);
}
