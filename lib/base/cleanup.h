/*
 * Scope-bound cleanup: CLEANUP(free) frees at the end of the scope, CLEANUP(fd) closes.
 * take_ptr() and take_fd() hand ownership on.
 */
#pragma once

#include <stdlib.h>
#include <unistd.h>

#define CLEANUP(what) __attribute__((cleanup(cleanup_##what)))

static inline void cleanup_free(void *p)
{
	free(*(void **)p);
}

static inline void cleanup_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

#define take_ptr(p)                       \
	({                                \
		__auto_type taken_ = (p); \
		(p) = NULL;               \
		taken_;                   \
	})

static inline int take_fd(int *fd)
{
	int taken = *fd;

	*fd = -1;
	return taken;
}
