/*
 * The memory layer: against a model, exact extents, memory given back, and disks shared by name
 * between exports and reactors (run under ThreadSanitizer too).
 */
#include <errno.h>
#include <pthread.h>

#include "base/bitmap.h"
#include "blk/memory.h"
#include "model.h"

#define BLOCK_BYTES 4096

static json_int_t status_number(struct blk *blk, const char *key)
{
	json_t *status = blk_status(blk);
	json_t *value = json_object_get(status, key);

	ck_assert_msg(json_is_integer(value), "no number \"%s\" in the status", key);
	json_int_t number = json_integer_value(value);
	json_decref(status);
	return number;
}

static suspends void reads_zeroes_at_first(void)
{
	struct blk *blk = stack("memory size=1M");
	struct model model;

	model_init(&model, 1 << 20);
	model_verify(&model, blk);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 0);
	stack_close(blk);
	model_fini(&model);
}

static suspends void equals_the_model(void)
{
	struct blk *blk = stack("memory size=1000001");
	struct model model;

	model_init(&model, 1000001);
	model_run(&model, blk, 2000);
	ck_assert_int_eq(blk_discard(blk, 0, 1000001, 0), 0);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 0);
	stack_close(blk);
	model_fini(&model);
}

static suspends void equals_the_model_with_large_blocks(void)
{
	struct blk *blk = stack("memory size=1M block-size=16K");
	struct model model;

	model_init(&model, 1 << 20);
	model_run(&model, blk, 1000);
	stack_close(blk);
	model_fini(&model);
}

static suspends void equals_the_model_while_resized(void)
{
	struct blk *blk = stack("memory size=1M");
	struct model model;

	model_init(&model, 1 << 20);
	for (int i = 0; i < 40; i++) {
		model_run(&model, blk, 30);
		model_resize(&model, blk, 1 + random_below(&model.random, 2 << 20));
		model_verify(&model, blk);
	}
	stack_close(blk);
	model_fini(&model);
}

/* A block is data from its first write on and a hole from a discard of all of it on, and nothing else. */
static suspends void extents_are_exact(void)
{
	enum { BLOCKS = 700 };
	struct blk *blk = stack("memory size=%u", BLOCKS * BLOCK_BYTES);
	uint64_t data[BLOCKS / 64 + 1] = { 0 };
	struct blk_extent list[BLOCKS];
	struct blk_extents extents;
	struct model model;

	model_init(&model, BLOCKS * BLOCK_BYTES);
	for (int round = 0; round < 300; round++) {
		uint64_t off, len;
		model_range(&model, model.size / 10, &off, &len);
		if (random_below(&model.random, 2)) {
			model_write(&model, blk, off, len, 0);
			bitmap_set(data, off / BLOCK_BYTES,
				(off + len - 1) / BLOCK_BYTES - off / BLOCK_BYTES + 1);
		} else {
			ck_assert_int_eq(blk_discard(blk, off, len, 0), 0);
			uint64_t first = (off + BLOCK_BYTES - 1) / BLOCK_BYTES;
			uint64_t end = (off + len) / BLOCK_BYTES;
			if (first < end)
				bitmap_clear(data, first, end - first);
		}

		blk_extents_init(&extents, list, ARRAY_LEN(list));
		ck_assert_int_eq(blk_extents(blk, 0, model.size, &extents), 0);
		ck_assert_uint_eq(extents.end, model.size);
		uint64_t block = 0, allocated = 0;
		for (unsigned i = 0; i < extents.count; i++) {
			bool is_data = list[i].flags == BLK_EXTENT_DATA;
			ck_assert(is_data || list[i].flags == (BLK_EXTENT_HOLE | BLK_EXTENT_ZERO));
			for (uint64_t n = list[i].len / BLOCK_BYTES; n; n--, block++) {
				ck_assert_int_eq(bitmap_test(data, block), is_data);
				allocated += is_data;
			}
		}
		ck_assert_int_eq(status_number(blk, "allocated_bytes"),
			(json_int_t)(allocated * BLOCK_BYTES));
	}
	stack_close(blk);
	model_fini(&model);
}

