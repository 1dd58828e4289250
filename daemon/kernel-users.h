/*
 * Who uses a kernel NBD device or its partitions: mounts, swap, devices built on top, open files.
 */
#pragma once

#include "base/err.h"

/*
 * 0 when nobody does; else -EBUSY with all users that were found, as "mounted on /srv, open by
 * fio (4711)". own_fds: this process's own descriptors of the device, which do not count.
 * May block, and reads all of /proc: not for a reactor.
 */
int kernel_users_check(
	const char *name, const int *own_fds, unsigned own_fd_count, struct err *err);
