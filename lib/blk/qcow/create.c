/*
 * Writing a new, empty qcow2 image.
 *
 * The whole layout is known before the first byte is written:
 *
 *	header | refcount table | refcount blocks | L1 table | L2 tables | data
 *
 * L2 tables and data exist only when preallocated. So the image is written once, from front to back,
 * everything counted once, and the header last, after a flush: an image half made is not an image.
 */
#include "blk/qcow/create.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "blk/qcow/qcow.h"
#include "blk/qcow/refs.h"

#define WRITE_MAX (UINT32_C(2) << 20) /* bytes per write; a cluster is no larger */

void qcow_create_defaults(struct qcow_create_options *options, uint64_t size)
{
	memset(options, 0, sizeof(*options));
	options->size = size;
	options->version = 3;
	options->cluster_size = 64 << 10;
	options->refcount_bits = 16;
}

/* --- checking --------------------------------------------------------------------------------- */

static int check_version(const struct qcow_create_options *options, struct err *err)
{
	const char *needs_3 = options->refcount_bits != 16 ? "a refcount width other than 16"
			      : options->extended_l2       ? "extended L2 entries"
			      : options->lazy_refcounts    ? "lazy refcounts"
			      : options->compression       ? "zstd compression"
			      : options->data_file_name    ? "a data file"
							   : NULL;

	if (options->version != 2 && options->version != 3)
		return err_set(
			err, EINVAL, "version %u is not known (2 and 3 are)", options->version);
	if (options->version == 2 && needs_3)
		return err_set(err, EINVAL, "%s needs version 3", needs_3);
	return 0;
}

static int check_names(const struct qcow_create_options *options, struct err *err)
{
	if (options->backing_name && !options->backing_format)
		return err_set(err, EINVAL, "a backing file needs its format named");
	if (options->backing_name && strlen(options->backing_name) > QCOW_BACKING_NAME_MAX_BYTES)
		return err_set(err, ENAMETOOLONG,
			"the backing file's name has %zu bytes, at most %d are allowed",
			strlen(options->backing_name), QCOW_BACKING_NAME_MAX_BYTES);
	if (options->data_file_name &&
		strlen(options->data_file_name) > QCOW_BACKING_NAME_MAX_BYTES)
		return err_set(err, ENAMETOOLONG,
			"the data file's name has %zu bytes, at most %d are allowed",
			strlen(options->data_file_name), QCOW_BACKING_NAME_MAX_BYTES);
	if (options->raw_data_file && !options->data_file_name)
		return err_set(err, EINVAL, "a raw data file needs a data file");
	if (options->raw_data_file && options->backing_name)
		return err_set(err, EINVAL,
			"a raw data file excludes a backing file: it would not be complete");
	if (options->backing_name && options->prealloc && !options->extended_l2)
		return err_set(err, EINVAL,
			"preallocation would hide the backing file, unless with extended L2 "
			"entries");
	return 0;
}

static uint32_t l2_entry_count(const struct qcow_create_options *options)
{
	return options->cluster_size / (options->extended_l2 ? 16 : 8);
}

static uint64_t l2_table_count(const struct qcow_create_options *options)
{
	uint64_t span = (uint64_t)l2_entry_count(options) * options->cluster_size;

	return options->size / span + !!(options->size % span);
}

