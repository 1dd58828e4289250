/*
 * The control socket: who may do what, and the methods that change something; see control.h.
 *
 * org.blkstack.varlink, which is linked into the program as it is, describes what the table of methods
 * below carries out; a test compares the two. A method finds its export, calls the function of
 * export.h that does the work (on the export's home reactor), and turns a struct err into one
 * of the errors that the interface declares.
 *
 * Authority: what the socket's mode lets in may look. To change things takes root, or the user or group of
 * the config, judged by what the kernel says of the peer at the time it connected.
 */
#include "daemon/control.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon/control_private.h"
#include "daemon/daemon.h"
#include "daemon/export.h"
#include "daemon/kernel.h"

__asm__(".pushsection .rodata\n"
	"control_description:\n"
	".incbin \"daemon/org.blkstack.varlink\"\n"
	".byte 0\n"
	".popsection\n");
extern const char control_description[];

struct daemon *control_daemon(const struct varlink_call *call)
{
	return container_of(varlink_call_service(call), struct control, service)->daemon;
}

/* --- answers ---------------------------------------------------------------------------------- */

/* "" for methods that are about none, or not yet. */
static const char *export_of(const struct varlink_call *call)
{
	const char *name = varlink_string(call, "export");

	return name ? name : "";
}

suspends static void answer_failed(struct varlink_call *call, const struct err *err)
{
	const char *name = strerrorname_np(err->code);

	varlink_error(call, CONTROL_INTERFACE ".Failed",
		json_pack("{s:s, s:i, s:s, s:s}", "export", export_of(call), "errno", err->code,
			"error", name ? name : "", "text", err->text));
}

suspends void control_answer(
	struct varlink_call *call, int ret, const struct err *err, json_t *result)
{
	if (!ret) {
		varlink_reply(call, result);
		return;
	}
	json_decref(result);
	if (ret == -EBUSY)
		varlink_error(call, CONTROL_INTERFACE ".Busy",
			json_pack("{s:s, s:s}", "export", export_of(call), "text", err->text));
	else
		answer_failed(call, err);
}

suspends struct export *control_get_export(struct varlink_call *call)
{
	const char *name = varlink_string(call, "export");
	struct export *export = export_find(control_daemon(call), name);

	if (export)
		co_group_enter(&export->users);
	else
		varlink_error(call, CONTROL_INTERFACE ".NoSuchExport",
			json_pack("{s:s}", "export", name));
	return export;
}

void control_put_export(struct export *export)
{
	co_group_leave(&export->users);
}

void control_log_change(const struct varlink_call *call, const char *what,
	const struct export *export, int ret, const struct err *err)
{
	const struct ucred *peer = varlink_call_peer(call);

	if (ret)
		log_warning("%s (asked for by uid %u, pid %d)", err->text, peer->uid, peer->pid);
	else
		log_info("export \"%s\": %s, asked for by uid %u, pid %d", export->config->name,
			what, peer->uid, peer->pid);
}

/* --- methods ---------------------------------------------------------------------------------- */

suspends static void resize(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	uint64_t size = (uint64_t)varlink_int(call, "size", 0);
	char what[64];
	struct err err;

	if (!export)
		return;
	int ret = export_resize(export, size, varlink_bool(call, "force", false), &err);
	snprintf(what, sizeof(what), "resize to %llu bytes", (unsigned long long)size);
	control_log_change(call, what, export, ret, &err);
	control_answer(call, ret, &err,
		json_pack("{s:I}", "size", (json_int_t)atomic_load(&export->size)));
	control_put_export(export);
}

suspends static void flush(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	struct err err;

	if (!export)
		return;
	control_answer(call, export_flush(export, &err), &err, NULL);
	control_put_export(export);
}

suspends static void discard(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	uint64_t off = (uint64_t)varlink_int(call, "offset", 0);
	int64_t len = varlink_int(call, "length", -1);
	struct err err;

	if (!export)
		return;
	/* A length of 0 is nothing to do; to export_discard() it means everything from off on. */
	int ret = len ? export_discard(export, off, len < 0 ? 0 : (uint64_t)len, &err) : 0;
	if (len)
		control_log_change(call, "discard", export, ret, &err);
	control_answer(call, ret, &err, NULL);
	control_put_export(export);
}

/* Where the config names a device there is a keeper, unless somebody decided against one. */
static void warn_without_keeper(const struct export *export)
{
	if (!export->daemon->keeper)
		log_warning("export \"%s\": there is no keeper: the death of this process is that "
			    "of %s; "
			    "`keeper = true` in the config, and a restart, let it live",
			export->config->name, kernel_device(export->kernel));
}

