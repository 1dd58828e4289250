/*
 * A receiver for each connection, in the driver; see kernel-receivers.h.
 *
 * nbd_start_device() queues one piece of work per connection, recv_work(), which does not end before the connection
 * does. Their work queue is made with WQ_MEM_RECLAIM, so it has a rescuer: when a new worker thread takes longer to
 * start than 10 ms (a machine under load, short of memory, emulated), rescuer_thread() takes all works that wait, and
 * does one after the other. So the second one it took waits for the end of the first one's connection, and whatever
 * is answered on its own connection is not read: requests hang until their time-out ("Connection timed out, retrying
 * (3/3 alive)"), which may be an hour. Seen on Linux 6.1.
 *
 * How we know: behind the name of a kernel thread stands what work it is busy with: "kworker/u5:1+nbd0-recv", or
 * "+knbd0-recv" of an older driver. Where /proc does not show kernel threads, or they do not say that (before Linux 4.18),
 * or the work of all devices is a single "knbd-recv" (before 5.4), nothing can
 * be told.
 */
#include "daemon/kernel-receivers.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/process.h"
#include "daemon/kernel-dev_private.h"

#define TIMEOUT_MS 2000 /* for the driver's receivers to begin: it takes a few ms */
#define STEP_MS    10

/* The first thread of the kernel that starts others; it has this number wherever it can be seen. */
#define KTHREADD_PID 2

static bool kernel_threads_are_seen(void)
{
	char name[PROCESS_NAME_LEN];

	return process_name(KTHREADD_PID, name) && !strcmp(name, "kthreadd");
}

static unsigned count_busy_with(const char *work)
{
	CLEANUP(dir) DIR *processes = opendir("/proc");
	struct dirent *process;
	unsigned count = 0;

	while (processes && (process = readdir(processes))) {
		char name[PROCESS_NAME_LEN];
		const char *busy_with;

		if (!isdigit((unsigned char)process->d_name[0]) ||
			!process_name(atoi(process->d_name), name))
			continue;
		busy_with = strrchr(name, '+');
		count += busy_with && !strcmp(busy_with + (busy_with[1] == 'k' ? 2 : 1), work);
	}
	return count;
}

bool kernel_receivers_run(const char *device, unsigned connections)
{
	char work[KERNEL_NAME_LEN + 8];
	unsigned count = 0;

	if (connections == 1 || !kernel_threads_are_seen())
		return true;
	snprintf(work, sizeof(work), "%s-recv", device);
	for (unsigned waited_ms = 0; waited_ms <= TIMEOUT_MS; waited_ms += STEP_MS) {
		count = count_busy_with(work);
		if (count >= connections)
			return true;
		kernel_dev_sleep_ms(STEP_MS);
	}
	return !count; /* the names do not tell, for at least one would have begun */
}
