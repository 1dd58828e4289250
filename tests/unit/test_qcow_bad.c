/*
 * Damaged and hostile qcow2 images. Each case is an image of qemu-img's with some bytes replaced: where it can be
 * known at open, opening fails with an error that names the matter; where not, the request that meets it
 * fails. What was refused, or only read, stays as it is byte for byte. Nothing crashes or hangs.
 *
 * Then the same with random damage to the metadata (the seed is printed), and names inside images that want out
 * of the folders that are allowed.
 */
#include <errno.h>
#include <limits.h>
#include <sys/stat.h>

#include "base/endian.h"
#include "base/util.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define MIB (UINT64_C(1) << 20)

/* --- patching --------------------------------------------------------------------------------- */

struct patch {
	uint64_t off;
	unsigned len; /* 4 or 8: a big-endian number; 0: no patch */
	uint64_t value;
};

struct bytes {
	uint8_t *data;
	size_t len;
};

static struct bytes load(const char *path)
{
	struct bytes bytes = { 0 };
	struct stat st;
	FILE *file = fopen(path, "re");

	ck_assert_ptr_nonnull(file);
	ck_assert_int_eq(fstat(fileno(file), &st), 0);
	bytes.len = (size_t)st.st_size;
	bytes.data = malloc(bytes.len + 1);
	ck_assert_uint_eq(fread(bytes.data, 1, bytes.len, file), bytes.len);
	fclose(file);
	return bytes;
}

static void apply(struct bytes *bytes, const struct patch *patch)
{
	if (patch->off + patch->len > bytes->len) {
		bytes->data = realloc(bytes->data, patch->off + patch->len);
		memset(bytes->data + bytes->len, 0, patch->off + patch->len - bytes->len);
		bytes->len = patch->off + patch->len;
	}
	for (unsigned i = 0; i < patch->len; i++)
		bytes->data[patch->off + i] = (uint8_t)(patch->value >> (8 * (patch->len - 1 - i)));
}

static void expect_unchanged(const char *path, const struct bytes *before)
{
	struct bytes now = load(path);

	ck_assert_uint_eq(now.len, before->len);
	ck_assert_msg(!memcmp(now.data, before->data, now.len), "%s was changed", path);
	free(now.data);
}

/* --- what is refused when it is opened -------------------------------------------------------- */

#define H_BACKING_OFF  8
#define H_BACKING_LEN  16
#define H_CLUSTER_BITS 20
#define H_SIZE         24
#define H_CRYPT        32
#define H_L1_COUNT     36
#define H_L1_OFF       40
#define H_TABLE_OFF    48
#define H_TABLE_LEN    56
#define H_SNAP_COUNT   60
#define H_SNAP_OFF     64
#define H_INCOMPATIBLE 72
#define H_ORDER        96
#define H_LEN          100
#define H_EXTENSIONS   112 /* as qemu-img writes it */