/* ThreadSanitizer keeps notes on every byte, in memory that it does not give back: 0 then. */
static uint64_t resident_bytes(void)
{
#ifdef __SANITIZE_THREAD__
	return 0;
#endif
	FILE *statm = fopen("/proc/self/statm", "re");
	unsigned long long total, resident;

	ck_assert_int_eq(fscanf(statm, "%llu %llu", &total, &resident), 2);
	fclose(statm);
	return resident * BLOCK_BYTES;
}

static suspends void discard_frees_memory(void)
{
	const uint64_t size = 64 << 20;
	struct blk *blk = stack("memory size=%llu", (unsigned long long)size);
	uint8_t *buf = malloc(1 << 20);
	uint64_t before = resident_bytes();

	memset(buf, 7, 1 << 20);
	for (uint64_t off = 0; off < size; off += 1 << 20)
		ck_assert_int_eq(blk_write(blk, off, buf, 1 << 20, 0), 0);
	if (before)
		ck_assert_uint_ge(resident_bytes(), before + size / 2);
	ck_assert_int_eq(blk_discard(blk, 1, size - 2, 0), 0);
	ck_assert_uint_le(resident_bytes(), before + size / 4);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 2 * BLOCK_BYTES);
	ck_assert_int_eq(blk_read(blk, 0, buf, 1 << 20), 0);
	ck_assert_int_eq(buf[0], 7);
	ck_assert(all_bytes_are(buf + 1, (1 << 20) - 1, 0));
	free(buf);
	stack_close(blk);
}

static suspends void zero_without_holes_stays_allocated(void)
{
	struct blk *blk = stack("memory size=1M");

	ck_assert_int_eq(blk_zero(blk, 0, 64 << 10, BLK_NO_HOLE), 0);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 64 << 10);
	ck_assert_int_eq(blk_zero(blk, 0, 64 << 10, 0), 0);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 0);
	stack_close(blk);
}

static suspends void shrinking_drops_and_growing_shows_zeroes(void)
{
	struct blk *blk = stack("memory size=1M");
	struct model model;
	struct err err;

	model_init(&model, 1 << 20);
	model_write(&model, blk, 0, model.size, 0);
	ck_assert_int_eq(blk_resize(blk, 5000, 0, &err), -EINVAL); /* not without being forced */
	model_resize(&model, blk, 5000);
	ck_assert_int_eq(status_number(blk, "allocated_bytes"), 2 * BLOCK_BYTES);
	model_resize(&model, blk, 3 << 20);
	model_verify(&model, blk);
	ck_assert_int_eq(blk_resize(blk, 0, BLK_FORCE, &err), -EINVAL);
	stack_close(blk);
	model_fini(&model);
}

static suspends void the_name_is_the_disk(void)
{
	struct blk *a = stack("memory name=scratch size=1M");
	struct blk *b = stack("memory name=scratch");
	struct blk *other = stack("memory name=other size=1M");
	char buf[6];

	ck_assert_int_eq(blk_write(a, 1000, "shared", 6, 0), 0);
	ck_assert_int_eq(blk_read(b, 1000, buf, 6), 0);
	ck_assert_mem_eq(buf, "shared", 6);
	ck_assert_int_eq(blk_read(other, 1000, buf, 6), 0);
	ck_assert_mem_eq(buf, "\0\0\0\0\0\0", 6);
	ck_assert_int_eq(status_number(a, "users"), 2);
	stack_close(a);
	stack_close(b);
	stack_close(other);

	a = stack("memory name=scratch size=1M");
	ck_assert_int_eq(blk_read(a, 1000, buf, 6), 0);
	ck_assert_mem_eq(buf, "shared", 6);
	stack_close(a);
}

static suspends void nameless_disks_are_their_own(void)
{
	struct blk *a = stack("memory size=1M"), *b = stack("memory size=1M");
	char buf[4];

	ck_assert_int_eq(blk_write(a, 0, "mine", 4, 0), 0);
	ck_assert_int_eq(blk_read(b, 0, buf, 4), 0);
	ck_assert_mem_eq(buf, "\0\0\0\0", 4);
	stack_close(a);
	stack_close(b);
}

