/*
 * The qcow2 header: reading and checking it, storing what changes.
 *
 * qcow_header_load() takes nothing on trust: one rule per `if`, the value in the message. It reads the
 * fixed part and then the rest of the first cluster, where extensions and the backing file's name live
 * (format, "Header extensions"). Everything it does not know and may ignore stays on disk as it is,
 * because storing only overwrites the fixed fields this program changes, in place.
 *
 * The fields that change together (size and L1; refcount table; snapshots) lie within the first 512
 * bytes, so storing them is one sector, which disks write whole.
 */
#include "blk/qcow/qcow.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"

/* --- decoding --------------------------------------------------------------------------------- */

static void decode_v2(const struct qcow_disk_header *disk, struct qcow_header *header)
{
	header->version = be32_get(disk->version);
	header->cluster_bits = be32_get(disk->cluster_bits);
	header->size = be64_get(disk->size);
	header->crypt_method = be32_get(disk->crypt_method);
	header->l1_entry_count = be32_get(disk->l1_entry_count);
	header->l1_off = be64_get(disk->l1_off);
	header->refcount_table_off = be64_get(disk->refcount_table_off);
	header->refcount_table_clusters = be32_get(disk->refcount_table_clusters);
	header->snapshot_count = be32_get(disk->snapshot_count);
	header->snapshots_off = be64_get(disk->snapshots_off);
	header->refcount_order = 4;
	header->header_len = QCOW_HEADER_LEN_V2;
}

static void decode_v3(const struct qcow_disk_header *disk, struct qcow_header *header)
{
	header->incompatible = be64_get(disk->incompatible);
	header->compatible = be64_get(disk->compatible);
	header->autoclear = be64_get(disk->autoclear);
	header->refcount_order = be32_get(disk->refcount_order);
	header->header_len = be32_get(disk->header_len);
	if (header->header_len > QCOW_HEADER_LEN_V3)
		header->compression = disk->compression;
}

/* --- checking --------------------------------------------------------------------------------- */

static int check_table(const struct qcow_header *header, const char *name, uint64_t off,
	uint64_t len, uint64_t file_size, struct err *err)
{
	if (!is_aligned(off, UINT64_C(1) << header->cluster_bits))
		return err_set(err, EINVAL, "%s at %llu is not aligned to a cluster", name,
			(unsigned long long)off);
	if (off >= QCOW_HOST_OFF_MAX || off >= file_size)
		return err_set(err, EINVAL, "%s at %llu lies beyond the end of the file (%llu)",
			name, (unsigned long long)off, (unsigned long long)file_size);
	if (!range_ok(off, len, file_size))
		return err_set(err, EINVAL,
			"%s of %llu bytes at %llu reaches beyond the end of the file (%llu)", name,
			(unsigned long long)len, (unsigned long long)off,
			(unsigned long long)file_size);
	if (!off)
		return err_set(err, EINVAL, "%s at 0 overlaps the header", name);
	return 0;
}

static int check_geometry(const struct qcow_header *header, struct err *err)
{
	bool extended = header->incompatible & QCOW_INCOMPAT_EXTENDED_L2;
	uint32_t bits_min = extended ? QCOW_EXTENDED_CLUSTER_BITS_MIN : QCOW_CLUSTER_BITS_MIN;

	if (header->cluster_bits < bits_min || header->cluster_bits > QCOW_CLUSTER_BITS_MAX)
		return err_set(err, EINVAL, "cluster bits %u out of range (%u to %u)%s",
			header->cluster_bits, bits_min, QCOW_CLUSTER_BITS_MAX,
			extended ? " with extended L2 entries" : "");
	if (header->refcount_order > 6)
		return err_set(err, EINVAL, "refcount order %u out of range (0 to 6)",
			header->refcount_order);
	if (header->crypt_method == 1)
		return err_set(err, ENOTSUP,
			"the image is encrypted (AES); decrypt it with qemu-img "
			"convert first");
	if (header->crypt_method == 2)
		return err_set(
			err, ENOTSUP, "the image is encrypted (LUKS), which is not supported");
	if (header->crypt_method)
		return err_set(err, ENOTSUP,
			"unknown encryption method %u (only 0, none, is supported)",
			header->crypt_method);
	if (header->size > BLK_SIZE_MAX)
		return err_set(err, EFBIG, "size %llu is larger than %llu",
			(unsigned long long)header->size, (unsigned long long)BLK_SIZE_MAX);
	if (header->version == 3 &&
		(header->header_len < QCOW_HEADER_LEN_V3 || header->header_len % 8 ||
			header->header_len > UINT32_C(1) << header->cluster_bits))
		return err_set(err, EINVAL,
			"header length %u is not valid: a multiple of 8, %u to %u",
			header->header_len, QCOW_HEADER_LEN_V3,
			UINT32_C(1) << header->cluster_bits);
	return 0;
}

