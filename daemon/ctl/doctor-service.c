/*
 * What doctor says of the daemon, its config and its sockets, and of udev and systemd; see doctor.h.
 *
 * The config is checked by blkstackd itself (`--check`), which also prints the addresses; so doctor judges
 * it exactly as the daemon will. An address is tried by connecting to it and saying nothing: while the daemon
 * runs somebody must answer, and while it does not nobody may.
 *
 * Failure modes: a daemon that takes the connection but does not answer is given ANSWER_TIMEOUT_S.
 */
#include <errno.h>
#include <grp.h>
#include <netdb.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/ctl/doctor.h"

#define ANSWER_TIMEOUT_S 10
#define OUTPUT_MAX_BYTES 65536
#define RULE             "99-blkstack.rules"
#define UNIT             "blkstackd.service"
#define UNIT_CONFIG      "/etc/blkstack/blkstack.conf"

/* --- the config ------------------------------------------------------------------------------- */

/* Takes what `blkstackd --check` printed apart: the sockets, and what devices the exports have. */
static void read_check_output(struct doctor *doctor, char *output)
{
	doctor->listen = json_array();
	doctor->wants_no_device = true;
	for (char *line = strtok(output, "\n"); line; line = strtok(NULL, "\n")) {
		size_t name_len = strcspn(line, " ");

		if (!strncmp(line, "control  ", 9) && strcmp(line + 9, "none") &&
			!strcmp(doctor->ctl->socket_path, CTL_DEFAULT_SOCKET))
			snprintf(doctor->control, sizeof(doctor->control), "%s", line + 9);
		else if (!strncmp(line, "listen   ", 9))
			json_array_append_new(
				doctor->listen, json_stringn(line + 9, strcspn(line + 9, " ")));
		else if (name_len && !strncmp(line + name_len, "  device ", 9)) {
			doctor->wants_no_device = false;
			doctor->wants_netlink |= !!strstr(line + name_len, " by netlink");
		}
	}
}

/* The blkstackd that belongs to this command: beside it, or in ../sbin; else the one in PATH. */
static void find_daemon(char path[PATH_MAX])
{
	static const char *const places[] = { "blkstackd", "../sbin/blkstackd" };
	char self[PATH_MAX];
	ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);

	for (size_t i = 0; len > 0 && i < ARRAY_LEN(places); i++) {
		self[len] = '\0';
		char *slash = strrchr(self, '/');
		snprintf(path, PATH_MAX, "%.*s/%s", (int)(slash - self), self, places[i]);
		if (!access(path, X_OK))
			return;
	}
	snprintf(path, PATH_MAX, "blkstackd");
}

void doctor_check_config(struct doctor *doctor)
{
	char daemon[PATH_MAX];
	const char *words[] = { daemon, "--config", doctor->config, "--check", NULL };
	CLEANUP(free) char *output = malloc(OUTPUT_MAX_BYTES);

	if (!doctor->config || !output)
		return;
	find_daemon(daemon);
	int status = doctor_run(words, output, OUTPUT_MAX_BYTES);
	if (status < 0) {
		doctor_find(doctor, DOCTOR_PROBLEM, "config",
			"Install blkstackd beside blkstackctl, or in the PATH: make install",
			"cannot run %s, which is to check %s", daemon, doctor->config);
	} else if (status) {
		output[strcspn(output, "\n")] = '\0';
		doctor_find(doctor, DOCTOR_PROBLEM, "config",
			"Correct that line; see blkstack.conf(5). The whole report: blkstackd "
			"--config FILE --check",
			"%s", *output ? output : "blkstackd --check fails and says nothing");
	} else {
		doctor_find(doctor, DOCTOR_OK, "config", "", "%.*s", (int)strcspn(output, "\n"),
			output);
		read_check_output(doctor, output);
	}
}

/* --- sockets ---------------------------------------------------------------------------------- */

static void set_timeouts(int fd)
{
	struct timeval timeout = { .tv_sec = ANSWER_TIMEOUT_S };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
}

