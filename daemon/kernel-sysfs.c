/*
 * sysfs of the NBD devices; see kernel-sysfs.h.
 *
 * Attributes used, below /sys/block/nbdN: pid (there only while connected), inflight ("READS WRITES"),
 * size (in 512-byte units), uevent, queue/... Partitions are subfolders named nbdNpM; a device number
 * leads to its folder through /sys/dev/block/MAJOR:MINOR.
 */
#include "daemon/kernel-sysfs.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/cleanup.h"

/* Whether the running kernel's modules, loaded or not, include nbd. */
static bool module_exists(void)
{
	CLEANUP(file) FILE *list = NULL;
	struct utsname kernel;
	char line[512];

	if (uname(&kernel))
		return false;
	snprintf(line, sizeof(line), "/lib/modules/%s/modules.dep", kernel.release);
	list = fopen(line, "re");
	while (list && fgets(line, sizeof(line), list))
		if (strstr(line, "/drivers/block/nbd.ko"))
			return true;
	return false;
}

int kernel_sysfs_probe(struct err *err)
{
	struct utsname kernel = { 0 };

	/* Built in or loaded, it has this folder; built in without parameters it has devices. */
	if (!access("/sys/module/nbd", F_OK) || !access("/sys/block/nbd0", F_OK))
		return 0;
	if (access("/sys/block", F_OK))
		return err_set(err, ENODEV, "sysfs is not mounted on /sys");
	if (module_exists())
		return err_set(
			err, ENODEV, "the kernel's NBD driver is not loaded: run `modprobe nbd`");
	uname(&kernel);
	return err_set(err, ENODEV,
		"kernel %s has no NBD driver (CONFIG_BLK_DEV_NBD), neither loaded nor in "
		"/lib/modules: "
		"use an NBD socket instead of a device, or a kernel that has it",
		kernel.release);
}

static int compare_unsigned(const void *a, const void *b)
{
	unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;

	return (x > y) - (x < y);
}

int kernel_sysfs_list(unsigned **indices, size_t *count, struct err *err)
{
	CLEANUP(dir) DIR *dir = opendir("/sys/block");
	CLEANUP(free) unsigned *found = NULL;
	size_t found_count = 0;
	struct dirent *entry;

	if (!dir)
		return err_sys(err, errno, "/sys/block");
	while ((entry = readdir(dir))) {
		unsigned index;
		char rest;

		if (sscanf(entry->d_name, "nbd%u%c", &index, &rest) != 1)
			continue;

		unsigned *more = reallocarray(found, found_count + 1, sizeof(*found));

		if (!more)
			return err_set(err, ENOMEM, "out of memory");
		found = more;
		found[found_count++] = index;
	}
	if (found_count)
		qsort(found, found_count, sizeof(*found), compare_unsigned);
	*indices = take_ptr(found);
	*count = found_count;
	return 0;
}

int kernel_sysfs_read(const char *name, const char *attr, char *text, size_t text_len_bytes)
{
	char path[256];

	snprintf(path, sizeof(path), "/sys/block/%s/%s", name, attr);

	CLEANUP(fd) int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;

	ssize_t got = read(fd, text, text_len_bytes - 1);

	if (got < 0)
		return -errno;
	text[got] = '\0';
	text[strcspn(text, "\n")] = '\0';
	return 0;
}

int kernel_sysfs_write(const char *name, const char *attr, const char *text)
{
	char path[256];

	snprintf(path, sizeof(path), "/sys/block/%s/%s", name, attr);

	CLEANUP(fd) int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		return -errno;
	return 0;
}

bool kernel_sysfs_number(const char *name, const char *attr, uint64_t *number)
{
	char text[64], *end;

	if (kernel_sysfs_read(name, attr, text, sizeof(text)) || !isdigit((unsigned char)text[0]))
		return false;
	*number = strtoull(text, &end, 10);
	return !*end;
}

bool kernel_sysfs_is_idle(const char *name)
{
	unsigned long reads, writes;
	char text[64];

	return !kernel_sysfs_read(name, "inflight", text, sizeof(text)) &&
	       sscanf(text, "%lu %lu", &reads, &writes) == 2 && !reads && !writes;
}

pid_t kernel_sysfs_server(const char *name)
{
	uint64_t pid;

	return kernel_sysfs_number(name, "pid", &pid) ? (pid_t)pid : 0;
}

int kernel_sysfs_partitions(
	const char *name, int (*fn)(const char *partition, void *arg), void *arg)
{
	char path[256];

	snprintf(path, sizeof(path), "/sys/block/%s", name);

	CLEANUP(dir) DIR *dir = opendir(path);
	struct dirent *entry;
	size_t name_len = strlen(name);

	if (!dir)
		return -errno;
	while ((entry = readdir(dir))) {
		if (strncmp(entry->d_name, name, name_len) || entry->d_name[name_len] != 'p')
			continue;

		int ret = fn(entry->d_name, arg);

		if (ret)
			return ret;
	}
	return 0;
}

bool kernel_sysfs_owns(const char *name, dev_t rdev)
{
	char link[64], target[512], *part;

	snprintf(link, sizeof(link), "/sys/dev/block/%u:%u", major(rdev), minor(rdev));

	ssize_t len = readlink(link, target, sizeof(target) - 1);

	if (len < 0)
		return false;
	target[len] = '\0';
	part = strstr(target, "/block/nbd");
	if (!part)
		return false;
	part += strlen("/block/");

	size_t name_len = strlen(name);

	return !strncmp(part, name, name_len) && (!part[name_len] || part[name_len] == '/');
}
