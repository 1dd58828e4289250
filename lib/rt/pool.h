/*
 * A pool of threads that work off a queue. Private to lib/rt: the threads engine and co_offload() have
 * one each.
 *
 * An item is a list link embedded in its owner's struct; run() is called with it on some thread of the
 * pool, once, and reports its result itself (reactor_post()). Items start in the order of submission.
 * Threads are started when there is work for them and end after a while without any, so a pool needs
 * neither a start nor an end: it is a static variable.
 */
#pragma once

#include <pthread.h>

#include "base/list.h"

struct pool {
	const char *thread_name;
	unsigned threads_max;
	void (*run)(struct list *item);
	pthread_mutex_t mutex; /* protects what follows */
	pthread_cond_t work;
	struct list queue;
	unsigned queued, threads, idle;
};

#define POOL_INIT(pool, name, max, fn)                                                \
	{                                                                             \
		.thread_name = (name), .threads_max = (max), .run = (fn),             \
		.mutex = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, \
		.queue = { &(pool).queue, &(pool).queue },                            \
	}

/* Any thread. Takes all `count` items off the list. */
void pool_submit(struct pool *pool, struct list *items, unsigned count);
