/*
 * A Varlink service on stream sockets: calls and replies are JSON objects, each ended by a NUL byte.
 *
 *	call:	{"method": "org.example.Do", "parameters": {...}, "more": true, "oneway": true}
 *	reply:	{"parameters": {...}, "continues": true}  or  {"error": "org.example.Bad", "parameters": {...}}
 *
 * The owner describes interfaces by tables of methods and of their parameters. A method is called with
 * parameters that fit its table, in a coroutine of the connection's own, and answers exactly once
 * with varlink_reply() or varlink_error(); before that it may send any number of varlink_progress().
 * org.varlink.service is always there, and answers what the tables do not know.
 *
 * Calls of one connection are carried out one after the other; replies keep the order of the calls. A
 * peer that breaks the protocol (not JSON, no method, too long, too deep, too slow) is disconnected.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include <jansson.h>

#include "base/list.h"
#include "rt/lock.h"

#define VARLINK_CALL_MAX_BYTES (64 * 1024) /* one call, with its NUL */
#define VARLINK_DEPTH_MAX      16          /* objects and arrays within each other in a call */
#define VARLINK_CONNECTIONS    64    /* beyond: the most silent one makes room, if there is one */
#define VARLINK_PATIENCE_MS    10000 /* to finish a call once begun, and to take a reply */

struct varlink_call;

enum varlink_type {
	VARLINK_BOOL,
	VARLINK_INT,  /* int64_t */
	VARLINK_SIZE, /* an integer >= 0 */
	VARLINK_STRING,
	VARLINK_OBJECT,
};

/* One row of a parameters table; a table ends with a row without a name. */
struct varlink_param {
	const char *name;
	enum varlink_type type;
	bool optional; /* may be absent or null */
};

/* One row of a methods table; a table ends with a row without a name. */
struct varlink_method {
	const char *name; /* without the interface */
	bool needs_authority;
	const struct varlink_param *params; /* NULL: none */
	suspends void (*fn)(struct varlink_call *call);
};

struct varlink_interface {
	const char *name;        /* "org.example" */
	const char *description; /* in the interface description language */
	const struct varlink_method *methods;
};

/* Embedded in the owner's struct. The first members are the owner's to set; the rest is varlink_init()'s. */
struct varlink_service {
	const char *vendor, *product, *version, *url; /* for GetInfo */
	const struct varlink_interface *const
		*interfaces; /* ended by NULL; org.varlink.service not among them */

	/* Whether the peer of this call may use methods that need authority; if not, answers the call. */
	suspends bool (*permit)(struct varlink_call *call);

	uint64_t patience_ns;  /* VARLINK_PATIENCE_MS, unless changed after varlink_init() */
	struct list receiving; /* connections waiting for their peers, the most silent one first */
	struct co_group connections;
	bool stopping;
};

void varlink_init(struct varlink_service *service);

/* Serves a connected, non-blocking socket on the current reactor, and owns it from now on. */
void varlink_serve(struct varlink_service *service, int fd);

/* Disconnects silent peers, lets calls under way finish and be answered, and returns when all are gone. */
suspends void varlink_stop(struct varlink_service *service);

/* --- for methods ------------------------------------------------------------------------------ */

struct varlink_service *varlink_call_service(const struct varlink_call *call);

/* The full name: "org.example.Do". */
const char *varlink_call_method(const struct varlink_call *call);

/* Who calls, as of when it connected. pid 0 and (uid_t)-1 where the socket cannot tell. */
const struct ucred *varlink_call_peer(const struct varlink_call *call);
bool varlink_call_peer_in_group(const struct varlink_call *call, gid_t gid);

/* Whether the caller wants to hear of progress ("more"). */
bool varlink_call_more(const struct varlink_call *call);

/* Parameters; an optional one that is absent is NULL or the fallback. Strings live as long as the call. */
const char *varlink_string(const struct varlink_call *call, const char *name);
int64_t varlink_int(const struct varlink_call *call, const char *name, int64_t fallback);
bool varlink_bool(const struct varlink_call *call, const char *name, bool fallback);
json_t *varlink_object(const struct varlink_call *call, const char *name); /* borrowed */

/*
 * All three take over parameters, which may be NULL for none. That the peer is gone is no error of the
 * method's; progress tells it, so that work that nobody waits for can end: -errno. Without "more",
 * progress sends nothing and returns 0.
 */
suspends void varlink_reply(struct varlink_call *call, json_t *parameters);
suspends void varlink_error(struct varlink_call *call, const char *error, json_t *parameters);
suspends int varlink_progress(struct varlink_call *call, json_t *parameters);

/* For a value that the table cannot check: answers org.varlink.service.InvalidParameter. */
suspends void varlink_invalid_parameter(struct varlink_call *call, const char *name);
