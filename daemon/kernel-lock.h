/*
 * Which process keeps a kernel device. The driver does not know: a device that was attached by netlink stays when
 * its process dies, and its `pid` is a thread of the first of them. So each device that is attached has a file
 * /run/blkstack/lock/nbdN, locked as long as its process lives. What is in the file stays.
 */
#pragma once

#include <sys/types.h>

#include "base/err.h"

struct kernel_lock_note {
	pid_t keeper;         /* the process that wrote this */
	unsigned connections; /* nothing else tells how many there are */
	pid_t attacher; /* `pid` in sysfs: if it is another, somebody else attached the device since */
};

/*
 * *fd: closing it gives the lock back; *last: the last holder's note, zeroes if there is none. -EBUSY names the
 * holder; other errors: the file cannot be made.
 */
int kernel_lock_take(const char *name, int *fd, struct kernel_lock_note *last, struct err *err);
/* keeper is filled in. */
void kernel_lock_note(int fd, const struct kernel_lock_note *note);

/* The process that holds it, -1 when it cannot be told; 0: nobody does. note may be NULL. */
pid_t kernel_lock_holder(const char *name, struct kernel_lock_note *note);
