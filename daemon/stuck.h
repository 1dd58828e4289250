/*
 * Disks that are stuck: requests are in hand, and for a configured time (stuck-after) none of them has ended. That is
 * told, and nothing else, unless it can only be our own fault: then the watchdog hears of it.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "rt/reactor.h"

struct daemon;
struct export;

/* Part of an export. */
struct stuck {
	/* On its home reactor. */
	struct timer timer;
	uint64_t answered; /* at the last look */
	uint64_t still_ns; /* since when that has not grown */

	/* Any thread. */
	_Atomic uint64_t since_ns; /* nothing has ended since then; 0: it is not stuck */
	atomic_bool hangs;         /* and nothing outside could still come */
};

/* Home. From open to close of the export's disk. */
void stuck_watch(struct export *export);
void stuck_unwatch(struct export *export);

/* Since when, on any reactor; 0: it is not. */
uint64_t stuck_seconds(const struct stuck *stuck);

/* Main reactor. Whether a disk is stuck that another server might serve better. */
bool stuck_hangs(const struct daemon *daemon);
