/*
 * A sign of life, for the keeper or the service manager, as long as every reactor turns: all of them get through
 * their events, their tasks and what was ready, again and again; and no disk has requests that wait for nothing any
 * more. A disk that does not answer is no reason to kill the daemon; a thread that hangs is.
 */
#pragma once

#include <stdint.h>

#include "base/err.h"
#include "rt/reactor.h"

struct daemon;
struct watchdog;

/* Main reactor. Nothing happens (*watchdog is NULL) when nobody wants to know. */
int watchdog_start(struct daemon *daemon, struct watchdog **watchdog, struct err *err);
/* NULL is fine. Returns when no reactor has anything of it. */
suspends void watchdog_stop(struct watchdog *watchdog);
