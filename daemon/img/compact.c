/*
 * blkstack-img compact: moves clusters down into the gaps of a qcow2 image and cuts the file behind the last one.
 */
#include <errno.h>
#include <stdio.h>

#include "base/units.h"
#include "blk/qcow/compact.h"
#include "daemon/img/commands.h"

struct watch_compact {
	struct qcow_compact job;
	struct img_progress progress;
};

static void on_progress(struct qcow_compact *job)
{
	struct watch_compact *watch = container_of(job, struct watch_compact, job);

	img_progress(&watch->progress, job->done, job->total);
}

static suspends enum img_exit run(struct img *img)
{
	struct watch_compact watch = { .job = { .progress = on_progress } };
	char before[UNITS_SIZE_TEXT_LEN], after[UNITS_SIZE_TEXT_LEN];
	struct blk *disk;
	int ret = img_open_disk(img, img->operands[0], IMG_QCOW2, false, &disk, NULL);

	if (ret)
		return IMG_FAILED;
	img_progress_init(&watch.progress, img, "compacting");
	ret = qcow_compact(disk, &watch.job, &img->err);
	img_progress_end(&watch.progress);
	stack_close(disk);
	if (ret) {
		img_wrap_path(img, img->operands[0]);
		return IMG_FAILED;
	}
	if (img->json)
		img_print_json(json_pack("{s:I, s:I, s:I}", "size-before",
			(json_int_t)watch.job.size_before, "size-after",
			(json_int_t)watch.job.size_after, "clusters-moved",
			(json_int_t)watch.job.moved));
	else if (!img->quiet)
		printf("from %s to %s, %llu clusters moved\n",
			units_format_size(watch.job.size_before, before),
			units_format_size(watch.job.size_after, after),
			(unsigned long long)watch.job.moved);
	return IMG_OK;
}

static const struct img_option options[] = {
	IMG_OPTION_ALLOW,
	{},
};

const struct img_command img_compact = {
	.name = "compact",
	.operands = "FILE",
	.summary = "make the file of a qcow2 image as short as it can be",
	.help = "Moves clusters into gaps that discards have left, and cuts the file. What "
		"snapshots share\n"
		"and what is compressed stays where it is. A crash harms nothing.\n",
	.operands_min = 1,
	.operands_max = 1,
	.options = options,
	.run = run,
};