/* A connected socket, or -errno. */
static int connect_unix(const char *path)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(un.sun_path))
		return -ENAMETOOLONG;
	strcpy(un.sun_path, path);
	CLEANUP(fd) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	set_timeouts(fd);
	if (connect(fd, (struct sockaddr *)&un, sizeof(un)))
		return -errno;
	return take_fd(&fd);
}

/* The same for "HOST:PORT"; a host of "*" is this one. */
static int connect_tcp(const char *address)
{
	const char *colon = strrchr(address, ':');
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *list = NULL;
	char host[256];
	int ret = -ECONNREFUSED;

	if (!colon)
		return -EINVAL;
	bool brackets = *address == '[';
	snprintf(host, sizeof(host), "%.*s", (int)(colon - address) - 2 * brackets,
		address + brackets);
	if (getaddrinfo(strcmp(host, "*") ? host : NULL, colon + 1, &hints, &list))
		return -EADDRNOTAVAIL;
	for (const struct addrinfo *at = list; at && ret < 0; at = at->ai_next) {
		CLEANUP(fd) int fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, 0);
		if (fd < 0)
			continue;
		set_timeouts(fd);
		ret = connect(fd, at->ai_addr, at->ai_addrlen) ? -errno : take_fd(&fd);
	}
	freeaddrinfo(list);
	return ret;
}

/* "its mode is 0660, its owner root, its group disk", as far as they can be seen. */
static const char *describe_file(const char *path, char text[256])
{
	struct stat st;

	snprintf(text, 256, "its folder cannot be looked into");
	if (stat(path, &st))
		return text;
	const struct passwd *user = getpwuid(st.st_uid);
	const struct group *group = getgrgid(st.st_gid);
	snprintf(text, 256, "mode %04o, user %s (%u), group %s (%u)", st.st_mode & 07777,
		user ? user->pw_name : "?", st.st_uid, group ? group->gr_name : "?", st.st_gid);
	return text;
}

/* --- the daemon ------------------------------------------------------------------------------- */

static void ask_daemon(struct doctor *doctor)
{
	const char *version = "?";
	json_int_t pid = 0;
	json_t *reply;

	if (ctl_call(doctor->ctl, "Info", NULL, &reply)) {
		doctor_find(doctor, DOCTOR_PROBLEM, "daemon",
			"Its log tells more (journalctl -u blkstackd). Before you end a daemon "
			"that\n"
			"hangs, unmount what is on its devices: they end with it.",
			"somebody listens on %s, but does not answer as blkstackd does",
			doctor->control);
		return;
	}
	json_unpack(reply, "{s:s, s:I}", "version", &version, "pid", &pid);
	doctor->daemon = (pid_t)pid;
	if (strcmp(version, BLKSTACK_VERSION))
		doctor_find(doctor, DOCTOR_NOTE, "daemon",
			"Restart it when its devices are not in use: it is of another version.",
			"blkstackd %s answers on %s (pid %d), but blkstackctl is %s", version,
			doctor->control, (int)pid, BLKSTACK_VERSION);
	else
		doctor_find(doctor, DOCTOR_OK, "daemon", "", "blkstackd %s answers on %s (pid %d)",
			version, doctor->control, (int)pid);
	json_decref(reply);
}

void doctor_check_daemon(struct doctor *doctor)
{
	static const char start[] = "Start it: systemctl start blkstackd, or blkstackd --config "
				    "FILE\nIf it runs, its "
				    "config may name another socket (see --socket and --config).";
	char file[256];
	int fd = connect_unix(doctor->control);

	if (fd >= 0) {
		doctor->ctl->fd = fd;
		ask_daemon(doctor);
		ctl_close(doctor->ctl);
	} else if (fd == -ENOENT) {
		doctor_find(doctor, DOCTOR_NOTE, "daemon", start,
			"blkstackd does not run: there is no socket %s", doctor->control);
	} else if (fd == -ECONNREFUSED) {
		doctor_find(doctor, DOCTOR_NOTE, "daemon", start,
			"blkstackd does not run: nobody listens on %s (a left-over, which does no "
			"harm)",
			doctor->control);
	} else if (fd == -EACCES || fd == -EPERM) {
		doctor_find(doctor, DOCTOR_PROBLEM, "daemon",
			"Try as root or as a member of that group; control-mode and control-group "
			"in "
			"the\nconfig decide.",
			"uid %u may not connect to %s: %s", geteuid(), doctor->control,
			describe_file(doctor->control, file));
	} else {
		doctor_find(doctor, DOCTOR_PROBLEM, "daemon", "Give the right one with --socket.",
			"cannot connect to %s: %s", doctor->control, strerror(-fd));
	}
}

