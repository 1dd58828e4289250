/*
 * What control.c and control-status.c share.
 */
#pragma once

#include "daemon/listen.h"
#include "daemon/varlink.h"

struct daemon;
struct export;

struct control {
	struct varlink_service service;
	struct listener listener;
	struct daemon *daemon;
};

struct daemon *control_daemon(const struct varlink_call *call);

/*
 * The export that the parameter "export" names, kept from being freed until control_put_export(); NULL
 * when there is none: the call is answered then.
 */
suspends struct export *control_get_export(struct varlink_call *call);
void control_put_export(struct export *export);

/* Methods that only look; in control-status.c. */
suspends void control_info(struct varlink_call *call);
suspends void control_list(struct varlink_call *call);
suspends void control_status(struct varlink_call *call);
