/*
 * Tests that run in a coroutine, on stacks written as text.
 *
 *	suspends CO_TEST(test_something)
 *	{
 *		struct test_stack stack;
 *
 *		test_stack_open(&stack, "( { layer = 'memory'; size = '1M' } )");
 *		ck_assert_int_eq(blk_flush(stack.top), 0);
 *		test_stack_close(&stack);
 *	}
 *
 * The reactor's engine is $ENGINE, "auto" by default.
 */
#pragma once

#include "blk/blk.h"
#include "conf_build.h"
#include "testing.h"

#define CO_TEST(name)                     \
	static void name##_body(void);    \
	START_TEST(name)                  \
	{                                 \
		co_test_run(name##_body); \
	}                                 \
	END_TEST                          \
	static void name##_body(void)

static inline void co_test_main(void *arg)
{
	(*(void (**)(void))arg)();
}

static inline void co_test_run(void (*body)(void))
{
	const char *engine = getenv("ENGINE");
	struct reactor *reactor = test_reactor(engine ? engine : "auto");

	reactor_run_main(reactor, co_test_main, &body);
	reactor_free(reactor);
}

struct test_stack {
	struct blk *top;
	struct conf *conf;
	struct blk_env env;
};

/* Into a struct that stays where it is: the layers point to its env. */
__attribute__((format(printf, 3, 4))) static inline suspends int test_stack_try(
	struct test_stack *stack, struct err *err, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	stack->conf = conf_vbuild(fmt, ap);
	va_end(ap);
	blk_env_init(&stack->env);
	return stack_open(stack->conf, &stack->env, false, &stack->top, err);
}

#define test_stack_open(stack, ...)                                       \
	do {                                                              \
		struct err open_err_;                                     \
		if (test_stack_try((stack), &open_err_, __VA_ARGS__) < 0) \
			ck_abort_msg("%s", open_err_.text);               \
	} while (0)

/* Also after test_stack_try() failed. */
static inline suspends void test_stack_close(struct test_stack *stack)
{
	stack_close(stack->top);
	while (stack->env.left_behind)
		co_sleep_ns(NS_PER_MS);
	blk_env_fini(&stack->env);
	conf_free(stack->conf);
}
