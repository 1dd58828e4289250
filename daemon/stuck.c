/*
 * Disks that are stuck; see stuck.h.
 *
 * A timer per export looks a few times in the configured time whether the disk has ended a request since the last
 * look. A disk, a file server or a far end that does not answer is none of our faults: a new server would wait as
 * well, and one that is started again and again serves nobody. But when requests are in hand, and not one
 * coroutine of the reactor waits for anything outside of it (co_suspend_outside()), then no answer can come any
 * more, and a new server, to which the requests are put again, is the only help. If that one gets nowhere from the
 * start, it is no help either: so a disk counts only if it has ended requests before.
 */
#include "daemon/stuck.h"

#include "base/log.h"
#include "base/util.h"
#include "daemon/daemon.h"
#include "daemon/export.h"

#define LOOKS       4 /* in the configured time */
#define LOOK_MAX_NS (15 * NS_PER_SEC)

static void tell(struct export *export, const struct nbd_progress *progress, uint64_t since_ns,
	bool our_fault)
{
	uint64_t seconds = (reactor_now_ns() - since_ns) / NS_PER_SEC;

	log_error("export \"%s\": none of %u request%s in flight has ended for %llu s: %s",
		export->nbd.name, progress->running, progress->running == 1 ? "" : "s",
		(unsigned long long)seconds,
		our_fault ? "a fault in this program" : "its disk does not answer");
}

/* Whether its disk is stuck changes. */
static void set_since(struct export *export, uint64_t since_ns)
{
	uint64_t before_ns = atomic_exchange(&export->stuck.since_ns, since_ns);

	if (!since_ns)
		log_info("export \"%s\": requests end again, after %llu s", export->nbd.name,
			(unsigned long long)((reactor_now_ns() - before_ns) / NS_PER_SEC));
	daemon_status_changed(export->daemon);
}

static void look(struct timer *timer)
{
	struct export *export = container_of(timer, struct export, stuck.timer);
	struct stuck *stuck = &export->stuck;
	struct nbd_progress progress = nbd_export_progress(&export->nbd);
	uint64_t now_ns = reactor_now_ns();
	uint64_t after_ns = atomic_load(&export->daemon->stuck_after_ns);

	if (!progress.running || progress.answered != stuck->answered)
		stuck->still_ns = now_ns;
	stuck->answered = progress.answered;

	uint64_t since_ns = MAX(stuck->still_ns, progress.oldest_ns);
	bool is_stuck = after_ns && now_ns - since_ns >= after_ns;

	bool our_fault = is_stuck && !reactor_outside_waits();

	atomic_store(&stuck->hangs, our_fault && progress.answered);
	if (is_stuck && !atomic_load(&stuck->since_ns)) {
		tell(export, &progress, since_ns, our_fault);
		set_since(export, since_ns);
	} else if (!is_stuck && atomic_load(&stuck->since_ns)) {
		set_since(export, 0);
	}
	timer_arm(timer, now_ns + MIN(after_ns ? after_ns / LOOKS : LOOK_MAX_NS, LOOK_MAX_NS));
}

void stuck_watch(struct export *export)
{
	timer_init(&export->stuck.timer, look);
	timer_arm(&export->stuck.timer, reactor_now_ns());
}

void stuck_unwatch(struct export *export)
{
	timer_cancel(&export->stuck.timer);
}

uint64_t stuck_seconds(const struct stuck *stuck)
{
	uint64_t since_ns = atomic_load(&stuck->since_ns);

	return since_ns ? (reactor_now_ns() - since_ns) / NS_PER_SEC : 0;
}

bool stuck_hangs(const struct daemon *daemon)
{
	bool hangs = false;

	list_for_each (link, &daemon->exports)
		hangs = hangs || atomic_load(&list_entry(link, struct export, link)->stuck.hangs);
	return hangs;
}