/* Of an image of 64 MiB with clusters of 64 KiB: L1 table at 3 clusters, refcount table at 1, its block at 2. */
static const struct {
	const char *name, *error;
	struct patch patches[3];
} refused[] = {
	{ "magic", "magic", { { 0, 4, 0x51464900 } } },
	{ "version 0", "version 0", { { 4, 4, 0 } } },
	{ "version 4", "version 4", { { 4, 4, 4 } } },
	{ "cluster bits 8", "cluster bits 8", { { H_CLUSTER_BITS, 4, 8 } } },
	{ "cluster bits 22", "cluster bits 22", { { H_CLUSTER_BITS, 4, 22 } } },
	{ "cluster bits huge", "cluster bits", { { H_CLUSTER_BITS, 4, 0xffffffff } } },
	{ "size huge", "size", { { H_SIZE, 8, UINT64_MAX } } },
	{ "size beyond L1", "too small", { { H_SIZE, 8, UINT64_C(1) << 50 } } },
	{ "size 0", "size 0", { { H_SIZE, 8, 0 } } },
	{ "AES", "AES", { { H_CRYPT, 4, 1 } } },
	{ "LUKS", "LUKS", { { H_CRYPT, 4, 2 } } },
	{ "encryption 77", "77", { { H_CRYPT, 4, 77 } } },
	{ "no L1", "too small", { { H_L1_COUNT, 4, 0 } } },
	{ "L1 huge", "too large", { { H_L1_COUNT, 4, 0xffffffff } } },
	{ "L1 beyond the file", "beyond the end", { { H_L1_COUNT, 4, 1000000 } } },
	{ "L1 unaligned", "l1 table at 196609", { { H_L1_OFF, 8, 196609 } } },
	{ "L1 far away", "l1 table", { { H_L1_OFF, 8, UINT64_C(1) << 40 } } },
	{ "L1 near 2^64", "l1 table", { { H_L1_OFF, 8, UINT64_MAX - 65535 } } },
	{ "L1 on the header", "overlaps the header", { { H_L1_OFF, 8, 0 } } },
	{ "L1 on the refcount table", "overlap", { { H_L1_OFF, 8, 65536 } } },
	{ "refcount table unaligned", "refcount table at 512", { { H_TABLE_OFF, 8, 512 } } },
	{ "refcount table far", "refcount table", { { H_TABLE_OFF, 8, UINT64_C(1) << 55 } } },
	{ "refcount table on the header", "overlaps the header", { { H_TABLE_OFF, 8, 0 } } },
	{ "no refcount table", "refcount table of 0", { { H_TABLE_LEN, 4, 0 } } },
	{ "refcount table huge", "refcount table of", { { H_TABLE_LEN, 4, 0xffffffff } } },
	{ "snapshots too many", "snapshots", { { H_SNAP_COUNT, 4, 0x10001 } } },
	{ "snapshots beyond", "snapshot table",
		{ { H_SNAP_COUNT, 4, 1 }, { H_SNAP_OFF, 8, 16 * MIB } } },
	{ "snapshots unaligned", "snapshot table",
		{ { H_SNAP_COUNT, 4, 1 }, { H_SNAP_OFF, 8, 7 } } },
	{ "unknown bit", "bit 63", { { H_INCOMPATIBLE, 8, UINT64_C(1) << 63 } } },
	{ "named bit", "corrupt bit (bit 5)",
		/* the name table's second entry, of "corrupt bit", becomes that of bit 5 */
		{ { H_INCOMPATIBLE, 8, 1 << 5 }, { H_EXTENSIONS + 8 + 48, 4, 0x0005636f } } },
	{ "refcount order 7", "refcount order 7", { { H_ORDER, 4, 7 } } },
	{ "header short", "header length 8", { { H_LEN, 4, 8 } } },
	{ "header odd", "header length 105", { { H_LEN, 4, 105 } } },
	{ "header longer than a cluster", "header length", { { H_LEN, 4, 0x20000 } } },
	{ "header length huge", "header length", { { H_LEN, 4, 0xfffffff8 } } },
	{ "compression unknown", "compression", { { 104, 4, 0x07000000 } } },
	{ "compression without its bit", "compression", { { 104, 4, 0x01000000 } } },
	{ "extension too long", "reaches beyond", { { H_EXTENSIONS + 4, 4, 0xffffffff } } },
	{ "bitmaps extension short", "bitmaps extension of 4 bytes",
		{ { H_EXTENSIONS, 4, 0x23852875 }, { H_EXTENSIONS + 4, 4, 4 } } },
	{ "backing format with a NUL", "backing format",
		{ { H_EXTENSIONS, 4, 0xe2792aca }, { H_EXTENSIONS + 4, 4, 100 } } },
	{ "backing name too long", "backing file name of 1024",
		{ { H_BACKING_OFF, 8, 600 }, { H_BACKING_LEN, 4, 1024 } } },
	{ "backing name outside", "not inside the first cluster",
		{ { H_BACKING_OFF, 8, 65530 }, { H_BACKING_LEN, 4, 100 } } },
	{ "backing name near 2^64", "not inside the first cluster",
		{ { H_BACKING_OFF, 8, UINT64_MAX - 3 }, { H_BACKING_LEN, 4, 8 } } },
	{ "backing nobody allows", "allow-backing",
		{ { H_BACKING_OFF, 8, 600 }, { H_BACKING_LEN, 4, 4 }, { 600, 4, 0x61626364 } } },
	{ "data file without a name", "data-file", { { H_INCOMPATIBLE, 8, 4 } } },
};

