/*
 * A leaf for tests, in memory, as awkward as its options say. It checks that blk.c calls its ops with
 * what caps promise, waits in the middle of them, and counts them.
 */
#pragma once

#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "blk/call.h"
#include "co_test.h"
#include "seed.h"

struct fake {
	struct blk blk;

	/* options */
	uint64_t block_size, mem_align, max_request;
	bool fua, zero, discard, zero_fast;
	int64_t waits;

	uint8_t *data;
	struct seed seed;
	unsigned reads, writes, flushes, zeroes, discards, fua_writes, fua_zeroes;
	unsigned last_zero_flags;
	uint64_t extents_asked_bytes;
	uint64_t largest_write;
	int resize_error;               /* -errno that the next resize answers */
	const struct blk_extent *shown; /* what extents shows, from 0 on; ended by length 0 */
};

#define FAKE_OPT(member) offsetof(struct fake, member)

static const struct opt fake_options[] = {
	{ "size", OPT_SIZE, offsetof(struct blk, caps.size), "64K" },
	{ "block-size", OPT_SIZE, FAKE_OPT(block_size), "1" },
	{ "mem-align", OPT_SIZE, FAKE_OPT(mem_align), "1" },
	{ "max-request", OPT_SIZE, FAKE_OPT(max_request), "32M" },
	{ "fua", OPT_BOOL, FAKE_OPT(fua), "false" },
	{ "zero", OPT_BOOL, FAKE_OPT(zero), "false", .help = "the op works" },
	{ "discard", OPT_BOOL, FAKE_OPT(discard), "false", .help = "the op works" },
	{ "zero-fast", OPT_BOOL, FAKE_OPT(zero_fast), "false" },
	{ "waits", OPT_INT, FAKE_OPT(waits), "0", .help = "so often at most in each op" },
	{ 0 },
};

static inline struct fake *to_fake(struct blk *blk)
{
	return container_of(blk, struct fake, blk);
}

/* The other requests get their chance, a random number of times. */
static inline suspends void fake_wait(struct fake *fake)
{
	for (uint64_t n = seed_below(&fake->seed, (uint64_t)fake->waits + 1); n; n--)
		co_yield ();
}

static inline void fake_check(const struct fake *fake, uint64_t off, uint64_t len)
{
	const struct blk_caps *caps = &fake->blk.caps;

	ck_assert(len && range_ok(off, len, caps->size));
	ck_assert(is_aligned(off | len, caps->block_size));
}

static inline void fake_check_buf(const struct fake *fake, const void *buf, uint64_t len)
{
	ck_assert_uint_le(len, fake->blk.caps.max_request);
	ck_assert(is_aligned((uintptr_t)buf, fake->blk.caps.mem_align));
}

static inline suspends int fake_open(struct blk *blk, struct err *err)
{
	struct fake *fake = to_fake(blk);

	fake->data = calloc(1, blk->caps.size);
	blk->caps.block_size = (uint32_t)fake->block_size;
	blk->caps.mem_align = (uint32_t)fake->mem_align;
	blk->caps.max_request = (uint32_t)fake->max_request;
	blk->caps.fua = fake->fua;
	blk->caps.zero_fast = fake->zero_fast;
	return 0;
}

static inline suspends void fake_close(struct blk *blk)
{
	free(to_fake(blk)->data);
}

static inline suspends int fake_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct fake *fake = to_fake(blk);
	size_t half = len / 2;

	fake->reads++;
	fake_check(fake, off, len);
	fake_check_buf(fake, buf, len);
	fake_wait(fake);
	memcpy(buf, fake->data + off, half);
	fake_wait(fake);
	memcpy((char *)buf + half, fake->data + off + half, len - half);
	return 0;
}

static inline suspends int fake_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct fake *fake = to_fake(blk);
	size_t half = len / 2;

	fake->writes++;
	fake->fua_writes += flags == BLK_FUA;
	fake->largest_write = MAX(fake->largest_write, len);
	fake_check(fake, off, len);
	fake_check_buf(fake, buf, len);
	ck_assert(!flags || (flags == BLK_FUA && blk->caps.fua));
	fake_wait(fake);
	memcpy(fake->data + off, buf, half);
	fake_wait(fake);
	memcpy(fake->data + off + half, (const char *)buf + half, len - half);
	return 0;
}

