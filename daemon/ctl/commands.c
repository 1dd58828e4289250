/*
 * The commands of blkstackctl, and the table that the command line, --help and the usage come from.
 *
 * A command makes one call, as a rule, and shows its reply: as a table or a word for people, or whole
 * with --json. A command that only changes something says nothing when it worked.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "base/util.h"
#include "daemon/ctl/ctl.h"

enum ctl_exit ctl_call_quietly(struct ctl *ctl, const char *method, json_t *parameters)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(ctl, method, parameters, &reply);

	if (!status && ctl->json)
		show_json(reply);
	json_decref(reply);
	return status;
}

enum ctl_exit ctl_parse_size(const char *text, uint64_t *size_bytes)
{
	struct err err;

	if (units_parse_size(text, size_bytes, &err))
		return ctl_fail(CTL_USAGE, "%s", err.text);
	if (*size_bytes > INT64_MAX)
		return ctl_fail(CTL_USAGE, "\"%s\" is more than a disk can have", text);
	return CTL_OK;
}

/* --- looking ---------------------------------------------------------------------------------- */

/* Calls a method that returns an array of that name and shows it with show(), or all with --json. */
static enum ctl_exit show_array(struct ctl *ctl, const char *method, json_t *parameters,
	const char *name, void (*show)(const json_t *array))
{
	json_t *reply;
	enum ctl_exit status = ctl_call(ctl, method, parameters, &reply);

	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		show(json_object_get(reply, name));
	json_decref(reply);
	return status;
}

static enum ctl_exit run_list(struct ctl *ctl, const char **operands, int operand_count)
{
	return show_array(ctl, "List", NULL, "exports", show_list);
}

static json_t *optional_export(const char **operands, int operand_count)
{
	return operand_count ? json_pack("{s:s}", "export", operands[0]) : NULL;
}

/* The door as a whole belongs to no export. */
static enum ctl_exit run_status(struct ctl *ctl, const char **operands, int operand_count)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(
		ctl, "Status", optional_export(operands, operand_count), &reply);

	if (!status && ctl->json) {
		show_json(reply);
	} else if (!status) {
		show_statuses(json_object_get(reply, "exports"));
		if (!operand_count)
			show_door(json_object_get(reply, "door"));
	}
	json_decref(reply);
	return status;
}

static enum ctl_exit run_latency(struct ctl *ctl, const char **operands, int operand_count)
{
	return show_array(
		ctl, "Status", optional_export(operands, operand_count), "exports", show_latencies);
}

static enum ctl_exit run_clients(struct ctl *ctl, const char **operands, int operand_count)
{
	return show_array(
		ctl, "Clients", optional_export(operands, operand_count), "clients", show_clients);
}

static enum ctl_exit run_version(struct ctl *ctl, const char **operands, int operand_count)
{
	json_t *info;

	if (!ctl->json)
		printf("blkstackctl %s\n", BLKSTACK_VERSION);
	enum ctl_exit status = ctl_call(ctl, "Info", NULL, &info);
	if (!status && ctl->json) {
		json_object_set_new(info, "blkstackctl", json_string(BLKSTACK_VERSION));
		show_json(info);
	} else if (!status) {
		printf("blkstackd %s, pid %lld, config %s, engine %s\n",
			json_string_value(json_object_get(info, "version")),
			(long long)json_integer_value(json_object_get(info, "pid")),
			json_string_value(json_object_get(info, "config")),
			json_string_value(json_object_get(info, "engine")));
		if (json_integer_value(json_object_get(info, "restarts")))
			printf("restarted by its keeper: %lld times; the last server: %s\n",
				(long long)json_integer_value(json_object_get(info, "restarts")),
				json_string_value(json_object_get(info, "last_end")));
		if (json_is_string(json_object_get(info, "config_note")))
			printf("config: %s\n",
				json_string_value(json_object_get(info, "config_note")));
	}
	json_decref(info);
	return status;
}

/* --- changing --------------------------------------------------------------------------------- */

static enum ctl_exit current_size(struct ctl *ctl, const char *name, uint64_t *size_bytes)
{
	json_t *reply, *export, *found = NULL;
	enum ctl_exit status = ctl_call(ctl, "List", NULL, &reply);
	size_t i;

