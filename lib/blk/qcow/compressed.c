/*
 * Compressed clusters: read only; a write replaces them by plain ones (data.c).
 *
 * Format, "Compressed Clusters Descriptor": the data starts at any byte and takes up to a number of
 * 512-byte sectors; decompression stops when it has made one cluster. zlib means raw deflate, made with a
 * window of 4 KiB; a larger one is accepted. zstd data is one or more frames.
 *
 * The cluster last inflated is kept, since small sequential reads come back to it. Inflating takes
 * longer than a request may hold up its reactor, so it is done by the offload pool.
 */
#include "blk/qcow/qcow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

struct inflated {
	struct co_mutex mutex;
	uint64_t host_off; /* 0: holds nothing */
	uint64_t generation;
	uint8_t *cluster, *packed;
};

struct inflate_job {
	struct qcow *q;
	struct inflated *inflated;
	uint32_t packed_len;
	int result;
};

static int inflate_zlib(struct inflate_job *job)
{
	z_stream stream = { .next_in = job->inflated->packed,
		.avail_in = job->packed_len,
		.next_out = job->inflated->cluster,
		.avail_out = (uInt)job->q->cluster_size };

	if (inflateInit2(&stream, -15) != Z_OK)
		return -ENOMEM;
	int ret = inflate(&stream, Z_FINISH);
	inflateEnd(&stream);
	/* What follows in the last sector may belong to another cluster: Z_BUF_ERROR when full is fine. */
	if (ret == Z_STREAM_END || (ret == Z_BUF_ERROR && !stream.avail_out))
		return stream.avail_out ? -EIO : 0;
	return -EIO;
}

static int inflate_zstd(struct inflate_job *job)
{
	ZSTD_inBuffer in = { .src = job->inflated->packed, .size = job->packed_len };
	ZSTD_outBuffer out = { .dst = job->inflated->cluster, .size = job->q->cluster_size };
	ZSTD_DCtx *context = ZSTD_createDCtx();
	int result = context ? 0 : -ENOMEM;

	while (!result && out.pos < out.size) {
		size_t in_before = in.pos, out_before = out.pos;
		size_t ret = ZSTD_decompressStream(context, &out, &in);

		if (ZSTD_isError(ret) || (in.pos == in_before && out.pos == out_before))
			result = -EIO;
	}
	ZSTD_freeDCtx(context);
	return result;
}

static void inflate_run(void *arg)
{
	struct inflate_job *job = arg;

	job->result = job->q->header.compression == QCOW_COMPRESSION_ZSTD ? inflate_zstd(job)
									  : inflate_zlib(job);
}

static struct inflated *get_inflated(struct qcow *q)
{
	if (q->inflated)
		return q->inflated;
	struct inflated *inflated = calloc(1, sizeof(*inflated));
	if (!inflated)
		return NULL;
	co_mutex_init(&inflated->mutex);
	inflated->cluster = malloc(q->cluster_size);
	inflated->packed = malloc(2 * q->cluster_size + 512);
	if (!inflated->cluster || !inflated->packed) {
		free(inflated->cluster);
		free(inflated->packed);
		free(inflated);
		return NULL;
	}
	return q->inflated = inflated;
}

static suspends int load_cluster(
	struct qcow *q, struct inflated *inflated, const struct l2_entry *entry)
{
	uint64_t generation = inflated->generation;
	struct inflate_job job = { .q = q,
		.inflated = inflated,
		.packed_len = (uint32_t)MIN(entry->compressed_len, 2 * q->cluster_size) };

	inflated->host_off = 0;
	int ret = qcow_read_host(q, entry->host_off, inflated->packed, job.packed_len);
	if (ret)
		return ret;
	co_offload(inflate_run, &job);
	if (!job.result && generation == inflated->generation)
		inflated->host_off = entry->host_off;
	return job.result;
}

suspends int qcow_read_compressed(struct qcow *q, const struct l2_entry *entry,
	uint64_t off_in_cluster, void *buf, size_t len)
{
	struct inflated *inflated = get_inflated(q);
	int ret = 0;

	if (!inflated)
		return -ENOMEM;
	co_mutex_lock(&inflated->mutex);
	if (inflated->host_off != entry->host_off)
		ret = load_cluster(q, inflated, entry);
	if (!ret)
		memcpy(buf, inflated->cluster + off_in_cluster, len);
	co_mutex_unlock(&inflated->mutex);
	return ret;
}

void qcow_inflated_forget(struct qcow *q)
{
	if (!q->inflated)
		return;
	q->inflated->host_off = 0;
	q->inflated->generation++;
}

void qcow_inflated_free(struct qcow *q)
{
	if (!q->inflated)
		return;
	free(q->inflated->cluster);
	free(q->inflated->packed);
	free(q->inflated);
	q->inflated = NULL;
}
