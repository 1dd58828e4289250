/*
 * Listening sockets; see listen.h.
 *
 * Replacing a stale socket file is a look and a change that must not be torn apart by a second
 * daemon doing the same: both happen under a lock on the folder. "Stale" is a socket that refuses
 * connections; a file of any other kind is never removed. The mode of a socket file is narrowed
 * before bind() and only then widened, so that no moment is more open than what was asked for.
 *
 * Failure modes: every one has a text that names the address. accept() running out of descriptors
 * or memory is no reason to stop: the listener looks away for ACCEPT_RETRY_MS, since the waiting connection
 * would otherwise wake the reactor again at once.
 */
#include "daemon/listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>
#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"

#define BACKLOG          128 /* connections the kernel keeps for us between two accepts */
#define ACCEPTS_PER_TURN 32  /* then others get their turn */
#define ACCEPT_RETRY_MS  100
#define HOST_MAX_BYTES   256 /* RFC 1035: a name has at most 255 */
#define PORT_MAX_BYTES   32

/* A parsed address: a path, or a host and a port, or the like of a virtual machine. */
struct address {
	enum listen_kind kind;
	struct sockaddr_un un;
	struct sockaddr_vm vm;
	char host[HOST_MAX_BYTES], port[PORT_MAX_BYTES];
};

/* --- addresses -------------------------------------------------------------------------------- */

static int parse_unix(const char *path, struct address *address, struct err *err)
{
	address->kind = LISTEN_UNIX;
	address->un.sun_family = AF_UNIX;
	if (path[0] != '/')
		return err_set(err, EINVAL, "\"%s\": a socket's path starts with /", path);
	if (strlen(path) >= sizeof(address->un.sun_path))
		return err_set(err, ENAMETOOLONG, "\"%s\": a socket's path has at most %zu bytes",
			path, sizeof(address->un.sun_path) - 1);
	strcpy(address->un.sun_path, path);
	return 0;
}

/* A whole number up to max_value. */
static bool parse_number(const char *text, unsigned long max_value, unsigned *number)
{
	if (!*text || strlen(text) > 10 || text[strspn(text, "0123456789")])
		return false;
	unsigned long value = strtoul(text, NULL, 10);
	*number = (unsigned)value;
	return value <= max_value;
}