static suspends void forgetting_destroys(void)
{
	struct blk *blk = stack("memory name=gone size=1M");
	struct err err;
	char buf[4];

	ck_assert_int_eq(blk_write(blk, 0, "data", 4, 0), 0);
	ck_assert_int_eq(memory_forget(&unit_env, "gone", &err), -EBUSY);
	ck_assert_str_eq(err.text, "memory disk \"gone\" is in use by an export");
	stack_close(blk);
	ck_assert_int_eq(memory_forget(&unit_env, "gone", &err), 0);
	ck_assert_int_eq(memory_forget(&unit_env, "gone", &err), -ENOENT);
	ck_assert_str_eq(err.text, "there is no memory disk \"gone\"");
	blk = stack("memory name=gone size=2M");
	ck_assert_int_eq(blk_read(blk, 0, buf, 4), 0);
	ck_assert_mem_eq(buf, "\0\0\0\0", 4);
	stack_close(blk);
}

static suspends void a_failed_start_forgets_what_it_made(void)
{
	struct blk *kept = stack("memory name=kept size=1M");
	struct blk *made = stack("memory name=made size=1M");
	struct err err;

	stack_close(kept);
	kept = stack("memory name=kept");
	unit_env.start_failed = true;
	stack_close(kept);
	stack_close(made);
	ck_assert_int_eq(memory_forget(&unit_env, "made", &err), -ENOENT);
	ck_assert_int_eq(memory_forget(&unit_env, "kept", &err), 0);

	unit_env.start_failed = false;
	stack_refused(
		"padded: \"align\"", "padded align=512 | memory name=made size=1M block-size=4K");
	ck_assert_int_eq(memory_forget(&unit_env, "made", &err), -ENOENT);
}

static suspends void refuses_what_cannot_be(void)
{
	struct blk *blk = stack("memory name=there size=1M block-size=512");

	stack_refused("memory: a memory disk needs a size", "memory");
	stack_refused("no memory disk \"new\" yet: a new one needs a size", "memory name=new");
	stack_refused("\"size\" is 1000 B, it must be a multiple of the block size, 512 B",
		"memory size=1000 block-size=512");
	stack_refused("power of two", "memory size=3000 block-size=1000");
	stack_refused("exists with 1048576 bytes, not 2097152", "memory name=there size=2M");
	stack_refused("exists with block-size 512, not 4096", "memory name=there block-size=4K");
	stack_refused("more than this machine can address", "memory size=4096P");
	stack_refused("\"size\" is 0 B", "memory size=0");
	stack_refused("unknown option \"nme\"; did you mean \"name\"?", "memory size=1M nme=x");
	stack_close(blk);
}

static suspends void read_only_does_not_write(void)
{
	unit_env.read_only = true;
	struct blk *blk = stack("memory size=1M");

	ck_assert(blk_caps(blk)->read_only);
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), -EPERM);
	stack_close(blk);
}

/* --- several reactors ------------------------------------------------------------------------- */

struct peer {
	struct reactor *reactor;
	pthread_t thread;
	uint64_t random;
	uint64_t off, len; /* its part of the disk */
	bool resize;
};

static void peer_run(void *arg)
{
	struct peer *peer = arg;
	struct model model = { .random = peer->random, .size = peer->len, .align = 1 };
	struct blk *blk = stack("memory name=both");
	uint8_t *buf = malloc(peer->len), *bytes = calloc(1, peer->len);
	struct err err;

	for (int i = 0; i < 1500; i++) {
		uint64_t off, len;
		model_range(&model, peer->len / 4, &off, &len);
		switch (random_below(&model.random, 4)) {
		case 0:
			ck_assert_int_eq(blk_discard(blk, peer->off + off, len, 0), 0);
			memset(bytes + off, 0, len);
			break;
		case 1:
			ck_assert_int_eq(blk_read(blk, peer->off + off, buf, len), 0);
			ck_assert_int_eq(memcmp(buf, bytes + off, len), 0);
			break;
		default:
			random_fill(&model.random, bytes + off, len);
			ck_assert_int_eq(blk_write(blk, peer->off + off, bytes + off, len, 0), 0);
		}
		if (peer->resize && i % 50 == 0) /* above everybody's part */
			ck_assert_int_eq(
				blk_resize(blk, (4 << 20) + (uint64_t)i * 4096, BLK_FORCE, &err),
				0);
		if (i % 100 == 0)
			co_yield ();
	}
	free(buf);
	free(bytes);
	stack_close(blk);
}

