/*
 * A Varlink service; see varlink.h. It knows nothing of what the methods are about.
 *
 * A connection is one coroutine in a loop: receive up to a NUL, parse, check against the tables, call the
 * method, which sends its replies itself. What came beyond the NUL stays in the buffer for the
 * next round. The buffer never grows: a call that does not fit is the end of the connection.
 *
 * Hostile peers. Nesting is counted before the parser, which is recursive, sees a byte. A call once begun
 * must be complete within VARLINK_PATIENCE_MS, and a reply be taken within that time. A silent
 * connection may stay, but when all places are taken the one silent for longest is closed for a
 * newcomer. After each call the others get their turn, however many calls came in one packet.
 *
 * Invariant: a connection is in service->receiving exactly while it waits for bytes; only then may
 * somebody else cancel it, so no call is cut off between being carried out and being answered.
 */
#include "daemon/varlink.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "rt/reactor.h"
#include "rt/stream.h"

#define SERVICE "org.varlink.service"

struct connection {
	struct varlink_service *service;
	struct list receiving_link;
	struct stream stream;
	struct ucred peer;
	size_t used_bytes; /* of buffer; the call being handled is at its start */
	char buffer[VARLINK_CALL_MAX_BYTES];
};

struct varlink_call {
	struct connection *conn;
	const char *method; /* this and parameters are borrowed from the message */
	json_t *parameters; /* NULL: none given */
	bool more, oneway;
	bool answered;
	int send_error; /* 0 or the first -errno */
};

/* --- receiving -------------------------------------------------------------------------------- */

/* Objects and arrays that lie within each other, at most; text need not be valid JSON. */
static unsigned nesting_depth(const char *text, size_t len_bytes)
{
	unsigned depth = 0, deepest = 0;
	bool in_string = false;

	for (size_t i = 0; i < len_bytes; i++) {
		char c = text[i];

		if (in_string) {
			if (c == '\\')
				i++;
			else if (c == '"')
				in_string = false;
		} else if (c == '"') {
			in_string = true;
		} else if (c == '{' || c == '[') {
			depth++;
			deepest = MAX(deepest, depth);
		} else if ((c == '}' || c == ']') && depth) {
			depth--;
		}
	}
	return deepest;
}

suspends static ssize_t receive_some(struct connection *conn, uint64_t deadline_ns)
{
	list_push_back(&conn->service->receiving, &conn->receiving_link);
	ssize_t got = stream_recv(&conn->stream, conn->buffer + conn->used_bytes,
		sizeof(conn->buffer) - conn->used_bytes, deadline_ns);
	list_remove(&conn->receiving_link);
	return got ? got : -ECONNRESET;
}

/* Waits until a whole call is in the buffer; its length without the NUL, or -errno (0 bytes: -EBADMSG). */
suspends static ssize_t receive_call(struct connection *conn)
{
	uint64_t deadline_ns = NO_DEADLINE;
	size_t searched = 0;

	for (;;) {
		const char *end = memchr(conn->buffer + searched, 0, conn->used_bytes - searched);
		if (end)
			return end == conn->buffer ? -EBADMSG : end - conn->buffer;
		searched = conn->used_bytes;
		if (searched == sizeof(conn->buffer))
			return -EMSGSIZE;
		if (conn->service->stopping)
			return -ECANCELED;
		if (searched && deadline_ns == NO_DEADLINE)
			deadline_ns = reactor_now_ns() + conn->service->patience_ns;
		ssize_t got = receive_some(conn, deadline_ns);
		if (got < 0)
			return got;
		conn->used_bytes += (size_t)got;
	}
}

static void drop_call(struct connection *conn, size_t len_bytes)
{
	conn->used_bytes -= len_bytes + 1;
	memmove(conn->buffer, conn->buffer + len_bytes + 1, conn->used_bytes);
}

/* --- sending ---------------------------------------------------------------------------------- */

/* Sends message and its NUL; consumes message. The first error of a call sticks. */
suspends static void send_message(struct varlink_call *call, json_t *message)
{
	CLEANUP(free) char *text = message ? json_dumps(message, JSON_COMPACT) : NULL;

	json_decref(message);
	if (call->send_error)
		return;
	if (!text) {
		call->send_error = -ENOMEM;
		return;
	}
	struct iovec iov = { .iov_base = text, .iov_len = strlen(text) + 1 };
	call->send_error = stream_send(
		&call->conn->stream, &iov, 1, reactor_now_ns() + call->conn->service->patience_ns);
}

