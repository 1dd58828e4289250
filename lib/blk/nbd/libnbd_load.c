/*
 * Loading libnbd; see libnbd_load.h, and base/library.h for how.
 */
#define LIBNBD_NAMES_ONLY
#include "blk/nbd/libnbd_load.h"

#include "base/library.h"

struct libnbd_calls libnbd_calls;

static const char *const names[] = { LIBNBD_CALLS(LIBRARY_NAME) };

int libnbd_load(struct err *err)
{
	static struct library libnbd = LIBRARY("libnbd.so.0",
		"the nbd layer needs libnbd (package libnbd0)", names, &libnbd_calls);

	return library_load(&libnbd, err);
}