static void *peer_thread(void *arg)
{
	struct peer *peer = arg;

	reactor_run_main(peer->reactor, peer_run, peer);
	return NULL;
}

static suspends void several_reactors_share_a_disk(void)
{
	struct blk *blk = stack("memory name=both size=4M");
	struct peer peers[2];
	struct err err;

	for (size_t i = 0; i < ARRAY_LEN(peers); i++) {
		peers[i] = (struct peer){
			.random = unit_seed + i, .off = i << 20, .len = 1 << 20, .resize = i == 1
		};
		ck_assert_int_eq(reactor_create(&peers[i].reactor, unit_engine, &err), 0);
		ck_assert_int_eq(pthread_create(&peers[i].thread, NULL, peer_thread, &peers[i]), 0);
	}
	for (size_t i = 0; i < ARRAY_LEN(peers); i++) {
		pthread_join(peers[i].thread, NULL);
		reactor_free(peers[i].reactor);
	}
	while (blk_caps(blk)->size != (4 << 20) + 1450 * 4096)
		co_sleep_ns(NS_PER_MS); /* the news of the last resize is on its way */
	stack_close(blk);
}

/* A resize is posted to the other layer, which closes before it has heard of it. */
static suspends void closing_waits_for_a_posted_resize(void)
{
	struct blk *a = stack("memory name=disk size=1M"), *b = stack("memory name=disk");
	struct err err;

	ck_assert_int_eq(blk_resize(a, 2 << 20, 0, &err), 0);
	stack_close(b);
	stack_close(a);
}

struct heard {
	struct blk_listener listener;
	uint64_t size;
};

static void hear(struct blk_listener *listener, uint64_t size)
{
	container_of(listener, struct heard, listener)->size = size;
}

static suspends void others_hear_of_a_resize(void)
{
	struct blk *a = stack("memory name=disk size=1M"), *b = stack("memory name=disk");
	struct heard heard = { .listener.size_changed = hear };
	struct err err;

	blk_set_listener(b, &heard.listener);
	ck_assert_int_eq(blk_resize(a, 2 << 20, 0, &err), 0);
	while (!heard.size)
		co_sleep_ns(NS_PER_MS);
	ck_assert_uint_eq(heard.size, 2 << 20);
	ck_assert_uint_eq(blk_caps(b)->size, 2 << 20);
	blk_set_listener(b, NULL);
	stack_close(b);
	stack_close(a);
}

static const struct unit_case cases[] = {
	CASE(reads_zeroes_at_first),
	CASE(equals_the_model),
	CASE(equals_the_model_with_large_blocks),
	CASE(equals_the_model_while_resized),
	CASE(extents_are_exact),
	CASE(discard_frees_memory),
	CASE(zero_without_holes_stays_allocated),
	CASE(shrinking_drops_and_growing_shows_zeroes),
	CASE(the_name_is_the_disk),
	CASE(nameless_disks_are_their_own),
	CASE(forgetting_destroys),
	CASE(a_failed_start_forgets_what_it_made),
	CASE(refuses_what_cannot_be),
	CASE(read_only_does_not_write),
	CASE(several_reactors_share_a_disk),
	CASE(closing_waits_for_a_posted_resize),
	CASE(others_hear_of_a_resize),
};

int main(void)
{
	return unit_main("memory", cases, ARRAY_LEN(cases));
}
