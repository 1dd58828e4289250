/*
 * Page-aligned buffers from a small LIFO pool of the current reactor, so that the memory last used,
 * still in the processor's cache, is used next.
 *
 * Sizes are rounded up to a power of two from 4 KiB; those up to BUF_POOLED_MAX_BYTES are kept for
 * reuse, BUF_POOL_KEEP_BYTES in all per reactor; larger ones go back to the system at once. What
 * nobody needed for a second goes back too, down to BUF_POOL_REST_BYTES.
 * What is in a buffer is undefined: whoever sends it to anybody fills it first.
 */
#pragma once

#include <stddef.h>

#define BUF_POOLED_MAX_BYTES (4 * 1024 * 1024)
#define BUF_POOL_KEEP_BYTES  (16 * 1024 * 1024)
#define BUF_POOL_REST_BYTES  (1024 * 1024)

/* NULL when memory is exhausted. Returned on the same reactor, with the same size; NULL is fine. */
void *buf_get(size_t size_bytes);
void buf_put(void *buf, size_t size_bytes);
