/*
 * fault: fails, delays and tears what passes through it, and logs what changes the disk; see fault.h.
 *
 * Each op does the same: delay, decide (must_fail), log the beginning, pass on, log the return. The
 * random numbers come from one generator with the configured seed, so a run whose requests come in the
 * same order fails the same ones.
 *
 * The log is written by plain write(2), in the order in which things happen: a layer for tests may block.
 * A log that cannot be written fails the operation: a test must not believe in half a log.
 */
#include "blk/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/util.h"
#include "blk/layers.h"
#include "rt/lock.h"
#include "rt/reactor.h"

struct fault {
	struct blk blk;

	/* options */
	const struct conf *ops, *delay_ops, *hang_ops;
	uint64_t from, to;
	int error; /* index in error_names */
	int64_t every, countdown, permille, delay_us, delay_random_us, seed, log_disk;
	bool sticky, torn;
	const char *log;

	struct fault_rules rules;
	struct co_queue hanging; /* operations, until fault_release() */
	uint64_t counted, failed;
	uint64_t random; /* state of the generator */
	int log_fd;      /* -1: no log */
	uint64_t last_id;
};

static const char *const error_names[] = { "EIO", "ENOSPC", "ENOMEM", "ENOTSUP", "ESHUTDOWN",
	NULL };
static const int error_codes[] = { EIO, ENOSPC, ENOMEM, EOPNOTSUPP, ESHUTDOWN };
static const char *const op_names[] = { "read", "write", "flush", "zero", "discard", "extents",
	"resize" };

#define OPT(member) offsetof(struct fault, member)

static const struct opt fault_options[] = {
	{ "ops", OPT_STRINGS, OPT(ops),
		.help = "which can fail: read, write, flush, zero, discard, "
			"extents, resize, all; none by default" },
	{ "from", OPT_SIZE, OPT(from), .help = "only those that reach beyond this offset" },
	{ "to", OPT_SIZE, OPT(to), .help = "and begin before this one" },
	{ "error", OPT_ENUM, OPT(error), .choices = error_names, .help = "what they fail with" },
	{ "every", OPT_INT, OPT(every), .help = "every n-th of these fails" },
	{ "countdown", OPT_INT, OPT(countdown), .help = "the n-th from the start fails" },
	{ "sticky", OPT_BOOL, OPT(sticky), .help = "and all after it" },
	{ "permille", OPT_INT, OPT(permille), .max = 1000, .help = "so many of 1000 fail" },
	{ "torn", OPT_BOOL, OPT(torn), .help = "failing writes let a part through" },
	{ "delay-ops", OPT_STRINGS, OPT(delay_ops), .help = "which are delayed; all by default" },
	{ "delay-us", OPT_INT, OPT(delay_us), .help = "by so many microseconds" },
	{ "delay-random-us", OPT_INT, OPT(delay_random_us),
		.help = "and at random up to so many more" },
	{ "hang-ops", OPT_STRINGS, OPT(hang_ops), .help = "which never end; none by default" },
	{ "seed", OPT_INT, OPT(seed), "1", .help = "of the random numbers" },
	{ "log", OPT_STRING, OPT(log), .help = "file that gets every change; see fault.h" },
	{ "log-disk", OPT_INT, OPT(log_disk), .max = 255,
		.help = "number of the disk, where several share a log; 0 begins it" },
	{ 0 },
};

static struct fault *to_fault(const struct blk *blk)
{
	return container_of((struct blk *)blk, struct fault, blk);
}

/* --- rules ------------------------------------------------------------------------------------ */

/* Sets the bits of the ops that names says; also checks them. */
static int parse_ops(const struct conf *names, unsigned fallback, unsigned *ops, struct err *err)
{
	*ops = names ? 0 : fallback;
	for (size_t i = 0; i < conf_strings_count(names); i++) {
		const char *name = conf_strings_get(names, i);
		unsigned bit = !strcmp(name, "all") ? FAULT_ALL : 0;

		for (unsigned op = 0; op < ARRAY_LEN(op_names); op++)
			if (!strcmp(name, op_names[op]))
				bit = 1U << op;
		if (!bit)
			return conf_error(names, err,
				"\"%s\" is no operation: read, write, flush, zero, discard, "
				"extents, resize, all",
				name);
		*ops |= bit;
	}
	return 0;
}

