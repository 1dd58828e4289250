/*
 * What doctor says of the kernel and of what this process, or the daemon, may do; see doctor.h.
 *
 * Permissions and limits are the daemon's when one answers, else those of this shell: they are told as such,
 * for a service has its own. io_uring is really tried, because a filter of system calls shows nowhere.
 *
 * Failure modes: what /proc does not tell is left out.
 */
#include <errno.h>
#include <inttypes.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/ctl/doctor.h"

#define FILES_MIN 4096 /* hundreds of clients and exports; the unit asks for more */

/* --- kernel ----------------------------------------------------------------------------------- */

/* What a kernel is too old for; all of it has a way around. */
static const struct {
	int major, minor;
	const char *missing;
} features[] = {
	{ 5, 1, "io_uring: files are read and written by threads, more slowly" },
	{ 5, 14, "identifiers of NBD devices: by ioctl, kernel devices die with the daemon" },
	{ 5, 6,
		"PR_SET_IO_FLUSHER: a daemon that serves this machine's own disks may block when "
		"memory is short" },
	{ 5, 6, "openat2: backing files that an image names cannot be opened" },
};

static void check_netlink(struct doctor *doctor, const char *release, int major, int minor)
{
	if (!doctor->wants_netlink || major > 5 || (major == 5 && minor >= 14))
		return;
	doctor_find(doctor, DOCTOR_PROBLEM, "kernel",
		"Use Linux 5.14 or newer, or device-mode = \"auto\", which takes what there is.",
		"the config demands device-mode = \"netlink\", for which Linux %s is too old",
		release);
}

void doctor_check_kernel(struct doctor *doctor)
{
	char release[65];
	int major = 0, minor = 0;
	bool complete = true;

	doctor_release(doctor, release, sizeof(release));
	if (sscanf(release, "%d.%d", &major, &minor) != 2) {
		doctor_find(doctor, DOCTOR_NOTE, "kernel", "", "Linux %s: not a known version",
			release);
		return;
	}
	for (size_t i = 0; i < ARRAY_LEN(features); i++) {
		if (major > features[i].major ||
			(major == features[i].major && minor >= features[i].minor))
			continue;
		complete = false;
		doctor_find(doctor, DOCTOR_NOTE, "kernel", "Use Linux 6.1 or newer.",
			"Linux %s has no %s", release, features[i].missing);
	}
	check_netlink(doctor, release, major, minor);
	if (complete)
		doctor_find(doctor, DOCTOR_OK, "kernel", "", "Linux %s", release);
}

/* --- the NBD driver --------------------------------------------------------------------------- */

static bool has_line_with(const struct doctor *doctor, const char *path, const char *text)
{
	char full[PATH_MAX], line[512];
	CLEANUP(file) FILE *file = fopen(doctor_path(doctor, full, "%s", path), "re");

	while (file && fgets(line, sizeof(line), file))
		if (strstr(line, text))
			return true;
	return false;
}

static void driver_missing(struct doctor *doctor)
{
	enum doctor_state state = doctor->wants_no_device ? DOCTOR_NOTE : DOCTOR_PROBLEM;
	char release[65], list[128], folder[96];

	doctor_release(doctor, release, sizeof(release));
	snprintf(folder, sizeof(folder), "/lib/modules/%s", release);
	snprintf(list, sizeof(list), "%s/modules.dep", folder);
	if (has_line_with(doctor, list, "/drivers/block/nbd.ko"))
		doctor_find(doctor, state, "driver",
			"Load it now:       modprobe nbd\n"
			"and at every boot: echo nbd > /etc/modules-load.d/nbd.conf",
			"the kernel's NBD driver is not loaded");
	else if (!doctor_exists(doctor, folder))
		doctor_find(doctor, state, "driver",
			"If the kernel was updated since the last boot, reboot. In a container the "
			"host has\n"
			"to load the module: modprobe nbd. NBD sockets work without it.",
			"no NBD driver is loaded, and the modules of the running kernel are not in "
			"%s",
			folder);
	else
		doctor_find(doctor, state, "driver",
			"Use a kernel that has it (Debian's linux-image-amd64 does), or NBD "
			"sockets "
			"in\n"
			"place of devices.",
			"kernel %s has no NBD driver (CONFIG_BLK_DEV_NBD)", release);
}

