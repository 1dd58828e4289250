/*
 * Power cuts under the qcow layer: whatever subset of the writes that were not yet flushed reaches the
 * disk, the image is sound and what was flushed is there.
 *
 * A run works on an image through a fault layer that logs every change (fault.h). Then, for many moments
 * of the log, a disk is made as it could be after a power cut at that moment: what a flush made
 * durable is there; of the rest, each sector of each write is there or not, at random. On it qemu-img check must
 * find no error (leaks are allowed), and each sector of the disk reads as what was last flushed before the cut,
 * or as something written later, or as zeroes if something was written later.
 *
 * Every sector written carries its number and a generation, so what is read tells when it was written, and
 * data of another sector is noticed. Requests that overlap are serialized by the test.
 *
 * An image with an external data file is two disks with one log (fault.h): each has flushes of its own. Of a raw data
 * file alone the same is asked.
 *
 * Beside the workers that write, zero, discard and flush, there run compactions, changes of the disk's size, and
 * snapshots that come, go, and are gone back to.
 *
 * CUTS=1000 in the environment judges so many moments per kind of image, KIND=NAME takes only that kind.
 */
#include <errno.h>
#include <sys/stat.h>

#include "base/util.h"
#include "blk/fault.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"
#include "co_test.h"
#include "qcow_images.h"
#include "seed.h"

#define DISK_SIZE  (UINT64_C(4) << 20)
#define SECTOR     512
#define SECTORS    (DISK_SIZE / SECTOR)
#define WORKERS    6
#define OPERATIONS 60 /* per worker */
#define CUTS       20 /* per kind of image, unless $CUTS says */
#define ROUNDS     3  /* of who compacts, resizes and takes snapshots */

/* --- the history of the disk ------------------------------------------------------------------ */

#define GENERATION_BASE UINT64_MAX /* what the disk held before everything */

/*
 * One write to a sector. begin is a position, the length of the log then; ended an event number: what
 * happens in memory alone leaves the log as it is, but has its order.
 */
struct version {
	uint64_t generation; /* 0: zeroes */
	uint64_t begin;
	uint64_t ended; /* event, UINT64_MAX while it runs */
};

struct history {
	struct version *versions;
	size_t count, capacity;
};

struct flush {
	uint64_t begun; /* event */
	uint64_t end;   /* position */
};

struct crash {
	struct test_stack stack;
	struct seed seed;
	const struct image_kind *kind;
	const char *cut_layer; /* of the image after a cut */
	bool data_file, raw;
	uint8_t *base; /* the disk before everything; generation 0 of a history */
	struct history *sectors;
	struct flush flushes[WORKERS * OPERATIONS + ROUNDS + 1];
	size_t flush_count;
	uint64_t generation, last_event;
	struct range_lock busy;
	struct co_group workers;
	int log_fd;
};

static uint64_t log_position(struct crash *crash)
{
	struct stat st;

	ck_assert_int_eq(fstat(crash->log_fd, &st), 0);
	return (uint64_t)st.st_size;
}

static void add_version(struct crash *crash, uint64_t sector, uint64_t generation, uint64_t begin)
{
	struct history *history = &crash->sectors[sector];

	if (history->count == history->capacity) {
		history->capacity = history->capacity ? 2 * history->capacity : 4;
		history->versions = realloc(
			history->versions, history->capacity * sizeof(*history->versions));
	}
	history->versions[history->count++] = (struct version){
		.generation = generation, .begin = begin, .ended = UINT64_MAX
	};
}

static void end_versions(struct crash *crash, uint64_t first, uint64_t count)
{
	crash->last_event++;
	for (uint64_t i = first; i < first + count; i++)
		crash->sectors[i].versions[crash->sectors[i].count - 1].ended = crash->last_event;
}

static void make_sector(
	const struct crash *crash, uint8_t *buf, uint64_t sector, uint64_t generation)
{
	uint64_t words[SECTOR / 8];

	if (!generation)
		memset(buf, 0, SECTOR);
	if (generation == GENERATION_BASE)
		memcpy(buf, crash->base + sector * SECTOR, SECTOR);
	if (!generation || generation == GENERATION_BASE)
		return;

	for (size_t i = 0; i < ARRAY_LEN(words); i++)
		words[i] = i % 2 ? generation : ~sector;
	memcpy(buf, words, sizeof(words));
}

