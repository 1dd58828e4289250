/*
 * Preloaded into a daemon: makes it short of what it wants of the system. SHORT_OF names a file, and what is in it, if
 * it is there, is "PID WHAT": in that process
 *
 *	threads		no thread can be made
 *	connections	no pair of connected stream sockets
 *
 * Or it is "0 servers": no server lives that a keeper starts, whatever its config says.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"

static bool is_short_of(const char *what, int process)
{
	const char *path = getenv("SHORT_OF");
	CLEANUP(file) FILE *file = path ? fopen(path, "re") : NULL;
	char word[32] = "";
	int pid = 0;

	return file && fscanf(file, "%d %31s", &pid, word) == 2 && pid == process &&
	       !strcmp(word, what);
}

__attribute__((visibility("default"))) int pthread_create(
	pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
	static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	if (is_short_of("threads", getpid()))
		return EAGAIN;
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
	return real(thread, attr, run, arg);
}

__attribute__((visibility("default"))) int socketpair(
	int domain, int type, int protocol, int fds[2])
{
	static int (*real)(int, int, int, int *);

	if (!(type & ~(SOCK_STREAM | SOCK_CLOEXEC)) && is_short_of("connections", getpid())) {
		errno = EMFILE;
		return -1;
	}
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "socketpair");
	return real(domain, type, protocol, fds);
}

/* Before main(); the C library gives it what main() gets. */
__attribute__((constructor)) static void end_early(int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		if (!strncmp(argv[i], "--server=", strlen("--server=")) &&
			is_short_of("servers", 0))
			_exit(9);
}