void doctor_check_driver(struct doctor *doctor)
{
	char devices[32] = "?", partitions[32] = "?";

	if (!doctor_exists(doctor, "/sys/module/nbd") &&
		!doctor_exists(doctor, "/sys/block/nbd0")) {
		driver_missing(doctor);
		return;
	}
	doctor_read(doctor, "/sys/module/nbd/parameters/nbds_max", devices, sizeof(devices));
	doctor_read(doctor, "/sys/module/nbd/parameters/max_part", partitions, sizeof(partitions));
	if (!doctor_exists(doctor, "/sys/block/nbd0"))
		doctor_find(doctor, DOCTOR_PROBLEM, "driver",
			"Load it with devices: modprobe -r nbd && modprobe nbd nbds_max=16\n"
			"and at every boot:    echo options nbd nbds_max=16 > "
			"/etc/modprobe.d/nbd.conf",
			"the NBD driver is loaded without devices (nbds_max=%s)", devices);
	else if (!strcmp(partitions, "0"))
		doctor_find(doctor, DOCTOR_NOTE, "driver",
			"When no device is in use: modprobe -r nbd && modprobe nbd max_part=15\n"
			"At every boot: echo options nbd max_part=15 > /etc/modprobe.d/nbd.conf",
			"the NBD driver is loaded, nbds_max=%s, but shows no partitions "
			"(max_part=0)",
			devices);
	else
		doctor_find(doctor, DOCTOR_OK, "driver", "",
			"the NBD driver is loaded, nbds_max=%s, max_part=%s", devices, partitions);
	if (doctor_exists(doctor, "/sys/block/nbd0") && !doctor_exists(doctor, "/dev/nbd0"))
		doctor_find(doctor, DOCTOR_PROBLEM, "driver",
			"Mount a devtmpfs on /dev, or give the container the device.",
			"the kernel has nbd0, but /dev has no node for it");
}

/* --- io_uring --------------------------------------------------------------------------------- */

#define THREADS_DO "Nothing has to be done: files are read and written by threads, more slowly."

/* 0, or the errno with which this process is refused a ring. */
static int try_io_uring(void)
{
	struct io_uring_params params = {};
	CLEANUP(fd) int ring = (int)syscall(SYS_io_uring_setup, 1, &params);

	return ring < 0 ? errno : 0;
}

void doctor_check_io_uring(struct doctor *doctor)
{
	char disabled[16] = "0";
	int code = 0;

	doctor_read(doctor, "/proc/sys/kernel/io_uring_disabled", disabled, sizeof(disabled));
	if (!*doctor->root)
		code = try_io_uring();
	if (!strcmp(disabled, "2"))
		doctor_find(doctor, DOCTOR_NOTE, "io_uring",
			THREADS_DO "\nTo allow it: sysctl kernel.io_uring_disabled=0",
			"forbidden on this machine (kernel.io_uring_disabled = 2)");
	else if (!strcmp(disabled, "1") && (code || *doctor->root))
		doctor_find(doctor, DOCTOR_NOTE, "io_uring",
			THREADS_DO
			"\nTo allow it: sysctl kernel.io_uring_disabled=0, or a group in\n"
			"kernel.io_uring_group",
			"only for root and one group (kernel.io_uring_disabled = 1)");
	else if (code == ENOSYS)
		doctor_find(doctor, DOCTOR_NOTE, "io_uring", THREADS_DO,
			"this kernel has none, or a filter of system calls (seccomp) hides it");
	else if (code == ENOMEM)
		doctor_find(doctor, DOCTOR_NOTE, "io_uring",
			THREADS_DO "\nTo allow it: LimitMEMLOCK=infinity in the unit, or ulimit -l",
			"no memory for it: the limit of locked memory is too low");
	else if (code)
		doctor_find(doctor, DOCTOR_NOTE, "io_uring",
			THREADS_DO
			"\nTo allow it: let the container or the service call io_uring_setup "
			"(seccomp)",
			"refused to this process: %s; a filter of system calls (seccomp) does that",
			strerror(code));
	else
		doctor_find(doctor, DOCTOR_OK, "io_uring", "",
			*doctor->root ? "not forbidden by kernel.io_uring_disabled" : "works");
}

