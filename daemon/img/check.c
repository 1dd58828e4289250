/*
 * blkstack-img check and repair: is an image sound, and make it so.
 *
 * check opens the image read-only and changes nothing. repair takes it for itself, and checks again when
 * it is done: what it reports is what is left. The keys of --json are those of `qemu-img check`.
 */
#include <errno.h>
#include <stdio.h>

#include "blk/qcow/check.h"
#include "daemon/img/commands.h"

#define FINDINGS_SHOWN 100 /* for people; --json has them all */

struct check_watch {
	struct qcow_check_watch watch;
	struct img_progress progress;
	const struct img *img;
	json_t *findings;
	unsigned shown;
};

static void on_finding(
	struct qcow_check_watch *qcow_watch, enum qcow_finding kind, const char *text)
{
	static const char *const names[] = { "corruption", "leak", "error" };
	struct check_watch *watch = container_of(qcow_watch, struct check_watch, watch);
	char plain[512];

	img_plain_text(text, plain, sizeof(plain));
	json_array_append_new(watch->findings,
		json_pack("{s:s, s:o}", "kind", names[kind], "text", img_json_text(plain)));
	if (watch->img->json || watch->img->quiet || watch->shown++ >= FINDINGS_SHOWN)
		return;
	img_progress_end(&watch->progress);
	printf("%s: %s\n", names[kind], plain);
	if (watch->shown == FINDINGS_SHOWN)
		puts("... and more, which are only counted");
}

static void on_progress(struct qcow_check_watch *qcow_watch, uint64_t done, uint64_t total)
{
	struct check_watch *watch = container_of(qcow_watch, struct check_watch, watch);

	img_progress(&watch->progress, done, total);
}

/* --- the answer ------------------------------------------------------------------------------- */

/* As qemu-img: counts that are 0 are left out, but for those of errors. */
static void add_count(json_t *object, const char *key, uint64_t count)
{
	if (count)
		json_object_set_new(object, key, json_integer((json_int_t)count));
}

static void print_json(
	const struct img *img, const struct qcow_check_result *result, json_t *findings)
{
	json_t *object = json_pack("{s:o, s:s, s:I}", "filename", img_json_text(img->operands[0]),
		"format", "qcow2", "check-errors", (json_int_t)result->errors);

	add_count(object, "image-end-offset", result->image_end_off);
	add_count(object, "corruptions", result->corruptions);
	add_count(object, "leaks", result->leaks);
	add_count(object, "corruptions-fixed", result->corruptions_fixed);
	add_count(object, "leaks-fixed", result->leaks_fixed);
	add_count(object, "total-clusters", result->total_clusters);
	add_count(object, "allocated-clusters", result->allocated_clusters);
	add_count(object, "fragmented-clusters", result->fragmented_clusters);
	add_count(object, "compressed-clusters", result->compressed_clusters);
	json_object_set(object, "findings", findings);
	img_print_json(object);
}

static double percent(uint64_t part, uint64_t whole)
{
	return whole ? (double)part * 100 / (double)whole : 0;
}

static void print_text(const struct qcow_check_result *result)
{
	typedef unsigned long long ull;

	if (result->corruptions_fixed || result->leaks_fixed)
		printf("repaired: %llu corruptions, %llu leaked clusters\n",
			(ull)result->corruptions_fixed, (ull)result->leaks_fixed);
	if (!result->corruptions && !result->leaks && !result->errors)
		puts("No errors were found on the image.");
	if (result->corruptions)
		printf("%llu corruptions: data may be wrong, and writing may destroy more\n",
			(ull)result->corruptions);
	if (result->leaks)
		printf("%llu leaked clusters: space is lost, data is safe\n", (ull)result->leaks);
	if (result->errors)
		printf("%llu errors: not everything could be checked\n", (ull)result->errors);
	printf("%llu/%llu clusters allocated (%.2f %%), %llu fragmented (%.2f %%), %llu "
	       "compressed\nimage end offset: %llu\n",
		(ull)result->allocated_clusters, (ull)result->total_clusters,
		percent(result->allocated_clusters, result->total_clusters),
		(ull)result->fragmented_clusters,
		percent(result->fragmented_clusters, result->allocated_clusters),
		(ull)result->compressed_clusters, (ull)result->image_end_off);
}

static enum img_exit status_of(struct img *img, const struct qcow_check_result *result)
{
	if (result->corruptions)
		return IMG_CORRUPT;
	if (result->errors) {
		err_set(&img->err, EIO, "the check is not complete: %llu errors",
			(unsigned long long)result->errors);
		return IMG_FAILED;
	}
	return result->leaks ? IMG_LEAKS : IMG_OK;
}

/* --- the commands ----------------------------------------------------------------------------- */

static suspends int work(struct img *img, struct blk *file, int repair, struct check_watch *watch,
	struct qcow_check_result *result)
{
	struct qcow_header header;
	int ret = qcow_header_load(file, &header, &img->err);

	if (ret)
		return ret;
	if (repair >= 0)
		ret = qcow_repair(
			file, &header, (enum qcow_repair)repair, &watch->watch, result, &img->err);
	else
		ret = qcow_check(file, &header, &watch->watch, result, &img->err);
	qcow_header_fini(&header);
	return ret;
}

static suspends enum img_exit run_on(struct img *img, int repair)
{
	struct check_watch watch = {
		.watch = { .finding = on_finding, .progress = on_progress },
		.img = img,
		.findings = json_array(),
	};
	struct qcow_check_result result;
	struct blk *file;
	enum img_exit status = IMG_FAILED;
	int ret = img_open_file(img, img->operands[0], repair < 0, &file);

	img_progress_init(&watch.progress, img, "checking");
	if (!ret) {
		ret = work(img, file, repair, &watch, &result);
		stack_close(file);
	}
	img_progress_end(&watch.progress);
	if (ret) {
		img_wrap_path(img, img->operands[0]);
	} else {
		status = status_of(img, &result);
		if (img->json)
			print_json(img, &result, watch.findings);
		else
			print_text(&result);
	}
	json_decref(watch.findings);
	return status;
}

static suspends enum img_exit run_check(struct img *img)
{
	return run_on(img, -1);
}

const struct img_command img_check = {
	.name = "check",
	.operands = "FILE",
	.summary = "look for errors in a qcow2 image, changing nothing",
	.operands_min = 1,
	.operands_max = 1,
	.run = run_check,
};

static const struct img_option repair_options[] = {
	{ 0, "leaks", NULL, "only give back leaked clusters; nothing if there are corruptions" },
	{},
};

static suspends enum img_exit run_repair(struct img *img)
{
	return run_on(img, img_flag(img, "leaks") ? QCOW_REPAIR_LEAKS : QCOW_REPAIR_ALL);
}

const struct img_command img_repair = {
	.name = "repair",
	.operands = "FILE",
	.summary = "check a qcow2 image and put right what can be",
	.help = "Counts references anew, frees leaked clusters, clears the dirty and corrupt marks "
		"of "
		"an\nimage that is sound then. What changes is written beside the old, so a crash "
		"harms nothing.\n",
	.operands_min = 1,
	.operands_max = 1,
	.options = repair_options,
	.run = run_repair,
};
