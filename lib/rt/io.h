/*
 * File I/O for coroutines: as cheap as the file allows, and never blocking the reactor.
 *
 * How an operation is carried out depends on the file, and is decided here and nowhere else:
 *	IO_INLINE	a file in memory (tmpfs): at once, but long reads; it has no non-blocking I/O, and never
 *			waits for a device
 *	IO_BUFFERED	reads: what is in the page cache at once, the rest by the engine; writes: by the engine
 *	IO_DIRECT	opened with O_DIRECT: the engine
 *	fsync and fallocate: the engine, but for files in memory
 * The engine is the reactor's: io_uring, or a pool of threads with the same semantics.
 *
 * All calls return what the system call would, -errno instead of errno, and retry EINTR and short
 * counts themselves: a short count means the end of the file (reads) and never happens otherwise.
 * Lengths are at most IO_LEN_MAX_BYTES. For a direct file, memory, length and offset are aligned by the caller.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "rt/co.h"

#define IO_LEN_MAX_BYTES (1U << 30)

enum io_mode { IO_INLINE, IO_BUFFERED, IO_DIRECT };

struct io_file {
	int fd; /* stays the caller's */
	enum io_mode mode;
	bool nowait; /* buffered, and the file system knows non-blocking reads */
};

/* Looks at the file (fstatfs) to choose the mode; direct: opened with O_DIRECT. */
void io_file_init(struct io_file *file, int fd, bool direct);

suspends ssize_t io_read(struct io_file *file, void *buf, size_t len_bytes, uint64_t off);
/* rwf_flags: 0 or RWF_DSYNC (durable at return). */
suspends ssize_t io_write(
	struct io_file *file, const void *buf, size_t len_bytes, uint64_t off, int rwf_flags);
suspends int io_fdatasync(struct io_file *file);
/* mode_flags as in fallocate(2). */
suspends int io_fallocate(struct io_file *file, int mode_flags, uint64_t off, uint64_t len_bytes);
