/*
 * The methods of the control socket that change the whole: Reload, Add, Remove, Upgrade; see reload.h, which does the work.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export.h"
#include "daemon/kernel.h"
#include "daemon/reload.h"

static void log_change(
	const struct varlink_call *call, const char *what, int ret, const struct err *err)
{
	const struct ucred *peer = varlink_call_peer(call);

	if (ret)
		log_warning("%s (asked for by uid %u, pid %d)", err->text, peer->uid, peer->pid);
	else
		log_info("%s, asked for by uid %u, pid %d", what, peer->uid, peer->pid);
}

suspends void control_reload(struct varlink_call *call)
{
	bool dry_run = varlink_bool(call, "dry_run", false);
	json_t *steps;
	struct err err;
	int ret = reload(control_daemon(call), dry_run, &steps, &err);

	if (!dry_run)
		log_change(call, "reload", ret, &err);
	control_answer(call, ret, &err, ret ? NULL : json_pack("{s:o}", "steps", steps));
}

suspends void control_add(struct varlink_call *call)
{
	struct daemon *daemon = control_daemon(call);
	const char *source = varlink_string(call, "source"), *device = NULL;
	CLEANUP(free) char *name = NULL;
	json_int_t size = 0;
	struct err err;
	int ret = reload_add_export(
		daemon, source ? source : "config", varlink_string(call, "config"), &name, &err);
	const struct export *export = ret ? NULL : export_find(daemon, name);

	if (export) {
		size = (json_int_t)atomic_load(&export->size);
		device = export->kernel ? kernel_device(export->kernel) : NULL;
		control_log_change(call, "added", export, 0, NULL);
	} else if (ret) {
		log_change(call, NULL, ret, &err);
	}
	control_answer(call, ret, &err,
		ret ? NULL
		    : json_pack(
			      "{s:s, s:I, s:s?}", "export", name, "size", size, "device", device));
}

suspends void control_remove(struct varlink_call *call)
{
	const char *name = varlink_string(call, "export");
	bool force = varlink_bool(call, "force", false);
	struct err err;
	int ret = reload_remove_export(control_daemon(call), name, force, &err);
	char what[128];

	if (ret == -ENOENT) {
		varlink_error(call, CONTROL_INTERFACE ".NoSuchExport",
			json_pack("{s:s}", "export", name));
		return;
	}
	snprintf(what, sizeof(what), "export \"%s\": %s", name,
		force ? "forced removal" : "removed");
	log_change(call, what, ret, &err);
	control_answer(call, ret, &err, NULL);
}

suspends void control_upgrade(struct varlink_call *call)
{
	struct err err;
	int ret = daemon_hand_over(control_daemon(call), varlink_bool(call, "force", false), &err);

	if (ret != -EALREADY)
		log_change(call, "upgrade", ret, &err);
	control_answer(call, ret == -EALREADY ? 0 : ret, &err,
		json_pack("{s:b}", "begun", ret != -EALREADY));
}
