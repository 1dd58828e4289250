/*
 * The configuration in force: what the server runs by, so that its successor does not go by a config file that was
 * changed meanwhile and never looked at.
 *
 * The server gives it in two halves, each sealed memory; the keeper looks at nothing but size and seals. What a server
 * gives counts from when it is ready: one that never becomes ready leaves nothing behind.
 *
 * In the store of the service manager each half has a number in its name, and the exports that of their settings as
 * well: so at no instant there is none, and what belongs together comes back together. The exports with the highest
 * number count. Settings that stay when the exports change keep their name: a manager does not keep one descriptor
 * twice.
 */
#include <fcntl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/keeper_private.h"

static void drop(int *fds)
{
	for (int i = 0; i < 2; i++)
		if (fds[i] >= 0)
			close(take_fd(&fds[i]));
}

void kept_config_init(struct kept_config *config)
{
	*config = (struct kept_config){ .fds = { -1, -1 }, .next = { -1, -1 } };
}

bool kept_config_is_known(const struct kept_config *config)
{
	return config->fds[0] >= 0 && config->fds[1] >= 0;
}

/* Sealed for good, so it is memory, which is closed at once, and stays as it is. */
static bool is_sealed(int fd)
{
	const int seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
	int has = fcntl(fd, F_GET_SEALS);
	struct stat st;

	return has >= 0 && (has & seals) == seals && !fstat(fd, &st) &&
	       st.st_size <= KEEPER_CONFIG_MAX_BYTES;
}

void kept_config_take(struct keeper *keeper, const struct keeper_message *request,
	struct keeper_fds *fds, bool ready)
{
	struct keeper_message answer = { .id = request->id };
	struct kept_config *config = &keeper->config;

	if (fds->count == 2 && is_sealed(fds->fd[0]) && is_sealed(fds->fd[1])) {
		drop(config->next);
		memcpy(config->next, fds->fd, sizeof(config->next));
		fds->count = 0;
		/* Of the first of all servers: there is nothing that it could spoil. */
		if (ready || !kept_config_is_known(config))
			kept_config_is_in_force(config);
	} else {
		answer.ret = -EINVAL;
		snprintf(answer.text, sizeof(answer.text), "this is no configuration");
	}
	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

static bool is_same(int a, int b)
{
	struct stat x, y;

	return !fstat(a, &x) && !fstat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

void kept_config_is_in_force(struct kept_config *config)
{
	struct kept_config was = *config;

	if (config->next[0] < 0)
		return;
	for (int i = 0; i < 2; i++)
		config->fds[i] = take_fd(&config->next[i]);
	config->from_before = false;
	config->exports = was.exports + 1;
	if (!is_same(was.fds[0], config->fds[0])) {
		config->settings = config->exports;
		store_put_settings(config);
	}
	store_put_exports(config);
	store_forget_exports(&was);
	if (was.settings != config->settings)
		store_forget_settings(&was);
	drop(was.fds);
}

void kept_config_forget_next(struct kept_config *config)
{
	drop(config->next);
}

void kept_config_find(struct kept_config *config, int first, char *const *names, int count)
{
	unsigned long settings, exports;

	for (int i = 0; i < count; i++) {
		if (!store_is_exports(names[i], &exports, &settings) || exports <= config->exports)
			continue;
		config->exports = exports;
		config->settings = settings;
		config->fds[1] = first + i;
	}
	for (int i = 0; i < count; i++)
		if (store_is_settings(names[i], &settings) && settings == config->settings)
			config->fds[0] = first + i;
	config->from_before = true;
	if (!kept_config_is_known(config) || !is_sealed(config->fds[0]) ||
		!is_sealed(config->fds[1]))
		config->fds[0] = config->fds[1] = -1;
}

void kept_config_drop(struct kept_config *config)
{
	store_forget_exports(config);
	store_forget_settings(config);
	drop(config->fds);
}