int qcow_create_check(const struct qcow_create_options *options, struct err *err)
{
	char size_text[UNITS_SIZE_TEXT_LEN];
	int ret = check_version(options, err);

	if (ret)
		return ret;
	if (!is_pow2(options->cluster_size) ||
		options->cluster_size < 1U << QCOW_CLUSTER_BITS_MIN ||
		options->cluster_size > 1U << QCOW_CLUSTER_BITS_MAX)
		return err_set(err, EINVAL,
			"cluster size %u is not a power of two between 512 and 2M",
			options->cluster_size);
	if (options->extended_l2 && options->cluster_size < 1U << QCOW_EXTENDED_CLUSTER_BITS_MIN)
		return err_set(err, EINVAL, "extended L2 entries need clusters of at least 16K");
	if (!is_pow2(options->refcount_bits) || options->refcount_bits > 64)
		return err_set(err, EINVAL, "refcount width %u is not 1, 2, 4, 8, 16, 32 or 64",
			options->refcount_bits);
	if (options->size % 512 || options->size > BLK_SIZE_MAX)
		return err_set(err, EINVAL, "size %llu is not a multiple of 512, or too large",
			(unsigned long long)options->size);
	if (l2_table_count(options) * 8 > QCOW_L1_LEN_MAX_BYTES) {
		units_format_size((uint64_t)QCOW_L1_LEN_MAX_BYTES / 8 * l2_entry_count(options) *
					  options->cluster_size,
			size_text);
		return err_set(err, EFBIG,
			"the disk is too large for clusters of %u bytes: at most %s; choose "
			"larger clusters",
			options->cluster_size, size_text);
	}
	return check_names(options, err);
}

/* --- the header's cluster --------------------------------------------------------------------- */

static const struct {
	uint8_t kind, bit;
	char name[24];
} feature_names[] = {
	{ 0, 0, "dirty bit" },
	{ 0, 1, "corrupt bit" },
	{ 0, 2, "external data file" },
	{ 0, 3, "compression type" },
	{ 0, 4, "extended L2 entries" },
	{ 1, 0, "lazy refcounts" },
	{ 2, 0, "bitmaps" },
	{ 2, 1, "raw external data" },
};

static void fill_fixed(const struct qcow_header *header, struct qcow_disk_header *disk)
{
	disk->magic = be32_make(QCOW_MAGIC);
	disk->version = be32_make(header->version);
	disk->cluster_bits = be32_make(header->cluster_bits);
	disk->size = be64_make(header->size);
	disk->l1_entry_count = be32_make(header->l1_entry_count);
	disk->l1_off = be64_make(header->l1_off);
	disk->refcount_table_off = be64_make(header->refcount_table_off);
	disk->refcount_table_clusters = be32_make(header->refcount_table_clusters);
	disk->snapshot_count = be32_make(header->snapshot_count);
	disk->snapshots_off = be64_make(header->snapshots_off);
	if (header->version < 3)
		return;
	disk->incompatible = be64_make(header->incompatible);
	disk->compatible = be64_make(header->compatible);
	disk->autoclear = be64_make(header->autoclear);
	disk->refcount_order = be32_make(header->refcount_order);
	disk->header_len = be32_make(header->header_len);
	disk->compression = (uint8_t)header->compression;
}

struct extension_writer {
	uint8_t *cluster;
	size_t at, end;
	bool overflow;
};

static void put_extension(
	struct extension_writer *writer, uint32_t type, const void *data, size_t len)
{
	struct qcow_disk_extension head = { .type = be32_make(type),
		.len = be32_make((uint32_t)len) };
	size_t need = sizeof(head) + round_up(len, 8);

	if (writer->overflow || need > writer->end - writer->at) {
		writer->overflow = true;
		return;
	}
	memcpy(writer->cluster + writer->at, &head, sizeof(head));
	if (len)
		memcpy(writer->cluster + writer->at + sizeof(head), data, len);
	writer->at += need;
}

/* Names help other programs, but are the first to go where a cluster is small. */
static void put_feature_names(struct extension_writer *writer, size_t reserve)
{
	struct qcow_disk_feature features[ARRAY_LEN(feature_names)] = { 0 };

	if (writer->overflow ||
		writer->end - writer->at <
			reserve + sizeof(struct qcow_disk_extension) + sizeof(features))
		return;
	for (size_t i = 0; i < ARRAY_LEN(feature_names); i++) {
		features[i].kind = feature_names[i].kind;
		features[i].bit = feature_names[i].bit;
		memcpy(features[i].name, feature_names[i].name, sizeof(feature_names[i].name));
	}
	put_extension(writer, QCOW_EXT_FEATURE_TABLE, features, sizeof(features));
}

