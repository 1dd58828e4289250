/*
 * Power cuts while snapshots are made, applied and deleted, and while an image is repaired: at every moment, for
 * any subset of the writes that were not yet flushed, the image is the old or the new one, whole.
 *
 * Each operation runs on the file through a fault layer that logs every change. Then files are made as they
 * could be after a cut at some operation of the log: what a flush covered is there, of the rest each sector is there or
 * not, at random. qemu-img check must find nothing, not even a leak (after a repair: nothing the image did not have
 * before), and the disk must read as before or as afterwards.
 */
#include <errno.h>
#include <sys/stat.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/qcow/check.h"
#include "blk/qcow/snapshot.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define DISK_SIZE "4M"
#define SECTOR    UINT64_C(512)
#define CUTS      10 /* per operation */

static const char *const kinds[] = {
	"cluster_size=4k",
	"cluster_size=512,refcount_bits=8",
	"compat=0.10,cluster_size=16k",
	"extended_l2=on,cluster_size=16k",
	"cluster_size=64k,lazy_refcounts=on",
};

struct bytes {
	uint8_t *data;
	uint64_t len;
};

static struct bytes read_file(const char *path)
{
	struct bytes bytes;
	struct stat st;
	FILE *file = fopen(path, "re");

	ck_assert_ptr_nonnull(file);
	ck_assert_int_eq(fstat(fileno(file), &st), 0);
	bytes.len = (uint64_t)st.st_size;
	bytes.data = malloc(bytes.len + 1);
	ck_assert_uint_eq(fread(bytes.data, 1, bytes.len, file), bytes.len);
	fclose(file);
	return bytes;
}

/* What the disk in image.qcow2 (or another) reads as. */
static struct bytes read_disk(const char *path)
{
	image_must("qemu-img convert -f qcow2 -O raw %s disk.raw", path);
	return read_file("disk.raw");
}

static bool same(const struct bytes *a, const struct bytes *b)
{
	return a->len == b->len && !memcmp(a->data, b->data, a->len);
}

/* --- operations ------------------------------------------------------------------------------- */

typedef int operation_fn(struct blk *file, struct qcow_header *header, struct err *err);

static suspends int do_create(struct blk *file, struct qcow_header *header, struct err *err)
{
	return qcow_snapshot_create(file, header, "second", true, err);
}

static suspends int do_apply(struct blk *file, struct qcow_header *header, struct err *err)
{
	return qcow_snapshot_apply(file, header, "first", true, err);
}

static suspends int do_delete(struct blk *file, struct qcow_header *header, struct err *err)
{
	return qcow_snapshot_delete(file, header, "first", true, err);
}

static suspends int do_repair(struct blk *file, struct qcow_header *header, struct err *err)
{
	struct qcow_check_result result;
	int ret = qcow_repair(file, header, QCOW_REPAIR_LEAKS, NULL, &result, err);

	ck_assert_uint_eq(result.leaks, 0);
	ck_assert_uint_gt(result.leaks_fixed, 0);
	return ret;
}

/* Runs it on image.qcow2, logging to changes.log. */
static suspends void run(operation_fn *fn, struct seed *seed)
{
	struct test_stack stack;
	struct qcow_header header;
	struct err err = { 0 };

	test_stack_open(&stack,
		"( { layer = 'fault'; log = 'changes.log'; seed = %d },"
		"  { layer = 'file'; path = 'image.qcow2' } )",
		(int)seed_below(seed, 1 << 30));
	ck_assert_int_eq(qcow_header_load(stack.top, &header, &err), 0);
	ck_assert_msg(!fn(stack.top, &header, &err), "%s", err.text);
	qcow_header_fini(&header);
	test_stack_close(&stack);
}

/* --- cuts ------------------------------------------------------------------------------------- */

struct change {
	unsigned kind;
	uint64_t off, len;
	const uint8_t *data;
};

/* The operations came one after the other, so returns tell nothing. */
static size_t parse_log(const struct bytes *log, struct change **changes)
{
	size_t count = 0;

	*changes = calloc(log->len / sizeof(struct fault_log_record) + 1, sizeof(**changes));
	for (uint64_t at = 0; at < log->len;) {
		const struct fault_log_record *record = (const void *)(log->data + at);
		struct change change = { be16_get(record->kind), be64_get(record->off),
			be64_get(record->len), log->data + at + sizeof(*record) };

		at += sizeof(*record) + (change.kind == FAULT_LOG_WRITE ? change.len : 0);
		if (change.kind != FAULT_LOG_RETURN && change.kind != FAULT_LOG_OPEN)
			(*changes)[count++] = change;
	}
	return count;
}