/* vsock(7). Port 0 is any free one, as it is for TCP. */
static int parse_vsock(const char *text, struct address *address, struct err *err)
{
	const char *colon = strchr(text, ':');
	char cid[PORT_MAX_BYTES] = "*";

	address->kind = LISTEN_VSOCK;
	address->vm = (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	if (colon)
		snprintf(
			cid, sizeof(cid), "%.*s", (int)MIN(colon - text, PORT_MAX_BYTES - 1), text);
	if ((strcmp(cid, "*") && !parse_number(cid, UINT32_MAX - 1UL, &address->vm.svm_cid)) ||
		!parse_number(colon ? colon + 1 : text, UINT32_MAX - 1UL, &address->vm.svm_port))
		return err_set(err, EINVAL,
			"\"vsock:%s\": expected vsock:PORT or vsock:CID:PORT, both numbers", text);
	if (!address->vm.svm_port)
		address->vm.svm_port = VMADDR_PORT_ANY;
	return 0;
}

static int parse_tcp(const char *text, struct address *address, struct err *err)
{
	address->kind = LISTEN_TCP;
	const char *colon = strrchr(text, ':');
	if (!colon || !colon[1] || colon == text)
		return err_set(err, EINVAL, "\"tcp:%s\": expected tcp:HOST:PORT", text);

	const char *host = text;
	size_t host_len = (size_t)(colon - text);
	if (host[0] == '[' && host[host_len - 1] == ']') {
		host++;
		host_len -= 2;
	} else if (memchr(host, ':', host_len)) {
		return err_set(err, EINVAL,
			"\"tcp:%s\": an IPv6 address stands in brackets: tcp:[::1]:10809", text);
	}
	if (host_len >= HOST_MAX_BYTES || strlen(colon + 1) >= PORT_MAX_BYTES)
		return err_set(err, EINVAL, "\"tcp:%s\": host or port is too long", text);
	/* getaddrinfo() would take such a number modulo 2^16. */
	if (strspn(colon + 1, "0123456789") == strlen(colon + 1) &&
		strtoul(colon + 1, NULL, 10) > 65535)
		return err_set(err, EINVAL, "\"tcp:%s\": a port is at most 65535", text);
	memcpy(address->host, host, host_len);
	strcpy(address->port, colon + 1);
	return 0;
}

static int address_parse(const char *text, struct address *address, struct err *err)
{
	*address = (struct address){};
	if (!strncmp(text, "unix:", 5))
		return parse_unix(text + 5, address, err);
	if (!strncmp(text, "tcp:", 4))
		return parse_tcp(text + 4, address, err);
	if (!strncmp(text, "vsock:", 6))
		return parse_vsock(text + 6, address, err);
	if (text[0] == '/')
		return parse_unix(text, address, err);
	return err_set(err, EINVAL,
		"\"%s\" is no address: expected unix:PATH, tcp:HOST:PORT or vsock:PORT", text);
}

int listener_check(const char *address, struct err *err)
{
	struct address parsed;

	return address_parse(address, &parsed, err);
}

static bool same_vsock(const struct sockaddr_vm *a, const struct sockaddr_vm *b)
{
	return a->svm_cid == b->svm_cid && a->svm_port == b->svm_port;
}

bool listener_same_address(const char *a, const char *b)
{
	struct address parsed_a, parsed_b;
	struct err err;

	if (!address_parse(a, &parsed_a, &err) && parsed_a.kind == LISTEN_VSOCK &&
		!address_parse(b, &parsed_b, &err) && parsed_b.kind == LISTEN_VSOCK)
		return same_vsock(&parsed_a.vm, &parsed_b.vm);
	a += strncmp(a, "unix:", 5) ? 0 : 5;
	b += strncmp(b, "unix:", 5) ? 0 : 5;
	return !strcmp(a, b);
}

enum listen_kind listener_kind(const char *address)
{
	struct address parsed;
	struct err err;

	return address_parse(address, &parsed, &err) ? LISTEN_TCP : parsed.kind;
}

bool listener_is_loopback(const char *address)
{
	struct address parsed;
	struct err err;
	struct in_addr v4;
	struct in6_addr v6;

	if (address_parse(address, &parsed, &err) || parsed.kind == LISTEN_UNIX)
		return false;
	if (parsed.kind == LISTEN_VSOCK)
		return parsed.vm.svm_cid == VMADDR_CID_LOCAL;
	if (inet_pton(AF_INET, parsed.host, &v4) == 1)
		return ntohl(v4.s_addr) >> 24 == IN_LOOPBACKNET;
	if (inet_pton(AF_INET6, parsed.host, &v6) == 1)
		return IN6_IS_ADDR_LOOPBACK(&v6);
	return !strcasecmp(parsed.host, "localhost");
}

/* --- sockets from the service manager --------------------------------------------------------- */

static bool same_inet(const struct sockaddr *a, const struct sockaddr *b)
{
	if (a->sa_family != b->sa_family)
		return false;
	if (a->sa_family == AF_INET) {
		const struct sockaddr_in *a4 = (const void *)a, *b4 = (const void *)b;
		return a4->sin_port == b4->sin_port && a4->sin_addr.s_addr == b4->sin_addr.s_addr;
	}
	const struct sockaddr_in6 *a6 = (const void *)a, *b6 = (const void *)b;
	return a6->sin6_port == b6->sin6_port &&
	       !memcmp(&a6->sin6_addr, &b6->sin6_addr, sizeof(a6->sin6_addr));
}

/* The listening socket that was passed to us for this address, or -1. */
static int passed_socket(const struct sockaddr *wanted)
{
	int passed_count = sd_listen_fds(0);

	for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + passed_count; fd++) {
		if (wanted->sa_family == AF_UNIX) {
			const struct sockaddr_un *un = (const void *)wanted;
			if (sd_is_socket_unix(fd, SOCK_STREAM, 1, un->sun_path, 0) > 0)
				return fd;
			continue;
		}
		if (wanted->sa_family == AF_VSOCK) {
			struct sockaddr_vm vm = {};
			socklen_t vm_len = sizeof(vm);
			if (sd_is_socket(fd, AF_VSOCK, SOCK_STREAM, 1) > 0 &&
				!getsockname(fd, (struct sockaddr *)&vm, &vm_len) &&
				same_vsock(&vm, (const void *)wanted))
				return fd;
			continue;
		}
		struct sockaddr_storage bound = {};
		socklen_t bound_len = sizeof(bound);
		if (sd_is_socket_inet(fd, AF_UNSPEC, SOCK_STREAM, 1, 0) > 0 &&
			!getsockname(fd, (struct sockaddr *)&bound, &bound_len) &&
			same_inet((struct sockaddr *)&bound, wanted))
			return fd;
	}
	return -1;
}