static suspends void expect_refused(size_t i, const char *file_options)
{
	struct bytes image = load("good.qcow2");
	struct test_stack stack;
	struct err err = { 0 };

	for (size_t p = 0; p < ARRAY_LEN(refused[i].patches); p++)
		apply(&image, &refused[i].patches[p]);
	image_write_file("bad.qcow2", image.data, image.len);
	int ret = test_stack_try(&stack, &err,
		"( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2'; %s } )", file_options);
	ck_assert_msg(ret, "%s: it was opened", refused[i].name);
	ck_assert_msg(strstr(err.text, refused[i].error), "%s: nothing of \"%s\" in: %s",
		refused[i].name, refused[i].error, err.text);
	test_stack_close(&stack);
	expect_unchanged("bad.qcow2", &image);
	free(image.data);
}

CO_TEST(test_refused)
{
	image_must("qemu-img create -q -f qcow2 good.qcow2 64M");
	image_must("qemu-io -c 'write -P 1 0 1M' good.qcow2 >io.log");
	for (size_t i = 0; i < ARRAY_LEN(refused); i++) {
		expect_refused(i, "");
		expect_refused(i, "read-only = true;");
	}
}

CO_TEST(test_cut_short)
{
	static const size_t lengths[] = { 0, 1, 71, 72, 103, 104, 511, 65536, 131072, 196608 };
	struct bytes image;
	struct test_stack stack;
	struct err err;

	image_must("qemu-img create -q -f qcow2 good.qcow2 64M");
	image_must("qemu-io -c 'write -P 1 0 1M' good.qcow2 >io.log");
	image = load("good.qcow2");
	for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
		struct bytes cut = { image.data, lengths[i] };

		image_write_file("bad.qcow2", cut.data, cut.len);
		ck_assert_msg(
			test_stack_try(&stack, &err,
				"( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2' } )"),
			"%zu bytes of an image were opened", cut.len);
		test_stack_close(&stack);
		expect_unchanged("bad.qcow2", &cut);
	}
	free(image.data);
}

/* --- what a request meets --------------------------------------------------------------------- */

/* The L2 table is at 4 clusters, the data of the first 16 guest clusters behind it. */
#define L1_ENTRY(n) (3 * 65536 + (n)*8)
#define L2_ENTRY(n) (4 * 65536 + (n)*8)
#define COPIED      (UINT64_C(1) << 63)
#define COMPRESSED  (UINT64_C(1) << 62)

static const struct {
	const char *name;
	struct patch patches[3];
	bool writes_too; /* a write of the first cluster fails as well, and nothing is harmed */
} met[] = {
	{ "L1 entry unaligned", { { L1_ENTRY(0), 8, COPIED | (4 * 65536 + 512) } }, true },
	{ "L1 entry beyond", { { L1_ENTRY(0), 8, COPIED | UINT64_C(1) << 50 } }, true },
	{ "L2 entry unaligned", { { L2_ENTRY(0), 8, COPIED | (5 * 65536 + 512) } }, true },
	{ "L2 entry beyond", { { L2_ENTRY(0), 8, COPIED | UINT64_C(1) << 50 } }, true },
	{ "zero cluster beyond", { { L2_ENTRY(0), 8, COPIED | UINT64_C(1) << 50 | 1 } }, true },
	{ "zero cluster where the file will grow", { { L2_ENTRY(0), 8, COPIED | 64 * 65536 | 1 } },
		true },
	{ "L2 entry to its own table", { { L2_ENTRY(0), 8, COPIED | 4 * 65536 } }, true },
	{ "L2 entry to the L1 table", { { L2_ENTRY(0), 8, COPIED | 3 * 65536 } }, true },
	{ "L2 entry to the refcount table", { { L2_ENTRY(0), 8, COPIED | 65536 } }, true },
	{ "L2 entry to a refcount block", { { L2_ENTRY(0), 8, COPIED | 2 * 65536 } }, true },
	{ "compressed beyond", { { L2_ENTRY(0), 8, COMPRESSED | UINT64_C(1) << 45 } }, true },
	{ "compressed garbage", { { L2_ENTRY(0), 8, COMPRESSED | 2 * 65536 } }, false },
};