static int check_compression(const struct qcow_header *header, struct err *err)
{
	bool flagged = header->incompatible & QCOW_INCOMPAT_COMPRESSION;

	if (header->compression > QCOW_COMPRESSION_ZSTD)
		return err_set(err, ENOTSUP, "unknown compression type %u (0 and 1 are known)",
			header->compression);
	if (flagged != (header->compression != QCOW_COMPRESSION_ZLIB))
		return err_set(err, EINVAL,
			"compression type %u does not match the compression feature bit",
			header->compression);
	return 0;
}

static int check_tables(const struct qcow_header *header, uint64_t file_size, struct err *err)
{
	uint64_t cluster_size = UINT64_C(1) << header->cluster_bits;
	uint32_t entry_size = header->incompatible & QCOW_INCOMPAT_EXTENDED_L2 ? 16 : 8;
	uint64_t l1_len = (uint64_t)header->l1_entry_count * 8;
	uint64_t covered_per_entry = cluster_size / entry_size * cluster_size;
	uint64_t entries_needed = header->size / covered_per_entry +
				  !!(header->size % covered_per_entry);
	uint64_t reftable_len = (uint64_t)header->refcount_table_clusters * cluster_size;
	int ret;

	if (l1_len > QCOW_L1_LEN_MAX_BYTES)
		return err_set(err, EFBIG, "l1 table of %u entries is too large: at most %u",
			header->l1_entry_count, QCOW_L1_LEN_MAX_BYTES / 8);
	if (header->l1_entry_count < entries_needed)
		return err_set(err, EINVAL,
			"l1 table of %u entries is too small: the size %llu needs at least %llu",
			header->l1_entry_count, (unsigned long long)header->size,
			(unsigned long long)entries_needed);
	if (header->l1_entry_count &&
		(ret = check_table(header, "l1 table", header->l1_off, l1_len, file_size, err)))
		return ret;
	if (!reftable_len || reftable_len > QCOW_REFTABLE_LEN_MAX_BYTES)
		return err_set(err, EINVAL, "refcount table of %u clusters is not valid: 1 to %llu",
			header->refcount_table_clusters,
			(unsigned long long)(QCOW_REFTABLE_LEN_MAX_BYTES / cluster_size));
	ret = check_table(
		header, "refcount table", header->refcount_table_off, reftable_len, file_size, err);
	if (ret)
		return ret;
	if (header->snapshot_count > QCOW_SNAPSHOTS_MAX)
		return err_set(err, EFBIG, "%u snapshots are too many: at most %u",
			header->snapshot_count, QCOW_SNAPSHOTS_MAX);
	if (header->snapshot_count)
		return check_table(header, "snapshot table", header->snapshots_off,
			sizeof(struct qcow_disk_snapshot) * (uint64_t)header->snapshot_count,
			file_size, err);
	return 0;
}

int qcow_header_check_disk(const struct qcow_header *header, uint64_t file_size, struct err *err)
{
	int ret = check_geometry(header, err);

	return ret ? ret : check_tables(header, file_size, err);
}

/* --- extensions ------------------------------------------------------------------------------- */

static char *dup_bytes(const uint8_t *bytes, size_t len)
{
	char *text = malloc(len + 1);

	if (text) {
		memcpy(text, bytes, len);
		text[len] = '\0';
	}
	return text;
}

/* A string from inside an image: no NUL in it, bounded, or it is refused. */
static int take_string(
	const char *what, const uint8_t *bytes, uint64_t len, char **text, struct err *err)
{
	if (len > QCOW_BACKING_NAME_MAX_BYTES || memchr(bytes, '\0', len))
		return err_set(err, EINVAL, "%s is not a valid string", what);
	free(*text);
	*text = dup_bytes(bytes, len);
	return *text ? 0 : err_set(err, ENOMEM, "no memory");
}

