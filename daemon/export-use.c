/*
 * Who uses an export, and what it is made of now: what has to be known before it is changed or taken away; see
 * export.h.
 *
 * What a stack is made of is found by its layers themselves: each knows the group of the config that it was
 * opened by, and the list that has exactly those groups is the stack's. It stands in the export's own
 * config, or, where a mirror's secondary took over, in that mirror's part of it.
 */
#include "daemon/export.h"

#include <errno.h>

#include "base/util.h"
#include "blk/mirror/mirror.h"
#include "daemon/kernel.h"

/* Something to find out on the export's home reactor. */
struct question {
	const struct export *export;
	const struct conf *stack;
	bool mirrored;
};

/* --- what it is made of ----------------------------------------------------------------------- */

static bool is_made_of(const struct blk *blk, const struct conf *list)
{
	for (size_t i = 0; i < list->item_count; i++) {
		if (!blk || blk->conf != list->items[i])
			return false;
		blk = blk->below;
	}
	return list->item_count && !blk;
}

/* The list, within conf, that the stack is made of; NULL when there is none. */
static const struct conf *find_list(const struct conf *conf, const struct blk *top)
{
	const struct conf *found = NULL;

	if (conf->type == CONF_LIST && is_made_of(top, conf))
		return conf;
	for (size_t i = 0; i < conf->item_count && !found; i++)
		found = find_list(conf->items[i], top);
	return found;
}

static suspends void ask(void *arg)
{
	struct question *question = arg;
	const struct export *export = question->export;
	const struct blk *mirror = mirror_find(export->top);

	question->stack = find_list(export->opened->conf, export->top);
	if (!question->stack)
		question->stack = find_list(export->snippets, export->top);
	for (size_t i = 0; mirror && i < export->snippets->item_count; i++)
		question->mirrored |= mirror->conf == export->snippets->items[i];
}

suspends const struct conf *export_running_stack(struct export *export)
{
	struct question question = { .export = export };

	co_call_on(export->home, ask, &question);
	return question.stack;
}

/* --- who uses it ------------------------------------------------------------------------------ */

/* The kernel is told of by its device. */
static suspends int check_clients(struct export *export, struct err *err)
{
	json_t *stack, *nbd, *client;
	const char *first = NULL;
	int count = 0, ret = 0;
	size_t i;

	export_status(export, &stack, &nbd);
	json_array_foreach(json_object_get(nbd, "clients"), i, client)
	{
		if (!json_integer_value(json_object_get(client, "id")))
			continue;
		if (!count++)
			first = json_string_value(json_object_get(client, "peer"));
	}
	if (count > 1)
		ret = err_set(err, EBUSY, "in use: NBD client %s and %d more", first, count - 1);
	else if (count)
		ret = err_set(err, EBUSY, "in use: NBD client %s", first);
	json_decref(stack);
	json_decref(nbd);
	return ret;
}

suspends int export_check_unused(struct export *export, bool device_only, struct err *err)
{
	struct question question = { .export = export };
	int ret = 0;

	if (export->kernel)
		ret = kernel_check_unused(export->kernel, err);
	if (ret || device_only)
		return ret;
	ret = check_clients(export, err);
	if (ret)
		return ret;
	co_call_on(export->home, ask, &question);
	return question.mirrored ? err_set(err, EBUSY, "in use: a mirror was started on it") : 0;
}
