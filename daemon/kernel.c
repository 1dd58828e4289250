/*
 * The kernel door; see kernel.h.
 *
 * A door is a kernel_dev with its place in the reactor's world. Calls that block run on a thread
 * made for the call: attaching, detaching and resizing are rare, and a thread of the shared pool could
 * be waiting for a request that needs that very pool to be answered.
 *
 * The driver gives a device up when it is told to, or by itself: somebody else disconnected it, a
 * request timed out, the server's end was closed after a protocol error. Then the door is "lost": it
 * stays, so that `status` can tell, until it is detached. Users of a lost device get errors; the
 * driver can be started again on it only when the last of them is gone.
 */
#include "daemon/kernel.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/kernel-dev.h"
#include "daemon/kernel-name.h"
#include "nbd/server.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#ifndef PR_SET_IO_FLUSHER /* Linux 5.6 */
#define PR_SET_IO_FLUSHER 57
#endif

struct kernel_door {
	struct nbd_export *nbd;
	struct kernel_dev_opts opts;
	struct kernel_dev *dev;
	struct reactor *reactor;
	char device[KERNEL_NAME_LEN + 8];

	bool detaching; /* the end is expected */
	bool ended;     /* the driver gave the device up */
	int end_reason; /* written by the device's thread before it posts */
	struct task ended_task;
	struct co_queue end;
};

/* --- blocking calls --------------------------------------------------------------------------- */

struct call {
	int (*fn)(struct call *call);
	struct kernel_door *door;
	struct kernel_ends ends;
	uint64_t size_bytes;
	bool force;
	struct err *err;

	int ret;
	struct reactor *reactor;
	struct co *co;
	struct task returned;
};

static void call_returned(struct task *task)
{
	co_wake(container_of(task, struct call, returned)->co);
}

static void *call_thread(void *arg)
{
	struct call *call = arg;

	call->ret = call->fn(call);
	reactor_post(call->reactor, &call->returned);
	return NULL;
}

/* Runs call->fn on a thread of its own; what it returns. */
static suspends int call_blocking(struct call *call)
{
	pthread_attr_t attr;
	pthread_t thread;
	int ret;

	call->reactor = reactor_self();
	call->co = co_self();
	task_init(&call->returned, call_returned);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	ret = pthread_create(&thread, &attr, call_thread, call);
	pthread_attr_destroy(&attr);
	if (ret)
		return err_sys(call->err, ret, "a thread for %s", call->door->device);
	co_suspend();
	return call->ret;
}

/* --- the end of a device ---------------------------------------------------------------------- */

static const char *end_text(const struct kernel_door *door)
{
	return door->end_reason ? strerror(door->end_reason)
				: "another program disconnected it, or its connection broke";
}

static void door_ended(struct task *task)
{
	struct kernel_door *door = container_of(task, struct kernel_door, ended_task);

	door->ended = true;
	if (!door->detaching)
		log_error("export \"%s\": %s is lost: %s", door->nbd->name, door->device,
			end_text(door));
	co_queue_wake_all(&door->end);
}

/* On the device's thread. */
static void dev_ended(void *arg, int reason)
{
	struct kernel_door *door = arg;

	door->end_reason = reason;
	reactor_post(door->reactor, &door->ended_task);
}

static int call_free(struct call *call)
{
	struct kernel_dev *dev = call->door->dev;

	kernel_name_forget(kernel_dev_name(dev));
	kernel_dev_free(dev);
	return 0;
}

