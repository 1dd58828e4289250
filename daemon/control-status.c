/*
 * The methods of the control socket that look: Info, List, Status; see control.h.
 *
 * What a stack tells of itself is made on the export's home reactor by blk_status(): an object per layer,
 * in which common keys and the layer's own stand side by side. Here the common ones become the type Layer of
 * org.blkstack.varlink, and the others its `details`, so that a new layer changes no declared type.
 *
 * Asking an export suspends, and the list of exports may change meanwhile: so all of them are collected, and
 * kept from being freed, before the first is asked.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export-record.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "daemon/nbd_door.h"
#include "nbd/server.h"

/* --- the daemon ------------------------------------------------------------------------------- */

suspends void control_info(struct varlink_call *call)
{
	const struct daemon *daemon = control_daemon(call);
	const struct keeper_link *keeper = daemon->keeper;
	int export_count = 0;

	list_for_each (item, &daemon->exports)
		export_count++;
	varlink_reply(call,
		json_pack("{s:s, s:i, s:i, s:b, s:i, s:s, s:I, s:s, s:s, s:i, s:i, s:b, s:s?}",
			"version", BLKSTACK_VERSION, "pid", (int)(keeper ? getppid() : getpid()),
			"server_pid", (int)getpid(), "keeper", keeper != NULL, "restarts",
			keeper ? (int)keeper->restarts : 0, "last_end",
			keeper ? keeper->last_end : "", "start_time",
			(json_int_t)daemon->start_time, "config", daemon->config->path, "engine",
			reactor_engine_name(daemon->reactors[0]), "reactors",
			(int)daemon->reactor_count, "exports", export_count, "stopping",
			daemon->stopping, "config_note",
			*daemon->config_note ? daemon->config_note : NULL));
}

/* --- exports in short ------------------------------------------------------------------------- */

static json_t *export_summary(const struct export *export)
{
	const char *device = export->kernel ? kernel_device(export->kernel) : NULL;

	return json_pack("{s:s, s:s, s:I, s:I, s:b, s:o, s:s?, s:i}", "name", export->config->name,
		"description", export->config->description, "size",
		(json_int_t)atomic_load(&export->size), "block_size",
		(json_int_t) export->block_size, "read_only", export->read_only, "layers",
		json_incref(export->layers), "device", device, "clients", (int)export->nbd.inside);
}

suspends void control_list(struct varlink_call *call)
{
	json_t *exports = json_array();

	list_for_each (item, &control_daemon(call)->exports)
		json_array_append_new(
			exports, export_summary(list_entry(item, struct export, link)));
	varlink_reply(call, json_pack("{s:o}", "exports", exports));
}

/* --- exports in full -------------------------------------------------------------------------- */

/* Keys of the type Layer; whatever else a layer tells belongs into its details. */
static bool is_common_key(const char *key)
{
	static const char *const keys[] = { "layer", "size", "block_size", "preferred_size",
		"max_request", "read_only", "fua", "zero_fast", "discard", "in_flight", "counters",
		"last_error", "children" };

	for (size_t i = 0; i < ARRAY_LEN(keys); i++)
		if (!strcmp(keys[i], key))
			return true;
	return false;
}

static void separate_details(json_t *layer)
{
	json_t *details = json_object(), *value;
	const char *key;
	size_t index;
	void *next;

	json_object_foreach_safe(layer, next, key, value)
	{
		if (is_common_key(key))
			continue;
		json_object_set(details, key, value);
		json_object_del(layer, key);
	}
	json_object_set_new(layer, "details", details);
	json_array_foreach(json_object_get(layer, "children"), index, value)
		separate_details(value);
}

suspends static json_t *full_status(struct export *export)
{
	json_t *stack = NULL, *nbd = NULL;

	export_status(export, &stack, &nbd);
	separate_details(stack);
	return json_pack("{s:o, s:o, s:o, s:o?, s:o?}", "export", export_summary(export), "stack",
		stack, "nbd", nbd, "kernel", export->kernel ? kernel_status(export->kernel) : NULL,
		"record", export_record_status(export));
}

/* NULL when memory is exhausted. */
suspends static json_t *all_statuses(struct daemon *daemon)
{
	size_t count = 0, i = 0;

	list_for_each (item, &daemon->exports)
		count++;
	CLEANUP(free) struct export **exports = calloc(count + 1, sizeof(*exports));
	if (!exports)
		return NULL;
	list_for_each (item, &daemon->exports) {
		exports[i] = list_entry(item, struct export, link);
		co_group_enter(&exports[i++]->users);
	}
	json_t *statuses = json_array();
	for (i = 0; i < count; i++) {
		json_array_append_new(statuses, full_status(exports[i]));
		control_put_export(exports[i]);
	}
	return statuses;
}

suspends void control_status(struct varlink_call *call)
{
	json_t *statuses;

	if (varlink_string(call, "export")) {
		struct export *export = control_get_export(call);
		if (!export)
			return;
		statuses = json_array();
		json_array_append_new(statuses, full_status(export));
		control_put_export(export);
	} else {
		statuses = all_statuses(control_daemon(call));
	}
	varlink_reply(call, json_pack("{s:o, s:o}", "exports", statuses, "door",
				    nbd_door_status(control_daemon(call)->nbd_door)));
}