/* --- the run ---------------------------------------------------------------------------------- */

static suspends void write_sectors(struct crash *crash, uint64_t first, uint64_t count)
{
	uint8_t *buf = malloc(count * SECTOR);
	uint64_t generation = ++crash->generation, begin = log_position(crash);
	bool fua = !seed_below(&crash->seed, 10);

	for (uint64_t i = 0; i < count; i++) {
		make_sector(crash, buf + i * SECTOR, first + i, generation);
		add_version(crash, first + i, generation, begin);
	}
	ck_assert_int_eq(
		blk_write(crash->stack.top, first * SECTOR, buf, count * SECTOR, fua ? BLK_FUA : 0),
		0);
	end_versions(crash, first, count);
	free(buf);
}

static suspends void clear_sectors(struct crash *crash, uint64_t first, uint64_t count)
{
	uint64_t begin = log_position(crash);

	for (uint64_t i = 0; i < count; i++)
		add_version(crash, first + i, 0, begin);
	if (seed_below(&crash->seed, 2))
		ck_assert_int_eq(
			blk_discard(crash->stack.top, first * SECTOR, count * SECTOR, 0), 0);
	else
		ck_assert_int_eq(blk_zero(crash->stack.top, first * SECTOR, count * SECTOR,
					 seed_below(&crash->seed, 3) ? 0 : BLK_NO_HOLE),
			0);
	end_versions(crash, first, count);
}

static suspends void flush_disk(struct crash *crash)
{
	struct flush flush = { .begun = ++crash->last_event };

	ck_assert_int_eq(blk_flush(crash->stack.top), 0);
	flush.end = log_position(crash);
	crash->flushes[crash->flush_count++] = flush;
}

static suspends void worker(void *arg)
{
	struct crash *crash = arg;

	for (int i = 0; i < OPERATIONS; i++) {
		uint64_t count = 1 +
				 seed_below(&crash->seed, seed_below(&crash->seed, 6) ? 40 : 600);
		uint64_t first = seed_below(&crash->seed, SECTORS - count);
		unsigned what = (unsigned)seed_below(&crash->seed, 10);
		struct range range;

		if (what == 9) {
			flush_disk(crash);
			continue;
		}
		range_lock_acquire(&crash->busy, &range, first, count, true);
		if (what < 6)
			write_sectors(crash, first, count);
		else
			clear_sectors(crash, first, count);
		range_lock_release(&crash->busy, &range);
	}
}

static suspends void nap(struct crash *crash, uint64_t max_ms)
{
	co_sleep_ns(seed_below(&crash->seed, max_ms * 1000) * (NS_PER_MS / 1000));
}

static suspends void compactor(void *arg)
{
	struct crash *crash = arg;

	for (int i = 0; i < ROUNDS && !crash->data_file; i++) {
		struct qcow_compact job = { 0 };

		nap(crash, 20);
		ck_assert_int_eq(qcow_compact(crash->stack.top, &job, NULL), 0);
	}
}

/* The disk becomes longer, gets something written there, and is cut again. Workers stay below DISK_SIZE. */
static suspends void resizer(void *arg)
{
	struct crash *crash = arg;
	struct blk *top = crash->stack.top;
	uint8_t junk[8 * SECTOR];
	struct err err;

	memset(junk, 0xa5, sizeof(junk));
	for (int i = 0; i < ROUNDS; i++) {
		uint64_t size = DISK_SIZE + (1 + seed_below(&crash->seed, 4096)) * SECTOR;

		nap(crash, 15);
		/* Version 2 cannot hide a longer backing. Going back to a snapshot may have cut it. */
		if (blk_resize(top, size, BLK_FORCE, &err))
			ck_assert_msg(err.code == ENOTSUP, "%s", err.text);
		else if (blk_caps(top)->size >= DISK_SIZE + sizeof(junk))
			blk_write(top, DISK_SIZE, junk, sizeof(junk), 0);
		nap(crash, 15);
		ck_assert_msg(!blk_resize(top, DISK_SIZE, BLK_FORCE, &err), "%s", err.text);
	}
}

