/*
 * blkstackd: the command line and what concerns the process as a whole.
 *
 * Everything that is checked is checked before anything is opened. Exit status: 0 after a clean end, 1
 * for a config or a start that failed, 2 for a wrong command line. Errors of the config are printed as they
 * are, since they start with the place: `blkstack.conf:41: ...`.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <malloc.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon/config.h"
#include "daemon/daemon.h"
#include "daemon/help.h"
#include "daemon/kernel.h"

#define EXIT_USAGE 2

/* Descriptors besides those of connections: sockets, epoll, rings, a few per export and its device. */
#define FDS_BASE       128
#define FDS_PER_EXPORT 16

struct args {
	const char *config, *engine;
	bool check;
};

static int usage_error(const char *text)
{
	fprintf(stderr, "blkstackd: %s; see blkstackd --help\n", text);
	return EXIT_USAGE;
}

static bool set_log_level(const char *name)
{
	static const char *const names[] = { "error", "warning", "info", "debug" };

	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		if (!strcmp(names[i], name)) {
			log_set_level((enum log_level)i);
			return true;
		}
	}
	return false;
}

/* What could not be written (a full disk, a closed pipe) must not look like success. */
static int finish_output(void)
{
	if (fflush(stdout) || ferror(stdout)) {
		log_error("cannot write to standard output: %s", strerror(errno));
		return EXIT_FAILURE;
	}
	return EXIT_SUCCESS;
}

/* -1: go on; else the exit status. */
static int parse_args(int argc, char **argv, struct args *args)
{
	static const struct option options[] = {
		{ "config", required_argument, NULL, 'c' },
		{ "check", no_argument, NULL, 'n' },
		{ "engine", required_argument, NULL, 'e' },
		{ "log-level", required_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ "version", no_argument, NULL, 'V' },
		{},
	};
	int option;

	while ((option = getopt_long(argc, argv, "c:ne:l:hV", options, NULL)) != -1) {
		switch (option) {
		case 'c':
			args->config = optarg;
			break;
		case 'n':
			args->check = true;
			break;
		case 'e':
			args->engine = optarg;
			if (!config_engine_known(optarg))
				return usage_error("--engine is auto, uring or threads");
			break;
		case 'l':
			if (!set_log_level(optarg))
				return usage_error("--log-level is error, warning, info or debug");
			break;
		case 'h':
			help_print(stdout);
			return finish_output();
		case 'V':
			puts("blkstackd " BLKSTACK_VERSION);
			return finish_output();
		default:
			return usage_error("wrong command line");
		}
	}
	if (optind < argc)
		return usage_error("arguments without an option are not expected");
	if (!args->config)
		return usage_error("--config FILE is missing");
	return -1;
}

/* --- the process ------------------------------------------------------------------------------ */

/* Descriptors 0 to 2 are open, so that no socket or disk ever becomes standard error. */
static void open_standard_fds(void)
{
	int fd;

	do {
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	} while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

static void raise_fd_limit(const struct config *config)
{
	rlim_t wanted = FDS_BASE + FDS_PER_EXPORT * config->export_count +
			(rlim_t)config->max_connections;
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= wanted)
		return;
	if (limit.rlim_max < wanted)
		log_warning("the limit of %lu open files may be too low for %lld connections and "
			    "%zu exports (LimitNOFILE=, ulimit -n)",
			(unsigned long)limit.rlim_max, (long long)config->max_connections,
			config->export_count);
	limit.rlim_cur = MIN(wanted, limit.rlim_max);
	setrlimit(RLIMIT_NOFILE, &limit);
}

static bool has_device(const struct config *config)
{
	for (size_t i = 0; i < config->export_count; i++)
		if (*config->exports[i]->device)
			return true;
	return false;
}

/* A device may also be attached later, so every daemon that can is exempted from reclaim. */
static void guard_reclaim(const struct config *config)
{
	bool device = has_device(config);
	struct err err;

	if (kernel_guard_reclaim(device, &err))
		log_msg(device ? LOG_LEVEL_WARNING : LOG_LEVEL_DEBUG, "%s", err.text);
}

/* --- sockets of the service manager ----------------------------------------------------------- */

/* The address of a listening socket, as the config would say it. */
static int passed_address(int fd, char *text, size_t text_len_bytes)
{
	union {
		struct sockaddr any;
		struct sockaddr_un un;
		struct sockaddr_storage storage;
	} bound = {};
	socklen_t bound_len = sizeof(bound);
	char host[NI_MAXHOST], port[NI_MAXSERV];

	if (getsockname(fd, &bound.any, &bound_len))
		return -errno;
	if (bound.any.sa_family == AF_UNIX) {
		snprintf(text, text_len_bytes, "unix:%s", bound.un.sun_path);
		return 0;
	}
	if (getnameinfo(&bound.any, bound_len, host, sizeof(host), port, sizeof(port),
		    NI_NUMERICHOST | NI_NUMERICSERV))
		return -EAFNOSUPPORT;
	snprintf(text, text_len_bytes,
		bound.any.sa_family == AF_INET6 ? "tcp:[%s]:%s" : "tcp:%s:%s", host, port);
	return 0;
}

/*
 * Sockets named "nbd" and "control" stand in for a config that has no `listen` or `control`. Those that
 * the config names are found by their address, when they are opened.
 */
static int adopt_sockets(struct config *config, struct err *err)
{
	bool no_listen = !config->listen_count, no_control = !*config->control;
	char **names = NULL;
	int count = sd_listen_fds_with_names(0, &names), ret = 0;

	for (int i = 0; i < count && !ret; i++) {
		char address[sizeof("unix:") + NI_MAXHOST + NI_MAXSERV];
		if (passed_address(SD_LISTEN_FDS_START + i, address, sizeof(address)))
			continue;
		if (no_listen && !strcmp(names[i], "nbd"))
			ret = config_add_listen(config, address, err);
		else if (no_control && !strcmp(names[i], "control"))
			config_set_control(config, address);
	}
	for (int i = 0; i < count; i++)
		free(names[i]);
	free(names);
	return ret;
}

static int run(struct config *config)
{
	struct err err;

	if (adopt_sockets(config, &err)) {
		log_error("%s", err.text);
		return EXIT_FAILURE;
	}
	if (!config->listen_count && !*config->control && !has_device(config))
		log_warning(
			"%s: there is neither listen nor control nor a device: nobody can reach "
			"the exports",
			config->path);
	raise_fd_limit(config);
	guard_reclaim(config);
	mallopt(M_ARENA_MAX, 1); /* hardly anything is allocated while serving */
	if (!daemon_run(config, &err))
		return EXIT_SUCCESS;
	log_error("%s", err.text);
	return EXIT_FAILURE;
}

int main(int argc, char **argv)
{
	struct args args = {};
	struct config *config;
	struct err err;

	open_standard_fds();
	int status = parse_args(argc, argv, &args);
	if (status >= 0)
		return status;
	if (config_load(args.config, &config, &err)) {
		log_error("%s", err.text);
		return EXIT_FAILURE;
	}
	if (args.engine)
		config->engine = args.engine;
	if (args.check) {
		config_print(config, stdout);
		status = finish_output();
	} else {
		status = run(config);
	}
	config_free(config);
	return status;
}
