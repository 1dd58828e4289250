/*
 * blkstack-img info: what an image is, without opening what it refers to unless asked to.
 *
 * The keys of --json are those of `qemu-img info`. With --backing-chain the images an image is based on
 * follow, under the same rules as everywhere: --allow-backing says where they may lie.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "blk/qcow/snapshot_table.h"
#include "daemon/img/commands.h"

#define CHAIN_MAX 256

static const struct img_option options[] = {
	IMG_OPTION_FORMAT,
	{ 0, "backing-chain", NULL, "also of the images it is based on" },
	IMG_OPTION_ALLOW,
	{},
};

/* --- gathering, as JSON ----------------------------------------------------------------------- */

static json_t *snapshot_json(const struct qcow_snapshot *snapshot)
{
	return json_pack("{s:o, s:o, s:I, s:I, s:I, s:I, s:I, s:I}", "id",
		img_json_text(snapshot->id), "name", img_json_text(snapshot->name), "vm-state-size",
		(json_int_t)snapshot->vm_state_len, "date-sec", (json_int_t)snapshot->time_s,
		"date-nsec", (json_int_t)snapshot->time_ns, "vm-clock-sec",
		(json_int_t)(snapshot->vm_clock_ns / 1000000000), "vm-clock-nsec",
		(json_int_t)(snapshot->vm_clock_ns % 1000000000), "disk-size",
		(json_int_t)snapshot->disk_size);
}

static suspends int add_snapshots(
	struct img *img, struct blk *file, const struct qcow_header *header, json_t *info)
{
	struct image image;
	struct qcow_snapshots list;
	json_t *array;
	int ret = image_init(&image, file, header, &img->err);

	if (ret)
		return ret;
	ret = qcow_snapshots_load(&image, &list, &img->err);
	image_fini(&image);
	if (ret)
		return ret;
	array = json_array();
	for (uint32_t i = 0; i < list.count; i++)
		json_array_append_new(array, snapshot_json(&list.items[i]));
	if (list.count)
		json_object_set(info, "snapshots", array);
	json_decref(array);
	qcow_snapshots_fini(&list);
	return 0;
}

static json_t *specific_json(const struct qcow_header *header)
{
	json_t *data = json_pack("{s:s, s:i}", "compat", header->version == 2 ? "0.10" : "1.1",
		"refcount-bits", 1 << header->refcount_order);

	json_object_set_new(data, "compression-type",
		json_string(header->compression == QCOW_COMPRESSION_ZSTD ? "zstd" : "zlib"));
	if (header->version >= 3) {
		json_object_set_new(data, "lazy-refcounts",
			json_boolean(header->compatible & QCOW_COMPAT_LAZY_REFCOUNTS));
		json_object_set_new(data, "corrupt",
			json_boolean(header->incompatible & QCOW_INCOMPAT_CORRUPT));
		json_object_set_new(data, "extended-l2",
			json_boolean(header->incompatible & QCOW_INCOMPAT_EXTENDED_L2));
	}
	if (header->incompatible & QCOW_INCOMPAT_DATA_FILE) {
		if (header->data_file_name)
			json_object_set_new(
				data, "data-file", img_json_text(header->data_file_name));
		json_object_set_new(data, "data-file-raw",
			json_boolean(header->autoclear & QCOW_AUTOCLEAR_RAW_DATA_FILE));
	}
	return json_pack("{s:s, s:o}", "type", "qcow2", "data", data);
}

static suspends int add_qcow(struct img *img, struct blk *file, json_t *info)
{
	struct qcow_header header;
	int ret = qcow_header_load(file, &header, &img->err);

	if (ret)
		return ret;
	json_object_set_new(info, "virtual-size", json_integer((json_int_t)header.size));
	json_object_set_new(info, "cluster-size", json_integer(INT64_C(1) << header.cluster_bits));
	json_object_set_new(
		info, "dirty-flag", json_boolean(header.incompatible & QCOW_INCOMPAT_DIRTY));
	if (header.backing_name)
		json_object_set_new(info, "backing-filename", img_json_text(header.backing_name));
	if (header.backing_format)
		json_object_set_new(
			info, "backing-filename-format", img_json_text(header.backing_format));
	if (header.bitmap_count)
		json_object_set_new(info, "bitmap-count", json_integer(header.bitmap_count));
	json_object_set_new(info, "format-specific", specific_json(&header));
	ret = add_snapshots(img, file, &header, info);
	qcow_header_fini(&header);
	return ret;
}

static suspends int gather(struct img *img, const char *path, int format, json_t **info)
{
	enum img_format found = (enum img_format)format;
	struct blk *file;
	struct stat st;
	int ret = img_open_file(img, path, true, &file);

	if (ret)
		return ret;
	*info = json_pack("{s:o}", "filename", img_json_text(path));
	if (!stat(path, &st))
		json_object_set_new(*info, "actual-size", json_integer(st.st_blocks * 512));
	if (format < 0)
		ret = img_probe(img, file, &found);
	json_object_set_new(*info, "format", json_string(found == IMG_QCOW2 ? "qcow2" : "raw"));
	if (!ret && found == IMG_QCOW2)
		ret = add_qcow(img, file, *info);
	else
		json_object_set_new(
			*info, "virtual-size", json_integer((json_int_t)blk_caps(file)->size));
	stack_close(file);
	if (ret)
		json_decref(take_ptr(*info));
	return ret;
}

/* --- printing --------------------------------------------------------------------------------- */

