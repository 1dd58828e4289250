/*
 * An image at rest: reading its tables. See image.h.
 *
 * Offsets come from the image and may be anything: reads are clipped to the file, and what lies beyond it is
 * zeroes, so callers need to judge values but never ranges.
 */
#include "blk/qcow/image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "blk/qcow/refs.h"

#define BLOCK_CACHE_BYTES (UINT64_C(4) << 20)
#define BLOCK_SLOTS_MIN   UINT64_C(4)
#define BLOCK_SLOTS_MAX   UINT64_C(256)
#define HOST_READ_MAX     ((uint64_t)INT64_MAX) /* no file reaches further */

static suspends int load_refcount_table(struct image *image, struct err *err)
{
	uint64_t count = image->header->refcount_table_clusters * image->cluster_size / 8;

	image->refcount_table = malloc(count * 8);
	if (!image->refcount_table)
		return err_set(err, ENOMEM, "no memory for the refcount table");
	int ret = image_read_words(
		image, image->header->refcount_table_off, image->refcount_table, count);
	if (ret)
		return err_sys(err, -ret, "cannot read the refcount table");
	image->refcount_table_count = count;
	return 0;
}

suspends int image_init(
	struct image *image, struct blk *file, const struct qcow_header *header, struct err *err)
{
	bool extended = header->incompatible & QCOW_INCOMPAT_EXTENDED_L2;

	*image = (struct image){
		.file = file,
		.header = header,
		.file_size = blk_caps(file)->size,
		.cluster_size = UINT64_C(1) << header->cluster_bits,
		.cluster_bits = header->cluster_bits,
		.entry_words = extended ? 2 : 1,
		.data_file = header->incompatible & QCOW_INCOMPAT_DATA_FILE,
	};
	image->l2_entries = (uint32_t)(image->cluster_size / 8 / image->entry_words);
	image->block_entries = (image->cluster_size * 8) >> header->refcount_order;
	image->block_slots = (unsigned)MIN(
		MAX(BLOCK_CACHE_BYTES >> image->cluster_bits, BLOCK_SLOTS_MIN), BLOCK_SLOTS_MAX);
	image->blocks = calloc(image->block_slots, sizeof(*image->blocks));
	image->block_index = calloc(image->block_slots, sizeof(*image->block_index));
	int ret = image->blocks && image->block_index
			  ? load_refcount_table(image, err)
			  : err_set(err, ENOMEM, "no memory for refcount blocks");
	if (ret)
		image_fini(image);
	return ret;
}

void image_fini(struct image *image)
{
	for (unsigned i = 0; image->blocks && i < image->block_slots; i++)
		free(image->blocks[i]);
	free(take_ptr(image->blocks));
	free(take_ptr(image->block_index));
	free(take_ptr(image->refcount_table));
}

suspends int image_read(const struct image *image, uint64_t host_off, void *buf, uint64_t len)
{
	uint64_t in_file = host_off < image->file_size ? MIN(len, image->file_size - host_off) : 0;

	memset((uint8_t *)buf + in_file, 0, len - in_file);
	for (uint64_t at = 0; at < in_file; at += BLK_REQUEST_MAX) {
		int ret = blk_read(image->file, host_off + at, (uint8_t *)buf + at,
			MIN(in_file - at, BLK_REQUEST_MAX));

		if (ret)
			return ret;
	}
	return 0;
}

suspends int image_read_words(
	const struct image *image, uint64_t host_off, uint64_t *words, uint64_t count)
{
	int ret = image_read(image, host_off, words, count * 8);

	for (uint64_t i = 0; i < count && !ret; i++) {
		be64 field;

		memcpy(&field, &words[i], sizeof(field));
		words[i] = be64_get(field);
	}
	return ret;
}

suspends int image_refcount_block(struct image *image, uint64_t index, const uint8_t **block)
{
	unsigned slot = (unsigned)(index % image->block_slots);
	uint64_t host_off;

	*block = NULL;
	if (index >= image->refcount_table_count)
		return 0;
	host_off = image->refcount_table[index] & QCOW_REFTABLE_OFF_MASK;
	if (!host_off)
		return 0;
	if (!is_aligned(host_off, image->cluster_size) ||
		host_off > HOST_READ_MAX - image->cluster_size)
		return -EIO;
	if (image->block_index[slot] != index + 1) {
		if (!image->blocks[slot])
			image->blocks[slot] = malloc(image->cluster_size);
		if (!image->blocks[slot])
			return -ENOMEM;
		image->block_index[slot] = 0;
		int ret = image_read(image, host_off, image->blocks[slot], image->cluster_size);
		if (ret)
			return ret;
		image->block_index[slot] = index + 1;
	}
	*block = image->blocks[slot];
	return 0;
}

suspends int image_refcount(struct image *image, uint64_t index, uint64_t *refcount)
{
	const uint8_t *block;
	int ret = image_refcount_block(image, index / image->block_entries, &block);

	*refcount = 0;
	if (!ret && block)
		*refcount = refcount_entry_get(
			block, image->header->refcount_order, index % image->block_entries);
	return ret;
}

void image_compressed_range(
	const struct image *image, uint64_t entry, uint64_t *host_off, uint64_t *len)
{
	unsigned off_bits = 62 - (image->cluster_bits - 8);
	uint64_t sectors_mask = (UINT64_C(1) << (image->cluster_bits - 8)) - 1;
	uint64_t sectors = ((entry >> off_bits) & sectors_mask) + 1;

	*host_off = entry & ((UINT64_C(1) << off_bits) - 1);
	*len = sectors * 512 - (*host_off & 511);
}

enum entry_kind image_entry_kind(const struct image *image, uint64_t entry)
{
	bool has_host = entry & QCOW_ENTRY_OFF_MASK;

	if (entry & QCOW_ENTRY_COMPRESSED)
		return ENTRY_COMPRESSED;
	if (entry & QCOW_ENTRY_ZERO && image->entry_words == 1)
		return has_host ? ENTRY_ZERO_ALLOCATED : ENTRY_ZERO_PLAIN;
	if (has_host || (image->data_file && entry & QCOW_ENTRY_COPIED))
		return ENTRY_NORMAL;
	return ENTRY_UNALLOCATED;
}
