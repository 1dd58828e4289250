/*
 * An image at rest: the file, its decoded header and the sizes that follow from it.
 *
 * For check, repair, snapshots and the offline tool, which look at a file nobody writes to meanwhile:
 * offline, or below a layer that is drained and has committed everything.
 */
#pragma once

#include "blk/qcow/qcow.h"

struct image {
	struct blk *file;
	const struct qcow_header *header;
	uint64_t file_size; /* bytes, when image_init() looked */
	uint64_t cluster_size;
	uint32_t cluster_bits;
	uint32_t entry_words;     /* 64-bit words per L2 entry: 1, or 2 with extended entries */
	uint32_t l2_entries;      /* per L2 table */
	uint64_t block_entries;   /* per refcount block */
	bool data_file;           /* guest data lies in another file: not counted here */
	uint64_t *refcount_table; /* host byte order */
	uint64_t refcount_table_count;
	uint8_t **blocks; /* refcount blocks read last, direct-mapped by their place in the table */
	uint64_t *block_index; /*   which one: its place, plus one */
	unsigned block_slots;
};

/* Loads the refcount table. header must outlive the image. */
suspends int image_init(
	struct image *image, struct blk *file, const struct qcow_header *header, struct err *err);
void image_fini(struct image *image);

/* What lies beyond the end of the file reads as zeroes. */
suspends int image_read(const struct image *image, uint64_t host_off, void *buf, uint64_t len);
/* Reads count 64-bit words into host byte order. */
suspends int image_read_words(
	const struct image *image, uint64_t host_off, uint64_t *words, uint64_t count);

/*
 * The refcount block at `index` of the refcount table, as it is on disk; NULL when there is none (all counts are 0).
 * Valid until the next call. -EIO also when the table's entry cannot be a block's offset.
 */
suspends int image_refcount_block(struct image *image, uint64_t index, const uint8_t **block);
/* The count on disk of host cluster `index`. */
suspends int image_refcount(struct image *image, uint64_t index, uint64_t *refcount);

static inline uint64_t image_clusters_for(const struct image *image, uint64_t len)
{
	return (len >> image->cluster_bits) + !!(len & (image->cluster_size - 1));
}

/* Host bytes that belong to a compressed cluster (format, "Compressed Clusters Descriptor"). */
void image_compressed_range(
	const struct image *image, uint64_t entry, uint64_t *host_off, uint64_t *len);

enum entry_kind {
	ENTRY_UNALLOCATED,
	ENTRY_ZERO_PLAIN,
	ENTRY_ZERO_ALLOCATED,
	ENTRY_NORMAL,
	ENTRY_COMPRESSED
};
enum entry_kind image_entry_kind(const struct image *image, uint64_t entry);

/* Bits that must be 0 (format, "L1 table entry", "Standard Cluster Descriptor", "Refcount table entry"). */
#define IMAGE_L1_RESERVED       UINT64_C(0x7f000000000001ff)
#define IMAGE_L2_RESERVED       UINT64_C(0x3f000000000001fe)
#define IMAGE_REFTABLE_RESERVED UINT64_C(0x00000000000001ff)
