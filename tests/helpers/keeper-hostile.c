/*
 * A server that its keeper must survive. Installed in the place of blkstackd and started by an upgrade, it has
 * the keeper's socket (--server=N) and does what HOSTILE in the environment says:
 *
 *	a way to misbehave	see the table at the end; it then waits to be killed, or ends with 3. One is what the user
 *				of a config, who the server becomes, must not be able to do
 *	random SEED		requests with random contents and descriptors, all of which are answered
 *
 * What it is answered is checked here, what becomes of the keeper in tests/integration/keeper-hostile.test. A
 * check that fails is told on standard error, and is status 1.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"
#include "daemon/keeper-wire.h"
#include "daemon/keeper_private.h"
#include "daemon/privileges.h"

#define CHECK(cond)                                                                         \
	do {                                                                                \
		if (!(cond)) {                                                              \
			fprintf(stderr, "HOSTILE: %s:%d: %s\n", __FILE__, __LINE__, #cond); \
			exit(1);                                                            \
		}                                                                           \
	} while (0)

static int sock;
static uint32_t last_id;

/* As keeper_send(), but for anything. */
static void send_raw(const void *bytes, size_t len, const int *fds, unsigned fd_count)
{
	static union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * 253)];
	} control;
	struct iovec iov = { (void *)bytes, len };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd_count) {
		header.msg_control = control.bytes;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
		struct cmsghdr *part = CMSG_FIRSTHDR(&header);
		part->cmsg_level = SOL_SOCKET;
		part->cmsg_type = SCM_RIGHTS;
		part->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(part), fds, sizeof(int) * fd_count);
	}
	CHECK(sendmsg(sock, &header, MSG_NOSIGNAL) == (ssize_t)len);
}

/* The answer replaces *message; its code. */
static int ask(
	enum keeper_word word, struct keeper_message *message, const int *fds, unsigned fd_count)
{
	struct keeper_fds got;

	message->word = word;
	message->version = KEEPER_VERSION;
	message->id = ++last_id;
	send_raw(message, sizeof(*message), fds, fd_count);
	do {
		CHECK(keeper_receive(sock, message, &got) == 1);
		keeper_fds_close(&got);
	} while (message->word != KEEPER_ANSWER || message->id != last_id);
	return message->ret;
}

static int ask_text(enum keeper_word word, const char *export, const char *device, const char *text)
{
	struct keeper_message message = {
		.connections = 1, .block_size = 512, .size_bytes = 1 << 20
	};

	snprintf(message.export, sizeof(message.export), "%s", export);
	snprintf(message.device, sizeof(message.device), "%s", device);
	snprintf(message.text, sizeof(message.text), "%s", text);
	return ask(word, &message, NULL, 0);
}

static void wait_for_death(void)
{
	for (;;)
		pause();
}

/* --- what is no message: the keeper kills it --------------------------------------------------- */

static void too_short(void)
{
	send_raw("abc", 3, NULL, 0);
	wait_for_death();
}

static void too_long(void)
{
	char bytes[sizeof(struct keeper_message) + 1] = { KEEPER_ALIVE };

	send_raw(bytes, sizeof(bytes), NULL, 0);
	wait_for_death();
}

static void unknown_word(void)
{
	send_raw(&(struct keeper_message){ .word = KEEPER_WORDS }, sizeof(struct keeper_message),
		NULL, 0);
	wait_for_death();
}

static void endless_text(void)
{
	struct keeper_message message = { .word = KEEPER_STATUS };

	memset(message.text, 'x', sizeof(message.text));
	send_raw(&message, sizeof(message), NULL, 0);
	wait_for_death();
}

static void many_connections(void)
{
	const struct keeper_message message = { .word = KEEPER_CLAIM, .connections = 4000000000U };

	send_raw(&message, sizeof(message), NULL, 0);
	wait_for_death();
}

static void many_fds(void)
{
	const struct keeper_message message = { .word = KEEPER_ALIVE };
	int fds[253];

	for (size_t i = 0; i < ARRAY_LEN(fds); i++)
		fds[i] = STDERR_FILENO;
	send_raw(&message, sizeof(message), fds, ARRAY_LEN(fds));
	wait_for_death();
}

