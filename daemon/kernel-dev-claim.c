/*
 * A new kernel device: claimed in one of the two ways, and looked at before anybody is told of it.
 *
 * With several connections the driver may not receive on all of them (kernel-receivers.c). Such a device is given back
 * and claimed anew: the worker threads that were missing are there by then. If that happens again and again, it
 * gets a single connection, of which it does not happen.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "daemon/kernel-dev_private.h"
#include "daemon/kernel-receivers.h"

#define ATTEMPTS_MAX 4 /* with all connections */

/* Whoever had a look at the device that was given back has it open for a moment. */
#define BUSY_TIMEOUT_MS 5000
#define BUSY_STEP_MS    50

static void ignore_end(void *arg, int reason)
{
}

static int claim_by(struct kernel_dev *dev, struct err *err)
{
	if (dev->opts.mode != KERNEL_DEV_IOCTL) {
		dev->how = &kernel_dev_by_netlink;

		int ret = dev->how->claim(dev, err);

		if (ret != -EOPNOTSUPP || dev->opts.mode == KERNEL_DEV_NETLINK)
			return ret;
	}
	dev->how = &kernel_dev_by_ioctl;
	return dev->how->claim(dev, err);
}

/* Nobody is told of its end yet. */
static int claim_once(
	const struct kernel_dev_opts *opts, void *arg, struct kernel_dev **dev, struct err *err)
{
	struct kernel_dev *new = kernel_dev_new(opts, ignore_end, arg);

	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	int ret = claim_by(new, err);
	if (ret)
		kernel_dev_free(new);
	else
		*dev = new;
	return ret;
}

static int claim_again(
	const struct kernel_dev_opts *opts, void *arg, struct kernel_dev **dev, struct err *err)
{
	int ret = claim_once(opts, arg, dev, err);

	for (unsigned waited_ms = 0; ret == -EBUSY && waited_ms < BUSY_TIMEOUT_MS;
		waited_ms += BUSY_STEP_MS) {
		kernel_dev_sleep_ms(BUSY_STEP_MS);
		ret = claim_once(opts, arg, dev, err);
	}
	return ret;
}

/* What goes on from before has users, who would see it go. */
static bool is_fit(const struct kernel_dev *dev)
{
	return dev->adopted || kernel_receivers_run(dev->name, dev->opts.connections);
}

static int claim_fit(
	const struct kernel_dev_opts *opts, void *arg, struct kernel_dev **dev, struct err *err)
{
	struct kernel_dev_opts wanted = *opts;
	int ret = claim_once(&wanted, arg, dev, err);

	for (unsigned attempt = 1; !ret && !is_fit(*dev); attempt++) {
		if (attempt == ATTEMPTS_MAX)
			wanted.connections = 1;
		log_warning("/dev/%s: the driver does not receive on all of its %u connections: "
			    "attaching it anew, with %u",
			kernel_dev_name(*dev), opts->connections, wanted.connections);
		kernel_dev_free(*dev);
		ret = claim_again(&wanted, arg, dev, err);
	}
	return ret;
}

int kernel_dev_claim(const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason),
	void *arg, struct kernel_dev **dev, struct kernel_ends *ends, struct err *err)
{
	struct kernel_dev *new = NULL;
	int ret = kernel_dev_check(opts, err);

	if (!ret)
		ret = kernel_sysfs_probe(err);
	if (!ret)
		ret = claim_fit(opts, arg, &new, err);
	if (ret)
		return ret;
	ret = kernel_dev_hand_out(new, ends, err);
	if (ret) {
		kernel_dev_free(new);
		return ret;
	}
	*dev = new;
	kernel_dev_tell_end(new, on_end);
	return 0;
}
