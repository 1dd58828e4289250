/*
 * Stacks: from a list of layers in a config file to open disks, and back.
 *
 * The check comes first and touches nothing: names, order, options. Then the layers are opened from the
 * last one, which stores the bytes, up to the first. A layer that is open owns the one below it, so
 * `struct blk *top` is all there is of a stack.
 *
 * Failure: the layers that are open already are closed again, the failed one included, and the error
 * says where: "blkstack.conf:41: qcow: ..." (its place in front, see err_place()).
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/nearest.h"
#include "base/units.h"
#include "base/util.h"
#include "blk/blk.h"
#include "blk/call.h"
#include "blk/memory.h"

#define MEM_ALIGN_MAX 4096U /* what buffers of buf.h have */

int blk_env_init(struct blk_env *env)
{
	*env = (struct blk_env){ .memory_disks = memory_disks_create() };
	return env->memory_disks ? 0 : -ENOMEM;
}

void blk_env_fini(struct blk_env *env)
{
	memory_disks_free(env->memory_disks);
	env->memory_disks = NULL;
}

/* --- checking --------------------------------------------------------------------------------- */

static int unknown_layer(const struct conf *name, struct err *err)
{
	struct nearest nearest;
	char known[256] = "";
	size_t len = 0;

	nearest_init(&nearest, name->string);
	for (const struct blk_ops *const *ops = blk_layers; *ops; ops++) {
		nearest_offer(&nearest, (*ops)->name);
		if (len < sizeof(known))
			len += (size_t)snprintf(known + len, sizeof(known) - len, "%s%s",
				len ? ", " : "", (*ops)->name);
	}
	if (nearest.best)
		return conf_error(name, err, "unknown layer \"%s\"; did you mean \"%s\"?",
			name->string, nearest.best);
	return conf_error(name, err, "unknown layer \"%s\"; known are: %s", name->string, known);
}

/* The ops of the layer that group names; NULL with err filled. */
static const struct blk_ops *find_ops(const struct conf *group, struct err *err)
{
	const struct conf *name = conf_get(group, "layer");
	const struct blk_ops *ops = NULL;

	if (group->type != CONF_GROUP || !name)
		conf_error(group, err, "a layer is a group with a name: { layer = \"file\"; ... }");
	else if (name->type != CONF_STRING)
		conf_error(name, err, "\"layer\" must be the name of a layer in quotes");
	else if (!(ops = blk_layer_find(name->string)))
		unknown_layer(name, err);
	return ops;
}

/* Fills the options in blk's struct from blk->conf, which also holds the layer's name. */
static int parse_options(struct blk *blk, struct err *err)
{
	const struct conf *group = blk->conf, *name = conf_get(group, "layer");
	CLEANUP(free) struct conf **items = calloc(group->item_count, sizeof(*items));
	struct conf options = { .type = CONF_GROUP, .where = group->where, .items = items };

	if (!items)
		return err_set(err, ENOMEM, "out of memory");
	for (size_t i = 0; i < group->item_count; i++)
		if (group->items[i] != name)
			items[options.item_count++] = group->items[i];
	return opts_parse(blk->ops->options, &options, blk, err);
}

/* The stacks among the options: a mirror's secondary, a qcow's backing. */
static int check_inner_stacks(const struct blk *blk, struct err *err)
{
	for (const struct opt *opt = blk->ops->options; opt && opt->name; opt++) {
		if (opt->type != OPT_LIST)
			continue;

		const struct conf *list = *(const struct conf **)((char *)blk + opt->field);

		if (list && stack_check(list, err) < 0)
			return err_wrap(err, "%s", opt->name);
	}
	return 0;
}

static int parse_and_check(struct blk *blk, struct err *err)
{
	int ret = parse_options(blk, err);

	if (!ret && blk->ops->check) {
		ret = blk->ops->check(blk, err);
		if (ret < 0)
			err_place(err, blk->conf->where);
	}
	return ret ? ret : check_inner_stacks(blk, err);
}

