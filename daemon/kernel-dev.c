/*
 * One kernel NBD device; see kernel-dev.h. Here is what is the same for both ways to tell the driver, which are
 * kernel-dev-ioctl.c and kernel-dev-netlink.c.
 *
 * Which way: netlink, where the kernel has it, since such a device and what is mounted on it survive the death of
 * every process of ours. By ioctl it dies with the process that attached it, but that works on every
 * kernel, and in containers, whose network namespace the driver's netlink family is not part of.
 *
 * - Block size defaults to 1024, and time-out, request size and scheduler outlive an attach: all of
 *   them are set every time.
 * - Partitions are read at the first open after the attach.
 * - Newer kernels (6.12) hold new requests back while the size changes, until those in flight are done, with
 *   the driver's lock held. If those never end, neither does the call, and nothing else gets at the device. So
 *   requests must be moving before the size is set, and whoever waits hears why.
 */
#include "daemon/kernel-dev.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/nbd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/process.h"
#include "base/util.h"
#include "daemon/kernel-dev_private.h"
#include "daemon/kernel-lock.h"
#include "daemon/kernel-memory.h"
#include "daemon/kernel-udev.h"
#include "daemon/kernel-users.h"
#include "rt/buf.h"

#define END_TIMEOUT_MS 10000 /* for the server to close its ends and the driver to let go */
#define OPENERS_TIMEOUT_MS \
	2000 /* udev and friends look at a device for a moment after each change */
#define BLOCK_SIZE_MIN 512
#define BLOCK_SIZE_MAX 4096

#define PROGRESS_TIMEOUT_MS \
	10000 /* with requests in flight none of which ends: the disk is stalled */
#define PROGRESS_STEP_MS 10
#define RESIZE_WORD_S    5 /* a size that takes longer is worth a word, each time */

/*
 * Without us 128 (Linux 6.1) or 1280 (6.12). Larger ones gain nothing more, and one that does not fit a
 * pooled buffer costs fresh memory each time, which makes it several times slower.
 */
#define MAX_REQUEST_KIB 1024

_Static_assert(
	MAX_REQUEST_KIB * 1024 <= BUF_POOLED_MAX_BYTES, "kernel requests fit pooled buffers");

/* "Never" where the driver must be given a number: longer than any disk takes that will answer at all. */
#define SEVERAL_TIMEOUT_S 3600

/* See kernel-dev-netlink.c. Requests that are slow draw a line in the kernel's log as often as this. */
#define REPLAY_MS "3000"

/*
 * CAN_MULTI_CONN comes with several connections. WRITE_ZEROES means something since Linux 6.8, where a
 * refusal would be an I/O error: the server never refuses it.
 */
#define FLAG_SEND_WRITE_ZEROES (1 << 6)
#define USABLE_FLAGS                                                                         \
	(NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | \
		NBD_FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES)

void kernel_dev_sleep_ms(unsigned ms)
{
	nanosleep(&(struct timespec){ .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L }, NULL);
}

const char *kernel_dev_name(const struct kernel_dev *dev)
{
	return dev->name;
}

enum kernel_dev_mode kernel_dev_mode(const struct kernel_dev *dev)
{
	return dev->how->mode;
}

bool kernel_dev_adopted(const struct kernel_dev *dev)
{
	return dev->adopted;
}

static bool has_ended(const struct kernel_dev *dev)
{
	pthread_mutex_t *mutex = (pthread_mutex_t *)&dev->mutex;

	pthread_mutex_lock(mutex);
	bool ended = dev->state == ENDED;
	pthread_mutex_unlock(mutex);
	return ended;
}

/* What the driver gave up may be somebody else's by now. */
static int check_ours(const struct kernel_dev *dev, struct err *err)
{
	if (!has_ended(dev))
		return 0;
	return err_set(err, ENODEV, "/dev/%s: the kernel has given it up", dev->name);
}

