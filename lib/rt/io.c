/*
 * File I/O for coroutines: which way each operation goes; see io.h.
 *
 * What can be had without waiting is taken at once by a plain system call, since a hand-over to
 * anybody costs more than most requests. Everything else becomes a struct io_request on the waiting
 * coroutine's stack and goes to the reactor's engine. Short counts are continued here, so engines need not.
 *
 * A buffered write only fills the page cache and costs 3 us at once, 8 by a ring, whose worker threads
 * take the writes of a file one by one. But it may wait: for a page to be read when it covers only a
 * part, for the kernel's share of dirty pages, for the journal. So only whole pages go at once, and when
 * one sleeps longer than STALL_NS the file's writes go by the engine for PAUSE_MIN_NS, and twice as long
 * each time it happens again soon: a busy disk holds up the reactor rarely, an idle one never. Whether a
 * slow write slept or the processor was busy is only known when the kernel's count of sleeps was taken
 * before, so a slow write first makes the next ones suspect.
 *
 * Failure modes: the system's error as it is; a write that makes no progress is EIO.
 */
#include "rt/io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
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

/* Longer writes keep the others waiting for their copying alone. */
#define WRITE_INLINE_MAX_BYTES (256 * 1024)
#define PAGE_BYTES             4096
#define STALL_NS               (10 * NS_PER_MS)
#define SUSPECT_WRITES         1024
#define PAUSE_MIN_NS           (1 * NS_PER_SEC)
#define PAUSE_MAX_NS           (64 * NS_PER_SEC)

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

/* A file system of this machine whose writes end in the page cache; not one that asks another process. */
static bool takes_writes_quickly(int fd)
{
	static const unsigned long known[] = { EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC,
		F2FS_SUPER_MAGIC };
	struct stat status;
	struct statfs fs;

	if (fstat(fd, &status) || !S_ISREG(status.st_mode) || fstatfs(fd, &fs))
		return false;
	for (size_t i = 0; i < ARRAY_LEN(known); i++)
		if ((unsigned long)fs.f_type == known[i])
			return true;
	return false;
}

void io_file_init(struct io_file *file, int fd, bool direct)
{
	*file = (struct io_file){ .fd = fd };
	if (is_in_memory(fd))
		file->mode = IO_INLINE;
	else
		file->mode = direct ? IO_DIRECT : IO_BUFFERED;
	file->nowait = file->mode == IO_BUFFERED && knows_nowait(fd);
	file->writes_quick = file->mode == IO_BUFFERED && takes_writes_quickly(fd);
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
		co_suspend();
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

static bool may_write_at_once(struct io_file *file, size_t len_bytes, uint64_t off, int rwf_flags)
{
	return file->writes_quick && !rwf_flags && len_bytes <= WRITE_INLINE_MAX_BYTES &&
	       is_aligned(off | len_bytes, PAGE_BYTES) &&
	       reactor_now_ns() >=
		       atomic_load_explicit(&file->paused_until_ns, memory_order_relaxed);
}

static uint64_t clock_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_SEC + (uint64_t)now.tv_nsec;
}

/* How often this thread has waited for something but the processor. */
static long thread_sleeps(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_nvcsw;
}

/* The file's writes go by the engine for a while, longer when the last such while is not long ago. */
static void pause_inline_writes(struct io_file *file, uint64_t now_ns)
{
	uint64_t pause_ns = atomic_load_explicit(&file->pause_ns, memory_order_relaxed);
	uint64_t paused_until_ns = atomic_load_explicit(
		&file->paused_until_ns, memory_order_relaxed);
	bool again = pause_ns && now_ns - paused_until_ns < pause_ns;

	pause_ns = again ? MIN(2 * pause_ns, PAUSE_MAX_NS) : PAUSE_MIN_NS;
	atomic_store_explicit(&file->pause_ns, pause_ns, memory_order_relaxed);
	atomic_store_explicit(&file->paused_until_ns, now_ns + pause_ns, memory_order_relaxed);
}

static ssize_t write_at_once(struct io_file *file, void *buf, size_t len_bytes, uint64_t off)
{
	unsigned suspect_writes = atomic_load_explicit(&file->suspect_writes, memory_order_relaxed);
	long sleeps = suspect_writes ? thread_sleeps() : 0;
	uint64_t start_ns = clock_now_ns();
	ssize_t count = transfer_inline(IO_OP_WRITE, file->fd, buf, len_bytes, off, 0);
	uint64_t end_ns = clock_now_ns();
	bool slow = end_ns - start_ns > STALL_NS;

	if (suspect_writes)
		suspect_writes--;
	else if (slow)
		suspect_writes = SUSPECT_WRITES;
	else
		return count;
	atomic_store_explicit(&file->suspect_writes, suspect_writes, memory_order_relaxed);
	if (slow && suspect_writes < SUSPECT_WRITES && thread_sleeps() != sleeps)
		pause_inline_writes(file, end_ns);
	return count;
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
		else if (may_write_at_once(file, rest_bytes, off + done_bytes, rwf_flags))
			count = write_at_once(file, rest, rest_bytes, off + done_bytes);
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
