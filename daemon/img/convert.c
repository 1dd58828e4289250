/*
 * blkstack-img convert: a copy of a disk in another image.
 *
 * Chunks of the source are read, looked at and compressed by several coroutines at a time (compression runs on the
 * offload pool), and written in the order of the disk. Holes of the source are skipped without being read, zeroes that
 * were read are not written: the copy is sparse. Raw input may come from a pipe.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "blk/qcow/live.h"
#include "blk/qcow/writer.h"
#include "daemon/img/commands.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#define CHUNK  (UINT32_C(2) << 20) /* a cluster is no larger */
#define WINDOW 6                   /* chunks under way */
#define SECTOR UINT64_C(512)
#define BLOCK  UINT64_C(4096) /* zeroes are left out of a raw copy in these units */

static const struct img_option options[] = {
	IMG_OPTION_FORMAT,
	{ 0, "snapshot", "NAME", "copy what SOURCE was then: a name or an id" },
	{ 'O', "to", "FORMAT", "of TARGET: qcow2 (the default) or raw" },
	{ 'c', "compress", NULL, "compress the clusters of a qcow2 TARGET" },
	{ 0, "level", "N", "of compression: 1 to 9 for zlib, 1 to 19 for zstd" },
	{ 0, "compression", "TYPE", "zlib (the default) or zstd" },
	{ 0, "cluster-size", "SIZE", "of a qcow2 TARGET, 512 to 2M (64K)" },
	{ 0, "refcount-bits", "N", "1, 2, 4, 8, 16, 32 or 64 (16)" },
	{ 0, "qcow-version", "N", "2 or 3 (the default)" },
	{ 0, "extended-l2", NULL, "subclusters" },
	{ 0, "force", NULL, "overwrite TARGET if it exists" },
	IMG_OPTION_ALLOW,
	{},
};

struct convert;

struct job {
	struct convert *convert;
	uint64_t off;
	size_t len;
	uint8_t *data, *packed; /* CHUNK each; packed pieces lie where their clusters do */
	uint32_t *packed_len;   /* per cluster; 0: not compressed */
	bool *zero;             /* per unit */
	int result;
	bool done;
	struct co_queue finished;
};

struct convert {
	struct img *img;
	struct blk *source; /* NULL: standard input */
	struct blk *target;
	struct img_mapped mapped; /* of the source */
	bool to_qcow, compress;
	int level;
	struct qcow_create_options create;
	struct qcow_writer writer;
	uint64_t size; /* of the disk; UINT64_MAX: not known yet */
	size_t unit;   /* bytes that are written or left out together */
	struct job jobs[WINDOW];
	struct img_progress progress;
};

/* --- one chunk -------------------------------------------------------------------------------- */

/* On the offload pool when compressing. */
static void look_at(void *arg)
{
	struct job *job = arg;
	const struct convert *convert = job->convert;
	size_t unit = convert->unit;

	for (size_t at = 0, i = 0; at < job->len; at += unit, i++) {
		job->zero[i] = img_is_zero(job->data + at, unit);
		job->packed_len[i] = 0;
		if (!job->zero[i] && convert->compress)
			job->packed_len[i] = qcow_compress(
				(enum qcow_compression)convert->create.compression, convert->level,
				job->data + at, (uint32_t)unit, job->packed + at,
				(uint32_t)unit - 1);
	}
}

static suspends void run_job(void *arg)
{
	struct job *job = arg;
	const struct convert *convert = job->convert;

	if (convert->source) {
		uint64_t size = blk_caps(convert->source)->size;
		uint64_t len = MIN((uint64_t)job->len, size - job->off);

		memset(job->data + len, 0, job->len - len);
		job->result = blk_read(convert->source, job->off, job->data, len);
	}
	if (!job->result && convert->compress)
		co_offload(look_at, job);
	else if (!job->result)
		look_at(job);
	job->done = true;
	co_queue_wake_all(&job->finished);
}

struct pipe_read {
	uint8_t *data;
	size_t len, got;
	int result;
};

static void read_pipe(void *arg)
{
	struct pipe_read *pipe = arg;

	while (pipe->got < pipe->len) {
		ssize_t got = read(STDIN_FILENO, pipe->data + pipe->got, pipe->len - pipe->got);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			pipe->result = -errno;
		if (got <= 0)
			return;
		pipe->got += (size_t)got;
	}
}

/* Standard input is read in order, by whoever starts the jobs. */
static suspends int fill_from_pipe(struct convert *convert, struct job *job)
{
	struct pipe_read pipe = { .data = job->data, .len = job->len };

	co_offload(read_pipe, &pipe);
	memset(job->data + pipe.got, 0, job->len - pipe.got);
	if (pipe.got < job->len)
		convert->size = round_up(job->off + pipe.got, SECTOR);
	return pipe.result;
}

/* --- writing ---------------------------------------------------------------------------------- */