static void device_path(const struct kernel_dev *dev, char path[KERNEL_NAME_LEN + 8])
{
	snprintf(path, KERNEL_NAME_LEN + 8, "/dev/%s", dev->name);
}

/* --- connections ------------------------------------------------------------------------------ */

uint64_t kernel_dev_driver_flags(const struct kernel_dev *dev)
{
	uint64_t flags = dev->opts.flags & USABLE_FLAGS;

	/* The driver takes FUA alone for a write cache. */
	if (!(flags & NBD_FLAG_SEND_FLUSH))
		flags &= ~(uint64_t)NBD_FLAG_SEND_FUA;
	if (dev->opts.connections > 1)
		flags |= NBD_FLAG_CAN_MULTI_CONN;
	return flags;
}

/* With several connections the driver's "never" means the queue's 30 s, and then it kills them. */
uint32_t kernel_dev_driver_timeout_s(const struct kernel_dev *dev)
{
	if (!dev->opts.timeout_s && dev->opts.connections > 1)
		return SEVERAL_TIMEOUT_S;
	return dev->opts.timeout_s;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(take_fd(fd));
}

void kernel_ends_close(struct kernel_ends *ends)
{
	for (unsigned i = 0; i < ends->count; i++) {
		close_fd(&ends->server[i]);
		close_fd(&ends->driver[i]);
	}
	ends->count = 0;
}

int kernel_dev_connect(struct kernel_dev *dev, struct err *err)
{
	for (unsigned i = 0; i < dev->opts.connections; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			return err_sys(err, errno, "socketpair");
		dev->kernel_sock[i] = pair[0];
		dev->server_sock[i] = pair[1];
	}
	return 0;
}

void kernel_dev_disconnect(struct kernel_dev *dev)
{
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++) {
		close_fd(&dev->kernel_sock[i]);
		close_fd(&dev->server_sock[i]);
	}
}

int kernel_dev_hand_out(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err)
{
	ends->count = 0;
	for (unsigned i = 0; i < dev->opts.connections; i++) {
		ends->driver[i] = fcntl(dev->kernel_sock[i], F_DUPFD_CLOEXEC, 0);
		if (ends->driver[i] < 0) {
			int ret = err_sys(err, errno, "a socket's descriptor");

			kernel_ends_close(ends);
			return ret;
		}
		ends->server[i] = take_fd(&dev->server_sock[i]);
		ends->count++;
	}
	return 0;
}

/* --- claiming --------------------------------------------------------------------------------- */

int kernel_dev_busy(const char *name, struct err *err)
{
	pid_t keeper = kernel_lock_holder(name, NULL);
	pid_t server = keeper > 0 ? keeper : kernel_sysfs_server(name);
	struct err users = { 0 };
	char server_name[PROCESS_NAME_LEN];

	if (server && process_name(server, server_name))
		return err_set(err, EBUSY, "in use: served by %s (%d)", server_name, (int)server);
	kernel_users_check(name, NULL, 0, &users);
	if (server)
		return err_set(err, EBUSY, "its server is gone but it is still in use%s%s",
			users.text[0] ? ": " : "", users.text);
	return err_set(err, EBUSY, "in use%s%s", users.text[0] ? ": " : "", users.text);
}

int kernel_dev_check_free(const char *name, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];

	snprintf(path, sizeof(path), "/dev/%s", name);
	if (kernel_sysfs_server(name))
		return kernel_dev_busy(name, err);

	/* Mounted, swapped on or held by anything, in whatever namespace: then this fails. */
	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	if (exclusive < 0 && errno == EBUSY)
		return kernel_dev_busy(name, err);
	if (exclusive < 0 && errno == ENOENT)
		return err_set(err, ENODEV, "%s",
			kernel_sysfs_is_idle(name)
				? "the kernel has it but /dev has no node for it"
				: "no such device: the driver was loaded with fewer (nbds_max)");
	if (exclusive < 0)
		return err_sys(err, errno, "open");
	return kernel_sysfs_is_idle(name) ? 0 : kernel_dev_busy(name, err);
}

