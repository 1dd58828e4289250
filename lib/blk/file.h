/*
 * Private to the file layer: its struct, and what its files share.
 *
 *	file.c		the ops: data path, flush, extents, resize, status
 *	file_open.c	finding, creating and measuring the file
 *	file_lock.c	locks compatible with QEMU's, and naming who is in the way
 *
 * The functions declared here block: they run on a thread of the offload pool.
 */
#pragma once

#include <sys/stat.h>

#include "blk/blk.h"
#include "rt/io.h"

enum file_cache { FILE_CACHE_BUFFERED, FILE_CACHE_DIRECT };
enum file_sync { FILE_SYNC_NONE, FILE_SYNC_OS, FILE_SYNC_DRIVE };

struct file_layer {
	struct blk blk;

	/* options */
	const char *path;
	bool read_only;
	int cache; /* enum file_cache */
	int sync;  /* enum file_sync */
	bool lock;
	bool create;
	uint64_t create_size;
	uint64_t block_size; /* 0: the smallest the file allows */

	int fd;      /* -1: not open */
	int sync_fd; /* another open file of the same inode, for flushes alone; -1: none needed */
	struct io_file io, sync_io;
	bool is_device;
	bool created;        /* by our open(), and open ever since */
	dev_t inode_dev;     /* what fd refers to: */
	ino_t inode_ino;     /*   to tell it from a namesake */
	bool can_punch;      /* fallocate() modes, until the file system says no */
	bool can_zero_range; /*   */
	bool can_seek;       /* SEEK_DATA */
	bool truncated;      /* a read found the file shorter than the disk */
	bool flush_failed; /* what was written before may be lost: never promise durability again */
	uint64_t flush_started; /* how many flushes have begun */
	struct co_mutex flushing;
};

/* Opens or creates the file, locks it, sets the descriptors and blk.caps. On an error, nothing is left behind. */
int file_open_blocking(struct file_layer *file, struct err *err);
/* Also half-open. Removes the file when file_open_blocking() created it and the start failed. */
void file_close_blocking(struct file_layer *file);
/* The size of the file or device behind fd now. */
int file_find_size(int fd, bool is_device, uint64_t *size);

/*
 * Takes the locks of a writer or a reader on fd, until it is closed. -EBUSY when somebody holds
 * conflicting ones, with a text; with name_them one that says who, found by a look at every process.
 */
int file_lock(int fd, const char *path, bool read_only, bool name_them, struct err *err);
/* Fills err for a block device that cannot be opened exclusively: who uses it. Returns -EBUSY. */
int file_device_busy(const char *path, dev_t device, struct err *err);
