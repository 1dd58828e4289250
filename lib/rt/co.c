/*
 * Coroutines: pooled stacks, starting, suspending, resuming; see co.h.
 *
 * A coroutine remembers the context that let it run (`resumer`: the reactor's loop, or the coroutine
 * that called co_start()) and goes back to it when it suspends or ends. A finished one is not torn
 * down: it waits in co_main() on its own stack, and the next start only switches to it.
 *
 * The sanitizers are told of every switch: AddressSanitizer where the new stack lies,
 * ThreadSanitizer which fiber runs. Without them the hooks are empty.
 */
#include "rt/co.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/util.h"
#include "rt/reactor_private.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
/* Redzones make frames several times larger. */
#define CO_STACK_SIZE_BYTES (1024 * 1024)
#else
#define CO_STACK_SIZE_BYTES (128 * 1024)
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

/*
 * Never touched, so it costs no memory. Our own code probes the pages of a large frame in turn
 * (-fstack-clash-protection) and cannot step over it; the frames of the C library are smaller than this.
 */
#define CO_GUARD_SIZE_BYTES (64 * 1024)

/* As many as a deep queue needs; each keeps the pages it has touched, commonly 8 KiB. */
#define CO_IDLE_MAX 256

struct co {
	struct list link; /* in the idle pool, or in the reactor's ready queue */
	struct co_context context;
	struct co *resumer; /* who runs when this one suspends; NULL: the reactor's loop */
	co_fn *fn;
	void *arg;
	char *mapping; /* the guard, then the stack */
	bool finished;
	void *fake_stack, *fiber; /* for the sanitizers */
};

/* --- the sanitizers' hooks -------------------------------------------------------------------- */

/* Before leaving `from` for `to`; either may be NULL for plain code. */
static inline void hook_before_switch(struct co_pool *pool, struct co *from, struct co *to)
{
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_start_switch_fiber(from ? &from->fake_stack : &pool->plain_fake_stack,
		to ? to->mapping + CO_GUARD_SIZE_BYTES : pool->plain_stack,
		to ? CO_STACK_SIZE_BYTES : pool->plain_stack_size_bytes);
#endif
#ifdef __SANITIZE_THREAD__
	__tsan_switch_to_fiber(to ? to->fiber : pool->plain_fiber, 0);
#endif
}

/* After arriving in `here` (NULL: plain code); came_from_plain: the other end was plain code. */
static inline void hook_after_switch(struct co_pool *pool, struct co *here, bool came_from_plain)
{
#ifdef __SANITIZE_ADDRESS__
	const void *stack;
	size_t size_bytes;

	__sanitizer_finish_switch_fiber(
		here ? here->fake_stack : pool->plain_fake_stack, &stack, &size_bytes);
	if (came_from_plain) {
		pool->plain_stack = stack;
		pool->plain_stack_size_bytes = size_bytes;
	}
#endif
}

/* --- switching -------------------------------------------------------------------------------- */

static struct co_pool *this_pool(void)
{
	return &reactor_current->co;
}

/* Runs co until it suspends or ends. */
static void co_enter(struct co *co)
{
	struct co_pool *pool = this_pool();
	struct co *from = pool->running;

	co->resumer = from;
	pool->running = co;
	hook_before_switch(pool, from, co);
	co_context_switch(from ? &from->context : &pool->plain, &co->context);
	hook_after_switch(pool, from, false);
}

/* Back to whoever let co run. */
static void co_leave(struct co *co)
{
	struct co_pool *pool = this_pool();
	struct co *to = co->resumer;

	pool->running = to;
	hook_before_switch(pool, co, to);
	co_context_switch(&co->context, to ? &to->context : &pool->plain);
	hook_after_switch(pool, co, !co->resumer);
}

static void co_main(void)
{
	struct co *co = this_pool()->running;

	hook_after_switch(this_pool(), co, !co->resumer);
	for (;;) {
		co->fn(co->arg);
		co->finished = true;
		co_leave(co);
	}
}

/* --- the pool --------------------------------------------------------------------------------- */

static struct co *co_create(void)
{
	struct co *co = calloc(1, sizeof(*co));

	if (co)
		co->mapping = mmap(NULL, CO_GUARD_SIZE_BYTES + CO_STACK_SIZE_BYTES,
			PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
	if (!co || co->mapping == MAP_FAILED ||
		mprotect(co->mapping, CO_GUARD_SIZE_BYTES, PROT_NONE)) {
		perror("blkstack: no memory for a coroutine's stack");
		abort();
	}
	list_init(&co->link);
	co_context_init(
		&co->context, co->mapping + CO_GUARD_SIZE_BYTES, CO_STACK_SIZE_BYTES, co_main);
#ifdef __SANITIZE_THREAD__
	co->fiber = __tsan_create_fiber(0);
#endif
	return co;
}

static void co_free(struct co *co)
{
#ifdef __SANITIZE_THREAD__
	__tsan_destroy_fiber(co->fiber);
#endif
#ifdef __SANITIZE_ADDRESS__
	__asan_unpoison_memory_region(co->mapping + CO_GUARD_SIZE_BYTES, CO_STACK_SIZE_BYTES);
#endif
	munmap(co->mapping, CO_GUARD_SIZE_BYTES + CO_STACK_SIZE_BYTES);
	free(co);
}

void co_pool_init(struct co_pool *pool)
{
	list_init(&pool->idle);
#ifdef __SANITIZE_THREAD__
	pool->plain_fiber = __tsan_get_current_fiber();
#endif
}

void co_pool_fini(struct co_pool *pool)
{
	struct list *link;

	while ((link = list_pop_front(&pool->idle)))
		co_free(list_entry(link, struct co, link));
	pool->idle_count = 0;
}

/* co has just given the thread back: keep its stack for the next one when it has ended. */
static void co_reap(struct co *co)
{
	struct co_pool *pool = this_pool();

	if (!co->finished)
		return;
	if (pool->idle_count >= CO_IDLE_MAX) {
		co_free(co);
		return;
	}
	list_push_front(&pool->idle, &co->link);
	pool->idle_count++;
}

/* --- what everybody uses ---------------------------------------------------------------------- */

void co_start(co_fn *fn, void *arg)
{
	struct co_pool *pool = this_pool();
	struct list *link = list_pop_front(&pool->idle);
	struct co *co;

	if (link) {
		co = list_entry(link, struct co, link);
		pool->idle_count--;
	} else {
		co = co_create();
	}
	co->fn = fn;
	co->arg = arg;
	co->finished = false;
	co_enter(co);
	co_reap(co);
}

struct co *co_self(void)
{
	return reactor_current ? this_pool()->running : NULL;
}

suspends void co_suspend(void)
{
	struct co *self = co_self();

	assert(self);
	co_leave(self);
}

void co_wake(struct co *co)
{
	assert(list_empty(&co->link)); /* woken twice */
	reactor_ready(&co->link);
}

suspends void co_yield (void)
{
	co_wake(co_self());
	co_suspend();
}

suspends void co_yield_turn(void)
{
	struct co *self = co_self();

	assert(list_empty(&self->link));
	list_push_back(&reactor_current->next_turn, &self->link);
	co_suspend();
}

void co_resume(struct list *link)
{
	struct co *co = list_entry(link, struct co, link);

	co_enter(co);
	co_reap(co);
}