suspends static void attach(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	const char *device = "";
	struct err err;

	if (!export)
		return;
	int ret = export_attach(export, varlink_string(call, "device"), &err);
	if (ret)
		err_wrap(&err, "export \"%s\"", export->config->name);
	else if (export->kernel)
		device = kernel_device(export->kernel);
	if (!ret && export->kernel)
		warn_without_keeper(export);
	control_log_change(call, "attach", export, ret, &err);
	control_answer(call, ret, &err, json_pack("{s:s}", "device", device));
	control_put_export(export);
}

suspends static void detach(struct varlink_call *call)
{
	struct export *export = control_get_export(call);
	bool force = varlink_bool(call, "force", false);
	struct err err;

	if (!export)
		return;
	/* The word before the deed: the server may die in between. */
	daemon_note_detached(export->daemon, export->config->name, true);
	int ret = export_detach(export, force, &err);
	if (ret && export->kernel)
		daemon_note_detached(export->daemon, export->config->name, false);
	if (ret)
		err_wrap(&err, "export \"%s\"", export->config->name);
	control_log_change(call, force ? "forced detach" : "detach", export, ret, &err);
	control_answer(call, ret, &err, NULL);
	control_put_export(export);
}

suspends static void shut_down(struct varlink_call *call)
{
	const struct ucred *peer = varlink_call_peer(call);

	log_info("shutdown, asked for by uid %u, pid %d", peer->uid, peer->pid);
	varlink_reply(call, NULL);
	daemon_stop(control_daemon(call));
}

static const struct varlink_method methods[] = {
	{ "Info", .fn = control_info },
	{ "List", .fn = control_list },
	{ "Status",
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING, .optional = true },
				{},
			},
		.fn = control_status },
	{ "Clients",
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING, .optional = true },
				{},
			},
		.fn = control_clients },
	{ "Disconnect", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "id", VARLINK_SIZE },
				{},
			},
		.fn = control_disconnect },
	{ "Debug", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "on", VARLINK_BOOL },
				{ "id", VARLINK_SIZE, .optional = true },
				{},
			},
		.fn = control_debug },
	{ "Resize", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "size", VARLINK_SIZE },
				{ "force", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = resize },
	{ "Flush", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = flush },
	{ "Discard", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "offset", VARLINK_SIZE, .optional = true },
				{ "length", VARLINK_SIZE, .optional = true },
				{},
			},
		.fn = discard },
	{ "Attach", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "device", VARLINK_STRING, .optional = true },
				{},
			},
		.fn = attach },
	{ "Detach", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "force", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = detach },
	{ "MirrorStart", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "to", VARLINK_STRING },
				{ "overwrite", VARLINK_BOOL, .optional = true },
				{ "rate", VARLINK_SIZE, .optional = true },
				{ "intent_log", VARLINK_STRING, .optional = true },
				{ "paused", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_mirror_start },
	{ "MirrorStatus",
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_status },
	{ "MirrorWait",
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_wait },
	{ "MirrorPause", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_pause },
	{ "MirrorResume", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_resume },
	{ "MirrorRate", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "rate", VARLINK_SIZE },
				{},
			},
		.fn = control_mirror_rate },
	{ "MirrorCancel", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_cancel },
	{ "MirrorPromote", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "force", VARLINK_BOOL, .optional = true },
				{ "keep", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_mirror_promote },
	{ "MirrorForget", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_forget },
	{ "MirrorVerify", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_mirror_verify },
	{ "Compact", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "rate", VARLINK_SIZE, .optional = true },
				{},
			},
		.fn = control_compact },
	{ "CancelCompact", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_cancel_compact },
	{ "Check", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_check },
	{ "Snapshots",
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{},
			},
		.fn = control_snapshots },
	{ "CreateSnapshot", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "name", VARLINK_STRING },
				{},
			},
		.fn = control_create_snapshot },
	{ "ApplySnapshot", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "name", VARLINK_STRING },
				{ "force", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_apply_snapshot },
	{ "DeleteSnapshot", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "name", VARLINK_STRING },
				{},
			},
		.fn = control_delete_snapshot },
	{ "Reload", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "dry_run", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_reload },
	{ "Add", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "config", VARLINK_STRING },
				{ "source", VARLINK_STRING, .optional = true },
				{},
			},
		.fn = control_add },
	{ "Remove", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "export", VARLINK_STRING },
				{ "force", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_remove },
	{ "Upgrade", .needs_authority = true,
		.params =
			(const struct varlink_param[]){
				{ "force", VARLINK_BOOL, .optional = true },
				{},
			},
		.fn = control_upgrade },
	{ "Shutdown", .needs_authority = true, .fn = shut_down },
	{},
};

static const struct varlink_interface blkstack_interface = {
	.name = CONTROL_INTERFACE,
	.description = control_description,
	.methods = methods,
};

