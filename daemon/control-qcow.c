/*
 * Methods of the control socket for exports with a qcow layer: Compact, CancelCompact, Check, and the
 * snapshots; see control.h.
 *
 * The work is done on the export's home reactor, by lib/blk/qcow: the topmost qcow layer of the stack is meant. A
 * compaction takes its time, so its caller hears of the progress, several times a second, when it asked for
 * `more`. A caller that goes away does not end it; CancelCompact does, and the daemon's or the export's end.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "blk/mirror/mirror.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export.h"

#define PROGRESS_NS (200 * NS_PER_MS)
#define NAP_NS      (10 * NS_PER_MS)

/* Something to do with the qcow layer of an export, on its home reactor. */
struct work {
	struct export *export;
	struct err err;
	int ret;

	struct qcow_compact job; /* home only, until it is over */
	bool over;               /* main reactor */
	struct co_queue over_queue;

	enum qcow_snapshot_change change;
	const char *name;
	json_t *answer;
};

static struct blk *qcow_layer(struct work *work)
{
	for (struct blk *blk = work->export->top; blk; blk = blk->below)
		if (blk->ops == &qcow_ops)
			return blk;
	work->ret = err_set(&work->err, ENOTSUP, "it has no layer qcow");
	return NULL;
}

suspends static void run_at_home(struct work *work, co_fn *fn)
{
	if (work->export->stopping)
		work->ret = err_set(&work->err, ESHUTDOWN, "it is being stopped");
	else
		co_call_on(work->export->home, fn, work);
	if (work->ret)
		err_wrap(&work->err, "export \"%s\"", work->export->config->name);
}

/* Text out of an image, which may be anything. */
static json_t *text_json(const char *text)
{
	char plain[512];
	size_t len = 0;
	json_t *string = json_string(text);

	if (string)
		return string;
	for (; len < sizeof(plain) - 1 && text[len]; len++)
		plain[len] = text[len] < ' ' ? '?' : text[len];
	plain[len] = '\0';
	return json_string(plain);
}

/* --- compaction ------------------------------------------------------------------------------- */

static json_t *job_json(const struct qcow_compact *job)
{
	return json_pack("{s:I, s:I, s:I, s:I, s:I}", "done", (json_int_t)job->done, "total",
		(json_int_t)job->total, "moved", (json_int_t)job->moved, "size_before",
		(json_int_t)job->size_before, "size_after", (json_int_t)job->size_after);
}

static suspends void compact_at_home(void *arg)
{
	struct work *work = arg;
	struct blk *layer = qcow_layer(work);

	if (layer)
		work->ret = qcow_compact(layer, &work->job, &work->err);
}

static suspends void compact(void *arg)
{
	struct work *work = arg;

	run_at_home(work, compact_at_home);
	work->over = true;
	co_queue_wake_all(&work->over_queue);
}

/* The export, or all of the daemon, ends. */
static suspends void end_at_home(void *arg)
{
	struct work *work = arg;

	work->job.cancelled = true;
}

static suspends void look_at_home(void *arg)
{
	struct work *work = arg;

	work->answer = job_json(&work->job);
}

suspends void control_compact(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct work work = { .export = export };
	bool listens = varlink_call_more(call);

	if (!export)
		return;
	work.job.rate_bytes_s = (uint64_t)varlink_int(call, "rate", 0);
	co_queue_init(&work.over_queue);
	co_start(compact, &work);
	while (!work.over) {
		co_queue_wait_until(&work.over_queue, reactor_now_ns() + PROGRESS_NS);
		if (export->stopping || control_daemon(call)->stopping)
			co_call_on(export->home, end_at_home, &work);
		if (work.over || !listens)
			continue;
		co_call_on(export->home, look_at_home, &work);
		listens = !varlink_progress(call, work.answer);
	}
	control_log_change(call, "compaction", export, work.ret, &work.err);
	control_answer(call, work.ret, &work.err, job_json(&work.job));
	control_put_export(export);
}

static suspends void cancel_at_home(void *arg)
{
	struct work *work = arg;
	struct blk *layer = qcow_layer(work);

	if (!layer)
		return;
	struct qcow_compact *job = qcow_compaction(layer);
	if (!job) {
		work->ret = err_set(&work->err, ENOENT, "no compaction is running");
		return;
	}
	job->cancelled = true;
	while (qcow_compaction(layer) == job)
		co_sleep_ns(NAP_NS);
}

suspends void control_cancel_compact(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct work work = { .export = export };

	if (!export)
		return;
	run_at_home(&work, cancel_at_home);
	control_log_change(call, "compaction cancelled", export, work.ret, &work.err);
	control_answer(call, work.ret, &work.err, NULL);
	control_put_export(export);
}

/* --- check ------------------------------------------------------------------------------------ */

struct findings {
	struct qcow_check_watch watch;
	json_t *list;
};

