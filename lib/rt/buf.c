/*
 * Buffers for reuse, kept by the reactor; see buf.h.
 *
 * A buffer that waits for reuse holds the link to the next one of its size in its first bytes.
 * Large buffers are mapped and unmapped one by one, so that they do not settle in malloc's heap, and
 * populated at once: that costs a fraction of one page fault after the other. It is still several times
 * the cost of reading the data, which is why they are kept, too.
 *
 * A timer gives back what was not needed since it last ran. It is armed only while there is something to
 * give back, so an idle reactor sleeps undisturbed.
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
#define BUF_MAP_BYTES   (512 * 1024) /* from this size on, and what is not pooled: mapped */
#define BUF_TRIM_NS     NS_PER_SEC

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

void buf_pool_init(struct buf_pool *pool)
{
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

static void buf_release(void *buf, size_t size_bytes)
{
	if (size_bytes >= BUF_MAP_BYTES)
		munmap(buf, size_bytes);
	else
		free(buf);
}

static void *shelf_take(struct buf_pool *pool, unsigned shelf)
{
	void *buf = pool->free[shelf];

	if (buf) {
		pool->free[shelf] = *(void **)buf;
		pool->kept_bytes -= shelf_size_bytes(shelf);
		pool->unused_bytes = MIN(pool->unused_bytes, pool->kept_bytes);
	}
	return buf;
}

/* Largest first: they are the rarest in use. */
static void pool_trim(struct timer *timer)
{
	struct buf_pool *pool = container_of(timer, struct buf_pool, trim);
	size_t spare_bytes = pool->kept_bytes - MIN(pool->kept_bytes, (size_t)BUF_POOL_REST_BYTES);
	size_t excess_bytes = MIN(pool->unused_bytes, spare_bytes);

	for (unsigned shelf = BUF_SHELVES; shelf-- && excess_bytes;) {
		while (excess_bytes && pool->free[shelf]) {
			buf_release(shelf_take(pool, shelf), shelf_size_bytes(shelf));
			excess_bytes -= MIN(excess_bytes, shelf_size_bytes(shelf));
		}
	}
	pool->unused_bytes = pool->kept_bytes;
	if (pool->kept_bytes > BUF_POOL_REST_BYTES)
		timer_arm(timer, reactor_now_ns() + BUF_TRIM_NS);
}

void *buf_get(size_t size_bytes)
{
	unsigned shelf = buf_shelf(size_bytes);

	if (size_bytes > BUF_POOLED_MAX_BYTES)
		return buf_map(size_bytes);
	void *buf = shelf_take(&reactor_current->bufs, shelf);
	if (buf)
		return buf;
	size_bytes = shelf_size_bytes(shelf);
	return size_bytes >= BUF_MAP_BYTES ? buf_map(size_bytes)
					   : aligned_alloc(BUF_ALIGN_BYTES, size_bytes);
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
		buf_release(buf, shelf_size_bytes(shelf));
	} else {
		*(void **)buf = pool->free[shelf];
		pool->free[shelf] = buf;
		pool->kept_bytes += shelf_size_bytes(shelf);
		if (pool->kept_bytes > BUF_POOL_REST_BYTES && pool->trim.heap_index == TIMER_IDLE)
			timer_arm(&pool->trim, reactor_now_ns() + BUF_TRIM_NS);
	}
}

void buf_pool_init(struct buf_pool *pool)
{
	timer_init(&pool->trim, pool_trim);
}

void buf_pool_fini(struct buf_pool *pool)
{
	for (unsigned shelf = 0; shelf < BUF_SHELVES; shelf++)
		while (pool->free[shelf])
			buf_release(shelf_take(pool, shelf), shelf_size_bytes(shelf));
}

#endif
