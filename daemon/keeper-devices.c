/*
 * The keeper's devices: claimed, changed and given back as the server asks, and held while there is none.
 *
 * Everything kernel_dev_*() does may block, some of it until the server has answered requests of the very
 * device. So each request runs as a job on the device's thread, one at a time, and comes back to the main
 * thread through a pipe; so does the word of a device's own thread that the driver gave the device up.
 * A job outlives the server that asked for it: its successor answers the device's requests meanwhile.
 * A claim whose server died before it was answered is undone, since nobody knows of it.
 *
 * What a server may ask for: devices of the kernel's NBD driver that are free (kernel_dev_claim() refuses all
 * others), under names that udev cannot misunderstand; everything else names a slot, which holds a
 * device that was claimed here. No request can make the keeper touch anything else.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/keeper_private.h"
#include "daemon/kernel-memory.h"
#include "daemon/kernel-name.h"
#include "daemon/kernel-sysfs.h"
#include "nbd/journal.h"

enum event_kind { JOB_DONE, DEV_ENDED };

struct event {
	enum event_kind kind;
	int reason;
	struct held *held;
};

int devices_init(struct devices *devices)
{
	return pipe2(devices->events, O_CLOEXEC) ? -errno : 0;
}

/* From any thread. Smaller than PIPE_BUF: whole or not at all. */
static void tell(struct held *held, enum event_kind kind, int reason)
{
	const struct event event = { kind, reason, held };

	while (write(held->keeper->devices.events[1], &event, sizeof(event)) < 0 && errno == EINTR)
		;
}

static void dev_ended(void *arg, int reason)
{
	tell(arg, DEV_ENDED, reason);
}

/* --- slots ------------------------------------------------------------------------------------ */

static void *job_thread(void *arg)
{
	struct held *held = arg;

	for (;;) {
		while (sem_wait(&held->wanted))
			;
		if (!held->job.run)
			return NULL;
		held->job.ret = held->job.run(held, &held->job.err);
		tell(held, JOB_DONE, 0);
	}
}

/* The thread is there before anything is, so that none is missing when a device is to be given back. */
static int held_new(struct keeper *keeper, struct held **new, struct err *err)
{
	struct devices *devices = &keeper->devices;
	uint32_t slot = 0;

	while (slot < KEEPER_DEVICES_MAX && devices->slots[slot])
		slot++;
	if (slot == KEEPER_DEVICES_MAX)
		return err_set(err, ENOSPC, "the keeper holds as many devices as it can");
	struct held *held = calloc(1, sizeof(*held));
	if (!held)
		return err_set(err, ENOMEM,
			"the keeper has no memory: raise its service's limit (MemoryMax=), or free "
			"some, and try again");
	held->keeper = keeper;
	held->slot = slot;
	held->journal = held->stored = -1;
	sem_init(&held->wanted, 0, 0);
	int ret = pthread_create(&held->thread, NULL, job_thread, held);
	if (ret) {
		free(held);
		return err_sys(err, ret,
			"the keeper cannot start a thread (raise its service's TasksMax= or "
			"MemoryMax=, and try again)");
	}
	devices->slots[slot] = held;
	devices->count++;
	*new = held;
	return 0;
}

/* It has no job. */
static void held_free(struct held *held)
{
	struct devices *devices = &held->keeper->devices;

	held->job.run = NULL;
	sem_post(&held->wanted);
	pthread_join(held->thread, NULL);
	sem_destroy(&held->wanted);
	devices->slots[held->slot] = NULL;
	devices->count--;
	kernel_ends_close(&held->ends);
	if (held->journal >= 0)
		close(held->journal);
	if (held->stored >= 0)
		close(held->stored);
	free(held);
}

static struct held *find(struct keeper *keeper, uint32_t slot)
{
	return slot < KEEPER_DEVICES_MAX ? keeper->devices.slots[slot] : NULL;
}

/* --- what jobs do, on their threads ----------------------------------------------------------- */

/* A journal that outlives the keeper, as the device does. Without it the server brings one that does not. */
static void open_memory(const struct held *held, unsigned connections, int *journal)
{
	const char *name = kernel_dev_name(held->dev);
	size_t size_bytes = nbd_journal_size(connections, NBD_JOURNAL_ARENA_DEFAULT_BYTES);
	struct err err;

	if (kernel_memory_open(name, size_bytes, journal, &err))
		log_warning("keeper: if the keeper dies, /dev/%s is lost when its disk caches "
			    "writes: %s",
			name, err.text);
}

static struct kernel_dev_opts opts_of(const struct held *held)
{
	const struct keeper_message *facts = &held->facts;

