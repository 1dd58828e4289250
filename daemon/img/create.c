/*
 * blkstack-img create: a new image.
 *
 * For a disk on top of a backing file the size may be left out: it is then taken from the backing file, which
 * is opened read-only in the format that was named. With a size only its beginning is looked at: it must be there.
 */
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "base/units.h"
#include "blk/qcow/create.h"
#include "daemon/img/commands.h"

static const struct img_option options[] = {
	{ 'f', "format", "FORMAT", "qcow2 (the default) or raw" },
	{ 0, "qcow-version", "N", "2 or 3 (the default)" },
	{ 0, "cluster-size", "SIZE", "512 to 2M (64K)" },
	{ 0, "refcount-bits", "N", "1, 2, 4, 8, 16, 32 or 64 (16)" },
	{ 0, "extended-l2", NULL, "subclusters: smaller first-touch writes, larger tables" },
	{ 0, "lazy-refcounts", NULL, "mark the image dirty while in use: repaired after a crash" },
	{ 0, "compression", "TYPE", "of compressed clusters: zlib (the default) or zstd" },
	{ 'p', "prealloc", "MODE", "off (the default), metadata, falloc or full" },
	{ 'B', "backing", "FILE", "what is not written shows this file" },
	{ 'F', "backing-format", "FORMAT", "of the backing file: raw or qcow2" },
	{ 0, "data-file", "FILE", "keep the disk's data in this raw file" },
	{ 0, "data-file-raw", NULL, "the data file is a plain raw image at all times" },
	{ 0, "unchecked", NULL, "do not look whether the backing file is there" },
	{ 0, "force", NULL, "overwrite FILE and the data file if they exist" },
	IMG_OPTION_ALLOW,
	{},
};

static bool get_numbers(struct img *img, struct qcow_create_options *create)
{
	uint64_t version = create->version, cluster_size = create->cluster_size;
	uint64_t refcount_bits = create->refcount_bits;

	if (!img_size_value(img, "qcow-version", &version) ||
		!img_size_value(img, "cluster-size", &cluster_size) ||
		!img_size_value(img, "refcount-bits", &refcount_bits))
		return false;
	create->version = (uint32_t)MIN(version, (uint64_t)UINT32_MAX);
	create->cluster_size = (uint32_t)MIN(cluster_size, (uint64_t)UINT32_MAX);
	create->refcount_bits = (uint32_t)MIN(refcount_bits, (uint64_t)UINT32_MAX);
	return true;
}

bool img_create_values(struct img *img, struct qcow_create_options *create)
{
	static const char *const compressions[] = { "zlib", "zstd", NULL };
	unsigned index;

	qcow_create_defaults(create, 0);
	if (!get_numbers(img, create))
		return false;
	create->extended_l2 = img_flag(img, "extended-l2");
	if (!img_flag(img, "compression"))
		return true;
	if (!img_choice(img, "compression", compressions, &index))
		return false;
	create->compression = index;
	return true;
}

static bool get_options(struct img *img, struct qcow_create_options *create)
{
	static const char *const preallocs[] = { "off", "metadata", "falloc", "full", NULL };
	static const char *const formats[] = { "raw", "qcow2", NULL };
	unsigned index;

	if (!img_create_values(img, create))
		return false;
	create->lazy_refcounts = img_flag(img, "lazy-refcounts");
	create->raw_data_file = img_flag(img, "data-file-raw");
	create->backing_name = img_value(img, "backing");
	create->backing_format = img_value(img, "backing-format");
	create->data_file_name = img_value(img, "data-file");
	if (img_flag(img, "prealloc")) {
		if (!img_choice(img, "prealloc", preallocs, &index))
			return false;
		create->prealloc = (enum qcow_prealloc)index;
	}
	return !create->backing_format || img_choice(img, "backing-format", formats, &index);
}

/* A relative name is meant relative to the new image's folder, as it will be when that is opened. */
static void resolve(const char *image, const char *name, char path[PATH_MAX])
{
	char copy[PATH_MAX];

	snprintf(copy, sizeof(copy), "%s", image);
	if (*name == '/')
		snprintf(path, PATH_MAX, "%s", name);
	else
		snprintf(path, PATH_MAX, "%s/%s", dirname(copy), name);
}

/* A name that leads nowhere, or to another format, would only show when the image is used. */
static suspends int look_at_backing(struct img *img, const char *path, int format)
{
	enum img_format found;
	struct blk *file;
	int ret = img_open_file(img, path, true, &file);

	if (!ret) {
		ret = img_probe(img, file, &found);
		stack_close(file);
		if (!ret && format == IMG_QCOW2 && found != IMG_QCOW2)
			ret = err_set(&img->err, EINVAL, "\"%s\" is not a qcow2 image", path);
	}
	return ret ? err_wrap(&img->err, "backing file (--unchecked takes it as it is)") : 0;
}

