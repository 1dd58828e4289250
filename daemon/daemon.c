/*
 * The life of the daemon: start, serve, stop; see daemon.h.
 *
 * Start: signals blocked, reactors made, sockets bound (a second daemon fails here, before it touches a
 * disk), stacks opened one after the other, kernel devices attached, and only then the doors opened and
 * the service manager told. What fails on the way takes the rest down by the same code as a stop
 * does, with env.start_failed set: files that were created are removed again.
 *
 * Stop: no new clients, no new calls; calls and requests under way finish; exports close side by side.
 * At the deadline (stop-timeout) connections are cut, and what is still stuck then is named. Requests that
 * cannot even finish after STOP_STEP more are given up: a process that never ends is worse, for the
 * service manager would kill it without a word. An export that is past them, and takes its time to
 * flush, is never given up.
 */
#include "daemon/daemon.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/control.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "daemon/nbd_door.h"
#include "daemon/privileges.h"
#include "daemon/watchdog.h"
#include "daemon/reload.h"

#define STOP_STEP_NS (5 * NS_PER_SEC)

/* --- signals ---------------------------------------------------------------------------------- */

void daemon_stop(struct daemon *daemon)
{
	daemon->stopping = true;
	co_queue_wake_all(&daemon->stop_wanted);
}

static void signals_readable(struct watch *watch, uint32_t epoll_events)
{
	struct daemon *daemon = container_of(watch, struct daemon, signals);
	struct signalfd_siginfo info;

	while (read(watch->fd, &info, sizeof(info)) == sizeof(info)) {
		if (info.ssi_signo == SIGHUP) {
			log_info("SIGHUP: reloading %s", daemon->config->path);
			reload_by_signal(daemon);
		} else if (daemon->stopping) {
			log_info("stopping already; waiting for requests in flight");
		} else {
			log_info("SIG%s: stopping", sigabbrev_np((int)info.ssi_signo));
			daemon_stop(daemon);
		}
	}
}

/* In every thread: signals come by the signalfd only. */
static int block_signals(struct daemon *daemon, struct err *err)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a file size limit is an error of the write, EFBIG */
	if (pthread_sigmask(SIG_BLOCK, &set, NULL))
		return err_sys(err, errno, "cannot block signals");
	daemon->signals.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (daemon->signals.fd < 0)
		return err_sys(err, errno, "cannot create a signalfd");
	return 0;
}

/* --- changes of what is served ---------------------------------------------------------------- */

void daemon_apply_config(struct daemon *daemon)
{
	config_apply_log_level(daemon->config);
	atomic_store(&daemon->stuck_after_ns, (uint64_t)daemon->config->stuck_after_s * NS_PER_SEC);
}

uint64_t daemon_stop_timeout_ns(const struct daemon *daemon)
{
	return (uint64_t)daemon->config->stop_timeout_s * NS_PER_SEC;
}

suspends int daemon_begin_change(struct daemon *daemon, struct err *err)
{
	co_mutex_lock(&daemon->change);
	if (!daemon->stopping)
		return 0;
	co_mutex_unlock(&daemon->change);
	return err_set(err, ESHUTDOWN, "the daemon is stopping");
}

void daemon_end_change(struct daemon *daemon)
{
	co_mutex_unlock(&daemon->change);
	daemon_tell_status(daemon);
}

/* --- reactors --------------------------------------------------------------------------------- */

static void *reactor_thread(void *arg)
{
	reactor_run(arg);
	return NULL;
}

static int start_reactors(struct daemon *daemon, struct err *err)
{
	const struct config *config = daemon->config;

	daemon->reactors = calloc(config->reactor_count, sizeof(*daemon->reactors));
	daemon->threads = calloc(config->reactor_count, sizeof(*daemon->threads));
	if (!daemon->reactors || !daemon->threads)
		return err_sys(err, ENOMEM, "cannot start");
	for (unsigned i = 0; i < config->reactor_count; i++) {
		struct reactor *reactor;
		int ret = reactor_create(&reactor, config->engine, err);
		if (ret)
			return ret;
		if (i)
			ret = pthread_create(&daemon->threads[i], NULL, reactor_thread, reactor);
		if (ret) {
			reactor_free(reactor);
			return err_sys(err, ret, "cannot start a thread");
		}
		daemon->reactors[daemon->reactor_count++] = reactor;
	}
	return 0;
}