/* --- unix sockets ----------------------------------------------------------------------------- */

/* 0 when the file at un was stale and is gone now. */
static int remove_stale(const struct sockaddr_un *un, struct err *err)
{
	const char *path = un->sun_path;
	struct stat st;

	if (lstat(path, &st))
		return err_sys(err, errno, "cannot look at \"%s\"", path);
	if (!S_ISSOCK(st.st_mode))
		return err_set(err, EADDRINUSE,
			"\"%s\" exists and is not a socket; remove it or choose another path",
			path);
	CLEANUP(fd) int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (probe < 0)
		return err_sys(err, errno, "cannot create a socket");
	if (!connect(probe, (const struct sockaddr *)un, sizeof(*un)) || errno != ECONNREFUSED)
		return err_set(err, EADDRINUSE,
			"\"%s\" is in use by another process (is blkstackd running already?)",
			path);
	if (unlink(path))
		return err_sys(err, errno, "cannot remove the stale socket \"%s\"", path);
	return 0;
}

/* Opens and locks the folder of path; the folder itself is created when only it is missing. */
static int lock_folder(const char *path, struct err *err)
{
	char copy[sizeof(((struct sockaddr_un *)0)->sun_path)];
	snprintf(copy, sizeof(copy), "%s", path);
	const char *folder = dirname(copy);

	if (!mkdir(folder, 0755))
		log_debug("created the folder \"%s\"", folder);
	CLEANUP(fd) int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return err_sys(err, errno, "socket \"%s\": folder \"%s\"", path, folder);
	if (flock(fd, LOCK_EX))
		return err_sys(err, errno, "cannot lock the folder \"%s\"", folder);
	return take_fd(&fd);
}

static int open_access(
	struct listener *listener, const struct listen_access *access, struct err *err)
{
	const char *path = listener->path;
	struct stat st;

	if ((access->uid != (uid_t)-1 || access->gid != (gid_t)-1) &&
		lchown(path, access->uid, access->gid))
		return err_sys(err, errno, "cannot change the owner of \"%s\"", path);
	if (chmod(path, access->mode) || lstat(path, &st))
		return err_sys(err, errno, "cannot change the mode of \"%s\"", path);
	listener->path_dev = st.st_dev;
	listener->path_ino = st.st_ino;
	return 0;
}

static bool is_kept(int fd)
{
	char **names = NULL;
	int count = sd_listen_fds_with_names(0, &names);
	bool kept = fd < SD_LISTEN_FDS_START + count &&
		    !strcmp(names[fd - SD_LISTEN_FDS_START], LISTEN_KEPT);

	for (int i = 0; i < count; i++)
		free(names[i]);
	free(names);
	return kept;
}

/* A predecessor made it. Should we fail to start, the next one is to be found there. */
static void take_over_file(struct listener *listener, const char *path)
{
	struct stat st;

	listener->passed = !is_kept(listener->fd);
	if (listener->passed || lstat(path, &st) || !S_ISSOCK(st.st_mode))
		return;
	listener->path = strdup(path);
	listener->path_dev = st.st_dev;
	listener->path_ino = st.st_ino;
	listener->waits = true;
}