int kernel_dev_lock(struct kernel_dev *dev, struct err *err)
{
	struct kernel_lock_note last;
	int ret = kernel_lock_take(dev->name, &dev->lock, &last, err);

	return ret == -EBUSY ? ret : 0;
}

void kernel_dev_note(const struct kernel_dev *dev)
{
	const struct kernel_lock_note note = {
		.connections = dev->opts.connections,
		.attacher = kernel_sysfs_server(dev->name),
	};

	if (dev->lock >= 0)
		kernel_lock_note(dev->lock, &note);
}

static int try_all(struct kernel_dev *dev,
	int (*one)(struct kernel_dev *dev, void *arg, struct err *err), void *arg, struct err *err)
{
	CLEANUP(free) unsigned *indices = NULL;
	size_t count = 0;
	int ret = kernel_sysfs_list(&indices, &count, err);

	if (ret)
		return ret;
	for (size_t i = 0; i < count; i++) {
		snprintf(dev->name, sizeof(dev->name), "nbd%u", indices[i]);
		ret = one(dev, arg, err);
		if (ret != -EBUSY && ret != -ENODEV)
			return ret ? err_wrap(err, "/dev/%s", dev->name) : 0;
	}
	return err_set(err, EBUSY,
		"none of the %zu NBD devices is free: detach one, or load the "
		"driver with more (`modprobe nbd nbds_max=64`)",
		count);
}

int kernel_dev_try(struct kernel_dev *dev,
	int (*one)(struct kernel_dev *dev, void *arg, struct err *err), void *arg, struct err *err)
{
	int ret;

	if (!strcmp(dev->device, "auto"))
		return try_all(dev, one, arg, err);
	snprintf(dev->name, sizeof(dev->name), "%s", dev->device + strlen("/dev/"));
	ret = one(dev, arg, err);
	return ret ? err_wrap(err, "%s", dev->device) : 0;
}

void kernel_dev_set_state(struct kernel_dev *dev, enum kernel_dev_state state)
{
	pthread_mutex_lock(&dev->mutex);
	dev->state = state;
	pthread_cond_broadcast(&dev->changed);
	pthread_mutex_unlock(&dev->mutex);
}

void kernel_dev_end(struct kernel_dev *dev, int reason)
{
	pthread_mutex_lock(&dev->mutex);
	kernel_dev_end_fn *on_end = dev->on_end;

	if (!reason && dev->released)
		reason = KERNEL_DEV_RELEASED;
	dev->state = ENDED;
	dev->end_reason = reason;
	pthread_cond_broadcast(&dev->changed);
	pthread_mutex_unlock(&dev->mutex);
	on_end(dev->arg, reason);
}

void kernel_dev_tell_end(struct kernel_dev *dev, kernel_dev_end_fn *on_end)
{
	pthread_mutex_lock(&dev->mutex);
	bool ended = dev->state == ENDED;
	int reason = dev->end_reason;

	dev->on_end = on_end;
	pthread_mutex_unlock(&dev->mutex);
	if (ended)
		on_end(dev->arg, reason);
}