static inline suspends int fake_flush(struct blk *blk)
{
	to_fake(blk)->flushes++;
	fake_wait(to_fake(blk));
	return 0;
}

static inline suspends int fake_clear(struct fake *fake, uint64_t off, uint64_t len, bool works)
{
	fake_check(fake, off, len);
	fake_wait(fake);
	if (!works)
		return -EOPNOTSUPP;
	memset(fake->data + off, 0, len);
	fake_wait(fake);
	return 0;
}

static inline suspends int fake_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct fake *fake = to_fake(blk);

	fake->zeroes++;
	fake->fua_zeroes += !!(flags & BLK_FUA);
	fake->last_zero_flags = flags;
	ck_assert(!(flags & BLK_FUA) || blk->caps.fua);
	return fake_clear(fake, off, len, fake->zero);
}

static inline suspends int fake_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct fake *fake = to_fake(blk);

	fake->discards++;
	ck_assert(!(flags & BLK_FUA) || blk->caps.fua);
	return fake_clear(fake, off, len, fake->discard);
}

static inline suspends int fake_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct fake *fake = to_fake(blk);
	uint64_t start = 0;

	fake_check(fake, off, len);
	fake->extents_asked_bytes += len;
	if (!fake->shown)
		return -EOPNOTSUPP;
	for (const struct blk_extent *extent = fake->shown; extent->len; extent++) {
		uint64_t end = start + extent->len;

		if (end > off && !blk_extents_add(extents, end - MAX(start, off), extent->flags))
			break;
		start = end;
	}
	return 0;
}

static inline suspends int fake_resize(
	struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct fake *fake = to_fake(blk);

	ck_assert_uint_eq(blk->in_flight.running, 0);
	fake_wait(fake);
	if (fake->resize_error)
		return err_sys(err, -fake->resize_error, "no");
	fake->data = realloc(fake->data, size);
	if (size > blk->caps.size)
		memset(fake->data + blk->caps.size, 0, size - blk->caps.size);
	blk_size_changed(blk, size);
	return 0;
}

static const struct blk_ops fake_ops = {
	.name = "fake",
	.options = fake_options,
	.struct_size = sizeof(struct fake),
	.is_leaf = true,
	.open = fake_open,
	.close = fake_close,
	.read = fake_read,
	.write = fake_write,
	.flush = fake_flush,
	.zero = fake_zero,
	.discard = fake_discard,
	.extents = fake_extents,
	.resize = fake_resize,
};

struct fake_stack {
	struct fake *fake; /* the bottom */
	struct blk *top;
	struct conf *conf; /* a list of groups, top first; the last one is the fake's */
	struct blk_env env;
	struct seed seed;
};

/* Opens the layers of the text, whose last group is options of the fake; ops: a changed fake_ops, or NULL. */
__attribute__((format(printf, 4, 5))) static inline suspends void fake_stack_open(
	struct fake_stack *stack, const char *test, const struct blk_ops *ops, const char *fmt, ...)
{
	struct err err;
	va_list ap;

	*stack = (struct fake_stack){ .seed = seed_start(test) };
	va_start(ap, fmt);
	stack->conf = conf_vbuild(fmt, ap);
	va_end(ap);
	blk_env_init(&stack->env);
	for (size_t i = stack->conf->item_count; i--;) {
		const struct conf *group = stack->conf->items[i], *name = conf_get(group, "layer");
		const struct blk_ops *layer = name ? blk_layer_find(name->string)
						   : (ops ? ops : &fake_ops);

		if (blk_open_layer(layer, group, &stack->env, false, &stack->top, &err) < 0)
			ck_abort_msg("%s", err.text);
		if (!name)
			stack->fake = to_fake(stack->top);
	}
	stack->fake->seed = stack->seed;
}

static inline suspends void fake_stack_close(struct fake_stack *stack)
{
	stack_close(stack->top);
	blk_env_fini(&stack->env);
	conf_free(stack->conf);
}
