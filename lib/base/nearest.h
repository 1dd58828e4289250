/*
 * "Did you mean ...?": the candidate closest to a mistyped name.
 */
#pragma once

/* best is NULL while no candidate is near enough to be meant. The texts stay the caller's. */
struct nearest {
	const char *wanted;
	const char *best;
	unsigned best_distance;
};

void nearest_init(struct nearest *nearest, const char *wanted);
void nearest_offer(struct nearest *nearest, const char *candidate);