static const struct varlink_interface *const interfaces[] = { &blkstack_interface, NULL };

/* --- authority -------------------------------------------------------------------------------- */

suspends static bool permit(struct varlink_call *call)
{
	const struct config *config = control_daemon(call)->config;
	uid_t uid = varlink_call_peer(call)->uid;
	char text[256];

	if (uid == 0)
		return true;
	if (config->control_uid != (uid_t)-1 && uid == config->control_uid)
		return true;
	if (config->control_gid != (gid_t)-1 &&
		varlink_call_peer_in_group(call, config->control_gid))
		return true;
	snprintf(text, sizeof(text),
		"uid %u may look but not change anything: only root may, and those whom "
		"control-user and control-group in the config file name",
		uid);
	log_warning("control: refused %s to uid %u, pid %d", varlink_call_method(call), uid,
		varlink_call_peer(call)->pid);
	varlink_error(call, CONTROL_INTERFACE ".NotPermitted",
		json_pack("{s:s, s:I, s:s}", "method", varlink_call_method(call), "uid",
			(json_int_t)uid, "text", text));
	return false;
}

/* --- the socket ------------------------------------------------------------------------------- */

static void accepted(struct listener *listener, int fd)
{
	varlink_serve(&container_of(listener, struct control, listener)->service, fd);
}

int control_open(struct daemon *daemon, struct control **out, struct err *err)
{
	const struct config *config = daemon->config;
	struct listen_access access = {
		.mode = config->control_mode,
		.uid = config->control_uid,
		.gid = config->control_gid,
	};

	*out = NULL;
	struct control *control = calloc(1, sizeof(*control));
	if (!control)
		return err_sys(err, ENOMEM, "control socket");
	control->daemon = daemon;
	control->service.vendor = "blkstack";
	control->service.product = "blkstackd";
	control->service.version = BLKSTACK_VERSION;
	control->service.url = "";
	control->service.interfaces = interfaces;
	control->service.permit = permit;
	varlink_init(&control->service);
	control->listener.fd = -1;
	int ret = *config->control
			  ? listener_open(&control->listener, config->control, &access, err)
			  : 0;
	if (ret) {
		free(control);
		return err_wrap(err, "control socket");
	}
	*out = control;
	return 0;
}

struct listener *control_listener(struct control *control)
{
	return control ? &control->listener : NULL;
}

int control_start(struct control *control, struct err *err)
{
	int ret = control->listener.fd < 0 ? 0 : listener_start(&control->listener, accepted);

	return ret ? err_sys(err, -ret, "control socket") : 0;
}

/* --- a reload --------------------------------------------------------------------------------- */

struct control_change {
	struct control *control;
	const struct config *config;
	struct listener listener; /* closed when the address stays, or there is none */
	bool moves;
	struct err *err;
	int ret;
};

static struct listen_access control_access(const struct config *config)
{
	return (struct listen_access){
		.mode = config->control_mode,
		.uid = config->control_uid,
		.gid = config->control_gid,
	};
}

static void prepare_offloaded(void *arg)
{
	struct control_change *change = arg;
	struct listen_access access = control_access(change->config);

	change->ret = listener_open(
		&change->listener, change->config->control, &access, change->err);
}

suspends int control_prepare(struct control *control, const struct config *config,
	struct control_change **prepared, struct err *err)
{
	struct control_change *change = calloc(1, sizeof(*change));
	int ret;

	*prepared = NULL;
	if (!change)
		return err_sys(err, ENOMEM, "control socket");
	*change = (struct control_change){ .control = control,
		.config = config,
		.listener.fd = -1,
		.moves = !listener_same_address(control->daemon->config->control, config->control),
		.err = err };
	if (change->moves && *config->control)
		co_offload(prepare_offloaded, change);
	ret = change->ret;
	if (ret) {
		control_discard(change);
		return err_wrap(err, "control socket");
	}
	*prepared = change;
	return 0;
}

void control_discard(struct control_change *change)
{
	if (!change)
		return;
	listener_close(&change->listener);
	free(change);
}

void control_commit(struct control_change *change)
{
	struct control *control = change->control;
	struct listen_access access = control_access(change->config);
	struct err err;

	if (change->moves) {
		listener_stop(&control->listener);
		listener_close(&control->listener);
		control->listener = change->listener;
		if (control_start(control, &err))
			log_error("%s", err.text);
	} else if (listener_set_access(&control->listener, &access, &err)) {
		log_error("%s", err.text);
	}
	free(change);
}

suspends void control_stop(struct control *control)
{
	listener_stop(&control->listener);
	varlink_stop(&control->service);
}

void control_free(struct control *control)
{
	if (!control)
		return;
	listener_close(&control->listener);
	free(control);
}
