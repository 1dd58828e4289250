/*
 * The kernel door; see kernel.h.
 *
 * A door is a device that somebody holds (kernel-hold.h) and the connections that serve it. With a keeper the device
 * outlives this process, and a successor takes it over.
 *
 * The driver gives a device up when it is told to, or by itself: somebody else disconnected it, a
 * request timed out, the server's end was closed after a protocol error. Then the door is "lost": it
 * stays, so that `status` can tell, until it is detached. Users of a lost device get errors; the
 * driver can be started again on it only when the last of them is gone.
 */
#include "daemon/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/kernel-hold.h"
#include "nbd/server.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#ifndef PR_SET_IO_FLUSHER /* Linux 5.6 */
#define PR_SET_IO_FLUSHER 57
#endif

struct kernel_door {
	struct nbd_export *nbd;
	struct kernel_hold hold;
	char device[KERNEL_NAME_LEN + 8];
	bool detaching; /* the end is expected */
};

/* --- the end of a device ---------------------------------------------------------------------- */

static const char *end_text(const struct kernel_door *door)
{
	return door->hold.end_reason ? strerror(door->hold.end_reason)
				     : "another program disconnected it, or its connection broke";
}

static void door_ended(struct kernel_hold *hold)
{
	struct kernel_door *door = container_of(hold, struct kernel_door, hold);

	if (!door->detaching)
		log_error("export \"%s\": %s is lost: %s", door->nbd->name, door->device,
			end_text(door));
}

/* Gives the device up, gently or not, and frees the door. */
static suspends void door_free(struct kernel_door *door)
{
	door->detaching = true;
	kernel_hold_free(&door->hold);
	free(door);
}

/* --- serving ---------------------------------------------------------------------------------- */

/* The other end of the device's socket, on its way to the export's home reactor and there. */
struct serving {
	struct task arrived;
	struct nbd_export *nbd;
	int fd;
	char device[KERNEL_NAME_LEN + 8];
};

static suspends void serve(void *arg)
{
	struct serving *serving = arg;
	const struct nbd_session session = {
		.fd = serving->fd,
		.limits = &nbd_limits_default,
		.peer = serving->device,
		.origin = NBD_FROM_KERNEL,
	};
	CLEANUP(fd) int twin = fcntl(serving->fd, F_DUPFD_CLOEXEC, 0);
	int ret = nbd_serve(serving->nbd, &session);

	/* The keeper has a descriptor of it too: the driver would not see a mere close. */
	shutdown(twin, SHUT_RDWR);
	if (ret)
		log_error("export \"%s\": the connection with %s broke: %s", serving->nbd->name,
			serving->device, strerror(-ret));
	free(serving);
}

static void serve_arrived(struct task *task)
{
	co_start(serve, container_of(task, struct serving, arrived));
}

/* Takes fd over. */
static int start_serving(struct kernel_door *door, int fd, struct err *err)
{
	struct serving *serving = calloc(1, sizeof(*serving));

	if (!serving) {
		close(fd);
		return err_set(err, ENOMEM, "out of memory");
	}
	serving->nbd = door->nbd;
	serving->fd = fd;
	snprintf(serving->device, sizeof(serving->device), "%s", door->device);
	task_init(&serving->arrived, serve_arrived);
	reactor_post(door->nbd->home, &serving->arrived);
	return 0;
}

/* --- attach, resize, detach ------------------------------------------------------------------- */

static struct kernel_door *door_new(const struct kernel_opts *opts)
{
	struct kernel_door *door = calloc(1, sizeof(*door));
	const struct kernel_dev_opts dev_opts = {
		.device = opts->device,
		.size_bytes = opts->size_bytes,
		.block_size = opts->block_size,
		.mode = opts->mode,
		.connections = opts->connections,
		.timeout_s = opts->timeout_s,
		.dead_timeout_s = opts->dead_timeout_s,
		.flags = nbd_export_flags(opts->nbd, false),
	};