	return (struct kernel_dev_opts){
		.device = facts->device,
		.export = facts->export,
		.mode = (enum kernel_dev_mode)facts->mode,
		.size_bytes = facts->size_bytes,
		.block_size = facts->block_size,
		.connections = facts->connections,
		.timeout_s = facts->timeout_s,
		.dead_timeout_s = facts->dead_timeout_s,
		.flags = (uint16_t)facts->flags,
	};
}

static int run_claim(struct held *held, struct err *err)
{
	const struct kernel_dev_opts opts = opts_of(held);

	int ret = kernel_dev_claim(&opts, dev_ended, held, &held->dev, &held->ends, err);
	if (!ret && kernel_dev_mode(held->dev) == KERNEL_DEV_NETLINK)
		open_memory(held, held->ends.count, &held->journal);
	return ret;
}

static int run_reconnect(struct held *held, struct err *err)
{
	struct job *job = &held->job;
	int ret = kernel_dev_reconnect(held->dev, &job->ends, err);

	if (ret)
		return ret;
	kernel_memory_forget(kernel_dev_name(held->dev));
	open_memory(held, job->ends.count, &job->journal);
	return 0;
}

static int run_settle(struct held *held, struct err *err)
{
	struct err unnamed = { 0 };
	int named = kernel_name_publish(kernel_dev_name(held->dev), held->facts.export, &unnamed);
	int ret = kernel_dev_settle(held->dev, err);

	if (ret || !named)
		return ret;
	*err = unnamed;
	return named;
}

static int run_resize(struct held *held, struct err *err)
{
	return kernel_dev_resize(held->dev, held->job.request.size_bytes, err);
}

static int run_users(struct held *held, struct err *err)
{
	return kernel_dev_users(held->dev, !held->job.request.force, err);
}

static int run_release(struct held *held, struct err *err)
{
	return kernel_dev_release(held->dev, held->job.request.force, err);
}

static int run_free(struct held *held, struct err *err)
{
	if (held->job.request.force)
		kernel_dev_disown(held->dev);
	if (!kernel_dev_stays(held->dev))
		kernel_name_forget(kernel_dev_name(held->dev));
	kernel_dev_free(held->dev);
	return 0;
}

static void job_start(
	struct held *held, const struct keeper_message *request, uint64_t server, job_fn *run)
{
	held->job = (struct job){ .run = run, .running = true, .server = server, .journal = -1 };
	if (request)
		held->job.request = *request;
	sem_post(&held->wanted);
}

/* --- answers ---------------------------------------------------------------------------------- */

static void refuse(
	struct keeper *keeper, const struct keeper_message *request, int code, const char *text)
{
	struct keeper_message answer = { .id = request->id, .ret = -code };

