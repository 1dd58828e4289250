/*
 * The keeper's main thread: signals, the server's life, the service manager; see keeper.h.
 *
 *	STARTING --READY--> SERVING --STOPPING--> STOPPING --> the keeper ends with its status
 *	    |                  |  \----PARKED----> PARKED ---> the next program is started
 *	    \------- died -----+--> back-off, the same program is started again
 *
 * A first server that ends before it was ready has failed to start: its status is the keeper's. One that
 * dies later is replaced: at once the first time, then after pauses that grow while servers die early.
 * After EARLY_DEATHS_MAX of these in a row the keeper stops trying and only holds the devices, whose I/O waits:
 * the files below may need a hand first. SIGHUP or SIGUSR1 makes it try again, with the program that is installed then.
 *
 * An upgrade is an end with PARKED followed by the program that stands in the file system now. If that one is not
 * ready in good time it is killed and the old one, whose file is kept open, comes back.
 *
 * SIGTERM is a stop, or the first half of a restart (keeper-manager.c). Then the server parks, devices by netlink
 * wait in the service manager's store with the sockets, and the keeper ends without touching them: the next one
 * begins as if it had lost a server. A server that dies before it has given back what ends with the keeper is replaced
 * even now, as often as early deaths allow: the kernel may have data for it.
 *
 * Failure modes: the keeper allocates when a device is claimed and when a server is started, and survives not
 * getting it. Its own death ends the server, and devices that were attached by ioctl.
 */
#include "daemon/keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/keeper_private.h"
#include "daemon/kernel.h"

#define NS_PER_SEC        UINT64_C(1000000000)
#define EARLY_NS          (2 * NS_PER_SEC) /* a server that lives longer did not die of its start */
#define PAUSE_MIN_NS      (NS_PER_SEC / 10)
#define PAUSE_MAX_NS      (10 * NS_PER_SEC)
#define EARLY_DEATHS_MAX  8
#define UPGRADE_NS        (60 * NS_PER_SEC) /* for the new program to be ready */
#define DEAF_NS           (5 * NS_PER_SEC)  /* with all closers busy: see keeper-closers.c */
#define MESSAGES_PER_TURN 64
#define LAST_WORDS_MAX    1024 /* more than the socket holds: what comes then is of another process */
#define NEVER             UINT64_MAX
#define HOLD_US           "31536000000000" /* a year */
#define FINISH_US         "600000000"      /* for another server to take over and to write back */

enum phase { STARTING, SERVING, STOPPING, PARKED };

/* Of the servers, one after the other. */
struct life {
	struct keeper keeper;
	char *const *argv;
	int signals;      /* a signalfd */
	char path[4096];  /* of the program; what stands there later is the upgrade */
	int program;      /* the one that works */
	int upgrade;      /* the one that is being tried, or -1 */
	enum phase phase; /* of the server that runs or ran last */
	uint64_t started_ns, start_at_ns, upgrade_until_ns;
	uint64_t deaf_until_ns; /* NEVER: it can hear the server */
	unsigned early_deaths;  /* in a row */
	uint32_t restarts;
	char last_end[KEEPER_TEXT_LEN];
	bool trying; /* the server is of the upgrade, not ready yet */
	bool told_ready, stop_wanted, done;
	bool leaving; /* for another start, which takes everything over */
	int status;   /* of the keeper, once done */

	uint64_t watchdog_ns; /* the service manager's; 0: none */
	uint64_t alive_ns, fed_ns, looked_ns;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_SEC + (uint64_t)now.tv_nsec;
}

/* When none runs nothing happens. */
static void kill_server(const struct keeper *keeper)
{
	if (keeper->server)
		kill(keeper->server, SIGKILL);
}

void keeper_say(struct keeper *keeper, enum keeper_word word, const struct keeper_message *said,
	const int *fds, unsigned fd_count)
{
	struct keeper_message message = *said;

	message.word = word;
	message.version = KEEPER_VERSION;
	if (keeper->sock < 0)
		return;
	int ret = keeper_send(keeper->sock, &message, fds, fd_count);
	if (!ret || ret == -EPIPE || ret == -ECONNRESET)
		return;
	/* It waits for this answer, or has not read for ages. */
	log_error("keeper: the server does not listen: %s; killing it", strerror(-ret));
	kill_server(keeper);
}

/* --- starting a server ------------------------------------------------------------------------ */

