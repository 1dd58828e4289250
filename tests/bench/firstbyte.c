/*
 * firstbyte: how long a server takes from exec to the first 512 bytes served.
 *
 * The clock starts before the fork, so the figure holds the exec, the dynamic linker, the server's
 * own start, the connection, the handshake and one read.  A socket that is not there yet is tried
 * again every 20 microseconds; the clock stops when the data has arrived.  The server is then ended
 * with SIGTERM (SIGKILL after a while, which is reported as a failure), and also when this
 * program dies.
 */
#include "client.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	WAIT_MS = 10000,
	END_MS = 5000,
	READ_BYTES = 512,
};

static pid_t start(char **command)
{
	pid_t parent = getpid();
	pid_t pid = fork();

	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid > 0)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(127);
	execvp(command[0], command);
	fprintf(stderr, "firstbyte: %s: %s\n", command[0], strerror(errno));
	_exit(127);
}

static void read_first(struct client *client, const char *addr, const char *export_name)
{
	uint8_t request[CLIENT_REQUEST_BYTES];
	uint8_t reply[CLIENT_REPLY_BYTES + READ_BYTES];

	client_open(client, addr, export_name, WAIT_MS);
	client_encode(request, CLIENT_READ, 1, 0, READ_BYTES);
	client_send(client, request, sizeof(request));
	client_receive(client, reply, CLIENT_REPLY_BYTES);
	if (get_be32(reply) != CLIENT_REPLY_MAGIC || get_be64(reply + 8) != 1)
		die("malformed reply to the first read");
	if (get_be32(reply + 4) != 0)
		die("the first read failed with error %u", get_be32(reply + 4));
	client_receive(client, reply + CLIENT_REPLY_BYTES, READ_BYTES);
}

/* False when the server had to be killed. */
static bool end(pid_t pid)
{
	const struct timespec pause = { .tv_nsec = 1000000 };
	uint64_t deadline_ns = now_ns() + (uint64_t)END_MS * 1000000U;

	kill(pid, SIGTERM);
	while (now_ns() < deadline_ns) {
		if (waitpid(pid, NULL, WNOHANG) == pid)
			return true;
		nanosleep(&pause, NULL);
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	return false;
}

int main(int argc, char **argv)
{
	struct client client;
	uint64_t start_ns;
	uint64_t served_ns;
	pid_t pid;

	if (argc < 4 || strcmp(argv[1], "--help") == 0) {
		fputs("Usage: firstbyte PATH|HOST:PORT EXPORT COMMAND [ARGUMENT...]\n"
		      "Start a server and print the microseconds until it has served 512 bytes.\n"
		      "COMMAND has to stay in the foreground.\n",
			stderr);
		return 1;
	}
	prctl(PR_SET_TIMERSLACK, 1UL);
	start_ns = now_ns();
	pid = start(argv + 3);
	read_first(&client, argv[1], argv[2]);
	served_ns = now_ns();
	client_close(&client); /* some servers wait for their clients before they end */
	if (!end(pid))
		die("%s did not end within %d ms of SIGTERM", argv[3], END_MS);
	printf("{\"first_byte_us\": %.1f}\n", (double)(served_ns - start_ns) / 1000);
	return 0;
}
