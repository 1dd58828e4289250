/*
 * Writing a whole qcow2 image once, in guest order: what a conversion needs.
 *
 * Data clusters are appended as they come, plain or compressed; tables and counts follow, the header comes last, so
 * a conversion that fails leaves no image. Nothing is read back.
 */
#pragma once

#include "blk/qcow/create.h"
#include "blk/qcow/qcow.h"
#include "blk/qcow/refs.h"

struct qcow_writer {
	struct blk *file;
	struct qcow_header header;
	struct refs refs;
	uint64_t cluster_size;
	uint32_t cluster_bits, entry_words, l2_entries;
	uint64_t end_index;     /* clusters from here on are unused */
	uint64_t compressed_at; /* where compressed data goes on; 0: at the end */
	uint64_t *l1, *l2;      /* host byte order; the L2 table being filled */
	uint64_t l1_capacity;   /* entries there is memory for */
	uint64_t l1_index;      /*   whose; UINT64_MAX: none */
	bool l2_used;
	/* Writes that follow each other in the file are gathered. */
	uint8_t *buf;
	uint64_t buf_off, buf_used;
};

/* options: without backing, data file and preallocation. The file's old content is lost. */
suspends int qcow_writer_init(struct qcow_writer *writer, struct blk *file,
	const struct qcow_create_options *options, struct err *err);
/* The cluster at guest_off, which grows from call to call; what is left out reads as zeroes. */
suspends int qcow_writer_put(struct qcow_writer *writer, uint64_t guest_off, const void *cluster);
/* The same from compressed data shorter than a cluster. */
suspends int qcow_writer_put_compressed(
	struct qcow_writer *writer, uint64_t guest_off, const void *data, uint32_t len);
/* The disk's size, when it was not known at the start. */
int qcow_writer_set_size(struct qcow_writer *writer, uint64_t size, struct err *err);
/* Makes the image complete and durable. */
suspends int qcow_writer_finish(struct qcow_writer *writer, struct err *err);
void qcow_writer_fini(struct qcow_writer *writer);

/*
 * Compresses a cluster as the format wants it. Returns the length, at most room, or 0 when it does not fit. Any
 * thread.
 */
uint32_t qcow_compress(enum qcow_compression type, int level, const void *cluster,
	uint32_t cluster_size, void *out, uint32_t room);
