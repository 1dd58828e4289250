/*
 * Server CPU time from /proc (see proc(5)).
 *
 * /proc/PID/task/TID/schedstat has nanoseconds but covers living threads only; /proc/PID/stat has
 * clock ticks but keeps what ended threads used.  Both are sampled: the exact one is the answer
 * unless the coarse one shows that threads ended and took their share with them.
 * Children count as well, because some servers fork for each connection.
 */
#include "cpu.h"

#include "client.h"

#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	PATH_BYTES = 64,
	STAT_BYTES = 1024,
	TICKS_SLACK = 3, /* rounding of two samples, and a tick in progress */
};

/* User and system ticks are fields 14 and 15; the name in field 2 may hold spaces. */
static bool add_process(struct cpu_sample *sample, int pid)
{
	unsigned long user;
	unsigned long system;
	char path[PATH_BYTES];
	char text[STAT_BYTES];
	size_t n;
	char *at;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return false;
	n = fread(text, 1, sizeof(text) - 1, file);
	fclose(file);
	text[n] = '\0';
	at = strrchr(text, ')');
	if (!at || sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
			   &system) != 2)
		return false;
	sample->stat_ns += (user + system) * (1000000000U / (uint64_t)sysconf(_SC_CLK_TCK));
	return true;
}

static void add_thread(struct cpu_sample *sample, int pid, const char *tid)
{
	unsigned long long run_ns;
	char path[PATH_BYTES];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/task/%.20s/schedstat", pid, tid);
	file = fopen(path, "re");
	if (!file)
		return;
	if (fscanf(file, "%llu", &run_ns) == 1)
		sample->sched_ns += run_ns;
	fclose(file);
}

static bool add_tree(struct cpu_sample *sample, int pid);

static void add_children(struct cpu_sample *sample, int pid, const char *tid)
{
	char path[PATH_BYTES];
	FILE *file;
	int child;

	snprintf(path, sizeof(path), "/proc/%d/task/%.20s/children", pid, tid);
	file = fopen(path, "re");
	if (!file)
		return;
	while (fscanf(file, "%d", &child) == 1)
		add_tree(sample, child);
	fclose(file);
}

static bool add_tree(struct cpu_sample *sample, int pid)
{
	char path[PATH_BYTES];
	struct dirent *entry;
	DIR *tasks;

	if (!add_process(sample, pid))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	if (!tasks)
		return false;
	while ((entry = readdir(tasks))) {
		if (entry->d_name[0] == '.')
			continue;
		add_thread(sample, pid, entry->d_name);
		add_children(sample, pid, entry->d_name);
	}
	closedir(tasks);
	return true;
}

void cpu_sample_take(struct cpu_sample *sample, pid_t pid)
{
	*sample = (struct cpu_sample){ 0 };
	if (!add_tree(sample, pid))
		die("server process %d: %s", pid, strerror(errno));
}

uint64_t cpu_sample_delta_ns(const struct cpu_sample *from, const struct cpu_sample *to)
{
	uint64_t slack_ns = TICKS_SLACK * (1000000000U / (uint64_t)sysconf(_SC_CLK_TCK));
	uint64_t exact_ns = to->sched_ns > from->sched_ns ? to->sched_ns - from->sched_ns : 0;
	uint64_t coarse_ns = to->stat_ns > from->stat_ns ? to->stat_ns - from->stat_ns : 0;

	return coarse_ns > exact_ns + slack_ns ? coarse_ns : exact_ns;
}
