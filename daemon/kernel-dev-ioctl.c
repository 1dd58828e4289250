/*
 * A kernel NBD device by ioctl. How the driver behaves, and why this is in the order it is in:
 *
 * - The first thread that gives the driver a socket (NBD_SET_SOCK) owns the device; later ones get
 *   EBUSY. That thread must do the whole set-up, and NBD_DO_IT keeps it until the end. So: one
 *   thread per device. Size and block size of a device in use could be changed by anybody with
 *   an ioctl, so nothing is set before the socket was accepted.
 * - NBD_SET_SOCK waits for requests in flight, so a device that is visibly connected (`pid` in sysfs)
 *   or exclusively open is not even asked. One that its server left behind, and that is still
 *   open somewhere, lets itself be claimed but refuses NBD_DO_IT (EBUSY, EINVAL): the next one then.
 * - Partitions are read at the first open after NBD_DO_IT began. An ioctl waits for the driver's lock,
 *   which DO_IT holds until the device is whole: that is how we know.
 * - The device is opened read-only: ioctls need a capability, not write access, and an open
 *   writer would keep newer kernels from mounting it.
 * - Our open descriptor keeps the kernel from writing the device's cache back at the last close
 *   of its users, so kernel_dev_release() does that.
 * - When the process dies, or all connections break, the device is dead at once.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/nbd.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/kernel-dev_private.h"

#define START_TIMEOUT_MS 10000 /* for DO_IT to begin: it takes microseconds on a healthy kernel */
#define POLL_STEP_MS     2

/* --- the device's thread ---------------------------------------------------------------------- */

static int set_up_device(struct kernel_dev *dev, struct err *err)
{
	const struct kernel_dev_opts *opts = &dev->opts;
	unsigned long flags = kernel_dev_driver_flags(dev);
	uint32_t timeout_s = kernel_dev_driver_timeout_s(dev);
	char path[KERNEL_NAME_LEN + 8];
	int ret = kernel_dev_connect(dev, err);

	if (ret)
		return ret;
	snprintf(path, sizeof(path), "/dev/%s", dev->name);
	dev->fd = open(path, O_RDONLY | O_CLOEXEC);
	if (dev->fd < 0)
		return err_sys(err, errno, "open");
	for (unsigned i = 0; i < opts->connections; i++)
		if (ioctl(dev->fd, NBD_SET_SOCK, (unsigned long)dev->kernel_sock[i]))
			return errno == EBUSY ? kernel_dev_busy(dev->name, err)
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

static void give_back(struct kernel_dev *dev)
{
	if (dev->fd >= 0)
		close(take_fd(&dev->fd));
	if (dev->lock >= 0)
		close(take_fd(&dev->lock));
	kernel_dev_disconnect(dev);
}

/*
 * Claims one device and lends the driver this thread until it gives the device up. -EBUSY while the
 * claim is not handed out: try another one.
 */
static int start_and_wait(struct kernel_dev *dev, int *reason, struct err *err)
{
	int ret = kernel_dev_check_free(dev->name, err);

	if (!ret)
		ret = kernel_dev_lock(dev, err);
	if (!ret)
		ret = set_up_device(dev, err);
	if (ret)
		return ret;
	/* The socket is ours, so nobody else can start this device now: `pid` is a left-over, or ours later. */
	if (kernel_sysfs_server(dev->name)) {
		ioctl(dev->fd, NBD_CLEAR_SOCK, 0);
		return kernel_dev_busy(dev->name, err);
	}
	kernel_dev_set_state(dev, STARTING);

	ret = ioctl(dev->fd, NBD_DO_IT, 0) ? errno : 0;
	ioctl(dev->fd, NBD_CLEAR_SOCK, 0);

	pthread_mutex_lock(&dev->mutex);
	bool started = dev->state == RUNNING;

	if (!started)
		dev->state = CLAIMING;
	pthread_mutex_unlock(&dev->mutex);
	if (!started && (ret == EBUSY || ret == EINVAL))
		return kernel_dev_busy(dev->name, err);
	if (!started)
		return err_sys(err, ret ? ret : EIO, "ended before it was ready");
	*reason = ret;
	return 0;
}

static int run_device(struct kernel_dev *dev, void *arg, struct err *err)
{
	int ret = start_and_wait(dev, arg, err);

	if (ret)
		give_back(dev);
	return ret;
}

static void *device_thread(void *arg)
{
	struct kernel_dev *dev = arg;
	struct err err = { 0 };
	int reason = 0;
	int ret = kernel_dev_try(dev, run_device, &reason, &err);

	if (!ret) {
		kernel_dev_end(dev, reason);
		return NULL;
	}
	pthread_mutex_lock(&dev->mutex);
	dev->state = ENDED;
	dev->claim_err = err;
	pthread_cond_broadcast(&dev->changed);
	pthread_mutex_unlock(&dev->mutex);
	return NULL;
}

/* --- the owner's side ------------------------------------------------------------------------- */

/* Called with the mutex held. */
static bool wait_until_starting(struct kernel_dev *dev)
{
	struct timespec deadline;
	int ret = 0;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += START_TIMEOUT_MS / 1000;
	while (dev->state == CLAIMING && !ret)
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
		if (!wait_until_starting(dev) || waited_ms > START_TIMEOUT_MS) {
			ret = err_set(
				err, ETIMEDOUT, "%s: the kernel does not start it", dev->device);
		} else if (dev->state == ENDED) {
			*err = dev->claim_err;
			ret = -err->code;
		} else if (kernel_sysfs_server(dev->name)) {
			/* Returns when DO_IT lets go of the driver's lock, and changes nothing. */
			ioctl(dev->fd, NBD_SET_TIMEOUT,
				(unsigned long)kernel_dev_driver_timeout_s(dev));
			dev->state = RUNNING;
			kernel_dev_note(dev);
			pthread_mutex_unlock(&dev->mutex);
			return 0;
		}
		pthread_mutex_unlock(&dev->mutex);
		kernel_dev_sleep_ms(POLL_STEP_MS);
	}
	return ret;
}

static int ioctl_claim(struct kernel_dev *dev, struct err *err)
{
	int ret = kernel_dev_start_thread(dev, device_thread, err);

	return ret ? ret : wait_until_running(dev, err);
}

static int ioctl_set_size(struct kernel_dev *dev, uint64_t size_bytes, struct err *err)
{
	if (ioctl(dev->fd, NBD_SET_SIZE, (unsigned long)size_bytes))
		return err_sys(err, errno, "NBD_SET_SIZE %lu", (unsigned long)size_bytes);
	return 0;
}

static int ioctl_disconnect(struct kernel_dev *dev, struct err *err)
{
	return ioctl(dev->fd, NBD_DISCONNECT, 0) ? err_sys(err, errno, "NBD_DISCONNECT") : 0;
}

static void ioctl_stop(struct kernel_dev *dev)
{
	pthread_mutex_lock(&dev->mutex);
	for (unsigned i = 0; i < dev->opts.connections && dev->state != ENDED; i++)
		if (dev->kernel_sock[i] >= 0)
			shutdown(dev->kernel_sock[i], SHUT_RDWR);
	pthread_mutex_unlock(&dev->mutex);
}

const struct kernel_dev_how kernel_dev_by_ioctl = {
	.mode = KERNEL_DEV_IOCTL,
	.claim = ioctl_claim,
	.set_size = ioctl_set_size,
	.disconnect = ioctl_disconnect,
	.stop = ioctl_stop,
};
