/*
 * A mirror's configuration as it is now, which may not be the one that it was opened with: legs that were
 * exchanged, another rate, paused or not. It is for somebody who opens the stack again later, without asking: so
 * it may overwrite the secondary, and it starts without it if need be.
 */
#include <string.h>

#include "blk/mirror/mirror_private.h"

/* What the description says itself. */
static bool is_ours(const char *name)
{
	static const char *const ours[] = { "secondary", "overwrite", "rate", "paused",
		"start-degraded" };

	for (size_t i = 0; i < ARRAY_LEN(ours); i++)
		if (conf_name_equal(name, ours[i]))
			return true;
	return false;
}

static struct conf *describe(const struct mirror *mirror, const struct blk *secondary, bool paused)
{
	const struct conf *conf = mirror->blk.conf;
	struct conf *group = conf_new(CONF_GROUP, NULL, conf->where), *list;

	for (size_t i = 0; i < conf->item_count; i++)
		if (!is_ours(conf->items[i]->name))
			conf_add(group, conf_copy(conf->items[i]));
	conf_add(group, conf_new_bool("overwrite", NULL, true));
	conf_add(group, conf_new_bool("start-degraded", NULL, true));
	conf_add(group, conf_new_bool("paused", NULL, paused));
	conf_add(group, conf_new_int("rate", NULL, (int64_t)mirror->rate));
	list = conf_add(group, conf_new(CONF_LIST, "secondary", NULL));
	for (size_t i = 0; !secondary && i < mirror->secondary_conf->item_count; i++)
		conf_add(list, conf_copy(mirror->secondary_conf->items[i]));
	stack_describe(secondary, NULL, list);
	return group;
}

struct conf *mirror_describe(const struct blk *blk)
{
	const struct mirror *mirror = to_mirror(blk);

	return describe(mirror, mirror->secondary, mirror->paused);
}

struct conf *mirror_describe_promoted(const struct mirror *mirror, bool keep)
{
	struct conf *list = conf_new(CONF_LIST, NULL, NULL);
	const struct blk *top = &mirror->blk;

	while (top->parent)
		top = top->parent;
	stack_describe(top, &mirror->blk, list);
	if (keep)
		conf_add(list, describe(mirror, mirror->primary, mirror->paused));
	stack_describe(mirror->secondary, NULL, list);
	return list;
}
