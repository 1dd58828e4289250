/*
 * Writing a whole image once, in guest order. See writer.h.
 *
 * Compressed data is packed: it goes on in the cluster where the last piece ended, and into the next one
 * when that follows it in the file. Each piece counts every cluster it touches once (format, "Compressed
 * Clusters Descriptor"), so with narrow refcounts a cluster may be full before its bytes are.
 */
#include "blk/qcow/writer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "base/cleanup.h"

#define BUF_SIZE       (UINT64_C(2) << 20) /* a cluster is no larger */
#define GROW_BYTES     (UINT64_C(64) << 20)
#define DEFLATE_WINDOW (-12) /* raw, 4 KiB: what the format prescribes */
#define DEFLATE_MEMORY 9

/* Room for count entries, in whole clusters, zeroed. */
static int reserve_l1(struct qcow_writer *writer, uint64_t count)
{
	uint64_t capacity = round_up(MAX(count, writer->l1_capacity * 2) * 8 + 8,
				    writer->cluster_size) /
			    8;
	uint64_t *l1;

	if (writer->l1 && count <= writer->l1_capacity)
		return 0;
	l1 = realloc(writer->l1, capacity * 8);
	if (!l1)
		return -ENOMEM;
	memset(l1 + writer->l1_capacity, 0, (capacity - writer->l1_capacity) * 8);
	writer->l1 = l1;
	writer->l1_capacity = capacity;
	return 0;
}

suspends int qcow_writer_init(struct qcow_writer *writer, struct blk *file,
	const struct qcow_create_options *options, struct err *err)
{
	int ret = qcow_create_check(options, err);

	memset(writer, 0, sizeof(*writer));
	if (ret)
		return ret;
	if (qcow_create_header(options, &writer->header))
		return err_set(err, ENOMEM, "no memory");
	writer->file = file;
	writer->cluster_size = options->cluster_size;
	writer->cluster_bits = writer->header.cluster_bits;
	writer->entry_words = options->extended_l2 ? 2 : 1;
	writer->l2_entries = options->cluster_size / 8 / writer->entry_words;
	writer->l1_index = UINT64_MAX;
	writer->end_index = 1;
	refs_init(&writer->refs, writer->header.refcount_order);
	if (reserve_l1(writer, writer->header.l1_entry_count))
		return err_set(err, ENOMEM, "no memory");
	writer->l2 = calloc(1, writer->cluster_size);
	writer->buf = malloc(BUF_SIZE);
	if (!writer->l2 || !writer->buf)
		return err_set(err, ENOMEM, "no memory");
	ret = refs_set(&writer->refs, 0, 1);
	if (!ret)
		ret = blk_zero(file, 0, MIN(blk_caps(file)->size, writer->cluster_size), 0);
	return ret ? err_sys(err, -ret, "cannot write the image") : 0;
}

void qcow_writer_fini(struct qcow_writer *writer)
{
	refs_fini(&writer->refs);
	qcow_header_fini(&writer->header);
	free(writer->l1);
	free(writer->l2);
	free(writer->buf);
}

/* --- the file --------------------------------------------------------------------------------- */

static suspends int flush_buf(struct qcow_writer *writer)
{
	uint64_t end = writer->buf_off + writer->buf_used;
	int ret = 0;

	if (!writer->buf_used)
		return 0;
	if (end > blk_caps(writer->file)->size) {
		ret = blk_resize(writer->file, round_up(end, GROW_BYTES), 0, NULL);
		if (end <= blk_caps(writer->file)->size)
			ret = 0;
	}
	if (!ret)
		ret = blk_write(writer->file, writer->buf_off, writer->buf, writer->buf_used, 0);
	writer->buf_used = 0;
	return ret;
}

static suspends int put_bytes(
	struct qcow_writer *writer, uint64_t host_off, const void *data, uint64_t len)
{
	if (host_off != writer->buf_off + writer->buf_used || writer->buf_used + len > BUF_SIZE) {
		int ret = flush_buf(writer);

		if (ret)
			return ret;
		writer->buf_off = host_off;
	}
	memcpy(writer->buf + writer->buf_used, data, len);
	writer->buf_used += len;
	return 0;
}

static suspends int put_words(
	struct qcow_writer *writer, uint64_t host_off, uint64_t *words, uint64_t count)
{
	int ret = 0;

	for (uint64_t i = 0; i < count; i++) {
		be64 field = be64_make(words[i]);

		memcpy(&words[i], &field, sizeof(field));
	}
	for (uint64_t at = 0; at < count * 8 && !ret; at += writer->cluster_size)
		ret = put_bytes(writer, host_off + at, (uint8_t *)words + at,
			MIN(count * 8 - at, writer->cluster_size));
	return ret;
}

