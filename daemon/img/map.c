/*
 * blkstack-img map, resize and sparsify: commands that are little more than one call of the library.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "daemon/img/commands.h"

#define EXTENTS   128
#define CHUNK     (UINT32_C(1) << 20)
#define GRAIN_MIN UINT32_C(4096) /* zeroes are searched in these units, or larger */

typedef unsigned long long ull;

static const struct img_option disk_options[] = {
	IMG_OPTION_FORMAT,
	IMG_OPTION_ALLOW,
	{},
};

/* --- map -------------------------------------------------------------------------------------- */

static const char *kind_of(uint32_t flags)
{
	if (flags & BLK_EXTENT_HOLE)
		return "hole";
	return flags & BLK_EXTENT_ZERO ? "zero" : "data";
}

/* Neighbours alike are shown as one, across calls too. */
struct map {
	json_t *array; /* NULL: print lines */
	uint64_t off, len;
	uint32_t flags;
};

static void show_extent(struct map *map)
{
	if (map->len && map->array)
		json_array_append_new(map->array,
			json_pack("{s:I, s:I, s:b, s:b}", "start", (json_int_t)map->off, "length",
				(json_int_t)map->len, "data", !(map->flags & BLK_EXTENT_HOLE),
				"zero", !!(map->flags & BLK_EXTENT_ZERO)));
	else if (map->len)
		printf("%20llu %20llu  %s\n", (ull)map->off, (ull)map->len, kind_of(map->flags));
	map->off += map->len;
	map->len = 0;
}

static suspends int show_map(struct blk *disk, struct map *map)
{
	uint64_t size = blk_caps(disk)->size;

	for (uint64_t off = 0; off < size;) {
		struct blk_extent list[EXTENTS];
		struct blk_extents extents;
		int ret;

		blk_extents_init(&extents, list, EXTENTS);
		ret = blk_extents(disk, off, size - off, &extents);
		if (ret)
			return ret;
		for (unsigned i = 0; i < extents.count; i++) {
			if (map->flags != list[i].flags)
				show_extent(map);
			map->flags = list[i].flags;
			map->len += list[i].len;
			off += list[i].len;
		}
	}
	show_extent(map);
	return 0;
}

static suspends enum img_exit run_map(struct img *img)
{
	struct map map = { .array = img->json ? json_array() : NULL };
	struct blk *disk;
	int format, ret;

	if (!img_format_value(img, "format", &format))
		return IMG_USAGE;
	ret = img_open_disk(img, img->operands[0], format, true, &disk, NULL);
	if (!ret) {
		if (!img->json)
			printf("%20s %20s  %s\n", "offset", "length", "kind");
		ret = show_map(disk, &map);
		if (ret)
			err_sys(&img->err, -ret, "cannot map \"%s\"", img->operands[0]);
		stack_close(disk);
	}
	if (!ret && img->json)
		img_print_json(json_incref(map.array));
	json_decref(map.array);
	return ret ? IMG_FAILED : IMG_OK;
}

const struct img_command img_map = {
	.name = "map",
	.operands = "FILE",
	.summary = "show where a disk has data",
	.help = "data: stored; zero: space of its own that reads as zeroes; hole: nothing stored, "
		"zeroes.\n"
		"With a backing file, what that has counts too.\n",
	.operands_min = 1,
	.operands_max = 1,
	.options = disk_options,
	.run = run_map,
};

/* --- resize ----------------------------------------------------------------------------------- */

static int parse_size(struct img *img, uint64_t old_size, uint64_t *size)
{
	const char *text = img->operands[1];
	uint64_t change;

	if (units_parse_size(text + (*text == '+' || *text == '-'), &change, &img->err) < 0)
		return -EINVAL;
	if (*text == '-' && change > old_size)
		return err_set(&img->err, EINVAL, "the disk has only %llu bytes", (ull)old_size);
	if (*text == '+' && add_overflows(old_size, change, &change))
		return err_set(&img->err, EFBIG, "the size is too large");
	*size = *text == '-' ? old_size - change : change;
	return 0;
}

static suspends int resize(struct img *img, struct blk *disk, uint64_t *size)
{
	int ret = parse_size(img, blk_caps(disk)->size, size);

	if (ret)
		return ret;
	if (*size < blk_caps(disk)->size && !img_flag(img, "shrink"))
		return err_set(&img->err, EINVAL,
			"the disk has %llu bytes; --shrink makes it smaller, what lies beyond is "
			"lost",
			(ull)blk_caps(disk)->size);
	return blk_resize(disk, *size, img_flag(img, "shrink") ? BLK_FORCE : 0, &img->err);
}