	if (status)
		return status;
	json_array_foreach(json_object_get(reply, "exports"), i, export)
	{
		const char *this_name = json_string_value(json_object_get(export, "name"));
		if (this_name && !strcmp(this_name, name))
			found = export;
	}
	*size_bytes = (uint64_t)json_integer_value(json_object_get(found, "size"));
	json_decref(reply);
	return found ? CTL_OK
		     : ctl_fail(CTL_NO_SUCH_EXPORT,
			       "there is no export \"%s\" (\"blkstackctl list\" shows those there "
			       "are)",
			       name);
}

/* "10G", or relative to the size now: "+1G", "-512M". */
static enum ctl_exit parse_new_size(
	struct ctl *ctl, const char *name, const char *text, uint64_t *size_bytes)
{
	char sign = *text == '+' || *text == '-' ? *text : 0;
	uint64_t amount_bytes, now_bytes = 0;
	enum ctl_exit status = ctl_parse_size(text + (sign != 0), &amount_bytes);

	if (!status && sign)
		status = current_size(ctl, name, &now_bytes);
	if (status)
		return status;
	if (!sign)
		*size_bytes = amount_bytes;
	else if (sign == '+')
		*size_bytes = now_bytes + amount_bytes;
	else if (amount_bytes < now_bytes)
		*size_bytes = now_bytes - amount_bytes;
	else
		return ctl_fail(CTL_USAGE,
			"export \"%s\" has %llu bytes, they cannot become %s less", name,
			(unsigned long long)now_bytes, text + 1);
	if (*size_bytes > INT64_MAX)
		return ctl_fail(CTL_USAGE, "\"%s\" is more than a disk can have", text);
	return CTL_OK;
}

/* "db: 10 GiB", with the bytes where that is rounded. */
static void show_size(const char *name, uint64_t size_bytes)
{
	char text[UNITS_SIZE_TEXT_LEN];

	printf("%s: %s", name, units_format_size(size_bytes, text));
	if (strchr(text, '.'))
		printf(" (%llu bytes)", (unsigned long long)size_bytes);
	putchar('\n');
}

static enum ctl_exit run_resize(struct ctl *ctl, const char **operands, int operand_count)
{
	uint64_t size_bytes = 0;
	json_t *reply;
	enum ctl_exit status = parse_new_size(ctl, operands[0], operands[1], &size_bytes);

	if (status)
		return status;
	status = ctl_call(ctl, "Resize",
		json_pack("{s:s, s:I, s:b}", "export", operands[0], "size", (json_int_t)size_bytes,
			"force", ctl->force),
		&reply);
	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		show_size(
			operands[0], (uint64_t)json_integer_value(json_object_get(reply, "size")));
	json_decref(reply);
	return status;
}

static enum ctl_exit run_flush(struct ctl *ctl, const char **operands, int operand_count)
{
	return ctl_call_quietly(ctl, "Flush", json_pack("{s:s}", "export", operands[0]));
}

static enum ctl_exit run_discard(struct ctl *ctl, const char **operands, int operand_count)
{
	uint64_t off, len_bytes;
	enum ctl_exit status;

	if (operand_count == 2)
		return ctl_fail(CTL_USAGE, "discard: an offset goes with a length");
	if (operand_count == 1 && !ctl->force)
		return ctl_fail(CTL_USAGE,
			"discard: without a range, all that is on \"%s\" is lost: --force if you "
			"mean it",
			operands[0]);
	if (operand_count == 1)
		return ctl_call_quietly(ctl, "Discard", json_pack("{s:s}", "export", operands[0]));
	status = ctl_parse_size(operands[1], &off);
	if (!status)
		status = ctl_parse_size(operands[2], &len_bytes);
	if (status)
		return status;
	return ctl_call_quietly(ctl, "Discard",
		json_pack("{s:s, s:I, s:I}", "export", operands[0], "offset", (json_int_t)off,
			"length", (json_int_t)len_bytes));
}

static enum ctl_exit run_attach(struct ctl *ctl, const char **operands, int operand_count)
{
	json_t *reply;
	enum ctl_exit status = ctl_call(ctl, "Attach",
		json_pack("{s:s, s:s*}", "export", operands[0], "device",
			operand_count > 1 ? operands[1] : NULL),
		&reply);

	if (!status && ctl->json)
		show_json(reply);
	else if (!status)
		printf("%s\n", json_string_value(json_object_get(reply, "device")));
	json_decref(reply);
	return status;
}