/* Which looks like the end of all. */
static void empty_with_fds(void)
{
	const int fds[] = { STDERR_FILENO, STDERR_FILENO };

	send_raw("", 0, fds, ARRAY_LEN(fds));
	wait_for_death();
}

static void never_listens(void)
{
	struct keeper_message message = { .word = KEEPER_HELLO };

	for (;;)
		send_raw(&message, sizeof(message), NULL, 0);
}

static void hangs_up(void)
{
	close(sock);
	wait_for_death();
}

/* --- what is refused --------------------------------------------------------------------------- */

static void foreign_devices(void)
{
	static const char *const devices[] = { "", "nbd0", "/dev/", "/dev/nbd", "/dev/sda",
		"/dev/nbd0p1", "/dev/nbd0/../sda", "/dev/nbd-1", "/dev/nbd 1", "/dev/nbd1234567",
		"auto ", "../nbd0" };
	static const char *const exports[] = { "", ".", "../a", "a/b", "a\nb", "a b", "-a", "a\"" };

	for (size_t i = 0; i < ARRAY_LEN(devices); i++)
		CHECK(ask_text(KEEPER_CLAIM, "mine", devices[i], "") == -EINVAL);
	for (size_t i = 0; i < ARRAY_LEN(exports); i++)
		CHECK(ask_text(KEEPER_CLAIM, exports[i], "auto", "") == -EINVAL);
}

static void foreign_slots(void)
{
	static const enum keeper_word words[] = { KEEPER_RECONNECT, KEEPER_SETTLE, KEEPER_RESIZE,
		KEEPER_USERS, KEEPER_RELEASE, KEEPER_FREE, KEEPER_NEXT };
	static const uint32_t slots[] = { 0, 1, KEEPER_DEVICES_MAX - 1, KEEPER_DEVICES_MAX,
		UINT32_MAX };

	for (size_t i = 0; i < ARRAY_LEN(words) * ARRAY_LEN(slots); i++) {
		struct keeper_message message = { .slot = slots[i % ARRAY_LEN(slots)] };

		CHECK(ask(words[i / ARRAY_LEN(slots)], &message, NULL, 0) == -ENOENT);
	}
}

static int listener(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	const struct sockaddr_un any = { .sun_family = AF_UNIX };

	CHECK(!bind(fd, (const struct sockaddr *)&any, sizeof(any.sun_family)) && !listen(fd, 1));
	return fd;
}