static int rules_from_options(const struct fault *fault, struct fault_rules *rules, struct err *err)
{
	*rules = (struct fault_rules){
		.from = fault->from,
		.to = fault->to,
		.error = error_codes[fault->error],
		.every = (uint64_t)fault->every,
		.countdown = (uint64_t)fault->countdown,
		.sticky = fault->sticky,
		.permille = (unsigned)fault->permille,
		.torn = fault->torn,
		.delay_us = (uint64_t)fault->delay_us,
		.delay_random_us = (uint64_t)fault->delay_random_us,
	};

	int ret = parse_ops(fault->ops, 0, &rules->ops, err);

	if (!ret)
		ret = parse_ops(fault->hang_ops, 0, &rules->hang_ops, err);
	return ret ? ret : parse_ops(fault->delay_ops, FAULT_ALL, &rules->delay_ops, err);
}

/* xorshift64*: small, and the same everywhere. */
static uint64_t next_random(struct fault *fault)
{
	uint64_t x = fault->random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	fault->random = x;
	return x * UINT64_C(0x2545f4914f6cdd1d) >> 11;
}

static bool must_fail(struct fault *fault, enum fault_op op, uint64_t off, uint64_t len)
{
	struct fault_rules *rules = &fault->rules;
	bool anywhere = op == FAULT_FLUSH || op == FAULT_RESIZE;
	bool touches = off + len > rules->from && (!rules->to || off < rules->to);

	if (!(rules->ops & op) || !(touches || anywhere))
		return false;
	fault->counted++;

	bool fails = rules->every && fault->counted % rules->every == 0;

	if (rules->countdown)
		fails |= rules->sticky ? fault->counted >= rules->countdown
				       : fault->counted == rules->countdown;
	if (rules->permille)
		fails |= next_random(fault) % 1000 < rules->permille;
	fault->failed += fails;
	return fails;
}

static suspends void delay(struct fault *fault, enum fault_op op)
{
	const struct fault_rules *rules = &fault->rules;
	uint64_t us = rules->delay_us;

	if (rules->hang_ops & op)
		co_queue_wait(&fault->hanging);
	if (!(rules->delay_ops & op))
		return;
	if (rules->delay_random_us)
		us += next_random(fault) % (rules->delay_random_us + 1);
	if (us)
		co_sleep_ns(us * 1000);
}

struct blk *fault_find(struct blk *blk)
{
	while (blk && blk->ops != &fault_ops)
		blk = blk->below;
	return blk;
}

void fault_set(struct blk *blk, const struct fault_rules *rules)
{
	struct fault *fault = to_fault(blk);

	fault->rules = rules ? *rules : (struct fault_rules){ 0 };
	fault->counted = fault->failed = 0;
}

void fault_release(struct blk *blk)
{
	co_queue_wake_all(&to_fault(blk)->hanging);
}

uint64_t fault_counted(const struct blk *blk)
{
	return to_fault(blk)->counted;
}

uint64_t fault_failed(const struct blk *blk)
{
	return to_fault(blk)->failed;
}

/* --- the log ---------------------------------------------------------------------------------- */

static int log_record(struct fault *fault, enum fault_log_kind kind, uint64_t id, uint64_t off,
	uint64_t len, unsigned flags, const void *data)
{
	if (fault->log_fd < 0)
		return 0;

	struct fault_log_record record = {
		.magic = be32_make(FAULT_LOG_MAGIC),
		.kind = be16_make((uint16_t)kind),
		.flags = be16_make((uint16_t)flags),
		.id = be64_make(id),
		.off = be64_make(off),
		.len = be64_make(len),
	};
	struct iovec iov[2] = { { &record, sizeof(record) }, { (void *)data, data ? len : 0 } };
	size_t total_len = iov[0].iov_len + iov[1].iov_len;

	return writev(fault->log_fd, iov, 2) == (ssize_t)total_len ? 0 : -EIO;
}

static int log_return(struct fault *fault, uint64_t id, int ret)
{
	int logged = log_record(fault, FAULT_LOG_RETURN, id, (uint64_t)-ret, 0, 0, NULL);

	return ret ? ret : logged;
}

/* --- ops -------------------------------------------------------------------------------------- */

static int fault_check(const struct blk *blk, struct err *err)
{
	struct fault_rules rules;

	return rules_from_options(to_fault(blk), &rules, err);
}

