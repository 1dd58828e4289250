/*
 * The file layer's way to its file: look, open, create, lock, measure.
 *
 * Everything here blocks and runs on the offload pool. A file is looked at before it is opened, since
 * opening a fifo waits and opening some devices acts. It is created only when it is not there, exclusively
 * and sparse, and is durable with its name before it is used; whatever fails after that removes it again, unless
 * somebody else has got hold of it.
 *
 * Errors name the path, what is wrong with it, and what the user may do about it.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "base/util.h"
#include "blk/file.h"

#define DIRECT_ALIGN_MIN 512
#define DIRECT_ALIGN_MAX 4096
#define CREATE_MODE      0600 /* a disk holds what its owner would not show everybody */

/* --- finding and opening ---------------------------------------------------------------------- */

/* What the disk may need to get through with the last requests of a process that was killed. */
#define SUCCESSOR_WAIT_MS 30000
#define STRANGER_WAIT_MS  1000 /* who used it may have been killed just now */
#define SUCCESSOR_LOOK_MS 5

static int check_kind(const char *path, mode_t mode, struct err *err)
{
	const char *kind = S_ISDIR(mode)    ? "directory"
			   : S_ISFIFO(mode) ? "fifo"
			   : S_ISSOCK(mode) ? "socket"
			   : S_ISCHR(mode)  ? "character device"
					    : NULL;

	if (!kind)
		return 0;
	return err_set(err, S_ISDIR(mode) ? EISDIR : EINVAL,
		"\"%s\" is a %s: a regular file or a block device is needed", path, kind);
}

static int open_error(const struct file_layer *file, int code, dev_t device, struct err *err)
{
	bool write = !file->blk.caps.read_only;

	if (code == ENOENT && !file->create)
		return err_set(err, code, "\"%s\" does not exist%s", file->path,
			file->blk.env->command_line
				? ""
				: " (create = true and a size would create it)");
	if (code == EBUSY && device)
		return file_device_busy(file->path, device, err);
	if (code == EINVAL && file->cache == FILE_CACHE_DIRECT)
		return err_set(err, code,
			"\"%s\" is on a file system without direct I/O: set cache = \"buffered\"",
			file->path);
	if (write && (code == EACCES || code == EPERM || code == EROFS || code == ETXTBSY))
		return err_set(err, code,
			"\"%s\" cannot be opened for writing: %s (read-only = true opens it for "
			"reading alone)",
			file->path, strerror(code));
	return err_sys(err, code, "\"%s\" cannot be opened", file->path);
}

