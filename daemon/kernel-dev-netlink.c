/*
 * A kernel NBD device by netlink: it outlives the process that attached it. How the driver behaves, and what
 * follows:
 *
 * - When its connections break, requests wait for new ones, dead_timeout_s long. So an error or a
 *   death on our side is a delay for a mounted file system; the next process finds the device by its
 *   identifier (`backend` in sysfs), takes it up as it is, and gives it new sockets.
 * - New sockets replace those that are dead; the driver ignores others with success. Sockets that it took
 *   carry its time-out, so they are offered until it took them all.
 * - The number of connections, the block size and the flags of a connected device cannot be changed.
 * - What a dead connection was asked and did not answer is sent again only when the request's own timer
 *   runs out, which is set when the request begins: 30 s, unless `queue/io_timeout` is lower. With one
 *   connection and no time-out of ours that timer does nothing else, so it is set to REPLAY_MS. With
 *   several connections it ends the connection of a request that is merely slow, so there it is
 *   as long as the time-out, and that long may requests wait that were under way when this
 *   process died. The death of the server alone leaves the connections as they are.
 *   Newer kernels write attributes of a queue only when its requests in flight are done, so that
 *   one is set when they are served: kernel_dev_settle().
 * - Disconnecting asks nobody, and any index will do: we look at the identifier before.
 * - `pid` and the driver's STATUS say "connected" of a disconnected device that is still open; a message that
 *   changes nothing is refused by then. A thread watches our descriptors of the driver's ends for it.
 * - A lock (kernel-lock.h) keeps two processes from taking up the same device.
 *
 * A device that was attached by netlink and is not released is left connected when it is freed, unless
 * nobody can have used it yet.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/nbd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/kernel-dev_private.h"
#include "daemon/kernel-lock.h"
#include "daemon/kernel-memory.h"
#include "daemon/kernel-netlink.h"
#include "daemon/kernel-receivers.h"

#define STEP_MS          20
#define BUSY_TIMEOUT_MS  2000  /* udev and friends have a device open for a moment */
#define OWNER_TIMEOUT_MS 10000 /* for the last owner to be gone, and its connections with it */
#define LOOK_MS          1000  /* with all connections dead: is the device still there? */
#define TAKING_TIMEOUT_S 30    /* marks the sockets that the driver takes; gone a moment later */

static unsigned index_of(const struct kernel_dev *dev)
{
	return (unsigned)strtoul(dev->name + strlen("nbd"), NULL, 10);
}

static struct kernel_netlink message_for(const struct kernel_dev *dev)
{
	return (struct kernel_netlink){
		.index = (int)index_of(dev),
		.identifier = dev->identifier,
		.timeout_s = KERNEL_NETLINK_TIMEOUT_KEEP,
	};
}

/* The driver has it connected under our identifier. */
static bool is_connected(const struct kernel_dev *dev)
{
	const struct kernel_netlink nothing = message_for(dev);

	return kernel_sysfs_server(dev->name) &&
	       kernel_netlink_reconfigure(&nothing, NULL) != -EINVAL;
}

void kernel_dev_identify(struct kernel_dev *dev, const char *export)
{
	snprintf(dev->identifier, sizeof(dev->identifier), KERNEL_DEV_IDENTIFIER "%s", export);
}

static bool has_identifier(const struct kernel_dev *dev)
{
	char text[sizeof(dev->identifier)];

	return !kernel_sysfs_read(dev->name, "backend", text, sizeof(text)) &&
	       !strcmp(text, dev->identifier);
}

/* --- watching --------------------------------------------------------------------------------- */

/* Waits until a connection has broken; false: told to quit. */
static bool wait_for_break(struct kernel_dev *dev)
{
	bool quit = false, broken = false;

	while (!quit && !broken) {
		struct pollfd fds[1 + KERNEL_CONNECTIONS_MAX];
		unsigned count = 0;
		eventfd_t wakes;

		pthread_mutex_lock(&dev->mutex);
		quit = dev->quit;
		fds[count++] = (struct pollfd){ .fd = dev->wake, .events = POLLIN };
		for (unsigned i = 0; i < dev->opts.connections; i++)
			fds[count++] = (struct pollfd){ .fd = dev->kernel_sock[i] };
		pthread_mutex_unlock(&dev->mutex);
		if (quit)
			break;
		poll(fds, count, -1);
		broken = !fds[0].revents;
		if (!broken)
			eventfd_read(dev->wake, &wakes);
	}
	return !quit;
}

