/*
 * Who holds a kernel device; see kernel-hold.h.
 *
 * Here: calls that block run on a thread made for the call. They are rare, and a thread of the shared pool
 * could be waiting for a request that needs that very pool to be answered. There: they are requests to the
 * keeper, which does the same.
 */
#include "daemon/kernel-hold.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/kernel-name.h"

/* --- blocking calls, when it is held here ------------------------------------------------------ */

struct call {
	int (*fn)(struct call *call);
	struct kernel_hold *hold;
	uint64_t size_bytes;
	bool force;
	struct err *err;

	int ret;
	struct reactor *reactor;
	struct co *co;
	struct task returned;
};

static void call_returned(struct task *task)
{
	co_wake(container_of(task, struct call, returned)->co);
}

static void *call_thread(void *arg)
{
	struct call *call = arg;

	call->ret = call->fn(call);
	reactor_post(call->reactor, &call->returned);
	return NULL;
}

/* Runs call->fn on a thread of its own; what it returns. */
static suspends int call_blocking(struct call *call)
{
	pthread_attr_t attr;
	pthread_t thread;
	int ret;

	call->reactor = reactor_self();
	call->co = co_self();
	task_init(&call->returned, call_returned);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	ret = pthread_create(&thread, &attr, call_thread, call);
	pthread_attr_destroy(&attr);
	if (ret)
		return err_sys(call->err, ret, "a thread for a kernel device");
	co_suspend();
	return call->ret;
}

/* On the device's thread. */
static void dev_ended(void *arg, int reason)
{
	struct kernel_hold *hold = arg;

	hold->end_reason = reason;
	reactor_post(hold->reactor, &hold->ended_task);
}

static int call_claim(struct call *call)
{
	struct kernel_hold *hold = call->hold;

	return kernel_dev_claim(&hold->opts, dev_ended, hold, &hold->dev, &hold->ends, call->err);
}

static int call_settle(struct call *call)
{
	struct kernel_hold *hold = call->hold;
	struct err unnamed = { 0 };
	int named = kernel_name_publish(hold->name, hold->opts.export, &unnamed);
	int ret = kernel_dev_settle(hold->dev, call->err);

	if (ret || !named)
		return ret;
	*call->err = unnamed;
	return named;
}

static int call_resize(struct call *call)
{
	return kernel_dev_resize(call->hold->dev, call->size_bytes, call->err);
}

static int call_users(struct call *call)
{
	return kernel_dev_users(call->hold->dev, true, call->err);
}

static int call_release(struct call *call)
{
	return kernel_dev_release(call->hold->dev, call->force, call->err);
}

static int call_free(struct call *call)
{
	if (call->force)
		kernel_dev_disown(call->hold->dev);
	if (!kernel_dev_stays(call->hold->dev))
		kernel_name_forget(call->hold->name);
	kernel_dev_free(call->hold->dev);
	return 0;
}

/* --- the end of a device ---------------------------------------------------------------------- */

static void ended(struct kernel_hold *hold)
{
	hold->ended = true;
	if (hold->on_end)
		hold->on_end(hold);
	co_queue_wake_all(&hold->end);
}

static void ended_here(struct task *task)
{
	ended(container_of(task, struct kernel_hold, ended_task));
}

static void ended_there(struct keeper_device *device, int reason)
{
	struct kernel_hold *hold = container_of(device, struct kernel_hold, kept);

	hold->end_reason = reason;
	ended(hold);
}

/* --- claiming, taking over -------------------------------------------------------------------- */

void kernel_hold_init(struct kernel_hold *hold, struct keeper_link *keeper,
	const struct kernel_dev_opts *opts, void (*on_end)(struct kernel_hold *hold))
{
	*hold = (struct kernel_hold){
		.keeper = keeper,
		.opts = *opts,
		.journal = -1,
		.on_end = on_end,
		.reactor = reactor_self(),
		.kept.ended = ended_there,
	};
	list_init(&hold->kept.link);
	co_queue_init(&hold->end);
	task_init(&hold->ended_task, ended_here);
}

static void drop_ends(struct kernel_hold *hold)
{
	kernel_ends_close(&hold->ends);
	if (hold->journal >= 0)
		close(take_fd(&hold->journal));
}