int blk_check_size(const struct conf *group, uint64_t size, uint64_t block_size, struct err *err)
{
	const struct conf *item = conf_get(group, "size");
	char size_text[UNITS_SIZE_TEXT_LEN], block_text[UNITS_SIZE_TEXT_LEN];

	if (is_aligned(size, block_size))
		return 0;
	return conf_error(item ? item : group, err,
		"\"size\" is %s, it must be a multiple of the block size, %s",
		units_format_size(size, size_text), units_format_size(block_size, block_text));
}

/* Puts the layer's name in front of the text, and its line in front of that if there is no closer one. */
static int layer_error(const struct blk_ops *ops, const struct conf *group, struct err *err)
{
	int ret = err_wrap(err, "%s", ops->name);

	err_place(err, group->where);
	return ret;
}

static int check_layer(const struct conf *group, bool is_last, struct err *err)
{
	const struct blk_ops *ops = find_ops(group, err);

	if (!ops)
		return -EINVAL;
	if (ops->is_leaf && !is_last)
		return conf_error(group, err,
			"\"%s\" stores the bytes itself: it must be the last layer of its stack",
			ops->name);
	if (!ops->is_leaf && is_last)
		return conf_error(group, err,
			"\"%s\" needs a layer below it: the last layer of a stack stores the "
			"bytes, such as \"file\"",
			ops->name);

	CLEANUP(free) struct blk *blk = calloc(1, ops->struct_size);

	if (!blk)
		return err_set(err, ENOMEM, "out of memory");
	blk->ops = ops;
	blk->conf = group;
	return parse_and_check(blk, err) < 0 ? layer_error(ops, group, err) : 0;
}

/* Errors are filled into a struct of our own when the caller wants none: they are wrapped on the way. */
int stack_check(const struct conf *list, struct err *err)
{
	struct err unwanted;

	if (!err)
		err = &unwanted;
	if (list->type != CONF_LIST)
		return conf_error(list, err,
			"a stack is a list of layers, the top one first: ( { layer = \"file\"; ... "
			"} )");
	if (!list->item_count)
		return conf_error(list, err,
			"the stack is empty: it needs a layer at least, such as \"file\"");
	for (size_t i = 0; i < list->item_count; i++)
		if (check_layer(list->items[i], i + 1 == list->item_count, err) < 0)
			return -err->code;
	return 0;
}

/* --- opening ---------------------------------------------------------------------------------- */

static struct blk *blk_create(
	const struct blk_ops *ops, const struct conf *group, struct blk_env *env, struct blk *below)
{
	struct blk *blk = calloc(1, ops->struct_size);

	if (!blk)
		return NULL;
	blk->ops = ops;
	blk->conf = conf_copy(group);
	blk->env = env;
	blk->below = below;
	if (below) {
		below->parent = blk;
		blk->caps = below->caps;
	}
	co_group_init(&blk->in_flight);
	co_mutex_init(&blk->resizing);
	co_queue_init(&blk->undrained);
	range_lock_init(&blk->writes);
	list_init(&blk->extra_children);
	list_init(&blk->extra_link);
	return blk;
}

static void blk_free(struct blk *blk)
{
	conf_free(blk->own_conf);
	conf_free((struct conf *)blk->conf);
	free(blk);
}

/* Fills what open() left out, and looks at what the rest relies on. */
static int settle_caps(struct blk *blk, bool read_only, struct err *err)
{
	struct blk_caps *caps = &blk->caps;

	caps->read_only |= read_only;
	if (!caps->block_size)
		caps->block_size = 1;
	if (!caps->preferred_size)
		caps->preferred_size = 4096;
	if (caps->preferred_size < caps->block_size)
		caps->preferred_size = caps->block_size;
	if (!caps->max_request)
		caps->max_request = BLK_REQUEST_MAX;
	if (!caps->mem_align)
		caps->mem_align = 1;
	assert(is_pow2(caps->block_size) && caps->block_size <= BLK_BLOCK_SIZE_MAX);
	assert(is_pow2(caps->preferred_size));
	assert(caps->max_request && is_aligned(caps->max_request, caps->block_size));
	assert(is_pow2(caps->mem_align) && is_aligned(caps->size, caps->block_size));
	if (caps->mem_align > MEM_ALIGN_MAX)
		return err_set(err, EINVAL, "it needs memory aligned to %u, %u is supported",
			caps->mem_align, MEM_ALIGN_MAX);
	if (caps->size > BLK_SIZE_MAX)
		return err_set(err, EFBIG, "its size, %llu, is beyond what is supported, %llu",
			(unsigned long long)caps->size, (unsigned long long)BLK_SIZE_MAX);
	return 0;
}

