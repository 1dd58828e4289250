/*
 * The control socket: interface org.blkstack (org.blkstack.varlink) on a unix socket, by Varlink.
 *
 * Everything here is called on the main reactor, unless it says plain code.
 */
#pragma once

#include "base/err.h"
#include "rt/co.h"

struct daemon;
struct control;

/* Plain code: binds config->control and accepts nothing yet. *control is NULL when the config has none. */
int control_open(struct daemon *daemon, struct control **control, struct err *err);

/* From now on calls are answered. */
int control_start(struct control *control, struct err *err);

/*
 * Accepts no more, disconnects silent peers, and returns when calls under way are answered.
 */
suspends void control_stop(struct control *control);

/* Plain code. NULL is fine. Removes the socket's file. */
void control_free(struct control *control);