/* The bits this program does not know, by the names the image itself gives them. */
static int refuse_unknown_bits(
	uint64_t unknown, const uint8_t *table, uint64_t table_len, struct err *err)
{
	char names[256] = "";
	size_t used = 0;

	for (unsigned bit = 0; bit < 64; bit++) {
		const char *name = NULL;

		if (!(unknown >> bit & 1))
			continue;
		for (uint64_t i = 0; i + sizeof(struct qcow_disk_feature) <= table_len;
			i += sizeof(struct qcow_disk_feature)) {
			const struct qcow_disk_feature *feature = (const void *)(table + i);

			if (!feature->kind && feature->bit == bit)
				name = feature->name;
		}
		if (used < sizeof(names) - 1)
			used += (size_t)snprintf(names + used, sizeof(names) - used,
				"%s%.46s (bit %u)", used ? ", " : "",
				name && *name ? name : "unnamed", bit);
	}
	return err_set(err, ENOTSUP, "the image needs features that are not supported: %s", names);
}

struct extensions {
	const uint8_t *feature_table;
	uint64_t feature_table_len;
};

static int take_extension(struct qcow_header *header, struct extensions *found, uint32_t type,
	const uint8_t *data, uint32_t len, struct err *err)
{
	switch (type) {
	case QCOW_EXT_BACKING_FORMAT:
		return take_string("backing format", data, len, &header->backing_format, err);
	case QCOW_EXT_DATA_FILE:
		return take_string("data file name", data, len, &header->data_file_name, err);
	case QCOW_EXT_FEATURE_TABLE:
		found->feature_table = data;
		found->feature_table_len = len;
		return 0;
	case QCOW_EXT_BITMAPS: {
		const struct qcow_disk_bitmaps *bitmaps = (const void *)data;

		if (len < sizeof(*bitmaps))
			return err_set(
				err, EINVAL, "bitmaps extension of %u bytes is too short", len);
		header->bitmap_count = be32_get(bitmaps->bitmap_count);
		header->bitmap_directory_off = be64_get(bitmaps->directory_off);
		header->bitmap_directory_len = be64_get(bitmaps->directory_len);
		return 0;
	}
	default:
		return 0;
	}
}

static int parse_extensions(struct qcow_header *header, const uint8_t *cluster, uint64_t end,
	struct extensions *found, struct err *err)
{
	uint64_t at = header->header_len;

	while (at + sizeof(struct qcow_disk_extension) <= end) {
		const struct qcow_disk_extension *extension = (const void *)(cluster + at);
		uint32_t type = be32_get(extension->type), len = be32_get(extension->len);

		at += sizeof(*extension);
		if (type == QCOW_EXT_END)
			return 0;
		if (len > end - at)
			return err_set(err, EINVAL,
				"header extension %#x of %u bytes at %llu reaches beyond %llu",
				type, len, (unsigned long long)at, (unsigned long long)end);
		int ret = take_extension(header, found, type, cluster + at, len, err);
		if (ret)
			return ret;
		at += round_up(len, 8);
	}
	return 0;
}

/* Extensions and the backing name share the first cluster (format, "Header extensions"). */
static int parse_first_cluster(struct qcow_header *header, const struct qcow_disk_header *disk,
	const uint8_t *cluster, uint64_t len, struct err *err)
{
	uint64_t backing_off = be64_get(disk->backing_name_off), extensions_end = len;
	uint32_t backing_len = be32_get(disk->backing_name_len);
	struct extensions found = { 0 };
	int ret;

	if (backing_off) {
		if (backing_len > QCOW_BACKING_NAME_MAX_BYTES)
			return err_set(err, EINVAL,
				"backing file name of %u bytes is longer than %u", backing_len,
				QCOW_BACKING_NAME_MAX_BYTES);
		if (!range_ok(backing_off, backing_len, len))
			return err_set(err, EINVAL,
				"backing file name of %u bytes at %llu is not inside the first "
				"cluster",
				backing_len, (unsigned long long)backing_off);
		if (backing_len && (ret = take_string("backing file name", cluster + backing_off,
					    backing_len, &header->backing_name, err)))
			return ret;
		extensions_end = MIN(extensions_end, backing_off);
	}
	ret = parse_extensions(header, cluster, extensions_end, &found, err);
	if (ret)
		return ret;
	if (header->incompatible & ~(uint64_t)QCOW_INCOMPAT_KNOWN)
		return refuse_unknown_bits(header->incompatible & ~(uint64_t)QCOW_INCOMPAT_KNOWN,
			found.feature_table, found.feature_table_len, err);
	return 0;
}