static suspends int snapshot(
	struct crash *crash, enum qcow_snapshot_change change, const char *name, struct err *err)
{
	return qcow_live_snapshot(crash->stack.top, change, name, err);
}

static suspends void must_snapshot(
	struct crash *crash, enum qcow_snapshot_change change, const char *name)
{
	struct err err;

	ck_assert_msg(!snapshot(crash, change, name, &err), "%s", err.text);
}

/* A snapshot comes and goes among requests in flight; it may fail where counts have no room for a second user. */
static suspends void snapshotter(void *arg)
{
	struct crash *crash = arg;
	struct err err;

	for (int i = 0; i < ROUNDS; i++) {
		nap(crash, 10);
		if (snapshot(crash, QCOW_SNAPSHOT_CREATE, "live", &err))
			return;
		nap(crash, 10);
		must_snapshot(crash, QCOW_SNAPSHOT_DELETE, "live");
	}
}

/* The disk goes back to a snapshot, durably. No worker may be under way, so that its content is known. */
static suspends void go_back(struct crash *crash, const uint64_t *generations)
{
	struct flush flush = { 0 };
	uint64_t begin = log_position(crash);

	for (uint64_t sector = 0; sector < SECTORS; sector++)
		add_version(crash, sector, generations[sector], begin);
	must_snapshot(crash, QCOW_SNAPSHOT_APPLY, "back");
	end_versions(crash, 0, SECTORS);
	flush.begun = ++crash->last_event;
	flush.end = log_position(crash);
	crash->flushes[crash->flush_count++] = flush;
}

static suspends void returner(void *arg)
{
	struct crash *crash = arg;
	uint64_t *generations = calloc(SECTORS, sizeof(*generations));
	struct range range;
	struct err err;

	for (int i = 0; i < ROUNDS; i++) {
		nap(crash, 10);
		range_lock_acquire(&crash->busy, &range, 0, SECTORS, true);
		int ret = snapshot(crash, QCOW_SNAPSHOT_CREATE, "back", &err);
		for (uint64_t sector = 0; sector < SECTORS; sector++) {
			const struct history *history = &crash->sectors[sector];

			generations[sector] =
				history->count ? history->versions[history->count - 1].generation
					       : GENERATION_BASE;
		}
		range_lock_release(&crash->busy, &range);
		if (ret)
			break;
		nap(crash, 10);
		if (seed_below(&crash->seed, 3)) {
			range_lock_acquire(&crash->busy, &range, 0, SECTORS, true);
			go_back(crash, generations);
			range_lock_release(&crash->busy, &range);
			nap(crash, 10);
		}
		must_snapshot(crash, QCOW_SNAPSHOT_DELETE, "back");
	}
	free(generations);
}

/* --- the disk after a power cut --------------------------------------------------------------- */

#define DISKS 2 /* the image, and its data file */

struct operation {
	unsigned kind, disk;
	bool fua;
	uint64_t id, off, len;
	const uint8_t *data;
	uint64_t returned; /* position of its successful return in the log, UINT64_MAX: none */
	uint64_t begun;
};

struct log {
	uint8_t *bytes;
	uint64_t len;
	struct operation *operations;
	size_t count;
};