static void take_ends(struct kernel_hold *hold, struct keeper_fds *fds)
{
	hold->ends.count = MIN(fds->count / 2, (unsigned)KERNEL_CONNECTIONS_MAX);
	for (unsigned i = 0; i < hold->ends.count; i++) {
		hold->ends.server[i] = fds->fd[i];
		hold->ends.driver[i] = fds->fd[hold->ends.count + i];
	}
	if (fds->count > 2 * hold->ends.count)
		hold->journal = fds->fd[2 * hold->ends.count];
	fds->count = 0;
}

static suspends int claim_there(struct kernel_hold *hold, struct err *err)
{
	struct keeper_message message = {
		.block_size = hold->opts.block_size,
		.timeout_s = hold->opts.timeout_s,
		.dead_timeout_s = hold->opts.dead_timeout_s,
		.flags = hold->opts.flags,
		.mode = (uint32_t)hold->opts.mode,
		.connections = hold->opts.connections,
		.size_bytes = hold->opts.size_bytes,
		.by_hand = hold->by_hand,
	};
	struct keeper_fds fds;

	snprintf(message.export, sizeof(message.export), "%s", hold->opts.export);
	snprintf(message.device, sizeof(message.device), "%s", hold->opts.device);
	int ret = keeper_call(hold->keeper, KEEPER_CLAIM, &message, -1, &fds, err);
	if (ret)
		return ret;
	take_ends(hold, &fds);
	snprintf(hold->name, sizeof(hold->name), "%.*s", KERNEL_NAME_LEN - 1, message.device);
	hold->opts.mode = (enum kernel_dev_mode)message.mode;
	hold->opts.connections = hold->ends.count;
	hold->adopted = message.adopted;
	hold->kept.slot = message.slot;
	list_push_back(&hold->keeper->devices, &hold->kept.link);
	return 0;
}

suspends int kernel_hold_claim(struct kernel_hold *hold, struct err *err)
{
	struct call call = { .fn = call_claim, .hold = hold, .err = err };

	if (hold->keeper)
		return claim_there(hold, err);
	int ret = call_blocking(&call);
	if (ret)
		return ret;
	snprintf(hold->name, sizeof(hold->name), "%s", kernel_dev_name(hold->dev));
	hold->opts.mode = kernel_dev_mode(hold->dev);
	hold->adopted = kernel_dev_adopted(hold->dev);
	hold->opts.connections = hold->ends.count;
	return 0;
}

suspends int kernel_hold_take_over(struct kernel_hold *hold, struct keeper_link *keeper,
	uint32_t *slot, char export_name[KEEPER_EXPORT_LEN], struct err *err)
{
	struct keeper_message message;
	struct keeper_fds fds;
	int ret;

	/* A predecessor's call may be under way that gives it other connections. */
	for (;;) {
		message = (struct keeper_message){ .slot = *slot };
		ret = keeper_call(keeper, KEEPER_NEXT, &message, -1, &fds, err);
		if (ret != -EAGAIN)
			break;
		co_sleep_ns(NS_PER_SEC / 50);
	}
	if (ret)
		return ret;
	const struct kernel_dev_opts opts = {
		.mode = (enum kernel_dev_mode)message.mode,
		.size_bytes = message.size_bytes,
		.block_size = message.block_size,
		.connections = message.connections,
		.timeout_s = message.timeout_s,
		.dead_timeout_s = message.dead_timeout_s,
		.flags = (uint16_t)message.flags,
	};
	kernel_hold_init(hold, keeper, &opts, NULL);
	take_ends(hold, &fds);
	snprintf(hold->name, sizeof(hold->name), "%.*s", KERNEL_NAME_LEN - 1, message.device);
	snprintf(export_name, KEEPER_EXPORT_LEN, "%s", message.export);
	hold->ended = message.ended;
	hold->end_reason = message.ended ? (int)message.ended - 1 : 0;
	hold->taken_over = message.restarts;
	hold->adopted = message.adopted;
	hold->settled = message.settled;
	hold->by_hand = message.by_hand;
	hold->kept.slot = message.slot;
	*slot = message.slot + 1;
	list_push_back(&keeper->devices, &hold->kept.link);
	return 0;
}

