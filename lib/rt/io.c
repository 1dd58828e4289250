/*
 * File I/O for coroutines: which way each operation goes; see io.h.
 *
 * What can be had without waiting is taken at once by a plain system call, since a hand-over to
 * anybody costs more than most requests. Everything else becomes a struct io_request on the waiting
 * coroutine's stack and goes to the reactor's engine. Short counts are continued here, so engines need not.
 *
 * A buffered write only fills the page cache, and would cost less at once than by the engine. But it may wait:
 * for a page to be read when it covers only a part, for the kernel's share of dirty pages, for the
 * journal, for a disk that has died; no flag makes ext4 say so instead (RWF_NOWAIT is refused). A reactor
 * that waits takes all its exports with it, so buffered writes go by the engine.
 *
 * Failure modes: the system's error as it is; a write that makes no progress is EIO.
 */
#include "rt/io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/engine.h"

/* A larger fallocate() in memory takes so long (it clears pages) that the engine is the better place. */
#define FALLOCATE_INLINE_MAX_BYTES (1024 * 1024)

/*
 * Longer reads from memory are shared among the engine's threads: four of 1 MiB at once take 0.7 of the
 * time, one alone takes 1.15. Shorter ones are slower for the hand-over unless there are many.
 */
#define READ_INLINE_MAX_BYTES (512 * 1024)

/* Direct reads end at the end of the file when they end between sectors. */
#define SECTOR_SIZE_BYTES 512

static bool is_in_memory(int fd)
{
	struct stat status;
	struct statfs fs;

	/* A device's node lies on a tmpfs too, its content does not. */
	return !fstat(fd, &status) && S_ISREG(status.st_mode) && !fstatfs(fd, &fs) &&
	       (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

static bool knows_nowait(int fd)
{
	char byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };

	return preadv2(fd, &iov, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN;
}

void io_file_init(struct io_file *file, int fd, bool direct)
{
	*file = (struct io_file){ .fd = fd };
	if (is_in_memory(fd))
		file->mode = IO_INLINE;
	else
		file->mode = direct ? IO_DIRECT : IO_BUFFERED;
	file->nowait = file->mode == IO_BUFFERED && knows_nowait(fd);
}

/* --- the two ways ----------------------------------------------------------------------------- */

/* One system call in this thread. */
static ssize_t transfer_inline(
	enum io_op op, int fd, void *buf, size_t len_bytes, uint64_t off, int rwf_flags)
{
	struct iovec iov = { .iov_base = buf, .iov_len = len_bytes };
	ssize_t count;

	do {
		if (!rwf_flags) /* cheaper without a vector */
			count = op == IO_OP_READ ? pread(fd, buf, len_bytes, (off_t)off)
						 : pwrite(fd, buf, len_bytes, (off_t)off);
		else
			count = op == IO_OP_READ ? preadv2(fd, &iov, 1, (off_t)off, rwf_flags)
						 : pwritev2(fd, &iov, 1, (off_t)off, rwf_flags);
	} while (count < 0 && errno == EINTR);
	return count < 0 ? -errno : count;
}

/* Hands the request to the engine, once, and waits for its result. */
static suspends int64_t request_run(struct io_request *request)
{
	struct engine *engine = reactor_engine();

	request->reactor = reactor_self();
	request->waiter = co_self();
	do {
		engine->ops->submit(engine, request);
		co_suspend_outside();
	} while (request->result == -EINTR);
	return request->result;
}

static suspends int64_t transfer_by_engine(
	enum io_op op, int fd, void *buf, size_t len_bytes, uint64_t off, int rwf_flags)
{
	struct io_request request = {
		.op = op,
		.fd = fd,
		.flags = rwf_flags,
		.buf = buf,
		.len_bytes = len_bytes,
		.off = off,
	};

	return request_run(&request);
}

/* --- reading and writing ---------------------------------------------------------------------- */

suspends ssize_t io_read(struct io_file *file, void *buf, size_t len_bytes, uint64_t off)
{
	bool at_once = file->nowait ||
		       (file->mode == IO_INLINE && len_bytes <= READ_INLINE_MAX_BYTES);
	int nowait = file->nowait ? RWF_NOWAIT : 0;
	size_t done_bytes = 0;

	while (done_bytes < len_bytes) {
		void *rest = (char *)buf + done_bytes;
		size_t rest_bytes = len_bytes - done_bytes;
		int64_t count;

		if (at_once)
			count = transfer_inline(
				IO_OP_READ, file->fd, rest, rest_bytes, off + done_bytes, nowait);
		else
			count = transfer_by_engine(
				IO_OP_READ, file->fd, rest, rest_bytes, off + done_bytes, 0);
		if (count == -EAGAIN && at_once && nowait) {
			at_once = false;
			continue;
		}
		if (count < 0)
			return count;
		done_bytes += (size_t)count;
		if (!count || (file->mode == IO_DIRECT &&
				      !is_aligned((uint64_t)count, SECTOR_SIZE_BYTES)))
			break;
	}
	return (ssize_t)done_bytes;
}

suspends ssize_t io_write(
	struct io_file *file, const void *buf, size_t len_bytes, uint64_t off, int rwf_flags)
{
	size_t done_bytes = 0;

	while (done_bytes < len_bytes) {
		void *rest = (char *)buf + done_bytes;
		size_t rest_bytes = len_bytes - done_bytes;
		int64_t count;

		if (file->mode == IO_INLINE)
			count = transfer_inline(IO_OP_WRITE, file->fd, rest, rest_bytes,
				off + done_bytes, rwf_flags);
		else
			count = transfer_by_engine(IO_OP_WRITE, file->fd, rest, rest_bytes,
				off + done_bytes, rwf_flags);
		if (count <= 0)
			return count ? count : -EIO;
		done_bytes += (size_t)count;
	}
	return (ssize_t)done_bytes;
}

/* --- the rest --------------------------------------------------------------------------------- */

suspends int io_fdatasync(struct io_file *file)
{
	struct io_request request = { .op = IO_OP_FDATASYNC, .fd = file->fd };

	if (file->mode == IO_INLINE)
		return fdatasync(file->fd) ? -errno : 0;
	return (int)request_run(&request);
}

suspends int io_fallocate(struct io_file *file, int mode_flags, uint64_t off, uint64_t len_bytes)
{
	struct io_request request = {
		.op = IO_OP_FALLOCATE,
		.fd = file->fd,
		.flags = mode_flags,
		.off = off,
		.len_bytes = len_bytes,
	};
	int ret;

	if (file->mode != IO_INLINE || len_bytes > FALLOCATE_INLINE_MAX_BYTES)
		return (int)request_run(&request);
	do {
		ret = fallocate(file->fd, mode_flags, (off_t)off, (off_t)len_bytes);
	} while (ret && errno == EINTR);
	return ret ? -errno : 0;
}
