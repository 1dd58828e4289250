/*
 * What doctor says of the NBD devices of this machine; see doctor.h.
 *
 * A device that is connected has an attribute `pid`: the thread that attached it. By ioctl that thread lives as long
 * as the device: when it is gone the device is dead, though somebody who has it open keeps it from going away.
 * By netlink it may end, all being well: of a device that was not blkstackd's, a process that is gone proves nothing,
 * and the finding says so. What is blkstackd's by netlink is known by its identifier, `backend`; who keeps a device
 * now, and which thread attached it, by its lock (daemon/kernel-lock.h). The file for udev in /run/blkstack/devices,
 * which has the export's name, outlives a daemon that is killed, so it counts only if that thread is still
 * the device's.
 *
 * Devices are not opened: that alone makes the kernel read a dead one again. Numbers of processes are those of
 * this machine; inside a container they may mean somebody else, or nobody.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "daemon/ctl/doctor.h"
#include "daemon/kernel-dev.h"
#include "daemon/kernel-lock.h"
#include "daemon/kernel-users.h"

#define SECTOR_BYTES 512 /* the unit of sysfs' size, whatever the device's blocks are */

struct device {
	unsigned index;
	uint64_t size_bytes, reads, writes; /* the latter two: in flight */
	long pid;                           /* 0: not connected */
	char process[32];                   /* its name; "": it is gone */
	char owner[256];                    /* the export that blkstackd attached there; "": none */
	char identifier[128];               /* of whoever attached it by netlink; "": none */
	long keeper;                        /* the blkstackd that keeps it now; 0: none */
	long attacher;                      /* the thread of blkstackd's last attach; 0: unknown */
};

static bool read_number(const struct doctor *doctor, unsigned index, const char *attr, uint64_t *n)
{
	char path[64], text[64];

	snprintf(path, sizeof(path), "/sys/block/nbd%u/%s", index, attr);
	return doctor_read(doctor, path, text, sizeof(text)) && sscanf(text, "%" SCNu64, n) == 1;
}

/* Of another root than this machine's a lock is held when its process lives. */
static void read_lock(const struct doctor *doctor, struct device *device)
{
	char path[64], text[64], process[32] = "";
	struct kernel_lock_note note;

	if (!*doctor->root) {
		snprintf(path, sizeof(path), "nbd%u", device->index);
		device->keeper = kernel_lock_holder(path, &note);
		device->attacher = note.attacher;
		return;
	}
	snprintf(path, sizeof(path), "/run/blkstack/lock/nbd%u", device->index);
	if (!doctor_read(doctor, path, text, sizeof(text)) ||
		sscanf(text, "%ld %*u %ld", &device->keeper, &device->attacher) != 2)
		return;
	snprintf(path, sizeof(path), "/proc/%ld/status", device->keeper);
	doctor_field(doctor, path, "Name", process, sizeof(process));
	if (strcmp(process, "blkstackd") != 0)
		device->keeper = 0;
}

static void read_device(const struct doctor *doctor, unsigned index, struct device *device)
{
	char path[64], text[64];
	uint64_t pid = 0, sectors = 0;

	*device = (struct device){ .index = index };
	read_number(doctor, index, "size", &sectors);
	read_number(doctor, index, "pid", &pid);
	device->size_bytes = sectors * SECTOR_BYTES;
	device->pid = (long)pid;
	snprintf(path, sizeof(path), "/sys/block/nbd%u/inflight", index);
	if (doctor_read(doctor, path, text, sizeof(text)))
		sscanf(text, "%" SCNu64 " %" SCNu64, &device->reads, &device->writes);
	snprintf(path, sizeof(path), "/proc/%ld/status", device->pid);
	if (pid)
		doctor_field(doctor, path, "Name", device->process, sizeof(device->process));
	snprintf(path, sizeof(path), "/run/blkstack/devices/nbd%u", index);
	doctor_field(doctor, path, "BLKSTACK_EXPORT", device->owner, sizeof(device->owner));
	snprintf(path, sizeof(path), "/sys/block/nbd%u/backend", index);
	doctor_read(doctor, path, device->identifier, sizeof(device->identifier));
	read_lock(doctor, device);
}

