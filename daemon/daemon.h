/*
 * The daemon as a tree: one struct that owns everything, from the config down to the doors.
 *
 *	daemon -> config		what the file says, parsed and checked
 *	       -> reactors		[0] is the main one: main(), listeners, handshakes, control, signals
 *	       -> exports -> stack	each on its home reactor, with its doors
 *	       -> NBD door, control	the sockets people come in by
 *
 * Everything here belongs to the main reactor and is touched there only; what an export's home
 * reactor may touch is said in export.h.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "base/err.h"
#include "base/list.h"
#include "blk/blk.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#include "daemon/config.h"

struct nbd_door;
struct control;

struct daemon {
	const struct config *config; /* outlives the daemon */
	struct blk_env env;
	struct reactor **reactors; /* [0] is the main one */
	unsigned reactor_count;
	struct list exports; /* of struct export, by .link, in the order of the config */
	struct nbd_door *nbd_door;
	struct control *control;
	time_t start_time;
	bool stopping;
	struct co_queue stop_wanted; /* main() waits in it */
};

/* Asks main() to drain and end; returns at once. Harmless when asked already. Main reactor. */
void daemon_stop(struct daemon *daemon);