/* count clusters at the end of the file, counted once. */
static int append_clusters(struct qcow_writer *writer, uint64_t count, uint64_t *host_off)
{
	int ret = 0;

	*host_off = writer->end_index << writer->cluster_bits;
	for (uint64_t i = 0; i < count && !ret; i++)
		ret = refs_set(&writer->refs, writer->end_index++, 1);
	return ret;
}

/* --- the mapping ------------------------------------------------------------------------------ */

static suspends int finish_l2(struct qcow_writer *writer)
{
	uint64_t host_off;
	int ret;

	if (!writer->l2_used)
		return 0;
	ret = append_clusters(writer, 1, &host_off);
	if (!ret)
		ret = put_words(writer, host_off, writer->l2, writer->cluster_size / 8);
	writer->l1[writer->l1_index] = host_off | QCOW_ENTRY_COPIED;
	memset(writer->l2, 0, writer->cluster_size);
	writer->l2_used = false;
	return ret;
}

static suspends int set_entry(
	struct qcow_writer *writer, uint64_t guest_off, uint64_t entry, uint64_t bitmap)
{
	uint64_t index = guest_off >> writer->cluster_bits;
	uint64_t l1_index = index / writer->l2_entries;
	uint64_t *words = &writer->l2[index % writer->l2_entries * writer->entry_words];
	int ret = reserve_l1(writer, l1_index + 1);

	if (!ret && l1_index != writer->l1_index)
		ret = finish_l2(writer);
	writer->l1_index = l1_index;
	writer->l2_used = true;
	words[0] = entry;
	if (writer->entry_words > 1)
		words[1] = bitmap;
	return ret;
}

suspends int qcow_writer_put(struct qcow_writer *writer, uint64_t guest_off, const void *cluster)
{
	uint64_t host_off;
	int ret = append_clusters(writer, 1, &host_off);

	if (!ret)
		ret = put_bytes(writer, host_off, cluster, writer->cluster_size);
	return ret ? ret : set_entry(writer, guest_off, host_off | QCOW_ENTRY_COPIED, UINT32_MAX);
}

/* --- compressed clusters ---------------------------------------------------------------------- */

/* Where a piece of len bytes goes: behind the last one if it can. */
static uint64_t place_compressed(const struct qcow_writer *writer, uint32_t len)
{
	uint64_t at = writer->compressed_at, first = at >> writer->cluster_bits;
	uint64_t last = (at + len - 1) >> writer->cluster_bits;

	if (at && refs_get(&writer->refs, first) < writer->refs.max &&
		(last == first || first + 1 == writer->end_index))
		return at;
	return writer->end_index << writer->cluster_bits;
}

suspends int qcow_writer_put_compressed(
	struct qcow_writer *writer, uint64_t guest_off, const void *data, uint32_t len)
{
	uint64_t at = place_compressed(writer, len), end = at + len;
	unsigned off_bits = 62 - (writer->cluster_bits - 8);
	uint64_t more_sectors = ((at & 511) + len - 1) >> 9;
	int ret = 0;

	if (end >> off_bits)
		return -EFBIG;
	for (uint64_t i = at >> writer->cluster_bits;
		i <= (end - 1) >> writer->cluster_bits && !ret; i++) {
		ret = refs_set(&writer->refs, i, refs_get(&writer->refs, i) + 1);
		writer->end_index = MAX(writer->end_index, i + 1);
	}
	if (!ret)
		ret = put_bytes(writer, at, data, len);
	writer->compressed_at = is_aligned(end, writer->cluster_size) ? 0 : end;
	return ret ? ret
		   : set_entry(writer, guest_off,
			     QCOW_ENTRY_COMPRESSED | more_sectors << off_bits | at, 0);
}

static uint32_t deflate_cluster(
	int level, const void *cluster, uint32_t cluster_size, void *out, uint32_t room)
{
	z_stream stream = { .next_in = (Bytef *)(uintptr_t)cluster,
		.avail_in = cluster_size,
		.next_out = out,
		.avail_out = room };

	if (deflateInit2(&stream, level ? level : Z_DEFAULT_COMPRESSION, Z_DEFLATED, DEFLATE_WINDOW,
		    DEFLATE_MEMORY, Z_DEFAULT_STRATEGY) != Z_OK)
		return 0;
	int ret = deflate(&stream, Z_FINISH);
	deflateEnd(&stream);
	return ret == Z_STREAM_END ? room - stream.avail_out : 0;
}

