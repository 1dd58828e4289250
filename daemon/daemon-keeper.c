/*
 * The daemon as the server of a keeper: what it finds there when it starts, and what it leaves there.
 *
 * Listening sockets: those that this process bound are given to the keeper, so that clients can wait in them
 * while no server runs. Those that a predecessor bound came back as if from a service manager; what the config
 * does not name any more is closed, and its file removed.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon/control.h"
#include "daemon/daemon.h"
#include "daemon/kernel-hold.h"
#include "daemon/listen.h"
#include "daemon/nbd_door.h"
#include "daemon/reload.h"

/* --- listening sockets ------------------------------------------------------------------------ */

static suspends void keep(struct daemon *daemon, struct listener *listener)
{
	struct keeper_message message = {};
	struct err err;

	if (!listener || listener->fd < 0 || listener->passed)
		return;
	if (keeper_call(daemon->keeper, KEEPER_KEEP, &message, listener->fd, NULL, &err))
		log_warning("%s: the keeper does not keep it: clients will be refused while the "
			    "server restarts: %s",
			listener->text, err.text);
}

suspends void daemon_keep_listeners(struct daemon *daemon)
{
	struct keeper_message message = {};
	struct listener *listener;

	if (!daemon->keeper || keeper_call(daemon->keeper, KEEPER_FORGET, &message, -1, NULL, NULL))
		return;
	keep(daemon, control_listener(daemon->control));
	for (size_t i = 0; (listener = nbd_door_listener(daemon->nbd_door, i)); i++)
		keep(daemon, listener);
}

static bool is_in_use(struct daemon *daemon, int fd)
{
	struct listener *listener = control_listener(daemon->control);

	if (listener && listener->fd == fd)
		return true;
	for (size_t i = 0; (listener = nbd_door_listener(daemon->nbd_door, i)); i++)
		if (listener->fd == fd)
			return true;
	return false;
}

static void remove_file(int fd)
{
	union {
		struct sockaddr any;
		struct sockaddr_un un;
	} bound = {};
	socklen_t bound_len = sizeof(bound);

	if (!getsockname(fd, &bound.any, &bound_len) && bound.any.sa_family == AF_UNIX &&
		bound.un.sun_path[0])
		unlink(bound.un.sun_path);
}

/* Sockets of a predecessor that the config does not name any more. */
static void drop_left_overs(struct daemon *daemon)
{
	char **names = NULL;
	int count = sd_listen_fds_with_names(0, &names);

	for (int i = 0; i < count; i++) {
		int fd = SD_LISTEN_FDS_START + i;

		if (!strcmp(names[i], LISTEN_KEPT) && !is_in_use(daemon, fd)) {
			remove_file(fd);
			close(fd);
		}
		free(names[i]);
	}
	free(names);
}

/* --- meeting ---------------------------------------------------------------------------------- */

static void stop_wanted(struct keeper_link *link)
{
	struct daemon *daemon = container_of(link, struct daemon, keeper_link);

	if (!daemon->stopping)
		log_info("stopping, as the keeper was asked to");
	daemon_stop(daemon);
}

static void reload_wanted(struct keeper_link *link)
{
	reload_by_signal(container_of(link, struct daemon, keeper_link));
}

suspends int daemon_meet_keeper(struct daemon *daemon, struct err *err)
{
	struct keeper_link *link = daemon->keeper;
	char export_name[KEEPER_EXPORT_LEN];
	struct kernel_hold hold;
	uint32_t slot = 0;

	link->on_stop = stop_wanted;
	link->on_reload = reload_wanted;
	int ret = keeper_link_start(link, daemon->keeper_sock, err);
	if (ret)
		return ret;
	drop_left_overs(daemon);
	daemon_keep_listeners(daemon);
	while (!(ret = kernel_hold_take_over(&hold, link, &slot, export_name, err))) {
		log_error("export \"%s\": /dev/%s is disconnected: it cannot be taken over",
			export_name, hold.name);
		kernel_hold_free(&hold);
	}
	return ret == -ENOENT ? 0 : ret;
}
