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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon/config-source.h"
#include "daemon/config.h"
#include "daemon/daemon.h"
#include "daemon/help.h"
#include "daemon/keeper.h"
#include "daemon/kernel.h"

#define EXIT_USAGE 2

struct args {
	struct config_source source;
	bool check;
	bool keeper; /* this process is to be the keeper */
	int server;  /* this process is its server: the socket to it; else -1 */
};

static int usage_error(const char *text)
{
	fprintf(stderr, "blkstackd: %s; see blkstackd --help\n", text);
	return EXIT_USAGE;
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
		/* Between our own processes. */
		{ "keeper", no_argument, NULL, 'K' },
		{ "server", required_argument, NULL, 'S' },
		{ "in-force", required_argument, NULL, 'F' },
		{ "before", required_argument, NULL, 'B' },
		{},
	};
	int option;

	while ((option = getopt_long(argc, argv, "c:ne:l:hV", options, NULL)) != -1) {
		switch (option) {
		case 'c':
			args->source.path = optarg;
			break;
		case 'n':
			args->check = true;
			break;
		case 'e':
			args->source.engine = optarg;
			if (!config_engine_known(optarg))
				return usage_error("--engine is auto, uring or threads");
			break;
		case 'l':
			args->source.log_level = optarg;
			if (!config_log_level_known(optarg))
				return usage_error("--log-level is error, warning, info or debug");
			break;
		case 'h':
			help_print(stdout);
			return finish_output();
		case 'K':
			args->keeper = true;
			break;
		case 'S':
			args->server = atoi(optarg);
			break;
		case 'F':
		case 'B':
			args->source.in_force.settings = atoi(optarg);
			args->source.in_force.exports = atoi(optarg) + 1;
			args->source.restarted = option == 'B';
			break;
		case 'V':
			puts("blkstackd " BLKSTACK_VERSION);
			return finish_output();
		default:
			return usage_error("wrong command line");
		}
	}
	if (optind < argc)
		return usage_error("arguments without an option are not expected");
	if (!args->source.path)
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

/* A device may also be attached later, so every daemon that can is exempted from reclaim. */
static void guard_reclaim(const struct config *config)
{
	bool device = config_has_device(config);
	struct err err;

	if (kernel_guard_reclaim(device, &err))
		log_msg(device ? LOG_LEVEL_WARNING : LOG_LEVEL_DEBUG, "%s", err.text);
}

/* Takes the config over. */
static int run(const struct config_source *source, struct config_start *start, int keeper_sock)
{
	const struct config *config = start->config;
	struct err err;

	config_apply_log_level(config);
	if (!config->listen_count && !*config->control && !config_has_device(config))
		log_warning(
			"%s: there is neither listen nor control nor a device: nobody can reach "
			"the exports",
			config->path);
	guard_reclaim(config);
	mallopt(M_ARENA_MAX, 1); /* hardly anything is allocated while serving */
	if (!daemon_run(source, start, keeper_sock, &err))
		return EXIT_SUCCESS;
	log_error("%s", err.text);
	return EXIT_FAILURE;
}

/* Exactly as it stands in the file: no socket of the service manager, no option in between. */
static int check(const struct config_source *source)
{
	struct config *config;
	struct err err;

	if (config_load(source->path, &config, &err)) {
		log_error("%s", err.text);
		return EXIT_FAILURE;
	}
	config_print(config, stdout);
	config_free(config);
	return finish_output();
}

/* --- keeper and server ------------------------------------------------------------------------ */

/*
 * This process becomes the keeper, anew: so that nothing of the config is left in its memory. Returns only on
 * an error.
 */
static int become_keeper(int argc, char **argv)
{
	char **args = calloc((size_t)argc + 2, sizeof(*args));
	int passed_count = sd_listen_fds(0);

	/* Who looked at what the service manager passed has set it. */
	for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + passed_count; fd++)
		fcntl(fd, F_SETFD, 0);
	if (args) {
		memcpy(args, argv, (size_t)argc * sizeof(*args));
		args[argc] = (char *)"--keeper";
		execv("/proc/self/exe", args);
	}
	log_error("cannot become the keeper: /proc/self/exe: %s", strerror(errno));
	free(args);
	return EXIT_FAILURE;
}

/* The keeper's command line is its server's, and then --keeper. */
static int be_keeper(int argc, char **argv)
{
	struct rlimit limit;

	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	argv[argc - 1] = NULL;
	return keeper_run(argv);
}

/* What the keeper passes looks like a service manager's, but for what it could not know. */
static void be_server(const struct in_force *in_force)
{
	char pid[16];

	if (in_force->settings >= 0) {
		fcntl(in_force->settings, F_SETFD, FD_CLOEXEC);
		fcntl(in_force->exports, F_SETFD, FD_CLOEXEC);
	}
	snprintf(pid, sizeof(pid), "%d", (int)getpid());
	setenv("LISTEN_PID", pid, 1);
	prctl(PR_SET_NAME, "blkstackd:serve");
}

int main(int argc, char **argv)
{
	struct args args = { .server = -1, .source.in_force = { -1, -1 } };
	struct config_start start;
	struct err err;

	open_standard_fds();
	int status = parse_args(argc, argv, &args);
	if (status >= 0)
		return status;
	if (args.check)
		return check(&args.source);
	if (args.keeper)
		return be_keeper(argc, argv);
	if (args.server >= 0)
		be_server(&args.source.in_force);
	/* Devices of a start before this one wait, also for a config that is mended. */
	if (args.server < 0 && store_has_anything())
		return become_keeper(argc, argv);
	if (config_source_start(&args.source, &start, &err)) {
		config_start_free(&start);
		log_error("%s", err.text);
		return EXIT_FAILURE;
	}
	if (args.source.in_force.settings >= 0)
		close(args.source.in_force.exports);
	if (!start.config->keeper || args.server >= 0)
		return run(&args.source, &start, args.server);
	return become_keeper(argc, argv);
}
