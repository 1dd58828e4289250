/*
 * Latencies as they are told; see latency.h.
 */
#include "nbd/latency.h"

void nbd_latency_add(struct nbd_latency *sum, const struct nbd_latency *latency)
{
	for (int kind = 0; kind < NBD_COUNTERS; kind++)
		for (int i = 0; i < NBD_LATENCY_BUCKETS; i++)
			sum->counts[kind][i] += latency->counts[kind][i];
}

json_t *nbd_latency_status(const struct nbd_latency *latency)
{
	json_t *status = json_object();

	for (int kind = 0; kind < NBD_COUNTERS; kind++) {
		json_t *counts = json_array();
		int used = NBD_LATENCY_BUCKETS;

		while (used && !latency->counts[kind][used - 1])
			used--;
		for (int i = 0; i < used; i++)
			json_array_append_new(
				counts, json_integer((json_int_t)latency->counts[kind][i]));
		json_object_set_new(status, nbd_counter_names[kind], counts);
	}
	return status;
}