	if (!door)
		return NULL;
	door->nbd = opts->nbd;
	kernel_hold_init(&door->hold, opts->keeper, opts->nbd->name, &dev_opts, door_ended);
	snprintf(door->device, sizeof(door->device), "%s", opts->device);
	return door;
}

static int serve_all(struct kernel_door *door, struct err *err)
{
	struct kernel_ends *ends = &door->hold.ends;
	int ret = 0;

	snprintf(door->device, sizeof(door->device), "/dev/%s", door->hold.name);
	for (unsigned i = 0; i < ends->count && !ret; i++)
		ret = start_serving(door, take_fd(&ends->server[i]), err);
	kernel_ends_close(ends);
	return ret;
}

suspends int kernel_attach(
	const struct kernel_opts *opts, struct kernel_door **door, struct err *err)
{
	struct kernel_door *new = door_new(opts);
	struct err unsettled = { 0 };

	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	int ret = kernel_hold_claim(&new->hold, err);
	if (!ret)
		ret = serve_all(new, err);
	if (!ret && kernel_hold_settle(&new->hold, &unsettled))
		log_warning("export \"%s\": %s", new->nbd->name, unsettled.text);
	if (!ret && new->hold.ended)
		ret = err_set(err, EIO, "%s is lost already: %s", new->device, end_text(new));
	if (ret) {
		door_free(new);
		return ret;
	}
	*door = new;
	return 0;
}

suspends int kernel_detach(struct kernel_door *door, bool force, struct err *err)
{
	door->detaching = true;
	int ret = kernel_hold_release(&door->hold, force, err);
	if (ret) {
		door->detaching = false;
		return ret;
	}
	door_free(door);
	return 0;
}

suspends int kernel_check_unused(struct kernel_door *door, struct err *err)
{
	return door->hold.ended ? 0 : kernel_hold_check_unused(&door->hold, err);
}

suspends int kernel_resize(struct kernel_door *door, uint64_t size_bytes, struct err *err)
{
	if (door->hold.ended)
		return err_set(err, ENODEV, "%s is lost: %s", door->device, end_text(door));
	return kernel_hold_resize(&door->hold, size_bytes, err);
}

/* --- the rest --------------------------------------------------------------------------------- */

const char *kernel_device(const struct kernel_door *door)
{
	return door->device;
}

json_t *kernel_status(const struct kernel_door *door)
{
	json_t *object = json_object();

	json_object_set_new(object, "device", json_string(door->device));
	json_object_set_new(object, "state", json_string(door->hold.ended ? "lost" : "attached"));
	if (door->hold.ended)
		json_object_set_new(object, "reason", json_string(end_text(door)));
	json_object_set_new(object, "size", json_integer((json_int_t)door->hold.opts.size_bytes));
	json_object_set_new(object, "block_size", json_integer(door->hold.opts.block_size));
	json_object_set_new(
		object, "read_only", json_boolean(door->hold.opts.flags & NBD_FLAG_READ_ONLY));
	json_object_set_new(object, "timeout", json_integer(door->hold.opts.timeout_s));
	json_object_set_new(object, "mode",
		json_string(door->hold.opts.mode == KERNEL_DEV_NETLINK ? "netlink" : "ioctl"));
	json_object_set_new(object, "connections", json_integer(door->hold.opts.connections));
	return object;
}

int kernel_guard_reclaim(bool lock_memory, struct err *err)
{
	if (prctl(PR_SET_IO_FLUSHER, 1UL, 0UL, 0UL, 0UL))
		return err_sys(err, errno,
			"cannot be exempt from waiting for its own devices when memory is short "
			"(prctl PR_SET_IO_FLUSHER, needs CAP_SYS_RESOURCE)");
	if (lock_memory && mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		return err_sys(err, errno,
			"cannot lock its memory (mlockall, needs CAP_IPC_LOCK or LimitMEMLOCK)");
	return 0;
}