static int open_unix(struct listener *listener, const struct sockaddr_un *un,
	const struct listen_access *access, struct err *err)
{
	const struct sockaddr *addr = (const struct sockaddr *)un;
	const char *path = un->sun_path;
	int ret;

	snprintf(listener->text, sizeof(listener->text), "unix:%s", path);
	listener->fd = passed_socket(addr);
	if (listener->fd >= 0) {
		take_over_file(listener, path);
		return 0;
	}
	CLEANUP(fd) int folder = lock_folder(path, err);
	if (folder < 0)
		return folder;
	CLEANUP(fd) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || fchmod(fd, access->mode & 0600))
		return err_sys(err, errno, "cannot create a socket");
	if (bind(fd, addr, sizeof(*un))) {
		if (errno != EADDRINUSE)
			return err_sys(err, errno, "cannot listen on \"%s\"", path);
		ret = remove_stale(un, err);
		if (ret)
			return ret;
		if (bind(fd, addr, sizeof(*un)))
			return err_sys(err, errno, "cannot listen on \"%s\"", path);
	}
	listener->path = strdup(path);
	if (!listener->path || listen(fd, BACKLOG)) {
		ret = err_sys(err, errno, "cannot listen on \"%s\"", path);
		unlink(path);
		return ret;
	}
	ret = open_access(listener, access, err);
	if (ret)
		unlink(path);
	else
		listener->fd = take_fd(&fd);
	return ret;
}

/* --- TCP -------------------------------------------------------------------------------------- */

static int bind_tcp(const struct addrinfo *info)
{
	const int on = 1, off = 0;
	CLEANUP(fd) int fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		return -errno;
	if (info->ai_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	if (bind(fd, info->ai_addr, info->ai_addrlen) || listen(fd, BACKLOG))
		return -errno;
	return take_fd(&fd);
}

static void describe_tcp(struct listener *listener)
{
	struct sockaddr_storage bound = {};
	socklen_t bound_len = sizeof(bound);
	char host[NI_MAXHOST] = "?", port[NI_MAXSERV] = "?";

	if (!getsockname(listener->fd, (struct sockaddr *)&bound, &bound_len))
		getnameinfo((struct sockaddr *)&bound, bound_len, host, sizeof(host), port,
			sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
	snprintf(listener->text, sizeof(listener->text),
		bound.ss_family == AF_INET6 ? "tcp:[%s]:%s" : "tcp:%s:%s", host, port);
}

static int open_tcp(struct listener *listener, const struct address *address, struct err *err)
{
	bool any = !strcmp(address->host, "*");
	struct addrinfo hints = {
		.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE
	};
	struct addrinfo *list;
	int ret = getaddrinfo(any ? NULL : address->host, address->port, &hints, &list);
	if (ret)
		return err_set(err, EADDRNOTAVAIL, "cannot resolve \"tcp:%s:%s\": %s",
			address->host, address->port, gai_strerror(ret));

	/* IPv6 first when every address is meant: that one socket then serves IPv4 too. */
	ret = -EADDRNOTAVAIL;
	for (int pass = any ? 0 : 1; pass < 2 && ret < 0; pass++) {
		for (struct addrinfo *info = list; info && ret < 0; info = info->ai_next) {
			if (pass == 0 && info->ai_family != AF_INET6)
				continue;
			int passed = passed_socket(info->ai_addr);
			listener->passed = passed >= 0 && !is_kept(passed);
			ret = passed >= 0 ? passed : bind_tcp(info);
		}
	}
	freeaddrinfo(list);
	if (ret < 0)
		return err_sys(
			err, -ret, "cannot listen on \"tcp:%s:%s\"", address->host, address->port);
	listener->fd = ret;
	describe_tcp(listener);
	return 0;
}

/* --- vsock ------------------------------------------------------------------------------------ */

static void describe_vsock(struct listener *listener, const struct sockaddr_vm *vm)
{
	char cid[PORT_MAX_BYTES] = "*", port[PORT_MAX_BYTES] = "0";

	if (vm->svm_cid != VMADDR_CID_ANY)
		snprintf(cid, sizeof(cid), "%u", vm->svm_cid);
	if (vm->svm_port != VMADDR_PORT_ANY)
		snprintf(port, sizeof(port), "%u", vm->svm_port);
	snprintf(listener->text, sizeof(listener->text), "vsock:%s:%s", cid, port);
}

static int open_vsock(struct listener *listener, const struct sockaddr_vm *vm, struct err *err)
{
	const struct sockaddr *addr = (const struct sockaddr *)vm;
	struct sockaddr_vm bound = *vm;
	socklen_t bound_len = sizeof(bound);

	describe_vsock(listener, vm);
	listener->fd = passed_socket(addr);
	listener->passed = listener->fd >= 0 && !is_kept(listener->fd);
	if (listener->fd < 0) {
		CLEANUP(fd) int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd < 0 || bind(fd, addr, sizeof(*vm)) || listen(fd, BACKLOG))
			return err_sys(err, errno, "cannot listen on \"%s\"%s", listener->text,
				fd < 0 ? " (has this kernel the module vsock?)" : "");
		listener->fd = take_fd(&fd);
	}
	getsockname(listener->fd, (struct sockaddr *)&bound, &bound_len);
	describe_vsock(listener, &bound);
	return 0;
}

static int open_by_kind(struct listener *listener, const struct address *address,
	const struct listen_access *access, struct err *err)
{
	switch (address->kind) {
	case LISTEN_UNIX:
		return open_unix(listener, &address->un, access, err);
	case LISTEN_VSOCK:
		return open_vsock(listener, &address->vm, err);
	default:
		return open_tcp(listener, address, err);
	}
}

/* --- the life of a listener ------------------------------------------------------------------- */

int listener_open(struct listener *listener, const char *address,
	const struct listen_access *access, struct err *err)
{
	struct address parsed;

	*listener = (struct listener){ .fd = -1 };
	int ret = address_parse(address, &parsed, err);
	if (ret)
		return ret;
	ret = open_by_kind(listener, &parsed, access, err);
	if (!ret && fcntl(listener->fd, F_SETFL, O_NONBLOCK))
		ret = err_sys(err, errno, "cannot listen on \"%s\"", address);
	if (ret)
		listener_close(listener);
	return ret;
}

static bool worth_a_pause(int code)
{
	return code == EMFILE || code == ENFILE || code == ENOBUFS || code == ENOMEM;
}

static void listener_readable(struct watch *watch, uint32_t epoll_events)
{
	struct listener *listener = container_of(watch, struct listener, watch);

	for (int i = 0; i < ACCEPTS_PER_TURN && listener->watching; i++) {
		int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd >= 0) {
			listener->accepted(listener, fd);
		} else if (worth_a_pause(errno)) {
			log_warning("%s: cannot accept a connection: %s; trying again in %d ms",
				listener->text, strerror(errno), ACCEPT_RETRY_MS);
			watch_modify(&listener->watch, 0);
			timer_arm(&listener->retry, reactor_now_ns() + ACCEPT_RETRY_MS * NS_PER_MS);
			return;
		} else if (errno == EAGAIN) {
			return;
		}
	}
}