static suspends int put_qcow(struct convert *convert, const struct job *job, size_t i)
{
	uint64_t off = job->off + i * convert->unit;
	const uint8_t *data = job->data + i * convert->unit;

	if (job->packed_len[i])
		return qcow_writer_put_compressed(
			&convert->writer, off, job->packed + i * convert->unit, job->packed_len[i]);
	return qcow_writer_put(&convert->writer, off, data);
}

/* Units from i on that are not zero go out as one. */
static suspends int put_raw(struct convert *convert, const struct job *job, size_t *i)
{
	size_t first = *i, units = job->len / convert->unit;
	uint64_t off = job->off + first * convert->unit, end, size;

	while (*i + 1 < units && !job->zero[*i + 1])
		++*i;
	end = MIN(job->off + (*i + 1) * convert->unit, convert->size);
	size = blk_caps(convert->target)->size;
	if (end > size && blk_resize(convert->target, end, 0, &convert->img->err) < 0 &&
		blk_caps(convert->target)->size < end)
		return -ENOSPC;
	return off >= end ? 0
			  : blk_write(convert->target, off, job->data + first * convert->unit,
				    end - off, 0);
}

static suspends int write_job(struct convert *convert, struct job *job)
{
	int ret;

	while (!job->done)
		co_queue_wait(&job->finished);
	ret = job->result;
	if (ret)
		return img_cannot_read(convert->img, "the source", job->off, ret);
	for (size_t i = 0; i < job->len / convert->unit && !ret; i++) {
		if (job->zero[i])
			continue;
		ret = convert->to_qcow ? put_qcow(convert, job, i) : put_raw(convert, job, &i);
	}
	if (ret)
		return err_sys(&convert->img->err, -ret, "cannot write the target");
	img_progress(&convert->progress, job->off + job->len, convert->size);
	return 0;
}

/* --- the course ------------------------------------------------------------------------------- */

/* The next chunk that may hold data, from off on; false at the end. */
static suspends bool next_chunk(struct convert *convert, uint64_t *off)
{
	if (*off >= convert->size)
		return false;
	if (convert->source && *off < blk_caps(convert->source)->size &&
		!img_mapped_find(&convert->mapped, *off))
		*off = MAX(*off, round_down(convert->mapped.start, CHUNK));
	return *off < convert->size;
}

static suspends int start_job(
	struct convert *convert, struct job *job, uint64_t off, struct co_group *group)
{
	int ret = 0;

	job->off = off;
	job->result = 0;
	job->done = false;
	job->len = CHUNK;
	if (!convert->source)
		ret = fill_from_pipe(convert, job);
	if (!ret)
		co_group_start(group, run_job, job);
	return ret ? err_sys(&convert->img->err, -ret, "cannot read standard input") : 0;
}

static suspends int copy(struct convert *convert)
{
	uint64_t started = 0, written = 0, off = 0;
	struct co_group group;
	bool more = true;
	int ret = 0;

	co_group_init(&group);
	while (!ret && (more || written < started)) {
		if (more && started - written < WINDOW && next_chunk(convert, &off)) {
			ret = start_job(convert, &convert->jobs[started % WINDOW], off, &group);
			started += !ret;
			off += CHUNK;
			continue;
		}
		more = more && started - written == WINDOW;
		if (written < started)
			ret = write_job(convert, &convert->jobs[written++ % WINDOW]);
	}
	co_group_wait(&group);
	return ret;
}

static int make_jobs(struct convert *convert)
{
	for (size_t i = 0; i < WINDOW; i++) {
		struct job *job = &convert->jobs[i];

		job->convert = convert;
		co_queue_init(&job->finished);
		job->data = malloc(CHUNK);
		job->packed = convert->compress ? malloc(CHUNK) : NULL;
		job->packed_len = calloc(CHUNK / convert->unit, sizeof(*job->packed_len));
		job->zero = calloc(CHUNK / convert->unit, sizeof(*job->zero));
		if (!job->data || !job->packed_len || !job->zero ||
			(convert->compress && !job->packed))
			return err_set(&convert->img->err, ENOMEM, "no memory");
	}
	return 0;
}

static void free_jobs(struct convert *convert)
{
	for (size_t i = 0; i < WINDOW; i++) {
		free(convert->jobs[i].data);
		free(convert->jobs[i].packed);
		free(convert->jobs[i].packed_len);
		free(convert->jobs[i].zero);
	}
}

static suspends int to_qcow(struct convert *convert)
{
	struct err *err = &convert->img->err;
	int ret = qcow_writer_init(&convert->writer, convert->target, &convert->create, err);

	if (!ret)
		ret = copy(convert);
	if (!ret)
		ret = qcow_writer_set_size(&convert->writer, convert->size, err);
	if (!ret)
		ret = qcow_writer_finish(&convert->writer, err);
	qcow_writer_fini(&convert->writer);
	return ret;
}