static enum ctl_exit run_detach(struct ctl *ctl, const char **operands, int operand_count)
{
	return ctl_call_quietly(
		ctl, "Detach", json_pack("{s:s, s:b}", "export", operands[0], "force", ctl->force));
}

static enum ctl_exit parse_client(const char *text, json_int_t *id)
{
	char *end;

	errno = 0;
	*id = strtoll(text, &end, 10);
	if (errno || *end || *id <= 0)
		return ctl_fail(CTL_USAGE,
			"\"%s\" is no number of a client (\"blkstackctl clients\" shows them)",
			text);
	return CTL_OK;
}

static enum ctl_exit run_disconnect(struct ctl *ctl, const char **operands, int operand_count)
{
	json_int_t id;
	enum ctl_exit status = parse_client(operands[0], &id);

	return status ? status : ctl_call_quietly(ctl, "Disconnect", json_pack("{s:I}", "id", id));
}

static enum ctl_exit run_debug(struct ctl *ctl, const char **operands, int operand_count)
{
	bool on = !strcmp(operands[0], "on");
	json_int_t id = 0;

	if (!on && strcmp(operands[0], "off"))
		return ctl_fail(CTL_USAGE, "debug: \"%s\" is neither on nor off", operands[0]);
	enum ctl_exit status = operand_count > 1 ? parse_client(operands[1], &id) : CTL_OK;
	if (status)
		return status;
	return ctl_call_quietly(ctl, "Debug",
		id ? json_pack("{s:b, s:I}", "on", on, "id", id) : json_pack("{s:b}", "on", on));
}

/* Also waits for the end of the process, where its pid means something to us. */
static enum ctl_exit run_shutdown(struct ctl *ctl, const char **operands, int operand_count)
{
	json_t *info;
	enum ctl_exit status = ctl_call(ctl, "Info", NULL, &info);

	if (status)
		return status;
	pid_t pid = (pid_t)json_integer_value(json_object_get(info, "pid"));
	json_decref(info);
	CLEANUP(fd) int process = pidfd_open(pid, 0);
	status = ctl_call_quietly(ctl, "Shutdown", NULL);
	if (status)
		return status;
	ctl_close(ctl);
	struct pollfd poll_fd = { .fd = process, .events = POLLIN };
	while (process >= 0 && poll(&poll_fd, 1, -1) < 0 && errno == EINTR)
		;
	return CTL_OK;
}

static enum ctl_exit run_call(struct ctl *ctl, const char **operands, int operand_count)
{
	json_error_t json_error;
	json_t *parameters = NULL, *reply;
	bool continues = true;

	if (operand_count > 1) {
		parameters = json_loads(operands[1], JSON_REJECT_DUPLICATES, &json_error);
		if (!json_is_object(parameters)) {
			json_decref(parameters);
			return ctl_fail(CTL_USAGE, "call: the parameters are no JSON object: %s",
				parameters ? "expected {...}" : json_error.text);
		}
	}
	enum ctl_exit status = ctl_send(ctl, operands[0], parameters, ctl->more);
	while (!status && continues) {
		status = ctl_receive(ctl, &reply, &continues);
		if (!status)
			show_json(reply);
		json_decref(reply);
	}
	return status;
}

