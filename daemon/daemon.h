/*
 * The daemon as a tree: one struct that owns everything, from the reactors down to the doors.
 *
 *	daemon -> reactors		[0] is the main one: listeners, handshakes, control, signals
 *	       -> NBD door, control	the sockets people come in by
 *	       -> exports -> stack	each on its home reactor, with its doors
 *
 * Everything here belongs to the main reactor and is touched there only; what an export's home
 * reactor may touch is said in export.h.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "base/err.h"
#include "base/list.h"
#include "blk/blk.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#include "daemon/config-source.h"
#include "daemon/keeper-link.h"

struct kernel_door;
struct nbd_door;
struct control;
struct export;
struct listener;
struct watchdog;

struct daemon {
	const struct config_source *source;
	struct config *config;   /* owned; a reload puts another in its place */
	struct config *later;    /* at a start: whose exports are to be applied, or NULL */
	bool inherited, unknown; /* as in config_start, until a reload */
	int settings; /* with a keeper: the settings in force, as the next server gets them; -1 */
	char config_note
		[KEEPER_TEXT_LEN]; /* in what the config file differs from what is in force; "": not known to */
	struct co_mutex
		change; /* held by whoever adds or removes exports: start, reload, stop ... */
	struct blk_env env;
	struct reactor **reactors; /* [0] is the main one, on the thread of daemon_run() */
	pthread_t *threads;        /* of the others; [0] is not used */
	unsigned reactor_count;
	struct list exports; /* of struct export, by .link, in the order of the config */
	struct list closing; /* exports being stopped */
	struct nbd_door *nbd_door;
	struct control *control;
	time_t start_time; /* CLOCK_REALTIME, seconds */

	struct keeper_link *keeper; /* NULL: there is no keeper */
	struct list kept_doors; /* devices of servers before this one, until their exports come */
	struct co_group recovering; /* exports that try again to start */
	struct keeper_link keeper_link;
	int keeper_sock;

	struct watchdog *watchdog;       /* NULL: nobody asked for one */
	_Atomic uint64_t stuck_after_ns; /* of the config, for all reactors */
	atomic_bool status_posted;
	struct task status_task;
	struct watch signals; /* a signalfd */
	bool stopping;
	bool parking;     /* stopping, and a successor takes over what the keeper holds */
	bool keeper_ends; /* and so does the keeper: devices that die with it are given back */
	bool ready;       /* once everything was started */
	struct co_queue stop_wanted; /* where daemon_run() waits */
	struct timer stop_late;      /* what is stuck at the end gets named, then given up */
	uint64_t stop_deadline_ns;
};

/*
 * Opens the sockets and the exports, serves until asked to stop by a signal or daemon_stop(), and takes
 * everything down again. An error is one of starting: it leaves nothing behind. Plain code; one daemon per
 * process, since it takes the signals. Takes over what is in start, which is what source gave; reloads
 * ask it again. keeper_sock: the socket to the keeper, -1 without one.
 */
int daemon_run(const struct config_source *source, struct config_start *start, int keeper_sock,
	struct err *err);

/* For whoever adds or removes exports: one at a time, and none once the daemon stops (-ESHUTDOWN). */
suspends int daemon_begin_change(struct daemon *daemon, struct err *err);
void daemon_end_change(struct daemon *daemon);

/* What a new config changes at once. */
void daemon_apply_config(struct daemon *daemon);

/* How long requests of an export that goes away have to finish. */
uint64_t daemon_stop_timeout_ns(const struct daemon *daemon);

/*
 * Once it is open: the device that its config names, unless somebody detached it, or one that was left. A server that
 * recovers logs the error and goes on.
 */
suspends int daemon_attach_wanted(struct daemon *daemon, struct export *export, struct err *err);

/* Tells the service manager how many exports and devices are served now, and what is wrong with them. */
void daemon_tell_status(const struct daemon *daemon);
/* The same, soon. Any thread. */
void daemon_status_changed(struct daemon *daemon);

/* In daemon-keeper.c. Says hello to the keeper, and looks at what it holds. */
suspends int daemon_meet_keeper(struct daemon *daemon, struct err *err);
/* The files of sockets stay, since a successor listens on them. */
void daemon_leave_listeners(struct daemon *daemon);
/* Whether a server before this one served already: then one export's error is not the end of all. */
bool daemon_recovers(const struct daemon *daemon);
/* What the operator said of an export's device, for the servers after this one: it stays detached. */
suspends void daemon_note_detached(struct daemon *daemon, const char *export, bool detached);
suspends bool daemon_wants_detached(struct daemon *daemon, const char *export);
/* Tries again and again to start an export that did not, for the reason in err. */
void daemon_start_later(
	struct daemon *daemon, const struct config_export *config, const struct err *err);
/*
 * What is in force, for the next server: as long as a device is held, the stack there is the one that it has. config: what
 * is said of exports that do not run; settings: of it, or -1: as before.
 */
suspends int daemon_leave_config(
	struct daemon *daemon, const struct config *config, int settings, struct err *err);
/* Whether the export has a device that waits, and nobody knows what it was served from. */
bool daemon_must_wait(struct daemon *daemon, const char *export);
/* Gives up the devices of exports that the config does not have. */
suspends void daemon_drop_strangers(struct daemon *daemon);
/* Whether a device is for the next server, or the next start. */
bool daemon_leaves(const struct daemon *daemon, const struct kernel_door *door);
/* The end of those that nobody took over. */
suspends void daemon_drop_kept(struct daemon *daemon);
/* The listening sockets that there are now are kept for a successor; harmless without a keeper. */
suspends void daemon_keep_listeners(struct daemon *daemon);

/*
 * Hands over to another server, of the program that is installed now: with a keeper only. Returns when that is
 * certain to begin. -EALREADY: not force, and the same program is installed.
 */
suspends int daemon_hand_over(struct daemon *daemon, bool force, struct err *err);

/* Asks for the end; returns at once. Harmless when asked already. Main reactor. */
void daemon_stop(struct daemon *daemon);