static suspends int to_raw(struct convert *convert)
{
	struct blk *target = convert->target;
	struct err *err = &convert->img->err;
	int ret = blk_discard(target, 0, blk_caps(target)->size, 0);

	ret = ret ? err_sys(err, -ret, "cannot empty the target") : copy(convert);
	if (!ret && blk_caps(target)->size < convert->size)
		ret = blk_resize(target, convert->size, 0, err);
	if (!ret) {
		ret = blk_flush(target);
		if (ret)
			err_sys(err, -ret, "cannot flush the target");
	}
	return ret;
}

static suspends int run_with_target(struct convert *convert)
{
	bool size_known = convert->source;
	int ret = make_jobs(convert);

	if (!ret)
		ret = img_create_file(convert->img, convert->img->operands[1],
			convert->to_qcow || !size_known ? 0 : convert->size, &convert->target);
	if (!ret) {
		img_progress_init(&convert->progress, convert->img, "converting");
		ret = convert->to_qcow ? to_qcow(convert) : to_raw(convert);
		img_progress_end(&convert->progress);
		convert->img->env.start_failed = ret;
		stack_close(convert->target);
	}
	free_jobs(convert);
	return ret;
}

/* --- the command ------------------------------------------------------------------------------ */

static bool get_options(struct img *img, struct convert *convert)
{
	uint64_t level = 0;
	uint64_t level_max;
	int to;

	if (!img_format_value(img, "to", &to) || !img_create_values(img, &convert->create) ||
		!img_size_value(img, "level", &level))
		return false;
	convert->to_qcow = to != IMG_RAW;
	convert->compress = img_flag(img, "compress");
	convert->level = (int)MIN(level, UINT64_C(100));
	level_max = convert->create.compression == QCOW_COMPRESSION_ZSTD ? 19 : 9;
	if (convert->compress && !convert->to_qcow)
		err_set(&img->err, EINVAL, "--compress needs a qcow2 target");
	else if (img_flag(img, "level") && (!level || level > level_max))
		err_set(&img->err, EINVAL, "--level %s is not one of 1 to %llu",
			img_value(img, "level"), (unsigned long long)level_max);
	else
		return true;
	return false;
}

static suspends int open_source(struct convert *convert, int format)
{
	struct img *img = convert->img;
	const char *path = img->operands[0], *snapshot = img_value(img, "snapshot");
	enum img_format found = IMG_RAW;
	int ret = 0;

	if (strcmp(path, "-") != 0)
		ret = img_open_disk(img, path, format, true, &convert->source, &found);
	else if (format == IMG_QCOW2)
		ret = err_set(&img->err, EINVAL, "only raw disks can be read from a pipe");
	if (ret || !snapshot)
		return ret;
	ret = found == IMG_QCOW2 ? qcow_live_show(convert->source, snapshot, &img->err)
				 : err_set(&img->err, EINVAL, "a raw disk has no snapshots");
	return ret ? img_wrap_path(img, path) : 0;
}

static suspends enum img_exit run(struct img *img)
{
	CLEANUP(free) struct convert *convert = calloc(1, sizeof(*convert));
	int format, ret;

	if (!convert || !img_format_value(img, "format", &format) || !get_options(img, convert))
		return IMG_USAGE;
	convert->img = img;
	convert->size = UINT64_MAX;
	ret = open_source(convert, format);
	if (!ret && !strcmp(img->operands[1], "-"))
		ret = err_set(&img->err, EINVAL,
			"a copy cannot be written to standard output: it is not made in one go; "
			"name a file, or \"./-\" for one of this name");
	if (!ret && convert->source)
		convert->size = round_up(blk_caps(convert->source)->size, SECTOR);
	convert->mapped.disk = convert->source;
	convert->create.size = convert->source ? convert->size : 0;
	if (!ret && convert->to_qcow)
		ret = qcow_create_check(&convert->create, &img->err);
	convert->unit = convert->to_qcow ? convert->create.cluster_size : BLOCK;
	if (!ret)
		ret = run_with_target(convert);
	stack_close(convert->source);
	if (!ret && img->json)
		img_print_json(
			json_pack("{s:o, s:s, s:I}", "filename", img_json_text(img->operands[1]),
				"format", convert->to_qcow ? "qcow2" : "raw", "virtual-size",
				(json_int_t)convert->size));
	return ret ? IMG_FAILED : IMG_OK;
}

const struct img_command img_convert = {
	.name = "convert",
	.operands = "SOURCE TARGET",
	.summary = "copy a disk into a new image",
	.help = "SOURCE - reads a raw disk from standard input; TARGET is a file. The copy is\n"
		"sparse, has no backing file and no snapshots.\n",
	.operands_min = 2,
	.operands_max = 2,
	.options = options,
	.run = run,
};
