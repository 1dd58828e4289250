/*
 * The methods of the control socket about NBD clients: Clients, Disconnect, Debug; see control.h.
 *
 * A client is known by the number it got when it came in, which no other client of this daemon gets. The
 * kernel comes in by the same protocol but is no client: its device is detached, not disconnected.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export.h"
#include "daemon/nbd_door.h"

/* Appends the clients of the export, but not the kernel. */
suspends static void add_clients_of(struct export *export, json_t *clients)
{
	json_t *stack = NULL, *nbd = NULL, *client;
	size_t i;

	export_status(export, &stack, &nbd);
	json_array_foreach(json_object_get(nbd, "clients"), i, client)
	{
		if (json_integer_value(json_object_get(client, "id")))
			json_array_append(clients, client);
	}
	json_decref(stack);
	json_decref(nbd);
}

/* Asking an export suspends and the list may change: all are kept before the first is asked. */
suspends static json_t *all_clients(struct daemon *daemon)
{
	json_t *clients = nbd_server_handshakes(nbd_door_server(daemon->nbd_door));
	size_t count = 0, i = 0;

	list_for_each (item, &daemon->exports)
		count++;
	CLEANUP(free) struct export **exports = calloc(count + 1, sizeof(*exports));
	if (!exports)
		return clients;
	list_for_each (item, &daemon->exports) {
		exports[i] = list_entry(item, struct export, link);
		co_group_enter(&exports[i++]->users);
	}
	for (i = 0; i < count; i++) {
		add_clients_of(exports[i], clients);
		control_put_export(exports[i]);
	}
	return clients;
}

suspends void control_clients(struct varlink_call *call)
{
	json_t *clients;

	if (varlink_string(call, "export")) {
		struct export *export = control_get_export(call);
		if (!export)
			return;
		clients = json_array();
		add_clients_of(export, clients);
		control_put_export(export);
	} else {
		clients = all_clients(control_daemon(call));
	}
	varlink_reply(call, json_pack("{s:o}", "clients", clients));
}

suspends static void no_such_client(struct varlink_call *call, int64_t id)
{
	varlink_error(
		call, CONTROL_INTERFACE ".NoSuchClient", json_pack("{s:I}", "id", (json_int_t)id));
}

suspends void control_disconnect(struct varlink_call *call)
{
	const struct ucred *peer = varlink_call_peer(call);
	int64_t id = varlink_int(call, "id", 0);
	struct nbd_server *server = nbd_door_server(control_daemon(call)->nbd_door);

	if (id <= 0 || nbd_disconnect(server, (uint64_t)id)) {
		no_such_client(call, id);
		return;
	}
	log_info("client %lld disconnected, asked for by uid %u, pid %d", (long long)id, peer->uid,
		peer->pid);
	varlink_reply(call, NULL);
}

suspends void control_debug(struct varlink_call *call)
{
	const struct ucred *peer = varlink_call_peer(call);
	int64_t id = varlink_int(call, "id", -1);
	bool on = varlink_bool(call, "on", false);
	int count = id ? nbd_door_debug(
				 control_daemon(call)->nbd_door, id < 0 ? 0 : (uint64_t)id, on)
		       : -ENOENT;

	if (count < 0) {
		no_such_client(call, id);
		return;
	}
	log_info("log of the protocol %s for %d client%s, asked for by uid %u, pid %d",
		on ? "on" : "off", count, count == 1 ? "" : "s", peer->uid, peer->pid);
	varlink_reply(call, json_pack("{s:i}", "clients", count));
}
