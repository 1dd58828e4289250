/*
 * One kernel NBD device, driven by ioctl; see kernel-dev.h. How the driver behaves, and why this is
 * in the order it is in:
 *
 * - The first thread that gives the driver a socket (NBD_SET_SOCK) owns the device; later ones get
 *   EBUSY. That thread must do the whole set-up, and NBD_DO_IT keeps it until the end. So: one
 *   thread per device. Size and block size of a device in use could be changed by anybody with
 *   an ioctl, so nothing is set before the socket was accepted.
 * - NBD_SET_SOCK waits for requests in flight, so a device that is visibly connected (`pid` in sysfs)
 *   or exclusively open is not even asked. One that its server left behind, and that is still
 *   open somewhere, lets itself be claimed but refuses NBD_DO_IT (EBUSY, EINVAL): the next one then.
 * - Block size defaults to 1024, and time-out, request size and scheduler outlive an attach: all of
 *   them are set every time.
 * - Partitions are read at the first open after NBD_DO_IT began. An ioctl waits for the driver's lock,
 *   which DO_IT holds until the device is whole: that is how we know.
 * - The device is opened read-only: ioctls need a capability, not write access, and an open
 *   writer would keep newer kernels from mounting it.
 * - Our open descriptor keeps the kernel from writing the device's cache back at the last close
 *   of its users, so release() does that.
 */
#include "daemon/kernel-dev.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/nbd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/kernel-udev.h"
#include "daemon/kernel-users.h"
#include "rt/buf.h"

#define START_TIMEOUT_MS 10000 /* for DO_IT to begin: it takes microseconds on a healthy kernel */
#define END_TIMEOUT_MS   10000 /* for the server to close its end and DO_IT to return */
#define OPENERS_TIMEOUT_MS \
	2000 /* udev and friends look at a device for a moment after each change */
#define POLL_STEP_MS   2
#define BLOCK_SIZE_MIN 512
#define BLOCK_SIZE_MAX 4096

/*
 * Without us 128 (Linux 6.1) or 1280 (6.12). Larger ones gain nothing more, and one that does not fit a
 * pooled buffer costs fresh memory each time, which makes it several times slower.
 */
#define MAX_REQUEST_KIB 1024

_Static_assert(
	MAX_REQUEST_KIB * 1024 <= BUF_POOLED_MAX_BYTES, "kernel requests fit pooled buffers");

/* "Never" where the driver must be given a number: longer than any disk takes that will answer at all. */
#define SEVERAL_TIMEOUT_S 3600

/*
 * CAN_MULTI_CONN comes with several connections. WRITE_ZEROES means something since Linux 6.8, where a
 * refusal would be an I/O error: the server never refuses it.
 */
#define FLAG_SEND_WRITE_ZEROES (1 << 6)
#define USABLE_FLAGS                                                                         \
	(NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | \
		NBD_FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES)

enum state { CLAIMING, STARTING, RUNNING, ENDED };

struct kernel_dev {
	struct kernel_dev_opts opts; /* opts.device is not used after the claim */
	char name[KERNEL_NAME_LEN];
	int fd; /* the device */
	int kernel_sock
		[KERNEL_CONNECTIONS_MAX]; /* the driver's ends: shut down, they end everything */
	int server_sock[KERNEL_CONNECTIONS_MAX]; /* until handed out */

	pthread_t thread;
	bool has_thread;
	void (*on_end)(void *arg, int reason);
	void *arg;

	pthread_mutex_t mutex; /* of what follows */
	pthread_cond_t changed;
	enum state state;
	struct err claim_err; /* of a claim that failed */
};

static void sleep_ms(unsigned ms)
{
	nanosleep(&(struct timespec){ .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L }, NULL);
}

const char *kernel_dev_name(const struct kernel_dev *dev)
{
	return dev->name;
}