static void check_address(struct doctor *doctor, const char *address)
{
	bool is_unix = !strncmp(address, "unix:", 5);
	const char *place = strchr(address, ':') + 1;
	CLEANUP(fd) int fd = is_unix ? connect_unix(place) : connect_tcp(place);
	char file[256];

	if (fd >= 0 && !doctor->daemon)
		doctor_find(doctor, DOCTOR_NOTE, "sockets",
			is_unix ? "Who it is: ss -xlp\nblkstackd started with this config would be "
				  "refused the socket."
				: "Who it is: ss -tlp\nblkstackd started with this config would be "
				  "refused the port.",
			"somebody listens on %s, but no blkstackd answers", address);
	else if (fd >= 0)
		doctor_find(doctor, DOCTOR_OK, "sockets", "", "%s takes connections", address);
	else if (fd == -EACCES)
		doctor_find(doctor, DOCTOR_PROBLEM, "sockets",
			"Try as root or as a member of that group; listen-mode and listen-group in "
			"the config decide.",
			"uid %u may not connect to %s: %s", geteuid(), address,
			describe_file(place, file));
	else if (fd == -EADDRNOTAVAIL || fd == -EINVAL || fd == -ENAMETOOLONG)
		doctor_find(doctor, DOCTOR_PROBLEM, "sockets",
			"Correct the address, or the resolver (getent hosts NAME).",
			"%s is no address that this machine knows", address);
	else if (doctor->daemon)
		doctor_find(doctor, DOCTOR_PROBLEM, "sockets",
			"Does it run with this config? When its devices are not in use, restart "
			"it:\n"
			"a unix socket that was removed comes back then, too.",
			"blkstackd runs, but %s takes no connection: %s", address, strerror(-fd));
	else
		doctor_find(doctor, DOCTOR_OK, "sockets", "", "%s is free for blkstackd", address);
}

void doctor_check_listen(struct doctor *doctor)
{
	const json_t *address;
	size_t i;

	json_array_foreach(doctor->listen, i, address)
	{
		check_address(doctor, json_string_value(address));
	}
}

/* --- udev ------------------------------------------------------------------------------------- */

/* The rule that counts, the first folder that has it; false when there is none. */
static bool find_rule(const struct doctor *doctor, char path[PATH_MAX])
{
	static const char *const folders[] = { "/etc", "/run", "/usr/local/lib", "/usr/lib",
		"/lib" };

	for (size_t i = 0; i < ARRAY_LEN(folders); i++)
		if (!access(doctor_path(doctor, path, "%s/udev/rules.d/%s", folders[i], RULE),
			    F_OK))
			return true;
	return false;
}

void doctor_check_udev(struct doctor *doctor)
{
	char path[PATH_MAX];
	struct stat st;

	if (!doctor_exists(doctor, "/run/udev/control"))
		doctor_find(doctor, DOCTOR_NOTE, "udev",
			"Nothing has to be done: use the devices' own names (blkstackctl list "
			"shows "
			"them).",
			"udev does not run here, so there are no names /dev/blkstack/NAME");
	else if (!find_rule(doctor, path))
		doctor_find(doctor, DOCTOR_NOTE, "udev",
			"Install it (make install, or cp systemd/" RULE
			" /etc/udev/rules.d/), then\n"
			"udevadm control --reload",
			"the rule for the names /dev/blkstack/NAME is missing (" RULE ")");
	else if (stat(path, &st) || !S_ISREG(st.st_mode) || !st.st_size)
		doctor_find(doctor, DOCTOR_NOTE, "udev",
			"Remove that file if the names are wanted, then udevadm control --reload",
			"the rule for the names /dev/blkstack/NAME is switched off by %s", path);
	else
		doctor_find(doctor, DOCTOR_OK, "udev", "", "runs and has the rule %s", path);
}