/* True until that server speaks for itself, also in the pause before it. */
static void say_starting(const struct life *life)
{
	char text[KEEPER_TEXT_LEN + 64];

	if (life->stop_wanted)
		return manager_status("Starting another server, to give the kernel devices back");
	snprintf(text, sizeof(text), "Starting %s%s",
		life->restarts ? "another server, the last one: " : "a server", life->last_end);
	manager_status(text);
}

static void start_server(struct life *life)
{
	struct keeper *keeper = &life->keeper;
	int pair[2];

	life->start_at_ns = NEVER;
	say_starting(life);
	kept_config_forget_next(&keeper->config);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		log_error("keeper: socketpair: %s", strerror(errno));
		life->start_at_ns = now_ns() + NS_PER_SEC;
		return;
	}
	const struct keeper_spawn spawn = {
		.program = life->upgrade >= 0 ? life->upgrade : life->program,
		.argv = life->argv,
		.sock = pair[1],
		.listeners = &keeper->listeners,
		.config = &keeper->config,
	};
	pid_t pid = keeper_spawn(&spawn);
	close(pair[1]);
	if (pid < 0) {
		close(pair[0]);
		log_error("keeper: cannot start a server: %s", strerror(-pid));
		life->start_at_ns = now_ns() + NS_PER_SEC;
		return;
	}
	fcntl(pair[0], F_SETFL, O_NONBLOCK);
	keeper->server = pid;
	keeper->server_id++;
	keeper->sock = pair[0];
	life->phase = STARTING;
	life->started_ns = life->alive_ns = now_ns();
	life->trying = life->upgrade >= 0;
	life->upgrade_until_ns = life->trying ? life->started_ns + UPGRADE_NS : NEVER;
}

/* --- the end of a server ---------------------------------------------------------------------- */

static void describe_end(int status, char *text, size_t text_len_bytes)
{
	if (WIFSIGNALED(status))
		snprintf(text, text_len_bytes, "killed by SIG%s",
			sigabbrev_np(WTERMSIG(status)) ? sigabbrev_np(WTERMSIG(status)) : "?");
	else
		snprintf(text, text_len_bytes, "ended with status %d", WEXITSTATUS(status));
}

static void finish(struct life *life, int status)
{
	life->done = true;
	life->status = status;
}

/* It says that nothing serves now, where somebody looks. */
static void stop_trying(struct life *life)
{
	char text[KEEPER_TEXT_LEN];

	if (!life->keeper.devices.count && !life->told_ready)
		return finish(life, EXIT_FAILURE);
	snprintf(text, sizeof(text),
		"NOT SERVING: the server died %u times in a row, %s. %u kernel device%s held and "
		"wait%s. Try again with SIGHUP to this process",
		life->early_deaths, life->last_end, life->keeper.devices.count,
		life->keeper.devices.count == 1 ? " is" : "s are",
		life->keeper.devices.count == 1 ? "s" : "");
	log_error("keeper: %s (pid %d)", text, (int)getpid());
	manager_status(text);
	if (!life->told_ready) /* a start that the service manager must not give up */
		sd_notify(0, "EXTEND_TIMEOUT_USEC=" HOLD_US);
	life->start_at_ns = NEVER;
}

static uint64_t pause_after(unsigned early_deaths)
{
	return early_deaths > 1 ? MIN(PAUSE_MIN_NS << (early_deaths - 2), PAUSE_MAX_NS) : 0;
}

static void replace_dead(struct life *life)
{
	uint64_t now = now_ns();

	life->restarts++;
	life->early_deaths = now - life->started_ns < EARLY_NS ? life->early_deaths + 1 : 0;
	uint64_t pause_ns = pause_after(life->early_deaths);
	log_error("keeper: the server died: %s; %u kernel device%s held; starting it again%s",
		life->last_end, life->keeper.devices.count,
		life->keeper.devices.count == 1 ? " is" : "s are", pause_ns ? " soon" : "");
	if (life->early_deaths >= EARLY_DEATHS_MAX)
		return stop_trying(life);
	life->start_at_ns = now + pause_ns;
	say_starting(life);
}

static void drop_upgrade(struct life *life)
{
	if (life->upgrade >= 0)
		close(take_fd(&life->upgrade));
	life->trying = false;
	life->upgrade_until_ns = NEVER;
}

/* The new program does not work: the old one comes back. */
static void forget_upgrade(struct life *life, const char *why)
{
	log_error("keeper: the new program is not used, it was never ready: %s; going back to the "
		  "old one",
		why);
	snprintf(life->last_end, sizeof(life->last_end),
		"upgrade failed: the new program was never ready: %s; this is the old one", why);
	drop_upgrade(life);
	life->restarts++;
	life->start_at_ns = now_ns();
}