int kernel_dev_start_thread(struct kernel_dev *dev, void *(*run)(void *dev), struct err *err)
{
	sigset_t all, before;
	int ret;

	/* A signal would end what the thread waits in, and with it the device. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = pthread_create(&dev->thread, NULL, run, dev);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	dev->has_thread = !ret;
	return ret ? err_sys(err, ret, "a thread for %s", dev->device) : 0;
}

int kernel_dev_check(const struct kernel_dev_opts *opts, struct err *err)
{
	unsigned index;
	char rest;

	if (strcmp(opts->device, "auto") &&
		sscanf(opts->device, "/dev/nbd%u%c", &index, &rest) != 1)
		return err_set(err, EINVAL, "device \"%s\": must be \"/dev/nbdN\" or \"auto\"",
			opts->device);
	if (!is_pow2(opts->block_size) || opts->block_size < BLOCK_SIZE_MIN ||
		opts->block_size > BLOCK_SIZE_MAX)
		return err_set(err, EINVAL,
			"%s: a logical block size of %u: must be a power of two from %u to %u",
			opts->device, opts->block_size, BLOCK_SIZE_MIN, BLOCK_SIZE_MAX);
	if (!opts->connections || opts->connections > KERNEL_CONNECTIONS_MAX)
		return err_set(err, EINVAL, "%s: %u connections: must be 1 to %u", opts->device,
			opts->connections, KERNEL_CONNECTIONS_MAX);
	if (!is_aligned(opts->size_bytes, opts->block_size))
		return err_set(err, EINVAL,
			"%s: a size of %lu bytes is no multiple of its block size of %u: "
			"put a padded layer on top of the stack",
			opts->device, (unsigned long)opts->size_bytes, opts->block_size);
	return 0;
}

struct kernel_dev *kernel_dev_new(
	const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason), void *arg)
{
	struct kernel_dev *dev = calloc(1, sizeof(*dev));
	pthread_condattr_t clock;

	if (!dev)
		return NULL;
	*dev = (struct kernel_dev){ .opts = *opts,
		.size_bytes = opts->size_bytes,
		.fd = -1,
		.lock = -1,
		.wake = -1,
		.on_end = on_end,
		.arg = arg,
		.mutex = PTHREAD_MUTEX_INITIALIZER };
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++)
		dev->kernel_sock[i] = dev->server_sock[i] = -1;
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&dev->changed, &clock);
	snprintf(dev->device, sizeof(dev->device), "%s", opts->device);
	kernel_dev_identify(dev, opts->export);
	dev->opts.device = dev->device;
	dev->opts.export = dev->identifier + strlen(KERNEL_DEV_IDENTIFIER);
	return dev;
}

/* --- settling and resizing -------------------------------------------------------------------- */

static void set_queue(
	const struct kernel_dev *dev, const char *attr, const char *value, struct err *err)
{
	int ret = kernel_sysfs_write(dev->name, attr, value);

	if (ret && !err->code)
		err_sys(err, -ret, "%s = %s", attr, value);
}

int kernel_dev_lower_replay(struct kernel_dev *dev, struct err *err)
{
	struct err first = { 0 };

	if (dev->how->mode != KERNEL_DEV_NETLINK || kernel_dev_driver_timeout_s(dev))
		return 0;
	set_queue(dev, "queue/io_timeout", REPLAY_MS, &first);
	if (first.code)
		*err = first;
	return -first.code;
}

int kernel_dev_settle(struct kernel_dev *dev, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8], number[24];
	struct err first = { 0 };
	uint64_t limit_kib = MAX_REQUEST_KIB;
	int ret = check_ours(dev, err);

	if (ret)
		return ret;
	dev->settled = true;
	kernel_sysfs_number(dev->name, "queue/max_hw_sectors_kb", &limit_kib);
	snprintf(number, sizeof(number), "%u", (unsigned)MIN(limit_kib, (uint64_t)MAX_REQUEST_KIB));
	set_queue(dev, "queue/max_sectors_kb", number, &first);
	set_queue(dev, "queue/scheduler", "none", &first);
	set_queue(dev, "queue/rotational", "0", &first);
	if (!first.code)
		kernel_dev_lower_replay(dev, &first);
	if (!first.code && dev->size_bytes != dev->opts.size_bytes)
		kernel_dev_resize(
			dev, dev->opts.size_bytes, &first); /* grown while nobody served it */

	device_path(dev, path);

	int fd = open(path, O_RDONLY | O_CLOEXEC); /* reads the partition table */

	if (fd < 0 && !first.code)
		err_sys(&first, errno, "open");
	else if (fd >= 0)
		close(fd);
	if (!first.code)
		kernel_udev_announce(dev->name, &first);
	if (!first.code)
		return 0;
	*err = first;
	return err_wrap(err, "%s", path);
}