/* What is below stays open. Also for a layer whose open() failed. Drained for good: nobody comes after. */
static suspends void close_layer(struct blk *blk)
{
	co_mutex_lock(&blk->resizing);
	while (blk->drained)
		co_queue_wait(&blk->undrained);
	blk_drain_begin(blk);
	blk->disconnected = true;
	if (blk->ops->close)
		blk->ops->close(blk);
	for (struct list *item; (item = list_pop_front(&blk->extra_children));)
		stack_close(list_entry(item, struct blk, extra_link));
	if (blk->below)
		blk->below->parent = NULL;
	blk_free(blk);
}

/* What blk's open() created, or its children's, goes again when it closes. */
static void mark_start_failed(struct blk *blk)
{
	blk->start_failed = true;
	list_for_each (item, &blk->extra_children)
		for (struct blk *child = list_entry(item, struct blk, extra_link); child;
			child = child->below)
			mark_start_failed(child);
}

suspends int blk_open_layer(const struct blk_ops *ops, const struct conf *group,
	struct blk_env *env, bool read_only, struct blk **top, struct err *err)
{
	struct blk *blk = blk_create(ops, group, env, *top);

	if (!blk)
		return err_set(err, ENOMEM, "out of memory");
	read_only = blk->caps.read_only |= read_only || env->read_only;

	int ret = parse_and_check(blk, err);

	if (ret < 0) {
		if (*top)
			(*top)->parent = NULL;
		blk_free(blk);
		return ret;
	}
	ret = ops->open ? ops->open(blk, err) : 0;
	if (!ret)
		ret = settle_caps(blk, read_only, err);
	if (ret < 0) {
		mark_start_failed(blk);
		close_layer(blk);
		return ret;
	}
	*top = blk;
	return 0;
}

suspends int stack_open(const struct conf *list, struct blk_env *env, bool read_only,
	struct blk **top, struct err *err)
{
	struct err unwanted;
	struct blk *blk = NULL;

	*top = NULL;
	if (!err)
		err = &unwanted;
	if (stack_check(list, err) < 0)
		return -err->code;
	for (size_t i = list->item_count; i--;) {
		const struct conf *group = list->items[i];

		const struct blk_ops *ops = find_ops(group, err);

		if (blk_open_layer(ops, group, env, read_only, &blk, err) < 0) {
			layer_error(ops, group, err);
			for (struct blk *opened = blk; opened; opened = opened->below)
				mark_start_failed(opened);
			stack_close(blk);
			return -err->code;
		}
	}
	*top = blk;
	return 0;
}

suspends int blk_open_child(struct blk *blk, const struct conf *list, bool read_only,
	struct blk **child, struct err *err)
{
	int ret = stack_open(list, blk->env, read_only, child, err);

	if (!ret) {
		(*child)->parent = blk;
		list_push_back(&blk->extra_children, &(*child)->extra_link);
	}
	return ret;
}

void stack_describe(const struct blk *top, const struct blk *end, struct conf *list)
{
	for (const struct blk *blk = top; blk && blk != end; blk = blk->below)
		conf_add(list, blk->ops->describe ? blk->ops->describe(blk) : conf_copy(blk->conf));
}

void blk_abandon(struct blk *top)
{
	for (struct blk *blk = top; blk; blk = blk->below) {
		blk->disconnected = true;
		if (blk->ops->abandon)
			blk->ops->abandon(blk);
		list_for_each (item, &blk->extra_children)
			blk_abandon(list_entry(item, struct blk, extra_link));
	}
}

/* Every layer is flushed, since closing the one above it may have written to it. */
suspends void stack_close(struct blk *top)
{
	while (top) {
		struct blk *below = top->below;

		if (!top->caps.read_only)
			blk_flush(top);
		close_layer(top);
		top = below;
	}
}
