/*
 * Processor time used by another process: all of its threads and its children.
 */
#ifndef BENCH_CPU_H
#define BENCH_CPU_H

#include <stdint.h>
#include <sys/types.h>

struct cpu_sample {
	uint64_t sched_ns; /* sum of the live threads' run time: exact, forgets ended threads */
	uint64_t stat_ns;  /* user + system of the processes: clock ticks, remembers them */
};

/* Sample `pid`; ends the program when the process does not exist. */
void cpu_sample_take(struct cpu_sample *sample, pid_t pid);

/* Nanoseconds used between two samples of one process. */
uint64_t cpu_sample_delta_ns(const struct cpu_sample *from, const struct cpu_sample *to);

#endif