/* To write back and to give back, and with the program that is known to work. */
static void start_to_finish(struct life *life)
{
	drop_upgrade(life);
	life->early_deaths++;
	life->restarts++;
	life->start_at_ns = now_ns() + pause_after(life->early_deaths);
	log_info("keeper: starting another server, to give back what the kernel may have data for");
	say_starting(life);
	sd_notify(0, "EXTEND_TIMEOUT_USEC=" FINISH_US);
}

static void give_up(struct life *life, unsigned left)
{
	char text[KEEPER_TEXT_LEN];

	snprintf(text, sizeof(text),
		"NOT FINISHED: no server lived to give back %u kernel device%s, the last one: %s",
		left, left == 1 ? "" : "s", life->last_end);
	log_error("keeper: %s", text);
	manager_status(text);
	finish(life, EXIT_FAILURE);
}

/* The server has gone, and the service is to end. A restart may have become a stop: then everything is given back. */
static void end_or_replace(struct life *life, int status)
{
	if (life->phase != PARKED)
		log_error("keeper: the server died before it had %s: %s",
			life->leaving ? "handed over" : "stopped", life->last_end);
	if (life->leaving && !manager_restarts(store_count(&life->keeper))) {
		log_info("keeper: this is no restart any more, but a stop");
		life->leaving = false;
	}
	bool handed_over = life->phase == PARKED || life->trying; /* and to nobody, at a stop */
	unsigned left = devices_left(&life->keeper.devices, life->leaving);

	if (!left && (life->leaving || !handed_over))
		finish(life,
			life->leaving && WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILURE);
	else if (life->early_deaths >= EARLY_DEATHS_MAX || life->keeper.sock >= 0)
		give_up(life, left); /* or none can be started */
	else
		start_to_finish(life);
}

static void server_ended(struct life *life, int status)
{
	bool failed_to_start = life->phase == STARTING && !life->told_ready && !life->restarts;
	char text[64];

	if (WIFEXITED(status) && (life->phase == STOPPING || failed_to_start))
		return finish(life, WEXITSTATUS(status));
	life->stop_wanted = life->stop_wanted || life->phase == STOPPING;
	describe_end(status, text, sizeof(text));
	if (life->trying && !life->stop_wanted)
		return forget_upgrade(life, text);
	snprintf(life->last_end, sizeof(life->last_end), "%s",
		life->phase == PARKED ? "handed over" : text);
	if (life->stop_wanted)
		return end_or_replace(life, status);
	if (life->phase != PARKED)
		return replace_dead(life);
	log_info("keeper: the server has handed over; starting the next one");
	life->restarts++;
	life->start_at_ns = now_ns();
}

/* --- what the server says --------------------------------------------------------------------- */

static void stop_server(struct life *life)
{
	const struct keeper_message word = {};

	/* One that took over is ready first: else nobody would write back what the kernel has. */
	if (life->phase == STARTING && life->restarts)
		return;
	keeper_say(&life->keeper, life->leaving ? KEEPER_PARK : KEEPER_STOP, &word, NULL, 0);
}

static void server_ready(struct life *life)
{
	life->phase = SERVING;
	life->alive_ns = now_ns();
	kept_config_is_in_force(&life->keeper.config);
	if (life->trying) {
		log_info("keeper: the new program serves");
		close(life->program);
		life->program = life->upgrade;
		life->upgrade = -1;
		life->trying = false;
		life->upgrade_until_ns = NEVER;
	}
	life->told_ready = true;
	sd_notify(0, "READY=1");
	if (life->stop_wanted)
		stop_server(life);
}

static void server_ends(struct life *life, uint32_t word)
{
	/* Nobody asked one that takes over and is not ready: it has failed to start. */
	if (life->phase == STARTING && life->restarts)
		return;
	life->phase = word == KEEPER_PARKED ? PARKED : STOPPING;
	if (life->phase == STOPPING)
		sd_notify(0, "STOPPING=1\nSTATUS=Finishing requests in flight");
}