static void end_reactors(struct daemon *daemon)
{
	/* The main one last: the others' last act may be a word to it. */
	for (unsigned i = daemon->reactor_count; i-- > 0;) {
		if (i) {
			reactor_stop(daemon->reactors[i]);
			pthread_join(daemon->threads[i], NULL);
		}
		reactor_free(daemon->reactors[i]);
	}
	free(daemon->reactors);
	free(daemon->threads);
}

/* --- start ------------------------------------------------------------------------------------ */

static suspends int start_exports(struct daemon *daemon, struct err *err)
{
	const struct config *config = daemon->config;
	int ret = 0;

	for (size_t i = 0; i < config->export_count && !ret && !daemon->stopping; i++) {
		struct export *export;
		if (daemon_must_wait(daemon, config->exports[i]->name))
			continue;
		keeper_tell(daemon->keeper, KEEPER_STATUS, "Opening export \"%s\", %zu of %zu",
			config->exports[i]->name, i + 1, config->export_count);
		ret = export_start(daemon, config->exports[i], &export, err);
		if (ret && daemon_recovers(daemon)) {
			daemon_start_later(daemon, config->exports[i], err);
			ret = 0;
		}
	}
	daemon_drop_strangers(daemon);
	return ret;
}

suspends int daemon_attach_wanted(struct daemon *daemon, struct export *export, struct err *err)
{
	const char *name = export->config->name;

	if (daemon->stopping || export->kernel || daemon_wants_detached(daemon, name))
		return 0;
	export_take_up_left(export);
	if (!*export->config->device)
		return 0;
	keeper_tell(daemon->keeper, KEEPER_STATUS, "Attaching export \"%s\" to the kernel", name);
	int ret = export_attach(export, NULL, err);
	if (ret)
		err_place(err, conf_get(export->config->conf, "device")->where);
	if (ret && daemon_recovers(daemon)) {
		log_error("%s", err->text);
		ret = 0;
	}
	return ret;
}

/* After all stacks are open: so that no device appears for a start that fails on a disk. */
static suspends int attach_devices(struct daemon *daemon, struct err *err)
{
	int ret = 0;

	list_for_each (link, &daemon->exports)
		if (!ret)
			ret = daemon_attach_wanted(
				daemon, list_entry(link, struct export, link), err);
	return ret;
}

/* Of what is served, or is not; "" for none. */
static void append_count(
	char *text, size_t text_len, unsigned count, const char *one, const char *several)
{
	size_t used = strlen(text);

	if (count)
		snprintf(
			text + used, text_len - used, ", %u %s", count, count == 1 ? one : several);
}

void daemon_tell_status(const struct daemon *daemon)
{
	unsigned exports = 0, devices = 0, lost = 0, stuck = 0, waiting = 0;
	char text[KEEPER_TEXT_LEN / 2] = "";

	if (!daemon->ready || daemon->stopping)
		return;
	list_for_each (link, &daemon->exports) {
		const struct export *export = list_entry(link, struct export, link);

		exports++;
		devices += export->kernel && !kernel_lost(export->kernel) &&
			   !kernel_is_held(export->kernel);
		waiting += export->kernel && kernel_is_held(export->kernel);
		lost += export->kernel && kernel_lost(export->kernel);
		stuck += atomic_load(&export->stuck.since_ns) != 0;
	}
	list_for_each (link, &daemon->kept_doors)
		waiting++;
	append_count(text, sizeof(text), devices, "as kernel device", "as kernel devices");
	append_count(text, sizeof(text), lost, "kernel device LOST", "kernel devices LOST");
	append_count(text, sizeof(text), waiting, "kernel device WAITS for its disk",
		"kernel devices WAIT for their disks");
	append_count(text, sizeof(text), stuck, "disk STUCK", "disks STUCK");
	keeper_tell(daemon->keeper, KEEPER_STATUS, "Serving %u export%s%s%s", exports,
		exports == 1 ? "" : "s", text,
		*daemon->config_note ? ", the config file is NOT IN FORCE" : "");
}

static void tell_status(struct task *task)
{
	struct daemon *daemon = container_of(task, struct daemon, status_task);

	atomic_store(&daemon->status_posted, false);
	daemon_tell_status(daemon);
}

