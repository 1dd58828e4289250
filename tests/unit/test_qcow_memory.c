/*
 * Memory of the qcow layer: what random requests all over a large disk leave in use stays within what the
 * option cache allows, and a little.
 */
#include <stdio.h>

#include "base/util.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"
#include "testing.h"

#define DISK_SIZE   (UINT64_C(64) << 30)
#define WORKERS     16
#define REQUESTS    20000
#define CACHE_BYTES (UINT64_C(10) << 20)
#define REST_BYTES  (UINT64_C(4) << 20)

struct load {
	struct blk *disk;
	struct seed seed;
	int left;
	struct co_group workers;
};

static uint64_t private_bytes(void)
{
	FILE *file = fopen("/proc/self/smaps_rollup", "re");
	uint64_t total = 0, kib;
	char line[256];

	ck_assert_ptr_nonnull(file);
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "Private_Clean: %" SCNu64, &kib) == 1 ||
			sscanf(line, "Private_Dirty: %" SCNu64, &kib) == 1)
			total += kib * 1024;
	fclose(file);
	return total;
}

static suspends void worker(void *arg)
{
	struct load *load = arg;
	uint8_t buf[4096] = { 0 };

	while (load->left-- > 0) {
		uint64_t off = seed_below(&load->seed, DISK_SIZE / 4096) * 4096;
		unsigned what = (unsigned)seed_below(&load->seed, 8);

		if (what < 5)
			ck_assert_int_eq(blk_read(load->disk, off, buf, sizeof(buf)), 0);
		else if (what < 7)
			ck_assert_int_eq(blk_write(load->disk, off, buf, sizeof(buf), 0), 0);
		else
			ck_assert_int_eq(blk_discard(load->disk, off, 65536, 0), 0);
	}
}

CO_TEST(test_bounded)
{
	struct load load = { .seed = seed_start("qcow memory"), .left = REQUESTS };
	uint64_t before = private_bytes(), used, allowed = CACHE_BYTES * 12 / 10 + REST_BYTES;
	struct test_stack stack;

	image_must("qemu-img create -q -f qcow2 -o preallocation=metadata image.qcow2 64G");
	test_stack_open(&stack, "( { layer = 'qcow'; cache = '10M'; discard = false },"
				"  { layer = 'file'; path = 'image.qcow2'; sync = 'none' } )");
	load.disk = stack.top;
	co_group_init(&load.workers);
	for (int i = 0; i < WORKERS; i++)
		co_group_start(&load.workers, worker, &load);
	co_group_wait(&load.workers);
	used = private_bytes() - before;
	printf("%llu KiB, allowed are %llu\n", (unsigned long long)used / 1024,
		(unsigned long long)allowed / 1024);
	if (!TEST_SANITIZED) /* which has its own memory for ours */
		ck_assert_uint_le(used, allowed);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("qcow memory");
	TCase *tcase = tcase_create("memory");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_bounded);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
