/*
 * blkstackctl doctor: what its files share.
 *
 *	doctor.c		the report, and the order of the checks
 *	doctor-system.c		kernel, driver, io_uring, permissions, limits
 *	doctor-devices.c	the NBD devices of this machine, one by one
 *	doctor-service.c	the daemon, its config and sockets, udev, systemd
 */
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include <jansson.h>

#include "daemon/ctl/ctl.h"

/* A note is worth knowing but stands in nobody's way; a problem does. */
enum doctor_state { DOCTOR_OK, DOCTOR_NOTE, DOCTOR_PROBLEM };

struct doctor {
	struct ctl *ctl;
	const char *root;     /* "" or the folder that takes the place of / */
	const char *config;   /* NULL: none was given */
	json_t *findings;     /* array of {check, state, text, remedy} */
	json_t *listen;       /* array of the config's NBD addresses, NULL: unknown */
	char control[256];    /* the control socket's path */
	bool wants_no_device; /* a config was given and no export of it has a kernel device */
	bool wants_netlink;   /* a config was given and an export of it demands netlink */
	pid_t daemon;         /* 0: none answers */
	size_t notes, problems;
};

/*
 * Adds a finding; remedy may be "" for one that needs none. The text is one line; lines of the remedy are
 * separated by newlines.
 */
void doctor_find(struct doctor *doctor, enum doctor_state state, const char *check,
	const char *remedy, const char *fmt, ...) __attribute__((format(printf, 5, 6)));

/* --- files below the root: doctor.c ----------------------------------------------------------- */

/* The path as it is to be opened. */
const char *doctor_path(const struct doctor *doctor, char path[PATH_MAX], const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
bool doctor_exists(const struct doctor *doctor, const char *path);
/* The first line of a file without its newline; false when it cannot be read. */
bool doctor_read(const struct doctor *doctor, const char *path, char *text, size_t len_bytes);
/* What follows "KEY:" or "KEY=" in a file, or the line's rest behind a KEY that ends in a space. */
bool doctor_field(const struct doctor *doctor, const char *path, const char *key, char *text,
	size_t len_bytes);
/* The release of the kernel that runs. */
void doctor_release(const struct doctor *doctor, char *text, size_t len_bytes);

/*
 * Runs a command and keeps the end of what it prints. Its exit status, or -1 when it could not be run.
 */
int doctor_run(const char *const *words, char *output, size_t len_bytes);

/* --- the checks ------------------------------------------------------------------------------- */

void doctor_check_kernel(struct doctor *doctor);
void doctor_check_driver(struct doctor *doctor);
void doctor_check_io_uring(struct doctor *doctor);
void doctor_check_permissions(struct doctor *doctor);
void doctor_check_limits(struct doctor *doctor);
void doctor_check_devices(struct doctor *doctor);
void doctor_check_config(struct doctor *doctor);
void doctor_check_daemon(struct doctor *doctor);
void doctor_check_listen(struct doctor *doctor);
void doctor_check_udev(struct doctor *doctor);
void doctor_check_systemd(struct doctor *doctor);
