/*
 * Stackful coroutines: straight-line code that can wait without blocking its thread.
 *
 * A coroutine belongs to the reactor on whose thread it was started and never leaves it, so two
 * coroutines of one reactor never run at the same time: code between two suspensions needs no lock.
 * After every suspension the world may have changed: look again.
 *
 *	co_start(fn, arg)	runs fn(arg) at once, until it ends or suspends for the first time, then
 *				returns to the caller (which may itself be a coroutine, or plain code).
 *	co_suspend()		gives the thread back to whoever let this coroutine run.
 *	co_wake(co)		makes a suspended coroutine run again soon, from the reactor's run queue.
 *
 * A suspended coroutine is woken exactly once per suspension; lib/rt/lock.h has the things to wait on.
 * Functions that may suspend are marked `suspends`, and are called only from functions so marked (or
 * handed to co_start()); scripts/check-suspends finds the others. No pthread lock is held across one.
 *
 * Stacks are pooled per reactor, 128 KiB each, with guard pages below: running over the
 * end is a fault, never a silent overwrite. Starting a coroutine allocates only when the pool is empty.
 */
#pragma once

#include <stdbool.h>

#define suspends

struct co;

typedef void co_fn(void *arg);

/* Starts fn(arg) on the current reactor. Aborts only when memory for a stack cannot be had. */
void co_start(co_fn *fn, void *arg);

/* The running coroutine; NULL in plain code. */
struct co *co_self(void);

suspends void co_suspend(void);

/* Call on co's own reactor only (from elsewhere: reactor_post() something that does). */
void co_wake(struct co *co);

/* Lets everybody else who is ready run first. */
suspends void co_yield (void);