void daemon_status_changed(struct daemon *daemon)
{
	if (!atomic_exchange(&daemon->status_posted, true))
		reactor_post(daemon->reactors[0], &daemon->status_task);
}

static suspends int start(struct daemon *daemon, struct err *err)
{
	int ret = watch_add(&daemon->signals, daemon->signals.fd, EPOLLIN, signals_readable);

	if (ret)
		return err_sys(err, -ret, "cannot watch for signals");
	if (daemon->keeper)
		ret = daemon_meet_keeper(daemon, err);
	if (!ret)
		ret = watchdog_start(daemon, &daemon->watchdog, err);
	if (!ret && !daemon->inherited && !daemon->unknown)
		ret = daemon_leave_config(daemon, daemon->config, -1, err);
	if (!ret)
		ret = start_exports(daemon, err);
	if (!ret)
		ret = attach_devices(daemon, err);
	if (!ret && daemon->later)
		reload_exports_of_file(daemon);
	if (daemon->stopping)
		return ret; /* a signal came before anybody was let in */
	if (!ret)
		ret = nbd_door_start(daemon->nbd_door, err);
	if (!ret)
		ret = control_start(daemon->control, err);
	if (ret)
		return ret;
	log_info("blkstackd %s is ready: %zu export%s, engine %s, %u reactor%s", BLKSTACK_VERSION,
		daemon->config->export_count, daemon->config->export_count == 1 ? "" : "s",
		reactor_engine_name(daemon->reactors[0]), daemon->reactor_count,
		daemon->reactor_count == 1 ? "" : "s");
	daemon->ready = true;
	daemon_tell_status(daemon);
	keeper_tell(daemon->keeper, KEEPER_READY, "%s", "");
	if (daemon->inherited)
		reload_look_at_file(daemon);
	return 0;
}

/* --- stop ------------------------------------------------------------------------------------- */

struct stopping {
	struct daemon *daemon;
	struct export *export; /* NULL: the control socket */
};

static suspends void stop_one(void *arg)
{
	struct stopping *stopping = arg;

	if (stopping->export)
		export_stop(stopping->export, daemon_stop_timeout_ns(stopping->daemon));
	else
		control_stop(stopping->daemon->control);
}

static void stop_is_late(struct timer *timer)
{
	struct daemon *daemon = container_of(timer, struct daemon, stop_late);
	bool flushing = false;

	list_for_each (link, &daemon->closing)
		flushing = flushing || list_entry(link, struct export, link)->drained;
	if (!flushing && reactor_now_ns() >= daemon->stop_deadline_ns + STOP_STEP_NS) {
		log_error("giving up on what is stuck; ending without closing it");
		_exit(EXIT_FAILURE);
	}
	list_for_each (link, &daemon->closing)
		export_report_stuck(list_entry(link, struct export, link));
	timer_arm(timer, reactor_now_ns() + STOP_STEP_NS);
}

static suspends void stop(struct daemon *daemon)
{
	unsigned count = 1;
	struct co_group group;

	daemon->stopping = true;
	if (daemon->parking)
		keeper_tell(daemon->keeper, KEEPER_STATUS, "Handing over to another server");
	else
		keeper_tell(daemon->keeper, KEEPER_STOPPING, "Finishing requests in flight");
	daemon->stop_deadline_ns = reactor_now_ns() + daemon_stop_timeout_ns(daemon);
	timer_arm(&daemon->stop_late, daemon->stop_deadline_ns + NS_PER_SEC);
	nbd_door_stop(daemon->nbd_door);
	/* A reload under way ends at its next step; after it nothing is added or removed any more. */
	co_mutex_lock(&daemon->change);
	co_mutex_unlock(&daemon->change);

	list_for_each (link, &daemon->exports)
		count++;
	CLEANUP(free) struct stopping *stopping = calloc(count, sizeof(*stopping));
	if (!stopping)
		abort();
	stopping[0] = (struct stopping){ daemon, NULL };
	count = 1;
	list_for_each (link, &daemon->exports)
		stopping[count++] = (struct stopping){ daemon,
			list_entry(link, struct export, link) };
	co_group_init(&group);
	for (unsigned i = 0; i < count; i++)
		co_group_start(&group, stop_one, &stopping[i]);
	co_group_wait(&group);
	co_group_wait(&daemon->recovering);
	daemon_drop_kept(daemon);
	if (daemon->parking) {
		daemon_leave_listeners(daemon);
		keeper_tell(daemon->keeper, KEEPER_PARKED, "%s", "");
	}
	nbd_door_close(daemon->nbd_door);
	daemon->nbd_door = NULL;
	timer_cancel(&daemon->stop_late);
	watchdog_stop(daemon->watchdog);
	keeper_link_end(daemon->keeper);
	watch_remove(&daemon->signals);
}

