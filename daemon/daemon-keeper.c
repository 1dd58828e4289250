/*
 * The daemon as the server of a keeper: what it finds there when it starts, and what it leaves there.
 *
 * Listening sockets: those that this process bound are given to the keeper, so that clients can wait in them
 * while no server runs. Those that a predecessor bound came back as if from a service manager; what the config
 * does not name any more is closed, and its file removed.
 *
 * The configuration in force: given to the keeper, so that the next server does not go by a file that nobody has
 * reloaded. If what a server before a restart had in force cannot be read, the devices wait until a reload.
 *
 * Kernel devices: each waits in daemon->kept_doors until the export of its name is open, and goes on there
 * (export_start()). An export that does not open now may later (a file system that is not mounted, a machine that
 * does not answer): its device waits meanwhile, and so does whoever uses it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/control.h"
#include "daemon/daemon.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "daemon/listen.h"
#include "daemon/nbd_door.h"
#include "daemon/reload.h"

#define RECOVERY_MIN_NS NS_PER_SEC
#define RECOVERY_MAX_NS (30 * NS_PER_SEC)

/* --- listening sockets ------------------------------------------------------------------------ */

static void add_bound(const struct listener *listener, int *fds, unsigned *count)
{
	if (!listener || listener->fd < 0 || listener->passed)
		return;
	if (*count < KEEPER_LISTENERS_MAX)
		fds[(*count)++] = listener->fd;
	else
		log_warning("%s: the keeper keeps %d sockets only: clients of this one will be "
			    "refused while the server restarts",
			listener->text, KEEPER_LISTENERS_MAX);
}

