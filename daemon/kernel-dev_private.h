/*
 * A kernel device between its common part (kernel-dev.c, kernel-dev-claim.c) and the two ways to tell the driver:
 * kernel-dev-ioctl.c and kernel-dev-netlink.c.
 */
#pragma once

#include <pthread.h>

#include "daemon/kernel-dev.h"

typedef void kernel_dev_end_fn(void *arg, int reason);

enum kernel_dev_state { CLAIMING, STARTING, RUNNING, ENDED };

struct kernel_dev_how {
	enum kernel_dev_mode mode;
	/* From no device to RUNNING, with connections made. On an error the caller frees the device. */
	int (*claim)(struct kernel_dev *dev, struct err *err);
	int (*set_size)(struct kernel_dev *dev, uint64_t size_bytes, struct err *err);
	/* The driver lets go of it; the state becomes ENDED by itself. */
	int (*disconnect)(struct kernel_dev *dev, struct err *err);
	/* Makes the state ENDED whatever it was, before the thread is joined. */
	void (*stop)(struct kernel_dev *dev);
};

extern const struct kernel_dev_how kernel_dev_by_ioctl, kernel_dev_by_netlink;

struct kernel_dev {
	struct kernel_dev_opts opts; /* its texts are the two below */
	char device[KERNEL_NAME_LEN + 8], identifier[128];
	const struct kernel_dev_how *how;
	char name[KERNEL_NAME_LEN];
	bool settled;
	uint64_t size_bytes;                     /* of the device; opts: what is wanted */
	int kernel_sock[KERNEL_CONNECTIONS_MAX]; /* our descriptors of the driver's ends */
	int server_sock[KERNEL_CONNECTIONS_MAX]; /* until handed out */

	int lock; /* see kernel-lock.h; -1: none */

	int fd; /* by ioctl: the device */

	int wake; /* by netlink: an eventfd, upon which the thread looks again */
	bool quit, adopted;

	pthread_t thread;
	bool has_thread;
	kernel_dev_end_fn *on_end;
	void *arg;

	pthread_mutex_t mutex; /* of kernel_sock, quit, on_end, and what follows */
	pthread_cond_t changed;
	enum kernel_dev_state state;
	bool released; /* the driver is being told */
	int end_reason;
	struct err claim_err; /* of a claim that failed */
};

int kernel_dev_check(const struct kernel_dev_opts *opts, struct err *err);
/* Without a device yet; NULL: out of memory. */
struct kernel_dev *kernel_dev_new(
	const struct kernel_dev_opts *opts, void (*on_end)(void *arg, int reason), void *arg);

/* What the driver is told. */
void kernel_dev_identify(struct kernel_dev *dev, const char *export);
uint64_t kernel_dev_driver_flags(const struct kernel_dev *dev);
uint32_t kernel_dev_driver_timeout_s(const struct kernel_dev *dev);

/* Connections of their own, in kernel_sock and server_sock. */
int kernel_dev_connect(struct kernel_dev *dev, struct err *err);
void kernel_dev_disconnect(struct kernel_dev *dev);
int kernel_dev_hand_out(struct kernel_dev *dev, struct kernel_ends *ends, struct err *err);

/*
 * -EBUSY: another process keeps it. Where the file cannot be made there is no lock: then nobody can take the
 * device up later, but it works all the same.
 */
int kernel_dev_lock(struct kernel_dev *dev, struct err *err);
/* Once it is attached. */
void kernel_dev_note(const struct kernel_dev *dev);

/* Makes the driver repeat lost requests soon, where that does no harm: see kernel-dev-netlink.c. */
int kernel_dev_lower_replay(struct kernel_dev *dev, struct err *err);

/* 0 when nobody has the device; -EBUSY says who, as precisely as can be found out; -ENODEV. */
int kernel_dev_check_free(const char *name, struct err *err);
int kernel_dev_busy(const char *name, struct err *err);

/*
 * Tries the devices, or the one that is asked for, until one does not fail with -EBUSY or -ENODEV.
 */
int kernel_dev_try(struct kernel_dev *dev,
	int (*one)(struct kernel_dev *dev, void *arg, struct err *err), void *arg, struct err *err);

/* A thread that no signal interrupts. */
int kernel_dev_start_thread(struct kernel_dev *dev, void *(*run)(void *dev), struct err *err);

/* A device that was claimed is over: on_end is told. */
void kernel_dev_end(struct kernel_dev *dev, int reason);
/* From now on on_end is the one to tell; at once if it is over already. */
void kernel_dev_tell_end(struct kernel_dev *dev, kernel_dev_end_fn *on_end);

void kernel_dev_set_state(struct kernel_dev *dev, enum kernel_dev_state state);
void kernel_dev_sleep_ms(unsigned ms);
