/*
 * Random numbers for tests: seeded from $SEED or the clock, the seed printed, the sequence the same
 * everywhere. Each test starts its own.
 */
#pragma once

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct seed {
	uint64_t state;
};

static inline uint64_t seed_next(struct seed *seed)
{
	uint64_t z = seed->state += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static inline struct seed seed_start(const char *test)
{
	const char *given = getenv("SEED");
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);

	uint64_t start = given ? strtoull(given, NULL, 0)
			       : (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 20;

	printf("%s: SEED=%" PRIu64 "\n", test, start);
	fflush(stdout);
	return (struct seed){ start };
}

/* 0 .. limit - 1 */
static inline uint64_t seed_below(struct seed *seed, uint64_t limit)
{
	return seed_next(seed) % limit;
}

static inline void seed_fill(struct seed *seed, void *buf, size_t len_bytes)
{
	uint8_t *bytes = buf;

	for (size_t i = 0; i < len_bytes; i++)
		bytes[i] = (uint8_t)(seed_next(seed) >> 32);
}
