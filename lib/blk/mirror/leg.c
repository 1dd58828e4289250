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
 * Invariant: a request is either waited for, or given up and only its own coroutine's.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "blk/mirror/mirror_private.h"
#include "rt/buf.h"

static bool has_data(enum leg_kind kind)
{
	return kind == LEG_READ || kind == LEG_WRITE;
}

static void op_free(struct leg_op *op)
{
	struct mirror *mirror = op->mirror;

	if (op->buf) {
		buf_put(op->buf, op->len);
		mirror->op_bytes -= op->len;
		op->buf = NULL;
	}
	list_push_front(&mirror->free_ops, &op->link);
	co_queue_wake_one(&mirror->op_free);
}

static suspends int op_carry_out(struct leg_op *op)
{
	struct blk *secondary = op->mirror->secondary;

	switch (op->kind) {
	case LEG_READ:
		return blk_read(secondary, op->off, op->buf, op->len);
	case LEG_WRITE:
		return blk_write(secondary, op->off, op->buf, op->len, op->flags);
	case LEG_ZERO:
		return blk_zero(secondary, op->off, op->len, op->flags);
	case LEG_DISCARD:
		return blk_discard(secondary, op->off, op->len, op->flags);
	case LEG_EXTENTS:
		blk_extents_init(&op->extents, op->list, ARRAY_LEN(op->list));
		return blk_extents(secondary, op->off, op->len, &op->extents);
	case LEG_FLUSH:
		break;
	}
	return blk_flush(secondary);
}

static suspends void op_run(void *arg)
{
	struct leg_op *op = arg;

	op->ret = op_carry_out(op);
	op->done = true;
	if (op->given_up)
		op_free(op);
	else
		co_queue_wake_all(&op->finished);
}

static bool has_room(const struct mirror *mirror, enum leg_kind kind, uint64_t len)
{
	if (list_empty((struct list *)&mirror->free_ops))
		return false;
	return !has_data(kind) || !mirror->op_bytes ||
	       mirror->op_bytes + len <= MIRROR_LEG_MAX_BYTES;
}

/* own_buf: holds what is to be written, and belongs to the request from now on, if it begins. */
static suspends struct leg_op *begin(struct mirror *mirror, enum leg_kind kind, uint64_t off,
	uint64_t len, unsigned flags, const void *data, void *own_buf)
{
	uint64_t deadline_ns = reactor_now_ns() + (uint64_t)mirror->timeout_s * NS_PER_SEC;

	while (unlikely(!has_room(mirror, kind, len)))
		if (!co_queue_wait_until(&mirror->op_free, deadline_ns))
			return NULL;

	struct leg_op *op = list_entry(list_pop_front(&mirror->free_ops), struct leg_op, link);

	op->mirror = mirror;
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
		mirror->op_bytes += len;
		if (data)
			memcpy(op->buf, data, len);
	}
	co_group_start(&mirror->ops_running, op_run, op);
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
		if (!co_queue_wait_until(&op->finished, op->deadline_ns) && !op->done)
			return -ETIMEDOUT;
	return op ? op->ret : -ETIMEDOUT;
}

void leg_put(struct leg_op *op)
{
	if (!op)
		return;
	if (op->done)
		op_free(op);
	else
		op->given_up = true;
}

suspends int leg_end(struct leg_op *op)
{
	int ret = leg_wait(op);

	leg_put(op);
	return ret;
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

void mirror_degrade(struct mirror *mirror, const char *what, uint64_t off, uint64_t len, int error)
{
	struct mirror_failure *failure = &mirror->secondary_failure;

	if (mirror->phase == MIRROR_DETACHED)
		return;
	mirror_dirty_set(mirror, off, len);
	failure->count++;
	if (mirror->phase == MIRROR_DEGRADED)
		return; /* the first failure is the one to tell */
	mirror_recent_to_dirty(mirror);
	mirror->degradations++;
	failure->time = time(NULL);
	if (error == -ETIMEDOUT)
		snprintf(failure->text, sizeof(failure->text),
			"%s of %llu bytes at %llu: no answer within %lld s", what,
			(unsigned long long)len, (unsigned long long)off,
			(long long)mirror->timeout_s);
	else
		snprintf(failure->text, sizeof(failure->text), "%s of %llu bytes at %llu: %s", what,
			(unsigned long long)len, (unsigned long long)off, strerror(-error));
	log_debug("mirror: degraded: %s", failure->text);
	mirror_retry_later(mirror);
	mirror_set_phase(mirror, MIRROR_DEGRADED);
}
