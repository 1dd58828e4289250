/*
 * file: stores the bytes in a regular file or on a block device.
 *
 * Reads and writes go through rt/io.h, which chooses the cheapest way that does not block; everything
 * else that may block (open, fstat, ftruncate, lseek, fsync) runs on the offload pool.
 *
 * Durability. The kernel reports a failed write-back once per open file, and may drop the data: a later
 * fdatasync() then succeeds although the data is gone. Therefore:
 * - flushes have an open file of their own (sync_fd), so that no write with RWF_DSYNC takes their report;
 * - flushes run one at a time, and those that arrived meanwhile share the next, so that none of two
 *   concurrent ones returns success because the other got the report;
 * - after a failed flush every later one, and every FUA request, fails with -EIO until the layer is opened
 *   again: nobody can tell which data would have to be written once more.
 *
 * Zeroes are made by fallocate(), on block devices too, where the kernel guarantees that a punched
 * range reads as zeroes (and refuses otherwise). What it refuses is emulated in blk.c.
 *
 * A file that somebody else truncates answers -EIO beyond its end; the rest stays usable.
 */
#include "blk/file.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/util.h"
#include "blk/layers.h"
#include "rt/reactor.h"

/* In memory a look at more than this takes longer than a hand-over: every page is visited. */
#define EXTENTS_INLINE_MAX_BYTES (16U << 20)

static struct file_layer *to_file(struct blk *blk)
{
	return container_of(blk, struct file_layer, blk);
}

static const char *const cache_names[] = { "buffered", "direct", NULL };
static const char *const sync_names[] = { "none", "os", "drive", NULL };

#define OPT(member) offsetof(struct file_layer, member)

static const struct opt file_options[] = {
	{ "path", OPT_STRING, OPT(path), .required = true,
		.help = "a regular file or a block device" },
	{ "read-only", OPT_BOOL, OPT(read_only), "false", .help = "open it for reading alone" },
	{ "cache", OPT_ENUM, OPT(cache), "buffered", .choices = cache_names,
		.help = "through the page cache, or direct I/O around it" },
	{ "sync", OPT_ENUM, OPT(sync), "os", .choices = sync_names,
		.help = "what a flush does: nothing; fdatasync, which empties the drive's cache "
			"too; the same and all metadata" },
	{ "lock", OPT_BOOL, OPT(lock), "true",
		.help = "refuse a file that another export, QEMU or the system has in use" },
	{ "create", OPT_BOOL, OPT(create), "false",
		.help = "create the file, sparse, when it does not exist" },
	{ "size", OPT_SIZE, OPT(create_size), .min = 1, .max = BLK_SIZE_MAX,
		.help = "of a file that is created" },
	{ "block-size", OPT_SIZE, OPT(block_size), .min = 1, .max = BLK_BLOCK_SIZE_MAX,
		.pow2 = true,
		.help = "the size must be a multiple of it; the smallest possible by default: 1 "
			"for "
			"a buffered file" },
	{ 0 },
};

static int file_check(const struct blk *blk, struct err *err)
{
	const struct file_layer *file = container_of(blk, struct file_layer, blk);

	if (file->create && !file->create_size)
		return err_set(err, EINVAL, "create = true needs a size");
	if (!file->create && file->create_size)
		return err_set(err, EINVAL,
			"size is for create = true: without it, the file's own size counts");
	if (file->create && file->read_only)
		return err_set(err, EINVAL, "create and read-only exclude each other");
	if (!file->block_size)
		return 0;
	return blk_check_size(blk->conf, file->create_size, file->block_size, err);
}

/* --- opening and closing ---------------------------------------------------------------------- */

struct open_job {
	struct file_layer *file;
	struct err *err;
	int result;
};

static void open_job(void *arg)
{
	struct open_job *job = arg;
	struct file_layer *file = job->file;
	bool direct = file->cache == FILE_CACHE_DIRECT;

	job->result = file_open_blocking(file, job->err);
	if (job->result)
		return;
	io_file_init(&file->io, file->fd, direct);
	if (file->sync_fd >= 0)
		io_file_init(&file->sync_io, file->sync_fd, false);
}

static suspends int file_open(struct blk *blk, struct err *err)
{
	struct file_layer *file = to_file(blk);
	struct open_job job = { .file = file, .err = err };

	file->fd = file->sync_fd = -1;
	co_mutex_init(&file->flushing);
	co_offload(open_job, &job);
	return job.result;
}

static void close_job(void *arg)
{
	file_close_blocking(arg);
}

static suspends void file_close(struct blk *blk)
{
	co_offload(close_job, to_file(blk));
}