int qcow_header_build(const struct qcow_header *header, uint8_t *cluster, struct err *err)
{
	size_t name_len = header->backing_name ? strlen(header->backing_name) : 0;
	struct qcow_disk_header disk = { 0 };
	struct extension_writer writer = { .cluster = cluster,
		.at = header->header_len,
		.end = (size_t)1 << header->cluster_bits };

	memset(cluster, 0, writer.end);
	fill_fixed(header, &disk);
	if (header->backing_format)
		put_extension(&writer, QCOW_EXT_BACKING_FORMAT, header->backing_format,
			strlen(header->backing_format));
	if (header->data_file_name)
		put_extension(&writer, QCOW_EXT_DATA_FILE, header->data_file_name,
			strlen(header->data_file_name));
	if (header->version == 3)
		put_feature_names(&writer, sizeof(struct qcow_disk_extension) + name_len);
	put_extension(&writer, QCOW_EXT_END, NULL, 0);
	if (writer.overflow || name_len > writer.end - writer.at)
		return err_set(err, ENOSPC,
			"the names of the backing and data file do not fit into the header's "
			"cluster of %zu bytes",
			writer.end);
	if (name_len) {
		memcpy(cluster + writer.at, header->backing_name, name_len);
		disk.backing_name_off = be64_make(writer.at);
		disk.backing_name_len = be32_make((uint32_t)name_len);
	}
	memcpy(cluster, &disk, MIN(sizeof(disk), (size_t)header->header_len));
	return 0;
}

/* --- the layout ------------------------------------------------------------------------------- */

struct layout {
	uint64_t cluster_size;
	/* in clusters */
	uint64_t table_count, block_count, l1_count, l2_count, data_count;
	uint64_t total;
};

static uint64_t clusters_for(uint64_t len, uint64_t cluster_size)
{
	return len / cluster_size + !!(len % cluster_size);
}

static int plan(const struct qcow_create_options *options, struct layout *layout, struct err *err)
{
	uint64_t cluster_size = options->cluster_size;
	uint64_t block_entries = cluster_size * 8 / options->refcount_bits;
	bool prealloc = options->prealloc || options->raw_data_file;

	memset(layout, 0, sizeof(*layout));
	layout->cluster_size = cluster_size;
	layout->l1_count = clusters_for(l2_table_count(options) * 8, cluster_size);
	layout->l2_count = prealloc ? l2_table_count(options) : 0;
	if (prealloc && !options->data_file_name)
		layout->data_count = clusters_for(options->size, cluster_size);
	/* More clusters need more blocks, which are clusters: until it holds. */
	for (uint64_t before = 0;;) {
		layout->total = 1 + layout->table_count + layout->block_count + layout->l1_count +
				layout->l2_count + layout->data_count;
		if (layout->total == before)
			break;
		before = layout->total;
		layout->block_count = clusters_for(layout->total, block_entries);
		layout->table_count = clusters_for(layout->block_count * 8, cluster_size);
	}
	if (layout->table_count * cluster_size > QCOW_REFTABLE_LEN_MAX_BYTES)
		return err_set(err, EFBIG,
			"the disk is too large to be preallocated with clusters of %u bytes and "
			"refcounts of %u bits",
			options->cluster_size, options->refcount_bits);
	return 0;
}

int qcow_create_header(const struct qcow_create_options *options, struct qcow_header *header)
{
	memset(header, 0, sizeof(*header));
	header->version = options->version;
	header->cluster_bits = (uint32_t)__builtin_ctz(options->cluster_size);
	header->refcount_order = (uint32_t)__builtin_ctz(options->refcount_bits);
	header->header_len = options->version == 3 ? sizeof(struct qcow_disk_header)
						   : QCOW_HEADER_LEN_V2;
	header->compression = options->compression;
	header->size = options->size;
	header->l1_entry_count = (uint32_t)l2_table_count(options);
	header->incompatible = (options->data_file_name ? (uint64_t)QCOW_INCOMPAT_DATA_FILE : 0) |
			       (options->compression ? (uint64_t)QCOW_INCOMPAT_COMPRESSION : 0) |
			       (options->extended_l2 ? (uint64_t)QCOW_INCOMPAT_EXTENDED_L2 : 0);
	header->compatible = options->lazy_refcounts ? QCOW_COMPAT_LAZY_REFCOUNTS : 0;
	header->autoclear = options->raw_data_file ? QCOW_AUTOCLEAR_RAW_DATA_FILE : 0;
	header->backing_name = options->backing_name ? strdup(options->backing_name) : NULL;
	header->backing_format = options->backing_format ? strdup(options->backing_format) : NULL;
	header->data_file_name = options->data_file_name ? strdup(options->data_file_name) : NULL;
	if ((options->backing_name && !header->backing_name) ||
		(options->backing_format && !header->backing_format) ||
		(options->data_file_name && !header->data_file_name)) {
		qcow_header_fini(header);
		return -ENOMEM;
	}
	return 0;
}

