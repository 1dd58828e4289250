/*
 * The watchdog; see watchdog.h.
 *
 * At each tick a task goes to every reactor and comes back to the main one. When all of them came back
 * since the last tick, that is the sign. One that does not come back delays the sign until it does, so its
 * absence for the whole of the time means: something hangs. So does a disk that is stuck for a reason of our own
 * (stuck.h).
 */
#include "daemon/watchdog.h"

#include <errno.h>
#include <stdlib.h>

#include <systemd/sd-daemon.h>

#include "base/util.h"
#include "daemon/daemon.h"
#include "daemon/stuck.h"
#include "rt/lock.h"

#define TICKS 4 /* in the time after which somebody loses patience */

struct ping {
	struct watchdog *watchdog;
	struct task there, back;
};

struct watchdog {
	struct daemon *daemon;
	uint64_t tick_ns;
	struct timer timer;
	struct co_group away; /* pings that have not come back */
	struct ping pings[];
};

static void ping_back(struct task *task)
{
	co_group_leave(&container_of(task, struct ping, back)->watchdog->away);
}

/* On the reactor that was asked. */
static void ping_there(struct task *task)
{
	struct ping *ping = container_of(task, struct ping, there);

	reactor_post(ping->watchdog->daemon->reactors[0], &ping->back);
}

static void tick(struct timer *timer)
{
	struct watchdog *watchdog = container_of(timer, struct watchdog, timer);
	struct daemon *daemon = watchdog->daemon;

	timer_arm(timer, reactor_now_ns() + watchdog->tick_ns);
	if (watchdog->away.running || stuck_hangs(daemon))
		return;
	keeper_tell(daemon->keeper, KEEPER_ALIVE, "%s", "");
	for (unsigned i = 0; i < daemon->reactor_count; i++) {
		co_group_enter(&watchdog->away);
		reactor_post(daemon->reactors[i], &watchdog->pings[i].there);
	}
}

static uint64_t patience_ns(const struct daemon *daemon)
{
	uint64_t us = 0;

	if (daemon->keeper)
		return daemon->keeper->watchdog_ns;
	return sd_watchdog_enabled(0, &us) > 0 ? us * 1000 : 0;
}

int watchdog_start(struct daemon *daemon, struct watchdog **started, struct err *err)
{
	uint64_t ns = patience_ns(daemon);

	*started = NULL;
	if (!ns)
		return 0;
	struct watchdog *watchdog = calloc(
		1, sizeof(*watchdog) + daemon->reactor_count * sizeof(watchdog->pings[0]));
	if (!watchdog)
		return err_sys(err, ENOMEM, "watchdog");
	watchdog->daemon = daemon;
	watchdog->tick_ns = ns / TICKS;
	co_group_init(&watchdog->away);
	timer_init(&watchdog->timer, tick);
	for (unsigned i = 0; i < daemon->reactor_count; i++) {
		struct ping *ping = &watchdog->pings[i];

		ping->watchdog = watchdog;
		task_init(&ping->there, ping_there);
		task_init(&ping->back, ping_back);
	}
	tick(&watchdog->timer);
	*started = watchdog;
	return 0;
}

suspends void watchdog_stop(struct watchdog *watchdog)
{
	if (!watchdog)
		return;
	timer_cancel(&watchdog->timer);
	co_group_wait(&watchdog->away);
	free(watchdog);
}