suspends void daemon_keep_listeners(struct daemon *daemon)
{
	struct keeper_message message = {};
	const struct listener *listener;
	int fds[KEEPER_LISTENERS_MAX];
	unsigned count = 0;
	struct err err;

	if (!daemon->keeper)
		return;
	add_bound(control_listener(daemon->control), fds, &count);
	for (size_t i = 0; (listener = nbd_door_listener(daemon->nbd_door, i)); i++)
		add_bound(listener, fds, &count);
	if (keeper_call_with(daemon->keeper, KEEPER_KEEP, &message, fds, count, NULL, &err))
		log_warning("the keeper does not keep the sockets: clients will be refused while "
			    "the server restarts: %s",
			err.text);
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

/* --- the configuration in force ---------------------------------------------------------------- */

/* Those of the config that run, as they run, and those that do not yet; then those that are in no config. */
static struct config_written_export *list_exports(
	struct daemon *daemon, const struct config *config, size_t *count)
{
	size_t most = config->export_count;
	struct config_written_export *list;

	list_for_each (link, &daemon->exports)
		most++;
	list = calloc(most + 1, sizeof(*list));
	if (!list)
		abort();
	*count = 0;
	for (size_t i = 0; i < config->export_count; i++) {
		const struct config_export *configured = config->exports[i];
		const struct export *export = export_find(daemon, configured->name);

		if (!export)
			list[(*count)++] = (struct config_written_export){ configured,
				configured->by_hand };
	}
	list_for_each (link, &daemon->exports) {
		const struct export *export = list_entry(link, struct export, link);

		list[(*count)++] = (struct config_written_export){ export->config,
			export->by_hand };
	}
	return list;
}

suspends int daemon_leave_config(
	struct daemon *daemon, const struct config *config, int settings, struct err *err)
{
	struct keeper_message message = {};
	size_t count;

	if (!daemon->keeper || daemon->unknown)
		return 0;
	struct config_written_export *list = list_exports(daemon, config, &count);
	CLEANUP(fd) int exports = in_force_exports(list, count, err);
	const int fds[] = { settings >= 0 ? settings : daemon->settings, exports };
	free(list);
	if (exports < 0)
		return exports;
	int ret = keeper_call_with(
		daemon->keeper, KEEPER_CONFIG, &message, fds, ARRAY_LEN(fds), NULL, err);
	return ret ? err_wrap(err, "what is in force is not kept for the next server") : 0;
}

bool daemon_must_wait(struct daemon *daemon, const char *export)
{
	if (!daemon->unknown)
		return false;
	list_for_each (link, &daemon->kept_doors) {
		if (strcmp(kernel_kept_export(link), export) != 0)
			continue;
		log_error("export \"%s\": %s waits: it is not known what it was served from "
			  "before the restart; if the config file names the right disk, reload it",
			export, kernel_device(kernel_kept_door(link)));
		return true;
	}
	return false;
}

/* --- notes ------------------------------------------------------------------------------------ */

/* The config names a device for the export, and somebody detached it since the service was started. */
#define NOTE_DETACHED "detached"

suspends void daemon_note_detached(struct daemon *daemon, const char *export, bool detached)
{
	struct keeper_message message = {};
	struct err err;

	if (!daemon->keeper)
		return;
	snprintf(message.export, sizeof(message.export), "%s", export);
	snprintf(message.text, sizeof(message.text), "%s", detached ? NOTE_DETACHED : "");
	if (keeper_call(daemon->keeper, KEEPER_NOTE, &message, -1, NULL, &err))
		log_warning("export \"%s\": the next server will not know that it was detached: %s",
			export, err.text);
}

suspends bool daemon_wants_detached(struct daemon *daemon, const char *export)
{
	bool detached = false;

	if (!daemon_recovers(daemon))
		return false;
	for (uint32_t slot = 0; !detached; slot++) {
		struct keeper_message message = { .slot = slot };

		if (keeper_call(daemon->keeper, KEEPER_READ, &message, -1, NULL, NULL))
			break;
		slot = message.slot;
		detached = !strcmp(message.export, export) && !strcmp(message.text, NOTE_DETACHED);
	}
	return detached;
}

/* --- meeting ---------------------------------------------------------------------------------- */

static void stop_wanted(struct keeper_link *link)
{
	struct daemon *daemon = container_of(link, struct daemon, keeper_link);

	if (!daemon->stopping)
		log_info("stopping, as the keeper was asked to");
	daemon_stop(daemon);
}

static void park_wanted(struct keeper_link *link)
{
	struct daemon *daemon = container_of(link, struct daemon, keeper_link);

	if (!daemon->stopping)
		log_info("the service is restarted: leaving devices and sockets to the next one");
	daemon->parking = daemon->keeper_ends = true;
	daemon_stop(daemon);
}

static void reload_wanted(struct keeper_link *link)
{
	reload_by_signal(container_of(link, struct daemon, keeper_link));
}

suspends int daemon_meet_keeper(struct daemon *daemon, struct err *err)
{
	struct keeper_link *link = daemon->keeper;

	link->on_stop = stop_wanted;
	link->on_reload = reload_wanted;
	link->on_park = park_wanted;
	int ret = keeper_link_start(link, daemon->keeper_sock, err);
	if (ret)
		return ret;
	drop_left_overs(daemon);
	daemon_keep_listeners(daemon);
	ret = kernel_find_kept(link, &daemon->kept_doors, err);
	daemon->env.successor = !list_empty(&daemon->kept_doors);
	return ret;
}

/* --- handing over ----------------------------------------------------------------------------- */

suspends int daemon_hand_over(struct daemon *daemon, bool force, struct err *err)
{
	struct keeper_message message = { .force = force };

	if (!daemon->keeper)
		return err_set(err, EOPNOTSUPP,
			"there is no keeper to hold sockets and devices meanwhile (keeper = true "
			"in the config): restart the service instead");
	int ret = daemon_begin_change(daemon, err);
	if (ret)
		return ret;
	ret = keeper_call(daemon->keeper, KEEPER_UPGRADE, &message, -1, NULL, err);
	if (!ret) {
		daemon->parking = true;
		daemon_stop(daemon);
	}
	daemon_end_change(daemon);
	return ret;
}

void daemon_leave_listeners(struct daemon *daemon)
{
	struct listener *listener = control_listener(daemon->control);

	listener_leave_file(listener);
	for (size_t i = 0; (listener = nbd_door_listener(daemon->nbd_door, i)); i++)
		listener_leave_file(listener);
}

/* --- taking over ------------------------------------------------------------------------------ */

bool daemon_recovers(const struct daemon *daemon)
{
	return daemon->keeper && daemon->keeper->restarts;
}

static struct config_export *find_config(const struct daemon *daemon, const char *name)
{
	for (size_t i = 0; i < daemon->config->export_count; i++)
		if (!strcmp(daemon->config->exports[i]->name, name))
			return daemon->config->exports[i];
	return NULL;
}

static suspends void drop(struct list *link, const char *why)
{
	struct kernel_door *door = kernel_kept_door(link);

	log_error("export \"%s\": %s is disconnected, and its users get errors: %s",
		kernel_kept_export(link), kernel_device(door), why);
	kernel_abandon(door);
}

/* Of an export that the config does not have: a reload would have refused to take a device from its users. */
static suspends void look_at_stranger(struct list *link)
{
	const char *name = kernel_kept_export(link);
	const char *device = kernel_device(kernel_kept_door(link));
	struct err users;

	if (kernel_kept_by_hand(link))
		log_error(
			"export \"%s\": %s waits: the export was added by hand, and is not in the "
			"config: add it again (blkstackctl add)",
			name, device);
	else if (kernel_kept_is_used(link, &users))
		log_error("export \"%s\": %s waits, and so do its users (%s): the config does not "
			  "have "
			  "the export any more: put it back and reload",
			name, device, users.text);
	else
		drop(link, "the config does not have the export any more");
}

static suspends void let_go(struct list *link)
{
	struct kernel_door *door = kernel_kept_door(link);

	log_error(
		"export \"%s\" could not be opened until the daemon stopped: %s, and who uses it, "
		"waits for the next start",
		kernel_kept_export(link), kernel_device(door));
	kernel_let_go(door);
}

suspends void daemon_drop_strangers(struct daemon *daemon)
{
	struct list *link, *next;

	for (link = daemon->kept_doors.next; link != &daemon->kept_doors; link = next) {
		next = link->next;
		if (!find_config(daemon, kernel_kept_export(link)))
			look_at_stranger(link);
	}
}

bool daemon_leaves(const struct daemon *daemon, const struct kernel_door *door)
{
	return daemon->parking && (!daemon->keeper_ends || kernel_outlives(door));
}

suspends void daemon_drop_kept(struct daemon *daemon)
{
	while (!list_empty(&daemon->kept_doors)) {
		struct list *link = daemon->kept_doors.next;
		struct kernel_door *door = kernel_kept_door(link);

		if (daemon_leaves(daemon, door))
			kernel_leave(door);
		else if (kernel_outlives(door))
			let_go(link);
		else
			drop(link, "its export could not be opened until the daemon stopped");
	}
}

struct recovery {
	struct daemon *daemon;
	char name[];
};

/* True when there is nothing left to do. */
static suspends bool try_to_start(struct recovery *recovery)
{
	struct daemon *daemon = recovery->daemon;
	struct export *export = NULL;
	struct err err;
	int ret = daemon_begin_change(daemon, &err);

	if (ret)
		return true;
	struct config_export *config = find_config(daemon, recovery->name);
	if (config && !export_find(daemon, recovery->name))
		ret = export_start(daemon, config, &export, &err);
	if (!ret && export)
		ret = daemon_attach_wanted(daemon, export, &err);
	if (!config)
		daemon_drop_strangers(daemon);
	daemon_end_change(daemon);
	if (ret)
		log_error("%s; its device waits, trying again", err.text);
	else
		daemon_tell_status(daemon);
	return !ret;
}

static suspends void recover(void *arg)
{
	struct recovery *recovery = arg;
	struct daemon *daemon = recovery->daemon;
	uint64_t pause_ns = RECOVERY_MIN_NS;

	do {
		co_queue_wait_until(&daemon->stop_wanted, reactor_now_ns() + pause_ns);
		pause_ns = MIN(2 * pause_ns, RECOVERY_MAX_NS);
	} while (!daemon->stopping && !try_to_start(recovery));
	free(recovery);
}

void daemon_start_later(
	struct daemon *daemon, const struct config_export *config, const struct err *err)
{
	size_t name_bytes = strlen(config->name) + 1;
	struct recovery *recovery = calloc(1, sizeof(*recovery) + name_bytes);

	log_error("%s; the other exports are served, this one is tried again", err->text);
	if (!recovery)
		return;
	recovery->daemon = daemon;
	memcpy(recovery->name, config->name, name_bytes);
	co_group_start(&daemon->recovering, recover, recovery);
}