static void hello(struct life *life, const struct keeper_message *request)
{
	struct keeper_message answer = {
		.id = request->id,
		.restarts = life->restarts,
		.watchdog_ns = life->watchdog_ns,
	};

	if (request->version != KEEPER_VERSION) {
		answer.ret = -EPROTO;
		snprintf(answer.text, sizeof(answer.text),
			"the keeper speaks version %d, this server version %u: they were installed "
			"together, so restart the service",
			KEEPER_VERSION, request->version);
	} else {
		snprintf(answer.text, sizeof(answer.text), "%s", life->last_end);
	}
	keeper_say(&life->keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

/* -1 with errno. */
static int open_installed(const struct life *life, bool force)
{
	int program = open(life->path, O_PATH | O_CLOEXEC);
	struct stat installed, running;
	int code = 0;

	if (program < 0)
		return -1;
	if (faccessat(program, "", X_OK, AT_EMPTY_PATH | AT_EACCESS) ||
		fstat(program, &installed) || fstat(life->program, &running))
		code = errno;
	else if (!force && installed.st_dev == running.st_dev && installed.st_ino == running.st_ino)
		code = EALREADY;
	if (!code)
		return program;
	close(program);
	errno = code;
	return -1;
}

static void prepare_upgrade(struct life *life, const struct keeper_message *request)
{
	struct keeper_message answer = { .id = request->id };
	int program = open_installed(life, request->force);

	if (program < 0) {
		answer.ret = -errno;
		snprintf(answer.text, sizeof(answer.text), "%s: %s", life->path,
			errno == EALREADY ? "this program runs already" : strerror(errno));
	} else {
		if (life->upgrade >= 0)
			close(life->upgrade);
		life->upgrade = program;
	}
	keeper_say(&life->keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

/* One that is started only to give back must not take again what its predecessor had given back. */
static void claim(struct life *life, const struct keeper_message *request, struct keeper_fds *fds)
{
	struct keeper_message answer = { .id = request->id, .ret = -ESHUTDOWN };

	if (!life->stop_wanted || !life->restarts)
		return devices_request(&life->keeper, request, fds);
	snprintf(answer.text, sizeof(answer.text), "no device is attached: the service ends");
	keeper_say(&life->keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

static void handle(struct life *life, const struct keeper_message *said, struct keeper_fds *fds)
{
	switch (said->word) {
	case KEEPER_HELLO:
		return hello(life, said);
	case KEEPER_CLAIM:
		return claim(life, said, fds);
	case KEEPER_NEXT:
	case KEEPER_JOURNAL:
	case KEEPER_RECONNECT:
	case KEEPER_SETTLE:
	case KEEPER_RESIZE:
	case KEEPER_USERS:
	case KEEPER_RELEASE:
	case KEEPER_FREE:
		return devices_request(&life->keeper, said, fds);
	case KEEPER_KEEP:
		return listeners_keep(&life->keeper, said, fds);
	case KEEPER_NOTE:
		return notes_write(&life->keeper, said);
	case KEEPER_READ:
		return notes_read(&life->keeper, said);
	case KEEPER_CONFIG:
		return kept_config_take(&life->keeper, said, fds, life->phase == SERVING);
	case KEEPER_UPGRADE:
		return prepare_upgrade(life, said);
	case KEEPER_READY:
		return server_ready(life);
	case KEEPER_STATUS:
		return manager_status(said->text);
	case KEEPER_RELOADING:
		store_put_again(&life->keeper);
		sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu",
			(unsigned long long)(now_ns() / 1000));
		return manager_status(said->text);
	case KEEPER_ALIVE:
		life->alive_ns = now_ns();
		return;
	case KEEPER_STOPPING:
	case KEEPER_PARKED:
		return server_ends(life, said->word);
	}
}

/* Later, if nobody can close it now. */
static void stop_listening(struct keeper *keeper)
{
	struct keeper_fds fds = { .count = 1 };

	if (keeper->sock < 0 || !closers_free(&keeper->closers))
		return;
	fds.fd[0] = take_fd(&keeper->sock);
	closers_take(&keeper->closers, &fds);
}

static bool can_hear(struct keeper *keeper)
{
	return keeper->sock >= 0 && closers_free(&keeper->closers);
}

/* Some of what has come: one that never stops talking must not keep the keeper from everything else. */
static void hear_server(struct life *life, unsigned most)
{
	struct keeper *keeper = &life->keeper;
	struct keeper_message said;
	struct keeper_fds fds;
	int ret = 1;

	for (unsigned count = 0; count < most && can_hear(keeper); count++) {
		ret = keeper_receive(keeper->sock, &said, &fds);
		if (ret > 0)
			handle(life, &said, &fds);
		closers_take(&keeper->closers, &fds);
		if (ret <= 0)
			break;
	}
	if (ret == -EPROTO)
		log_error("keeper: the server talks nonsense; killing it");
	if (ret && ret != -EPROTO)
		return;
	kill_server(keeper); /* it ends anyhow, or should */
	stop_listening(keeper);
}

/* --- signals ---------------------------------------------------------------------------------- */

static void reap_server(struct life *life)
{
	struct keeper *keeper = &life->keeper;
	int status;

	if (!keeper->server || waitpid(keeper->server, &status, WNOHANG) != keeper->server)
		return;
	keeper->server = 0;
	hear_server(life, LAST_WORDS_MAX); /* a death is judged by them */
	stop_listening(keeper);
	server_ended(life, status);
	if (keeper->sock < 0 || life->done)
		return;
	log_error("keeper: another server can be started only when what this one sent has closed; "
		  "SIGTERM to this process (systemctl stop) ends the service without one");
	manager_status(
		"NOT SERVING: what the last server sent does not close; another one starts when it "
		"has. SIGTERM to this process (systemctl stop) ends the service without one");
}

/* The operator says so: a program that was installed meanwhile may be what mends it. */
static void try_again(struct life *life)
{
	int program = life->upgrade < 0 ? open_installed(life, false) : -1;

	log_info("keeper: trying again to start a server");
	if (program >= 0)
		life->upgrade = program;
	life->early_deaths = 0;
	life->start_at_ns = now_ns();
}

static void stop(struct life *life)
{
	/* Once: the servers that it may take are counted from here on. */
	if (!life->stop_wanted && life->keeper.server && now_ns() - life->started_ns >= EARLY_NS)
		life->early_deaths = 0;
	life->stop_wanted = true;
	life->leaving = manager_restarts(store_count(&life->keeper));
	log_info("keeper: the service %s", life->leaving ? "is restarted" : "stops");
	if (life->keeper.server)
		stop_server(life);
	else if (life->keeper.sock >= 0 || (life->leaving && store_has_all(&life->keeper)))
		finish(life, EXIT_FAILURE); /* without another server, or for the next start */
	else
		life->start_at_ns = now_ns(); /* it writes back and gives back */
}

static void handle_signals(struct life *life)
{
	struct signalfd_siginfo info;
	const struct keeper_message word = {};

	while (read(life->signals, &info, sizeof(info)) == sizeof(info)) {
		switch (info.ssi_signo) {
		case SIGCHLD:
			reap_server(life);
			break;
		case SIGTERM:
		case SIGINT:
			stop(life);
			break;
		default:
			if (life->keeper.server && info.ssi_signo == SIGHUP)
				keeper_say(&life->keeper, KEEPER_RELOAD, &word, NULL, 0);
			else if (!life->keeper.server && !life->stop_wanted)
				try_again(life);
		}
	}
}

static int watch_signals(struct life *life)
{
	static const int numbers[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD };
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < ARRAY_LEN(numbers); i++)
		sigaddset(&set, numbers[i]);
	signal(SIGPIPE, SIG_IGN);
	if (sigprocmask(SIG_BLOCK, &set, NULL))
		return -errno;
	life->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return life->signals < 0 ? -errno : 0;
}

/* --- time ------------------------------------------------------------------------------------- */

/*
 * The service manager's watchdog would end the keeper, and with it the devices, for a server that hangs. So
 * the keeper kills that server in time and starts another one, which users of the devices do not notice.
 */
static void look_after_watchdog(struct life *life, uint64_t now)
{
	if (!life->watchdog_ns)
		return;
	/* We look more often than that, unless the machine stood still, and the server with it: it has its time anew. */
	if (now - life->looked_ns >= life->watchdog_ns / 2)
		life->alive_ns = now;
	life->looked_ns = now;
	if (life->keeper.server && life->phase == SERVING &&
		now - life->alive_ns >= life->watchdog_ns) {
		log_error("keeper: the server has not moved for %u s; killing it",
			(unsigned)(life->watchdog_ns / NS_PER_SEC));
		kill_server(&life->keeper);
		life->alive_ns = now;
	}
	if (now - life->fed_ns >= life->watchdog_ns / 4) {
		sd_notify(0, "WATCHDOG=1");
		life->fed_ns = now;
	}
}

static void look_after_closers(struct life *life, uint64_t now)
{
	struct keeper *keeper = &life->keeper;

	if (!keeper->server || keeper->sock < 0 || closers_free(&keeper->closers))
		life->deaf_until_ns = NEVER;
	else if (life->deaf_until_ns == NEVER)
		life->deaf_until_ns = now + DEAF_NS;
	if (now < life->deaf_until_ns)
		return;
	life->deaf_until_ns = NEVER;
	log_error("keeper: what the server sent does not close for %u s; killing it",
		(unsigned)(DEAF_NS / NS_PER_SEC));
	kill_server(keeper);
}

static void look_at_clock(struct life *life)
{
	uint64_t now = now_ns();

	if (now >= life->upgrade_until_ns) {
		life->upgrade_until_ns = NEVER;
		log_error("keeper: the new program is not ready after %u s; killing it",
			(unsigned)(UPGRADE_NS / NS_PER_SEC));
		kill_server(&life->keeper);
	}
	look_after_closers(life, now);
	if (!life->keeper.server)
		stop_listening(&life->keeper);
	if (!life->keeper.server && life->keeper.sock < 0 && now >= life->start_at_ns)
		start_server(life);
	look_after_watchdog(life, now);
}

static int poll_timeout_ms(const struct life *life)
{
	uint64_t now = now_ns(), until = MIN(life->upgrade_until_ns, life->deaf_until_ns);

	if (!life->keeper.server && life->keeper.sock < 0)
		until = MIN(until, life->start_at_ns);
	if (life->watchdog_ns)
		until = MIN(until, life->fed_ns + life->watchdog_ns / 4);
	if (until == NEVER)
		return -1;
	return until <= now ? 0 : (int)MIN((until - now) / 1000000 + 1, UINT64_C(60000));
}

/* --- the whole -------------------------------------------------------------------------------- */

static void turn(struct life *life)
{
	struct keeper *keeper = &life->keeper;
	bool hears = keeper->server && can_hear(keeper);
	struct pollfd fds[] = {
		{ .fd = life->signals, .events = POLLIN },
		{ .fd = keeper->devices.events[0], .events = POLLIN },
		{ .fd = hears ? keeper->sock : -1, .events = POLLIN },
		{ .fd = keeper->closers.event, .events = POLLIN },
	};

	if (poll(fds, ARRAY_LEN(fds), poll_timeout_ms(life)) > 0) {
		if (fds[3].revents)
			closers_event(&keeper->closers);
		if (fds[1].revents)
			devices_events(keeper);
		if (fds[2].revents)
			hear_server(life, MESSAGES_PER_TURN);
		if (fds[0].revents)
			handle_signals(life);
	}
	if (!life->done)
		look_at_clock(life);
}

static int init(struct life *life)
{
	uint64_t watchdog_us = 0;
	ssize_t len = readlink("/proc/self/exe", life->path, sizeof(life->path) - 1);

	if (len < 0)
		return -errno;
	life->program = open("/proc/self/exe", O_PATH | O_CLOEXEC);
	if (life->program < 0)
		return -errno;
	if (sd_watchdog_enabled(1, &watchdog_us) > 0)
		life->watchdog_ns = watchdog_us * 1000 / 2;
	int ret = watch_signals(life); /* before there is a thread */
	if (!ret)
		ret = devices_init(&life->keeper.devices);
	if (!ret)
		ret = closers_init(&life->keeper.closers);
	if (ret)
		return ret;
	store_take_over(&life->keeper);
	if (life->keeper.devices.count) {
		life->restarts = 1;
		snprintf(life->last_end, sizeof(life->last_end), "its keeper ended too");
	}
	return 0;
}

int keeper_run(char *const *argv)
{
	struct life *life = calloc(1, sizeof(*life));
	struct err err;

	if (!life)
		return EXIT_FAILURE;
	*life = (struct life){
		.keeper.sock = -1,
		.argv = argv,
		.upgrade = -1,
		.upgrade_until_ns = NEVER,
		.deaf_until_ns = NEVER,
	};
	kept_config_init(&life->keeper.config);
	prctl(PR_SET_NAME, "blkstackd"); /* who attached the devices, for all who look */
	if (kernel_guard_reclaim(true, &err))
		log_debug("keeper: %s", err.text); /* the server warns, if it has devices */
	int ret = init(life);
	if (ret) {
		log_error("keeper: cannot start: %s", strerror(-ret));
		return EXIT_FAILURE;
	}
	while (!life->done)
		turn(life);
	devices_free(&life->keeper, life->leaving);
	if (!life->leaving) {
		store_forget_listeners(); /* their files are gone, and the store may outlive this */
		kept_config_drop(&life->keeper.config);
	}
	return life
		->status; /* which is not freed: threads that hang, or wait for work, look at it */
}
