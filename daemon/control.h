/*
 * The control socket: interface org.blkstack (org.blkstack.varlink) on a unix socket, by Varlink.
 *
 * Everything here is called on the main reactor, unless it says plain code.
 */
#pragma once

#include "base/err.h"
#include "rt/co.h"

struct config;
struct daemon;
struct control;
struct listener;

/* Plain code: binds config->control, if there is one, and accepts nothing yet. */
int control_open(struct daemon *daemon, struct control **control, struct err *err);

/* NULL without a control socket. */
struct listener *control_listener(struct control *control);

/* From now on calls are answered. */
int control_start(struct control *control, struct err *err);

/*
 * A new config for an open socket, in two steps like nbd_door_prepare(): nothing is seen of it before
 * control_commit(), which cannot fail; daemon->config is still the old one then. Connections stay.
 */
struct control_change;
suspends int control_prepare(struct control *control, const struct config *config,
	struct control_change **change, struct err *err);
void control_commit(struct control_change *change);
void control_discard(struct control_change *change); /* NULL is fine */

/*
 * Accepts no more, disconnects silent peers, and returns when calls under way are answered.
 */
suspends void control_stop(struct control *control);

/* Plain code. NULL is fine. Removes the socket's file. */
void control_free(struct control *control);