/* Gives the device up, gently or not, and frees the door. */
static suspends void door_free(struct kernel_door *door)
{
	struct call call = { .fn = call_free, .door = door };

	door->detaching = true;
	if (door->dev) {
		/* Without a thread it blocks this reactor: the lesser evil at the end of memory. */
		if (call_blocking(&call))
			kernel_dev_free(door->dev);
		while (!door->ended)
			co_queue_wait(&door->end);
	}
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
	int ret = nbd_serve(serving->nbd, &session);

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

static int call_claim(struct call *call)
{
	struct kernel_door *door = call->door;

	return kernel_dev_claim(&door->opts, dev_ended, door, &door->dev, &call->ends, call->err);
}

static int call_settle(struct call *call)
{
	struct kernel_dev *dev = call->door->dev;
	struct err unnamed = { 0 };
	int named = kernel_name_publish(kernel_dev_name(dev), call->door->nbd->name, &unnamed);
	int ret = kernel_dev_settle(dev, call->err);

	if (named && !ret) {
		*call->err = unnamed;
		return named;
	}
	return ret;
}

static struct kernel_door *door_new(const struct kernel_opts *opts)
{
	struct kernel_door *door = calloc(1, sizeof(*door));

	if (!door)
		return NULL;
	door->nbd = opts->nbd;
	door->opts = (struct kernel_dev_opts){
		.device = opts->device,
		.size_bytes = opts->size_bytes,
		.block_size = opts->block_size,
		.connections = 1,
		.timeout_s = opts->timeout_s,
		.flags = nbd_export_flags(opts->nbd, false),
	};
	door->reactor = reactor_self();
	task_init(&door->ended_task, door_ended);
	co_queue_init(&door->end);
	snprintf(door->device, sizeof(door->device), "%s", opts->device);
	return door;
}

suspends int kernel_attach(
	const struct kernel_opts *opts, struct kernel_door **door, struct err *err)
{
	struct kernel_door *new = door_new(opts);
	struct call claim = { .fn = call_claim, .door = new, .err = err };
	struct err unsettled = { 0 };
	struct call settle = { .fn = call_settle, .door = new, .err = &unsettled };
	int ret;

	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	ret = call_blocking(&claim);
	if (!ret) {
		snprintf(new->device, sizeof(new->device), "/dev/%s", kernel_dev_name(new->dev));
		for (unsigned i = 0; i < claim.ends.count && !ret; i++)
			ret = start_serving(new, take_fd(&claim.ends.server[i]), err);
		kernel_ends_close(&claim.ends);
	}
	if (!ret && call_blocking(&settle))
		log_warning("export \"%s\": %s", new->nbd->name, unsettled.text);
	if (!ret && new->ended)
		ret = err_set(err, EIO, "%s is lost already: %s", new->device, end_text(new));
	if (ret) {
		door_free(new);
		return ret;
	}
	*door = new;
	return 0;
}

static int call_release(struct call *call)
{
	return kernel_dev_release(call->door->dev, call->force, call->err);
}

suspends int kernel_detach(struct kernel_door *door, bool force, struct err *err)
{
	struct call release = { .fn = call_release, .door = door, .force = force, .err = err };
	int ret;

	door->detaching = true;
	ret = call_blocking(&release);
	if (ret) {
		door->detaching = false;
		return ret;
	}
	door_free(door);
	return 0;
}

static int call_users(struct call *call)
{
	return kernel_dev_users(call->door->dev, call->err);
}

suspends int kernel_check_unused(struct kernel_door *door, struct err *err)
{
	struct call users = { .fn = call_users, .door = door, .err = err };

	return door->ended ? 0 : call_blocking(&users);
}

static int call_resize(struct call *call)
{
	return kernel_dev_resize(call->door->dev, call->size_bytes, call->err);
}

suspends int kernel_resize(struct kernel_door *door, uint64_t size_bytes, struct err *err)
{
	struct call resize = {
		.fn = call_resize, .door = door, .size_bytes = size_bytes, .err = err
	};
	int ret;

	if (door->ended)
		return err_set(err, ENODEV, "%s is lost: %s", door->device, end_text(door));
	ret = call_blocking(&resize);
	if (!ret)
		door->opts.size_bytes = size_bytes;
	return ret;
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
	json_object_set_new(object, "state", json_string(door->ended ? "lost" : "attached"));
	if (door->ended)
		json_object_set_new(object, "reason", json_string(end_text(door)));
	json_object_set_new(object, "size", json_integer((json_int_t)door->opts.size_bytes));
	json_object_set_new(object, "block_size", json_integer(door->opts.block_size));
	json_object_set_new(
		object, "read_only", json_boolean(door->opts.flags & NBD_FLAG_READ_ONLY));
	json_object_set_new(object, "timeout", json_integer(door->opts.timeout_s));
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
