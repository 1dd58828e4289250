/*
 * Guest changes and copy steps around one frontier, in very many orders: a disk of eight chunks is copied again
 * and again while guests write to it, on legs that give way to the others a random number of times in
 * each operation. One reactor, so the seed chooses the order. After each round the legs are the same.
 *
 * ROUNDS in the environment: how many (by default what takes a few seconds).
 */
#include "fake.h"

#include "mirror_rig.h"

#define CHUNK  4096U
#define CHUNKS 8U /* twice as many as steps at a time */
#define SIZE   (CHUNKS * CHUNK)
#define GUESTS 4

struct order {
	struct mirror *mirror;
	struct seed seed;
	uint64_t round;
};

/* A change that begins after a random number of turns, mostly across the border of two chunks. */
static suspends void guest_run(void *arg)
{
	struct order *order = arg;
	struct seed *seed = &order->seed;
	struct blk *blk = &order->mirror->blk;
	uint64_t len = 512 * (1 + seed_below(seed, 12)),
		 border = CHUNK * (1 + seed_below(seed, CHUNKS - 1));
	uint64_t off = border - MIN(border, 512 * seed_below(seed, len / 512 + 1));
	char buf[SIZE];
	int ret;

	off = MIN(off, SIZE - len);
	for (uint64_t n = seed_below(seed, 80); n; n--)
		co_yield ();
	if (!seed_below(seed, 4)) {
		ret = blk_discard(blk, off, len, 0);
	} else {
		memset(buf, (int)seed_below(seed, 256), len);
		ret = blk_write(blk, off, buf, len, 0);
	}
	ck_assert_int_eq(ret, 0);
}

static suspends void one_round(struct order *order, struct fake *primary, struct fake *secondary)
{
	struct mirror *mirror = order->mirror;
	struct co_group group;

	mirror_dirty_set(mirror, 0, SIZE);
	memset(secondary->data, (int)order->round, SIZE);
	co_group_init(&group);
	for (int i = 0; i < GUESTS; i++)
		co_group_start(&group, guest_run, order);
	co_queue_wake_all(&mirror->copy_wanted);
	co_group_wait(&group);
	while (!mirror_in_sync(&mirror->blk))
		co_queue_wait(&mirror->changed);
	if (memcmp(primary->data, secondary->data, SIZE))
		ck_abort_msg("the legs differ after round %llu", (unsigned long long)order->round);
	ck_assert(list_empty(&mirror->writes.held) && list_empty(&mirror->writes.waiting));
}

/* The secondary of a config can be a registered layer only: the fake one is put in its place. */
static suspends struct fake *replace_secondary(struct mirror *mirror, struct fake_stack *other)
{
	mirror->secondary = other->top;
	return other->fake;
}

static suspends void run_orders(const char *name, int primary_block, int secondary_block)
{
	const char *rounds_text = getenv("ROUNDS");
	uint64_t rounds = rounds_text ? strtoull(rounds_text, NULL, 0) : 8000;
	struct fake_stack stack, other;

	fake_stack_open(&stack, name, NULL,
		"( { layer = 'mirror'; overwrite = true; paused = true; chunk = 4096;"
		"    secondary = ( { layer = 'memory'; size = %u } ) },"
		"  { size = %u; block-size = %d; waits = 3; zero = true; discard = true } )",
		SIZE, SIZE, primary_block);
	fake_stack_open(&other, name, NULL,
		"( { size = %u; block-size = %d; waits = 5; zero = true } )", SIZE,
		secondary_block);

	struct order order = { to_mirror(stack.top), stack.seed, 0 };
	struct blk *memory = order.mirror->secondary;
	struct fake *secondary = replace_secondary(order.mirror, &other);

	order.mirror->step_max = CHUNK;
	mirror_resume(stack.top);
	while (!mirror_in_sync(stack.top))
		co_queue_wait(&order.mirror->changed);
	for (order.round = 0; order.round < rounds; order.round++)
		one_round(&order, stack.fake, secondary);
	mirror_settle(order.mirror);
	co_group_wait(&order.mirror->leg->running);
	order.mirror->secondary = memory;
	fake_stack_close(&stack);
	fake_stack_close(&other);
}

suspends CO_TEST(test_orders)
{
	run_orders("orders", 1, 1);
}

suspends CO_TEST(test_orders_with_blocks)
{
	run_orders("orders_with_blocks", 512, 4096);
}

int main(void)
{
	Suite *suite = suite_create("mirror_order");
	TCase *tcase = tcase_create("mirror_order");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_orders);
	tcase_add_test(tcase, test_orders_with_blocks);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
