/*
 * The Varlink service: framing, checks, errors, progress, and peers that misbehave.
 *
 * Service and client run on one reactor: the client is the test's own coroutine on the other end of a
 * socket pair, and writes raw bytes, so that packets can be cut anywhere.
 */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "daemon/varlink.h"
#include "rt/reactor.h"
#include "rt/stream.h"
#include "testing.h"

#define PATIENCE_NS (30 * NS_PER_MS)   /* of the service, where a test waits for its end */
#define WAIT_NS     (300 * NS_PER_SEC) /* of the client: reached only when a test fails */

struct fixture {
	struct varlink_service service;
	struct co_queue gate; /* where Wait waits */
	unsigned waiting, calls;
	int progress_error; /* what Count saw last */
	bool permitted;
	struct stream client;
};

/* --- the service under test ------------------------------------------------------------------- */

static struct fixture *fixture_of(struct varlink_call *call)
{
	return container_of(varlink_call_service(call), struct fixture, service);
}

suspends static void echo(struct varlink_call *call)
{
	const char *text = varlink_string(call, "text");

	fixture_of(call)->calls++;
	if (!strcmp(text, "bad"))
		varlink_invalid_parameter(call, "text");
	else
		varlink_reply(call, json_pack("{s:s, s:I, s:b, s:i}", "text", text, "number",
					    (json_int_t)varlink_int(call, "number", -7), "flag",
					    varlink_bool(call, "flag", true), "members",
					    (int)json_object_size(varlink_object(call, "object"))));
}

suspends static void count_up(struct varlink_call *call)
{
	int64_t to = varlink_int(call, "to", 0);

	for (int64_t i = 1; i < to && !fixture_of(call)->progress_error; i++)
		fixture_of(call)->progress_error = varlink_progress(
			call, json_pack("{s:I}", "at", (json_int_t)i));
	varlink_reply(call, json_pack("{s:I}", "at", (json_int_t)to));
}

suspends static void wait_at_gate(struct varlink_call *call)
{
	struct fixture *fixture = fixture_of(call);

	fixture->waiting++;
	co_queue_wait(&fixture->gate);
	fixture->waiting--;
	varlink_reply(call, NULL);
}

suspends static void who(struct varlink_call *call)
{
	const struct ucred *peer = varlink_call_peer(call);

	varlink_reply(call, json_pack("{s:I, s:I, s:b, s:b}", "uid", (json_int_t)peer->uid, "pid",
				    (json_int_t)peer->pid, "own_group",
				    varlink_call_peer_in_group(call, getgid()), "other_group",
				    varlink_call_peer_in_group(call, 4242)));
}

static const struct varlink_method example_methods[] = {
	{ .name = "Echo",
		.params =
			(const struct varlink_param[]){
				{ "text", VARLINK_STRING },
				{ "number", VARLINK_INT, .optional = true },
				{ "size", VARLINK_SIZE, .optional = true },
				{ "flag", VARLINK_BOOL, .optional = true },
				{ "object", VARLINK_OBJECT, .optional = true },
				{},
			},
		.fn = echo },
	{ .name = "Count",
		.params = (const struct varlink_param[]){ { "to", VARLINK_SIZE }, {} },
		.fn = count_up },
	{ .name = "Wait", .fn = wait_at_gate },
	{ .name = "Who", .fn = who },
	{ .name = "Change", .needs_authority = true, .fn = who },
	{ .name = "Later" },
	{},
};

static const struct varlink_interface example = {
	.name = "org.example",
	.description = "interface org.example\n",
	.methods = example_methods,
};

suspends static bool permit(struct varlink_call *call)
{
	if (!fixture_of(call)->permitted)
		varlink_error(call, "org.example.Refused", NULL);
	return fixture_of(call)->permitted;
}

/* --- the client ------------------------------------------------------------------------------- */

