/*
 * Where the daemon's config comes from, at the start and at every reload: the file, what the command line
 * says in its place, and the sockets that the service manager passed; see config-source.h.
 *
 * What a server before this one had in force comes from the keeper. Where it cannot be read: within one life of the
 * service that is an error, and the keeper goes back to the program that wrote it or only holds the devices. After a
 * restart the file holds, and devices wait until somebody says that it is the right one (daemon-keeper.c).
 *
 * Failure modes: those of config_load(); a passed TCP socket that needs TLS (see config_add_listen()).
 */
#include "daemon/config-source.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"

/* Descriptors besides those of connections: sockets, epoll, rings, a few per export and its device. */
#define FDS_BASE       128
#define FDS_PER_EXPORT 16

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

/* --- the whole -------------------------------------------------------------------------------- */

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

static int complete(const struct config_source *source, struct config *config, struct err *err)
{
	if (source->engine)
		config->engine = source->engine;
	if (source->log_level)
		config->log_level = source->log_level;
	int ret = adopt_sockets(config, err);
	if (!ret)
		raise_fd_limit(config);
	return ret;
}

int config_source_load(const struct config_source *source, struct config **loaded, struct err *err)
{
	struct config *config;
	int ret = config_load(source->path, &config, err);

	*loaded = NULL;
	if (ret)
		return ret;
	ret = complete(source, config, err);
	if (ret) {
		config_free(config);
		return ret;
	}
	*loaded = config;
	return 0;
}

static int start_with_file(
	const struct config_source *source, struct config_start *start, struct err *err)
{
	return config_source_load(source, &start->config, err);
}

static int start_with_last(
	const struct config_source *source, struct config_start *start, struct err *err)
{
	int ret = in_force_load(
		&source->in_force, source->path, &start->config, &start->owner, &start->group, err);

	if (!ret)
		ret = complete(source, start->config, err);
	start->inherited = !ret;
	return ret ? err_wrap(err, "what the last server had in force") : 0;
}

/* The exports change places: those of the file are for later. */
static void exchange_exports(struct config *a, struct config *b)
{
	struct config was = *a;

	a->exports = b->exports;
	a->export_count = b->export_count;
	b->exports = was.exports;
	b->export_count = was.export_count;
}

static int start_again(
	const struct config_source *source, struct config_start *start, struct err *err)
{
	struct config_start last = { .owner = (uid_t)-1 };
	struct err why;
	int ret = start_with_file(source, start, err);
	int last_ret = in_force_load(
		&source->in_force, source->path, &last.config, &last.owner, &last.group, &why);

	if (!ret && !last_ret)
		last_ret = in_force_check_owner(&source->in_force, start->config->uid, &why);
	if (ret && !last_ret) {
		ret = start_with_last(source, start, err); /* and look at the file later */
	} else if (!ret && last_ret) {
		log_error("what was in force before the restart cannot be used: %s", why.text);
		start->unknown = true;
	} else if (!ret) {
		exchange_exports(start->config, last.config);
		start->later = take_ptr(last.config);
	}
	config_free(last.config);
	return ret;
}

int config_source_start(
	const struct config_source *source, struct config_start *start, struct err *err)
{
	*start = (struct config_start){ .owner = (uid_t)-1 };
	if (source->in_force.settings < 0)
		return start_with_file(source, start, err);
	return source->restarted ? start_again(source, start, err)
				 : start_with_last(source, start, err);
}

void config_start_free(struct config_start *start)
{
	config_free(start->config);
	config_free(start->later);
	*start = (struct config_start){};
}