/* --- the whole -------------------------------------------------------------------------------- */

struct run {
	struct daemon *daemon;
	struct err *err;
	int ret;
};

static suspends void serve(void *arg)
{
	struct run *run = arg;
	struct daemon *daemon = run->daemon;

	co_mutex_lock(&daemon->change);
	run->ret = start(daemon, run->err);
	co_mutex_unlock(&daemon->change);
	if (run->ret && daemon_recovers(daemon)) {
		/* As if it had been killed: what the keeper holds is not ours to give back. */
		log_error("%s", run->err->text);
		_exit(EXIT_FAILURE);
	}
	daemon->env.start_failed = run->ret != 0;
	while (!run->ret && !daemon->stopping)
		co_queue_wait(&daemon->stop_wanted);
	stop(daemon);
}

/* The doors' sockets; plain code, which may block. */
static int bind_sockets(struct daemon *daemon, struct err *err)
{
	int ret = control_open(daemon, &daemon->control, err);

	return ret ? ret : nbd_door_open(&daemon->nbd_door, daemon->config, err);
}

static void log_notice(const struct blk *blk, const char *text)
{
	log_warning("%s: %s: %s", blk->conf->where, blk->ops->name, text);
}

/*
 * Sockets are bound, and keys read, with the rights of who said so, the exports opened with those of the user that the settings
 * name.
 */
static int bind_and_drop(struct daemon *daemon, const struct config_start *start, struct err *err)
{
	const struct config *config = daemon->config;
	bool by_user = start->owner != (uid_t)-1;
	int ret = by_user ? privileges_drop(start->owner, start->group, err) : 0;

	if (!ret && daemon->keeper && start->inherited)
		daemon->settings = daemon->source->in_force.settings;
	else if (!ret && daemon->keeper)
		ret = daemon->settings = in_force_settings(config, err);
	if (ret >= 0)
		ret = bind_sockets(daemon, err);
	if (!ret && !by_user && config->uid != (uid_t)-1)
		ret = privileges_drop(config->uid, config->gid, err);
	return ret;
}

int daemon_run(const struct config_source *source, struct config_start *start, int keeper_sock,
	struct err *err)
{
	struct daemon daemon = {
		.source = source,
		.config = start->config,
		.later = start->later,
		.inherited = start->inherited,
		.unknown = start->unknown,
		.settings = -1,
		.start_time = time(NULL),
		.signals.fd = -1,
	};
	struct run run = { .daemon = &daemon, .err = err };

	daemon.keeper_sock = keeper_sock;
	daemon.keeper = keeper_sock >= 0 ? &daemon.keeper_link : NULL;
	list_init(&daemon.exports);
	list_init(&daemon.closing);
	list_init(&daemon.kept_doors);
	co_group_init(&daemon.recovering);
	co_queue_init(&daemon.stop_wanted);
	co_mutex_init(&daemon.change);
	timer_init(&daemon.stop_late, stop_is_late);
	task_init(&daemon.status_task, tell_status);
	daemon_apply_config(&daemon);
	if (blk_env_init(&daemon.env)) {
		config_start_free(start);
		return err_sys(err, ENOMEM, "cannot start");
	}
	daemon.env.notice = log_notice;
	run.ret = block_signals(&daemon, err);
	if (!run.ret)
		run.ret = bind_and_drop(&daemon, start, err);
	if (!run.ret)
		run.ret = start_reactors(&daemon, err);
	if (!run.ret)
		reactor_run_main(daemon.reactors[0], serve, &run);
	nbd_door_abandon(daemon.nbd_door);
	control_free(daemon.control);
	end_reactors(&daemon);
	blk_env_fini(&daemon.env);
	config_free(daemon.config);
	config_free(daemon.later);
	if (daemon.settings >= 0)
		close(daemon.settings);
	if (daemon.signals.fd >= 0)
		close(daemon.signals.fd);
	if (!run.ret)
		log_info("stopped");
	return run.ret;
}