	snprintf(answer.text, sizeof(answer.text), "%s", text);
	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

/* A device with what the server needs to serve it. */
static void hand_out(struct held *held, uint32_t id)
{
	struct keeper_message answer = held->facts;
	int fds[KEEPER_FDS_MAX];
	unsigned count = 0;

	for (unsigned i = 0; i < held->ends.count; i++)
		fds[count++] = held->ends.server[i];
	for (unsigned i = 0; i < held->ends.count; i++)
		fds[count++] = held->ends.driver[i];
	if (held->journal >= 0)
		fds[count++] = held->journal;
	answer.id = id;
	answer.ret = 0;
	answer.slot = held->slot;
	answer.connections = held->ends.count;
	answer.mode = (uint32_t)kernel_dev_mode(held->dev);
	answer.adopted = kernel_dev_adopted(held->dev);
	answer.ended = held->ended ? 1 + (uint32_t)held->end_reason : 0;
	snprintf(answer.device, sizeof(answer.device), "%s", kernel_dev_name(held->dev));
	keeper_say(held->keeper, KEEPER_ANSWER, &answer, fds, count);
}

static void answer_job(struct held *held)
{
	const struct job *job = &held->job;
	struct keeper_message answer = { .id = job->request.id, .ret = job->ret };

	if (job->server != held->keeper->server_id)
		return;
	if (job->ret)
		snprintf(answer.text, sizeof(answer.text), "%s", job->err.text);
	if ((job->run == run_claim || job->run == run_reconnect) && !job->ret)
		hand_out(held, job->request.id);
	else
		keeper_say(held->keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

static void drop_ends(struct held *held)
{
	store_forget_device(held);
	kernel_ends_close(&held->ends);
	held->facts.settled = false;
	if (held->journal >= 0)
		close(take_fd(&held->journal));
}

/* New connections begin without a past. Without them there are none: the old ones are shut, and no server can use them. */
static void reconnected(struct held *held, int ret)
{
	if (ret == -EOPNOTSUPP)
		return;
	drop_ends(held);
	if (ret)
		return;
	held->ends = held->job.ends;
	held->journal = held->job.journal;
	store_put_device(held);
}

static void job_done(struct held *held)
{
	struct job *job = &held->job;
	job_fn *run = job->run;
	int ret = job->ret;

	job->running = false;
	if (run == run_reconnect)
		reconnected(held, ret);
	if (run == run_resize && !ret)
		held->facts.size_bytes = job->request.size_bytes;
	if (run == run_settle)
		held->facts.settled = true;
	if (run == run_settle || run == run_resize)
		store_note_device(held);
	if (run == run_claim && !ret) {
		if (job->server != held->keeper->server_id)
			return job_start(held, NULL, 0, run_free);
		store_put_device(held);
	}
	answer_job(held);
	if (run == run_free || (run == run_claim && ret))
		held_free(held);
}

static void ended(struct held *held, int reason)
{
	const struct keeper_message word = { .slot = held->slot, .ret = -reason };

	held->ended = true;
	held->end_reason = reason;
	keeper_say(held->keeper, KEEPER_ENDED, &word, NULL, 0);
}

void devices_events(struct keeper *keeper)
{
	struct event event;

	if (read(keeper->devices.events[0], &event, sizeof(event)) != sizeof(event))
		return;
	if (event.kind == JOB_DONE)
		job_done(event.held);
	else
		ended(event.held, event.reason);
}

/* --- requests --------------------------------------------------------------------------------- */

/* As the config has them; udev makes links of these names. */
static bool export_name_ok(const char *name)
{
	if (!isalnum((unsigned char)*name))
		return false;
	for (; *name; name++)
		if (!isalnum((unsigned char)*name) && !strchr("-_.:+@", *name))
			return false;
	return true;
}

static bool device_ok(const char *device)
{
	static const char prefix[] = "/dev/nbd";
	const char *number = device + strlen(prefix);

	if (!strcmp(device, "auto"))
		return true;
	return !strncmp(device, prefix, strlen(prefix)) && *number && strlen(number) <= 6 &&
	       !number[strspn(number, "0123456789")];
}

static const struct held *find_export(const struct devices *devices, const char *export)
{
	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++)
		if (devices->slots[i] && !strcmp(devices->slots[i]->facts.export, export))
			return devices->slots[i];
	return NULL;
}

static void claim(struct keeper *keeper, const struct keeper_message *request)
{
	if (!device_ok(request->device)) {
		char text[128];
		snprintf(text, sizeof(text), "device \"%s\": must be \"/dev/nbdN\" or \"auto\"",
			request->device);
		return refuse(keeper, request, EINVAL, text);
	}
	if (!export_name_ok(request->export) || !request->connections)
		return refuse(keeper, request, EINVAL, "the keeper does not understand the claim");
	if (find_export(&keeper->devices, request->export))
		return refuse(
			keeper, request, EBUSY, "the keeper has a device of this name already");
	struct held *held;
	struct err err;
	int ret = held_new(keeper, &held, &err);
	if (ret)
		return refuse(keeper, request, -ret, err.text);
	held->facts = *request;
	held->facts.restarts = 0;
	held->facts.settled = false;
	job_start(held, request, keeper->server_id, run_claim);
}

/* A job that may bring a journal of its own. */
static bool makes_journal(const struct held *held)
{
	return held->job.running && (held->job.run == run_claim || held->job.run == run_reconnect);
}

static void next(struct keeper *keeper, const struct keeper_message *request)
{
	for (uint32_t slot = request->slot; slot < KEEPER_DEVICES_MAX; slot++) {
		struct held *held = keeper->devices.slots[slot];
		bool claiming = held && (!held->dev || held->job.run == run_claim) &&
				held->job.running;

		if (!held || claiming || held->job.run == run_free)
			continue;
		if (makes_journal(held))
			return refuse(
				keeper, request, EAGAIN, "its connections are being replaced");
		held->facts.restarts++; /* the servers that got it after the one that claimed it */
		store_note_device(held);
		return hand_out(held, request->id);
	}
	refuse(keeper, request, ENOENT, "no more devices");
}

/* Memory that nobody can take away from under the server that maps it, and no more than one can need. */
static bool journal_ok(int fd)
{
	const int sealed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat stat;

	return seals >= 0 && (seals & sealed) == sealed && !fstat(fd, &stat) &&
	       stat.st_size <= KEEPER_JOURNAL_MAX_BYTES;
}

static void take_journal(
	struct keeper *keeper, const struct keeper_message *request, struct keeper_fds *fds)
{
	const struct keeper_message answer = { .id = request->id };
	struct held *held = find(keeper, request->slot);

	if (!held || makes_journal(held) || held->journal >= 0 || fds->count != 1 ||
		!journal_ok(fds->fd[0]))
		return refuse(keeper, request, EINVAL, "the keeper has no use for the journal");
	held->journal = fds->fd[--fds->count];
	store_put_journal(held);
	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

static void change(struct keeper *keeper, const struct keeper_message *request)
{
	static job_fn *const runs[KEEPER_WORDS] = {
		[KEEPER_RECONNECT] = run_reconnect,
		[KEEPER_SETTLE] = run_settle,
		[KEEPER_RESIZE] = run_resize,
		[KEEPER_USERS] = run_users,
		[KEEPER_RELEASE] = run_release,
		[KEEPER_FREE] = run_free,
	};
	struct held *held = find(keeper, request->slot);

	if (!held || !held->dev)
		return refuse(keeper, request, ENOENT, "the keeper has no such device");
	if (held->job.running)
		return refuse(keeper, request, EALREADY, "the device is being changed already");
	if (request->word == KEEPER_FREE)
		store_forget_device(held);
	job_start(held, request, keeper->server_id, runs[request->word]);
}

void devices_request(
	struct keeper *keeper, const struct keeper_message *request, struct keeper_fds *fds)
{
	if (request->word == KEEPER_CLAIM)
		claim(keeper, request);
	else if (request->word == KEEPER_JOURNAL)
		take_journal(keeper, request, fds);
	else if (request->word == KEEPER_NEXT)
		next(keeper, request);
	else
		change(keeper, request);
}

/* --- from keeper to keeper -------------------------------------------------------------------- */

int devices_adopt(struct keeper *keeper, const struct keeper_message *facts, const char *name,
	struct kernel_ends *ends, int journal, int stored, struct err *err)
{
	uint64_t sectors;

	if (!export_name_ok(facts->export) || find_export(&keeper->devices, facts->export))
		return err_set(err, EINVAL, "its name is not one, or another device has it");
	struct held *held;
	int ret = held_new(keeper, &held, err);
	if (ret)
		return ret;
	held->facts = *facts;
	const struct kernel_dev_opts opts = opts_of(held);
	ret = kernel_dev_adopt(&opts, name, ends, dev_ended, held, &held->dev, err);
	if (ret) {
		held_free(held);
		return ret;
	}
	held->ends = *ends;
	ends->count = 0;
	held->journal = journal;
	held->stored = stored;
	if (kernel_sysfs_number(name, "size", &sectors)) /* it may have been resized last of all */
		held->facts.size_bytes = sectors * 512;
	return 0;
}

/* --- the end ---------------------------------------------------------------------------------- */

/* Of ours, for the main thread to look at: not while a thread makes or frees it. */
static bool is_whole(const struct held *held)
{
	return held && held->dev &&
	       !(held->job.running && (held->job.run == run_claim || held->job.run == run_free));
}

/* At a restart it waits in the service manager's store, or, if not there, in the driver. */
static bool outlives_us(const struct held *held)
{
	return kernel_dev_mode(held->dev) == KERNEL_DEV_NETLINK;
}

unsigned devices_left(const struct devices *devices, bool restart)
{
	unsigned count = 0;

	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++) {
		const struct held *held = devices->slots[i];

		if (is_whole(held) && !held->ended)
			count += !restart || !outlives_us(held);
	}
	return count;
}

/* Its job waits for requests that nobody answers any more, and this process would for the job. */
static void shut_connections(const struct held *held)
{
	for (unsigned i = 0; i < held->ends.count; i++)
		shutdown(held->ends.server[i], SHUT_RDWR);
}

void devices_free(struct keeper *keeper, bool restart)
{
	struct devices *devices = &keeper->devices;

	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++) {
		struct held *held = devices->slots[i];

		if (!is_whole(held) || (restart && outlives_us(held)))
			continue;
		if (!held->ended)
			log_error("keeper: %s of export \"%s\" is left without its server: %s",
				kernel_dev_name(held->dev), held->facts.export,
				kernel_dev_stays(held->dev)
					? "its users wait for the next start"
					: "what the kernel had not written back is lost");
		if (held->job.running) {
			shut_connections(held);
			continue;
		}
		store_forget_device(held);
		held->job = (struct job){ 0 }; /* not as the last request had it */
		run_free(held, NULL);
		held_free(held);
	}
}
