/*
 * Telling udev; see kernel-udev.h.
 *
 * An event that is made by writing to an `uevent` file may carry a UUID (SYNTH_UUID, kernel 4.13: see the
 * kernel's Documentation/ABI/testing/sysfs-uevent). udev passes every event on when it has worked on it,
 * rules, links and database included, to multicast group 2 of the uevent netlink. So we listen there
 * before we write, and are done when our UUID has come back as often as we wrote it. That udev's queue is
 * empty would say less: our events may not have reached it yet.
 *
 * Events of the disk precede those of its partitions, which inherit from it in udev's database.
 */
#include "daemon/kernel-udev.h"

#include <errno.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/kernel-sysfs.h"

#define TIMEOUT_MS   10000 /* udev on a loaded machine takes seconds; longer is a fault */
#define NODE_STEP_MS 5
#define UDEV_GROUP   2 /* multicast: events that udev has worked on */
#define UUID_LEN     36

struct announcement {
	const char *name;
	char uuid[UUID_LEN + 1];
	unsigned sent;
	int64_t deadline_ms;
	char missing[KERNEL_NAME_LEN + 8];
};

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* -1 where no udev runs, or it cannot be listened to. */
static int listen_to_udev(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = UDEV_GROUP };

	if (access("/run/udev/control", F_OK))
		return -1;

	CLEANUP(fd)
	int fd = socket(
		AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)))
		return -1;
	return take_fd(&fd);
}

static bool make_uuid(char uuid[UUID_LEN + 1])
{
	CLEANUP(file) FILE *random = fopen("/proc/sys/kernel/random/uuid", "re");

	return random && fgets(uuid, UUID_LEN + 1, random) && strlen(uuid) == UUID_LEN;
}

/* attr: "uevent", or "nbd0p1/uevent" for a partition. */
static int send_change(struct announcement *announcement, const char *attr)
{
	char text[sizeof("change ") + UUID_LEN];
	int ret;

	snprintf(text, sizeof(text), "change %s", announcement->uuid);
	ret = kernel_sysfs_write(announcement->name, attr, text);
	if (!ret)
		announcement->sent++;
	return ret;
}

static int send_partition_change(const char *partition, void *arg)
{
	char attr[KERNEL_NAME_LEN + 8];
	int ret;

	snprintf(attr, sizeof(attr), "%.*s/uevent", KERNEL_NAME_LEN - 1, partition);
	ret = send_change(arg, attr);
	return ret == -ENOENT ? 0 : ret; /* read anew by somebody else at this moment */
}

/* Until udev has passed on all that was sent. */
static bool wait_for_udev(struct announcement *announcement, int fd)
{
	char message[8192], wanted[sizeof("SYNTH_UUID=") + UUID_LEN];
	unsigned seen = 0;

	snprintf(wanted, sizeof(wanted), "SYNTH_UUID=%s", announcement->uuid);
	while (seen < announcement->sent) {
		struct pollfd pollfd = { .fd = fd, .events = POLLIN };
		int64_t left_ms = announcement->deadline_ms - now_ms();

		if (left_ms <= 0 || poll(&pollfd, 1, (int)left_ms) <= 0)
			return false;

		ssize_t len = recv(fd, message, sizeof(message), 0);

		seen += len > 0 && memmem(message, (size_t)len, wanted, strlen(wanted));
	}
	return true;
}

static int find_missing_node(const char *partition, void *arg)
{
	struct announcement *announcement = arg;

	snprintf(announcement->missing, sizeof(announcement->missing), "/dev/%.*s",
		KERNEL_NAME_LEN - 1, partition);
	return access(announcement->missing, F_OK) ? -ENOENT : 0;
}

static bool wait_for_nodes(struct announcement *announcement)
{
	const struct timespec step = { .tv_nsec = NODE_STEP_MS * 1000000L };

	while (kernel_sysfs_partitions(announcement->name, find_missing_node, announcement)) {
		if (now_ms() > announcement->deadline_ms)
			return false;
		nanosleep(&step, NULL);
	}
	return true;
}

int kernel_udev_announce(const char *name, struct err *err)
{
	struct announcement announcement = { .name = name, .deadline_ms = now_ms() + TIMEOUT_MS };
	CLEANUP(fd) int fd = listen_to_udev();
	int ret;

	if (!make_uuid(announcement.uuid))
		return err_set(err, EIO, "cannot read /proc/sys/kernel/random/uuid");
	ret = send_change(&announcement, "uevent");
	if (!ret)
		ret = kernel_sysfs_partitions(name, send_partition_change, &announcement);
	if (ret)
		return err_sys(err, -ret, "uevent");
	if (!wait_for_nodes(&announcement))
		return err_set(err, ETIMEDOUT, "no %s after %u s", announcement.missing,
			TIMEOUT_MS / 1000);
	if (fd >= 0 && !wait_for_udev(&announcement, fd))
		return err_set(
			err, ETIMEDOUT, "udev is not done with it after %u s", TIMEOUT_MS / 1000);
	return 0;
}