/* --- data ------------------------------------------------------------------------------------- */

static suspends int file_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct file_layer *file = to_file(blk);
	ssize_t got = io_read(&file->io, buf, len, off);

	if (likely(got == (ssize_t)len))
		return 0;
	if (got < 0)
		return (int)got;
	file->truncated = true;
	return -EIO;
}

static suspends int file_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct file_layer *file = to_file(blk);
	int rwf_flags = 0;

	if (flags & BLK_FUA && file->sync != FILE_SYNC_NONE) {
		if (file->flush_failed)
			return -EIO;
		rwf_flags = file->sync == FILE_SYNC_DRIVE ? RWF_SYNC : RWF_DSYNC;
	}
	ssize_t put = io_write(&file->io, buf, len, off, rwf_flags);
	return put < 0 ? (int)put : 0;
}

struct fsync_job {
	int fd;
	int result;
};

static void fsync_job(void *arg)
{
	struct fsync_job *job = arg;

	job->result = fsync(job->fd) ? -errno : 0;
}

static suspends int flush_now(struct file_layer *file)
{
	if (file->sync == FILE_SYNC_OS)
		return io_fdatasync(&file->sync_io);

	struct fsync_job job = { .fd = file->sync_fd };
	co_offload(fsync_job, &job);
	return job.result;
}

static void flush_has_failed(struct file_layer *file, int result)
{
	file->flush_failed = true;
	blk_notice(&file->blk,
		"a flush of \"%s\" failed (%s), and what was lost is not known: no flush succeeds "
		"until it is opened anew. Restart the daemon, or remove the export and add it "
		"again",
		file->path, strerror(-result));
}

static suspends int file_flush(struct blk *blk)
{
	struct file_layer *file = to_file(blk);

	if (file->sync == FILE_SYNC_NONE || file->sync_fd < 0)
		return 0;

	/* The one under way may have begun before our writes: the next one will do, whoever runs it. */
	uint64_t wanted = file->flush_started + 1;
	int result = 0;

	co_mutex_lock(&file->flushing);
	if (file->flush_started < wanted && !file->flush_failed) {
		file->flush_started++;
		result = flush_now(file);
	}
	if (result)
		flush_has_failed(file, result);
	co_mutex_unlock(&file->flushing);
	return file->flush_failed ? -EIO : 0;
}

/* --- zero and discard ------------------------------------------------------------------------- */

/* fallocate() in a mode that *supported says is worth trying. */
static suspends int allocate(
	struct file_layer *file, int mode, bool *supported, uint64_t off, uint64_t len)
{
	if (!*supported)
		return -EOPNOTSUPP;
	int result = io_fallocate(&file->io, mode | FALLOC_FL_KEEP_SIZE, off, len);
	if (result == -EOPNOTSUPP)
		*supported = false;
	return result;
}

static suspends int file_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct file_layer *file = to_file(blk);
	/* On a device the kernel makes up for a missing command by writing: that is not fast. */
	bool try_zero_range = !(file->is_device && flags & BLK_FAST_ZERO);
	int result = -EOPNOTSUPP;

	if (!(flags & BLK_NO_HOLE))
		result = allocate(file, FALLOC_FL_PUNCH_HOLE, &file->can_punch, off, len);
	if (result == -EOPNOTSUPP && try_zero_range)
		result = allocate(file, FALLOC_FL_ZERO_RANGE, &file->can_zero_range, off, len);
	if (!result && flags & BLK_FUA)
		result = file_flush(blk);
	return result;
}

/* Punching gives the space back and leaves zeroes, which is all that a discard promises. */
static suspends int file_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return file_zero(blk, off, len, flags & BLK_FUA);
}

/* --- extents ---------------------------------------------------------------------------------- */

struct extents_job {
	int fd;
	uint64_t off, end;
	struct blk_extents *extents;
	bool unsupported;
};

static bool add_until(struct extents_job *job, uint64_t end, uint32_t flags)
{
	end = MIN(end, job->end);
	if (end <= job->off)
		return true;
	bool more = blk_extents_add(job->extents, end - job->off, flags);
	job->off = end;
	return more;
}

/*
 * Others may punch, write and truncate meanwhile: none of the answers is trusted to fit the one
 * before, and every round gets further. What lies beyond a file that shrank under us is not zero but
 * lost: it is called data, so that somebody reads it and learns of it.
 */