static void parse_log(struct log *log, const char *path)
{
	FILE *file = fopen(path, "re");

	ck_assert_ptr_nonnull(file);
	fseek(file, 0, SEEK_END);
	log->len = (uint64_t)ftell(file);
	rewind(file);
	log->bytes = malloc(log->len + 1);
	ck_assert_uint_eq(fread(log->bytes, 1, log->len, file), log->len);
	fclose(file);
	log->operations = calloc(
		log->len / sizeof(struct fault_log_record) + 1, sizeof(*log->operations));
	log->count = 0;
	for (uint64_t at = 0; at + sizeof(struct fault_log_record) <= log->len;) {
		const struct fault_log_record *record = (const void *)(log->bytes + at);
		struct operation op = { .kind = be16_get(record->kind),
			.fua = be16_get(record->flags) & BLK_FUA,
			.disk = (unsigned)(be64_get(record->id) >> FAULT_LOG_DISK_SHIFT),
			.id = be64_get(record->id),
			.off = be64_get(record->off),
			.len = be64_get(record->len),
			.returned = UINT64_MAX,
			.begun = at };

		at += sizeof(*record);
		op.data = log->bytes + at;
		if (op.kind == FAULT_LOG_WRITE)
			at += op.len;
		if (op.kind != FAULT_LOG_RETURN) {
			log->operations[log->count++] = op;
			continue;
		}
		for (size_t i = log->count; i-- > 0;)
			if (log->operations[i].id == op.id && !op.off) {
				log->operations[i].returned = at;
				break;
			}
	}
}

/* The begin of the disk's last flush that had returned at the cut: what returned before it is durable. */
static uint64_t durable_before(const struct log *log, unsigned disk, uint64_t cut)
{
	uint64_t begun = 0;

	for (size_t i = 0; i < log->count; i++)
		if (log->operations[i].kind == FAULT_LOG_FLUSH && log->operations[i].disk == disk &&
			log->operations[i].returned <= cut)
			begun = MAX(begun, log->operations[i].begun);
	return begun;
}

static void apply_part(uint8_t *disk, const struct operation *op, uint64_t from, uint64_t len)
{
	if (op->kind == FAULT_LOG_WRITE)
		memcpy(disk + op->off + from, op->data + from, len);
	else
		memset(disk + op->off + from, 0, len);
}

/* What a disk of the log held before everything. */
struct before {
	uint8_t *bytes;
	uint64_t len;
	const char *cut_path; /* gets the disk after a cut */
};

/* A disk as it may be after a cut; `survival` of 256 sectors not yet durable are there. */
static void make_cut_disk(struct crash *crash, const struct log *log, uint64_t cut, unsigned number,
	const struct before *before, unsigned survival)
{
	uint64_t durable = durable_before(log, number, cut), size = before->len, largest = size;

	for (size_t i = 0; i < log->count; i++)
		if (log->operations[i].kind == FAULT_LOG_RESIZE &&
			log->operations[i].disk == number)
			largest = MAX(largest, log->operations[i].len);
	uint8_t *disk = calloc(1, largest);
	memcpy(disk, before->bytes, before->len);
	for (size_t i = 0; i < log->count && log->operations[i].begun < cut; i++) {
		const struct operation *op = &log->operations[i];
		bool there = op->returned <= durable || (op->fua && op->returned <= cut);

		if (op->disk != number)
			continue;
		if (op->kind == FAULT_LOG_RESIZE && there && op->len < size)
			memset(disk + op->len, 0, largest - op->len);
		if (op->kind == FAULT_LOG_RESIZE)
			size = op->len; /* a file's length and its content are separate matters */
		if (op->kind > FAULT_LOG_DISCARD)
			continue;
		bool whole = seed_below(&crash->seed, 4) < 2,
		     fate = seed_below(&crash->seed, 256) < survival;
		for (uint64_t at = 0, step; at < op->len; at += step) {
			step = MIN(SECTOR - (op->off + at) % SECTOR, op->len - at);
			if (there || (whole ? fate : seed_below(&crash->seed, 256) < survival))
				apply_part(disk, op, at, step);
		}
	}
	image_write_file(before->cut_path, disk, size);
	free(disk);
}

/* --- the verdict ------------------------------------------------------------------------------ */

