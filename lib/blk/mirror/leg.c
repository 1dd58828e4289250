/*
 * The secondary, which may be slow, absent or broken, without anybody waiting for it for good.
 *
 * A request to it runs in a coroutine of its own, on a copy of the data. Whoever began it waits until a
 * deadline and then gives it up: the guest goes on, the request ends when it ends. That is what the copy is for;
 * it costs less than a tenth of a write to memory. Requests and the memory they hold are bounded: with too
 * many under way the next one waits, which slows the guest to the pace of the secondary, up to its deadline.
 *
 * Any failure, a late answer included, degrades the mirror (mirror_degrade()): the secondary gets nothing
 * more until copy.c tries it again, and that only after the last request that was given up has ended, so a
 * late write never overtakes the copy.
 *
 * When the mirror ends before such requests do, all that they use is left behind for them (struct leg, and the
 * secondary itself), and closed by the last of them: cancel, promote and stop never wait for good either.
 *
 * Invariant: a request is either waited for, or given up and only its own coroutine's.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blk/mirror/mirror_private.h"
#include "rt/buf.h"

static bool has_data(enum leg_kind kind)
{
	return kind == LEG_READ || kind == LEG_WRITE;
}

/* --- one request ------------------------------------------------------------------------------ */

static void op_free(struct leg_op *op)
{
	struct leg *leg = op->leg;

	if (op->buf) {
		buf_put(op->buf, op->len);
		leg->bytes -= op->len;
		op->buf = NULL;
	}
	list_push_front(&leg->free_ops, &op->link);
	co_queue_wake_one(&leg->op_free);
}

static suspends int op_carry_out(struct leg_op *op)
{
	struct blk *disk = op->disk;

	switch (op->kind) {
	case LEG_READ:
		return blk_read(disk, op->off, op->buf, op->len);
	case LEG_WRITE:
		return blk_write(disk, op->off, op->buf, op->len, op->flags);
	case LEG_ZERO:
		return blk_zero(disk, op->off, op->len, op->flags);
	case LEG_DISCARD:
		return blk_discard(disk, op->off, op->len, op->flags);
	case LEG_EXTENTS:
		blk_extents_init(&op->extents, op->list, ARRAY_LEN(op->list));
		return blk_extents(disk, op->off, op->len, &op->extents);
	case LEG_RESIZE:
		return blk_resize(disk, op->len, op->flags, &op->leg->resize_err);
	case LEG_FLUSH:
		break;
	}
	return blk_flush(disk);
}

static suspends void op_run(void *arg)
{
	struct leg_op *op = arg;
	struct leg *leg = op->leg;

	op->ret = op_carry_out(op);
	op->done = true;
	if (!op->given_up) {
		co_queue_wake_all(&op->finished);
		return;
	}
	op_free(op);
	if (!--leg->given_up_count && leg->mirror)
		co_queue_wake_all(&leg->mirror->copy_wanted);
}

static bool has_room(struct leg *leg, enum leg_kind kind, uint64_t len)
{
	if (list_empty(&leg->free_ops))
		return false;
	return !has_data(kind) || !leg->bytes || leg->bytes + len <= MIRROR_LEG_MAX_BYTES;
}

/* own_buf: holds what is to be written, and belongs to the request from now on, if it begins. */
static suspends struct leg_op *begin(struct mirror *mirror, enum leg_kind kind, uint64_t off,
	uint64_t len, unsigned flags, const void *data, void *own_buf)
{
	uint64_t deadline_ns = reactor_now_ns() + (uint64_t)mirror->timeout_s * NS_PER_SEC;
	struct leg *leg = mirror->leg;

	while (unlikely(!has_room(leg, kind, len)))
		if (leg->hurried || !co_queue_wait_until(&leg->op_free, deadline_ns))
			return NULL;

	struct leg_op *op = list_entry(list_pop_front(&leg->free_ops), struct leg_op, link);

	op->disk = mirror->secondary;
	op->kind = kind;
	op->off = off;
	op->len = len;
	op->flags = flags;
	op->deadline_ns = deadline_ns;
	op->done = op->given_up = false;
	op->buf = NULL;
	if (has_data(kind)) {
		op->buf = own_buf ? own_buf : buf_get(len);
		if (!op->buf) {
			op_free(op);
			return NULL;
		}
		leg->bytes += len;
		if (data)
			memcpy(op->buf, data, len);
	}
	co_group_start(&leg->running, op_run, op);
	return op;
}

suspends struct leg_op *leg_begin(struct mirror *mirror, enum leg_kind kind, uint64_t off,
	uint64_t len, unsigned flags, const void *data)
{
	return begin(mirror, kind, off, len, flags, data, NULL);
}

suspends struct leg_op *leg_begin_write(
	struct mirror *mirror, uint64_t off, uint64_t len, void *buf)
{
	struct leg_op *op = begin(mirror, LEG_WRITE, off, len, 0, NULL, buf);

	if (!op)
		buf_put(buf, len);
	return op;
}