const struct ctl_command ctl_commands[] = {
	{ "list", "", 0, 0, 0, "list the exports", NULL, run_list },
	{ "status", "[EXPORT]", 0, 1, 0, "show layers, counters and doors", NULL, run_status },
	{ "latency", "[EXPORT]", 0, 1, 0, "show how long requests took",
		"By door and kind of request, from when a request came in until its reply was on "
		"its way.\n",
		run_latency },
	{ "resize", "EXPORT SIZE", 2, 2, CTL_FORCE, "change the size of an export in use",
		"SIZE is in bytes or like 512M, 10G; +1G and -1G are relative to the size now.\n"
		"The kernel device follows at once, NBD clients see it when they connect anew.\n"
		"To shrink needs --force: what lies beyond the new size is lost.\n",
		run_resize },
	{ "flush", "EXPORT", 1, 1, 0, "make everything written so far durable", NULL, run_flush },
	{ "discard", "EXPORT [OFFSET LENGTH]", 1, 3, CTL_FORCE,
		"give space back; reads as zeroes then",
		"OFFSET and LENGTH are in bytes or like 512M, 10G. Without them everything on the "
		"export\n"
		"is discarded, which needs --force.\n",
		run_discard },
	{ "attach", "EXPORT [DEVICE]", 1, 2, 0, "attach a kernel device and print its name",
		"DEVICE is /dev/nbdN or auto, by default what the config file says. Returns when "
		"the device\n"
		"and its partitions are ready to use.\n",
		run_attach },
	{ "detach", "EXPORT", 1, 1, CTL_FORCE, "detach the kernel device",
		"Refuses while the device is mounted, held or open, and says by whom. With --force "
		"its users\n"
		"get errors from then on.\n",
		run_detach },
	{ "clients", "[EXPORT]", 0, 1, 0, "show who is connected", NULL, run_clients },
	{ "disconnect", "ID", 1, 1, 0, "cut the connection of a client",
		"ID is the number that \"blkstackctl clients\" shows. What the client has in "
		"flight is\n"
		"carried out but not answered. Most clients come back at once.\n",
		run_disconnect },
	{ "debug", "on|off [ID]", 1, 2, 0, "log the protocol of NBD clients",
		"What each client asks and is told goes into the daemon's log, a line each: of one "
		"client, or\n"
		"of all, those to come too. A busy client fills the log quickly.\n",
		run_debug },
	{ "mirror", "ACTION EXPORT [RATE]", 2, 3, CTL_FORCE | CTL_RATE | CTL_MIRROR,
		"copy an export in use to another disk", ctl_mirror_help, ctl_mirror_run },
	{ "compact", "EXPORT", 1, 1, CTL_RATE | CTL_CANCEL | CTL_MORE,
		"make the file of a qcow image smaller",
		"Moves what lies at its end into free clusters further down, while guests go on, "
		"and cuts\n"
		"the file. It goes on when this command is ended: --cancel ends it.\n",
		ctl_compact },
	{ "check", "EXPORT", 1, 1, 0, "look for errors in a qcow image in use",
		"Requests wait meanwhile. Exit status 1 when the image is damaged; leaks are no "
		"damage.\n",
		ctl_check },
	{ "snapshot", "VERB EXPORT [NAME]", 2, 3, CTL_FORCE, "internal snapshots of a qcow image",
		"VERB is list, create, apply or delete. To apply a snapshot puts back the disk as "
		"it was,\n"
		"and loses what is on it: not while it is in use, but with --force.\n",
		ctl_snapshot },
	{ "reload", "", 0, 0, CTL_DRY_RUN | CTL_UPGRADE, "read the config file again",
		"Does what lies between the file and what runs, and prints it: all of it, or "
		"nothing "
		"when the\n"
		"file has an error or a step would take something from somebody (exit status 6). "
		"An "
		"export\n"
		"of which nothing changed is not disturbed. --upgrade: after that, as the command "
		"upgrade.\n",
		ctl_reload },
	{ "add", "[FILE]", 0, 1, CTL_SNIPPET, "add an export, until the daemon ends",
		"FILE (- is standard input) has the settings of one export, as in the list exports "
		"of a config\n"
		"file: name = \"db\"; stack = ( ... );\n",
		ctl_add },
	{ "remove", "EXPORT", 1, 1, CTL_FORCE, "close an export and take it away",
		"Refuses while its device is mounted, held or open, or an NBD client is connected, "
		"and says who\n"
		"that is. With --force they get errors. A reload brings it back if the config file "
		"has it.\n",
		ctl_remove },
	{ "upgrade", "", 0, 0, CTL_FORCE, "hand over to the program that is installed now",
		"Kernel devices and sockets stay; NBD clients are disconnected and can connect "
		"again "
		"at once.\n"
		"If the new program does not work the old one comes back. --force: also to the "
		"same "
		"program.\n",
		ctl_upgrade },
	{ "shutdown", "", 0, 0, 0, "end the daemon, and wait until it has ended", NULL,
		run_shutdown },
	{ "call", "METHOD [JSON]", 1, 2, CTL_MORE, "call any method of the control interface",
		"METHOD without dots is one of org.blkstack. JSON is an object of parameters.\n"
		"With --more, replies are printed as the work goes on, where the method has any.\n",
		run_call },
	{ "doctor", "", 0, 0, CTL_DOCTOR, "tell what on this machine stands in the way",
		ctl_doctor_help, ctl_doctor_run },
	{ "version", "", 0, 0, 0, "show the versions of command and daemon", NULL, run_version },
	{},
};