/* Requests ended since the attach, of all kinds: fields 1, 5, 12 and 16 of `stat`. */
static bool requests_done(const struct kernel_dev *dev, uint64_t *done)
{
	static const unsigned fields[] = { 0, 4, 11, 15 };
	char text[512], *rest = text;
	uint64_t numbers[16] = { 0 };

	if (kernel_sysfs_read(dev->name, "stat", text, sizeof(text)))
		return false;
	for (size_t i = 0; i < ARRAY_LEN(numbers); i++)
		numbers[i] = strtoull(rest, &rest, 10);
	*done = 0;
	for (size_t i = 0; i < ARRAY_LEN(fields); i++)
		*done += numbers[fields[i]];
	return true;
}

static int check_progress(const struct kernel_dev *dev, struct err *err)
{
	uint64_t before, now;

	if (!requests_done(dev, &before))
		return 0;
	for (unsigned waited_ms = 0; waited_ms < PROGRESS_TIMEOUT_MS;
		waited_ms += PROGRESS_STEP_MS) {
		if (kernel_sysfs_is_idle(dev->name) || !requests_done(dev, &now) || now != before)
			return 0;
		kernel_dev_sleep_ms(PROGRESS_STEP_MS);
	}
	return err_set(err, EBUSY,
		"not resized: none of its requests in flight ended for %u s; see what its disk "
		"waits for, "
		"then try again",
		PROGRESS_TIMEOUT_MS / 1000);
}

/* Says from time to time that it takes long, until told that it is over. */
struct resize_watch {
	const struct kernel_dev *dev;
	pthread_mutex_t mutex;
	pthread_cond_t over;
	bool is_over;
};

static void *resize_watch_thread(void *arg)
{
	struct resize_watch *watch = arg;
	struct timespec deadline;
	unsigned waited_s = 0;

	clock_gettime(CLOCK_REALTIME, &deadline);
	pthread_mutex_lock(&watch->mutex);
	while (!watch->is_over) {
		deadline.tv_sec += RESIZE_WORD_S;

		int ret = 0;

		while (!watch->is_over && !ret)
			ret = pthread_cond_timedwait(&watch->over, &watch->mutex, &deadline);
		if (watch->is_over)
			break;
		waited_s += RESIZE_WORD_S;
		log_warning(
			"/dev/%s: its size has been waiting for requests in flight for %u s; new "
			"requests wait as well",
			watch->dev->name, waited_s);
	}
	pthread_mutex_unlock(&watch->mutex);
	return NULL;
}

static int set_size_watched(struct kernel_dev *dev, uint64_t size_bytes, struct err *err)
{
	struct resize_watch watch = {
		.dev = dev,
		.mutex = PTHREAD_MUTEX_INITIALIZER,
		.over = PTHREAD_COND_INITIALIZER,
	};
	pthread_t thread;
	bool watched = !pthread_create(&thread, NULL, resize_watch_thread, &watch);
	int ret = dev->how->set_size(dev, size_bytes, err);

	pthread_mutex_lock(&watch.mutex);
	watch.is_over = true;
	pthread_cond_signal(&watch.over);
	pthread_mutex_unlock(&watch.mutex);
	if (watched)
		pthread_join(thread, NULL);
	return ret;
}

