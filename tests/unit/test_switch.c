/*
 * The context switch of lib/rt/co_switch.c alone: every context finds its registers and its stack as it left them,
 * whatever the others did meanwhile.
 *
 * Needs nothing but the C library, so that `make check-aarch64` can build it for another processor and run it in an
 * emulator.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "rt/co_switch.h"

#define CONTEXTS    16
#define ROUNDS      2000
#define STACK_BYTES 65536
#define DEPTH_MAX   20

static struct co_context main_context, contexts[CONTEXTS];
static _Alignas(16) char stacks[CONTEXTS][STACK_BYTES];
static unsigned current, finished;
static uint64_t order = 88172645463325252;

static void fail(const char *what)
{
	printf("context %u: %s\n", current, what);
	exit(EXIT_FAILURE);
}

static unsigned next_random(unsigned bound)
{
	order ^= order << 13;
	order ^= order >> 7;
	order ^= order << 17;
	return (unsigned)(order % bound);
}

/* To any other context that is not through. */
static void switch_away(void)
{
	unsigned self = current;

	current = next_random(CONTEXTS);
	if (current != self)
		co_context_switch(&contexts[self], &contexts[current]);
}

/* More values than a processor keeps for its caller, whole and fractional, all of them alive across a switch. */
static __attribute__((noinline)) void keep_values(unsigned seed, unsigned depth)
{
	uint64_t a = seed, b = a * 3 + 1, c = b * 5 + 2, d = c * 7 + 3, e = d * 11 + 4,
		 f = e * 13 + 5, g = f * 17 + 6, h = g * 19 + 7, i = h * 23 + 8, j = i * 29 + 9,
		 k = j * 31 + 10;
	double p = seed + 0.5, q = p * 1.5, r = q * 1.25, s = r * 1.125, t = s + 3, u = t * 1.5,
	       v = u + 0.25, w = v * 1.75, x = w + 1, y = x * 1.5;
	volatile uint64_t whole = a ^ b ^ c ^ d ^ e ^ f ^ g ^ h ^ i ^ j ^ k;
	volatile double broken = p + q + r + s + t + u + v + w + x + y;

	if (depth)
		keep_values(seed * 7 + depth, depth - 1);
	switch_away();
	if (whole != (a ^ b ^ c ^ d ^ e ^ f ^ g ^ h ^ i ^ j ^ k))
		fail("whole numbers changed");
	if (broken != p + q + r + s + t + u + v + w + x + y)
		fail("fractions changed");
}

static void check_stack(unsigned self)
{
	_Alignas(16) volatile char aligned[16];
	char text[64];

	aligned[0] = 0;
	if ((uintptr_t)aligned % 16)
		fail("the stack is not aligned");
	if ((uintptr_t)aligned < (uintptr_t)stacks[self] ||
		(uintptr_t)aligned >= (uintptr_t)stacks[self] + STACK_BYTES)
		fail("another context's stack");
	/* The C library's own use of vector registers and variable arguments. */
	snprintf(text, sizeof(text), "%.3f %u", self + 0.125, self);
	if (strtod(text, NULL) != self + 0.125)
		fail("a formatted number");
}

static void entry(void)
{
	unsigned self = current;

	for (unsigned round = 0; round < ROUNDS; round++) {
		check_stack(self);
		keep_values(self * 1000 + round, next_random(DEPTH_MAX));
		if (current != self)
			fail("woken as another");
	}
	finished++;
	while (finished < CONTEXTS)
		switch_away();
	co_context_switch(&contexts[self], &main_context);
}

int main(void)
{
	for (unsigned i = 0; i < CONTEXTS; i++)
		co_context_init(&contexts[i], stacks[i], STACK_BYTES, entry);
	co_context_switch(&main_context, &contexts[current = 0]);
	printf("%u contexts, %u rounds each\n", finished, ROUNDS);
	return finished == CONTEXTS ? EXIT_SUCCESS : EXIT_FAILURE;
}
