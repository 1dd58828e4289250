/*
 * Starting a server: fork, descriptors into place, exec.
 *
 * The keeper has threads, so between fork and exec there are system calls only: environment and arguments were
 * made before. The listening sockets arrive as a service manager passes them, from descriptor 3 on, and the
 * socket to the keeper behind them, with the configuration in force. All that the keeper has besides is close-on-exec. The server
 * dies with the keeper's main thread (PR_SET_PDEATHSIG), and sees the end of the socket as well.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/keeper_private.h"

extern char **environ;

#define FDS_MAX   (KEEPER_LISTENERS_MAX + 3)
#define NAMES_LEN (KEEPER_LISTENERS_MAX * (sizeof(((struct kept_listener *)0)->name) + 1))

/* What the server must not take for its own. */
static bool is_ours(const char *variable)
{
	static const char *const names[] = { "NOTIFY_SOCKET=", "WATCHDOG_", "LISTEN_" };

	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (!strncmp(variable, names[i], strlen(names[i])))
			return true;
	return false;
}

struct environment {
	char **vars;
	char fds[32];
	char names[sizeof("LISTEN_FDNAMES=") + NAMES_LEN];
};

static int make_environment(struct environment *env, const struct listeners *listeners)
{
	size_t count = 0;

	while (environ[count])
		count++;
	env->vars = calloc(count + 3, sizeof(*env->vars));
	if (!env->vars)
		return -ENOMEM;
	count = 0;
	for (char **var = environ; *var; var++)
		if (!is_ours(*var))
			env->vars[count++] = *var;
	if (!listeners->count)
		return 0;
	snprintf(env->fds, sizeof(env->fds), "LISTEN_FDS=%u", listeners->count);
	strcpy(env->names, "LISTEN_FDNAMES=");
	for (unsigned i = 0; i < listeners->count; i++) {
		if (i)
			strcat(env->names, ":");
		strcat(env->names, listeners->items[i].name);
	}
	env->vars[count++] = env->fds;
	env->vars[count++] = env->names;
	return 0;
}

/* In the new process. First out of the way, then into place. */
static void place_fds(const int *fds, unsigned count, int first)
{
	int moved[FDS_MAX];

	for (unsigned i = 0; i < count; i++) {
		moved[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, first + (int)count);
		if (moved[i] < 0)
			_exit(127);
	}
	for (unsigned i = 0; i < count; i++)
		if (dup2(moved[i], first + (int)i) < 0)
			_exit(127);
}

static void become_server(const struct keeper_spawn *spawn, char *const *argv, char *const *envp,
	const int *fds, unsigned fd_count, pid_t keeper)
{
	int program = fcntl(spawn->program, F_DUPFD_CLOEXEC, SD_LISTEN_FDS_START + (int)fd_count);
	sigset_t none;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (program < 0 || getppid() != keeper)
		_exit(127);
	place_fds(fds, fd_count, SD_LISTEN_FDS_START);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	syscall(SYS_execveat, program, "", argv, envp, AT_EMPTY_PATH);
	_exit(127);
}

pid_t keeper_spawn(const struct keeper_spawn *spawn)
{
	const struct listeners *listeners = spawn->listeners;
	struct environment env = {};
	const struct kept_config *config = spawn->config;
	unsigned fd_count = listeners->count;
	int fds[FDS_MAX];
	char option[32], config_option[32];
	size_t argc = 0;

	while (spawn->argv[argc])
		argc++;
	CLEANUP(free) const char **argv = calloc(argc + 3, sizeof(*argv));
	int ret = argv ? make_environment(&env, listeners) : -ENOMEM;
	CLEANUP(free) char **vars = env.vars;
	if (ret)
		return ret;
	memcpy(argv, spawn->argv, argc * sizeof(*argv));
	for (unsigned i = 0; i < listeners->count; i++)
		fds[i] = listeners->items[i].fd;
	snprintf(option, sizeof(option), "--server=%d", SD_LISTEN_FDS_START + (int)fd_count);
	argv[argc++] = option;
	fds[fd_count++] = spawn->sock;
	if (kept_config_is_known(config)) {
		snprintf(config_option, sizeof(config_option), "--%s=%d",
			config->from_before ? "before" : "in-force",
			SD_LISTEN_FDS_START + (int)fd_count);
		argv[argc] = config_option;
		fds[fd_count++] = config->fds[0];
		fds[fd_count++] = config->fds[1];
	}

	pid_t keeper = getpid(), pid = fork();
	if (!pid)
		become_server(spawn, (char *const *)argv, vars, fds, fd_count, keeper);
	return pid < 0 ? -errno : pid;
}