static json_t *or_empty(json_t *parameters)
{
	return parameters ? parameters : json_object();
}

suspends void varlink_reply(struct varlink_call *call, json_t *parameters)
{
	assert(!call->answered);
	call->answered = true;
	if (call->oneway)
		json_decref(parameters);
	else
		send_message(call, json_pack("{s:o}", "parameters", or_empty(parameters)));
}

suspends void varlink_error(struct varlink_call *call, const char *error, json_t *parameters)
{
	assert(!call->answered);
	call->answered = true;
	if (call->oneway)
		json_decref(parameters);
	else
		send_message(call, json_pack("{s:s, s:o}", "error", error, "parameters",
					   or_empty(parameters)));
}

suspends int varlink_progress(struct varlink_call *call, json_t *parameters)
{
	assert(!call->answered);
	if (!call->more || call->oneway)
		json_decref(parameters);
	else
		send_message(call, json_pack("{s:o, s:b}", "parameters", or_empty(parameters),
					   "continues", 1));
	return call->send_error;
}

/* An error of org.varlink.service has one parameter, a string. */
suspends static void service_error(
	struct varlink_call *call, const char *error, const char *key, const char *value)
{
	varlink_error(call, error, json_pack("{s:s}", key, value));
}

suspends void varlink_invalid_parameter(struct varlink_call *call, const char *name)
{
	service_error(call, SERVICE ".InvalidParameter", "parameter", name);
}

/* --- what methods ask ------------------------------------------------------------------------- */

struct varlink_service *varlink_call_service(const struct varlink_call *call)
{
	return call->conn->service;
}

const char *varlink_call_method(const struct varlink_call *call)
{
	return call->method;
}

const struct ucred *varlink_call_peer(const struct varlink_call *call)
{
	return &call->conn->peer;
}

bool varlink_call_peer_in_group(const struct varlink_call *call, gid_t gid)
{
	int fd = call->conn->stream.fd;
	socklen_t len_bytes = 0;

	if (call->conn->peer.uid == (uid_t)-1)
		return false;
	if (call->conn->peer.gid == gid)
		return true;
	/* The first call fails, and tells the length. */
	if (!getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &len_bytes) || errno != ERANGE)
		return false;
	CLEANUP(free) gid_t *groups = malloc(len_bytes);
	if (!groups || getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &len_bytes))
		return false;
	for (size_t i = 0; i < len_bytes / sizeof(*groups); i++)
		if (groups[i] == gid)
			return true;
	return false;
}

bool varlink_call_more(const struct varlink_call *call)
{
	return call->more && !call->oneway;
}

const char *varlink_string(const struct varlink_call *call, const char *name)
{
	return json_string_value(json_object_get(call->parameters, name));
}

int64_t varlink_int(const struct varlink_call *call, const char *name, int64_t fallback)
{
	const json_t *value = json_object_get(call->parameters, name);

	return json_is_integer(value) ? json_integer_value(value) : fallback;
}

bool varlink_bool(const struct varlink_call *call, const char *name, bool fallback)
{
	const json_t *value = json_object_get(call->parameters, name);

	return json_is_boolean(value) ? json_is_true(value) : fallback;
}

json_t *varlink_object(const struct varlink_call *call, const char *name)
{
	json_t *value = json_object_get(call->parameters, name);

	return json_is_object(value) ? value : NULL;
}

/* --- org.varlink.service ---------------------------------------------------------------------- */

static const char service_description[] =
	"# What every Varlink service tells about itself.\n"
	"interface org.varlink.service\n"
	"\n"
	"# Who made this service, and the interfaces that it has.\n"
	"method GetInfo() -> (vendor: string, product: string, version: string, url: string,\n"
	"  interfaces: []string)\n"
	"\n"
	"# The description of one interface, in the language that this text is written in.\n"
	"method GetInterfaceDescription(interface: string) -> (description: string)\n"
	"\n"
	"# There is no such interface here.\n"
	"error InterfaceNotFound (interface: string)\n"
	"\n"
	"# The interface has no such method.\n"
	"error MethodNotFound (method: string)\n"
	"\n"
	"# The interface has the method, this service does not.\n"
	"error MethodNotImplemented (method: string)\n"
	"\n"
	"# A parameter is missing, unknown, of the wrong type, or has a value that makes no "
	"sense.\n"
	"error InvalidParameter (parameter: string)\n";

