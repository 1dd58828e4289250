/*
 * What /proc tells of processes.
 */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

#define PROCESS_NAME_LEN \
	64 /* with the final NUL: of kernel threads it is longer than the 15 of others */

/* False: it is gone, or has no name; name is "" then. */
bool process_name(pid_t pid, char name[PROCESS_NAME_LEN]);