void kernel_hold_rename(
	struct kernel_hold *hold, const char *export, void (*on_end)(struct kernel_hold *hold))
{
	hold->opts.export = export;
	hold->on_end = on_end;
}

/* --- what is done with it --------------------------------------------------------------------- */

static suspends int request(struct kernel_hold *hold, enum keeper_word word, uint64_t size_bytes,
	bool force, struct err *err)
{
	for (;;) {
		struct keeper_message message = {
			.slot = hold->kept.slot,
			.size_bytes = size_bytes,
			.force = force,
		};
		int ret = keeper_call(hold->keeper, word, &message, -1, NULL, err);

		/* A predecessor's is under way, which may need this server to answer the device's requests. */
		if (ret != -EALREADY)
			return ret;
		co_sleep_ns(NS_PER_SEC / 50);
	}
}

suspends int kernel_hold_set_journal(struct kernel_hold *hold, int fd, struct err *err)
{
	struct keeper_message message = { .slot = hold->kept.slot };

	return keeper_call(hold->keeper, KEEPER_JOURNAL, &message, fd, NULL, err);
}

suspends int kernel_hold_reconnect(struct kernel_hold *hold, struct err *err)
{
	struct keeper_message message = { .slot = hold->kept.slot };
	struct keeper_fds fds;
	int ret = keeper_call(hold->keeper, KEEPER_RECONNECT, &message, -1, &fds, err);

	if (ret)
		return ret;
	drop_ends(hold);
	take_ends(hold, &fds);
	hold->opts.connections = hold->ends.count;
	hold->settled = false;
	return 0;
}

suspends int kernel_hold_settle(struct kernel_hold *hold, struct err *err)
{
	struct call call = { .fn = call_settle, .hold = hold, .err = err };

	return hold->keeper ? request(hold, KEEPER_SETTLE, 0, false, err) : call_blocking(&call);
}

suspends int kernel_hold_resize(struct kernel_hold *hold, uint64_t size_bytes, struct err *err)
{
	struct call call = {
		.fn = call_resize, .hold = hold, .size_bytes = size_bytes, .err = err
	};
	int ret = hold->keeper ? request(hold, KEEPER_RESIZE, size_bytes, false, err)
			       : call_blocking(&call);

	if (!ret)
		hold->opts.size_bytes = size_bytes;
	return ret;
}

suspends int kernel_hold_check_unused(struct kernel_hold *hold, struct err *err)
{
	struct call call = { .fn = call_users, .hold = hold, .err = err };

	return hold->keeper ? request(hold, KEEPER_USERS, 0, false, err) : call_blocking(&call);
}

suspends int kernel_hold_look_for_users(struct kernel_hold *hold, struct err *err)
{
	return request(hold, KEEPER_USERS, 0, true, err);
}

suspends int kernel_hold_release(struct kernel_hold *hold, bool force, struct err *err)
{
	struct call call = { .fn = call_release, .hold = hold, .force = force, .err = err };

	return hold->keeper ? request(hold, KEEPER_RELEASE, 0, force, err) : call_blocking(&call);
}

static suspends void free_there(struct kernel_hold *hold, bool lost)
{
	struct err err;

	/* A call of a predecessor's is under way, as older keepers say: the keeper must not keep what nobody knows of. */
	while (request(hold, KEEPER_FREE, 0, lost, &err) == -EBUSY)
		co_sleep_ns(NS_PER_SEC / 10);
}

suspends void kernel_hold_disconnect(struct kernel_hold *hold, bool lost)
{
	struct call call = { .fn = call_free, .hold = hold, .force = lost };

	if (hold->keeper && *hold->name) {
		free_there(hold, lost);
	} else if (hold->dev) {
		/* Without a thread it blocks this reactor: the lesser evil at the end of memory. */
		if (call_blocking(&call))
			call_free(&call);
		while (!hold->ended)
			co_queue_wait(&hold->end);
	}
}

void kernel_hold_leave(struct kernel_hold *hold)
{
	list_remove(&hold->kept.link);
	drop_ends(hold);
}
