/*
 * Listening sockets, for the doors and for the control socket.
 *
 *	/run/blkstack/control, unix:/run/blkstack/nbd	a unix socket
 *	tcp:127.0.0.1:10809, tcp:[::1]:10809, tcp:*:10809	TCP; * is every address, IPv6 and IPv4
 *	vsock:10809, vsock:2:10809	for virtual machines on this host; the CID is ours, * or none is any
 *
 * A socket that the service manager or the keeper passed for the same address is taken over; from the keeper with
 * its file (LISTEN_KEPT is its name then). Otherwise a unix
 * socket's file that a dead process left behind is replaced; one that somebody listens on is not. The
 * last folder of its path is created when it is missing.
 */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

#include "base/err.h"
#include "rt/reactor.h"

#define LISTEN_TEXT_LEN 128
#define LISTEN_KEPT \
	"kept" /* the name, as of sd_listen_fds_with_names(), of a socket of a predecessor */

/* Who may connect to a unix socket. (uid_t)-1, (gid_t)-1: leave the owner as it is. */
struct listen_access {
	mode_t mode;
	uid_t uid;
	gid_t gid;
};

struct listener {
	int fd;                     /* -1 while closed */
	char text[LISTEN_TEXT_LEN]; /* the address, with the real port of a TCP socket */
	char *path;                 /* of a socket file that we made, else NULL */
	dev_t path_dev;             /* and which file that was */
	ino_t path_ino;
	bool passed; /* by the service manager: it has it for ever */
	bool waits;  /* a predecessor's: its file is ours once it is served, and stays until then */
	struct watch watch;
	bool watching;
	struct timer retry;
	void (*accepted)(struct listener *listener, int fd);
};

/* Checks the form of an address and touches nothing. */
int listener_check(const char *address, struct err *err);

/* Whether two addresses whose forms are right are written differently only ("unix:/x" and "/x", "vsock:1" and "vsock:*:1"). */
bool listener_same_address(const char *a, const char *b);

enum listen_kind { LISTEN_UNIX, LISTEN_TCP, LISTEN_VSOCK };

/* Of an address whose form is right. */
enum listen_kind listener_kind(const char *address);
/* Only this machine can reach it. By its looks: names are not resolved, but for "localhost". */
bool listener_is_loopback(const char *address);

/*
 * Binds and listens; accepts nothing yet. Plain code, may block on name look-ups: before the reactor
 * runs, or offloaded. access may be NULL but for unix sockets. On an error nothing was created and fd is -1.
 */
int listener_open(struct listener *listener, const char *address,
	const struct listen_access *access, struct err *err);

/*
 * From now on, on the current reactor, accepted() gets every new connection: non-blocking, owned by
 * the callee, who may call listener_stop(). When descriptors or memory run out it pauses and tries again.
 */
int listener_start(struct listener *listener, void (*accepted)(struct listener *listener, int fd));
/* Another owner and mode for the file of an open unix socket; nothing where the service manager passed it. */
int listener_set_access(
	struct listener *listener, const struct listen_access *access, struct err *err);
/* Accepts no more; harmless when not started. */
void listener_stop(struct listener *listener);
/* From now on the file stays when it is closed, for a successor that has the same socket. */
void listener_leave_file(struct listener *listener);
/* Closes a stopped listener and removes its file, unless somebody put another one there. */
void listener_close(struct listener *listener);
