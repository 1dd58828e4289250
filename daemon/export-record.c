/*
 * Reads and writes an export's record, off the reactors' threads; see export-record.h.
 *
 * export->record is the main reactor's, and says what is on the disk; `stack` of it is what was opened, or
 * what an export was changed to since. A change is written first, on whichever reactor makes it, while it holds
 * the export (export_begin_change()), and read back for status afterwards.
 */
#include "daemon/export-record.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/daemon.h"
#include "daemon/record.h"

struct job {
	const char *path, *name, *reason;
	const struct conf *instead_of, *stack; /* stack NULL: remove */
	struct record *record;
	struct err *err;
	int ret;
};

static void read_job(void *arg)
{
	struct job *job = arg;

	job->ret = record_read(job->path, &job->record, job->err);
}

static void write_job(void *arg)
{
	struct job *job = arg;

	job->ret = job->stack ? record_write(job->path, job->name, job->reason, job->instead_of,
					job->stack, job->err)
			      : record_remove(job->path, job->err);
}

static char *path_of(const struct export *export)
{
	return record_path(export->daemon->config, export->config->name);
}

const struct conf *export_stack(const struct export *export)
{
	return export->record ? export->record->stack : export->opened->stack;
}

/* --- at the start ----------------------------------------------------------------------------- */

static void date_text(int64_t seconds, char *text, size_t size)
{
	time_t time = (time_t)seconds;
	struct tm tm;

	strftime(text, size, "%Y-%m-%d %H:%M:%S", localtime_r(&time, &tm));
}

static int refuse(const struct export *export, const struct record *record, struct err *err)
{
	return err_set(err, EINVAL,
		"export \"%s\": by \"%s\" it moved to another disk, says \"%s\"; the config names "
		"neither that disk nor the one from before. Correct the config, or remove that "
		"file to "
		"serve what the config names",
		export->config->name, record->reason, record->file);
}

suspends int export_recall(struct export *export, struct err *err)
{
	CLEANUP(free) char *path = path_of(export);
	struct job job = { .path = path, .err = err };
	char date[32];

	co_offload(read_job, &job);
	if (job.ret)
		return err_wrap(err, "export \"%s\"", export->config->name);
	if (!job.record)
		return 0;
	switch (record_judge(job.record, export->opened->stack)) {
	case RECORD_HOLDS:
		date_text(job.record->time, date, sizeof(date));
		log_warning(
			"export \"%s\": opens what it was changed to by \"%s\" on %s, as \"%s\" "
			"says, not what the config names",
			export->config->name, job.record->reason, date, path);
		export->record = job.record;
		return 0;
	case RECORD_CONFLICTS:
		refuse(export, job.record, err);
		record_free(job.record);
		return -err->code;
	case RECORD_IS_DONE:
		break;
	}
	log_info("export \"%s\": the config names what it was changed to: \"%s\" is not needed any "
		 "more",
		export->config->name, path);
	record_free(job.record);
	job.stack = NULL;
	co_offload(write_job, &job);
	return job.ret ? err_wrap(err, "export \"%s\"", export->config->name) : 0;
}

suspends void export_review_record(struct export *export)
{
	struct err err;

	if (export->record &&
		record_judge(export->record, export->config->stack) == RECORD_IS_DONE &&
		export_forget(export, &err))
		log_error("%s", err.text);
}

/* --- changes ---------------------------------------------------------------------------------- */

suspends int export_remember(
	struct export *export, const char *reason, const struct conf *stack, struct err *err)
{
	const struct conf *instead_of = export->config->stack;
	CLEANUP(free) char *path = path_of(export);
	struct job job = { .path = path,
		.name = export->config->name,
		.reason = reason,
		.instead_of = instead_of,
		.stack = conf_equal(stack, instead_of) ? NULL : stack,
		.err = err };

	co_offload(write_job, &job);
	return job.ret;
}

suspends void export_remembered(struct export *export)
{
	CLEANUP(free) char *path = path_of(export);
	struct err err;
	struct job job = { .path = path, .err = &err };

	co_offload(read_job, &job);
	if (job.ret) {
		log_error("export \"%s\": %s", export->config->name, err.text);
		return;
	}
	record_free(export->record);
	export->record = job.record;
}

suspends int export_forget(struct export *export, struct err *err)
{
	CLEANUP(free) char *path = path_of(export);
	struct job job = { .path = path, .err = err };
	int ret = export_begin_change(export, err);

	if (ret)
		return ret;
	if (!export->record)
		job.ret = err_set(err, ENOENT,
			"export \"%s\": nothing is remembered, the next start follows the config",
			export->config->name);
	else
		co_offload(write_job, &job);
	export_remembered(export);
	export_end_change(export);
	return job.ret;
}

json_t *export_record_status(const struct export *export)
{
	const struct record *record = export->record;

	return record ? json_pack("{s:s, s:s, s:I}", "file", record->file, "reason", record->reason,
				"time", (json_int_t)record->time)
		      : NULL;
}