static void on_finding(struct qcow_check_watch *watch, enum qcow_finding kind, const char *text)
{
	static const char *const kinds[] = { "corruption", "leak", "error" };

	json_array_append_new(container_of(watch, struct findings, watch)->list,
		json_pack("{s:s, s:o}", "kind", kinds[kind], "text", text_json(text)));
}

static suspends void check_at_home(void *arg)
{
	struct work *work = arg;
	struct blk *layer = qcow_layer(work);
	struct findings findings = { .watch.finding = on_finding, .list = json_array() };
	struct qcow_check_result result = { 0 };

	if (layer)
		work->ret = qcow_live_check(layer, &findings.watch, &result, &work->err);
	work->answer = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "corruptions",
		(json_int_t)result.corruptions, "leaks", (json_int_t)result.leaks, "errors",
		(json_int_t)result.errors, "total_clusters", (json_int_t)result.total_clusters,
		"allocated_clusters", (json_int_t)result.allocated_clusters, "fragmented_clusters",
		(json_int_t)result.fragmented_clusters, "compressed_clusters",
		(json_int_t)result.compressed_clusters, "image_end",
		(json_int_t)result.image_end_off, "findings", findings.list);
}

suspends void control_check(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct work work = { .export = export };

	if (!export)
		return;
	run_at_home(&work, check_at_home);
	control_answer(call, work.ret, &work.err, work.answer);
	control_put_export(export);
}

/* --- snapshots -------------------------------------------------------------------------------- */

static suspends void list_at_home(void *arg)
{
	struct work *work = arg;
	struct blk *layer = qcow_layer(work);
	struct qcow_snapshots list = { 0 };
	json_t *snapshots = json_array();

	if (layer)
		work->ret = qcow_live_snapshots(layer, &list, &work->err);
	for (uint32_t i = 0; i < list.count; i++) {
		const struct qcow_snapshot *snapshot = &list.items[i];

		json_array_append_new(snapshots,
			json_pack("{s:o, s:o, s:I, s:I}", "id", text_json(snapshot->id), "name",
				text_json(snapshot->name), "time", (json_int_t)snapshot->time_s,
				"size", (json_int_t)snapshot->disk_size));
	}
	qcow_snapshots_fini(&list);
	work->answer = json_pack("{s:o}", "snapshots", snapshots);
}

suspends void control_snapshots(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct work work = { .export = export };

	if (!export)
		return;
	run_at_home(&work, list_at_home);
	control_answer(call, work.ret, &work.err, work.answer);
	control_put_export(export);
}

/* A mirror above it would not hear that everything is different now, and would go on calling its legs equal. */
static int check_no_mirror(const struct work *work, struct blk *layer, struct err *err)
{
	struct blk *mirror = mirror_find(work->export->top);

	if (work->change != QCOW_SNAPSHOT_APPLY || mirror == mirror_find(layer))
		return 0;
	return err_set(err, EBUSY,
		"it is mirrored, and the copy would not become what the snapshot is: end the "
		"mirror first (mirror cancel), and start it anew afterwards");
}

static suspends void change_at_home(void *arg)
{
	struct work *work = arg;
	struct blk *layer = qcow_layer(work);

	if (layer)
		work->ret = check_no_mirror(work, layer, &work->err);
	if (layer && !work->ret)
		work->ret = qcow_live_snapshot(layer, work->change, work->name, &work->err);
}

/* Whoever has the disk open keeps what it has read, and would mix it with what the snapshot has. */
static int check_unused(const struct export *export, struct err *err)
{
	if (export->kernel || export->nbd.inside)
		return err_set(err, EBUSY,
			"export \"%s\" is in use: what its users have read of it would be wrong; "
			"detach it "
			"and end its clients, or use force",
			export->config->name);
	return 0;
}

suspends static void change_snapshot(
	struct varlink_call *call, enum qcow_snapshot_change change, const char *what)
{
	struct export *export = control_get_export(call);
	struct work work = {
		.export = export, .change = change, .name = varlink_string(call, "name")
	};

	if (!export)
		return;
	if (change == QCOW_SNAPSHOT_APPLY && !varlink_bool(call, "force", false))
		work.ret = check_unused(export, &work.err);
	if (!work.ret)
		run_at_home(&work, change_at_home);
	control_log_change(call, what, export, work.ret, &work.err);
	control_answer(call, work.ret, &work.err, NULL);
	control_put_export(export);
}

suspends void control_create_snapshot(struct varlink_call *call)
{
	change_snapshot(call, QCOW_SNAPSHOT_CREATE, "snapshot created");
}

suspends void control_apply_snapshot(struct varlink_call *call)
{
	change_snapshot(call, QCOW_SNAPSHOT_APPLY, "snapshot applied");
}

suspends void control_delete_snapshot(struct varlink_call *call)
{
	change_snapshot(call, QCOW_SNAPSHOT_DELETE, "snapshot deleted");
}
