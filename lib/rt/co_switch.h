/*
 * The context switch under co.c: save where we are, go on somewhere else. Private to lib/rt.
 *
 * Assembly on x86-64 and aarch64: only what the ABI makes callee-saved is kept, about 10 ns a switch.
 * The floating point control words are not kept: nobody here changes them. Elsewhere, or with
 * -DCO_UCONTEXT, swapcontext(3), which makes two system calls a switch.
 */
#pragma once

#include <stddef.h>

#if !defined(CO_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CO_UCONTEXT
#endif

#ifdef CO_UCONTEXT
#include <ucontext.h>
struct co_context {
	ucontext_t ucontext;
};
#else
struct co_context {
	void *stack_pointer;
};
#endif

/* Prepares context so that the first switch to it calls entry() on the given stack; entry never returns. */
void co_context_init(
	struct co_context *context, void *stack, size_t size_bytes, void (*entry)(void));

/* Saves the current context in *from and continues *to; returns when somebody switches to *from. */
void co_context_switch(struct co_context *from, struct co_context *to);