static void place_tables(const struct layout *layout, struct qcow_header *header)
{
	header->refcount_table_off = layout->cluster_size;
	header->refcount_table_clusters = (uint32_t)layout->table_count;
	if (header->l1_entry_count)
		header->l1_off = (1 + layout->table_count + layout->block_count) *
				 layout->cluster_size;
}

/* --- writing from front to back --------------------------------------------------------------- */

struct appender {
	struct blk *file;
	uint8_t *buf; /* WRITE_MAX */
	size_t used;
	uint64_t host_off; /* of buf */
	int result;        /* the first error; nothing is written after it */
};

static suspends void append_flush(struct appender *appender)
{
	if (appender->used && !appender->result)
		appender->result = blk_write(
			appender->file, appender->host_off, appender->buf, appender->used, 0);
	appender->host_off += appender->used;
	appender->used = 0;
}

/* A cluster of zeroes to be filled in; valid until the next call. */
static suspends uint8_t *append_cluster(struct appender *appender, uint64_t cluster_size)
{
	if (appender->used + cluster_size > WRITE_MAX)
		append_flush(appender);
	uint8_t *cluster = appender->buf + appender->used;
	memset(cluster, 0, cluster_size);
	appender->used += cluster_size;
	return cluster;
}

static void put_entry(uint8_t *table, uint64_t index, uint64_t value)
{
	be64 field = be64_make(value);

	memcpy(table + index * 8, &field, sizeof(field));
}

/* A table of `count` consecutive pointers to consecutive clusters from first_off on. */
static suspends void append_pointers(struct appender *appender, const struct layout *layout,
	uint64_t table_clusters, uint64_t count, uint64_t first_off, uint64_t flags)
{
	uint64_t per_cluster = layout->cluster_size / 8, done = 0;

	for (uint64_t i = 0; i < table_clusters && !appender->result; i++) {
		uint8_t *table = append_cluster(appender, layout->cluster_size);

		for (uint64_t j = 0; j < per_cluster && done < count; j++, done++)
			put_entry(table, j, (first_off + done * layout->cluster_size) | flags);
	}
}

static suspends void append_refcounts(struct appender *appender, const struct layout *layout,
	const struct qcow_create_options *options)
{
	uint64_t per_block = layout->cluster_size * 8 / options->refcount_bits;
	uint32_t order = (uint32_t)__builtin_ctz(options->refcount_bits);

	for (uint64_t i = 0; i < layout->block_count && !appender->result; i++) {
		uint8_t *block = append_cluster(appender, layout->cluster_size);
		uint64_t left = MIN(per_block, layout->total - i * per_block);

		for (uint64_t j = 0; j < left; j++)
			refcount_entry_put(block, order, j, 1);
	}
}

static suspends void append_l2_tables(struct appender *appender, const struct layout *layout,
	const struct qcow_create_options *options, uint64_t data_off)
{
	uint64_t clusters = clusters_for(options->size, layout->cluster_size), done = 0;
	unsigned words = options->extended_l2 ? 2 : 1;

	for (uint64_t i = 0; i < layout->l2_count && !appender->result; i++) {
		uint8_t *table = append_cluster(appender, layout->cluster_size);

		for (uint64_t j = 0; j < l2_entry_count(options) && done < clusters; j++, done++) {
			put_entry(table, j * words,
				(data_off + done * layout->cluster_size) | QCOW_ENTRY_COPIED);
			/* With a backing file the space is there, but none of it is in use yet. */
			if (options->extended_l2 && !options->backing_name)
				put_entry(table, j * words + 1, UINT32_MAX);
		}
	}
}