/* Was a version with this content possible for the sector at the cut? */
static bool sector_allowed(
	const struct crash *crash, uint64_t sector, const uint8_t *found, uint64_t cut)
{
	const struct history *history = &crash->sectors[sector];
	const uint8_t *base = crash->base + sector * SECTOR;
	static const uint8_t zeroes[SECTOR];
	size_t first = 0; /* versions from here on are possible; 0 also stands for the base */
	uint8_t expected[SECTOR];

	for (size_t f = 0; f < crash->flush_count; f++)
		for (size_t i = 0; i < history->count && crash->flushes[f].end <= cut; i++)
			if (history->versions[i].ended < crash->flushes[f].begun)
				first = MAX(first, i + 1);
	/* `first` is one more than the index of the version that is guaranteed. */
	bool later = false;
	for (size_t i = first ? first - 1 : 0; i < history->count; i++) {
		const struct version *version = &history->versions[i];

		if (version->begin > cut)
			break;
		later |= i + 1 > first;
		make_sector(crash, expected, sector, version->generation);
		if (!memcmp(found, expected, SECTOR))
			return true;
	}
	if (!first && !memcmp(found, base, SECTOR))
		return true;
	return later && !memcmp(found, zeroes, SECTOR);
}

static void print_history(const struct crash *crash, uint64_t sector)
{
	const struct history *history = &crash->sectors[sector];

	for (size_t i = 0; i < history->count; i++)
		printf("  generation %#llx written from %llu, ended as event %llu\n",
			(unsigned long long)history->versions[i].generation,
			(unsigned long long)history->versions[i].begin,
			(unsigned long long)history->versions[i].ended);
	for (size_t i = 0; i < crash->flush_count; i++)
		printf("  flush begun as event %llu, over at %llu\n",
			(unsigned long long)crash->flushes[i].begun,
			(unsigned long long)crash->flushes[i].end);
}

static uint8_t *read_file(const char *path, uint64_t *len)
{
	struct stat st;
	FILE *file = fopen(path, "re");

	ck_assert_ptr_nonnull(file);
	ck_assert_int_eq(fstat(fileno(file), &st), 0);
	*len = (uint64_t)st.st_size;
	uint8_t *bytes = malloc(*len);
	ck_assert_uint_eq(fread(bytes, 1, *len, file), *len);
	fclose(file);
	return bytes;
}

static void verify_disk(struct crash *crash, uint64_t cut, const char *what, const uint8_t *disk)
{
	for (uint64_t sector = 0; sector < SECTORS; sector++) {
		const uint64_t *words = (const void *)(disk + sector * SECTOR);

		if (sector_allowed(crash, sector, disk + sector * SECTOR, cut))
			continue;
		print_history(crash, sector);
		ck_abort_msg("%s: after a cut at %llu sector %llu %s %#llx %#llx",
			crash->kind->name, (unsigned long long)cut, (unsigned long long)sector,
			what, (unsigned long long)words[0], (unsigned long long)words[1]);
	}
}

/* What was not flushed, the image may not show although the data file has it; else they tell the same. */
static void verify_raw(struct crash *crash, uint64_t cut)
{
	uint64_t len;
	uint8_t *raw = read_file("cut.data", &len);

	ck_assert_uint_ge(len, DISK_SIZE);
	verify_disk(crash, cut, "of the data file alone is", raw);
	free(raw);
}

static suspends void verify_cut(struct crash *crash, uint64_t cut)
{
	struct test_stack stack;
	uint8_t *disk = malloc(DISK_SIZE);

	image_check("cut.qcow2", true);
	test_stack_open(&stack, "( %s, { layer = 'file'; path = 'cut.qcow2' } )", crash->cut_layer);
	ck_assert_int_eq(blk_read(stack.top, 0, disk, DISK_SIZE), 0);
	verify_disk(crash, cut, "reads", disk);
	if (crash->raw)
		verify_raw(crash, cut);
	test_stack_close(&stack);
	image_check("cut.qcow2", true);
	free(disk);
}

static suspends void verify_cuts(struct crash *crash, const struct before *before)
{
	const char *given = getenv("CUTS");
	int cuts = given ? atoi(given) : CUTS;
	struct log log;

	parse_log(&log, "changes.log");
	for (int i = 0; i < cuts; i++) {
		uint64_t cut = seed_below(&crash->seed, log.len + 1);
		static const unsigned survivals[] = { 0, 64, 128, 192, 256 };

		for (unsigned disk = 0; disk < DISKS && before[disk].bytes; disk++)
			make_cut_disk(crash, &log, cut, disk, &before[disk],
				survivals[seed_below(&crash->seed, ARRAY_LEN(survivals))]);
		verify_cut(crash, cut);
	}
	free(log.bytes);
	free(log.operations);
}

