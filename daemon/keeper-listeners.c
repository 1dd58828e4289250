/*
 * Listening sockets that the keeper keeps: clients that connect while no server runs wait in them.
 *
 * They come from the service manager, or from the server when it has bound one; the keeper never looks at
 * an address. Servers get them as a service manager would pass them, so there is one way of taking them over.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/keeper_private.h"
#include "daemon/listen.h"

static bool listens(int fd)
{
	int value = 0;
	socklen_t value_len = sizeof(value);

	return !getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &value_len) && value;
}

int listeners_add(struct listeners *listeners, int fd, const char *name)
{
	if (listeners->count == KEEPER_LISTENERS_MAX)
		return -ENOSPC;
	if (!listens(fd))
		return -EINVAL;
	struct kept_listener *kept = &listeners->items[listeners->count++];
	kept->fd = fd;
	snprintf(kept->name, sizeof(kept->name), "%s", name);
	return 0;
}

/* A client may have put into one of them what takes its time to close. */
void listeners_forget(struct listeners *listeners, struct keeper_fds *fds)
{
	unsigned left = 0;

	for (unsigned i = 0; i < listeners->count; i++) {
		if (strcmp(listeners->items[i].name, LISTEN_KEPT))
			listeners->items[left++] = listeners->items[i];
		else
			fds->fd[fds->count++] = listeners->items[i].fd;
	}
	listeners->count = left;
	store_forget_listeners();
}