static suspends int write_tables(struct blk *file, const struct layout *layout,
	const struct qcow_create_options *options, const struct qcow_header *header)
{
	CLEANUP(free) uint8_t *buf = malloc(WRITE_MAX);
	struct appender appender = { .file = file, .buf = buf, .host_off = layout->cluster_size };
	uint64_t blocks_off = (1 + layout->table_count) * layout->cluster_size;
	uint64_t l2_off = header->l1_off + layout->l1_count * layout->cluster_size;
	uint64_t data_off = l2_off + layout->l2_count * layout->cluster_size;

	if (!buf)
		return -ENOMEM;
	append_pointers(&appender, layout, layout->table_count, layout->block_count, blocks_off, 0);
	append_refcounts(&appender, layout, options);
	append_pointers(
		&appender, layout, layout->l1_count, layout->l2_count, l2_off, QCOW_ENTRY_COPIED);
	append_l2_tables(&appender, layout, options, options->data_file_name ? 0 : data_off);
	append_flush(&appender);
	return appender.result;
}

/* The data area: as long as the option says, reading as zeroes. */
static suspends int prepare_data(
	struct blk *file, const struct layout *layout, const struct qcow_create_options *options)
{
	uint64_t len = layout->data_count * layout->cluster_size;
	uint64_t host_off = layout->total * layout->cluster_size - len;

	if (!len)
		return 0;
	if (options->prealloc == QCOW_PREALLOC_FALLOC)
		return blk_zero(file, host_off, len, BLK_NO_HOLE);
	if (options->prealloc != QCOW_PREALLOC_FULL)
		return blk_zero(file, host_off, len, 0);

	CLEANUP(free) uint8_t *zeroes = calloc(1, WRITE_MAX);
	int ret = zeroes ? 0 : -ENOMEM;

	for (uint64_t at = 0; at < len && !ret; at += WRITE_MAX)
		ret = blk_write(file, host_off + at, zeroes, MIN(len - at, WRITE_MAX), 0);
	return ret;
}

static suspends int set_length(struct blk *file, uint64_t len, struct err *err)
{
	struct err resize_err;

	if (blk_caps(file)->size == len)
		return 0;
	int ret = blk_resize(file, len, BLK_FORCE, &resize_err);
	if (!ret || blk_caps(file)->size >= len)
		return 0;
	return err_set(err, -ret, "the image needs %llu bytes: %s", (unsigned long long)len,
		resize_err.text);
}

static suspends int write_image(struct blk *file, const struct layout *layout,
	const struct qcow_create_options *options, const struct qcow_header *header,
	struct err *err)
{
	CLEANUP(free) uint8_t *cluster = calloc(1, layout->cluster_size);
	int ret = cluster ? qcow_header_build(header, cluster, err)
			  : err_set(err, ENOMEM, "no memory");

	if (!ret)
		ret = set_length(file, layout->total * layout->cluster_size, err);
	if (ret)
		return ret;
	ret = blk_zero(file, 0, layout->cluster_size, 0); /* whatever image was there is gone */
	if (!ret)
		ret = write_tables(file, layout, options, header);
	if (!ret)
		ret = prepare_data(file, layout, options);
	if (!ret)
		ret = blk_flush(file);
	if (!ret)
		ret = blk_write(file, 0, cluster, layout->cluster_size, 0);
	if (!ret)
		ret = blk_flush(file);
	return ret ? err_sys(err, -ret, "cannot write the image") : 0;
}

suspends int qcow_create(
	struct blk *file, const struct qcow_create_options *options, struct err *err)
{
	struct layout layout;
	struct qcow_header header;
	int ret = qcow_create_check(options, err);

	if (!ret)
		ret = plan(options, &layout, err);
	if (ret)
		return ret;
	if (qcow_create_header(options, &header))
		return err_set(err, ENOMEM, "no memory");
	place_tables(&layout, &header);
	ret = write_image(file, &layout, options, &header, err);
	qcow_header_fini(&header);
	return ret;
}
