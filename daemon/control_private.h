/*
 * What control.c and the files of methods, control-*.c, share.
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

#define CONTROL_INTERFACE "org.blkstack"

struct daemon *control_daemon(const struct varlink_call *call);

/*
 * The export that the parameter "export" names, kept from being freed until control_put_export(); NULL
 * when there is none: the call is answered then.
 */
suspends struct export *control_get_export(struct varlink_call *call);
void control_put_export(struct export *export);

/*
 * The end of most methods: ret is what the function that did the work returned, with err filled. Takes over
 * result.
 */
struct err;
suspends void control_answer(
	struct varlink_call *call, int ret, const struct err *err, json_t *result);

/* Who changed what belongs into the log, worked or not. */
void control_log_change(const struct varlink_call *call, const char *what,
	const struct export *export, int ret, const struct err *err);

/* Methods that only look; in control-status.c. */
suspends void control_info(struct varlink_call *call);
suspends void control_list(struct varlink_call *call);
suspends void control_status(struct varlink_call *call);

/* NBD clients; in control-clients.c. */
suspends void control_clients(struct varlink_call *call);
suspends void control_disconnect(struct varlink_call *call);
suspends void control_debug(struct varlink_call *call);

/* Methods about mirrors; in control-mirror.c. */
suspends void control_mirror_start(struct varlink_call *call);
suspends void control_mirror_status(struct varlink_call *call);
suspends void control_mirror_wait(struct varlink_call *call);
suspends void control_mirror_pause(struct varlink_call *call);
suspends void control_mirror_resume(struct varlink_call *call);
suspends void control_mirror_rate(struct varlink_call *call);
suspends void control_mirror_cancel(struct varlink_call *call);
suspends void control_mirror_promote(struct varlink_call *call);
suspends void control_mirror_forget(struct varlink_call *call);
suspends void control_mirror_verify(struct varlink_call *call);

/* Exports with a qcow layer; in control-qcow.c. */
suspends void control_compact(struct varlink_call *call);
suspends void control_cancel_compact(struct varlink_call *call);
suspends void control_check(struct varlink_call *call);
suspends void control_snapshots(struct varlink_call *call);
suspends void control_create_snapshot(struct varlink_call *call);
suspends void control_apply_snapshot(struct varlink_call *call);
suspends void control_delete_snapshot(struct varlink_call *call);

/* Changes of the whole; in control-reload.c. */
suspends void control_upgrade(struct varlink_call *call);
suspends void control_reload(struct varlink_call *call);
suspends void control_add(struct varlink_call *call);
suspends void control_remove(struct varlink_call *call);