enum kernel_dev_mode kernel_dev_mode(const struct kernel_dev *dev)
{
	return KERNEL_DEV_IOCTL;
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

/* Ends all connections, and with them the device. */
static void shut_connections(const struct kernel_dev *dev)
{
	for (unsigned i = 0; i < dev->opts.connections; i++)
		if (dev->kernel_sock[i] >= 0)
			shutdown(dev->kernel_sock[i], SHUT_RDWR);
}

/* --- the device's thread ---------------------------------------------------------------------- */

static void close_claim(struct kernel_dev *dev)
{
	close_fd(&dev->fd);
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++) {
		close_fd(&dev->kernel_sock[i]);
		close_fd(&dev->server_sock[i]);
	}
}

/* Says why a device is not free as precisely as can be found out; -EBUSY. */
static int busy(const char *name, struct err *err)
{
	pid_t server = kernel_sysfs_server(name);
	struct err users = { 0 };
	char path[64], comm[32] = "";

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)server);

	CLEANUP(file) FILE *file = server ? fopen(path, "re") : NULL;

	if (file && fgets(comm, sizeof(comm), file))
		comm[strcspn(comm, "\n")] = '\0';
	if (comm[0])
		return err_set(err, EBUSY, "in use: served by %s (%d)", comm, (int)server);
	kernel_users_check(name, NULL, 0, &users);
	if (server)
		return err_set(err, EBUSY, "its server is gone but it is still in use%s%s",
			users.text[0] ? ": " : "", users.text);
	return err_set(err, EBUSY, "in use%s%s", users.text[0] ? ": " : "", users.text);
}

static int open_device(struct kernel_dev *dev, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];

	snprintf(path, sizeof(path), "/dev/%s", dev->name);
	if (kernel_sysfs_server(dev->name))
		return busy(dev->name, err);

	/* Mounted, swapped on or held by anything, in whatever namespace: then this fails. */
	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	if (exclusive < 0 && errno == EBUSY)
		return busy(dev->name, err);
	if (exclusive < 0 && errno == ENOENT)
		return err_set(err, ENODEV, "%s",
			kernel_sysfs_is_idle(dev->name)
				? "the kernel has it but /dev has no node for it"
				: "no such device: the driver was loaded with fewer (nbds_max)");
	if (exclusive < 0)
		return err_sys(err, errno, "open");
	if (!kernel_sysfs_is_idle(dev->name))
		return busy(dev->name, err);
	dev->fd = open(path, O_RDONLY | O_CLOEXEC);
	return dev->fd < 0 ? err_sys(err, errno, "open") : 0;
}

static unsigned long driver_flags(const struct kernel_dev_opts *opts)
{
	unsigned long flags = opts->flags & USABLE_FLAGS;

	if (!(flags & NBD_FLAG_SEND_FLUSH))
		flags &= ~(
			unsigned long)NBD_FLAG_SEND_FUA; /* the driver takes it for a write cache */
	if (opts->connections > 1)
		flags |= NBD_FLAG_CAN_MULTI_CONN;
	return flags;
}

/* What the driver is told: with several connections its "0" means the queue's 30 s, and then it kills them. */
static uint32_t driver_timeout_s(const struct kernel_dev_opts *opts)
{
	if (!opts->timeout_s && opts->connections > 1)
		return SEVERAL_TIMEOUT_S;
	return opts->timeout_s;
}

static int make_connections(struct kernel_dev *dev, struct err *err)
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

static int set_up_device(struct kernel_dev *dev, struct err *err)
{
	const struct kernel_dev_opts *opts = &dev->opts;
	unsigned long flags = driver_flags(opts);
	uint32_t timeout_s = driver_timeout_s(opts);
	int ret = make_connections(dev, err);

	if (ret)
		return ret;
	for (unsigned i = 0; i < opts->connections; i++)
		if (ioctl(dev->fd, NBD_SET_SOCK, (unsigned long)dev->kernel_sock[i]))
			return errno == EBUSY ? busy(dev->name, err)
					      : err_sys(err, errno, "NBD_SET_SOCK");
	if (ioctl(dev->fd, NBD_SET_BLKSIZE, (unsigned long)opts->block_size))
		return err_sys(err, errno, "NBD_SET_BLKSIZE %u", opts->block_size);
	if (ioctl(dev->fd, NBD_SET_SIZE, (unsigned long)opts->size_bytes))
		return err_sys(err, errno, "NBD_SET_SIZE %lu", (unsigned long)opts->size_bytes);
	if (ioctl(dev->fd, NBD_SET_TIMEOUT, (unsigned long)timeout_s))
		return err_sys(err, errno, "NBD_SET_TIMEOUT %u", timeout_s);
	if (ioctl(dev->fd, NBD_SET_FLAGS, flags))
		return err_sys(err, errno, "NBD_SET_FLAGS %#lx", flags);
	return 0;
}