int kernel_dev_resize(struct kernel_dev *dev, uint64_t size_bytes, struct err *err)
{
	uint64_t seen_sectors = 0;
	int ret = check_ours(dev, err);

	if (ret)
		return ret;
	if (!is_aligned(size_bytes, dev->opts.block_size))
		return err_set(err, EINVAL,
			"/dev/%s: %lu bytes is no multiple of its block size of %u", dev->name,
			(unsigned long)size_bytes, dev->opts.block_size);
	ret = check_progress(dev, err);
	if (!ret)
		ret = set_size_watched(dev, size_bytes, err);
	if (ret)
		return err_wrap(err, "/dev/%s", dev->name);
	dev->opts.size_bytes = dev->size_bytes = size_bytes;
	if (!kernel_sysfs_number(dev->name, "size", &seen_sectors) ||
		seen_sectors * 512 != size_bytes)
		return err_set(err, EIO, "/dev/%s: still %lu bytes after its size was set to %lu",
			dev->name, (unsigned long)seen_sectors * 512, (unsigned long)size_bytes);
	return 0;
}

/* --- releasing -------------------------------------------------------------------------------- */

/* Waits a moment for those who only look; the exclusive claim keeps new users of substance away. */
static int check_unused(const struct kernel_dev *dev, int exclusive, struct err *err)
{
	const int own_fds[] = { dev->fd, exclusive };

	for (unsigned waited_ms = 0;; waited_ms += OPENERS_TIMEOUT_MS / 10) {
		int ret = kernel_users_check(dev->name, own_fds, ARRAY_LEN(own_fds), err);

		if (!ret && exclusive >= 0)
			return 0;
		if (!ret)
			return err_set(err, EBUSY,
				"mounted in another mount namespace, or held by the kernel");
		if (exclusive < 0 || waited_ms >= OPENERS_TIMEOUT_MS)
			return ret;
		kernel_dev_sleep_ms(OPENERS_TIMEOUT_MS / 10);
	}
}

int kernel_dev_users(const struct kernel_dev *dev, bool open_it, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];

	if (has_ended(dev))
		return 0;
	if (!open_it)
		return kernel_users_check(dev->name, &dev->fd, 1, err);
	device_path(dev, path);

	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	return check_unused(dev, exclusive, err) ? err_wrap(err, "%s is in use", path) : 0;
}

static bool wait_until_ended(struct kernel_dev *dev)
{
	struct timespec deadline;
	int ret = 0;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += END_TIMEOUT_MS / 1000;
	pthread_mutex_lock(&dev->mutex);
	while (dev->state != ENDED && !ret)
		ret = pthread_cond_timedwait(&dev->changed, &dev->mutex, &deadline);
	pthread_mutex_unlock(&dev->mutex);
	return !ret;
}

/* The file system mounted on it first (the ioctl does, but tells no errors), then its own cache. */
static int write_back_fd(int fd)
{
	ioctl(fd, BLKFLSBUF, 0);
	return fsync(fd) ? -errno : 0;
}

/* Or the disk itself. */
static int write_back_partition(const char *partition, void *arg)
{
	int *first_error = arg;
	char path[KERNEL_NAME_LEN + 8];

	snprintf(path, sizeof(path), "/dev/%.*s", KERNEL_NAME_LEN - 1, partition);

	CLEANUP(fd) int fd = open(path, O_RDONLY | O_CLOEXEC);
	int ret = fd < 0 ? -errno : write_back_fd(fd);

	if (ret && !*first_error)
		*first_error = ret;
	return 0;
}

/* All of it, whatever fails; the first error. */
static int write_back(const struct kernel_dev *dev)
{
	int first_error = 0;

	kernel_sysfs_partitions(dev->name, write_back_partition, &first_error);
	write_back_partition(dev->name, &first_error);
	return first_error;
}

/*
 * udev looks at a device when it was written to or unmounted, and would find it dead half-way, for the kernel to log
 * as I/O errors. It leaves a locked one alone (systemd's "Locking Block Device Access"). Best effort.
 */
static void keep_udev_away(int exclusive)
{
	for (unsigned waited_ms = 0; waited_ms < OPENERS_TIMEOUT_MS;
		waited_ms += OPENERS_TIMEOUT_MS / 10) {
		if (exclusive < 0 || !flock(exclusive, LOCK_EX | LOCK_NB))
			return;
		kernel_dev_sleep_ms(OPENERS_TIMEOUT_MS / 10);
	}
}