static void *watch_thread(void *arg)
{
	struct kernel_dev *dev = arg;

	while (wait_for_break(dev) && is_connected(dev)) {
		/* It stays broken until somebody reconnects: every so often is enough. */
		struct pollfd wake = { .fd = dev->wake, .events = POLLIN };

		poll(&wake, 1, LOOK_MS);
	}
	kernel_dev_end(dev, 0);
	return NULL;
}

static int start_watching(struct kernel_dev *dev, struct err *err)
{
	dev->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (dev->wake < 0)
		return err_sys(err, errno, "eventfd");
	kernel_dev_set_state(dev, RUNNING);
	return kernel_dev_start_thread(dev, watch_thread, err);
}

/* --- a new device ----------------------------------------------------------------------------- */

static int send_connect(struct kernel_dev *dev, int index, struct err *err)
{
	const struct kernel_dev_opts *opts = &dev->opts;
	const struct kernel_netlink message = {
		.index = index,
		.identifier = dev->identifier,
		.size_bytes = opts->size_bytes,
		.block_size = opts->block_size,
		.timeout_s = kernel_dev_driver_timeout_s(dev),
		.dead_timeout_s = opts->dead_timeout_s,
		.flags = kernel_dev_driver_flags(dev),
		.sockets = dev->kernel_sock,
		.socket_count = opts->connections,
	};
	unsigned made;
	int ret = kernel_netlink_connect(&message, &made, err);

	if (ret)
		return ret;
	snprintf(dev->name, sizeof(dev->name), "nbd%u", made);
	if (has_identifier(dev))
		return 0;
	kernel_netlink_disconnect(made, NULL);
	return err_set(err, EOPNOTSUPP,
		"this kernel's NBD driver gives devices no identifier (Linux 5.14)");
}

static void give_back(struct kernel_dev *dev)
{
	kernel_dev_disconnect(dev);
	if (dev->lock >= 0)
		close(take_fd(&dev->lock));
}

/* Whoever has it open for a moment keeps it busy. */
static int send_connect_patiently(struct kernel_dev *dev, struct err *err)
{
	int ret = send_connect(dev, (int)index_of(dev), err);

	for (unsigned waited_ms = 0; ret == -EBUSY && waited_ms < BUSY_TIMEOUT_MS;
		waited_ms += STEP_MS) {
		if (kernel_sysfs_server(dev->name))
			break;
		kernel_dev_sleep_ms(STEP_MS);
		ret = send_connect(dev, (int)index_of(dev), err);
	}
	return ret == -EBUSY ? kernel_dev_busy(dev->name, err) : ret;
}

static int connect_one(struct kernel_dev *dev, void *arg, struct err *err)
{
	int ret = kernel_dev_check_free(dev->name, err);

	if (!ret)
		ret = kernel_dev_connect(dev, err);
	if (!ret)
		ret = kernel_dev_lock(dev, err);
	if (!ret)
		ret = send_connect_patiently(dev, err);
	if (ret)
		give_back(dev);
	return ret;
}

/*
 * The driver makes one when all it has are taken, or gives us one that became free meanwhile: whoever holds that
 * one's lock then is about to find that it came too late.
 */
static int connect_another(struct kernel_dev *dev, struct err *err)
{
	int ret = kernel_dev_connect(dev, err);

	if (!ret)
		ret = send_connect(dev, -1, err);
	if (ret)
		return ret;
	ret = kernel_dev_lock(dev, err);
	for (unsigned waited_ms = 0; ret == -EBUSY && waited_ms < 2 * BUSY_TIMEOUT_MS;
		waited_ms += STEP_MS) {
		kernel_dev_sleep_ms(STEP_MS);
		ret = kernel_dev_lock(dev, err);
	}
	if (ret)
		kernel_netlink_disconnect(index_of(dev), NULL);
	return ret;
}

/* --- a device that is ours already ------------------------------------------------------------ */

/* Those that the driver did not take yet; their number. */
static unsigned left_of(const int *sockets, unsigned count, int *left)
{
	unsigned left_count = 0;

	for (unsigned i = 0; i < count; i++)
		if (!kernel_netlink_took(sockets[i]))
			left[left_count++] = sockets[i];
	return left_count;
}