static void print_size(const json_t *info, const char *key, const char *label)
{
	const json_t *value = json_object_get(info, key);
	char text[UNITS_SIZE_TEXT_LEN];

	if (value)
		printf("%-18s %s (%lld bytes)\n", label,
			units_format_size((uint64_t)json_integer_value(value), text),
			(long long)json_integer_value(value));
}

static void print_value(const json_t *info, const char *key, const char *label)
{
	const json_t *value = json_object_get(info, key);
	char plain[1100];

	if (json_is_string(value))
		printf("%-18s %s\n", label,
			img_plain_text(json_string_value(value), plain, sizeof(plain)));
	else if (json_is_boolean(value))
		printf("%-18s %s\n", label, json_is_true(value) ? "yes" : "no");
	else if (value)
		printf("%-18s %lld\n", label, (long long)json_integer_value(value));
}

static void print_snapshots(const json_t *snapshots)
{
	size_t i;
	json_t *snapshot;

	json_array_foreach(snapshots, i, snapshot)
	{
		time_t when = (time_t)json_integer_value(json_object_get(snapshot, "date-sec"));
		char name[300], id[100], date[32], size[UNITS_SIZE_TEXT_LEN];
		struct tm tm;

		strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", localtime_r(&when, &tm));
		if (!i)
			printf("snapshots:\n  %-5s %-24s %-19s %s\n", "id", "name", "taken",
				"disk size");
		printf("  %-5s %-24s %-19s %s\n",
			img_plain_text(
				json_string_value(json_object_get(snapshot, "id")), id, sizeof(id)),
			img_plain_text(json_string_value(json_object_get(snapshot, "name")), name,
				sizeof(name)),
			date,
			units_format_size((uint64_t)json_integer_value(
						  json_object_get(snapshot, "disk-size")),
				size));
	}
}

static void print_info(const json_t *info)
{
	const json_t *data = json_object_get(json_object_get(info, "format-specific"), "data");

	print_value(info, "filename", "file:");
	print_value(info, "format", "format:");
	print_size(info, "virtual-size", "disk size:");
	print_size(info, "actual-size", "space used:");
	print_size(info, "cluster-size", "cluster size:");
	print_value(info, "backing-filename", "backing file:");
	print_value(info, "backing-filename-format", "backing format:");
	print_value(data, "compat", "compat:");
	print_value(data, "compression-type", "compression:");
	print_value(data, "refcount-bits", "refcount bits:");
	print_value(data, "lazy-refcounts", "lazy refcounts:");
	print_value(data, "extended-l2", "extended L2:");
	print_value(data, "data-file", "data file:");
	print_value(data, "data-file-raw", "data file raw:");
	print_value(info, "bitmap-count", "bitmaps:");
	print_value(info, "dirty-flag", "dirty:");
	print_value(data, "corrupt", "marked corrupt:");
	print_snapshots(json_object_get(info, "snapshots"));
}

/* --- the command ------------------------------------------------------------------------------ */

/* Of the image at path and, when wanted, of what it is based on. Frees path. */
static suspends int gather_chain(struct img *img, char *path, int format, json_t *chain)
{
	int depth = 0, ret = 0;

	while (path && !ret) {
		const char *name = NULL, *backing_format = NULL;
		char *next = NULL;
		json_t *info;

		ret = gather(img, path, format, &info);
		if (!ret) {
			json_array_append_new(chain, info);
			name = json_string_value(json_object_get(info, "backing-filename"));
			backing_format = json_string_value(
				json_object_get(info, "backing-filename-format"));
		}
		if (name && img_flag(img, "backing-chain")) {
			if (++depth > CHAIN_MAX)
				ret = err_set(
					&img->err, ELOOP, "the chain is longer than %d", CHAIN_MAX);
			else if (!backing_format)
				ret = err_set(&img->err, EINVAL,
					"the format of the backing file is not stated");
			else
				ret = img_resolve_backing(img, path, name, &next);
			format = backing_format && !strcmp(backing_format, "raw") ? IMG_RAW
										  : IMG_QCOW2;
		}
		if (ret)
			img_wrap_path(img, path);
		free(path);
		path = next;
	}
	free(path);
	return ret;
}

static suspends enum img_exit run(struct img *img)
{
	json_t *chain = json_array(), *info;
	size_t i;
	int format, ret;

	if (!img_format_value(img, "format", &format))
		return IMG_USAGE;
	ret = gather_chain(img, strdup(img->operands[0]), format, chain);
	if (!ret && img->json)
		img_print_json(json_incref(
			img_flag(img, "backing-chain") ? chain : json_array_get(chain, 0)));
	json_array_foreach(chain, i, info)
	{
		if (ret || img->json)
			break;
		if (i)
			putchar('\n');
		print_info(info);
	}
	json_decref(chain);
	return ret ? IMG_FAILED : IMG_OK;
}

suspends enum img_exit img_show_snapshots(struct img *img, const char *path)
{
	json_t *info, *snapshots;

	if (gather(img, path, IMG_QCOW2, &info)) {
		img_wrap_path(img, path);
		return IMG_FAILED;
	}
	snapshots = json_object_get(info, "snapshots");
	if (img->json)
		img_print_json(snapshots ? json_incref(snapshots) : json_array());
	else
		print_snapshots(snapshots);
	json_decref(info);
	return IMG_OK;
}

const struct img_command img_info = {
	.name = "info",
	.operands = "FILE",
	.summary = "show what an image is",
	.operands_min = 1,
	.operands_max = 1,
	.options = options,
	.run = run,
};
