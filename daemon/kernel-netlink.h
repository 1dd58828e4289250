/*
 * What the kernel's NBD driver can be told by generic netlink (linux/nbd-netlink.h): devices that outlive the
 * process which made them, found again by an identifier. One message each; all of it may block,
 * resizing until the requests in flight are done.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

#define KERNEL_NETLINK_TIMEOUT_KEEP UINT64_MAX

/* What a message says; what is 0 or NULL is left out, but for index and timeout_s. */
struct kernel_netlink {
	int index; /* of the device; -1: the first one that is free, made if there is none */
	const char *identifier;
	uint64_t size_bytes, block_size;
	uint64_t timeout_s; /* 0: the driver's "never"; KERNEL_NETLINK_TIMEOUT_KEEP: left out */
	uint64_t dead_timeout_s;
	uint64_t flags;
	const int *sockets;
	unsigned socket_count;
};

/* 0, or -EOPNOTSUPP: no such family here (an old kernel, a network namespace of its own). */
int kernel_netlink_probe(struct err *err);

/* Errors: -EBUSY the device is in use, or open at this moment, -EPERM, -EOPNOTSUPP as above. */
int kernel_netlink_connect(const struct kernel_netlink *message, unsigned *index, struct err *err);

/*
 * -EINVAL: the device is not connected, or has another identifier. The sockets replace those that are dead;
 * more than that the driver ignores with success: see kernel_netlink_took().
 */
int kernel_netlink_reconfigure(const struct kernel_netlink *message, struct err *err);

/* Nobody asks whether the device is in use. */
int kernel_netlink_disconnect(unsigned index, struct err *err);

/* Whether the driver took this socket, given a message with a timeout_s other than 0. */
bool kernel_netlink_took(int socket);
/* Takes the time-out off again: sending to a server that is slow may take any time. */
void kernel_netlink_unmark(int socket);