static void fill_random(void *arg, uint8_t *buf, size_t len)
{
	seed_fill(arg, buf, len);
}

static suspends void run(struct crash *crash)
{
	range_lock_init(&crash->busy);
	co_group_init(&crash->workers);
	test_stack_open(&crash->stack,
		"( %s, { layer = 'fault'; log = 'changes.log'; delay-random-us = 200; seed = %d },"
		"  { layer = 'file'; path = 'image.qcow2' } )",
		image_layer(crash->kind), (int)seed_below(&crash->seed, 1 << 30));
	crash->log_fd = open("changes.log", O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < WORKERS; i++)
		co_group_start(&crash->workers, worker, crash);
	co_group_start(&crash->workers, compactor, crash);
	co_group_start(&crash->workers, resizer, crash);
	co_group_start(&crash->workers, snapshotter, crash);
	co_group_start(&crash->workers, returner, crash);
	co_group_wait(&crash->workers);
	test_stack_close(&crash->stack);
	close(crash->log_fd);
}

/* given: what is special about the kind. */
static suspends void run_kind(const struct crash *given, struct seed *seed)
{
	struct crash *crash = malloc(sizeof(*crash));
	struct before before[DISKS] = {};

	printf("  %s\n", given->kind->name);
	fflush(stdout);
	*crash = *given;
	crash->seed = *seed;
	crash->base = malloc(DISK_SIZE);
	crash->sectors = calloc(SECTORS, sizeof(*crash->sectors));
	image_make(crash->kind, "image.qcow2", crash->base, DISK_SIZE, fill_random, &crash->seed);
	before[0].cut_path = "cut.qcow2";
	before[0].bytes = read_file("image.qcow2", &before[0].len);
	if (crash->data_file) {
		before[1].cut_path = "cut.data";
		before[1].bytes = read_file("data", &before[1].len);
	}
	run(crash);
	verify_cuts(crash, before);
	for (uint64_t i = 0; i < SECTORS; i++)
		free(crash->sectors[i].versions);
	free(crash->sectors);
	free(crash->base);
	for (unsigned disk = 0; disk < DISKS; disk++)
		free(before[disk].bytes);
	*seed = crash->seed;
	free(crash);
}

static bool is_wanted(const char *name)
{
	const char *only = getenv("KIND");

	return !only || !strcmp(only, name);
}

CO_TEST(test_power_cuts)
{
	struct seed seed = seed_start("qcow power cuts");

	for (size_t i = 0; i < IMAGE_KINDS; i++) {
		struct crash crash = { .kind = &image_kinds[i] };

		crash.cut_layer = strdup(image_layer(crash.kind));
		if (is_wanted(crash.kind->name))
			run_kind(&crash, &seed);
		free((char *)crash.cut_layer);
	}
}

CO_TEST(test_power_cuts_with_a_data_file)
{
	struct seed seed = seed_start("qcow power cuts, data file");

	for (size_t i = 0; i < IMAGE_DATA_KINDS; i++) {
		struct image_kind kind = { .name = image_data_kinds[i].name,
			.create_options = image_data_kinds[i].create_options,
			.layer_options = "data-file = ( { layer = 'fault'; log = 'changes.log'; "
					 "log-disk = 1; delay-random-us = 200 }, "
					 "{ layer = 'file'; path = 'data' } );" };
		struct crash crash = { .kind = &kind,
			.cut_layer = "{ layer = 'qcow'; "
				     "data-file = ( { layer = 'file'; path = 'cut.data' } ) }",
			.data_file = true,
			.raw = image_data_kinds[i].raw };

		image_must("rm -f data");
		if (is_wanted(kind.name))
			run_kind(&crash, &seed);
	}
}

int main(void)
{
	Suite *suite = suite_create("qcow crash");
	TCase *tcase = tcase_create("crash");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_power_cuts);
	tcase_add_test(tcase, test_power_cuts_with_a_data_file);
	suite_add_tcase(suite, tcase);
	return test_suite(suite);
}
