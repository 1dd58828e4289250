/*
 * Small things every file may use: container_of, min/max, rounding, overflow-checked sums.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#define container_of(ptr, type, member) \
	((type *)((char *)(1 ? (ptr) : &((type *)0)->member) - offsetof(type, member)))

#define MIN(a, b)                                  \
	({                                         \
		__auto_type min_a_ = (a);          \
		__auto_type min_b_ = (b);          \
		min_a_ < min_b_ ? min_a_ : min_b_; \
	})
#define MAX(a, b)                                  \
	({                                         \
		__auto_type max_a_ = (a);          \
		__auto_type max_b_ = (b);          \
		max_a_ > max_b_ ? max_a_ : max_b_; \
	})

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

static inline bool is_pow2(uint64_t n)
{
	return n && !(n & (n - 1));
}

/* align is a power of two. round_up() wraps past 2^64: check outside values with range_ok() first. */
static inline uint64_t round_down(uint64_t n, uint64_t align)
{
	return n & ~(align - 1);
}

static inline uint64_t round_up(uint64_t n, uint64_t align)
{
	return (n + align - 1) & ~(align - 1);
}

static inline bool is_aligned(uint64_t n, uint64_t align)
{
	return !(n & (align - 1));
}

/* True when [off, off + len) lies within [0, size), without overflow. */
static inline bool range_ok(uint64_t off, uint64_t len, uint64_t size)
{
	return off <= size && len <= size - off;
}

/* True when the two half-open ranges share at least one byte; ends beyond 2^64 are no matter. */
static inline bool ranges_overlap(uint64_t a_off, uint64_t a_len, uint64_t b_off, uint64_t b_len)
{
	return a_off <= b_off ? b_len && b_off - a_off < a_len : a_len && a_off - b_off < b_len;
}

/* True on overflow; *sum or *product is then undefined. For values that come from outside. */
static inline bool add_overflows(uint64_t a, uint64_t b, uint64_t *sum)
{
	return __builtin_add_overflow(a, b, sum);
}

static inline bool mul_overflows(uint64_t a, uint64_t b, uint64_t *product)
{
	return __builtin_mul_overflow(a, b, product);
}
