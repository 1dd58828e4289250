/*
 * The methods of the control socket about mirrors; see export-mirror.h, which does the work.
 *
 * MirrorWait and MirrorVerify take as long as there is to copy or compare. They end early when their caller
 * hangs up, when the export or the daemon is stopped, and when the mirror is gone, so they hold up nobody.
 */
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "base/util.h"
#include "blk/mirror/mirror.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export-mirror.h"
#include "daemon/export-record.h"

#define PROGRESS_NS (200 * NS_PER_MS)

/* What changes something and returns nothing ends so. */
static suspends void finish(struct varlink_call *call, const char *what, struct export *export,
	int ret, const struct err *err)
{
	control_log_change(call, what, export, ret, err);
	control_answer(call, ret, err, NULL);
	control_put_export(export);
}

suspends void control_mirror_start(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct mirror_request request = {
		.to = varlink_string(call, "to"),
		.intent_log = varlink_string(call, "intent_log"),
		.overwrite = varlink_bool(call, "overwrite", false),
		.paused = varlink_bool(call, "paused", false),
		.rate = (uint64_t)varlink_int(call, "rate", 0),
	};
	struct err err;

	if (export)
		finish(call, "mirror start", export, export_mirror_start(export, &request, &err),
			&err);
}

static suspends void order(struct varlink_call *call, const char *what, enum mirror_order order)
{
	struct export *export = control_get_export(call);
	uint64_t rate = (uint64_t)varlink_int(call, "rate", 0);
	struct err err;

	if (export)
		finish(call, what, export, export_mirror_order(export, order, rate, &err), &err);
}

suspends void control_mirror_pause(struct varlink_call *call)
{
	order(call, "mirror pause", MIRROR_ORDER_PAUSE);
}

suspends void control_mirror_resume(struct varlink_call *call)
{
	order(call, "mirror resume", MIRROR_ORDER_RESUME);
}

suspends void control_mirror_rate(struct varlink_call *call)
{
	order(call, "mirror rate", MIRROR_ORDER_RATE);
}

suspends void control_mirror_cancel(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct err err;

	if (export)
		finish(call, "mirror cancel", export, export_mirror_cancel(export, &err), &err);
}

suspends void control_mirror_promote(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	bool force = varlink_bool(call, "force", false), keep = varlink_bool(call, "keep", false);
	struct err err;

	if (export)
		finish(call, force ? "forced mirror promote" : "mirror promote", export,
			export_mirror_promote(export, force, keep, &err), &err);
}

suspends void control_mirror_forget(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct err err;

	if (export)
		finish(call, "mirror forget", export, export_forget(export, &err), &err);
}

suspends void control_mirror_status(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct err err;

	if (!export)
		return;
	json_t *mirror = export_mirror_status(export, &err);
	control_answer(call, mirror ? 0 : -err.code, &err,
		mirror ? json_pack("{s:o}", "mirror", mirror) : NULL);
	control_put_export(export);
}

/* --- what takes a while ----------------------------------------------------------------------- */

static bool is_stopping(const struct export *export)
{
	return export->stopping || export->daemon->stopping;
}

static int tell_stopping(const struct export *export, struct err *err)
{
	return err_set(err, ESHUTDOWN, "export \"%s\" is being stopped", export->config->name);
}

static bool is_in_sync(const json_t *mirror)
{
	const char *phase = json_string_value(json_object_get(mirror, "phase"));

	return phase && !strcmp(phase, "in_sync");
}

/* Something may become dirty again, by a failure: who waits is told of the best so far. */
static void keep_rising(json_t *mirror, double *percent)
{
	*percent = MAX(*percent, json_real_value(json_object_get(mirror, "percent")));
	json_object_set_new(mirror, "percent", json_real(*percent));
}

suspends void control_mirror_wait(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	uint64_t told_ns = 0;
	double percent = 0;
	struct err err;
	json_t *mirror;

	if (!export)
		return;
	while ((mirror = export_mirror_status(export, &err)) && !is_in_sync(mirror)) {
		int ret = 0;

		keep_rising(mirror, &percent);
		if (reactor_now_ns() - told_ns >= PROGRESS_NS) {
			told_ns = reactor_now_ns();
			ret = varlink_progress(call, json_pack("{s:O}", "mirror", mirror));
		}
		json_decref(mirror);
		mirror = NULL;
		if (ret)
			err_set(&err, -ret, "nobody waits any more");
		else if (is_stopping(export))
			ret = tell_stopping(export, &err);
		if (ret)
			break;
		export_mirror_wait(export);
	}
	control_answer(call, mirror ? 0 : -err.code, &err,
		mirror ? json_pack("{s:o}", "mirror", mirror) : NULL);
	control_put_export(export);
}

static json_t *comparison(uint64_t bytes, uint64_t done, const struct mirror_comparison *sum)
{
	json_t *first = sum->different ? json_integer((json_int_t)sum->first_off) : json_null();

	return json_pack("{s:I, s:I, s:I, s:I, s:o}", "bytes", (json_int_t)bytes, "done",
		(json_int_t)done, "compared", (json_int_t)sum->compared, "different",
		(json_int_t)sum->different, "first_difference", first);
}

suspends void control_mirror_verify(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct mirror_comparison sum = {};
	uint64_t off = 0, size, told_ns = 0;
	struct err err;
	int ret = 0;

	if (!export)
		return;
	size = atomic_load(&export->size);
	while (off < size && !ret) {
		ret = export_mirror_compare(export, &off, &sum, &err);
		if (!ret && is_stopping(export))
			ret = tell_stopping(export, &err);
		if (!ret && reactor_now_ns() - told_ns >= PROGRESS_NS) {
			told_ns = reactor_now_ns();
			ret = varlink_progress(call, comparison(size, off, &sum));
			if (ret)
				err_set(&err, -ret, "nobody waits any more");
		}
		if (!ret)
			co_sleep_ns(0); /* one turn for guests, between two steps */
	}
	control_log_change(call, "mirror verify", export, ret, &err);
	control_answer(call, ret, &err, comparison(size, off, &sum));
	control_put_export(export);
}