/* --- systemd ---------------------------------------------------------------------------------- */

static void get_property(const char *output, const char *name, char value[64])
{
	size_t name_len = strlen(name);

	*value = '\0';
	for (const char *line = output; line && *line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, name, name_len) && line[name_len] == '=') {
			line += name_len + 1;
			snprintf(value, 64, "%.*s", (int)strcspn(line, "\n"), line);
			return;
		}
	}
}

/* What the keeper gives it may have been refused; it would give back devices and sockets at a restart. */
static bool store_is_full(const char *output)
{
	char stored[64], most[64];

	get_property(output, "NFileDescriptorStore", stored);
	get_property(output, "FileDescriptorStoreMax", most);
	return *most && strtoul(stored, NULL, 10) >= strtoul(most, NULL, 10);
}

static void judge_unit(struct doctor *doctor, const char *output)
{
	char load[64], active[64], file[64], result[64];

	get_property(output, "LoadState", load);
	get_property(output, "ActiveState", active);
	get_property(output, "UnitFileState", file);
	get_property(output, "Result", result);
	if (!strcmp(load, "not-found"))
		doctor_find(doctor, DOCTOR_NOTE, "systemd",
			"make install, then systemctl daemon-reload && systemctl enable --now "
			"blkstackd",
			"the unit " UNIT " is not installed");
	else if (strcmp(load, "loaded"))
		doctor_find(doctor, strcmp(load, "masked") ? DOCTOR_PROBLEM : DOCTOR_NOTE,
			"systemd", "systemctl unmask blkstackd, or: systemd-analyze verify " UNIT,
			"the unit " UNIT " cannot be started: %s", load);
	else if (!strcmp(active, "failed"))
		doctor_find(doctor, DOCTOR_PROBLEM, "systemd",
			"The reason: journalctl -u blkstackd -n 50\nThen: systemctl restart "
			"blkstackd",
			"the unit " UNIT " has failed (%s)", result);
	else if (strncmp(file, "enabled", 7))
		doctor_find(doctor, DOCTOR_NOTE, "systemd", "systemctl enable blkstackd",
			"the unit " UNIT " is %s, but does not start at boot (%s)", active, file);
	else if (strcmp(active, "active") && !doctor_exists(doctor, UNIT_CONFIG))
		doctor_find(doctor, DOCTOR_NOTE, "systemd",
			"Write it; examples are in /usr/local/share/blkstack/examples.",
			"the unit " UNIT
			" is enabled, but starts only with a config in " UNIT_CONFIG);
	else if (!strcmp(active, "active") && store_is_full(output))
		doctor_find(doctor, DOCTOR_NOTE, "systemd",
			"Raise FileDescriptorStoreMax= in the unit (systemctl edit blkstackd), "
			"then\n"
			"systemctl daemon-reload && systemctl reload blkstackd",
			"the store of " UNIT " is full: a restart of it may detach devices in use");
	else
		doctor_find(doctor, DOCTOR_OK, "systemd", "", "the unit " UNIT " is %s and %s",
			file, active);
}

void doctor_check_systemd(struct doctor *doctor)
{
	static const char *const words[] = { "systemctl", "show", UNIT,
		"--property=LoadState,ActiveState,UnitFileState,Result,"
		"NFileDescriptorStore,FileDescriptorStoreMax",
		NULL };
	char output[4096];

	if (!doctor_exists(doctor, "/run/systemd/system"))
		doctor_find(doctor, DOCTOR_OK, "systemd", "",
			"does not run here; blkstackd needs none");
	else if (doctor_run(words, output, sizeof(output)))
		doctor_find(doctor, DOCTOR_NOTE, "systemd",
			"systemctl status blkstackd, as root, may tell more.",
			"systemd runs, but systemctl does not tell of " UNIT);
	else
		judge_unit(doctor, output);
}
