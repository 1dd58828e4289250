/*
 * The insides of the mirror layer, shared by the files of this folder.
 *
 *	mirror.c	the op table, options, open and close, what guests do
 *	check.c		whether two disks can be a mirror at all
 *	leg.c		the secondary: requests to it that may be given up, and what a failure of it means
 *	dirty.c		which chunks may differ, which regions were written lately
 *	copy.c		the copy in the background: pace, passes, retries
 *	log.c		the write-intent log
 *	live.c		pause, promote, cancel, compare
 *	resize.c	both legs become longer or shorter
 *	status.c	what status tells
 *	describe.c	a configuration that says how things are now
 */
#pragma once

#include "base/bitmap.h"
#include "base/util.h"
#include "blk/blk.h"
#include "blk/mirror/mirror.h"
#include "rt/lock.h"
#include "rt/reactor.h"

/* --- limits ----------------------------------------------------------------------------------- */

#define MIRROR_CHUNK_MIN  4096U
#define MIRROR_CHUNK_MAX  (4U << 20)
#define MIRROR_CHUNKS_MAX (UINT64_C(1) << 26) /* a bitmap of 8 MiB; then chunks grow */
#define MIRROR_STEP_MAX_BYTES \
	(512U << 10) /* of data copied at a time: a guest waits for one step */
/* To learn where data ends, a file in memory walks over all of its pages: so not often. */
#define MIRROR_LOOK_AHEAD_BYTES     (UINT64_C(1) << 30)
#define MIRROR_PASS_MAX_BYTES       (64U << 20) /* of zeroes passed over at a time */
#define MIRROR_CLEAR_MAX_BYTES      (16U << 20) /* of zeroes made at a time */
#define MIRROR_SLOW_CLEAR_MAX_BYTES (1U << 20)  /* by a secondary that has to write them */
#define MIRROR_STEPS                4           /* of the copy at the same time */
#define MIRROR_LEG_OPS              256         /* requests to the secondary at the same time */
#define MIRROR_LEG_GRACE_NS         NS_PER_SEC /* at the end, for requests that it should have answered */
#define MIRROR_LEG_MAX_BYTES \
	(64U << 20)           /* what these hold in copies of data; one alone may be more */
#define MIRROR_EXTENTS      8 /* asked for in one call */
#define MIRROR_REGION_MIN   (1U << 20)
#define MIRROR_REGIONS_MAX  65536U
#define MIRROR_REGION_WORDS (MIRROR_REGIONS_MAX / 64)
#define MIRROR_SETTLE_NS    (5 * NS_PER_SEC)
#define MIRROR_RETRY_MIN_NS NS_PER_SEC
#define MIRROR_RETRY_MAX_NS (60 * NS_PER_SEC)

struct mirror;

/* --- requests to the secondary ---------------------------------------------------------------- */

enum leg_kind { LEG_READ, LEG_WRITE, LEG_ZERO, LEG_DISCARD, LEG_FLUSH, LEG_EXTENTS, LEG_RESIZE };

/*
 * One request. It has its own copy of the data, so that whoever asked need not wait for it to the bitter end:
 * what was given up goes on alone and frees itself.
 */
struct leg_op {
	struct list link; /* in leg->free_ops */
	struct leg *leg;
	struct blk *disk;
	enum leg_kind kind;
	uint64_t off, len;
	unsigned flags;
	char *buf; /* len bytes, of reads and writes */
	struct blk_extent list[MIRROR_EXTENTS];
	struct blk_extents extents;
	uint64_t deadline_ns;
	int ret;
	bool done, given_up;
	struct co_queue finished;
};

/* The requests of a mirror. It lives on, without the mirror, until the last of them has ended. */
struct leg {
	struct mirror *mirror; /* NULL: gone */
	struct blk_env *env;
	struct blk *orphan; /* the secondary, to be closed then; NULL: somebody else does */
	struct leg_op ops[MIRROR_LEG_OPS];
	struct list free_ops;
	struct co_queue op_free;
	struct co_group running; /* given up ones as well */
	uint64_t bytes;          /* that they hold */
	unsigned given_up_count;
	struct err resize_err; /* of the one LEG_RESIZE there is */
	bool hurried;          /* nobody waits for an answer any more */
};

/* NULL when there is no memory. */
struct leg *leg_create(struct mirror *mirror);
/*
 * The mirror ends, and its tasks have. lost: what the secondary was told does not matter any more. In
 * bounded time: a secondary that does not answer is closed when it does, in the background.
 */
suspends void leg_release(struct mirror *mirror, bool lost);
/* Whoever waits gets -ETIMEDOUT at once. */
void leg_hurry(struct leg *leg);

/*
 * Begins a request (data: what to write, copied). NULL when it could not begin in time or for want of memory:
 * leg_end() takes that.
 */
suspends struct leg_op *leg_begin(struct mirror *mirror, enum leg_kind kind, uint64_t off,
	uint64_t len, unsigned flags, const void *data);
/* A write of len bytes in a buffer of buf_get(), which belongs to the request from now on. */
suspends struct leg_op *leg_begin_write(
	struct mirror *mirror, uint64_t off, uint64_t len, void *buf);
