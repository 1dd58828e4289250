/*
 * Buffers for reuse, kept by the reactor; see buf.h.
 *
 * A buffer that waits for reuse holds the link to the next one of its size in its first bytes.
 * Large buffers are mapped and unmapped one by one, so that they do not settle in malloc's heap, and
 * populated at once: that costs a fraction of one page fault after the other.
 *
 * With AddressSanitizer nothing is kept and sizes are exact, so it sees every byte too far.
 */
#include "rt/buf.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "base/util.h"
#include "rt/reactor_private.h"

#define BUF_ALIGN_BYTES 4096
#define BUF_MIN_SHIFT   12

_Static_assert(
	BUF_POOLED_MAX_BYTES == 1 << (BUF_MIN_SHIFT + BUF_SHELVES - 1), "one shelf per size");

#ifdef __SANITIZE_ADDRESS__

void *buf_get(size_t size_bytes)
{
	void *buf;

	return posix_memalign(&buf, BUF_ALIGN_BYTES, MAX(size_bytes, (size_t)1)) ? NULL : buf;
}

void buf_put(void *buf, size_t size_bytes)
{
	free(buf);
}

void buf_pool_fini(struct buf_pool *pool)
{
}

#else

static unsigned buf_shelf(size_t size_bytes)
{
	return size_bytes <= BUF_ALIGN_BYTES
		       ? 0
		       : 64 - BUF_MIN_SHIFT - (unsigned)__builtin_clzll(size_bytes - 1);
}

static size_t shelf_size_bytes(unsigned shelf)
{
	return (size_t)BUF_ALIGN_BYTES << shelf;
}

static void *buf_map(size_t size_bytes)
{
	void *buf = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	return buf == MAP_FAILED ? NULL : buf;
}

void *buf_get(size_t size_bytes)
{
	struct buf_pool *pool = &reactor_current->bufs;
	unsigned shelf = buf_shelf(size_bytes);

	if (size_bytes > BUF_POOLED_MAX_BYTES)
		return buf_map(size_bytes);
	void *buf = pool->free[shelf];
	if (!buf)
		return aligned_alloc(BUF_ALIGN_BYTES, shelf_size_bytes(shelf));
	pool->free[shelf] = *(void **)buf;
	pool->kept_bytes -= shelf_size_bytes(shelf);
	return buf;
}

void buf_put(void *buf, size_t size_bytes)
{
	struct buf_pool *pool = &reactor_current->bufs;
	unsigned shelf = buf_shelf(size_bytes);

	if (!buf)
		return;
	if (size_bytes > BUF_POOLED_MAX_BYTES) {
		munmap(buf, size_bytes);
	} else if (pool->kept_bytes + shelf_size_bytes(shelf) > BUF_POOL_KEEP_BYTES) {
		free(buf);
	} else {
		*(void **)buf = pool->free[shelf];
		pool->free[shelf] = buf;
		pool->kept_bytes += shelf_size_bytes(shelf);
	}
}

void buf_pool_fini(struct buf_pool *pool)
{
	for (unsigned shelf = 0; shelf < BUF_SHELVES; shelf++) {
		while (pool->free[shelf]) {
			void *buf = pool->free[shelf];

			pool->free[shelf] = *(void **)buf;
			free(buf);
		}
	}
	pool->kept_bytes = 0;
}

#endif
