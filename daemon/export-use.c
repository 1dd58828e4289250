/*
 * Who uses an export, and what it is made of now: what has to be known before it is changed or taken away; see
 * export.h.
 *
 * Every layer has a copy of the group of the config that it was opened by: together these are what the stack is
 * made of now, also where a mirror's secondary took over.
 */
#include "daemon/export.h"

#include <errno.h>

#include "base/util.h"
#include "blk/mirror/mirror.h"
#include "daemon/kernel.h"

/* Something to find out on the export's home reactor. */
struct question {
	const struct export *export;
	struct conf *stack;
	bool mirrored;
};

/* --- what it is made of ----------------------------------------------------------------------- */

static suspends void ask_for_stack(void *arg)
{
	struct question *question = arg;

	for (const struct blk *blk = question->export->top; blk; blk = blk->below)
		conf_add(question->stack, conf_copy(blk->conf));
}

suspends struct conf *export_running_stack(struct export *export)
{
	struct question question = { .export = export, .stack = conf_new(CONF_LIST, NULL, NULL) };

	co_call_on(export->home, ask_for_stack, &question);
	return question.stack;
}

/* One that was started by command stands on top, and not in the config. */
static suspends void ask_for_mirror(void *arg)
{
	struct question *question = arg;
	const struct blk *top = question->export->top;
	const struct conf *configured = question->export->config->stack->items[0];

	question->mirrored = mirror_find(question->export->top) == top &&
			     !conf_equal(top->conf, configured);
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
	co_call_on(export->home, ask_for_mirror, &question);
	return question.mirrored ? err_set(err, EBUSY, "in use: a mirror was started on it") : 0;
}