/*
 * Claims one device and lends the driver this thread until it gives the device up. -EBUSY while the
 * claim is not handed out: try another one.
 */
static int run_device(struct kernel_dev *dev, int *reason, struct err *err)
{
	int ret = open_device(dev, err);

	if (!ret)
		ret = set_up_device(dev, err);
	if (ret)
		return ret;
	/* The socket is ours, so nobody else can start this device now: `pid` is a left-over, or ours later. */
	if (kernel_sysfs_server(dev->name)) {
		ioctl(dev->fd, NBD_CLEAR_SOCK, 0);
		return busy(dev->name, err);
	}
	pthread_mutex_lock(&dev->mutex);
	dev->state = STARTING;
	pthread_cond_broadcast(&dev->changed);
	pthread_mutex_unlock(&dev->mutex);

	ret = ioctl(dev->fd, NBD_DO_IT, 0) ? errno : 0;
	ioctl(dev->fd, NBD_CLEAR_SOCK, 0);

	pthread_mutex_lock(&dev->mutex);
	bool started = dev->state == RUNNING;

	if (!started)
		dev->state = CLAIMING;
	pthread_mutex_unlock(&dev->mutex);
	if (!started && (ret == EBUSY || ret == EINVAL))
		return busy(dev->name, err);
	if (!started)
		return err_sys(err, ret ? ret : EIO, "ended before it was ready");
	*reason = ret;
	return 0;
}

static int claim_first_free(struct kernel_dev *dev, int *reason, struct err *err)
{
	CLEANUP(free) unsigned *indices = NULL;
	size_t count = 0;
	int ret = kernel_sysfs_list(&indices, &count, err);

	if (ret)
		return ret;
	for (size_t i = 0; i < count; i++) {
		snprintf(dev->name, sizeof(dev->name), "nbd%u", indices[i]);
		ret = run_device(dev, reason, err);
		if (ret != -EBUSY && ret != -ENODEV)
			return ret ? err_wrap(err, "/dev/%s", dev->name) : 0;
		close_claim(dev);
	}
	return err_set(err, EBUSY,
		"none of the %zu NBD devices is free: detach one, or load the "
		"driver with more (`modprobe nbd nbds_max=64`)",
		count);
}

static void *device_thread(void *arg)
{
	struct kernel_dev *dev = arg;
	struct err err = { 0 };
	int reason = 0, ret;

	if (!strcmp(dev->opts.device, "auto")) {
		ret = claim_first_free(dev, &reason, &err);
	} else {
		ret = run_device(dev, &reason, &err);
		if (ret)
			err_wrap(&err, "%s", dev->opts.device);
	}
	pthread_mutex_lock(&dev->mutex);
	dev->state = ENDED;
	dev->claim_err = err;
	pthread_cond_broadcast(&dev->changed);
	pthread_mutex_unlock(&dev->mutex);
	if (!ret)
		dev->on_end(dev->arg, reason);
	return NULL;
}

/* --- the owner's side ------------------------------------------------------------------------- */

/* Waits until the state is `state` or ENDED; false at the time-out. Called with the mutex held. */
static bool wait_for_state(struct kernel_dev *dev, enum state state, unsigned timeout_ms)
{
	struct timespec deadline;
	int ret = 0;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += timeout_ms / 1000;
	while (dev->state != state && dev->state != ENDED && !ret)
		ret = pthread_cond_timedwait(&dev->changed, &dev->mutex, &deadline);
	return !ret;
}

/*
 * Until the driver has the device whole. The mutex is held over the look and the step from STARTING
 * to RUNNING, so that the thread cannot turn to another device in between.
 */
