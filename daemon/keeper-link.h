/*
 * The server's side of the socket to the keeper.
 *
 * Everything runs on the main reactor. A server without a keeper has no link (NULL): where that is allowed it says
 * so, and the words for the service manager go to it directly then.
 *
 * When the keeper is gone this process ends at once and touches nothing: the devices are not its to give back.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/list.h"
#include "daemon/keeper-wire.h"
#include "rt/reactor.h"

struct keeper_link {
	int sock; /* of the process: never closed */
	struct watch watch;
	uint32_t last_id;
	struct list calls;   /* that wait for an answer */
	struct list devices; /* of struct keeper_device */

	/* What the keeper said at first. */
	uint32_t restarts;              /* servers before this one */
	char last_end[KEEPER_TEXT_LEN]; /* how the last one ended, "" for the first */
	uint64_t watchdog_ns;           /* ALIVE is wanted twice in that time; 0: never */

	/* The owner's. Called in plain code. */
	void (*on_stop)(struct keeper_link *link);
	void (*on_reload)(struct keeper_link *link);
	void (*on_park)(struct keeper_link *link);
};

/* One that wants to hear of its end. */
struct keeper_device {
	struct list link; /* in keeper_link.devices */
	uint32_t slot;
	void (*ended)(struct keeper_device *device, int reason); /* plain code */
};

/* Watches the socket and says hello. An error is a keeper of another version. */
suspends int keeper_link_start(struct keeper_link *link, int sock, struct err *err);
void keeper_link_end(struct keeper_link *link); /* NULL is fine; the keeper hears no more */

/*
 * A request with its answer, which replaces *message. fd goes along unless it is -1, and stays the caller's;
 * fds (may be NULL: none are expected) become the caller's. What the keeper refused is in err.
 */
suspends int keeper_call(struct keeper_link *link, enum keeper_word word,
	struct keeper_message *message, int fd, struct keeper_fds *fds, struct err *err);

/* The same with several descriptors, which stay the caller's. */
suspends int keeper_call_with(struct keeper_link *link, enum keeper_word word,
	struct keeper_message *message, const int *sent, unsigned sent_count,
	struct keeper_fds *fds, struct err *err);

/*
 * READY, STATUS, RELOADING, STOPPING, PARKED, ALIVE, with what the service does now, for people ("": as before).
 * A NULL link: to the service manager.
 */
void keeper_tell(struct keeper_link *link, enum keeper_word word, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
