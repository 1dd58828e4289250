/*
 * The connection to the daemon; see ctl.h.
 *
 * Varlink from the caller's side: one JSON object per message, ended by a NUL. Every failure is reported here,
 * once, as what happened and what to do about it, and becomes an exit status.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/ctl/ctl.h"

#define INTERFACE       "org.blkstack."
#define SERVICE         "org.varlink.service."
#define REPLY_MAX_BYTES (64U << 20) /* beyond: this is not our daemon */

/* --- connecting ------------------------------------------------------------------------------- */

static enum ctl_exit connect_failed(const struct ctl *ctl, int code)
{
	const char *path = ctl->socket_path;

	switch (code) {
	case ENOENT:
		return ctl_fail(CTL_NO_DAEMON,
			"%s: there is no such socket: blkstackd is not running, or its config "
			"names "
			"another control socket (see --socket)",
			path);
	case ECONNREFUSED:
		return ctl_fail(
			CTL_NO_DAEMON, "%s: nobody listens: blkstackd is not running", path);
	case EACCES:
	case EPERM:
		return ctl_fail(CTL_NOT_PERMITTED,
			"%s: you may not connect to this socket: try again as root, or as a member "
			"of "
			"the group that owns it",
			path);
	default:
		return ctl_fail(CTL_NO_DAEMON, "%s: cannot connect: %s", path, strerror(code));
	}
}

static enum ctl_exit ctl_connect(struct ctl *ctl)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };

	if (ctl->fd >= 0)
		return CTL_OK;
	if (strlen(ctl->socket_path) >= sizeof(un.sun_path))
		return ctl_fail(CTL_USAGE, "%s: a socket's path has at most %zu bytes",
			ctl->socket_path, sizeof(un.sun_path) - 1);
	strcpy(un.sun_path, ctl->socket_path);
	CLEANUP(fd) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&un, sizeof(un)))
		return connect_failed(ctl, errno);
	ctl->fd = take_fd(&fd);
	return CTL_OK;
}

void ctl_close(struct ctl *ctl)
{
	if (ctl->fd >= 0)
		close(ctl->fd);
	ctl->fd = -1;
	free(ctl->buffer);
	ctl->buffer = NULL;
	ctl->used_bytes = ctl->size_bytes = 0;
}

/* --- messages --------------------------------------------------------------------------------- */

static enum ctl_exit hung_up(int code)
{
	return ctl_fail(CTL_FAILED,
		"blkstackd closed the connection without an answer%s%s "
		"(its log may tell why)",
		code ? ": " : "", code ? strerror(code) : "");
}

static enum ctl_exit send_all(struct ctl *ctl, const char *text, size_t len_bytes)
{
	while (len_bytes) {
		ssize_t sent = send(ctl->fd, text, len_bytes, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return hung_up(errno);
		text += sent;
		len_bytes -= (size_t)sent;
	}
	return CTL_OK;
}

enum ctl_exit ctl_send(struct ctl *ctl, const char *method, json_t *parameters, bool more)
{
	enum ctl_exit status = ctl_connect(ctl);
	char full_name[256];

