/*
 * The name of a process, for messages and to know it by: /proc/PID/comm. Behind a kernel thread's stands what work it is
 * busy with. See process.h.
 */
#include "base/process.h"

#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"

bool process_name(pid_t pid, char name[PROCESS_NAME_LEN])
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
	CLEANUP(file) FILE *comm = fopen(path, "re");
	if (!comm || !fgets(name, PROCESS_NAME_LEN, comm))
		name[0] = '\0';
	name[strcspn(name, "\n")] = '\0';
	return name[0];
}
