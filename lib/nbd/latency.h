/*
 * How long requests take: from the turn of the reactor that received them (reactor_now_ns(), which costs
 * nothing) until their reply is in the socket (one look at the clock for all that one send took). So
 * what a request waits for its reactor and for a client that reads slowly is part of it.
 *
 * Bucket n counts those of less than 2^n microseconds and no less than half of that; the last one is for all
 * that took longer, half a minute and more.
 */
#pragma once

#include <stdint.h>

#include <jansson.h>

#include "nbd/server.h"

static inline void nbd_latency_count(
	struct nbd_latency *latency, enum nbd_counter kind, uint64_t ns)
{
	uint64_t us = ns / 1000;
	unsigned bucket = us ? 64U - (unsigned)__builtin_clzll(us) : 0;

	latency->counts[kind][bucket < NBD_LATENCY_BUCKETS ? bucket : NBD_LATENCY_BUCKETS - 1]++;
}

void nbd_latency_add(struct nbd_latency *sum, const struct nbd_latency *latency);

/* {"read": [count, ...], ...}; buckets at the end that are empty are left out. */
json_t *nbd_latency_status(const struct nbd_latency *latency);

/* "read", ... for status; in export.c. */
extern const char *const nbd_counter_names[NBD_COUNTERS];