/* --- the whole -------------------------------------------------------------------------------- */

static suspends int load(struct blk *file, struct qcow_header *header, struct err *err)
{
	struct qcow_disk_header disk = { 0 };
	uint64_t file_size = blk_caps(file)->size;
	int ret;

	if (file_size < QCOW_HEADER_LEN_V2)
		return err_set(err, EINVAL, "not a qcow2 image: the file has %llu bytes",
			(unsigned long long)file_size);
	ret = blk_read(file, 0, &disk, MIN(file_size, sizeof(disk)));
	if (ret)
		return err_sys(err, -ret, "cannot read the header");
	if (be32_get(disk.magic) != QCOW_MAGIC)
		return err_set(err, EINVAL, "not a qcow2 image: magic %#x instead of %#x",
			be32_get(disk.magic), QCOW_MAGIC);
	decode_v2(&disk, header);
	if (header->version != 2 && header->version != 3)
		return err_set(err, ENOTSUP, "qcow version %u is not supported (2 and 3 are)",
			header->version);
	if (header->version == 3) {
		if (file_size < QCOW_HEADER_LEN_V3)
			return err_set(err, EINVAL, "the file ends inside the header");
		decode_v3(&disk, header);
	}
	ret = check_geometry(header, err);
	if (ret)
		return ret;

	uint64_t len = MIN(file_size, UINT64_C(1) << header->cluster_bits);
	CLEANUP(free) uint8_t *cluster = malloc(len);
	if (!cluster)
		return err_set(err, ENOMEM, "no memory for the header");
	ret = blk_read(file, 0, cluster, len);
	if (ret)
		return err_sys(err, -ret, "cannot read the header");
	ret = parse_first_cluster(header, &disk, cluster, len, err);
	if (!ret)
		ret = check_compression(header, err);
	if (!ret)
		ret = check_tables(header, file_size, err);
	return ret;
}

suspends int qcow_header_load(struct blk *file, struct qcow_header *header, struct err *err)
{
	memset(header, 0, sizeof(*header));
	int ret = load(file, header, err);
	if (ret)
		qcow_header_fini(header);
	return ret;
}

void qcow_header_fini(struct qcow_header *header)
{
	free(take_ptr(header->backing_name));
	free(take_ptr(header->backing_format));
	free(take_ptr(header->data_file_name));
}

/* --- storing ---------------------------------------------------------------------------------- */

suspends int qcow_header_write(struct blk *file, const struct qcow_header *header)
{
	struct qcow_disk_header disk;
	size_t len = header->version == 3 ? QCOW_HEADER_LEN_V3 : QCOW_HEADER_LEN_V2;
	int ret = blk_read(file, 0, &disk, len);

	if (ret)
		return ret;
	disk.size = be64_make(header->size);
	disk.l1_entry_count = be32_make(header->l1_entry_count);
	disk.l1_off = be64_make(header->l1_off);
	disk.refcount_table_off = be64_make(header->refcount_table_off);
	disk.refcount_table_clusters = be32_make(header->refcount_table_clusters);
	disk.snapshot_count = be32_make(header->snapshot_count);
	disk.snapshots_off = be64_make(header->snapshots_off);
	disk.incompatible = be64_make(header->incompatible);
	disk.compatible = be64_make(header->compatible);
	disk.autoclear = be64_make(header->autoclear);
	return blk_write(file, 0, &disk, len, 0);
}

/* One at a time: of two under way at once, the older one could be what stays on disk. */
suspends int qcow_header_store(struct qcow *q)
{
	co_mutex_lock(&q->header_mutex);
	int ret = qcow_header_write(q->blk.below, &q->header);
	co_mutex_unlock(&q->header_mutex);
	return ret;
}