uint32_t qcow_compress(enum qcow_compression type, int level, const void *cluster,
	uint32_t cluster_size, void *out, uint32_t room)
{
	if (type == QCOW_COMPRESSION_ZLIB)
		return deflate_cluster(level, cluster, cluster_size, out, room);
	size_t len = ZSTD_compress(
		out, room, cluster, cluster_size, level ? level : ZSTD_CLEVEL_DEFAULT);
	return ZSTD_isError(len) ? 0 : (uint32_t)len;
}

/* --- the end ---------------------------------------------------------------------------------- */

int qcow_writer_set_size(struct qcow_writer *writer, uint64_t size, struct err *err)
{
	uint64_t span = writer->l2_entries * writer->cluster_size;
	uint64_t count = size / span + !!(size % span);

	if (count * 8 > QCOW_L1_LEN_MAX_BYTES)
		return err_set(err, EFBIG, "the disk is too large for clusters of %llu bytes",
			(unsigned long long)writer->cluster_size);
	if (reserve_l1(writer, count))
		return err_set(err, ENOMEM, "no memory");
	writer->header.size = size;
	writer->header.l1_entry_count = (uint32_t)count;
	return 0;
}

static suspends int put_l1(struct qcow_writer *writer)
{
	uint64_t len = (uint64_t)writer->header.l1_entry_count * 8;
	uint64_t count = (len >> writer->cluster_bits) + !!(len & (writer->cluster_size - 1));
	int ret;

	if (!count)
		return 0;
	ret = append_clusters(writer, count, &writer->header.l1_off);
	return ret ? ret
		   : put_words(writer, writer->header.l1_off, writer->l1,
			     count * writer->cluster_size / 8);
}

/* The blocks count themselves and the table, so how many there are is found by trying. */
static suspends int put_refcounts(struct qcow_writer *writer)
{
	uint64_t per_block = writer->cluster_size * 8 >> writer->header.refcount_order;
	uint64_t blocks = 0, tables = 0, before, blocks_off, table_off;
	CLEANUP(free) uint64_t *table = NULL;
	CLEANUP(free) uint8_t *block = calloc(1, writer->cluster_size);
	int ret;

	do {
		before = blocks + tables;
		blocks = (writer->end_index + before + per_block - 1) / per_block;
		tables = (blocks * 8 + writer->cluster_size - 1) / writer->cluster_size;
	} while (blocks + tables != before);
	if (tables * writer->cluster_size > QCOW_REFTABLE_LEN_MAX_BYTES)
		return -EFBIG;
	table = calloc(tables, writer->cluster_size);
	ret = table && block ? append_clusters(writer, blocks, &blocks_off) : -ENOMEM;
	if (!ret)
		ret = append_clusters(writer, tables, &table_off);
	for (uint64_t i = 0; i < blocks && !ret; i++) {
		for (uint64_t j = 0; j < per_block; j++)
			refcount_entry_put(block, writer->header.refcount_order, j,
				refs_get(&writer->refs, i * per_block + j));
		table[i] = blocks_off + (i << writer->cluster_bits);
		ret = put_bytes(writer, table[i], block, writer->cluster_size);
	}
	if (ret)
		return ret;
	writer->header.refcount_table_off = table_off;
	writer->header.refcount_table_clusters = (uint32_t)tables;
	return put_words(writer, table_off, table, tables * writer->cluster_size / 8);
}

static suspends int put_tables(struct qcow_writer *writer)
{
	struct blk *file = writer->file;
	int ret = finish_l2(writer);

	if (!ret)
		ret = put_l1(writer);
	if (!ret)
		ret = put_refcounts(writer);
	if (!ret)
		ret = flush_buf(writer);
	if (!ret && blk_caps(file)->size != writer->end_index << writer->cluster_bits)
		blk_resize(file, writer->end_index << writer->cluster_bits, BLK_FORCE, NULL);
	return ret ? ret : blk_flush(file);
}

suspends int qcow_writer_finish(struct qcow_writer *writer, struct err *err)
{
	CLEANUP(free) uint8_t *cluster = calloc(1, writer->cluster_size);
	int ret = cluster ? put_tables(writer) : -ENOMEM;

	if (!ret) {
		ret = qcow_header_build(&writer->header, cluster, err);
		if (ret)
			return ret;
		ret = blk_write(writer->file, 0, cluster, writer->cluster_size, 0);
	}
	if (!ret)
		ret = blk_flush(writer->file);
	return ret ? err_sys(err, -ret, "cannot write the image") : 0;
}