static void extents_job(void *arg)
{
	struct extents_job *job = arg;
	const uint32_t hole = BLK_EXTENT_HOLE | BLK_EXTENT_ZERO;

	while (job->off < job->end) {
		off_t data_off = lseek(job->fd, (off_t)job->off, SEEK_DATA);
		if (data_off < 0 && errno == ENXIO) {
			off_t file_end = lseek(job->fd, 0, SEEK_END);
			if (file_end < 0 || add_until(job, (uint64_t)file_end, hole))
				add_until(job, job->end, BLK_EXTENT_DATA);
			return;
		}
		if (data_off < 0) {
			job->unsupported = true;
			add_until(job, job->end, BLK_EXTENT_DATA);
			return;
		}
		if (!add_until(job, (uint64_t)data_off, hole))
			return;
		off_t hole_off = lseek(job->fd, data_off, SEEK_HOLE);
		uint64_t data_end = hole_off > data_off ? (uint64_t)hole_off : job->end;
		if (!add_until(job, data_end, BLK_EXTENT_DATA))
			return;
	}
}

static suspends int file_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct file_layer *file = to_file(blk);
	struct extents_job job = {
		.fd = file->fd,
		.off = off,
		.end = off + len,
		.extents = extents,
	};

	if (!file->can_seek)
		blk_extents_add(extents, len, BLK_EXTENT_DATA);
	else if (file->io.mode == IO_INLINE && len <= EXTENTS_INLINE_MAX_BYTES)
		extents_job(&job);
	else
		co_offload(extents_job, &job);
	if (job.unsupported)
		file->can_seek = false;
	return 0;
}

/* --- resize ----------------------------------------------------------------------------------- */

struct resize_job {
	struct file_layer *file;
	uint64_t size;
	struct err *err;
	int result;
};

static int resize_device(struct file_layer *file, uint64_t size, struct err *err)
{
	uint64_t device_size;
	int result = file_find_size(file->fd, true, &device_size);

	if (result)
		return err_sys(err, -result, "the size of \"%s\" cannot be read", file->path);
	if (device_size != size)
		return err_set(err, EINVAL,
			"\"%s\" is a block device of %llu bytes, not %llu: resize the device "
			"first, "
			"then to exactly its size",
			file->path, (unsigned long long)device_size, (unsigned long long)size);
	return 0;
}

static void resize_job(void *arg)
{
	struct resize_job *job = arg;
	struct file_layer *file = job->file;

	if (file->is_device)
		job->result = resize_device(file, job->size, job->err);
	else if (ftruncate(file->fd, (off_t)job->size))
		job->result = err_sys(job->err, errno, "\"%s\" cannot be resized to %llu bytes",
			file->path, (unsigned long long)job->size);
}

static suspends int file_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct file_layer *file = to_file(blk);
	struct resize_job job = { .file = file, .size = size, .err = err };

	co_offload(resize_job, &job);
	if (!job.result)
		blk_size_changed(blk, size);
	return job.result;
}

/* --- status ----------------------------------------------------------------------------------- */

static void file_status(struct blk *blk, json_t *object)
{
	static const char *const mode_names[] = {
		[IO_INLINE] = "inline", [IO_BUFFERED] = "buffered", [IO_DIRECT] = "direct"
	};
	struct file_layer *file = to_file(blk);
	struct statx now;

	json_object_set_new(object, "path", json_string(file->path));
	json_object_set_new(object, "kind", json_string(file->is_device ? "device" : "regular"));
	json_object_set_new(object, "cache", json_string(cache_names[file->cache]));
	json_object_set_new(object, "io", json_string(mode_names[file->io.mode]));
	json_object_set_new(object, "sync", json_string(sync_names[file->sync]));
	json_object_set_new(object, "lock", json_boolean(file->lock));
	json_object_set_new(object, "flush_failed", json_boolean(file->flush_failed));

	/* Does not ask a server across the network, so it does not wait. */
	if (!file->is_device && !statx(file->fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC,
					STATX_SIZE | STATX_BLOCKS, &now)) {
		json_object_set_new(
			object, "allocated_bytes", json_integer((json_int_t)now.stx_blocks * 512));
		if (now.stx_size < blk->caps.size)
			file->truncated = true;
	}
	json_object_set_new(object, "truncated", json_boolean(file->truncated));
}

const struct blk_ops file_ops = {
	.name = "file",
	.summary = "a regular file or a block device",
	.options = file_options,
	.struct_size = sizeof(struct file_layer),
	.is_leaf = true,
	.check = file_check,
	.open = file_open,
	.close = file_close,
	.read = file_read,
	.write = file_write,
	.flush = file_flush,
	.zero = file_zero,
	.discard = file_discard,
	.extents = file_extents,
	.resize = file_resize,
	.status = file_status,
};
