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
#include <stdatomic.h>
#include <sys/eventfd.h>

#include "base/util.h"
#include "daemon/keeper_private.h"

static void *closer_thread(void *arg)
{
	struct closer *closer = arg;

	for (;;) {
		while (sem_wait(&closer->wanted))
			;
		keeper_fds_close(&closer->fds);
		atomic_store(&closer->busy, false);
		eventfd_write(closer->event, 1);
	}
	return NULL;
}

int closers_init(struct closers *closers)
{
	pthread_t thread;
	int ret = 0;

	closers->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (closers->event < 0)
		return -errno;
	for (size_t i = 0; i < ARRAY_LEN(closers->items) && !ret; i++) {
		struct closer *closer = &closers->items[i];

		closer->event = closers->event;
		sem_init(&closer->wanted, 0, 0);
		ret = -pthread_create(&thread, NULL, closer_thread, closer);
		if (!ret)
			pthread_detach(thread);
	}
	return ret;
}

static struct closer *find_free(struct closers *closers)
{
	for (size_t i = 0; i < ARRAY_LEN(closers->items); i++)
		if (!atomic_load(&closers->items[i].busy))
			return &closers->items[i];
	return NULL;
}

bool closers_free(struct closers *closers)
{
	return find_free(closers);
}

void closers_take(struct closers *closers, struct keeper_fds *fds)
{
	struct closer *closer = find_free(closers);

	if (!fds->count)
		return;
	closer->fds = *fds;
	fds->count = 0;
	atomic_store(&closer->busy, true);
	sem_post(&closer->wanted);
}

void closers_event(struct closers *closers)
{
	eventfd_t count;

	eventfd_read(closers->event, &count);
}