static int wait_until_running(struct kernel_dev *dev, struct err *err)
{
	int ret = 0;

	for (unsigned waited_ms = 0; !ret; waited_ms += POLL_STEP_MS) {
		pthread_mutex_lock(&dev->mutex);
		if (!wait_for_state(dev, STARTING, START_TIMEOUT_MS) ||
			waited_ms > START_TIMEOUT_MS) {
			ret = err_set(err, ETIMEDOUT, "%s: the kernel does not start it",
				dev->opts.device);
		} else if (dev->state == ENDED) {
			*err = dev->claim_err;
			ret = -err->code;
		} else if (kernel_sysfs_server(dev->name)) {
			/* Returns when DO_IT lets go of the driver's lock, and changes nothing. */
			ioctl(dev->fd, NBD_SET_TIMEOUT,
				(unsigned long)driver_timeout_s(&dev->opts));
			dev->state = RUNNING;
			pthread_mutex_unlock(&dev->mutex);
			return 0;
		}
		pthread_mutex_unlock(&dev->mutex);
		sleep_ms(POLL_STEP_MS);
	}
	return ret;
}

static int check_opts(const struct kernel_dev_opts *opts, struct err *err)
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

static int start_thread(struct kernel_dev *dev, struct err *err)
{
	sigset_t all, before;
	int ret;

	/* A signal would end DO_IT, and with it the device. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = pthread_create(&dev->thread, NULL, device_thread, dev);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	dev->has_thread = !ret;
	return ret ? err_sys(err, ret, "a thread for %s", dev->opts.device) : 0;
}

static struct kernel_dev *dev_new(
	const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason), void *arg)
{
	struct kernel_dev *dev = calloc(1, sizeof(*dev));
	pthread_condattr_t clock;

	if (!dev)
		return NULL;
	*dev = (struct kernel_dev){ .opts = *opts,
		.fd = -1,
		.on_end = on_end,
		.arg = arg,
		.mutex = PTHREAD_MUTEX_INITIALIZER };
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++)
		dev->kernel_sock[i] = dev->server_sock[i] = -1;
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&dev->changed, &clock);
	if (strcmp(opts->device, "auto"))
		snprintf(dev->name, sizeof(dev->name), "%s", opts->device + strlen("/dev/"));
	return dev;
}

static int hand_out(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err)
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

int kernel_dev_claim(const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason),
	void *arg, struct kernel_dev **dev, struct kernel_ends *ends, struct err *err)
{
	struct kernel_dev *new;
	int ret = check_opts(opts, err);

	if (!ret)
		ret = kernel_sysfs_probe(err);
	if (ret)
		return ret;
	new = dev_new(opts, on_end, arg);
	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	ret = start_thread(new, err);
	if (!ret)
		ret = wait_until_running(new, err);
	if (!ret)
		ret = hand_out(new, ends, err);
	if (ret) {
		kernel_dev_free(new);
		return ret;
	}
	*dev = new;
	return 0;
}

int kernel_dev_reconnect(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err)
{
	return err_set(err, EOPNOTSUPP,
		"/dev/%s: attached by ioctl: its connections cannot be replaced", dev->name);
}

static void device_path(const struct kernel_dev *dev, char path[KERNEL_NAME_LEN + 8])
{
	snprintf(path, KERNEL_NAME_LEN + 8, "/dev/%s", dev->name);
}

static void set_queue(
	const struct kernel_dev *dev, const char *attr, const char *value, struct err *err)
{
	int ret = kernel_sysfs_write(dev->name, attr, value);

	if (ret && !err->code)
		err_sys(err, -ret, "%s = %s", attr, value);
}

int kernel_dev_settle(struct kernel_dev *dev, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8], number[24];
	struct err first = { 0 };
	uint64_t limit_kib = MAX_REQUEST_KIB;

	kernel_sysfs_number(dev->name, "queue/max_hw_sectors_kb", &limit_kib);
	snprintf(number, sizeof(number), "%u", (unsigned)MIN(limit_kib, (uint64_t)MAX_REQUEST_KIB));
	set_queue(dev, "queue/max_sectors_kb", number, &first);
	set_queue(dev, "queue/scheduler", "none", &first);
	set_queue(dev, "queue/rotational", "0", &first);

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

int kernel_dev_resize(struct kernel_dev *dev, uint64_t size_bytes, struct err *err)
{
	uint64_t seen_sectors = 0;

	if (!is_aligned(size_bytes, dev->opts.block_size))
		return err_set(err, EINVAL,
			"/dev/%s: %lu bytes is no multiple of its block size of %u", dev->name,
			(unsigned long)size_bytes, dev->opts.block_size);
	if (ioctl(dev->fd, NBD_SET_SIZE, (unsigned long)size_bytes))
		return err_sys(err, errno, "/dev/%s: NBD_SET_SIZE %lu", dev->name,
			(unsigned long)size_bytes);
	dev->opts.size_bytes = size_bytes;
	if (!kernel_sysfs_number(dev->name, "size", &seen_sectors) ||
		seen_sectors * 512 != size_bytes)
		return err_set(err, EIO, "/dev/%s: still %lu bytes after its size was set to %lu",
			dev->name, (unsigned long)seen_sectors * 512, (unsigned long)size_bytes);
	return 0;
}

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
		sleep_ms(OPENERS_TIMEOUT_MS / 10);
	}
}

int kernel_dev_users(const struct kernel_dev *dev, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];

	device_path(dev, path);

	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	return check_unused(dev, exclusive, err) ? err_wrap(err, "%s is in use", path) : 0;
}

static bool wait_until_ended(struct kernel_dev *dev)
{
	bool ended;

	pthread_mutex_lock(&dev->mutex);
	ended = wait_for_state(dev, ENDED, END_TIMEOUT_MS);
	pthread_mutex_unlock(&dev->mutex);
	return ended;
}

/* The file system mounted on it first (the ioctl does, but tells no errors), then its own cache. */
static int write_back_fd(int fd)
{
	ioctl(fd, BLKFLSBUF, 0);
	return fsync(fd) ? -errno : 0;
}

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
	int first_error = 0, ret;

	kernel_sysfs_partitions(dev->name, write_back_partition, &first_error);
	ret = write_back_fd(dev->fd);
	return first_error ? first_error : ret;
}