static suspends int size_of_backing(struct img *img, const char *path, int format, uint64_t *size)
{
	struct blk *backing;
	int ret = img_open_disk(img, path, format, true, &backing, NULL);

	if (ret)
		return err_wrap(&img->err, "cannot take the size from the backing file");
	*size = blk_caps(backing)->size;
	stack_close(backing);
	return 0;
}

/* The size: that of the command line, or the backing file's. */
static suspends int find_size(struct img *img, struct qcow_create_options *create)
{
	const char *size_text = img->operand_count > 1 ? img->operands[1] : NULL;
	char path[PATH_MAX];
	int format, ret = 0;

	if (!size_text && !create->backing_name)
		return err_set(&img->err, EINVAL, "the size is missing");
	if (size_text && units_parse_size(size_text, &create->size, &img->err) < 0)
		return -EINVAL;
	if (create->backing_name && !create->backing_format)
		return err_set(&img->err, EINVAL, "a backing file needs --backing-format");
	if (create->backing_name && !img_format_value(img, "backing-format", &format))
		return -EINVAL;
	if (create->backing_name) {
		resolve(img->operands[0], create->backing_name, path);
		if (!size_text)
			ret = size_of_backing(img, path, format, &create->size);
		else if (!img_flag(img, "unchecked"))
			ret = look_at_backing(img, path, format);
	}
	if (create->size > BLK_SIZE_MAX - 511)
		return err_set(&img->err, EFBIG, "the size %s is too large", size_text);
	create->size = round_up(create->size, 512);
	return ret;
}

static suspends int create_data_file(struct img *img, const struct qcow_create_options *create)
{
	char path[PATH_MAX];
	struct blk *data;
	int ret;

	if (!create->data_file_name)
		return 0;
	resolve(img->operands[0], create->data_file_name, path);
	ret = img_create_file(img, path, create->size, &data);
	if (ret)
		return ret;
	if (create->prealloc == QCOW_PREALLOC_FALLOC || create->prealloc == QCOW_PREALLOC_FULL)
		ret = blk_zero(data, 0, create->size, BLK_NO_HOLE);
	else
		ret = blk_discard(data, 0, blk_caps(data)->size, 0);
	stack_close(data);
	return ret ? err_sys(&img->err, -ret, "cannot prepare the data file") : 0;
}

static suspends int create_raw(struct img *img, const struct qcow_create_options *create)
{
	struct blk *file;
	int ret;

	if (!create->size)
		return err_set(&img->err, EINVAL, "a raw image needs a size");
	ret = img_create_file(img, img->operands[0], create->size, &file);
	if (ret)
		return ret;
	if (create->prealloc >= QCOW_PREALLOC_FALLOC)
		ret = blk_zero(file, 0, create->size, BLK_NO_HOLE);
	else
		ret = blk_discard(file, 0, blk_caps(file)->size, 0);
	if (!ret)
		ret = blk_flush(file);
	img->env.start_failed = ret;
	stack_close(file);
	return ret ? err_sys(&img->err, -ret, "cannot write the image") : 0;
}

static suspends int create_qcow(struct img *img, const struct qcow_create_options *create)
{
	struct blk *file;
	int ret = qcow_create_check(create, &img->err);

	if (!ret)
		ret = create_data_file(img, create);
	if (!ret)
		ret = img_create_file(img, img->operands[0], 0, &file);
	if (ret)
		return ret;
	ret = qcow_create(file, create, &img->err);
	img->env.start_failed = ret; /* a file that was made for this goes again */
	stack_close(file);
	return ret;
}

static suspends enum img_exit run(struct img *img)
{
	struct qcow_create_options create;
	char text[UNITS_SIZE_TEXT_LEN];
	int format, ret;

	if (!img_format_value(img, "format", &format) || !get_options(img, &create))
		return IMG_USAGE;
	ret = find_size(img, &create);
	if (!ret)
		ret = format == IMG_RAW ? create_raw(img, &create) : create_qcow(img, &create);
	if (ret) {
		img_wrap_path(img, img->operands[0]);
		return IMG_FAILED;
	}
	if (img->json)
		img_print_json(
			json_pack("{s:o, s:s, s:I}", "filename", img_json_text(img->operands[0]),
				"format", format == IMG_RAW ? "raw" : "qcow2", "virtual-size",
				(json_int_t)create.size));
	else if (!img->quiet)
		printf("\"%s\": a disk of %s\n", img->operands[0],
			units_format_size(create.size, text));
	return IMG_OK;
}

const struct img_command img_create = {
	.name = "create",
	.operands = "FILE [SIZE]",
	.summary = "make a new image",
	.help = "SIZE is like 10G; with --backing it may be left out: then it is the backing "
		"file's.\nA relative name of a backing or data file is relative to FILE's "
		"folder.\n",
	.operands_min = 1,
	.operands_max = 2,
	.options = options,
	.run = run,
};