/* --- permissions and limits ------------------------------------------------------------------- */

/* "/proc/4711/FILE" of the daemon that answers, else of this process. */
static const char *process_file(const struct doctor *doctor, const char *file, char path[64])
{
	snprintf(path, 64, "/proc/%d/%s", (int)doctor->daemon, file);
	if (!doctor->daemon || !doctor_exists(doctor, path))
		snprintf(path, 64, "/proc/self/%s", file);
	return path;
}

static const char *whose(const struct doctor *doctor)
{
	return doctor->daemon ? "blkstackd" : "this shell";
}

/* False when it has not, or nothing is known. */
static bool has_capability(const struct doctor *doctor, int capability)
{
	char path[64], text[32];

	return doctor_field(doctor, process_file(doctor, "status", path), "CapEff", text,
		       sizeof(text)) &&
	       strtoull(text, NULL, 16) >> capability & 1;
}

void doctor_check_permissions(struct doctor *doctor)
{
	char path[64], uid[64] = "?";

	doctor_field(doctor, process_file(doctor, "status", path), "Uid", uid, sizeof(uid));
	uid[strcspn(uid, "\t ")] = '\0';
	if (has_capability(doctor, CAP_SYS_ADMIN))
		doctor_find(doctor, DOCTOR_OK, "permissions", "",
			"%s may attach kernel devices (CAP_SYS_ADMIN)", whose(doctor));
	else if (doctor->wants_no_device)
		doctor_find(doctor, DOCTOR_OK, "permissions", "",
			"%s may not attach kernel devices, and the config has none", whose(doctor));
	else if (doctor->daemon || !strcmp(uid, "0"))
		doctor_find(doctor, DOCTOR_PROBLEM, "permissions",
			"Give it that capability: in a unit CapabilityBoundingSet=, in a container "
			"--cap-add.\nNBD sockets work without it.",
			"%s (uid %s) has no CAP_SYS_ADMIN, so no kernel device can be attached",
			whose(doctor), uid);
	else
		doctor_find(doctor, DOCTOR_NOTE, "permissions",
			"Run blkstackd as root, or as a service. NBD sockets work without it.",
			"a blkstackd started by uid %s cannot attach kernel devices "
			"(CAP_SYS_ADMIN)",
			uid);
}

/* The hard limit; UINT64_MAX: none, or not known. */
static uint64_t hard_limit(const struct doctor *doctor, const char *name)
{
	char path[64], soft[32], hard[32], text[128];

	if (!doctor_field(doctor, process_file(doctor, "limits", path), name, text, sizeof(text)) ||
		sscanf(text, "%31s %31s", soft, hard) != 2 || !strcmp(hard, "unlimited"))
		return UINT64_MAX;
	return strtoull(hard, NULL, 10);
}

void doctor_check_limits(struct doctor *doctor)
{
	uint64_t files = hard_limit(doctor, "Max open files");
	uint64_t memory_bytes = hard_limit(doctor, "Max locked memory");
	bool few_files = files < FILES_MIN;
	bool little_memory = memory_bytes != UINT64_MAX && !has_capability(doctor, CAP_IPC_LOCK);

	if (few_files)
		doctor_find(doctor, DOCTOR_NOTE, "limits",
			"LimitNOFILE=65536 in the unit, or ulimit -Hn 65536 before it is started.",
			"%s may have %" PRIu64 " files open: few for many exports and clients",
			whose(doctor), files);
	if (little_memory)
		doctor_find(doctor, DOCTOR_NOTE, "limits",
			"LimitMEMLOCK=infinity in the unit, or CAP_IPC_LOCK.",
			"%s may lock %" PRIu64 " KiB of memory, so a blkstackd that serves kernel "
			"devices could be swapped out",
			whose(doctor), memory_bytes / 1024);
	if (!few_files && !little_memory)
		doctor_find(doctor, DOCTOR_OK, "limits", "",
			"open files and locked memory of %s are enough", whose(doctor));
}