int kernel_dev_release(struct kernel_dev *dev, bool force, struct err *err)
{
	char path[KERNEL_NAME_LEN + 8];
	bool ended;
	int ret;

	pthread_mutex_lock(&dev->mutex);
	ended = dev->state == ENDED;
	pthread_mutex_unlock(&dev->mutex);
	if (ended)
		return 0;
	device_path(dev, path);

	CLEANUP(fd) int exclusive = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);

	ret = force ? 0 : check_unused(dev, exclusive, err);
	if (ret)
		return err_wrap(err, "%s is in use", path);
	ret = write_back(dev);
	if (ret && !force)
		return err_sys(
			err, -ret, "%s stays attached: its cache cannot be written back", path);
	if (ioctl(dev->fd, NBD_DISCONNECT, 0))
		return err_sys(err, errno, "%s: NBD_DISCONNECT", path);
	if (wait_until_ended(dev))
		return 0;
	shut_connections(dev);
	if (wait_until_ended(dev))
		return 0;
	return err_set(err, ETIMEDOUT, "%s: requests in flight do not end", path);
}

void kernel_dev_free(struct kernel_dev *dev)
{
	char path[KERNEL_NAME_LEN + 8];

	if (!dev)
		return;
	if (dev->has_thread) {
		pthread_mutex_lock(&dev->mutex);
		if (dev->state != ENDED)
			shut_connections(dev);
		pthread_mutex_unlock(&dev->mutex);
		pthread_join(dev->thread, NULL);
	}
	if (dev->fd >= 0) {
		close_claim(dev);
		/* An open notices that the disk is gone and drops the nodes of its partitions. */
		device_path(dev, path);
		dev->fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	close_claim(dev);
	pthread_cond_destroy(&dev->changed);
	pthread_mutex_destroy(&dev->mutex);
	free(dev);
}
