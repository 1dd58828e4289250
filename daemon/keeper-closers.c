/*
 * Closing what a server sent, or has under way, on threads of their own: it may take any time, be it a connection that
 * lingers or a file on a file system that the server serves. A good server sends nothing that is closed here, and
 * its socket closes at once.
 *
 * The threads are made at the start, and there are no more: a set of descriptors is taken only when one of them is free,
 * so the keeper looks before it receives one. While all are busy it hears no server; if that lasts it kills the one that
 * runs, and starts another when that one's socket could be closed. The threads end with the process.
 */
#include <errno.h>
#include <pthread.h>
#include <sys/eventfd.h>

#include "daemon/keeper_private.h"

static void *closer_thread(void *arg)
{
	struct closers *closers = arg;

	pthread_mutex_lock(&closers->mutex);
	for (;;) {
		while (!closers->waiting_count)
			pthread_cond_wait(&closers->wanted, &closers->mutex);
		struct keeper_fds fds = closers->waiting[--closers->waiting_count];
		pthread_mutex_unlock(&closers->mutex);
		keeper_fds_close(&fds);
		pthread_mutex_lock(&closers->mutex);
		closers->busy--;
		eventfd_write(closers->event, 1);
	}
	return NULL;
}

int closers_init(struct closers *closers)
{
	pthread_t thread;
	int ret = 0;

	pthread_mutex_init(&closers->mutex, NULL);
	pthread_cond_init(&closers->wanted, NULL);
	closers->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (closers->event < 0)
		return -errno;
	for (unsigned i = 0; i < KEEPER_CLOSERS && !ret; i++) {
		ret = -pthread_create(&thread, NULL, closer_thread, closers);
		if (!ret)
			pthread_detach(thread);
	}
	return ret;
}

bool closers_free(struct closers *closers)
{
	pthread_mutex_lock(&closers->mutex);
	bool is_free = closers->busy < KEEPER_CLOSERS;
	pthread_mutex_unlock(&closers->mutex);
	return is_free;
}

void closers_take(struct closers *closers, struct keeper_fds *fds)
{
	if (!fds->count)
		return;
	pthread_mutex_lock(&closers->mutex);
	closers->waiting[closers->waiting_count++] = *fds;
	closers->busy++;
	pthread_cond_signal(&closers->wanted);
	pthread_mutex_unlock(&closers->mutex);
	fds->count = 0;
}

void closers_event(struct closers *closers)
{
	eventfd_t count;

	eventfd_read(closers->event, &count);
}
