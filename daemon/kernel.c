/*
 * The kernel door; see kernel.h.
 *
 * A door is a device that somebody holds (kernel-hold.h) and the connections that serve it. With a keeper the device
 * outlives this process, and a successor takes it over.
 *
 * The driver gives a device up when it is told to, or by itself: somebody else disconnected it, a
 * request timed out, the server's end was closed after a protocol error. Then the door is "lost": it
 * stays, so that `status` can tell, until it is detached. Users of a lost device get errors; the
 * driver can be started again on it only when the last of them is gone.
 */
#include "daemon/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/export.h"
#include "daemon/kernel-hold.h"
#include "nbd/journal.h"
#include "nbd/server.h"
#include "rt/lock.h"
#include "rt/reactor.h"

#ifndef PR_SET_IO_FLUSHER /* Linux 5.6 */
#define PR_SET_IO_FLUSHER 57
#endif

struct kernel_door {
	struct list link; /* while nobody has taken it over */
	char export_name[KEEPER_EXPORT_LEN];
	struct nbd_export *nbd;
	struct kernel_hold hold;
	char device[KERNEL_NAME_LEN + 8];
	bool detaching;  /* the end is expected */
	struct err held; /* why nobody serves it, though it is attached; "": somebody does */

	/* With a keeper. The connections are the journal's, and go on after this process. */
	struct nbd_journal *journal;
	struct serving *connections;
	struct co_group serving; /* connections, as seen from the main reactor */
	unsigned open;           /* how many of them there are */
};

/* --- the end of a device ---------------------------------------------------------------------- */

static const char *end_text(const struct kernel_door *door)
{
	if (door->hold.end_reason == KERNEL_DEV_RELEASED) /* for a server before this one */
		return "a detach of it was under way";
	return door->hold.end_reason ? strerror(door->hold.end_reason)
				     : "another program disconnected it, or its connection broke";
}

static bool is_held(const struct kernel_door *door)
{
	return door->held.code && !door->hold.ended;
}

static void door_ended(struct kernel_hold *hold)
{
	struct kernel_door *door = container_of(hold, struct kernel_door, hold);

	if (door->detaching)
		return;
	log_error("export \"%s\": %s is lost: %s", door->nbd->name, door->device, end_text(door));
	export_device_lost(door->nbd);
}

static suspends void close_journal_call(void *arg)
{
	struct kernel_door *door = arg;

	nbd_journal_close(door->journal);
	door->journal = NULL;
}

static suspends void close_journal(struct kernel_door *door)
{
	co_group_wait(&door->serving);
	free(take_ptr(door->connections));
	if (door->journal)
		co_call_on(door->nbd->home, close_journal_call, door);
}

/* Gives the device up, gently or not, and frees the door. lost: nobody shall take it up later. */
static suspends void door_free(struct kernel_door *door, bool lost)
{
	door->detaching = true;
	list_remove(&door->link);
	kernel_hold_disconnect(&door->hold, lost);
	close_journal(door);
	kernel_hold_leave(&door->hold);
	free(door);
}

/* --- serving ---------------------------------------------------------------------------------- */

/* One connection of the device, on its way to the export's home reactor, there, and back. */
struct serving {
	struct task arrived, left;
	struct kernel_door *door;
	int fd;              /* without a journal */
	unsigned connection; /* with one */
	int ret;
	char device[KERNEL_NAME_LEN + 8];
};

static suspends void serve(void *arg)
{
	struct serving *serving = arg;
	struct kernel_door *door = serving->door;
	const struct nbd_session session = {
		.fd = serving->fd,
		.limits = &nbd_limits_default,
		.peer = serving->device,
		.origin = NBD_FROM_KERNEL,
		.journal = door->journal,
		.connection = serving->connection,
	};
	serving->ret = nbd_serve(door->nbd, &session);
	if (serving->ret < 0)
		log_error("export \"%s\": the connection with %s broke: %s", door->nbd->name,
			serving->device, strerror(-serving->ret));
	reactor_post(door->hold.reactor, &serving->left);
}