suspends static void get_info(struct varlink_call *call);
suspends static void get_interface_description(struct varlink_call *call);

static const struct varlink_method service_methods[] = {
	{ .name = "GetInfo", .fn = get_info },
	{ .name = "GetInterfaceDescription",
		.params = (const struct varlink_param[]){ { "interface", VARLINK_STRING }, {} },
		.fn = get_interface_description },
	{},
};

static const struct varlink_interface service_interface = {
	.name = SERVICE,
	.description = service_description,
	.methods = service_methods,
};

static const struct varlink_interface *find_interface(
	const struct varlink_service *service, const char *name, size_t name_len)
{
	const struct varlink_interface *interface = &service_interface;

	for (size_t i = 0; interface; interface = service->interfaces[i++])
		if (strlen(interface->name) == name_len && !memcmp(interface->name, name, name_len))
			return interface;
	return NULL;
}

suspends static void get_info(struct varlink_call *call)
{
	const struct varlink_service *service = call->conn->service;
	json_t *names = json_array();

	json_array_append_new(names, json_string(SERVICE));
	for (size_t i = 0; service->interfaces[i]; i++)
		json_array_append_new(names, json_string(service->interfaces[i]->name));
	varlink_reply(call, json_pack("{s:s, s:s, s:s, s:s, s:o}", "vendor", service->vendor,
				    "product", service->product, "version", service->version, "url",
				    service->url, "interfaces", names));
}

suspends static void get_interface_description(struct varlink_call *call)
{
	const char *name = varlink_string(call, "interface");
	const struct varlink_interface *interface = find_interface(
		call->conn->service, name, strlen(name));

	if (!interface)
		service_error(call, SERVICE ".InterfaceNotFound", "interface", name);
	else
		varlink_reply(call, json_pack("{s:s}", "description", interface->description));
}

/* --- dispatch --------------------------------------------------------------------------------- */

static bool type_fits(const json_t *value, const struct varlink_param *param)
{
	if (!value || json_is_null(value))
		return param->optional;
	switch (param->type) {
	case VARLINK_BOOL:
		return json_is_boolean(value);
	case VARLINK_INT:
		return json_is_integer(value);
	case VARLINK_SIZE:
		return json_is_integer(value) && json_integer_value(value) >= 0;
	case VARLINK_STRING:
		return json_is_string(value);
	case VARLINK_OBJECT:
		return json_is_object(value);
	}
	return false;
}

/* The name of the first parameter that is missing, ill-typed or unknown; NULL when all is well. */
static const char *find_bad_parameter(const struct varlink_param *table, json_t *parameters)
{
	static const struct varlink_param no_params[] = { {} };
	const char *key;
	json_t *value;

	if (!table)
		table = no_params;
	for (const struct varlink_param *param = table; param->name; param++)
		if (!type_fits(json_object_get(parameters, param->name), param))
			return param->name;
	json_object_foreach(parameters, key, value)
	{
		const struct varlink_param *param = table;
		while (param->name && strcmp(param->name, key))
			param++;
		if (!param->name)
			return key;
	}
	return NULL;
}

static const struct varlink_method *find_method(
	const struct varlink_interface *interface, const char *name)
{
	const struct varlink_method *method = interface->methods;

	while (method->name && strcmp(method->name, name))
		method++;
	return method->name ? method : NULL;
}

/* Checks the call in the order: method, parameters, authority; then carries it out. Answers in any case. */
suspends static void dispatch(struct varlink_call *call, bool upgrade)
{
	const char *full_name = call->method;
	struct varlink_service *service = call->conn->service;
	const char *dot = strrchr(full_name, '.');
	size_t interface_len = dot ? (size_t)(dot - full_name) : strlen(full_name);
	const struct varlink_interface *interface = find_interface(
		service, full_name, interface_len);

	if (!interface) {
		varlink_error(call, SERVICE ".InterfaceNotFound",
			json_pack("{s:s%}", "interface", full_name, interface_len));
		return;
	}
	const struct varlink_method *method = find_method(interface, dot + 1);
	if (!method) {
		service_error(call, SERVICE ".MethodNotFound", "method", full_name);
		return;
	}
	if (!method->fn) {
		service_error(call, SERVICE ".MethodNotImplemented", "method", full_name);
		return;
	}
	const char *bad = upgrade ? "upgrade"
				  : find_bad_parameter(method->params, call->parameters);
	if (bad) {
		varlink_invalid_parameter(call, bad);
		return;
	}
	if (method->needs_authority && !service->permit(call))
		return;
	method->fn(call);
}