static int open_flags(const struct file_layer *file)
{
	return (file->blk.caps.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY |
	       (file->cache == FILE_CACHE_DIRECT ? O_DIRECT : 0);
}

/* Makes the name of the new (or removed) file durable. */
static int sync_folder(const char *path)
{
	CLEANUP(free) char *copy = strdup(path);
	CLEANUP(fd) int fd = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;

	if (fd < 0 || fsync(fd))
		return -errno;
	return 0;
}

/* Sets file->fd and file->created; -EEXIST without a text when somebody was faster. */
static int create(struct file_layer *file, struct err *err)
{
	int result = 0;

	file->fd = open(file->path, open_flags(file) | O_CREAT | O_EXCL, CREATE_MODE);
	if (file->fd < 0 && errno == EEXIST)
		return -EEXIST;
	if (file->fd < 0)
		return err_sys(err, errno, "\"%s\" cannot be created", file->path);
	struct stat st;
	if (fstat(file->fd, &st))
		return err_sys(err, errno, "\"%s\" cannot be looked at", file->path);
	file->inode_dev = st.st_dev;
	file->inode_ino = st.st_ino;
	file->created = true;

	if (ftruncate(file->fd, (off_t)file->create_size) || fsync(file->fd))
		result = -errno;
	else
		result = sync_folder(file->path);
	if (result)
		return err_sys(err, -result, "\"%s\" cannot be created with %llu bytes", file->path,
			(unsigned long long)file->create_size);
	return 0;
}

/* -ENOENT without a text when the file is to be created. */
static int open_existing(struct file_layer *file, struct err *err)
{
	struct stat st;

	if (stat(file->path, &st)) {
		if (errno == ENOENT && file->create)
			return -ENOENT;
		return open_error(file, errno, 0, err);
	}
	int result = check_kind(file->path, st.st_mode, err);
	if (result)
		return result;
	bool is_device = S_ISBLK(st.st_mode);
	/* On a device O_EXCL is a claim: it fails while a mount, swap or another driver has it. */
	bool claim = is_device && file->lock && !file->blk.caps.read_only;
	file->fd = open(file->path, open_flags(file) | (claim ? O_EXCL : 0));
	if (file->fd < 0)
		return open_error(file, errno, is_device ? st.st_rdev : 0, err);
	return 0;
}

static int open_or_create(struct file_layer *file, struct err *err)
{
	int result = open_existing(file, err);

	if (result != -ENOENT || !file->create)
		return result;
	result = create(file, err);
	if (result != -EEXIST)
		return result;
	/* Somebody was faster; or it is both there and not. */
	result = open_existing(file, err);
	if (result == -ENOENT)
		err_set(err, ENOENT, "\"%s\" is a symbolic link that leads to nothing", file->path);
	return result;
}

/* Flushes get an open file of their own: see file.c. */
static int open_for_sync(struct file_layer *file, struct err *err)
{
	struct stat st;

	if (file->blk.caps.read_only || file->sync == FILE_SYNC_NONE)
		return 0;
	file->sync_fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (file->sync_fd < 0 || fstat(file->sync_fd, &st))
		return err_sys(err, errno, "\"%s\" cannot be opened a second time, for flushes",
			file->path);
	if (st.st_dev != file->inode_dev || st.st_ino != file->inode_ino)
		return err_set(
			err, EBUSY, "\"%s\" was replaced while it was being opened", file->path);
	return 0;
}

/* --- measuring -------------------------------------------------------------------------------- */

int file_find_size(int fd, bool is_device, uint64_t *size)
{
	struct stat st;

	if (is_device)
		return ioctl(fd, BLKGETSIZE64, size) ? -errno : 0;
	if (fstat(fd, &st))
		return -errno;
	*size = (uint64_t)st.st_size;
	return 0;
}

/* By trial, for kernels and file systems that do not say: 0 when nothing works. */
static uint32_t probe_direct_align(int fd)
{
	CLEANUP(free) char *buf = aligned_alloc(2 * DIRECT_ALIGN_MAX, 4 * DIRECT_ALIGN_MAX);

	for (uint32_t align = DIRECT_ALIGN_MIN; buf && align <= DIRECT_ALIGN_MAX; align *= 2)
		/* aligned to this, and to no more */
		if (pread(fd, buf + align, align, 0) >= 0)
			return align;
	return 0;
}

/* The smallest block and memory alignment that I/O on the file can have. */
static int find_alignment(const struct file_layer *file, uint32_t *block_size, uint32_t *mem_align)
{
	int sector_size = 1;
	struct statx st;

	if (file->is_device && ioctl(file->fd, BLKSSZGET, &sector_size))
		return -errno;
	*block_size = (uint32_t)sector_size;
	*mem_align = 1;
	if (file->cache != FILE_CACHE_DIRECT)
		return 0;
	if (!statx(file->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) &&
		st.stx_mask & STATX_DIOALIGN) {
		*block_size = MAX(*block_size, st.stx_dio_offset_align);
		*mem_align = st.stx_dio_mem_align;
	} else {
		*mem_align = file->is_device ? *block_size : probe_direct_align(file->fd);
		*block_size = MAX(*block_size, *mem_align);
	}
	return is_pow2(*mem_align) && *block_size <= BLK_BLOCK_SIZE_MAX ? 0 : -EOPNOTSUPP;
}

static int set_block_size(struct file_layer *file, struct err *err)
{
	struct blk_caps *caps = &file->blk.caps;
	uint32_t needed = 1;
	int result = find_alignment(file, &needed, &caps->mem_align);

	if (result == -EOPNOTSUPP)
		return open_error(file, EINVAL, 0, err);
	if (result)
		return err_sys(err, -result, "the block size of \"%s\" cannot be read", file->path);
	caps->block_size = file->block_size ? (uint32_t)file->block_size : needed;
	if (caps->block_size < needed)
		return err_set(err, EINVAL, "block-size %u is too small: %s \"%s\" needs %u",
			caps->block_size, file->is_device ? "the device" : "direct I/O on",
			file->path, needed);
	return 0;
}

static int set_size(struct file_layer *file, struct err *err)
{
	struct blk_caps *caps = &file->blk.caps;
	int result = file_find_size(file->fd, file->is_device, &caps->size);

	if (result)
		return err_sys(err, -result, "the size of \"%s\" cannot be read", file->path);
	if (!caps->size)
		return err_set(err, EINVAL, "\"%s\" is empty: %s", file->path,
			file->is_device ? "the device has no medium"
			: file->blk.env->command_line
				? "give it a size first (truncate -s)"
				: "give it a size first (truncate -s), or "
				  "remove it and set create = true and a size");
	if (caps->size > BLK_SIZE_MAX)
		return err_set(err, EFBIG, "\"%s\" is larger than 4 EiB", file->path);
	if (is_aligned(caps->size, caps->block_size))
		return 0;
	if (file->cache == FILE_CACHE_DIRECT)
		return err_set(err, EINVAL,
			"\"%s\" has %llu bytes, not a multiple of %u as direct I/O needs: lengthen "
			"it "
			"with \"truncate -s %%%u\" (harmless for a qcow2 image), or set cache = "
			"\"buffered\" and put a \"padded\" layer above it",
			file->path, (unsigned long long)caps->size, caps->block_size,
			caps->block_size);
	return err_set(err, EINVAL,
		"\"%s\" has %llu bytes, not a multiple of the block size %u: leave block-size out "
		"and "
		"put a \"padded\" layer above it",
		file->path, (unsigned long long)caps->size, caps->block_size);
}

/* Whether the device has a command that writes zeroes, which punching holes into it needs. */
static bool device_writes_zeroes(dev_t device)
{
	static const char *const patterns[] = {
		"/sys/dev/block/%u:%u/queue/write_zeroes_max_bytes",
		"/sys/dev/block/%u:%u/../queue/write_zeroes_max_bytes", /* of a partition */
	};
	unsigned long long max_bytes = 0;
	char path[96];

	for (size_t i = 0; i < ARRAY_LEN(patterns); i++) {
		snprintf(path, sizeof(path), patterns[i], major(device), minor(device));
		FILE *attribute = fopen(path, "re");
		if (!attribute)
			continue;
		if (fscanf(attribute, "%llu", &max_bytes) != 1)
			max_bytes = 0;
		fclose(attribute);
		break;
	}
	return max_bytes > 0;
}

static void set_caps(struct file_layer *file, const struct stat *st)
{
	struct blk_caps *caps = &file->blk.caps;
	bool makes_holes = !file->is_device || device_writes_zeroes(st->st_rdev);
	uint64_t preferred = (uint64_t)st->st_blksize;

	if (!is_pow2(preferred) || preferred > BLK_BLOCK_SIZE_MAX)
		preferred = 4096;
	caps->preferred_size = (uint32_t)MAX(preferred, caps->block_size);
	caps->max_request = BLK_REQUEST_MAX;
	caps->fua = true;
	caps->zero_fast = makes_holes;
	caps->discard = makes_holes;
	caps->grows = !file->is_device;
	file->can_punch = file->can_zero_range = true;
	file->can_seek = !file->is_device;
}

/* --- all of it -------------------------------------------------------------------------------- */

/* will_retry: who has it in use is not looked for. */
static int open_and_measure(struct file_layer *file, bool will_retry, struct err *err)
{
	struct stat st;
	int result = open_or_create(file, err);

	if (result)
		return result;
	if (fstat(file->fd, &st))
		return err_sys(err, errno, "\"%s\" cannot be looked at", file->path);
	result = check_kind(file->path, st.st_mode, err);
	if (result)
		return result;
	file->inode_dev = st.st_dev;
	file->inode_ino = st.st_ino;
	file->is_device = S_ISBLK(st.st_mode);
	if (file->lock)
		result = file_lock(
			file->fd, file->path, file->blk.caps.read_only, !will_retry, err);
	if (!result)
		result = open_for_sync(file, err);
	if (!result)
		result = set_block_size(file, err);
	if (!result)
		result = set_size(file, err);
	if (!result)
		set_caps(file, &st);
	return result;
}

/* Somebody else may have found it before we locked it, and have data in it. */
static bool is_ours_alone(const struct file_layer *file)
{
	struct err unwanted;

	return !file->lock || !file_lock(file->fd, file->path, false, false, &unwanted);
}

static void remove_created(const struct file_layer *file)
{
	struct stat st;

	if (!is_ours_alone(file))
		return;
	if (stat(file->path, &st) || st.st_dev != file->inode_dev || st.st_ino != file->inode_ino)
		return;
	if (!unlink(file->path))
		sync_folder(file->path);
}

static void close_files(struct file_layer *file)
{
	if (file->sync_fd >= 0)
		close(file->sync_fd);
	if (file->fd >= 0)
		close(file->fd);
	file->fd = file->sync_fd = -1;
}

/* Until the locks of a predecessor are gone, with its last requests. */
static int open_when_free(struct file_layer *file, struct err *err)
{
	unsigned patience_ms = file->blk.env->successor ? SUCCESSOR_WAIT_MS : STRANGER_WAIT_MS;
	int result = open_and_measure(file, true, err);

	for (unsigned waited_ms = 0; result == -EBUSY && waited_ms < patience_ms;) {
		close_files(file);
		file->created = false; /* who has it now may keep it */
		usleep(SUCCESSOR_LOOK_MS * 1000);
		waited_ms += SUCCESSOR_LOOK_MS;
		*err = (struct err){ 0 };
		result = open_and_measure(file, waited_ms < patience_ms, err);
	}
	return result;
}

int file_open_blocking(struct file_layer *file, struct err *err)
{
	if (file->blk.caps.read_only)
		file->create = false; /* who only looks creates nothing */
	file->blk.caps.read_only |= file->read_only;

	int result = open_when_free(file, err);
	if (result && file->created) {
		remove_created(file);
		file->created = false;
	}
	return result;
}

void file_close_blocking(struct file_layer *file)
{
	if (file->created && (file->blk.start_failed || file->blk.env->start_failed))
		remove_created(file);
	close_files(file);
}
