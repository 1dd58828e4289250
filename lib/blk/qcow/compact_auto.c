/*
 * Compaction that starts by itself (option compact-after), when the file holds more free space than wanted
 * and no guest is at work.
 *
 * A timer looks every compact-idle seconds. If no request came since the last look, and the free clusters inside the
 * file are more than the limit, a compaction begins, at compact-rate. The first request of a guest ends it after
 * the current step: what it moved stays moved, and the next idle time goes on with the rest.
 *
 * What a compaction leaves behind (what snapshots share does not move) does not count the next time, else
 * it would start for nothing again and again. The same goes for what was free when somebody cancelled one.
 *
 * How many clusters are in use is counted once, before the first decision, and then kept up to date by refcount.c.
 *
 * Failure: the compaction ends, which harms nothing, and is tried again when as much has become free anew.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/units.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/qcow.h"

struct auto_job {
	struct qcow_compact job;
	struct qcow *q;
	bool preempted;
};

/* --- the option ------------------------------------------------------------------------------- */

int qcow_compact_after_parse(const char *text, uint64_t *bytes, unsigned *percent, struct err *err)
{
	size_t len = strlen(text);

	*bytes = *percent = 0;
	if (text[len - 1] != '%') {
		int ret = units_parse_size(text, bytes, err);

		return ret ? err_wrap(err, "compact-after") : 0;
	}
	if (len < 2 || len > 3 || strspn(text, "0123456789") != len - 1 || *text == '0')
		return err_set(err, EINVAL,
			"\"compact-after\" is \"%s\": it must be a size, or a share from \"1%%\" "
			"to "
			"\"99%%\"",
			text);
	*percent = (unsigned)atoi(text);
	return 0;
}

/* --- when ------------------------------------------------------------------------------------- */

static uint64_t requests_seen(const struct qcow *q)
{
	const uint64_t *requests = q->blk.counters.requests;

	return requests[BLK_COUNT_READ] + requests[BLK_COUNT_WRITE] + requests[BLK_COUNT_ZERO] +
	       requests[BLK_COUNT_DISCARD];
}

static bool is_idle(const struct qcow *q)
{
	return !q->blk.in_flight.running && requests_seen(q) == q->auto_compact.requests;
}

static uint64_t free_clusters(const struct qcow *q)
{
	return q->end_index - MIN(q->end_index, q->used_clusters);
}

static bool is_worth_it(const struct qcow *q)
{
	uint64_t limit = q->auto_compact.limit_bytes >> q->cluster_bits;

	if (q->auto_compact.limit_percent)
		limit = q->end_index * q->auto_compact.limit_percent / 100;
	return free_clusters(q) > q->auto_compact.left_clusters + limit;
}

/* --- doing it --------------------------------------------------------------------------------- */

static void look_at_guests(struct qcow_compact *job)
{
	struct auto_job *own = container_of(job, struct auto_job, job);

	if (!is_idle(own->q))
		job->cancelled = own->preempted = true;
}

static suspends void compact(struct qcow *q)
{
	struct auto_job own = { .q = q };
	struct err err;

	own.job.rate_bytes_s = q->opt_compact_rate;
	own.job.progress = look_at_guests;
	int ret = qcow_compact(&q->blk, &own.job, &err);
	q->auto_compact.runs++;
	if (!own.preempted)
		q->auto_compact.left_clusters = free_clusters(q);
	log_debug("qcow: compaction by itself: %llu clusters moved, %llu of %llu bytes left%s%s",
		(unsigned long long)own.job.moved, (unsigned long long)own.job.size_after,
		(unsigned long long)own.job.size_before, ret ? ": " : "", ret ? err.text : "");
}

static suspends bool free_space_is_known(struct qcow *q)
{
	co_mutex_lock(&q->moving);
	int ret = qcow_count_used(q);
	co_mutex_unlock(&q->moving);
	if (!ret)
		q->auto_compact.left_clusters = MIN(
			q->auto_compact.left_clusters, free_clusters(q));
	return !ret;
}

static suspends void look(void *arg)
{
	struct qcow *q = arg;
	bool idle = is_idle(q) && !q->compacting && !q->corrupt;

	q->auto_compact.requests = requests_seen(q);
	if (idle && free_space_is_known(q) && is_worth_it(q) && is_idle(q))
		compact(q);
	qcow_compact_auto_start(q);
}

static void time_to_look(struct timer *timer)
{
	struct qcow *q = container_of(timer, struct qcow, auto_compact.timer);

	co_group_start(&q->auto_compact.looking, look, q);
}

void qcow_compact_auto_init(struct qcow *q)
{
	if (q->opt_compact_after) /* checked already */
		qcow_compact_after_parse(q->opt_compact_after, &q->auto_compact.limit_bytes,
			&q->auto_compact.limit_percent, NULL);
	timer_init(&q->auto_compact.timer, time_to_look);
	co_group_init(&q->auto_compact.looking);
}

void qcow_compact_auto_start(struct qcow *q)
{
	if (q->opt_compact_after && !q->read_only && !q->data_file && !q->closing)
		timer_arm(&q->auto_compact.timer,
			reactor_now_ns() + (uint64_t)q->opt_compact_idle_s * NS_PER_SEC);
}

suspends void qcow_compact_auto_stop(struct qcow *q)
{
	timer_cancel(&q->auto_compact.timer);
	co_group_wait(&q->auto_compact.looking);
}
