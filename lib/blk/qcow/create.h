/*
 * Writing a new, empty qcow2 image.
 */
#pragma once

#include "blk/blk.h"

enum qcow_prealloc {
	QCOW_PREALLOC_OFF,
	QCOW_PREALLOC_METADATA,
	QCOW_PREALLOC_FALLOC,
	QCOW_PREALLOC_FULL
};

struct qcow_create_options {
	uint64_t size;          /* of the disk, bytes; a multiple of 512 */
	uint32_t version;       /* 2 or 3 */
	uint32_t cluster_size;  /* bytes; a power of two, 512 to 2 MiB */
	uint32_t refcount_bits; /* a power of two, 1 to 64 */
	bool extended_l2, lazy_refcounts;
	uint32_t compression; /* enum qcow_compression */
	enum qcow_prealloc prealloc;
	const char *backing_name, *backing_format; /* NULL: none */
	const char *data_file_name;                /* NULL: guest data lies in the image */
	bool raw_data_file; /* the data file is a plain raw image at all times */
};

/* Fills in what qemu-img takes by default: version 3, 64 KiB clusters, 16-bit refcounts. */
void qcow_create_defaults(struct qcow_create_options *options, uint64_t size);

/* -EINVAL and a text for what cannot be, or not together; -EFBIG when the disk is too large for the clusters. */
int qcow_create_check(const struct qcow_create_options *options, struct err *err);

/*
 * Makes `file` an image: its old content is lost, its length is set to what the image needs (a block
 * device must be long enough). The header is written last, so a half-made image is none.
 * A data file is the caller's to create, with the disk's size. Everything is durable at return.
 */
suspends int qcow_create(
	struct blk *file, const struct qcow_create_options *options, struct err *err);

/* A header as the options say, its tables not placed yet; qcow_header_fini() it. -ENOMEM. */
struct qcow_header;
int qcow_create_header(const struct qcow_create_options *options, struct qcow_header *header);

/* The header, extensions and names of an image as its first cluster holds them; -ENOSPC: they do not fit. */
int qcow_header_build(const struct qcow_header *header, uint8_t *cluster, struct err *err);