static suspends enum img_exit run_resize(struct img *img)
{
	char text[UNITS_SIZE_TEXT_LEN];
	struct blk *disk;
	uint64_t size = 0;
	int format, ret;

	if (!img_format_value(img, "format", &format))
		return IMG_USAGE;
	ret = img_open_disk(img, img->operands[0], format, false, &disk, NULL);
	if (ret)
		return IMG_FAILED;
	ret = resize(img, disk, &size);
	if (!ret)
		size = blk_caps(disk)->size;
	if (!ret && (ret = blk_flush(disk)))
		err_sys(&img->err, -ret, "cannot flush");
	stack_close(disk);
	if (ret) {
		img_wrap_path(img, img->operands[0]);
		return IMG_FAILED;
	}
	if (img->json)
		img_print_json(json_pack("{s:I}", "virtual-size", (json_int_t)size));
	else if (!img->quiet)
		printf("\"%s\": a disk of %s\n", img->operands[0], units_format_size(size, text));
	return IMG_OK;
}

static const struct img_option resize_options[] = {
	IMG_OPTION_FORMAT,
	{ 0, "shrink", NULL, "allow a smaller size: what lies beyond is lost" },
	IMG_OPTION_ALLOW,
	{},
};

const struct img_command img_resize = {
	.name = "resize",
	.operands = "FILE [+|-]SIZE",
	.summary = "make a disk larger or smaller",
	.help = "With a sign, SIZE is added or taken away. What is new reads as zeroes.\n",
	.operands_min = 2,
	.operands_max = 2,
	.options = resize_options,
	.run = run_resize,
};

/* --- sparsify --------------------------------------------------------------------------------- */

/* Discards the runs of whole grains in the chunk that are zero. */
static suspends int sparsify_chunk(struct blk *disk, uint64_t off, const uint8_t *data, size_t len,
	size_t grain, uint64_t *freed)
{
	int ret = 0;

	for (size_t at = 0, next, run = 0; at < len && !ret; at = next) {
		bool zero = img_is_zero(data + at, MIN(grain, len - at));

		next = at + MIN(grain, len - at);
		run = zero ? run + (next - at) : 0;
		/* A run ends here when the next grain is not zero, or there is none. */
		if (!zero || (next < len && img_is_zero(data + next, MIN(grain, len - next))))
			continue;
		ret = blk_discard(disk, off + next - run, run, 0);
		*freed += run;
		run = 0;
	}
	return ret;
}

static suspends int sparsify(struct img *img, struct blk *disk, uint64_t *freed)
{
	CLEANUP(free) uint8_t *data = malloc(CHUNK);
	uint64_t size = blk_caps(disk)->size;
	size_t grain = MAX(blk_caps(disk)->preferred_size, GRAIN_MIN);
	struct img_mapped mapped = { .disk = disk };
	struct img_progress progress;
	int ret = data ? 0 : -ENOMEM;

	img_progress_init(&progress, img, "looking for zeroes");
	for (uint64_t off = 0, end = 0; off < size && !ret; off = end) {
		ret = img_mapped_find(&mapped, off);
		off = mapped.start;
		if (ret || off >= size)
			break;
		end = MIN(mapped.end, off + CHUNK);
		ret = blk_read(disk, off, data, (size_t)(end - off));
		if (!ret)
			ret = sparsify_chunk(
				disk, off, data, (size_t)(end - off), MIN(grain, CHUNK), freed);
		img_progress(&progress, off, size);
	}
	if (!ret)
		ret = blk_flush(disk);
	img_progress_end(&progress);
	return ret ? err_sys(&img->err, -ret, "cannot sparsify") : 0;
}

static suspends enum img_exit run_sparsify(struct img *img)
{
	char text[UNITS_SIZE_TEXT_LEN];
	uint64_t freed = 0;
	struct blk *disk;
	int format, ret;

	if (!img_format_value(img, "format", &format))
		return IMG_USAGE;
	ret = img_open_disk(img, img->operands[0], format, false, &disk, NULL);
	if (!ret) {
		ret = sparsify(img, disk, &freed);
		stack_close(disk);
	}
	if (ret)
		return IMG_FAILED;
	if (img->json)
		img_print_json(json_pack("{s:I}", "discarded", (json_int_t)freed));
	else if (!img->quiet)
		printf("%s of zeroes discarded\n", units_format_size(freed, text));
	return IMG_OK;
}

const struct img_command img_sparsify = {
	.name = "sparsify",
	.operands = "FILE",
	.summary = "give back the space of zeroes",
	.help = "Reads what is stored and discards, in place, whatever is all zeroes.\n",
	.operands_min = 1,
	.operands_max = 1,
	.options = disk_options,
	.run = run_sparsify,
};