void qcow_header_take(struct qcow_header *to, const struct qcow_header *from)
{
	to->size = from->size;
	to->l1_off = from->l1_off;
	to->l1_entry_count = from->l1_entry_count;
	to->refcount_table_off = from->refcount_table_off;
	to->refcount_table_clusters = from->refcount_table_clusters;
	to->snapshots_off = from->snapshots_off;
	to->snapshot_count = from->snapshot_count;
}

suspends int qcow_header_restore(struct qcow *q)
{
	int ret = qcow_header_store(q);

	if (!ret)
		ret = blk_flush(q->blk.below);
	if (!ret)
		return 0;
	q->frozen = q->corrupt = true;
	snprintf(q->corrupt_text, sizeof(q->corrupt_text),
		"the header could not be stored: no more writes until the image is opened anew");
	log_debug("qcow: %s", q->corrupt_text);
	return ret;
}

suspends int qcow_header_switch(struct qcow *q, const struct qcow_header *old)
{
	int ret = qcow_header_store(q);

	if (!ret)
		ret = blk_flush(q->blk.below);
	if (ret) {
		qcow_header_take(&q->header, old);
		qcow_header_restore(q);
	}
	return ret;
}

/* An image may end anywhere; tables are written by whole sectors, up to the end of their cluster. */
static suspends int complete_last_cluster(struct qcow *q)
{
	uint64_t file_size = blk_caps(q->blk.below)->size;

	if (!q->below_grows || is_aligned(file_size, q->cluster_size))
		return 0;
	return blk_resize(q->blk.below, round_up(file_size, q->cluster_size), 0, NULL);
}

/* A data file that was cut short reads as zeroes from its end on; for writing it has the disk's length. */
static suspends int complete_data_file(struct qcow *q)
{
	const struct blk_caps *caps = blk_caps(q->data);

	if (!q->data_file || !caps->grows || caps->size >= q->header.size)
		return 0;
	return blk_resize(q->data, q->header.size, 0, NULL);
}

static suspends int begin_writing(struct qcow *q)
{
	uint64_t autoclear = q->header.autoclear & QCOW_AUTOCLEAR_RAW_DATA_FILE;
	uint64_t incompatible = q->header.incompatible;
	int ret = complete_last_cluster(q);

	if (!ret)
		ret = complete_data_file(q);
	if (ret)
		return ret;
	if (q->opt_lazy_refcounts)
		incompatible |= QCOW_INCOMPAT_DIRTY;
	if (autoclear != q->header.autoclear || incompatible != q->header.incompatible) {
		struct qcow_header old = q->header;

		q->header.autoclear = autoclear;
		q->header.incompatible = incompatible;
		ret = qcow_header_store(q);
		if (!ret)
			ret = blk_flush(q->blk.below);
		if (ret) {
			q->header.autoclear = old.autoclear;
			q->header.incompatible = old.incompatible;
			return ret;
		}
	}
	q->began_writing = true;
	return 0;
}

/* Nobody goes ahead before the bits are on disk, the second one to come as little as the first. */
suspends int qcow_begin_writing(struct qcow *q)
{
	int ret = 0;

	if (q->corrupt)
		return -EIO;
	if (likely(q->began_writing))
		return 0;
	co_mutex_lock(&q->beginning);
	if (!q->began_writing)
		ret = begin_writing(q);
	co_mutex_unlock(&q->beginning);
	return ret;
}

suspends int qcow_mark_corrupt(struct qcow *q, const char *fmt, ...)
{
	va_list ap;

	if (q->corrupt)
		return -EIO;
	q->corrupt = true;
	va_start(ap, fmt);
	vsnprintf(q->corrupt_text, sizeof(q->corrupt_text), fmt, ap);
	va_end(ap);
	log_debug("qcow: corrupt: %s", q->corrupt_text);
	/* Version 2 has no such bit; the layer refuses writes all the same. */
	if (!q->read_only && q->header.version == 3) {
		q->header.incompatible |= QCOW_INCOMPAT_CORRUPT;
		if (!qcow_header_store(q))
			blk_flush(q->blk.below);
	}
	return -EIO;
}