static void serve_arrived(struct task *task)
{
	co_start(serve, container_of(task, struct serving, arrived));
}

/* As the driver does when a request timed out, or by a fault of its own; a whole device it disconnects with a word. */
static void connection_shut(const struct kernel_door *door)
{
	if (door->detaching || door->hold.ended)
		return;
	if (door->open)
		log_warning("export \"%s\": the kernel closed a connection with %s: %u of %u are "
			    "left, which is slower; nothing is lost",
			door->nbd->name, door->device, door->open, door->hold.opts.connections);
	else
		log_warning("export \"%s\": the kernel closed the last connection with %s: its "
			    "users wait or get errors",
			door->nbd->name, door->device);
}

static void serve_left(struct task *task)
{
	struct serving *serving = container_of(task, struct serving, left);
	struct kernel_door *door = serving->door;

	door->open--;
	if (serving->ret == NBD_SHUT)
		connection_shut(door);
	co_group_leave(&door->serving);
}

/* All connections or none: who waits for their end waits for all. Without a journal it takes the server's ends over. */
static int start_serving(struct kernel_door *door, struct err *err)
{
	struct kernel_ends *ends = &door->hold.ends;

	door->connections = calloc(ends->count, sizeof(*door->connections));
	if (!door->connections)
		return err_set(err, ENOMEM, "out of memory");
	door->open = ends->count;
	for (unsigned i = 0; i < ends->count; i++) {
		struct serving *serving = &door->connections[i];

		*serving = (struct serving){
			.door = door,
			.fd = door->journal ? -1 : take_fd(&ends->server[i]),
			.connection = door->journal ? i : 0,
		};
		snprintf(serving->device, sizeof(serving->device), "%s", door->device);
		task_init(&serving->arrived, serve_arrived);
		task_init(&serving->left, serve_left);
		co_group_enter(&door->serving);
		reactor_post(door->nbd->home, &serving->arrived);
	}
	return 0;
}

/* --- the journal ------------------------------------------------------------------------------ */