/* Offers the new sockets until the driver took them all in the place of dead ones. */
static int replace_connections(struct kernel_dev *dev, struct err *err)
{
	struct kernel_netlink message = message_for(dev);
	int left[KERNEL_CONNECTIONS_MAX];
	int ret;

	message.timeout_s = TAKING_TIMEOUT_S;
	message.sockets = left;
	for (unsigned waited_ms = 0;; waited_ms += STEP_MS) {
		message.socket_count = left_of(dev->kernel_sock, dev->opts.connections, left);
		if (!message.socket_count)
			break;
		if (waited_ms > OWNER_TIMEOUT_MS)
			return err_set(err, ETIMEDOUT,
				"its old connections do not end: does a server of it still run?");
		if (waited_ms)
			kernel_dev_sleep_ms(STEP_MS);
		ret = kernel_netlink_reconfigure(&message, err);
		if (ret)
			return ret;
	}
	message.socket_count = 0;
	message.timeout_s = kernel_dev_driver_timeout_s(dev);
	message.dead_timeout_s = dev->opts.dead_timeout_s;
	for (unsigned i = 0; i < dev->opts.connections; i++)
		kernel_netlink_unmark(dev->kernel_sock[i]);
	ret = kernel_netlink_reconfigure(&message, err);
	if (!ret && !kernel_receivers_run(dev->name, dev->opts.connections))
		log_warning("/dev/%s: the driver does not receive on all of its %u new "
			    "connections: it repeats the requests on those after their time-out, "
			    "%u s, on the others",
			dev->name, dev->opts.connections, kernel_dev_driver_timeout_s(dev));
	return ret;
}

/* Its last owner may be about to end. */
static int lock_own(struct kernel_dev *dev, struct err *err)
{
	struct kernel_lock_note last;
	int ret = kernel_lock_take(dev->name, &dev->lock, &last, err);

	for (unsigned waited_ms = 0; ret == -EBUSY && waited_ms < OWNER_TIMEOUT_MS;
		waited_ms += STEP_MS) {
		kernel_dev_sleep_ms(STEP_MS);
		ret = kernel_lock_take(dev->name, &dev->lock, &last, err);
	}
	if (!ret && last.connections && last.connections <= KERNEL_CONNECTIONS_MAX)
		dev->opts.connections = last.connections;
	return ret;
}

/* What cannot be changed while it is connected must be as it is. */
static int check_shape(struct kernel_dev *dev, struct err *err)
{
	uint64_t block_size = 0, sectors = 0, read_only = 0;

	kernel_sysfs_number(dev->name, "queue/logical_block_size", &block_size);
	kernel_sysfs_number(dev->name, "size", &sectors);
	kernel_sysfs_number(dev->name, "ro", &read_only);
	dev->size_bytes = sectors * 512;
	if (block_size != dev->opts.block_size)
		return err_set(err, EBUSY, "still connected with a block size of %lu, not %u",
			(unsigned long)block_size, dev->opts.block_size);
	if (dev->size_bytes > dev->opts.size_bytes)
		return err_set(err, EBUSY,
			"still connected with %lu bytes, but its disk has only %lu",
			(unsigned long)dev->size_bytes, (unsigned long)dev->opts.size_bytes);
	if (!read_only && (dev->opts.flags & NBD_FLAG_READ_ONLY))
		return err_set(err, EBUSY, "still connected for writing, but is to be read-only");
	return 0;
}

/* Under another name than is asked for it is not the device that the config means. */
static int take_up(struct kernel_dev *dev, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];
	int ret = 0;

	snprintf(path, sizeof(path), "/dev/%s", dev->name);
	if (strcmp(dev->device, "auto") && strcmp(dev->device, path))
		ret = err_set(err, EBUSY, "still connected from before, but %s is asked for",
			dev->device);
	if (!ret)
		ret = lock_own(dev, err);
	if (!ret)
		ret = check_shape(dev, err);
	if (!ret)
		ret = kernel_dev_connect(dev, err);
	if (!ret)
		ret = replace_connections(dev, err);
	dev->adopted = true; /* whatever happens here, it is not ours to disconnect */
	return ret ? err_wrap(err, "%s", path) : 0;
}

/* The first one that was attached for its export and fits; false: there is none. */
static bool find(struct kernel_dev *dev, bool (*fits)(const struct kernel_dev *dev))
{
	CLEANUP(free) unsigned *indices = NULL;
	size_t count = 0;

	if (kernel_sysfs_list(&indices, &count, NULL))
		return false;
	for (size_t i = 0; i < count; i++) {
		snprintf(dev->name, sizeof(dev->name), "nbd%u", indices[i]);
		if (has_identifier(dev) && fits(dev))
			return true;
	}
	return false;
}

static bool is_left(const struct kernel_dev *dev)
{
	return kernel_sysfs_server(dev->name) && !kernel_lock_holder(dev->name, NULL);
}

bool kernel_dev_find_left(const char *export, char name[KERNEL_NAME_LEN])
{
	struct kernel_dev dev = {};

	kernel_dev_identify(&dev, export);
	if (!find(&dev, is_left))
		return false;
	snprintf(name, KERNEL_NAME_LEN, "%s", dev.name);
	return true;
}