/* "; mounted on /srv, open by fio (4711)", or nothing when nobody is found. */
static const char *users_text(const struct doctor *doctor, unsigned index, char text[600])
{
	struct err err = {};
	char name[32];

	*text = '\0';
	snprintf(name, sizeof(name), "nbd%u", index);
	if (!*doctor->root && kernel_users_check(name, NULL, 0, &err))
		snprintf(text, 600, "; %s", err.text);
	return text;
}

static void report_dead(struct doctor *doctor, const struct device *device)
{
	char remedy[256], size[UNITS_SIZE_TEXT_LEN], users[600];

	snprintf(remedy, sizeof(remedy),
		"Unmount it and end who has it open (fuser -vm /dev/nbd%u): then it is free "
		"again.\n"
		"What was synced is in the image. Then start blkstackd, and mount it again.",
		device->index);
	users_text(doctor, device->index, users);
	units_format_size(device->size_bytes, size);
	if (*device->owner)
		doctor_find(doctor, DOCTOR_PROBLEM, "devices", remedy,
			"nbd%u is dead: the blkstackd that served export \"%s\" on it is gone (%s, "
			"pid "
			"%ld)%s",
			device->index, device->owner, size, device->pid, users);
	else
		doctor_find(doctor, DOCTOR_PROBLEM, "devices", remedy,
			"nbd%u is dead: nobody serves it, but it still has a size (%s)%s",
			device->index, size, users);
}

/* By netlink, and nobody of ours lives: its requests wait. */
static void report_waiting(struct doctor *doctor, const struct device *device)
{
	const char *export = device->identifier + strlen(KERNEL_DEV_IDENTIFIER);
	char remedy[512], size[UNITS_SIZE_TEXT_LEN], users[600];

	snprintf(remedy, sizeof(remedy),
		"Start blkstackd with an export \"%.64s\", or add it there (blkstackctl add): it "
		"takes "
		"the\ndevice up again, and what waits goes on.\n"
		"To give it up: end its users (fuser -vm /dev/nbd%u), unmount it, then nbd-client "
		"-d "
		"/dev/nbd%u",
		export, device->index, device->index);
	users_text(doctor, device->index, users);
	doctor_find(doctor, DOCTOR_PROBLEM, "devices", remedy,
		"nbd%u waits for a blkstackd: the one that served export \"%s\" on it is gone "
		"(%s); "
		"its "
		"requests fail when device-dead-timeout is over%s",
		device->index, export, units_format_size(device->size_bytes, size), users);
}

static void report_stale_name(struct doctor *doctor, const struct device *device, const char *state)
{
	char remedy[128];

	snprintf(remedy, sizeof(remedy),
		"rm /run/blkstack/devices/nbd%u && udevadm trigger --action=change /dev/nbd%u",
		device->index, device->index);
	doctor_find(doctor, DOCTOR_NOTE, "devices", remedy,
		"nbd%u is %s, but udev was told that it is export \"%s\", by a blkstackd that was "
		"killed",
		device->index, state, device->owner);
}

static void report_foreign(struct doctor *doctor, const struct device *device)
{
	char remedy[256], size[UNITS_SIZE_TEXT_LEN], users[600];

	units_format_size(device->size_bytes, size);
	users_text(doctor, device->index, users);
	if (*device->process) {
		doctor_find(doctor, DOCTOR_NOTE, "devices",
			"Leave it to its owner; with device = \"auto\" blkstackd takes another "
			"one.",
			"nbd%u belongs to somebody else: %s (%ld), %s%s", device->index,
			device->process, device->pid, size, users);
		return;
	}
	snprintf(remedy, sizeof(remedy),
		"Whether it is alive: dd if=/dev/nbd%u of=/dev/null bs=4096 count=1 iflag=direct\n"
		"If it is nobody's any more: nbd-client -d /dev/nbd%u",
		device->index, device->index);
	doctor_find(doctor, DOCTOR_NOTE, "devices", remedy,
		"nbd%u was attached by somebody else, who is gone (pid %ld, %s): nbd-client "
		"leaves a device working behind, other servers a dead one%s",
		device->index, device->pid, size, users);
}

