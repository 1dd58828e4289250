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

static bool is_kept(const struct kept_listener *listener)
{
	return !strcmp(listener->name, LISTEN_KEPT);
}

/* Takes those out that came by KEEP. */
static void take_kept(struct listeners *listeners, struct keeper_fds *fds)
{
	unsigned left = 0;

	fds->count = 0;
	for (unsigned i = 0; i < listeners->count; i++) {
		if (is_kept(&listeners->items[i]))
			fds->fd[fds->count++] = listeners->items[i].fd;
		else
			listeners->items[left++] = listeners->items[i];
	}
	listeners->count = left;
}

static int replace(struct listeners *listeners, struct keeper_fds *fds)
{
	const struct keeper_fds next = *fds;

	if (listeners->count - listeners_kept_count(listeners) + next.count > KEEPER_LISTENERS_MAX)
		return -ENOSPC;
	for (unsigned i = 0; i < next.count; i++)
		if (!listens(next.fd[i]))
			return -EINVAL;
	take_kept(listeners, fds);
	store_forget_listeners();
	for (unsigned i = 0; i < next.count; i++) {
		listeners_add(listeners, next.fd[i], LISTEN_KEPT);
		store_put_listener(next.fd[i]);
	}
	return 0;
}

void listeners_keep(
	struct keeper *keeper, const struct keeper_message *request, struct keeper_fds *fds)
{
	const struct keeper_message answer = {
		.id = request->id,
		.ret = replace(&keeper->listeners, fds),
	};

	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

unsigned listeners_kept_count(const struct listeners *listeners)
{
	unsigned count = 0;

	for (unsigned i = 0; i < listeners->count; i++)
		count += is_kept(&listeners->items[i]);
	return count;
}