/* Waits for the end, or the deadline: 0, -errno, -ETIMEDOUT. The op stays until leg_put(). */
suspends int leg_wait(struct leg_op *op);
void leg_put(struct leg_op *op); /* NULL is fine */
/* leg_wait() and leg_put(). */
suspends int leg_end(struct leg_op *op);

/* The secondary failed: from now on the primary serves alone, and [off, off + len) is dirty, too. */
void mirror_degrade(struct mirror *mirror, const char *what, uint64_t off, uint64_t len, int error);

/* The next attempt on the secondary is farther away than the last one was. */
void mirror_retry_later(struct mirror *mirror);

/* --- the intent log --------------------------------------------------------------------------- */

struct mirror_log {
	struct blk *blk; /* NULL: there is none */
	bool broken;     /* could not be written; what is on it is not to be trusted */
	bool turned;     /* by a promotion */
	bool ended;      /* it has been told so, or could not be; nothing is noted any more */
	bool end_untold; /* could not be, and still says that its bits are true */
	bool promoted;   /* how it ended */
	uint64_t durable[MIRROR_REGION_WORDS]; /* what is on the disk */
	struct co_mutex mutex;                 /* held by whoever writes it */
	uint64_t writes;
};

/* --- the layer -------------------------------------------------------------------------------- */

enum mirror_phase { MIRROR_COPYING, MIRROR_IN_SYNC, MIRROR_DEGRADED, MIRROR_DETACHED };
enum mirror_on_error { MIRROR_RETRY, MIRROR_STOP };

struct mirror_failure {
	char text[224]; /* "" : none so far */
	int64_t time;   /* CLOCK_REALTIME, seconds */
	uint64_t count;
};

/* How much there was of something in each of the last seconds. */
struct mirror_meter {
	uint64_t second; /* of the newest slot, slots[second % 4] */
	uint64_t slots[4];
};

void mirror_meter_add(struct mirror_meter *meter, uint64_t amount);
/* Per second, over the last three that are full. */
uint64_t mirror_meter_rate(struct mirror_meter *meter);

struct mirror {
	struct blk blk;

	/* options */
	const struct conf *secondary_conf;
	bool overwrite, paused, start_degraded;
	uint64_t rate; /* bytes/s, 0: none */
	uint64_t chunk_size;
	int on_error; /* enum mirror_on_error */
	int64_t timeout_s;
	const char *log_path;

	/*
	 * The legs. primary is blk.below until a promotion; requests use these pointers, so that they can
	 * finish while the graph is being changed. No secondary: it could not be opened yet (degraded).
	 */
	struct blk *primary, *secondary;
	enum mirror_phase phase;
	bool promoted; /* detached, and the secondary serves */
	bool closing;
	bool primary_left; /* it did not answer, and a promotion under way gave it up */
	bool flush_untold; /* a flush of the primary failed, of which no guest has heard yet */
	bool resizing;     /* by ourselves */
	bool leg_lost;     /* the secondary had failed when the mirror ended */
	struct range_lock writes; /* guests' changes and copy steps, exclusive */
	char note[224];           /* why it copies what it copies */
	int64_t phase_time;       /* since when it is in this phase, seconds */

	/* dirty.c */
	uint64_t chunk_count, dirty_count;
	uint64_t *dirty; /* a bit per chunk that may differ */
	uint64_t region_size, region_count;
	uint64_t recent[MIRROR_REGION_WORDS];   /* written since the last settling began */
	uint64_t settling[MIRROR_REGION_WORDS]; /* written before, being flushed */
	bool any_recent;
	struct co_mutex settle_mutex;
	struct co_queue settle_wanted;

	/* leg.c */
	struct leg *leg;
	unsigned degradations; /* counts; whoever waits meanwhile compares */
	struct mirror_failure secondary_failure, primary_failure;
	uint64_t retry_at_ns, retry_delay_ns;

	/* copy.c */
	struct co_group tasks; /* the coroutines of the mirror itself */
	struct co_queue copy_wanted;
	struct co_queue changed; /* who waits for progress */
	struct co_mutex claiming;
	uint64_t step_max;   /* MIRROR_STEP_MAX_BYTES; tests take smaller ones */
	uint64_t cursor;     /* the pass has come to this offset */
	uint64_t data_until; /* up to here the primary was seen to be data */
	bool pass_failed;
	bool single_chunks; /* a pass failed: find out which chunk it is */
	uint64_t copy_allowed_ns, rate_allowed_ns;
	uint64_t copied_bytes, skipped_bytes, completed_count;
	uint64_t began_ns,
		began_bytes; /* for the rate: when this copy began, and copied_bytes then */

	/* what guests do */
	uint64_t guest_count;         /* requests */
	uint64_t guest_written;       /* bytes */
	uint64_t served_by_secondary; /* reads */
	struct mirror_meter written;  /* bytes, by guests */
	struct mirror_meter dirtied;  /* bytes */
	struct mirror_meter change_ns,
		wait_ns; /* what changes of both legs took; of it, when only the secondary was missing */