static void report_healthy(struct doctor *doctor, const struct device *device)
{
	char size[UNITS_SIZE_TEXT_LEN];

	doctor_find(doctor, DOCTOR_OK, "devices", "",
		"nbd%u: export \"%s\", %s, by blkstackd (%ld)", device->index,
		*device->owner ? device->owner : "?", units_format_size(device->size_bytes, size),
		device->keeper > 0 ? device->keeper : device->pid);
}

/* Findings of one device; true when it is free. */
static bool check_device(struct doctor *doctor, const struct device *device)
{
	bool served_by_us = device->keeper || !strcmp(device->process, "blkstackd");
	bool ours_by_netlink = !strncmp(
		device->identifier, KERNEL_DEV_IDENTIFIER, strlen(KERNEL_DEV_IDENTIFIER));
	bool attached_since = device->attacher && device->attacher != device->pid;

	if (device->pid && served_by_us) {
		report_healthy(doctor, device);
	} else if (device->pid && ours_by_netlink) {
		report_waiting(doctor, device);
	} else if (device->pid && (*device->process || !*device->owner || attached_since)) {
		report_foreign(doctor, device);
		if (*device->owner)
			report_stale_name(doctor, device, "somebody else's");
	} else if (device->pid || device->size_bytes) {
		report_dead(doctor, device);
	} else if (device->reads || device->writes) {
		doctor_find(doctor, DOCTOR_PROBLEM, "devices",
			"Wait some seconds and look again. If they stay only a reboot helps: use "
			"another device.",
			"nbd%u is not attached, but %" PRIu64 " requests on it have not ended",
			device->index, device->reads + device->writes);
	} else {
		if (*device->owner)
			report_stale_name(doctor, device, "free");
		return true;
	}
	return false;
}

static int compare_indices(const void *a, const void *b)
{
	unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;

	return (x > y) - (x < y);
}

/* The numbers of the devices, ascending; the caller frees them. */
static unsigned *list_devices(const struct doctor *doctor, size_t *count)
{
	char path[PATH_MAX], rest;
	CLEANUP(dir) DIR *dir = opendir(doctor_path(doctor, path, "/sys/block"));
	CLEANUP(free) unsigned *indices = NULL;
	struct dirent *entry;
	unsigned index;

	*count = 0;
	while (dir && (entry = readdir(dir))) {
		if (sscanf(entry->d_name, "nbd%u%c", &index, &rest) != 1)
			continue;
		unsigned *more = reallocarray(indices, *count + 1, sizeof(*indices));
		if (!more)
			break;
		indices = more;
		indices[(*count)++] = index;
	}
	if (*count)
		qsort(indices, *count, sizeof(*indices), compare_indices);
	return take_ptr(indices);
}

void doctor_check_devices(struct doctor *doctor)
{
	size_t count, free_count = 0;
	CLEANUP(free) unsigned *indices = list_devices(doctor, &count);

	for (size_t i = 0; i < count; i++) {
		struct device device;

		read_device(doctor, indices[i], &device);
		free_count += check_device(doctor, &device);
	}
	if (count && !free_count)
		doctor_find(doctor, DOCTOR_NOTE, "devices",
			"For more: echo options nbd nbds_max=64 > /etc/modprobe.d/nbd.conf, and "
			"load "
			"the\nmodule anew when no device is in use.",
			"none of %zu NBD devices is free", count);
	else if (count)
		doctor_find(doctor, DOCTOR_OK, "devices", "", "%zu of %zu NBD devices are free",
			free_count, count);
}