suspends int leg_wait(struct leg_op *op)
{
	while (op && !op->done)
		if (op->leg->hurried || !co_queue_wait_until(&op->finished, op->deadline_ns))
			break;
	return op && op->done ? op->ret : -ETIMEDOUT;
}

void leg_put(struct leg_op *op)
{
	if (!op)
		return;
	if (op->done) {
		op_free(op);
	} else {
		op->given_up = true;
		op->leg->given_up_count++;
	}
}

suspends int leg_end(struct leg_op *op)
{
	int ret = leg_wait(op);

	leg_put(op);
	return ret;
}

/* --- all of them ------------------------------------------------------------------------------ */

struct leg *leg_create(struct mirror *mirror)
{
	struct leg *leg = calloc(1, sizeof(*leg));

	if (!leg)
		return NULL;
	leg->mirror = mirror;
	leg->env = mirror->blk.env;
	list_init(&leg->free_ops);
	co_queue_init(&leg->op_free);
	co_group_init(&leg->running);
	for (unsigned i = 0; i < MIRROR_LEG_OPS; i++) {
		leg->ops[i].leg = leg;
		co_queue_init(&leg->ops[i].finished);
		list_push_back(&leg->free_ops, &leg->ops[i].link);
	}
	return leg;
}

void leg_hurry(struct leg *leg)
{
	leg->hurried = true;
	co_queue_wake_all(&leg->op_free);
	for (unsigned i = 0; i < MIRROR_LEG_OPS; i++)
		co_queue_wake_all(&leg->ops[i].finished);
}

/* What is left of a secondary that did not answer. */
static suspends void bury(void *arg)
{
	struct leg *leg = arg;
	struct blk_env *env = leg->env;

	co_group_wait(&leg->running);
	stack_close(leg->orphan);
	free(leg);
	env->left_behind--;
}

/* Takes the secondary, if it owns it, out of the mirror, which is about to be freed. */
static void leave_behind(struct mirror *mirror, bool owned)
{
	struct leg *leg = mirror->leg;

	blk_notice(&mirror->blk,
		"the secondary has not answered %u requests: it is closed when it does",
		leg->running.running);
	leg->mirror = NULL;
	if (owned) {
		leg->orphan = mirror->secondary;
		list_remove(&leg->orphan->extra_link);
		leg->orphan->parent = NULL;
	}
	leg->env->left_behind++;
	co_start(bury, leg);
}

suspends void leg_release(struct mirror *mirror, bool lost)
{
	uint64_t deadline_ns = reactor_now_ns() + MIRROR_LEG_GRACE_NS;
	struct leg *leg = mirror->leg;
	bool owned = mirror->secondary && mirror->secondary->parent == &mirror->blk;

	if (!leg)
		return;
	if (owned && lost)
		blk_abandon(mirror->secondary);
	else if (owned) /* a request that may take its time, unlike the flush of stack_close() */
		leg_put(leg_begin(mirror, LEG_FLUSH, 0, 0, 0, NULL));
	while (leg->running.running)
		if (!co_queue_wait_until(&leg->running.idle, deadline_ns))
			break;
	if (leg->running.running)
		leave_behind(mirror, owned);
	else
		free(leg);
	mirror->leg = NULL;
}

/* --- failure ---------------------------------------------------------------------------------- */

void mirror_retry_later(struct mirror *mirror)
{
	uint64_t delay_ns = MAX(2 * mirror->retry_delay_ns, MIRROR_RETRY_MIN_NS);

	mirror->retry_delay_ns = MIN(delay_ns, MIRROR_RETRY_MAX_NS);
	mirror->retry_at_ns = mirror->on_error == MIRROR_STOP
				      ? NO_DEADLINE
				      : reactor_now_ns() + mirror->retry_delay_ns;
}

void mirror_failed(struct mirror_failure *failure, const char *fmt, ...)
{
	va_list ap;

	failure->count++;
	failure->time = time(NULL);
	va_start(ap, fmt);
	vsnprintf(failure->text, sizeof(failure->text), fmt, ap);
	va_end(ap);
}

void mirror_degrade(struct mirror *mirror, const char *what, uint64_t off, uint64_t len, int error)
{
	struct mirror_failure *failure = &mirror->secondary_failure;

	if (mirror->phase == MIRROR_DETACHED)
		return;
	mirror_dirty_set(mirror, off, len);
	if (mirror->phase == MIRROR_DEGRADED) {
		failure->count++; /* the first failure is the one to tell */
		return;
	}
	mirror_recent_to_dirty(mirror);
	mirror->degradations++;
	if (error == -ETIMEDOUT)
		mirror_failed(failure, "%s of %llu bytes at %llu: no answer within %lld s", what,
			(unsigned long long)len, (unsigned long long)off,
			(long long)mirror->timeout_s);
	else
		mirror_failed(failure, "%s of %llu bytes at %llu: %s", what,
			(unsigned long long)len, (unsigned long long)off, strerror(-error));
	blk_notice(&mirror->blk, "degraded, the primary serves alone: %s", failure->text);
	mirror_retry_later(mirror);
	mirror_set_phase(mirror, MIRROR_DEGRADED);
}
