/*
 * The NBD door: the listening sockets through which clients come in, and the table of those inside.
 *
 * Order: open (before the reactors run: names are resolved, sockets bound, files made), publish exports,
 * start; at the end stop, withdraw the exports, close. All on the main reactor but nbd_door_open().
 */
#pragma once

#include <jansson.h>

#include "base/err.h"
#include "daemon/config.h"
#include "daemon/export.h"
#include "rt/co.h"

struct listener;
struct nbd_door;

/* Binds all of config->listen, or nothing. config outlives the door. */
int nbd_door_open(struct nbd_door **door, const struct config *config, struct err *err);

/*
 * A new config for an open door, in two steps: nothing of it is seen until nbd_door_commit(), which cannot fail
 * and after which the old config may go away (the new one outlives the door, or the next change). Errors
 * as nbd_door_open(). TLS files are read again. Who is connected stays; rules are for those who come.
 */
struct nbd_door_change;
suspends int nbd_door_prepare(struct nbd_door *door, const struct config *config,
	struct nbd_door_change **change, struct err *err);
void nbd_door_commit(struct nbd_door_change *change);
void nbd_door_discard(struct nbd_door_change *change); /* NULL is fine */

/* Clients can choose the export from now on; nbd_withdraw(&export->nbd, ...) ends that. */
int nbd_door_publish(struct nbd_door *door, struct export *export, struct err *err);

/* Lets clients in. */
int nbd_door_start(struct nbd_door *door, struct err *err);

/* Lets nobody in any more. Who is inside stays. Harmless when not started. */
void nbd_door_stop(struct nbd_door *door);

/* After nbd_door_stop() and with all exports withdrawn: ends the handshakes, frees. NULL is fine. */
suspends void nbd_door_close(struct nbd_door *door);
/* The same when the reactors never ran. NULL is fine. */
void nbd_door_abandon(struct nbd_door *door);

/* Its sockets, in the order of config->listen; NULL behind the last one. */
struct listener *nbd_door_listener(struct nbd_door *door, size_t index);

/* For nbd_server_handshakes() and nbd_disconnect(). */
struct nbd_server *nbd_door_server(struct nbd_door *door);

/*
 * The log of the protocol of one client, or with id 0 of all, those to come too: off or on. The count of
 * clients that this was for; -ENOENT when there is none of that id.
 */
int nbd_door_debug(struct nbd_door *door, uint64_t id, bool on);

/* As the type Door in org.blkstack.varlink. */
json_t *nbd_door_status(const struct nbd_door *door);