	snprintf(
		full_name, sizeof(full_name), "%s%s", strchr(method, '.') ? "" : INTERFACE, method);
	json_t *call = json_pack("{s:s, s:o*}", "method", full_name, "parameters", parameters);
	if (call && more)
		json_object_set_new(call, "more", json_true());
	CLEANUP(free) char *text = call ? json_dumps(call, JSON_COMPACT) : NULL;
	json_decref(call);
	if (status)
		return status;
	if (!text)
		return ctl_fail(CTL_FAILED, "cannot make a call of %s", method);
	return send_all(ctl, text, strlen(text) + 1);
}

static enum ctl_exit receive_more(struct ctl *ctl)
{
	if (ctl->used_bytes == ctl->size_bytes) {
		size_t size_bytes = ctl->size_bytes ? 2 * ctl->size_bytes : 16384;
		char *buffer = size_bytes <= REPLY_MAX_BYTES ? realloc(ctl->buffer, size_bytes)
							     : NULL;

		if (!buffer)
			return ctl_fail(CTL_FAILED, "the answer is too long");
		ctl->buffer = buffer;
		ctl->size_bytes = size_bytes;
	}
	ssize_t got = recv(
		ctl->fd, ctl->buffer + ctl->used_bytes, ctl->size_bytes - ctl->used_bytes, 0);
	if (got < 0 && errno == EINTR)
		return CTL_OK;
	if (got <= 0)
		return hung_up(got ? errno : 0);
	ctl->used_bytes += (size_t)got;
	return CTL_OK;
}

/* The next message, parsed; NULL and *status on failure. */
static json_t *receive_message(struct ctl *ctl, enum ctl_exit *status)
{
	const char *end;

	*status = CTL_OK;
	while (!ctl->used_bytes || !(end = memchr(ctl->buffer, 0, ctl->used_bytes))) {
		*status = receive_more(ctl);
		if (*status)
			return NULL;
	}
	size_t len_bytes = (size_t)(end - ctl->buffer);
	json_t *message = json_loadb(ctl->buffer, len_bytes, 0, NULL);
	ctl->used_bytes -= len_bytes + 1;
	memmove(ctl->buffer, end + 1, ctl->used_bytes);
	if (!message)
		*status = ctl_fail(
			CTL_FAILED, "the answer is no JSON: is this blkstackd's socket?");
	return message;
}

/* --- errors ----------------------------------------------------------------------------------- */

static const char *member(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "?";
}

static enum ctl_exit service_error(const char *error, const json_t *parameters)
{
	if (!strcmp(error, "InvalidParameter"))
		return ctl_fail(CTL_FAILED, "blkstackd does not accept the parameter \"%s\"",
			member(parameters, "parameter"));
	if (!strcmp(error, "InterfaceNotFound"))
		return ctl_fail(CTL_FAILED, "blkstackd has no interface \"%s\"",
			member(parameters, "interface"));
	return ctl_fail(CTL_FAILED,
		"blkstackd has no method \"%s\" (is it older than blkstackctl?)",
		member(parameters, "method"));
}

/* Says what an error reply means. */
static enum ctl_exit reply_error(const struct ctl *ctl, const char *error, const json_t *parameters)
{
	const char *name = member(parameters, "export"), *text = member(parameters, "text");

	if (!strncmp(error, SERVICE, strlen(SERVICE)))
		return service_error(error + strlen(SERVICE), parameters);
	if (!strcmp(error, INTERFACE "NoSuchExport"))
		return ctl_fail(CTL_NO_SUCH_EXPORT,
			"there is no export \"%s\" (\"blkstackctl list\" shows those there are)",
			name);
	if (!strcmp(error, INTERFACE "NoSuchClient"))
		return ctl_fail(CTL_FAILED,
			"there is no such client (\"blkstackctl clients\" shows those there are)");
	if (!strcmp(error, INTERFACE "NotPermitted"))
		return ctl_fail(
			CTL_NOT_PERMITTED, "%s: not permitted: %s", ctl->command->name, text);
	if (!strcmp(error, INTERFACE "Busy"))
		return ctl_fail(CTL_BUSY, "%s", text);
	if (!strcmp(error, INTERFACE "Failed"))
		return ctl_fail(CTL_FAILED, "%s", text);
	return ctl_fail(CTL_FAILED, "blkstackd answered %s", error);
}

enum ctl_exit ctl_receive(struct ctl *ctl, json_t **reply, bool *continues)
{
	enum ctl_exit status;
	json_t *message = receive_message(ctl, &status);
	const char *error = json_string_value(json_object_get(message, "error"));
	json_t *parameters = json_object_get(message, "parameters");

	*reply = NULL;
	*continues = json_is_true(json_object_get(message, "continues"));
	if (!message)
		return status;
	if (error)
		status = reply_error(ctl, error, parameters);
	else
		*reply = parameters ? json_incref(parameters) : json_object();
	json_decref(message);
	return status;
}

enum ctl_exit ctl_call(struct ctl *ctl, const char *method, json_t *parameters, json_t **reply)
{
	enum ctl_exit status = ctl_send(ctl, method, parameters, false);
	bool continues;

	*reply = NULL;
	return status ? status : ctl_receive(ctl, reply, &continues);
}