/* Memory that the keeper keeps for our successor. -errno. */
static suspends int create_journal(struct kernel_door *door, struct err *err)
{
	struct kernel_hold *hold = &door->hold;
	size_t size_bytes = nbd_journal_size(hold->ends.count, NBD_JOURNAL_ARENA_DEFAULT_BYTES);
	CLEANUP(fd) int fd = memfd_create("blkstack-journal", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0 || ftruncate(fd, (off_t)size_bytes) ||
		fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return err_sys(err, errno, "%s: memory for its requests", door->device);
	int ret = kernel_hold_set_journal(hold, fd, err);
	if (!ret)
		hold->journal = take_fd(&fd);
	return ret;
}

struct opening {
	struct kernel_door *door;
	struct err *err;
	int ret;
};

/* Populates memory, which takes its time. */
static void open_journal(void *arg)
{
	struct opening *opening = arg;
	struct kernel_door *door = opening->door;
	const struct kernel_ends *ends = &door->hold.ends;
	struct nbd_seat seat = {
		.memory_fd = door->hold.journal,
		.connections = ends->count,
		.inherited = door->hold.adopted,
	};

	for (unsigned i = 0; i < ends->count; i++)
		seat.ends[i] = (struct nbd_seat_ends){ ends->server[i], ends->driver[i] };
	opening->ret = nbd_journal_open(&seat, &door->journal, opening->err);
}

static suspends void replay(void *arg)
{
	struct opening *opening = arg;

	opening->ret = nbd_journal_replay(opening->door->journal, opening->door->nbd, opening->err);
}

static suspends int serve_with_journal(struct kernel_door *door, struct err *err)
{
	struct opening opening = { .door = door, .err = err };
	int ret = door->hold.journal >= 0 ? 0 : create_journal(door, err);

	if (ret)
		return ret;
	co_offload(open_journal, &opening);
	if (!opening.ret)
		co_call_on(door->nbd->home, replay, &opening);
	return opening.ret ? opening.ret : start_serving(door, err);
}

/* Without a journal nobody knows what was acknowledged by who had the device before. */
static int check_inherited(const struct kernel_door *door, struct err *err)
{
	const struct blk_caps *caps = blk_caps(door->nbd->blk);

	if (!door->hold.adopted || (!caps->caches_writes && !caps->dies_with_process))
		return 0;
	return err_set(err, ENOTRECOVERABLE,
		"what its disk held in the memory of the daemon that is gone is lost");
}

static suspends int serve_all(struct kernel_door *door, struct err *err)
{
	snprintf(door->device, sizeof(door->device), "/dev/%s", door->hold.name);
	if (door->hold.keeper)
		return serve_with_journal(door, err);
	int ret = check_inherited(door, err);
	if (!ret)
		ret = start_serving(door, err);
	kernel_ends_close(&door->hold.ends);
	return ret;
}

/* --- attach, resize, detach ------------------------------------------------------------------- */

static struct kernel_door *door_new(const struct kernel_opts *opts)
{
	struct kernel_door *door = calloc(1, sizeof(*door));
	const struct kernel_dev_opts dev_opts = {
		.device = opts->device,
		.export = opts->nbd->name,
		.size_bytes = opts->size_bytes,
		.block_size = opts->block_size,
		.mode = opts->mode,
		.connections = opts->connections,
		.timeout_s = opts->timeout_s,
		.dead_timeout_s = opts->dead_timeout_s,
		.flags = nbd_export_flags(opts->nbd, false),
	};

	if (!door)
		return NULL;
	door->nbd = opts->nbd;
	list_init(&door->link);
	co_group_init(&door->serving);
	kernel_hold_init(&door->hold, opts->keeper, &dev_opts, door_ended);
	door->hold.by_hand = opts->by_hand;
	snprintf(door->device, sizeof(door->device), "%s", opts->device);
	return door;
}

static suspends int attach_once(
	const struct kernel_opts *opts, struct kernel_door **door, struct err *err)
{
	struct kernel_door *new = door_new(opts);
	struct err unsettled = { 0 };

	if (!new)
		return err_set(err, ENOMEM, "out of memory");
	int ret = kernel_hold_claim(&new->hold, err);
	if (!ret)
		ret = serve_all(new, err);
	if (!ret && kernel_hold_settle(&new->hold, &unsettled))
		log_warning("export \"%s\": %s", new->nbd->name, unsettled.text);
	if (!ret && new->hold.ended)
		ret = err_set(err, EIO, "%s is lost already: %s", new->device, end_text(new));
	if (ret == -ENOTRECOVERABLE)
		log_error("export \"%s\": %s, left by a daemon before this one, is disconnected, "
			  "and its users get errors: %s",
			new->nbd->name, new->device, err->text);
	if (ret) {
		door_free(new, ret == -ENOTRECOVERABLE);
		return ret;
	}
	*door = new;
	return 0;
}

bool kernel_find_left(const char *export, char device[KERNEL_NAME_LEN + 8])
{
	char name[KERNEL_NAME_LEN];

	if (!kernel_dev_find_left(export, name))
		return false;
	snprintf(device, KERNEL_NAME_LEN + 8, "/dev/%s", name);
	return true;
}

suspends int kernel_attach(
	const struct kernel_opts *opts, struct kernel_door **door, struct err *err)
{
	int ret = attach_once(opts, door, err);

	/* That one is gone; now for one that begins with what the disk has. */
	return ret == -ENOTRECOVERABLE ? attach_once(opts, door, err) : ret;
}

suspends int kernel_detach(struct kernel_door *door, bool force, struct err *err)
{
	if (is_held(door) && !force)
		return err_set(err, EBUSY, "%s", door->held.text);
	if (is_held(door)) {
		door_free(door, true);
		return 0;
	}
	door->detaching = true;
	int ret = kernel_hold_release(&door->hold, force, err);
	if (ret) {
		door->detaching = false;
		return ret;
	}
	door_free(door, false);
	return 0;
}

suspends int kernel_check_unused(struct kernel_door *door, struct err *err)
{
	if (is_held(door))
		return err_set(err, EBUSY, "%s", door->held.text);
	return door->hold.ended ? 0 : kernel_hold_check_unused(&door->hold, err);
}

suspends int kernel_resize(struct kernel_door *door, uint64_t size_bytes, struct err *err)
{
	if (door->hold.ended)
		return err_set(err, ENODEV, "%s is lost: %s", door->device, end_text(door));
	if (door->held.code)
		return err_set(err, EBUSY, "%s", door->held.text);
	return kernel_hold_resize(&door->hold, size_bytes, err);
}

/* --- from server to server -------------------------------------------------------------------- */

suspends int kernel_find_kept(struct keeper_link *keeper, struct list *doors, struct err *err)
{
	uint32_t slot = 0;

	for (;;) {
		struct kernel_door *door = calloc(1, sizeof(*door));
		if (!door)
			return err_set(err, ENOMEM, "out of memory");
		int ret = kernel_hold_take_over(&door->hold, keeper, &slot, door->export_name, err);
		if (ret) {
			free(door);
			return ret == -ENOENT ? 0 : ret;
		}
		list_init(&door->link);
		co_group_init(&door->serving);
		kernel_hold_rename(&door->hold, door->export_name, NULL);
		snprintf(door->device, sizeof(door->device), "/dev/%s", door->hold.name);
		list_push_back(doors, &door->link);
	}
}

const char *kernel_kept_export(const struct list *link)
{
	return list_entry(link, const struct kernel_door, link)->export_name;
}

bool kernel_kept_by_hand(const struct list *link)
{
	return list_entry(link, const struct kernel_door, link)->hold.by_hand;
}

struct kernel_door *kernel_kept_door(struct list *link)
{
	return list_entry(link, struct kernel_door, link);
}

suspends bool kernel_kept_is_used(struct list *link, struct err *users)
{
	return kernel_hold_look_for_users(&kernel_kept_door(link)->hold, users);
}

static suspends void look_at_cache(void *arg)
{
	struct opening *opening = arg;
	const struct blk_caps *caps = blk_caps(opening->door->nbd->blk);

	if (caps->dies_with_process)
		opening->ret = err_set(opening->err, ENOTRECOVERABLE,
			"what the disk held was in the memory of the server that is gone");
	else if (caps->caches_writes)
		opening->ret = err_set(opening->err, EUCLEAN,
			"what its disk had not flushed died with the server");
}

/*
 * The journal tells nothing: what was asked and not answered comes again on new connections. What was answered and
 * is not durable would be lost without a word, where the stack had it in the memory of the server.
 */
static suspends int reconnect(struct kernel_door *door, struct err *err)
{
	struct opening opening = { .door = door, .err = err };

	co_call_on(door->nbd->home, look_at_cache, &opening);
	return opening.ret ? opening.ret : kernel_hold_reconnect(&door->hold, err);
}

/* Nothing exact can be done: its users wait, for a word of the operator's. */
static void hold_back(struct kernel_door *door, const char *journal, const char *remedy)
{
	err_set(&door->held, EBUSY,
		"%s is held, its users wait: %s; no other way to go on: %s; `detach --force` gives "
		"them errors",
		door->device, journal, remedy);
	log_error("export \"%s\": %s", door->nbd->name, door->held.text);
}

static bool is_about_journal(int ret)
{
	return ret == -EUCLEAN || ret == -EPROTONOSUPPORT;
}

static suspends int resume(struct kernel_door *door, struct err *err)
{
	struct err again = { 0 };
	int ret = door->hold.ends.count ? serve_with_journal(door, err)
					: err_set(err, EUCLEAN, "it lost its connections");

	if (!is_about_journal(ret))
		return ret;
	ret = reconnect(door, &again);
	if (ret == -ENOTRECOVERABLE) {
		*err = again;
		return ret;
	}
	if (ret) {
		hold_back(door, err->text, again.text);
		return 0;
	}
	log_warning(
		"export \"%s\": %s goes on with new connections, on which the kernel repeats its "
		"requests after their time-out: %s",
		door->nbd->name, door->device, err->text);
	return serve_with_journal(door, err);
}

suspends int kernel_resume(struct kernel_door *door, struct nbd_export *nbd, struct err *err)
{
	struct err unsettled = { 0 };

	door->nbd = nbd;
	if (door->hold.ended)
		return err_set(err, ENODEV, "%s is lost: %s", door->device, end_text(door));
	int ret = resume(door, err);
	if (ret) {
		close_journal(door);
		door->nbd = NULL;
		return ret;
	}
	list_remove(&door->link);
	kernel_hold_rename(&door->hold, nbd->name, door_ended);
	if (!door->held.code && !door->hold.settled && kernel_hold_settle(&door->hold, &unsettled))
		log_warning("export \"%s\": %s", nbd->name, unsettled.text);
	return 0;
}

bool kernel_is_held(const struct kernel_door *door)
{
	return is_held(door);
}

uint64_t kernel_size(const struct kernel_door *door)
{
	return door->hold.opts.size_bytes;
}

suspends void kernel_abandon(struct kernel_door *door)
{
	door_free(door, true);
}

bool kernel_outlives(const struct kernel_door *door)
{
	return door->hold.opts.mode == KERNEL_DEV_NETLINK && !door->hold.ended;
}

bool kernel_was_left(const struct kernel_door *door)
{
	return door->hold.adopted && kernel_outlives(door);
}

suspends void kernel_let_go(struct kernel_door *door)
{
	door_free(door, false);
}

suspends void kernel_leave(struct kernel_door *door)
{
	list_remove(&door->link);
	close_journal(door);
	kernel_hold_leave(&door->hold);
	free(door);
}

/* --- the rest --------------------------------------------------------------------------------- */

const char *kernel_device(const struct kernel_door *door)
{
	return door->device;
}

static const char *state_of(const struct kernel_door *door)
{
	if (door->hold.ended)
		return "lost";
	return is_held(door) ? "held" : "attached";
}

bool kernel_lost(const struct kernel_door *door)
{
	return door->hold.ended;
}

json_t *kernel_status(const struct kernel_door *door)
{
	json_t *object = json_object();

	json_object_set_new(object, "device", json_string(door->device));
	json_object_set_new(object, "state", json_string(state_of(door)));
	if (door->hold.ended || door->held.code)
		json_object_set_new(object, "reason",
			json_string(door->hold.ended ? end_text(door) : door->held.text));
	json_object_set_new(object, "kept", json_boolean(door->hold.keeper));
	json_object_set_new(object, "taken_over", json_integer(door->hold.taken_over));
	json_object_set_new(object, "size", json_integer((json_int_t)door->hold.opts.size_bytes));
	json_object_set_new(object, "block_size", json_integer(door->hold.opts.block_size));
	json_object_set_new(
		object, "read_only", json_boolean(door->hold.opts.flags & NBD_FLAG_READ_ONLY));
	json_object_set_new(object, "timeout", json_integer(door->hold.opts.timeout_s));
	json_object_set_new(object, "mode",
		json_string(door->hold.opts.mode == KERNEL_DEV_NETLINK ? "netlink" : "ioctl"));
	json_object_set_new(object, "connections", json_integer(door->hold.opts.connections));
	return object;
}

int kernel_guard_reclaim(bool lock_memory, struct err *err)
{
	if (prctl(PR_SET_IO_FLUSHER, 1UL, 0UL, 0UL, 0UL))
		return err_sys(err, errno,
			"cannot be exempt from waiting for its own devices when memory is short "
			"(prctl PR_SET_IO_FLUSHER, needs CAP_SYS_RESOURCE)");
	if (lock_memory && mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		return err_sys(err, errno,
			"cannot lock its memory (mlockall, needs CAP_IPC_LOCK or LimitMEMLOCK)");
	return 0;
}
