/*
 * Every stack of the storage layers against a model of a disk: random operations, alone and many at a
 * time, resizes and reopenings, on both I/O engines; the disk and an array of bytes hold the same.
 *
 * Each case takes one kind of leaf and builds random stacks on it: block size, odd sizes, padded, and a
 * fault layer whose delays shuffle what is under way.
 */
#include "model.h"

#define ROUNDS         4
#define STEPS          60
#define WORKERS        6
#define WORKER_STEPS   40
#define SIZE_MAX_BYTES (768U << 10)

struct plan {
	uint64_t random;
	const char *leaf; /* options of the leaf but for size and block size */
	bool is_file;
	unsigned max_block_shift;

	uint64_t block_size, size; /* of the leaf */
	bool padded, delays;
	unsigned number; /* tells the disks of a case apart */
};

static void plan_stack(struct plan *plan, unsigned min_block_shift)
{
	uint64_t *random = &plan->random;
	unsigned shifts = plan->max_block_shift - min_block_shift + 1;

	plan->number++;
	plan->block_size = UINT64_C(1) << (min_block_shift + random_below(random, shifts));
	plan->size = plan->block_size *
		     (1 + random_below(random, SIZE_MAX_BYTES / 2 / plan->block_size));
	plan->padded = random_below(random, 2);
	plan->delays = random_below(random, 3) == 0;
}

/* Opened again, the disk has the size it had, whatever that is by now. */
static suspends struct blk *open_plan(const struct plan *plan, bool again)
{
	char size[64] = "";

	if (!again)
		snprintf(size, sizeof(size), " size=%llu%s", (unsigned long long)plan->size,
			plan->is_file ? " create=true" : "");
	return stack("%s%s%s%u block-size=%llu%s",
		plan->delays ? "fault delay-random-us=200 | " : "",
		plan->padded ? "padded align=4096 grow=true | " : "", plan->leaf, plan->number,
		(unsigned long long)plan->block_size, size);
}

/* --- many at a time ----------------------------------------------------------------------------- */

struct worker {
	struct model model; /* shares the bytes with the others */
	struct blk *blk;
	uint64_t start, end; /* the part of the disk that is this one's alone */
};

static suspends void work_once(struct worker *worker)
{
	struct model *model = &worker->model;
	uint64_t off = worker->start + random_below(&model->random, worker->end - worker->start);
	uint64_t len = 1 + random_below(&model->random, worker->end - off);
	unsigned flags = random_below(&model->random, 16) ? 0 : BLK_FUA;

	switch (random_below(&model->random, 8)) {
	case 0:
		ck_assert_int_eq(blk_discard(worker->blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 1:
		ck_assert_int_eq(blk_zero(worker->blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 2:
		ck_assert_int_eq(blk_flush(worker->blk), 0);
		break;
	case 3:
	case 4:
		model_read(model, worker->blk, off, len);
		break;
	default:
		model_write(model, worker->blk, off, len, flags);
	}
}

static suspends void work(void *arg)
{
	struct worker worker = *(struct worker *)arg;

	for (int i = 0; i < WORKER_STEPS; i++)
		work_once(&worker);
}

/* The parts meet at any byte, so neighbours share blocks. */
static suspends void work_together(struct model *model, struct blk *blk)
{
	struct co_group group;
	uint64_t start = 0;

	co_group_init(&group);
	for (unsigned i = 1; i <= WORKERS; i++) {
		struct worker worker = { *model, blk, start, model->size * i / WORKERS };

		worker.model.random = random_next(&model->random);
		if (worker.start < worker.end)
			co_group_start(&group, work, &worker);
		start = worker.end;
	}
	co_group_wait(&group);
}

/* --- a life of a disk --------------------------------------------------------------------------- */

static suspends void resize_somehow(struct plan *plan, struct model *model, struct blk *blk)
{
	uint64_t unit = plan->padded ? MAX(4096U, plan->block_size) : plan->block_size;

	model_resize(model, blk, unit * (1 + random_below(&model->random, SIZE_MAX_BYTES / unit)));
}

static suspends void live(struct plan *plan)
{
	struct model model;
	struct blk *blk = open_plan(plan, false);

	model_init(&model, blk_caps(blk)->size);
	model.random = random_next(&plan->random);
	for (int phase = 0; phase < 3; phase++) {
		model_run(&model, blk, STEPS);
		work_together(&model, blk);
		model_verify(&model, blk);
		model_verify_extents(&model, blk);
		resize_somehow(plan, &model, blk);
		model_verify(&model, blk);
		stack_close(blk);
		blk = open_plan(plan, true);
		model_verify(&model, blk);
	}
	stack_close(blk);
	free(model.bytes);
}

static suspends void live_often(const char *leaf, bool is_file, unsigned min_block_shift)
{
	struct plan plan = { unit_seed, leaf, is_file, 12 };

	for (int round = 0; round < ROUNDS; round++) {
		plan_stack(&plan, min_block_shift);
		printf("disk %u: block size %llu, size %llu%s%s\n", plan.number,
			(unsigned long long)plan.block_size, (unsigned long long)plan.size,
			plan.padded ? ", padded" : "", plan.delays ? ", delays" : "");
		fflush(stdout);
		live(&plan);
	}
}

static suspends void memory(void)
{
	live_often("memory name=disk", false, 0);
}

static suspends void file_buffered(void)
{
	live_often("file sync=none path=disk", true, 0);
}

static suspends void file_synced(void)
{
	live_often("file path=disk", true, 0);
}

static suspends void file_direct(void)
{
	live_often("file cache=direct sync=none path=disk", true, 12);
}

static suspends void file_on_tmpfs(void)
{
	char leaf[128], folder[] = "/dev/shm/blkstack-model.XXXXXX";

	ck_assert_ptr_nonnull(mkdtemp(folder));
	snprintf(leaf, sizeof(leaf), "file path=%s/disk", folder);
	live_often(leaf, true, 0);
	nftw(folder, unit_remove, 16, FTW_DEPTH | FTW_PHYS);
}

static const struct unit_case cases[] = {
	CASE(memory),
	CASE(file_buffered),
	CASE(file_synced),
	CASE(file_direct),
	CASE(file_on_tmpfs),
};

int main(void)
{
	return unit_main("blk_model", cases, ARRAY_LEN(cases));
}