static suspends int fault_open(struct blk *blk, struct err *err)
{
	struct fault *fault = to_fault(blk);

	co_queue_init(&fault->hanging);
	fault->log_fd = -1;
	fault->random = (uint64_t)fault->seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	fault->last_id = (uint64_t)fault->log_disk << FAULT_LOG_DISK_SHIFT;
	if (fault->log) {
		int emptied = fault->log_disk ? 0 : O_TRUNC;

		fault->log_fd = open(
			fault->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | emptied, 0600);
		if (fault->log_fd < 0 || log_record(fault, FAULT_LOG_OPEN, fault->last_id, 0,
						 blk->caps.size, 0, NULL) < 0)
			return err_sys(err, errno, "log \"%s\"", fault->log);
	}
	return rules_from_options(fault, &fault->rules, err);
}

static suspends void fault_close(struct blk *blk)
{
	struct fault *fault = to_fault(blk);

	if (fault->log_fd >= 0)
		close(fault->log_fd);
}

static suspends int fault_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_READ);
	if (must_fail(fault, FAULT_READ, off, len))
		return -fault->rules.error;
	return blk_read(blk->below, off, buf, len);
}

static suspends int write_logged(
	struct fault *fault, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	uint64_t id = ++fault->last_id;
	int ret = log_record(fault, FAULT_LOG_WRITE, id, off, len, flags, buf);

	if (ret)
		return ret;
	return log_return(fault, id, blk_write(fault->blk.below, off, buf, len, flags));
}

static suspends int fault_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct fault *fault = to_fault(blk);
	size_t unit = MAX(FAULT_SECTOR, (int)blk->caps.block_size);

	delay(fault, FAULT_WRITE);
	if (!must_fail(fault, FAULT_WRITE, off, len))
		return write_logged(fault, off, buf, len, flags);

	int error = fault->rules.error;
	size_t kept_len = fault->rules.torn ? next_random(fault) % (len / unit + 1) * unit : 0;

	if (kept_len)
		write_logged(fault, off, buf, kept_len, 0);
	return -error;
}

static suspends int fault_flush(struct blk *blk)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_FLUSH);
	if (must_fail(fault, FAULT_FLUSH, 0, 0))
		return -fault->rules.error;

	uint64_t id = ++fault->last_id;
	int ret = log_record(fault, FAULT_LOG_FLUSH, id, 0, 0, 0, NULL);

	return ret ? ret : log_return(fault, id, blk_flush(blk->below));
}

static suspends int fault_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_ZERO);
	if (must_fail(fault, FAULT_ZERO, off, len))
		return -fault->rules.error;

	uint64_t id = ++fault->last_id;
	int ret = log_record(fault, FAULT_LOG_ZERO, id, off, len, flags, NULL);

	return ret ? ret : log_return(fault, id, blk_zero(blk->below, off, len, flags));
}

static suspends int fault_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_DISCARD);
	if (must_fail(fault, FAULT_DISCARD, off, len))
		return -fault->rules.error;

	uint64_t id = ++fault->last_id;
	int ret = log_record(fault, FAULT_LOG_DISCARD, id, off, len, flags, NULL);

	return ret ? ret : log_return(fault, id, blk_discard(blk->below, off, len, flags));
}

static suspends int fault_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_EXTENTS);
	if (must_fail(fault, FAULT_EXTENTS, off, len))
		return -fault->rules.error;
	return blk_extents(blk->below, off, len, extents);
}

static suspends int fault_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct fault *fault = to_fault(blk);

	delay(fault, FAULT_RESIZE);
	if (must_fail(fault, FAULT_RESIZE, 0, 0))
		return err_sys(err, fault->rules.error, "injected");

	uint64_t id = ++fault->last_id;
	int ret = log_record(fault, FAULT_LOG_RESIZE, id, 0, size, flags, NULL);

	if (ret < 0)
		return err_sys(err, -ret, "log \"%s\"", fault->log);
	ret = blk_resize(blk->below, size, flags, err);
	log_return(fault, id, ret);
	return ret;
}

static void fault_status(struct blk *blk, json_t *object)
{
	json_object_set_new(object, "counted", json_integer((json_int_t)fault_counted(blk)));
	json_object_set_new(object, "failed", json_integer((json_int_t)fault_failed(blk)));
}

const struct blk_ops fault_ops = {
	.name = "fault",
	.summary = "for tests: errors, delays, torn writes, and a log of all changes",
	.options = fault_options,
	.struct_size = sizeof(struct fault),
	.check = fault_check,
	.open = fault_open,
	.close = fault_close,
	.read = fault_read,
	.write = fault_write,
	.flush = fault_flush,
	.zero = fault_zero,
	.discard = fault_discard,
	.extents = fault_extents,
	.resize = fault_resize,
	.status = fault_status,
};