/* --- what the common part calls --------------------------------------------------------------- */

static int claim_any(struct kernel_dev *dev, struct err *err)
{
	if (find(dev, is_connected))
		return take_up(dev, err);
	dev->name[0] = '\0';

	int ret = kernel_dev_try(dev, connect_one, NULL, err);

	if (ret == -EBUSY && !strcmp(dev->device, "auto"))
		return connect_another(dev, err);
	return ret;
}

static int netlink_set_size(struct kernel_dev *dev, uint64_t size_bytes, struct err *err)
{
	struct kernel_netlink message = message_for(dev);

	message.size_bytes = size_bytes;
	return kernel_netlink_reconfigure(&message, err);
}

static int netlink_disconnect(struct kernel_dev *dev, struct err *err)
{
	if (!has_identifier(dev))
		return 0; /* the thread sees it too */
	return kernel_netlink_disconnect(index_of(dev), err);
}

static int netlink_claim(struct kernel_dev *dev, struct err *err)
{
	int ret = kernel_netlink_probe(err);

	if (!ret)
		ret = claim_any(dev, err);
	if (ret)
		return ret;
	kernel_dev_note(dev);
	if (!dev->adopted)
		kernel_memory_forget(dev->name); /* an earlier device's */
	ret = start_watching(dev, err);
	if (ret && !dev->adopted)
		netlink_disconnect(dev, NULL);
	return ret;
}

/* The lock and the watch of a device that is connected. */
static int go_on(struct kernel_dev *dev, struct err *err)
{
	unsigned connections = dev->opts.connections;

	dev->adopted = true;
	int ret = lock_own(dev, err);
	dev->opts.connections = connections;
	if (ret)
		return ret;
	if (!has_identifier(dev) || !is_connected(dev))
		return err_set(err, ENODEV, "the driver does not have it any more");
	kernel_dev_note(dev);
	return start_watching(dev, err);
}

int kernel_dev_adopt(const struct kernel_dev_opts *opts, const char *name,
	const struct kernel_ends *ends, void (*on_end)(void *arg, int reason), void *arg,
	struct kernel_dev **dev, struct err *err)
{
	int ret = kernel_dev_check(opts, err);

	if (ret)
		return ret;
	struct kernel_dev *new = kernel_dev_new(opts, on_end, arg);
	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	new->how = &kernel_dev_by_netlink;
	new->settled = true;
	snprintf(new->name, sizeof(new->name), "%s", name);
	for (unsigned i = 0; i < ends->count && !ret; i++) {
		new->kernel_sock[i] = fcntl(ends->driver[i], F_DUPFD_CLOEXEC, 0);
		if (new->kernel_sock[i] < 0)
			ret = err_sys(err, errno, "a socket's descriptor");
	}
	if (!ret)
		ret = go_on(new, err);
	if (ret)
		kernel_dev_free(new);
	else
		*dev = new;
	return ret;
}

int kernel_dev_reconnect(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err)
{
	if (dev->how->mode != KERNEL_DEV_NETLINK)
		return err_set(err, EOPNOTSUPP,
			"/dev/%s is attached by ioctl: its connections cannot be replaced",
			dev->name);
	pthread_mutex_lock(&dev->mutex);
	/* They die when shut, and not just when closed: whoever serves them has descriptors too. */
	for (unsigned i = 0; i < dev->opts.connections; i++)
		shutdown(dev->kernel_sock[i], SHUT_RDWR);
	kernel_dev_disconnect(dev);

	int ret = kernel_dev_connect(dev, err);

	pthread_mutex_unlock(&dev->mutex);
	eventfd_write(dev->wake, 1);
	if (!ret)
		ret = replace_connections(dev, err);
	if (!ret)
		ret = kernel_dev_hand_out(dev, ends, err);
	return ret ? err_wrap(err, "/dev/%s", dev->name) : 0;
}

static void netlink_stop(struct kernel_dev *dev)
{
	pthread_mutex_lock(&dev->mutex);
	bool ended = dev->state == ENDED;
	dev->quit = true;
	pthread_mutex_unlock(&dev->mutex);
	/* Opening it, to see who uses it, could wait for requests that nobody answers. */
	if (dev->has_thread && !ended && !dev->settled && !dev->adopted)
		netlink_disconnect(dev, NULL);
	if (dev->wake >= 0)
		eventfd_write(dev->wake, 1);
}

const struct kernel_dev_how kernel_dev_by_netlink = {
	.mode = KERNEL_DEV_NETLINK,
	.claim = netlink_claim,
	.set_size = netlink_set_size,
	.disconnect = netlink_disconnect,
	.stop = netlink_stop,
};