static void connect_client(struct fixture *fixture, struct stream *client)
{
	int fds[2];

	ck_assert_int_eq(
		socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
	ck_assert_int_eq(stream_init(client, fds[0]), 0);
	varlink_serve(&fixture->service, fds[1]);
}

suspends static void send_bytes(struct fixture *fixture, const char *bytes, size_t len_bytes)
{
	struct iovec iov = { .iov_base = (char *)bytes, .iov_len = len_bytes };

	ck_assert_int_eq(stream_send(&fixture->client, &iov, 1, reactor_now_ns() + WAIT_NS), 0);
}

/* Several calls in a literal are separated by \0; the last NUL is the literal's own. */
#define SEND(fixture, literal) send_bytes(fixture, literal, sizeof(literal))

/* One message, NUL and all; false when the service hung up instead. */
suspends static bool receive(struct fixture *fixture, char *text, size_t max_bytes)
{
	for (size_t i = 0; i < max_bytes; i++) {
		ssize_t got = stream_recv(
			&fixture->client, text + i, 1, reactor_now_ns() + WAIT_NS);

		if (got == 0 || got == -ECONNRESET)
			return false;
		ck_assert_int_eq(got, 1);
		if (!text[i])
			return true;
	}
	ck_abort_msg("the reply has no end");
}

suspends static void expect(struct fixture *fixture, const char *reply)
{
	char text[4096];

	ck_assert_msg(receive(fixture, text, sizeof(text)), "hung up instead of %s", reply);
	ck_assert_str_eq(text, reply);
}

suspends static void expect_hang_up(struct fixture *fixture)
{
	char text[4096];

	if (receive(fixture, text, sizeof(text)))
		ck_abort_msg("instead of hanging up: %s", text);
}

/* Runs body on a fresh service and connection, and ends both. */
static void run(co_fn *body)
{
	static const struct varlink_interface *const interfaces[] = { &example, NULL };
	struct fixture fixture = {
		.service = { .vendor = "v",
			.product = "p",
			.version = "1",
			.url = "u",
			.interfaces = interfaces,
			.permit = permit },
	};
	struct reactor *reactor;
	struct err err;

	varlink_init(&fixture.service);
	co_queue_init(&fixture.gate);
	ck_assert_msg(!reactor_create(&reactor, "auto", &err), "%s", err.text);
	reactor_run_main(reactor, body, &fixture);
	ck_assert_uint_eq(fixture.service.connections.running, 0);
	reactor_free(reactor);
}

#define SERVICE_TEST(name)                                         \
	suspends static void name##_body(struct fixture *fixture); \
	suspends static void name##_main(void *arg)                \
	{                                                          \
		struct fixture *fixture = arg;                     \
		connect_client(fixture, &fixture->client);         \
		name##_body(fixture);                              \
		stream_fini(&fixture->client);                     \
		varlink_stop(&fixture->service);                   \
	}                                                          \
	START_TEST(name)                                           \
	{                                                          \
		run(name##_main);                                  \
	}                                                          \
	END_TEST                                                   \
	suspends static void name##_body(struct fixture *fixture)

#define ECHO_HI      "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"hi\"}}"
#define ECHO_HI_BACK "{\"parameters\":{\"text\":\"hi\",\"number\":-7,\"flag\":true,\"members\":0}}"
#define ECHO_WITH(members) \
	"{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"x\"," members "}}"
#define INVALID(name)                                          \
	"{\"error\":\"org.varlink.service.InvalidParameter\"," \
	"\"parameters\":{\"parameter\":\"" name "\"}}"

/* --- framing ---------------------------------------------------------------------------------- */

SERVICE_TEST(one_call_is_answered)
{
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
}

SERVICE_TEST(a_call_may_come_byte_by_byte)
{
	for (size_t i = 0; i < sizeof(ECHO_HI); i++) {
		send_bytes(fixture, ECHO_HI + i, 1);
		co_yield ();
	}
	expect(fixture, ECHO_HI_BACK);
}

SERVICE_TEST(calls_cut_anywhere_are_answered_in_order)
{
	static const char calls[] = ECHO_HI "\0" ECHO_WITH("\"number\":5") "\0" ECHO_HI;
	unsigned seed = test_seed();

	for (int round = 0; round < 200; round++) {
		for (size_t sent = 0; sent < sizeof(calls);) {
			size_t piece = 1 + (size_t)rand_r(&seed) % (sizeof(calls) - sent);

			send_bytes(fixture, calls + sent, piece);
			sent += piece;
			if (rand_r(&seed) % 2)
				co_sleep_ns(1);
		}
		expect(fixture, ECHO_HI_BACK);
		expect(fixture, "{\"parameters\":{\"text\":\"x\",\"number\":5,\"flag\":true,"
				"\"members\":0}}");
		expect(fixture, ECHO_HI_BACK);
	}
	ck_assert_uint_eq(fixture->calls, 600);
}

/* A call padded with blanks to len_bytes, its NUL included. */
suspends static void send_padded(struct fixture *fixture, size_t len_bytes)
{
	char *call = malloc(len_bytes);

	memset(call, ' ', len_bytes);
	memcpy(call, ECHO_HI, strlen(ECHO_HI));
	call[len_bytes - 1] = 0;
	send_bytes(fixture, call, len_bytes);
	free(call);
}

SERVICE_TEST(the_longest_call_is_answered)
{
	send_padded(fixture, VARLINK_CALL_MAX_BYTES);
	expect(fixture, ECHO_HI_BACK);
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
}

SERVICE_TEST(a_longer_call_ends_the_connection)
{
	send_padded(fixture, VARLINK_CALL_MAX_BYTES + 1);
	expect_hang_up(fixture);
	ck_assert_uint_eq(fixture->calls, 0);
}

/* --- what is no call -------------------------------------------------------------------------- */

static const struct {
	const char *bytes;
	size_t len_bytes;
} garbage[] = {
#define GARBAGE(literal)                 \
	{                                \
		literal, sizeof(literal) \
	}
	GARBAGE(""),
	GARBAGE("hello"),
	GARBAGE("\xff\xfe\x00\x01"),
	GARBAGE("[]"),
	GARBAGE("42"),
	GARBAGE("{}"),
	GARBAGE("{\"method\":7}"),
	GARBAGE("{\"method\":null}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"parameters\":[]}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"parameters\":\"x\"}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"more\":1}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"oneway\":\"yes\"}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"upgrade\":null}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"method\":\"org.example.Who\"}"),
	GARBAGE("{\"method\":\"org.example.Who\"} {}"),
	GARBAGE("{\"method\":\"org.example.\0Who\"}"), /* a NUL in the middle cuts it in two */
	GARBAGE("{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"\\u0000\"}}"),
	GARBAGE("{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"\xc3\x28\"}}"),
	GARBAGE("{\"method\":\"org.example.Count\",\"parameters\":{\"to\":99999999999999999999}}"),
#undef GARBAGE
};

suspends static void garbage_body(void *arg)
{
	struct fixture *fixture = arg;

	for (size_t i = 0; i < ARRAY_LEN(garbage); i++) {
		connect_client(fixture, &fixture->client);
		send_bytes(fixture, garbage[i].bytes, garbage[i].len_bytes);
		expect_hang_up(fixture);
		stream_fini(&fixture->client);
	}
	ck_assert_uint_eq(fixture->calls, 0);
	varlink_stop(&fixture->service);
}

START_TEST(what_is_no_call_ends_the_connection)
{
	run(garbage_body);
}
END_TEST

SERVICE_TEST(random_bytes_do_no_harm)
{
	unsigned seed = test_seed();
	char bytes[2048];

	stream_fini(&fixture->client);
	for (int round = 0; round < 200; round++) {
		connect_client(fixture, &fixture->client);
		for (size_t i = 0; i < sizeof(bytes); i++)
			bytes[i] = "{}[]\":,\\ntex01\0"[rand_r(&seed) % 15];
		bytes[sizeof(bytes) - 1] = 0;
		send_bytes(fixture, bytes, sizeof(bytes));
		expect_hang_up(fixture);
		stream_fini(&fixture->client);
	}
	connect_client(fixture, &fixture->client);
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
}

/* A call with an object that holds objects, so that the whole is depth deep. */
suspends static void send_nested(struct fixture *fixture, unsigned depth)
{
	static char call[4 * VARLINK_CALL_MAX_BYTES];
	unsigned inner = depth - 2; /* the call and its parameters are two */
	char *end = call + sprintf(call, "%s",
				   "{\"method\":\"org.example.Echo\",\"parameters\":"
				   "{\"text\":\"[[[[[[[[[[[[[[[[[[[[{{\",\"object\":");

	for (unsigned i = 0; i < inner; i++)
		end += sprintf(end, i + 1 < inner ? "{\"a\":" : "{");
	memset(end, '}', inner + 2);
	end[inner + 2] = 0;
	send_bytes(fixture, call, (size_t)(end - call) + inner + 3);
}

SERVICE_TEST(nesting_is_bounded)
{
	send_nested(fixture, VARLINK_DEPTH_MAX);
	expect(fixture, "{\"parameters\":{\"text\":\"[[[[[[[[[[[[[[[[[[[[{{\",\"number\":-7,"
			"\"flag\":true,\"members\":1}}");
	send_nested(fixture, VARLINK_DEPTH_MAX + 1);
	expect_hang_up(fixture);
}

SERVICE_TEST(very_deep_nesting_does_no_harm)
{
	send_nested(fixture, 9000);
	expect_hang_up(fixture);
}

/* --- names and parameters --------------------------------------------------------------------- */

static const struct {
	const char *call, *reply;
} checks[] = {
	{ "{\"method\":\"org.nowhere.Echo\"}",
		"{\"error\":\"org.varlink.service.InterfaceNotFound\","
		"\"parameters\":{\"interface\":\"org.nowhere\"}}" },
	{ "{\"method\":\"Echo\"}", "{\"error\":\"org.varlink.service.InterfaceNotFound\","
				   "\"parameters\":{\"interface\":\"Echo\"}}" },
	{ "{\"method\":\"org.example.echo\"}",
		"{\"error\":\"org.varlink.service.MethodNotFound\","
		"\"parameters\":{\"method\":\"org.example.echo\"}}" },
	{ "{\"method\":\"org.example.\"}", "{\"error\":\"org.varlink.service.MethodNotFound\","
					   "\"parameters\":{\"method\":\"org.example.\"}}" },
	{ "{\"method\":\"org.example.Later\"}",
		"{\"error\":\"org.varlink.service.MethodNotImplemented\","
		"\"parameters\":{\"method\":\"org.example.Later\"}}" },
	{ "{\"method\":\"org.example.Echo\"}", INVALID("text") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":null}", INVALID("text") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":7}}", INVALID("text") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":null}}", INVALID("text") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"bad\"}}", INVALID("text") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"\\\\\\\"[[[[[[[[[[[[[[[[[[[["
	  "\"}}",
		"{\"parameters\":{\"text\":\"\\\\\\\"[[[[[[[[[[[[[[[[[[[[\",\"number\":-7,"
		"\"flag\":true,\"members\":0}}" },
	{ ECHO_WITH("\"numbre\":1"), INVALID("numbre") },
	{ ECHO_WITH("\"number\":\"1\""), INVALID("number") },
	{ ECHO_WITH("\"number\":1.0"), INVALID("number") },
	{ ECHO_WITH("\"size\":-1"), INVALID("size") },
	{ ECHO_WITH("\"flag\":0"), INVALID("flag") },
	{ ECHO_WITH("\"object\":[]"), INVALID("object") },
	{ "{\"method\":\"org.example.Wait\",\"parameters\":{\"x\":1}}", INVALID("x") },
	{ "{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"hi\"},\"upgrade\":true}",
		INVALID("upgrade") },
	{ ECHO_WITH("\"number\":null,\"flag\":false,\"size\":0,\"object\":{\"a\":1,\"b\":[]}"),
		"{\"parameters\":{\"text\":\"x\",\"number\":-7,\"flag\":false,\"members\":2}}" },
	{ "{\"method\":\"org.example.Echo\",\"unknown\":1,\"upgrade\":false,"
	  "\"parameters\":{\"text\":\"hi\"}}",
		ECHO_HI_BACK },
};

SERVICE_TEST(names_and_parameters_are_checked)
{
	for (size_t i = 0; i < ARRAY_LEN(checks); i++) {
		send_bytes(fixture, checks[i].call, strlen(checks[i].call) + 1);
		expect(fixture, checks[i].reply);
	}
}

/* --- the service's own interface -------------------------------------------------------------- */

SERVICE_TEST(the_service_describes_itself)
{
	SEND(fixture, "{\"method\":\"org.varlink.service.GetInfo\"}");
	expect(fixture, "{\"parameters\":{\"vendor\":\"v\",\"product\":\"p\",\"version\":\"1\","
			"\"url\":\"u\",\"interfaces\":[\"org.varlink.service\",\"org.example\"]}}");
	SEND(fixture, "{\"method\":\"org.varlink.service.GetInterfaceDescription\","
		      "\"parameters\":{\"interface\":\"org.example\"}}");
	expect(fixture, "{\"parameters\":{\"description\":\"interface org.example\\n\"}}");
	SEND(fixture, "{\"method\":\"org.varlink.service.GetInterfaceDescription\","
		      "\"parameters\":{\"interface\":\"org.exampl\"}}");
	expect(fixture, "{\"error\":\"org.varlink.service.InterfaceNotFound\","
			"\"parameters\":{\"interface\":\"org.exampl\"}}");
	SEND(fixture, "{\"method\":\"org.varlink.service.GetInterfaceDescription\"}");
	expect(fixture, INVALID("interface"));
}

/* --- who calls -------------------------------------------------------------------------------- */

SERVICE_TEST(the_peer_is_known)
{
	char text[256];

	snprintf(text, sizeof(text),
		"{\"parameters\":{\"uid\":%u,\"pid\":%d,\"own_group\":true,\"other_group\":false}}",
		getuid(), getpid());
	SEND(fixture, "{\"method\":\"org.example.Who\"}");
	expect(fixture, text);
}

SERVICE_TEST(authority_is_asked_for)
{
	char text[256];

	SEND(fixture, "{\"method\":\"org.example.Change\"}");
	expect(fixture, "{\"error\":\"org.example.Refused\",\"parameters\":{}}");
	fixture->permitted = true;
	SEND(fixture, "{\"method\":\"org.example.Change\"}");
	ck_assert(receive(fixture, text, sizeof(text)));
	ck_assert(strstr(text, "uid"));
}

/* --- oneway and more -------------------------------------------------------------------------- */

SERVICE_TEST(oneway_calls_are_carried_out_and_not_answered)
{
	SEND(fixture,
		"{\"method\":\"org.example.Echo\",\"parameters\":{\"text\":\"a\"},\"oneway\":true}"
		"\0{\"method\":\"org.example.Nothing\",\"oneway\":true}"
		"\0{\"method\":\"org.example.Count\",\"parameters\":{\"to\":3},\"oneway\":true,"
		"\"more\":true}\0" ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
	ck_assert_uint_eq(fixture->calls, 2);
}

SERVICE_TEST(progress_comes_only_when_asked_for)
{
	SEND(fixture, "{\"method\":\"org.example.Count\",\"parameters\":{\"to\":3}}");
	expect(fixture, "{\"parameters\":{\"at\":3}}");
	SEND(fixture, "{\"method\":\"org.example.Count\",\"parameters\":{\"to\":3},\"more\":true}");
	expect(fixture, "{\"parameters\":{\"at\":1},\"continues\":true}");
	expect(fixture, "{\"parameters\":{\"at\":2},\"continues\":true}");
	expect(fixture, "{\"parameters\":{\"at\":3}}");
}

/* --- peers that go, dawdle or crowd ----------------------------------------------------------- */

SERVICE_TEST(a_peer_may_go_while_its_call_is_carried_out)
{
	SEND(fixture, "{\"method\":\"org.example.Wait\"}");
	while (!fixture->waiting)
		co_yield ();
	stream_fini(&fixture->client);
	connect_client(fixture, &fixture->client);
	co_queue_wake_all(&fixture->gate);
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
	ck_assert_uint_eq(fixture->waiting, 0);
}

SERVICE_TEST(progress_tells_that_the_peer_is_gone)
{
	struct varlink_service *service = &fixture->service;

	SEND(fixture, "{\"method\":\"org.example.Count\",\"parameters\":{\"to\":100000000},"
		      "\"more\":true}");
	expect(fixture, "{\"parameters\":{\"at\":1},\"continues\":true}");
	stream_fini(&fixture->client);
	while (service->connections.running)
		co_sleep_ns(NS_PER_MS);
	ck_assert_int_ne(fixture->progress_error, 0);
	connect_client(fixture, &fixture->client);
}

SERVICE_TEST(who_takes_no_replies_is_dropped)
{
	fixture->service.patience_ns = PATIENCE_NS;
	SEND(fixture, "{\"method\":\"org.example.Count\",\"parameters\":{\"to\":100000000},"
		      "\"more\":true}");
	while (fixture->service.connections.running)
		co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(fixture->progress_error, -ETIMEDOUT);
}

SERVICE_TEST(who_does_not_finish_a_call_is_dropped)
{
	fixture->service.patience_ns = PATIENCE_NS;
	send_bytes(fixture, ECHO_HI, 10);
	expect_hang_up(fixture);
}

SERVICE_TEST(who_trickles_a_call_is_dropped)
{
	struct varlink_service *service = &fixture->service;

	service->patience_ns = 200 * NS_PER_MS;
	while (service->connections.running) {
		char brace = '{';
		struct iovec iov = { .iov_base = &brace, .iov_len = 1 };

		stream_send_some(&fixture->client, &iov, 1);
		co_sleep_ns(5 * NS_PER_MS);
	}
}

SERVICE_TEST(a_silent_peer_is_not_dropped)
{
	fixture->service.patience_ns = PATIENCE_NS;
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
	co_sleep_ns(3 * PATIENCE_NS);
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
}

SERVICE_TEST(the_most_silent_peer_makes_room)
{
	static struct stream others[VARLINK_CONNECTIONS];

	for (int i = 0; i < VARLINK_CONNECTIONS; i++) {
		connect_client(fixture, &others[i]);
		co_yield ();
		if (i == 0) /* now others[0] is the one that was silent for longest */
			SEND(fixture, ECHO_HI), expect(fixture, ECHO_HI_BACK);
	}
	ck_assert_uint_eq(fixture->service.connections.running, VARLINK_CONNECTIONS);
	char byte;
	ck_assert_int_eq(stream_recv(&others[0], &byte, 1, reactor_now_ns() + WAIT_NS), 0);
	SEND(fixture, ECHO_HI);
	expect(fixture, ECHO_HI_BACK);
	for (int i = 0; i < VARLINK_CONNECTIONS; i++)
		stream_fini(&others[i]);
}

SERVICE_TEST(a_newcomer_is_refused_when_all_are_busy)
{
	static struct stream others[VARLINK_CONNECTIONS];
	static char wait[] = "{\"method\":\"org.example.Wait\"}";

	for (int i = 0; i < VARLINK_CONNECTIONS; i++) {
		struct iovec iov = { .iov_base = wait, .iov_len = sizeof(wait) };

		if (i)
			connect_client(fixture, &others[i]);
		struct stream *client = i ? &others[i] : &fixture->client;
		ck_assert_int_eq(stream_send(client, &iov, 1, NO_DEADLINE), 0);
	}
	while (fixture->waiting < VARLINK_CONNECTIONS)
		co_yield ();
	connect_client(fixture, &others[0]);
	char byte;
	ck_assert_int_eq(stream_recv(&others[0], &byte, 1, reactor_now_ns() + WAIT_NS), 0);
	co_queue_wake_all(&fixture->gate);
	expect(fixture, "{\"parameters\":{}}");
	for (int i = 0; i < VARLINK_CONNECTIONS; i++)
		stream_fini(&others[i]);
}

SERVICE_TEST(a_flood_of_calls_starves_nobody)
{
	enum { CALLS = 100 };
	static char flood[CALLS][sizeof(ECHO_HI)];
	struct stream other;
	char byte;

	for (int i = 0; i < CALLS; i++)
		memcpy(flood[i], ECHO_HI, sizeof(ECHO_HI));
	connect_client(fixture, &other);
	send_bytes(fixture, flood[0], sizeof(flood));
	struct iovec iov = { .iov_base = flood[0], .iov_len = sizeof(flood[0]) };
	ck_assert_int_eq(stream_send(&other, &iov, 1, reactor_now_ns() + WAIT_NS), 0);
	ck_assert_int_eq(stream_recv(&other, &byte, 1, reactor_now_ns() + WAIT_NS), 1);
	ck_assert_uint_lt(fixture->calls, CALLS);
	for (int i = 0; i < CALLS; i++)
		expect(fixture, ECHO_HI_BACK);
	stream_fini(&other);
}

suspends static void open_gate(void *arg)
{
	struct fixture *fixture = arg;

	co_sleep_ns(NS_PER_MS);
	co_queue_wake_all(&fixture->gate);
}

SERVICE_TEST(stopping_lets_calls_be_answered)
{
	struct stream silent;

	connect_client(fixture, &silent);
	SEND(fixture, "{\"method\":\"org.example.Wait\"}\0" ECHO_HI);
	while (!fixture->waiting)
		co_yield ();
	co_start(open_gate, fixture);
	varlink_stop(&fixture->service);
	expect(fixture, "{\"parameters\":{}}");
	expect(fixture, ECHO_HI_BACK); /* it was there already */
	expect_hang_up(fixture);
	stream_fini(&silent);
}

int main(void)
{
	Suite *suite = suite_create("varlink");
	TCase *tcase = tcase_create("varlink");

	tcase_set_timeout(tcase, TEST_TIMEOUT_S);
	tcase_add_test(tcase, one_call_is_answered);
	tcase_add_test(tcase, a_call_may_come_byte_by_byte);
	tcase_add_test(tcase, calls_cut_anywhere_are_answered_in_order);
	tcase_add_test(tcase, the_longest_call_is_answered);
	tcase_add_test(tcase, a_longer_call_ends_the_connection);
	tcase_add_test(tcase, what_is_no_call_ends_the_connection);
	tcase_add_test(tcase, random_bytes_do_no_harm);
	tcase_add_test(tcase, nesting_is_bounded);
	tcase_add_test(tcase, very_deep_nesting_does_no_harm);
	tcase_add_test(tcase, names_and_parameters_are_checked);
	tcase_add_test(tcase, the_service_describes_itself);
	tcase_add_test(tcase, the_peer_is_known);
	tcase_add_test(tcase, authority_is_asked_for);
	tcase_add_test(tcase, oneway_calls_are_carried_out_and_not_answered);
	tcase_add_test(tcase, progress_comes_only_when_asked_for);
	tcase_add_test(tcase, a_peer_may_go_while_its_call_is_carried_out);
	tcase_add_test(tcase, progress_tells_that_the_peer_is_gone);
	tcase_add_test(tcase, who_takes_no_replies_is_dropped);
	tcase_add_test(tcase, who_does_not_finish_a_call_is_dropped);
	tcase_add_test(tcase, who_trickles_a_call_is_dropped);
	tcase_add_test(tcase, a_silent_peer_is_not_dropped);
	tcase_add_test(tcase, the_most_silent_peer_makes_room);
	tcase_add_test(tcase, a_newcomer_is_refused_when_all_are_busy);
	tcase_add_test(tcase, a_flood_of_calls_starves_nobody);
	tcase_add_test(tcase, stopping_lets_calls_be_answered);
	suite_add_tcase(suite, tcase);

	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed != 0;
}
