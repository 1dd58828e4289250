/*
 * The thread pool; see pool.h.
 *
 * A thread counts as idle from before it waits until it runs again, so `queued - idle` is the work for which
 * no thread is there yet. Where no thread at all can be started the submitter does the work itself:
 * slow, but nothing is lost.
 */
#include "rt/pool.h"

#include <errno.h>
#include <signal.h>
#include <time.h>

#include "base/util.h"

#define IDLE_S 10

/* The calls made here are into libc and compressors; none needs much. */
#define THREAD_STACK_SIZE_BYTES (256 * 1024)

/* Waits for work; false after IDLE_S seconds without any. Called and returns with the mutex held. */
static bool wait_for_work(struct pool *pool)
{
	struct timespec until;
	int ret = 0;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += IDLE_S;
	pool->idle++;
	while (list_empty(&pool->queue) && ret != ETIMEDOUT)
		ret = pthread_cond_timedwait(&pool->work, &pool->mutex, &until);
	pool->idle--;
	return !list_empty(&pool->queue);
}

static void run_queue(struct pool *pool)
{
	struct list *item;

	while ((item = list_pop_front(&pool->queue))) {
		pool->queued--;
		pthread_mutex_unlock(&pool->mutex);
		pool->run(item);
		pthread_mutex_lock(&pool->mutex);
	}
}

static void *pool_thread(void *arg)
{
	struct pool *pool = arg;

	pthread_setname_np(pthread_self(), pool->thread_name);
	pthread_mutex_lock(&pool->mutex);
	do {
		run_queue(pool);
	} while (wait_for_work(pool));
	pool->threads--;
	pthread_mutex_unlock(&pool->mutex);
	return NULL;
}

/* With all signals blocked: they are for the program's own threads. */
static bool start_thread(struct pool *pool)
{
	pthread_attr_t attr;
	pthread_t thread;
	sigset_t all, before;

	sigfillset(&all);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, THREAD_STACK_SIZE_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int ret = pthread_create(&thread, &attr, pool_thread, pool);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	return !ret;
}

void pool_submit(struct pool *pool, struct list *items, unsigned count)
{
	pthread_mutex_lock(&pool->mutex);
	list_splice_back(&pool->queue, items);
	pool->queued += count;
	for (unsigned missing = pool->queued - MIN(pool->queued, pool->idle);
		missing && pool->threads < pool->threads_max && start_thread(pool); missing--)
		pool->threads++;
	if (!pool->threads)
		run_queue(pool);
	for (unsigned i = MIN(count, pool->idle); i; i--)
		pthread_cond_signal(&pool->work);
	pthread_mutex_unlock(&pool->mutex);
}