/* Absent means false; anything but a boolean breaks the protocol. */
static bool get_flag(const json_t *message, const char *name, bool *flag)
{
	const json_t *value = json_object_get(message, name);

	*flag = json_is_true(value);
	return !value || json_is_boolean(value);
}

/* -EBADMSG when this is no call. */
suspends static int handle_message(struct connection *conn, json_t *message)
{
	struct varlink_call call = { .conn = conn };
	json_t *parameters = json_object_get(message, "parameters");
	bool upgrade;

	call.method = json_string_value(json_object_get(message, "method"));
	if (!call.method || !get_flag(message, "more", &call.more) ||
		!get_flag(message, "oneway", &call.oneway) ||
		!get_flag(message, "upgrade", &upgrade))
		return -EBADMSG;
	if (parameters && !json_is_object(parameters) && !json_is_null(parameters))
		return -EBADMSG;
	call.parameters = json_is_object(parameters) ? parameters : NULL;
	dispatch(&call, upgrade);
	assert(call.answered);
	return call.send_error;
}

suspends static int handle_call(struct connection *conn, size_t len_bytes)
{
	if (nesting_depth(conn->buffer, len_bytes) > VARLINK_DEPTH_MAX)
		return -EBADMSG;
	json_t *message = json_loadb(conn->buffer, len_bytes, JSON_REJECT_DUPLICATES, NULL);
	drop_call(conn, len_bytes);
	int ret = handle_message(conn, message);
	json_decref(message);
	return ret;
}

/* --- connections ------------------------------------------------------------------------------ */

suspends static void connection_run(void *arg)
{
	struct connection *conn = arg;
	ssize_t ret;

	do {
		ret = receive_call(conn);
		if (ret > 0) {
			ret = handle_call(conn, (size_t)ret);
			co_yield ();
		}
	} while (ret >= 0);
	if (ret == -EBADMSG || ret == -EMSGSIZE || ret == -ETIMEDOUT)
		log_debug("varlink: disconnecting pid %d: %s", conn->peer.pid,
			ret == -EBADMSG    ? "this is no Varlink call"
			: ret == -EMSGSIZE ? "the call is too long"
					   : "too slow");
	stream_fini(&conn->stream);
	free(conn);
}

static void identify_peer(struct connection *conn)
{
	socklen_t len_bytes = sizeof(conn->peer);

	if (getsockopt(conn->stream.fd, SOL_SOCKET, SO_PEERCRED, &conn->peer, &len_bytes))
		conn->peer = (struct ucred){ .uid = (uid_t)-1, .gid = (gid_t)-1 };
}

/* Room for one more, if need be by closing the connection that has been silent for longest. */
static bool make_room(struct varlink_service *service)
{
	if (service->connections.running < VARLINK_CONNECTIONS)
		return true;
	struct list *item = list_pop_front(&service->receiving);
	if (!item)
		return false;
	stream_cancel(&list_entry(item, struct connection, receiving_link)->stream);
	return true;
}

void varlink_serve(struct varlink_service *service, int fd)
{
	struct connection *conn;

	if (service->stopping || !make_room(service)) {
		close(fd);
		return;
	}
	conn = malloc(sizeof(*conn)); /* not calloc: pages of the buffer are touched as they fill */
	if (!conn) {
		close(fd);
		return;
	}
	conn->service = service;
	conn->used_bytes = 0;
	list_init(&conn->receiving_link);
	if (stream_init(&conn->stream, fd)) {
		free(conn);
		return;
	}
	identify_peer(conn);
	co_group_start(&service->connections, connection_run, conn);
}

void varlink_init(struct varlink_service *service)
{
	list_init(&service->receiving);
	co_group_init(&service->connections);
	service->patience_ns = VARLINK_PATIENCE_MS * NS_PER_MS;
	service->stopping = false;
}

suspends void varlink_stop(struct varlink_service *service)
{
	struct list *item;

	service->stopping = true;
	while ((item = list_pop_front(&service->receiving)))
		stream_cancel(&list_entry(item, struct connection, receiving_link)->stream);
	co_group_wait(&service->connections);
}
