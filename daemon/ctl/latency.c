/*
 * How long requests took: as bars for `latency`, in words for `status`.
 *
 * The daemon counts in powers of two of microseconds (org.blkstack.varlink, Latencies), so every figure here is
 * one of those: "half within 64 us" means that half took less than 64 us, and that it is no less than 32.
 */
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "daemon/ctl/ctl.h"

#define BAR_COLUMNS 40

const char *ctl_format_latency(size_t bucket, char text[CTL_LATENCY_TEXT_LEN])
{
	double us = (double)(UINT64_C(1) << MIN(bucket, (size_t)40));

	if (us < 1000)
		snprintf(text, CTL_LATENCY_TEXT_LEN, "%.0f us", us);
	else if (us < 1e6)
		snprintf(text, CTL_LATENCY_TEXT_LEN, "%.*f ms", us < 1e4 ? 1 : 0, us / 1000);
	else
		snprintf(text, CTL_LATENCY_TEXT_LEN, "%.*f s", us < 1e7 ? 1 : 0, us / 1e6);
	return text;
}

static uint64_t sum_of(const json_t *counts)
{
	const json_t *count;
	uint64_t sum = 0;
	size_t i;

	json_array_foreach(counts, i, count) sum += (uint64_t)json_integer_value(count);
	return sum;
}

size_t ctl_latency_quantile(const json_t *counts, unsigned permille)
{
	uint64_t sum = sum_of(counts), seen = 0;
	const json_t *count;
	size_t i;

	json_array_foreach(counts, i, count)
	{
		seen += (uint64_t)json_integer_value(count);
		if (seen * 1000 >= sum * permille)
			break;
	}
	return i;
}

/* --- bars ------------------------------------------------------------------------------------- */

static void show_bars(const json_t *counts)
{
	uint64_t sum = sum_of(counts), most = 0;
	const json_t *count;
	bool begun = false;
	size_t i;

	json_array_foreach(counts, i, count) most = MAX(most, (uint64_t)json_integer_value(count));
	json_array_foreach(counts, i, count)
	{
		char text[CTL_LATENCY_TEXT_LEN], bar[BAR_COLUMNS + 1];
		uint64_t number = (uint64_t)json_integer_value(count);
		size_t columns = (size_t)((double)number / (double)most * BAR_COLUMNS);

		begun = begun || number;
		if (!begun)
			continue;
		memset(bar, '#', columns);
		bar[columns] = '\0';
		printf("    < %-7s %12llu %5.1f %%%s%s\n", ctl_format_latency(i, text),
			(unsigned long long)number, 100.0 * (double)number / (double)sum,
			columns ? "  " : "", bar);
	}
}

/* name: of the door. False when nothing was counted. */
static bool show_latency(const char *name, json_t *latency)
{
	bool any = false;
	const char *kind;
	json_t *counts;

	json_object_foreach(latency, kind, counts)
	{
		if (!sum_of(counts))
			continue;
		printf("  %s, %s\n", name, kind);
		show_bars(counts);
		any = true;
	}
	return any;
}

void show_latencies(const json_t *exports)
{
	const json_t *status;
	size_t i;

	json_array_foreach(exports, i, status)
	{
		const json_t *nbd = json_object_get(status, "nbd");
		const char *name = json_string_value(
			json_object_get(json_object_get(status, "export"), "name"));

		printf("%s%s:\n", i ? "\n" : "", name ? name : "?");
		bool any = show_latency("NBD clients", json_object_get(nbd, "latency"));
		any |= show_latency("kernel device", json_object_get(nbd, "kernel_latency"));
		if (!any)
			printf("  no requests so far\n");
	}
}