static suspends void meet(size_t i, bool read_only)
{
	struct bytes image = load("good.qcow2");
	struct test_stack stack;
	uint8_t buf[4096];

	for (size_t p = 0; p < ARRAY_LEN(met[i].patches); p++)
		apply(&image, &met[i].patches[p]);
	image_write_file("bad.qcow2", image.data, image.len);
	test_stack_open(&stack,
		"( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2'; %s } )",
		read_only ? "read-only = true;" : "");
	ck_assert_msg(
		blk_read(stack.top, 0, buf, sizeof(buf)) == -EIO, "%s: it was read", met[i].name);
	if (!read_only && met[i].writes_too) {
		ck_assert_int_eq(blk_write(stack.top, 0, buf, sizeof(buf), 0), -EIO);
		ck_assert_int_eq(blk_write(stack.top, 32 * 65536, buf, sizeof(buf), 0), -EIO);
		ck_assert_int_eq(blk_discard(stack.top, 0, 65536, 0), -EIO);
	}
	json_t *status = blk_status(stack.top);
	ck_assert_msg(!met[i].writes_too || json_object_get(status, "corrupt"),
		"%s: status does not tell", met[i].name);
	json_decref(status);
	test_stack_close(&stack);
	if (read_only) {
		expect_unchanged("bad.qcow2", &image);
	} else if (met[i].writes_too) {
		/* Only the corrupt bit was set; with it the image opens read-only. */
		apply(&image, &(struct patch){ H_INCOMPATIBLE, 8, 2 });
		expect_unchanged("bad.qcow2", &image);
		test_stack_open(
			&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2' } )");
		ck_assert(blk_caps(stack.top)->read_only);
		test_stack_close(&stack);
		expect_unchanged("bad.qcow2", &image);
	}
	free(image.data);
}

CO_TEST(test_met)
{
	image_must("qemu-img create -q -f qcow2 good.qcow2 64M");
	image_must("qemu-io -c 'write -P 1 0 1M' good.qcow2 >io.log");
	for (size_t i = 0; i < ARRAY_LEN(met); i++) {
		meet(i, false);
		meet(i, true);
	}
}

/* A flag without a table: nothing is mapped there, and a write gets a table as anywhere else. */
CO_TEST(test_flag_without_table)
{
	struct bytes image;
	struct test_stack stack;
	uint8_t byte = 7, found = 1;

	image_must("qemu-img create -q -f qcow2 good.qcow2 64M");
	image = load("good.qcow2");
	apply(&image, &(struct patch){ L1_ENTRY(0), 8, COPIED });
	image_write_file("bad.qcow2", image.data, image.len);
	test_stack_open(&stack, "( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2' } )");
	ck_assert_int_eq(blk_read(stack.top, 0, &found, 1), 0);
	ck_assert_uint_eq(found, 0);
	ck_assert_int_eq(blk_write(stack.top, 0, &byte, 1, 0), 0);
	ck_assert_int_eq(blk_read(stack.top, 0, &found, 1), 0);
	ck_assert_uint_eq(found, 7);
	test_stack_close(&stack);
	image_check("bad.qcow2", false);
	free(image.data);
}

/* --- random damage ---------------------------------------------------------------------------- */

/* Values that tables are damaged with: near what is valid, and far from it. */
static uint64_t evil_value(struct seed *seed)
{
	uint64_t cluster = seed_below(seed, 64) << 12;

	switch (seed_below(seed, 6)) {
	case 0:
		return cluster | COPIED;
	case 1:
		return cluster | seed_below(seed, 512);
	case 2:
		return cluster | COMPRESSED | seed_below(seed, 1 << 20) << 42;
	case 3:
		return UINT64_C(1) << seed_below(seed, 64);
	case 4:
		return UINT64_MAX - seed_below(seed, 4096);
	default:
		return seed_below(seed, UINT64_C(1) << 62);
	}
}

static suspends void use_damaged(struct seed *seed, uint64_t size)
{
	struct test_stack stack;
	struct err err;

	if (!test_stack_try(&stack, &err,
		    "( { layer = 'qcow' }, { layer = 'file'; path = 'bad.qcow2' } )")) {
		uint8_t *buf = malloc(65536);

		size = MIN(size, blk_caps(stack.top)->size);
		for (int i = 0; i < 40; i++) {
			uint64_t len = 1 + seed_below(seed, MIN(size, UINT64_C(65536)));
			uint64_t off = seed_below(seed, size - len + 1);

			seed_fill(seed, buf, len);
			switch (seed_below(seed, 5)) {
			case 0:
				blk_discard(stack.top, off, len, 0);
				break;
			case 1:
				blk_write(stack.top, off, buf, len, 0);
				break;
			case 2:
				blk_flush(stack.top);
				break;
			default:
				blk_read(stack.top, off, buf, len);
			}
		}
		free(buf);
	}
	test_stack_close(&stack);
}

CO_TEST(test_random_damage)
{
	static const char *const options[] = { "cluster_size=4k", "cluster_size=512",
		"extended_l2=on,cluster_size=16k", "compat=0.10,cluster_size=4k",
		"cluster_size=4k,refcount_bits=1" };
	struct seed seed = seed_start("qcow damage");

	for (size_t o = 0; o < ARRAY_LEN(options); o++) {
		image_must("qemu-img create -q -f qcow2 -o %s good.qcow2 2M", options[o]);
		image_must(
			"qemu-io -c 'write -P 1 0 200k' -c 'write -z 1M 64k' good.qcow2 >io.log");
		struct bytes good = load("good.qcow2");
		for (int round = 0; round < 60; round++) {
			struct bytes bad = { malloc(good.len), good.len };
			uint64_t changes = 1 + seed_below(&seed, 4);

			memcpy(bad.data, good.data, good.len);
			for (; changes; changes--) {
				/* Most of the metadata lies in front. */
				uint64_t reach = seed_below(&seed, 3) ? MIN(good.len, (size_t)40000)
								      : 112;
				uint64_t off = seed_below(&seed, reach - 8) & ~UINT64_C(7);

				apply(&bad, &(struct patch){ off, 8, evil_value(&seed) });
			}
			image_write_file("bad.qcow2", bad.data, bad.len);
			use_damaged(&seed, 2 * MIB);
			free(bad.data);
		}
		free(good.data);
	}
}

/* --- names that want out ---------------------------------------------------------------------- */

#define CHAIN_STACK                                       \
	"( { layer = 'qcow'; allow-backing = [ '%s' ] }," \
	"  { layer = 'file'; path = 'allowed/top.qcow2'; read-only = true } )"

static suspends void open_with_backing(const char *name, const char *format, const char *expected)
{
	struct test_stack stack;
	char folder[PATH_MAX];
	struct err err = { 0 };

	ck_assert_ptr_nonnull(realpath("allowed", folder));
	image_must(
		"qemu-img create -q -u -f qcow2 -b '%s' -F %s allowed/top.qcow2 1M", name, format);
	int ret = test_stack_try(&stack, &err, CHAIN_STACK, folder);
	if (expected)
		ck_assert_msg(ret && strstr(err.text, expected), "\"%s\": %d %s", name, ret,
			ret ? err.text : "was opened");
	else
		ck_assert_msg(!ret, "\"%s\": %s", name, err.text);
	test_stack_close(&stack);
}

CO_TEST(test_escapes)
{
	char absolute[PATH_MAX + 32], folder[PATH_MAX];

	image_must("rm -rf allowed outside && mkdir -p allowed/sub outside");
	image_must("truncate -s 1M outside/secret allowed/raw allowed/sub/raw");
	image_must("ln -s ../outside/secret allowed/link && ln -s ../outside allowed/way");
	image_must("ln -s raw allowed/inner && mkfifo allowed/fifo");
	ck_assert_ptr_nonnull(realpath(".", folder));
	open_with_backing("raw", "raw", NULL);
	open_with_backing("sub/../raw", "raw", NULL);
	open_with_backing("sub/raw", "raw", NULL);
	open_with_backing("inner", "raw", NULL);
	snprintf(absolute, sizeof(absolute), "%s/allowed/raw", folder);
	open_with_backing(absolute, "raw", NULL);
	open_with_backing("../outside/secret", "raw", "allow-backing");
	open_with_backing("sub/../../outside/secret", "raw", "allow-backing");
	snprintf(absolute, sizeof(absolute), "%s/outside/secret", folder);
	open_with_backing(absolute, "raw", "allow-backing");
	snprintf(absolute, sizeof(absolute), "%s/allowed-not/raw", folder);
	open_with_backing(absolute, "raw", "allow-backing");
	open_with_backing("/etc/passwd", "raw", "allow-backing");
	open_with_backing("/dev/zero", "raw", "allow-backing");
	open_with_backing("link", "raw", "link");
	open_with_backing("way/secret", "raw", "way/secret");
	open_with_backing("fifo", "raw", "fifo");
	open_with_backing("sub", "raw", "sub");
	open_with_backing("nothing", "raw", "nothing");
	open_with_backing("raw", "vmdk", "vmdk");
	open_with_backing("raw", "qcow2", "not a qcow2 image");
}

/* An image that is its own backing, and two that are each other's. */
CO_TEST(test_loops)
{
	image_must("rm -rf allowed && mkdir allowed");
	open_with_backing("top.qcow2", "qcow2", "deep");
	image_must("qemu-img create -q -u -f qcow2 -b top.qcow2 -F qcow2 allowed/other.qcow2 1M");
	open_with_backing("other.qcow2", "qcow2", "deep");
}

/* As deep as it may be told to go, the stack of the coroutine that opens holds; and reads go down a long chain. */
CO_TEST(test_depth)
{
	struct test_stack stack;
	char folder[PATH_MAX];
	struct err err = { 0 };
	uint8_t byte = 0;

	image_must("rm -rf allowed && mkdir allowed");
	ck_assert_ptr_nonnull(realpath("allowed", folder));
	image_must("qemu-img create -q -f qcow2 allowed/0 1M && qemu-io -c 'write -P 9 0 64k' "
		   "allowed/0 >io.log");
	for (int i = 1; i <= 64; i++)
		image_must("qemu-img create -q -u -f qcow2 -b %d -F qcow2 allowed/%d 1M", i - 1, i);
	test_stack_open(&stack,
		"( { layer = 'qcow'; allow-backing = [ '%s' ]; backing-depth = 64; cache = '64K' },"
		"  { layer = 'file'; path = 'allowed/64' } )",
		folder);
	ck_assert_int_eq(blk_read(stack.top, 1000, &byte, 1), 0);
	ck_assert_uint_eq(byte, 9);
	test_stack_close(&stack);
	int ret = test_stack_try(&stack, &err,
		"( { layer = 'qcow'; allow-backing = [ '%s' ]; backing-depth = 63; cache = '64K' },"
		"  { layer = 'file'; path = 'allowed/64' } )",
		folder);
	ck_assert_int_eq(ret, -ELOOP);
	ck_assert_msg(strstr(err.text, "backing-depth"), "%s", err.text);
	test_stack_close(&stack);
}

int main(void)
{
	Suite *suite = suite_create("qcow bad");
	TCase *tcase = tcase_create("bad");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_refused);
	tcase_add_test(tcase, test_cut_short);
	tcase_add_test(tcase, test_met);
	tcase_add_test(tcase, test_flag_without_table);
	tcase_add_test(tcase, test_random_damage);
	tcase_add_test(tcase, test_escapes);
	tcase_add_test(tcase, test_loops);
	tcase_add_test(tcase, test_depth);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
