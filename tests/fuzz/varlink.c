/*
 * Fuzzes the Varlink service: an input is what one client sends.
 *
 * Its first byte says in pieces of what size the rest is sent (so that calls arrive in halves). Then the
 * client closes its end, while it goes on reading until the service closes too. Each reply must be a JSON
 * object, and there are never more of them than NULs were sent, but for those that say they continue.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/varlink.h"
#include "rt/reactor.h"
#include "rt/stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PROGRESS_MAX 3

struct session {
	size_t piece_bytes;
	const uint8_t *data;
	size_t size;
	struct varlink_service service;
	struct stream client;
	struct co_group running;
	size_t call_count, reply_count;
};

static suspends void method(struct varlink_call *call)
{
	const char *text = varlink_string(call, "text");

	assert(text && varlink_int(call, "size", 0) >= 0);
	for (int i = 0; i < PROGRESS_MAX; i++)
		varlink_progress(call, json_pack("{s:i}", "i", i));
	varlink_reply(call, json_pack("{s:s, s:b, s:O*}", "text", text, "flag",
				    varlink_bool(call, "flag", false), "object",
				    varlink_object(call, "object")));
}

static suspends bool permit(struct varlink_call *call)
{
	varlink_error(call, "a.b.No", NULL);
	return false;
}

static const struct varlink_param params[] = {
	{ "text", VARLINK_STRING },
	{ "size", VARLINK_SIZE, .optional = true },
	{ "flag", VARLINK_BOOL, .optional = true },
	{ "object", VARLINK_OBJECT, .optional = true },
	{},
};

static const struct varlink_method methods[] = {
	{ "Do", .params = params, .fn = method },
	{ "Change", .needs_authority = true, .params = params, .fn = method },
	{ "Later" },
	{},
};

static const struct varlink_interface interface = { "a.b", "interface a.b\n", methods };
static const struct varlink_interface *const interfaces[] = { &interface, NULL };

static suspends void send_input(void *arg)
{
	struct session *session = arg;
	int ret = 0;

	for (size_t pos = 0; pos < session->size && !ret; pos += session->piece_bytes) {
		struct iovec iov = { (void *)(session->data + pos),
			MIN(session->piece_bytes, session->size - pos) };

		ret = stream_send(&session->client, &iov, 1, NO_DEADLINE);
		co_yield ();
	}
	shutdown(session->client.fd, SHUT_WR);
}

static void check_reply(struct session *session, const char *text, size_t len_bytes)
{
	json_t *reply = json_loadb(text, len_bytes, 0, NULL);

	assert(json_is_object(reply) && json_is_object(json_object_get(reply, "parameters")));
	session->reply_count += !json_is_true(json_object_get(reply, "continues"));
	assert(session->reply_count <= session->call_count);
	json_decref(reply);
}

static suspends void read_replies(void *arg)
{
	enum { REPLY_MAX_BYTES = 8 * VARLINK_CALL_MAX_BYTES };
	struct session *session = arg;
	CLEANUP(free) char *replies = malloc(REPLY_MAX_BYTES);
	size_t used_bytes = 0;
	ssize_t got;

	while ((got = stream_recv(&session->client, replies + used_bytes,
			REPLY_MAX_BYTES - used_bytes, NO_DEADLINE)) > 0) {
		const char *end;

		used_bytes += (size_t)got;
		while ((end = memchr(replies, 0, used_bytes))) {
			check_reply(session, replies, (size_t)(end - replies));
			used_bytes -= (size_t)(end - replies) + 1;
			memmove(replies, end + 1, used_bytes);
		}
		assert(used_bytes < REPLY_MAX_BYTES);
	}
}

static suspends void run(void *arg)
{
	struct session *session = arg;
	int fds[2];

	varlink_init(&session->service);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) ||
		stream_init(&session->client, fds[0]))
		abort();
	varlink_serve(&session->service, fds[1]);
	co_group_init(&session->running);
	co_group_start(&session->running, read_replies, session);
	co_group_start(&session->running, send_input, session);
	co_group_wait(&session->running);
	stream_fini(&session->client);
	varlink_stop(&session->service);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct reactor *reactor;
	struct err err;

	if (!size)
		return 0;
	if (!reactor && reactor_create(&reactor, "threads", &err))
		abort();
	struct session session = {
		.piece_bytes = data[0] ? data[0] : size,
		.data = data + 1,
		.size = size - 1,
		.service = { .vendor = "v",
			.product = "p",
			.version = "1",
			.url = "",
			.interfaces = interfaces,
			.permit = permit },
	};
	for (size_t i = 0; i < session.size; i++)
		session.call_count += !session.data[i];
	reactor_run_main(reactor, run, &session);
	return 0;
}