static void wrong_fds(void)
{
	int pair[2], memory = memfd_create("journal", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	struct keeper_message message = {};

	CHECK(memory >= 0 && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	const int not_listening[] = { STDERR_FILENO, memory, pair[0], sock };
	for (size_t i = 0; i < ARRAY_LEN(not_listening); i++) {
		message = (struct keeper_message){};
		CHECK(ask(KEEPER_KEEP, &message, &not_listening[i], 1) == -EINVAL);
	}
	message = (struct keeper_message){};
	const int mixed[] = { listener(), memory };
	CHECK(ask(KEEPER_KEEP, &message, mixed, 2) == -EINVAL);
	CHECK(ask(KEEPER_JOURNAL, &message, &memory, 1) == -EINVAL);
	for (enum keeper_word word = KEEPER_HELLO; word <= KEEPER_FREE; word++)
		ask(word, &message, not_listening, ARRAY_LEN(not_listening));
}

/* Each time instead of those before: the keeper has never more than that. */
static void many_listeners(void)
{
	int fds[KEEPER_LISTENERS_MAX];

	for (size_t i = 0; i < ARRAY_LEN(fds); i++)
		fds[i] = listener();
	for (int i = 0; i < 100; i++) {
		struct keeper_message message = {};

		CHECK(!ask(KEEPER_KEEP, &message, fds, ARRAY_LEN(fds)));
	}
}

/* Sealed memory of that size, with nothing in it that anybody could read as a config. */
static int sealed(size_t size_bytes)
{
	int fd = memfd_create("config", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && write(fd, "exports = (((", 13) == 13 && !ftruncate(fd, (off_t)size_bytes));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
	return fd;
}

/* None is taken that could change, take long to close or be large; one that is nonsense does no harm: it is never in force. */
static void foreign_config(void)
{
	int pair[2], memory = memfd_create("config", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int good = sealed(20), large = sealed((size_t)KEEPER_CONFIG_MAX_BYTES + 1);
	struct keeper_message message = {};

	CHECK(memory >= 0 && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	const int bad[] = { STDERR_FILENO, memory, pair[0], sock, large };
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		const int fds[] = { good, bad[i] };
		message = (struct keeper_message){};
		CHECK(ask(KEEPER_CONFIG, &message, fds, 2) == -EINVAL);
	}
	const int goods[] = { good, good, good };
	for (unsigned count = 0; count <= 3; count++) {
		message = (struct keeper_message){};
		CHECK(ask(KEEPER_CONFIG, &message, goods, count) == (count == 2 ? 0 : -EINVAL));
	}
	for (int i = 0; i < 1000; i++)
		CHECK(!ask(KEEPER_CONFIG, &message, goods, 2));
}

static void many_notes(void)
{
	char name[16], text[KEEPER_NOTE_LEN + 1];
	int ret = 0;

	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	CHECK(ask_text(KEEPER_NOTE, "a", "", text) == -EINVAL);
	CHECK(ask_text(KEEPER_NOTE, "", "", "x") == -EINVAL);
	for (unsigned i = 0; i <= KEEPER_NOTES_MAX && !ret; i++) {
		snprintf(name, sizeof(name), "%u", i);
		ret = ask_text(KEEPER_NOTE, name, "", "x");
	}
	CHECK(ret == -ENOSPC);
	for (unsigned i = 0; i < KEEPER_NOTES_MAX; i++) {
		struct keeper_message message = { .slot = i };

		CHECK(!ask(KEEPER_READ, &message, NULL, 0) && message.slot == i);
		CHECK(!ask_text(KEEPER_NOTE, message.export, "", ""));
	}
	struct keeper_message message = {};
	CHECK(ask(KEEPER_READ, &message, NULL, 0) == -ENOENT);
}

static void another_version(void)
{
	struct keeper_message message = {
		.word = KEEPER_HELLO, .version = KEEPER_VERSION + 1, .id = 7
	};
	struct keeper_fds fds;

	send_raw(&message, sizeof(message), NULL, 0);
	CHECK(keeper_receive(sock, &message, &fds) == 1 && message.id == 7 &&
		message.ret == -EPROTO);
}

/* As a server does that fails to start: it takes down what it has. That is not the end of the service. */
static void another_version_stops(void)
{
	another_version();
	send_raw(&(struct keeper_message){ .word = KEEPER_STOPPING }, sizeof(struct keeper_message),
		NULL, 0);
}

static void parks_at_once(void)
{
	send_raw(&(struct keeper_message){ .word = KEEPER_PARKED }, sizeof(struct keeper_message),
		NULL, 0);
}

/* --- descriptors that take their time to close -------------------------------------------------- */

/* A connection with bytes that nobody reads, whose last close waits for them. */
static int lingering(int *peer)
{
	const struct linger hour = { .l_onoff = 1, .l_linger = 3600 };
	struct sockaddr_in local = { .sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t local_len = sizeof(local);
	static char bytes[1 << 16];
	int ear = socket(AF_INET, SOCK_STREAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(!bind(ear, (struct sockaddr *)&local, local_len) && !listen(ear, 1) &&
		!getsockname(ear, (struct sockaddr *)&local, &local_len) &&
		!connect(fd, (struct sockaddr *)&local, local_len));
	*peer = accept(ear, NULL, NULL);
	CHECK(*peer >= 0 && !setsockopt(fd, SOL_SOCKET, SO_LINGER, &hour, sizeof(hour)));
	while (send(fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
		;
	return fd;
}

/* Each with a message of its own. The keeper's descriptors are the last ones; to exit waits for nothing. */
static void send_lingering(unsigned count)
{
	const struct keeper_message message = { .word = KEEPER_STATUS };
	pid_t keeper = getppid(), child;
	int peer, fds[64];

	for (unsigned i = 0; i < count; i++)
		fds[i] = lingering(&peer);
	CHECK(!kill(keeper, SIGSTOP));
	child = fork();
	if (!child) {
		for (unsigned i = 0; i < count; i++)
			send_raw(&message, sizeof(message), &fds[i], 1);
		_exit(0);
	}
	for (unsigned i = 0; i < count; i++)
		CHECK(!close(fds[i]));
	CHECK(waitpid(child, NULL, 0) == child && !kill(keeper, SIGCONT));
}

static void lingers(void)
{
	struct keeper_message message = {};

	send_lingering(1);
	CHECK(!ask(KEEPER_HELLO, &message, NULL, 0));
}

/* More than the keeper has patience for. */
static void lingers_often(void)
{
	send_lingering(KEEPER_CLOSERS + 2);
	wait_for_death();
}

/* --- what an ordinary user cannot do ------------------------------------------------------------ */

static bool is_denied(int ret)
{
	return ret < 0 && (errno == EACCES || errno == EPERM);
}

static void check_closed(const char *path)
{
	static const int modes[] = { O_RDONLY, O_WRONLY, O_RDWR };

	for (size_t i = 0; i < ARRAY_LEN(modes); i++) {
		int fd = open(path, modes[i] | O_NONBLOCK | O_CLOEXEC);

		if (is_denied(fd) || (fd < 0 && errno == ENOENT))
			continue;
		fprintf(stderr, "HOSTILE: %s opens: %d, %s\n", path, fd, strerror(errno));
		exit(1);
	}
}

/* Disks: each of them, whoever else may use it. */
static void check_block_devices(void)
{
	DIR *dir = opendir("/dev");
	struct dirent *entry;
	char path[512];

	CHECK(dir);
	while ((entry = readdir(dir))) {
		struct stat stat;

		snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
		if (!lstat(path, &stat) && S_ISBLK(stat.st_mode))
			check_closed(path);
	}
	closedir(dir);
	check_closed("/dev/mem");
	CHECK(is_denied(mknod("node", S_IFBLK | 0600, makedev(7, 0))));
}

static void check_keeper(pid_t keeper)
{
	static const char *const files[] = { "mem", "environ", "fd/3", "maps" };
	char path[64];

	for (size_t i = 0; i < ARRAY_LEN(files); i++) {
		snprintf(path, sizeof(path), "/proc/%d/%s", (int)keeper, files[i]);
		check_closed(path);
	}
	CHECK(is_denied(kill(keeper, SIGKILL)));
	CHECK(is_denied((int)ptrace(PTRACE_SEIZE, keeper, NULL, NULL)));
}

/* Besides standard input and the like there are sockets and the config to have, and nothing else that the keeper has open. */
static void check_inherited(void)
{
	char path[64], target[512];

	for (int fd = STDERR_FILENO + 1; fd < 1024; fd++) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		ssize_t len = readlink(path, target, sizeof(target) - 1);
		if (len < 0)
			continue;
		target[len] = '\0';
		if (!strncmp(target, "socket:", strlen("socket:")) ||
			!strcmp(target, "/memfd:blkstack-config (deleted)"))
			continue;
		fprintf(stderr, "HOSTILE: it was started with %d open, %s\n", fd, target);
		exit(1);
	}
}

/* As the configured user, which a server becomes by the same function, from the state in which the keeper starts it. */
static void ordinary_user(void)
{
	const struct passwd *nobody = getpwnam("nobody");
	const pid_t keeper = getppid();
	struct err err;

	check_inherited();
	CHECK(nobody && !privileges_drop(nobody->pw_uid, nobody->pw_gid, &err));
	CHECK(is_denied(setuid(0)) && is_denied(setgid(0)));
	check_keeper(keeper);
	check_block_devices();
	check_closed("/etc/shadow");
	check_closed("secret"); /* of the test, which is root */
	CHECK(is_denied(open("file", O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
	CHECK(is_denied(unlink("control")) && is_denied(unlink("secret")));
	CHECK(is_denied(open("/run/blkstack/lock/nbd0", O_RDWR | O_CREAT | O_CLOEXEC, 0600)) ||
		errno == ENOENT);
}

/* --- what it does in between ------------------------------------------------------------------- */

/* Nobody is there to take the answer. */
static void dies_in_a_claim(void)
{
	struct keeper_message message = { .word = KEEPER_CLAIM,
		.connections = KEEPER_CONNECTIONS_MAX,
		.block_size = 512,
		.export = "mine",
		.device = "auto" };

	for (unsigned i = 0; i < 8; i++) {
		snprintf(message.export, sizeof(message.export), "mine%u", i);
		send_raw(&message, sizeof(message), NULL, 0);
	}
}

#define FLOODERS 8

/* Never stops talking; the keeper must hear of a signal all the same, and pass it on. */
static void floods(void)
{
	struct keeper_message message = { .word = KEEPER_READY };
	struct keeper_fds fds;

	send_raw(&message, sizeof(message), NULL, 0);
	message.word = KEEPER_ALIVE;
	for (unsigned i = 0; i < FLOODERS; i++) {
		if (fork())
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			send_raw(&message, sizeof(message), NULL, 0);
	}
	do
		CHECK(keeper_receive(sock, &message, &fds) == 1);
	while (message.word != KEEPER_RELOAD);
}

static void random_requests(void)
{
	static const char *const texts[] = { "", "auto", "/dev/nbd0", "disk", "a/../b", "x\ny",
		"%s%n" };
	const int fds[] = { STDERR_FILENO, sock, listener() };
	const char *seed = getenv("SEED");

	srandom(seed ? (unsigned)strtoul(seed, NULL, 0) : 1);
	for (unsigned i = 0; i < 3000; i++) {
		struct keeper_message message;
		uint8_t *bytes = (uint8_t *)&message;

		for (size_t b = 0; b < sizeof(message); b++)
			bytes[b] = random() % 4 ? 0 : (uint8_t)random();
		message.connections = (uint32_t)random() % (KEEPER_CONNECTIONS_MAX + 1);
		snprintf(message.export, sizeof(message.export), "%s",
			texts[random() % ARRAY_LEN(texts)]);
		snprintf(message.device, sizeof(message.device), "%s",
			texts[random() % ARRAY_LEN(texts)]);
		snprintf(message.text, sizeof(message.text), "%s",
			texts[random() % ARRAY_LEN(texts)]);
		ask((enum keeper_word)(KEEPER_HELLO + random() % KEEPER_UPGRADE), &message, fds,
			(unsigned)random() % (ARRAY_LEN(fds) + 1));
	}
}

static const struct {
	const char *name;
	void (*run)(void);
} ways[] = {
	{ "too_short", too_short },
	{ "too_long", too_long },
	{ "unknown_word", unknown_word },
	{ "endless_text", endless_text },
	{ "many_connections", many_connections },
	{ "many_fds", many_fds },
	{ "empty_with_fds", empty_with_fds },
	{ "never_listens", never_listens },
	{ "hangs_up", hangs_up },
	{ "foreign_devices", foreign_devices },
	{ "foreign_slots", foreign_slots },
	{ "wrong_fds", wrong_fds },
	{ "many_listeners", many_listeners },
	{ "foreign_config", foreign_config },
	{ "many_notes", many_notes },
	{ "another_version", another_version },
	{ "another_version_stops", another_version_stops },
	{ "parks_at_once", parks_at_once },
	{ "lingers", lingers },
	{ "lingers_often", lingers_often },
	{ "ordinary_user", ordinary_user },
	{ "dies_in_a_claim", dies_in_a_claim },
	{ "floods", floods },
	{ "random", random_requests },
	{ "never_ready", wait_for_death },
};

int main(int argc, char **argv)
{
	const char *way = getenv("HOSTILE");

	for (int i = 1; i < argc; i++)
		if (!strncmp(argv[i], "--server=", strlen("--server=")))
			sock = atoi(argv[i] + strlen("--server="));
	CHECK(sock && way);
	for (size_t i = 0; i < ARRAY_LEN(ways); i++) {
		if (strcmp(ways[i].name, way))
			continue;
		ways[i].run();
		return 3;
	}
	CHECK(!"HOSTILE names no way");
}
