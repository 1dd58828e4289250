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
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "nbd/server.h"

/* --- the daemon ------------------------------------------------------------------------------- */

suspends void control_info(struct varlink_call *call)
{
	const struct daemon *daemon = control_daemon(call);
	int export_count = 0;

	list_for_each (item, &daemon->exports)
		export_count++;
	varlink_reply(call, json_pack("{s:s, s:i, s:I, s:s, s:s, s:i, s:i, s:b}", "version",
				    BLKSTACK_VERSION, "pid", (int)getpid(), "start_time",
				    (json_int_t)daemon->start_time, "config", daemon->config->path,
				    "engine", reactor_engine_name(daemon->reactors[0]), "reactors",
				    (int)daemon->reactor_count, "exports", export_count, "stopping",
				    daemon->stopping));
}

/* --- exports in short ------------------------------------------------------------------------- */

static json_t *layer_names(const struct conf *stack)
{
	json_t *names = json_array();

	for (size_t i = 0; i < stack->item_count; i++) {
		const struct conf *layer = conf_get(stack->items[i], "layer");
		json_array_append_new(names, json_string(layer ? layer->string : ""));
	}
	return names;
}

static json_t *export_summary(const struct export *export)
{
	const char *device = export->kernel ? kernel_device(export->kernel) : NULL;

	return json_pack("{s:s, s:s, s:I, s:I, s:b, s:o, s:s?, s:i}", "name", export->config->name,
		"description", export->config->description, "size",
		(json_int_t)atomic_load(&export->size), "block_size",
		(json_int_t) export->block_size, "read_only", export->read_only, "layers",
		layer_names(export->config->stack), "device", device, "clients",
		(int)export->nbd.clients.running);
}

suspends void control_list(struct varlink_call *call)
{
	json_t *exports = json_array();

	list_for_each (item, &control_daemon(call)->exports)
		json_array_append_new(
			exports, export_summary(list_entry(item, struct export, link)));
	varlink_reply(call, json_pack("{s:o}", "exports", exports));
}