/* All its connections are broken: whoever as much as opens it waits for others, up to its time-out. */
static bool is_cut_off(struct kernel_dev *dev)
{
	struct pollfd fds[KERNEL_CONNECTIONS_MAX];
	unsigned count = dev->opts.connections;

	if (dev->how->mode != KERNEL_DEV_NETLINK)
		return false; /* it ends with its connections */
	pthread_mutex_lock(&dev->mutex);
	for (unsigned i = 0; i < count; i++)
		fds[i] = (struct pollfd){ .fd = dev->kernel_sock[i] };
	pthread_mutex_unlock(&dev->mutex);
	return poll(fds, count, 0) == (int)count;
}

/* Its users, its cache; then it can go. */
static int prepare_release(struct kernel_dev *dev, bool force, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];
	int ret;

	device_path(dev, path);

	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	ret = force ? 0 : check_unused(dev, exclusive, err);
	if (ret)
		return err_wrap(err, "%s is in use", path);
	keep_udev_away(exclusive);
	ret = write_back(dev);
	if (ret && !force)
		return err_sys(
			err, -ret, "%s stays attached: its cache cannot be written back", path);
	return 0;
}

static void set_released(struct kernel_dev *dev, bool released)
{
	pthread_mutex_lock(&dev->mutex);
	dev->released = released;
	pthread_mutex_unlock(&dev->mutex);
}

int kernel_dev_release(struct kernel_dev *dev, bool force, struct err *err)
{
	bool cut_off = is_cut_off(dev);
	int ret = 0;

	if (has_ended(dev))
		return 0;
	if (cut_off && !force)
		return err_set(err, EIO,
			"/dev/%s stays attached: its connections are broken, so its cache cannot "
			"be written back",
			dev->name);
	if (!cut_off)
		ret = prepare_release(dev, force, err);
	if (ret)
		return ret;
	set_released(dev, true);
	ret = dev->how->disconnect(dev, err);
	if (ret) {
		set_released(dev, false);
		return err_wrap(err, "/dev/%s", dev->name);
	}
	if (wait_until_ended(dev))
		return 0;
	dev->how->stop(dev);
	if (wait_until_ended(dev))
		return 0;
	return err_set(err, ETIMEDOUT, "/dev/%s: requests in flight do not end", dev->name);
}

bool kernel_dev_stays(const struct kernel_dev *dev)
{
	return dev->has_thread && dev->how->mode == KERNEL_DEV_NETLINK && !has_ended(dev) &&
	       (dev->settled || dev->adopted);
}

void kernel_dev_disown(struct kernel_dev *dev)
{
	/* Nobody reads them: telling the driver would wait for room. */
	for (unsigned i = 0; i < dev->opts.connections; i++)
		shutdown(dev->kernel_sock[i], SHUT_RDWR);
	dev->settled = dev->adopted = false;
}

void kernel_dev_free(struct kernel_dev *dev)
{
	char path[KERNEL_NAME_LEN + 8];

	if (!dev)
		return;
	bool stays = kernel_dev_stays(dev);

	if (dev->how)
		dev->how->stop(dev);
	if (dev->has_thread)
		pthread_join(dev->thread, NULL);
	kernel_dev_disconnect(dev);
	close_fd(&dev->fd);
	close_fd(&dev->wake);
	if (dev->has_thread && !stays) {
		/* An open notices that the disk is gone and drops the nodes of its partitions. */
		device_path(dev, path);
		dev->fd = open(path, O_RDONLY | O_CLOEXEC);
		close_fd(&dev->fd);
		kernel_memory_forget(dev->name);
	}
	close_fd(&dev->lock);
	pthread_cond_destroy(&dev->changed);
	pthread_mutex_destroy(&dev->mutex);
	free(dev);
}