/* cut.qcow2 as it may be when the power fails after the first `cut` changes were begun. */
static void make_cut(const struct bytes *before, const struct change *changes, size_t cut,
	unsigned survival, struct seed *seed)
{
	uint64_t size = before->len, largest = size;
	size_t durable = 0;

	for (size_t i = 0; i < cut; i++) {
		if (changes[i].kind == FAULT_LOG_FLUSH && i + 1 < cut)
			durable = i;
		if (changes[i].kind == FAULT_LOG_RESIZE)
			largest = MAX(largest, size = changes[i].len);
	}
	uint8_t *file = calloc(1, largest);
	memcpy(file, before->data, before->len);
	for (size_t i = 0; i < cut; i++) {
		const struct change *change = &changes[i];

		for (uint64_t at = 0, step; at < change->len; at += step) {
			step = MIN(SECTOR - (change->off + at) % SECTOR, change->len - at);
			if (change->kind > FAULT_LOG_DISCARD ||
				(i >= durable && seed_below(seed, 256) >= survival))
				continue;
			if (change->kind == FAULT_LOG_WRITE)
				memcpy(file + change->off + at, change->data + at, step);
			else
				memset(file + change->off + at, 0, step);
		}
	}
	image_write_file("cut.qcow2", file, size);
	free(file);
}

static void cut_and_verify(const char *name, const struct bytes *before, struct bytes disks[2],
	bool leaks_allowed, struct seed *seed)
{
	static const unsigned survivals[] = { 0, 64, 128, 192, 256 };
	struct bytes log = read_file("changes.log");
	struct change *changes;
	size_t count = parse_log(&log, &changes);

	for (int i = 0; i < CUTS; i++) {
		/* The first and the last moment, and more of the end, where the header is. */
		uint64_t back = seed_below(seed, i % 2 ? MIN(count, (size_t)6) : count);
		size_t cut = i ? count - back : 0;

		make_cut(before, changes, cut, survivals[seed_below(seed, ARRAY_LEN(survivals))],
			seed);
		image_check("cut.qcow2", leaks_allowed);
		struct bytes disk = read_disk("cut.qcow2");
		ck_assert_msg(same(&disk, &disks[0]) || same(&disk, &disks[1]),
			"%s: after a cut at change %zu of %zu the disk is neither old nor new",
			name, cut, count);
		ck_assert_msg(cut < count || leaks_allowed || same(&disk, &disks[1]),
			"%s: done, but the disk is not the new one", name);
		free(disk.data);
	}
	free(changes);
	free(log.data);
}

static suspends void try(const char *name, operation_fn *fn, bool leaks_allowed, struct seed *seed)
{
	struct bytes before = read_file("image.qcow2"), disks[2];

	printf("  %s\n", name);
	disks[0] = read_disk("image.qcow2");
	run(fn, seed);
	image_check("image.qcow2", false);
	disks[1] = read_disk("image.qcow2");
	cut_and_verify(name, &before, disks, leaks_allowed, seed);
	free(before.data);
	free(disks[0].data);
	free(disks[1].data);
}

/* The refcounts of the last clusters of the file, 16 bits wide, are raised. */
static void add_leaks(void)
{
	struct bytes image = read_file("image.qcow2");
	const struct qcow_disk_header *header = (const void *)image.data;
	uint64_t cluster_size = UINT64_C(1) << be32_get(header->cluster_bits), block;
	be64 entry;

	memcpy(&entry, image.data + be64_get(header->refcount_table_off), sizeof(entry));
	block = be64_get(entry) & QCOW_REFTABLE_OFF_MASK;
	for (uint64_t i = cluster_size / 2 - 3; i < cluster_size / 2; i++)
		image.data[block + i * 2 + 1]++;
	image.data = realloc(image.data, cluster_size * cluster_size / 2);
	memset(image.data + image.len, 0, cluster_size * cluster_size / 2 - image.len);
	image_write_file("image.qcow2", image.data, cluster_size * cluster_size / 2);
	free(image.data);
}

CO_TEST(test_shadow_power_cuts)
{
	struct seed seed = seed_start("qcow snapshots and repair, power cuts");

	for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
		printf("%s\n", kinds[i]);
		image_must("qemu-img create -q -f qcow2 -o %s image.qcow2 " DISK_SIZE, kinds[i]);
		image_must("qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2M 333k' image.qcow2 "
			   ">/dev/null");
		image_must("qemu-img snapshot -c first image.qcow2");
		image_must("qemu-io -c 'write -P 3 100k 500k' -c 'write -P 4 3M 200k' -c 'discard "
			   "2M 64k' "
			   "image.qcow2 >/dev/null");
		try("create", do_create, false, &seed);
		image_must("qemu-io -c 'write -P 5 0 300k' image.qcow2 >/dev/null");
		try("apply", do_apply, false, &seed);
		image_must("qemu-io -c 'write -P 6 1M 100k' image.qcow2 >/dev/null");
		try("delete", do_delete, false, &seed);
	}
	image_must("qemu-img create -q -f qcow2 -o cluster_size=4k image.qcow2 " DISK_SIZE);
	image_must("qemu-io -c 'write -P 1 0 1M' image.qcow2 >/dev/null");
	add_leaks();
	try("repair", do_repair, true, &seed);
}

int main(void)
{
	Suite *suite = suite_create("qcow shadow");
	TCase *tcase = tcase_create("power cuts");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_shadow_power_cuts);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