	struct mirror_log log;
};

static inline struct mirror *to_mirror(const struct blk *blk)
{
	return container_of((struct blk *)blk, struct mirror, blk);
}

/* The secondary takes part in what guests do. */
static inline bool mirror_leg_used(const struct mirror *mirror)
{
	return mirror->phase == MIRROR_COPYING || mirror->phase == MIRROR_IN_SYNC;
}

/* What the secondary can zero within the time it has, by far. */
static inline uint64_t mirror_clear_max(const struct mirror *mirror)
{
	return mirror->secondary && mirror->secondary->caps.zero_fast ? MIRROR_CLEAR_MAX_BYTES
								      : MIRROR_SLOW_CLEAR_MAX_BYTES;
}

/* Counts a failure and says what it was. */
void mirror_failed(struct mirror_failure *failure, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* Who serves when the mirror only passes on, and who is asked first otherwise. */
static inline struct blk *mirror_main_leg(const struct mirror *mirror)
{
	return mirror->promoted ? mirror->secondary : mirror->primary;
}

/* mirror.c. The secondary, opened and looked at; on an error there is none. */
suspends int mirror_open_secondary(struct mirror *mirror, struct err *err);

/*
 * live.c. Whether a request failed because the primary was left meanwhile; left_before: as it was when it began. Then
 * returns when that has been decided, and the leg that serves now is to be asked.
 */
suspends bool mirror_ask_again(struct mirror *mirror, bool left_before);

/* check.c. The first looks at configuration alone, and at the files that it names. */
suspends int mirror_check_identity(const struct mirror *mirror, struct err *err);
int mirror_check_legs(const struct mirror *mirror, const struct blk *secondary, struct err *err);
bool mirror_conf_nests(const struct conf *stack);

/* dirty.c */
int mirror_dirty_init(struct mirror *mirror, struct err *err);
/* For another size, in two steps: the first may fail, the second changes the maps. */
struct mirror_map {
	uint64_t *dirty;
	uint64_t chunk_size, chunk_count, region_size, region_count;
};
int mirror_map_create(
	const struct mirror *mirror, uint64_t size, struct mirror_map *map, struct err *err);
void mirror_map_replace(struct mirror *mirror, uint64_t size, const struct mirror_map *map);
void mirror_dirty_set(struct mirror *mirror, uint64_t off, uint64_t len);
void mirror_dirty_clear(struct mirror *mirror, uint64_t off, uint64_t len);
bool mirror_dirty_all(const struct mirror *mirror, uint64_t off, uint64_t len);
bool mirror_dirty_any(const struct mirror *mirror, uint64_t off, uint64_t len);
/* The next run of dirty chunks at or after off, as bytes within the disk; false when there is none. */
bool mirror_dirty_next(const struct mirror *mirror, uint64_t off, uint64_t *start, uint64_t *len);
/* Both legs are about to be written there. */
void mirror_recent_mark(struct mirror *mirror, uint64_t off, uint64_t len);
/* The settler is to run, in a while. */
void mirror_want_settling(struct mirror *mirror);
bool mirror_recent_any(const struct mirror *mirror, uint64_t off, uint64_t len);
void mirror_recent_to_dirty(struct mirror *mirror);
/* The regions that the log must have: recent or with dirty chunks. */
void mirror_regions_needed(const struct mirror *mirror, uint64_t *regions);
/* Makes what was written so far durable on both legs, and forgets that it was recent. */
suspends void mirror_settle(struct mirror *mirror);
suspends void mirror_settler_run(void *arg);

/* copy.c */
suspends void mirror_copier_run(void *arg);
void mirror_set_phase(struct mirror *mirror, enum mirror_phase phase);
/* A read of the primary failed: for status. */
void mirror_primary_failed(struct mirror *mirror, uint64_t off, uint64_t len, int ret);
/* A flush of it did: what it lost, the secondary may have. */
void mirror_primary_flush_failed(struct mirror *mirror, int ret);

/* log.c; all do nothing without a log. */
suspends int mirror_log_open(struct mirror *mirror, struct err *err);
/* Returns when the regions of the range are durable on the log. */
suspends int mirror_log_require(struct mirror *mirror, uint64_t off, uint64_t len);
suspends int mirror_log_rewrite(struct mirror *mirror); /* header and all regions that are needed */
suspends void mirror_log_relax(struct mirror *mirror);  /* takes back what is not needed any more */
/* The legs have changed places. */
suspends int mirror_log_turn(struct mirror *mirror);
/*
 * The mirror ends: a restart with the same roles must not trust the log, or not run at all (promoted). Where the log
 * cannot be told, the settler and close() try again.
 */
suspends void mirror_log_end(struct mirror *mirror, bool promoted);
suspends void mirror_log_end_again(struct mirror *mirror);

/* resize.c */
suspends int mirror_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err);

/* describe.c */
struct conf *mirror_describe(const struct blk *blk);
/* The whole stack, as it is after a promotion. */
struct conf *mirror_describe_promoted(const struct mirror *mirror, bool keep);

/* status.c */
void mirror_add_status(struct blk *blk, json_t *object);