static void listener_retry(struct timer *timer)
{
	struct listener *listener = container_of(timer, struct listener, retry);

	watch_modify(&listener->watch, EPOLLIN);
}

int listener_start(struct listener *listener, void (*accepted)(struct listener *listener, int fd))
{
	listener->accepted = accepted;
	timer_init(&listener->retry, listener_retry);
	int ret = watch_add(&listener->watch, listener->fd, EPOLLIN, listener_readable);
	listener->watching = !ret;
	if (!ret)
		listener->waits = false;
	return ret;
}

/* Whether there is a socket file that we made or serve, and nobody put another one there. */
static bool is_ours(const struct listener *listener)
{
	struct stat st;

	return listener->path && !listener->waits && !lstat(listener->path, &st) &&
	       st.st_dev == listener->path_dev && st.st_ino == listener->path_ino;
}

int listener_set_access(
	struct listener *listener, const struct listen_access *access, struct err *err)
{
	/* Whom the config does not name any more has lost it. */
	const struct listen_access named = {
		.mode = access->mode,
		.uid = access->uid == (uid_t)-1 ? geteuid() : access->uid,
		.gid = access->gid == (gid_t)-1 ? getegid() : access->gid,
	};

	return is_ours(listener) ? open_access(listener, &named, err) : 0;
}

void listener_stop(struct listener *listener)
{
	if (!listener->watching)
		return;
	watch_remove(&listener->watch);
	timer_cancel(&listener->retry);
	listener->watching = false;
}

void listener_leave_file(struct listener *listener)
{
	free(listener->path);
	listener->path = NULL;
}

void listener_close(struct listener *listener)
{
	if (listener->fd >= 0)
		close(listener->fd);
	listener->fd = -1;
	if (is_ours(listener))
		unlink(listener->path);
	listener_leave_file(listener);
}
