/*
 * TLS on streams, with a client that is GnuTLS itself, on a thread and a blocking socket: content in both
 * directions, a session that moves on, and clients that are wrong, slow or rude.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gnutls/gnutls.h>

#include "base/util.h"
#include "rt/tls.h"
#include "tests/unit/testing.h"

#define TRANSFER_BYTES (3U << 20)
#define KEY            "00112233445566778899aabbccddeeff"
#define OTHER_KEY      "00112233445566778899aabbccddee00"
#define TLS_1_2        "NORMAL:-VERS-ALL:+VERS-TLS1.2:+ECDHE-PSK"
#define TLS_1_3        "NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK:+DHE-PSK"

static const char *const priorities[] = { TLS_1_2, TLS_1_3 };

/* --- a client --------------------------------------------------------------------------------- */

struct client {
	int fd;
	const char *priority, *key;
	size_t record_bytes;                /* as small as that, 0: any */
	void (*act)(struct client *client); /* after the handshake */
	gnutls_session_t session;
	int handshake; /* how it ended */
	unsigned seed; /* for the client's thread alone */
	pthread_t thread;
};

static void *client_run(void *arg)
{
	struct client *client = arg;
	gnutls_psk_client_credentials_t credentials;
	gnutls_datum_t key = { (unsigned char *)client->key, (unsigned)strlen(client->key) };

	require(!gnutls_psk_allocate_client_credentials(&credentials));
	require(!gnutls_psk_set_client_credentials(credentials, "alice", &key, GNUTLS_PSK_KEY_HEX));
	require(!gnutls_init(&client->session, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL));
	require(!gnutls_priority_set_direct(client->session, client->priority, NULL));
	require(!gnutls_credentials_set(client->session, GNUTLS_CRD_PSK, credentials));
	if (client->record_bytes)
		require(!gnutls_record_set_max_recv_size(client->session, client->record_bytes));
	gnutls_transport_set_int(client->session, client->fd);
	do {
		client->handshake = gnutls_handshake(client->session);
	} while (client->handshake && !gnutls_error_is_fatal(client->handshake));
	if (!client->handshake && client->act)
		client->act(client);
	gnutls_deinit(client->session);
	gnutls_psk_free_client_credentials(credentials);
	close(client->fd);
	return NULL;
}

/* A stream with a client that begins its handshake at the other end. */
static void client_start(struct client *client, struct stream *stream)
{
	int fds[2];

	ck_assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
	client->fd = fds[1];
	client->key = client->key ? client->key : KEY;
	client->priority = client->priority ? client->priority : TLS_1_3;
	client->seed = test_random(1U << 30);
	ck_assert(!stream_init(stream, fds[0]));
	ck_assert(!pthread_create(&client->thread, NULL, client_run, client));
}

static struct tls_server *server_create(void)
{
	struct tls_options options = { .psk = "keys" };
	struct tls_server *server;
	struct err err;
	FILE *file = fopen("keys", "w");

	fputs("bob:" OTHER_KEY "\nalice:" KEY "\n", file);
	fclose(file);
	chmod("keys", 0600);
	ck_assert_msg(!tls_server_create(&server, &options, &err), "%s", err.text);
	return server;
}

static uint64_t soon_ns(void)
{
	return reactor_now_ns() + TEST_TIMEOUT_S / 2 * NS_PER_SEC;
}

static suspends void accept_session(struct stream *stream, struct tls_server *server)
{
	struct tls *session;
	struct err err;

	if (tls_accept(stream, server, soon_ns(), &session, &err))
		ck_abort_msg("%s", err.text);
	stream_set_tls(stream, session);
}

static void client_end(struct client *client, struct stream *stream)
{
	stream_fini(stream);
	pthread_join(client->thread, NULL);
}

/* --- content ---------------------------------------------------------------------------------- */

static unsigned char byte_at(size_t place)
{
	return (unsigned char)((place * 2654435761U) >> 13);
}

static void send_all(struct client *client)
{
	unsigned char *bytes = malloc(TRANSFER_BYTES);

	for (size_t i = 0; i < TRANSFER_BYTES; i++)
		bytes[i] = byte_at(i);
	for (size_t done = 0; done < TRANSFER_BYTES;) {
		size_t wanted = 1 + (size_t)rand_r(&client->seed) % 60000;
		ssize_t count = gnutls_record_send(
			client->session, bytes + done, MIN(wanted, TRANSFER_BYTES - done));

		require(count > 0);
		done += (size_t)count;
	}
	free(bytes);
}

static void receive_all(struct client *client)
{
	unsigned char bytes[20000];

	for (size_t done = 0; done < TRANSFER_BYTES;) {
		ssize_t count = gnutls_record_recv(client->session, bytes, sizeof(bytes));

		require(count > 0);
		for (ssize_t i = 0; i < count; i++)
			require(bytes[i] == byte_at(done++));
	}
}

static void send_and_receive(struct client *client)
{
	send_all(client);
	receive_all(client);
	require(!gnutls_bye(client->session, GNUTLS_SHUT_WR));
	/* The server's goodbye, and no byte before it. */
	char byte;
	require(gnutls_record_recv(client->session, &byte, 1) == 0);
}

static suspends void receive_pieces(struct stream *stream)
{
	unsigned char *bytes = malloc(300000);

	for (size_t done = 0; done < TRANSFER_BYTES;) {
		size_t wanted = MIN(1 + (size_t)test_random(300000), TRANSFER_BYTES - done);
		ssize_t count = stream_recv(stream, bytes, wanted, soon_ns());

		require(count > 0 && (size_t)count <= wanted);
		for (ssize_t i = 0; i < count; i++)
			require(bytes[i] == byte_at(done++));
	}
	free(bytes);
}

static suspends void send_pieces(struct stream *stream)
{
	unsigned char *bytes = malloc(TRANSFER_BYTES);
	size_t done = 0;

	for (size_t i = 0; i < TRANSFER_BYTES; i++)
		bytes[i] = byte_at(i);
	while (done < TRANSFER_BYTES) {
		struct iovec iov[6];

		for (int i = 0; i < 6; i++) {
			size_t len = test_random(test_random(3) ? 300 : 200000);
			iov[i] = (struct iovec){ bytes + done, MIN(len, TRANSFER_BYTES - done) };
			done += iov[i].iov_len;
		}
		require(!stream_send(stream, iov, 6, soon_ns()));
	}
	free(bytes);
}

static suspends void exchange(void *arg)
{
	struct client client = { .priority = priorities[(intptr_t)arg % 2],
		.record_bytes = (intptr_t)arg / 2 ? 512 : 0,
		.act = send_and_receive };
	struct tls_server *server = server_create();
	struct stream stream, moved;
	char byte;

	client_start(&client, &stream);
	accept_session(&stream, server);
	ck_assert_ptr_nonnull(strstr(tls_text(stream.tls), "PSK alice"));
	/* On to another stream, with what was received before. */
	char first;
	ck_assert_int_eq(stream_recv(&stream, &first, 1, soon_ns()), 1);
	ck_assert_int_eq((unsigned char)first, byte_at(0));
	struct tls *session = stream_take_tls(&stream);
	ck_assert(!stream_init(&moved, stream_release(&stream)));
	stream_set_tls(&moved, session);

	unsigned char *rest = malloc(TRANSFER_BYTES);
	ck_assert(!stream_recv_exact(&moved, rest, TRANSFER_BYTES - 1, soon_ns()));
	for (size_t i = 1; i < TRANSFER_BYTES; i++)
		require(rest[i - 1] == byte_at(i));
	free(rest);
	send_pieces(&moved);
	ck_assert_int_eq(stream_recv(&moved, &byte, 1, soon_ns()), 0);
	client_end(&client, &moved);
	ck_assert_int_eq(client.handshake, 0);
	tls_server_free(server);
}

START_TEST(what_is_sent_arrives_in_both_directions)
{
	test_seed();
	test_run_co(exchange, (void *)(intptr_t)_i);
}
END_TEST

static suspends void receive_in_pieces(void *arg)
{
	struct client client = { .priority = priorities[(intptr_t)arg], .act = send_all };
	struct tls_server *server = server_create();
	struct stream stream;

	client_start(&client, &stream);
	accept_session(&stream, server);
	receive_pieces(&stream);
	client_end(&client, &stream);
	tls_server_free(server);
}

START_TEST(receives_of_any_size_find_every_byte)
{
	test_seed();
	test_run_co(receive_in_pieces, (void *)(intptr_t)_i);
}
END_TEST

/* A client that reads nothing: what the server may send is bounded, and cancelling ends its wait. */
static void read_nothing(struct client *client)
{
	struct pollfd end = { .fd = client->fd, .events = POLLRDHUP };

	require(poll(&end, 1, -1) == 1);
}

struct stuck {
	struct stream *stream;
	int ret;
	struct co_group group;
};

static suspends void send_without_end(void *arg)
{
	struct stuck *stuck = arg;
	static char bytes[1 << 20];

	do {
		struct iovec iov = { bytes, sizeof(bytes) };
		stuck->ret = stream_send(stuck->stream, &iov, 1, NO_DEADLINE);
	} while (!stuck->ret);
}

static suspends void cancel_a_send(void *arg)
{
	struct client client = { .act = read_nothing };
	struct tls_server *server = server_create();
	struct stream stream;
	struct stuck stuck = { .stream = &stream };

	client_start(&client, &stream);
	accept_session(&stream, server);
	co_group_init(&stuck.group);
	co_group_start(&stuck.group, send_without_end, &stuck);
	while (stream.writable)
		co_sleep_ns(NS_PER_MS);
	stream_cancel(&stream);
	co_group_wait(&stuck.group);
	ck_assert_int_eq(stuck.ret, -ECANCELED);
	shutdown(stream.fd, SHUT_RDWR);
	client_end(&client, &stream);
	tls_server_free(server);
}

START_TEST(cancelling_ends_a_send_that_waits)
{
	test_run_co(cancel_a_send, NULL);
}
END_TEST

/* --- clients that are wrong ------------------------------------------------------------------- */

static suspends void refuse(void *arg)
{
	struct client client = { .priority = priorities[(intptr_t)arg], .key = OTHER_KEY };
	struct tls_server *server = server_create();
	struct stream stream;
	struct tls *session;
	struct err err;

	client_start(&client, &stream);
	ck_assert_int_eq(tls_accept(&stream, server, soon_ns(), &session, &err), -EPROTO);
	ck_assert_ptr_null(session);
	client_end(&client, &stream);
	ck_assert_int_ne(client.handshake, 0);
	tls_server_free(server);
}

START_TEST(a_wrong_key_is_refused)
{
	test_run_co(refuse, (void *)(intptr_t)_i);
}
END_TEST

struct crude {
	const char *bytes;
	size_t len;
	bool hangs_up;
	int ret;
};

/* The first is garbage, then what looks like TLS and is not, then the beginnings of a true hello. */
static const struct crude crude_clients[] = {
	{ "GET / HTTP/1.0\r\n\r\n", 18, false, -EPROTO },
	{ "\x16\x03\x01\xff\xff\x01", 6, false, -EPROTO },
	{ "\x16\x03\x01\x00\x06\x01\x00\x00\x02\x03\x03", 11, false, -EPROTO },
	{ "\x16\x03\x01\x00\xf0\x01\x00\x00\xec\x03\x03", 11, false, -ETIMEDOUT },
	{ "\x16\x03\x01\x00\xf0\x01\x00\x00\xec\x03\x03", 11, true, -ECONNRESET },
	{ "", 0, false, -ETIMEDOUT },
	{ "", 0, true, -ECONNRESET },
};

static suspends void meet_crude_client(void *arg)
{
	const struct crude *crude = arg;
	struct tls_server *server = server_create();
	struct stream stream;
	struct tls *session;
	struct err err;
	int fds[2];

	ck_assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
	ck_assert(!stream_init(&stream, fds[0]));
	ck_assert_int_eq(write(fds[1], crude->bytes, crude->len), (ssize_t)crude->len);
	if (crude->hangs_up)
		close(fds[1]);
	uint64_t deadline_ns = crude->ret == -ETIMEDOUT ? reactor_now_ns() + 50 * NS_PER_MS
							: soon_ns();
	ck_assert_int_eq(tls_accept(&stream, server, deadline_ns, &session, &err), crude->ret);
	ck_assert_ptr_null(session);
	stream_fini(&stream);
	if (!crude->hangs_up)
		close(fds[1]);
	tls_server_free(server);
}

START_TEST(who_speaks_no_tls_or_stops_is_left)
{
	test_run_co(meet_crude_client, (void *)&crude_clients[_i]);
}
END_TEST

static void renegotiate(struct client *client)
{
	ck_assert_int_eq(gnutls_record_send(client->session, "a", 1), 1);
	require(gnutls_handshake(client->session) < 0);
}

/* TCP has an end, TLS has a goodbye: without it, data may have been cut off. */
static void leave_without_goodbye(struct client *client)
{
	ck_assert_int_eq(gnutls_record_send(client->session, "a", 1), 1);
}

static void leave_within_a_record(struct client *client)
{
	leave_without_goodbye(client);
	ck_assert_int_eq(write(client->fd, "\x17\x03\x03\x40\x00half", 9), 9);
}

static void send_a_forged_record(struct client *client)
{
	leave_without_goodbye(client);
	char forged[5 + 64] = "\x17\x03\x03\x00\x40";
	ck_assert_int_eq(write(client->fd, forged, sizeof(forged)), sizeof(forged));
	/* The server ends it; an alert may come before. */
	while (recv(client->fd, forged, sizeof(forged), 0) > 0)
		;
}

static void send_new_keys_for_ever(struct client *client)
{
	leave_without_goodbye(client);
	while (!gnutls_session_key_update(client->session, 0))
		;
}

static const struct rude {
	void (*act)(struct client *client);
	const char *priority;
	int ret;
} rude_clients[] = {
	{ renegotiate, TLS_1_2, -EPROTO },
	{ leave_without_goodbye, TLS_1_2, -ECONNRESET },
	{ leave_without_goodbye, TLS_1_3, -ECONNRESET },
	{ leave_within_a_record, TLS_1_3, -EPROTO },
	{ send_a_forged_record, TLS_1_2, -EPROTO },
	{ send_a_forged_record, TLS_1_3, -EPROTO },
	{ send_new_keys_for_ever, TLS_1_3, -EPROTO },
};

static suspends void meet_rude_client(void *arg)
{
	const struct rude *rude = arg;
	struct client client = { .act = rude->act, .priority = rude->priority };
	struct tls_server *server = server_create();
	struct stream stream;
	char byte;

	client_start(&client, &stream);
	accept_session(&stream, server);
	ck_assert_int_eq(stream_recv(&stream, &byte, 1, soon_ns()), 1);
	ck_assert_int_eq(byte, 'a');
	ck_assert_int_eq(stream_recv(&stream, &byte, 1, soon_ns()), rude->ret);
	ck_assert_int_eq(stream_recv(&stream, &byte, 1, soon_ns()), rude->ret);
	client_end(&client, &stream);
	tls_server_free(server);
}

START_TEST(what_came_before_a_rude_end_is_received)
{
	test_run_co(meet_rude_client, (void *)&rude_clients[_i]);
}
END_TEST

/* --- files ------------------------------------------------------------------------------------ */

static const struct key_file {
	const char *text;
	mode_t mode;
	const char *expected; /* in the error */
} key_files[] = {
	{ "alice:" KEY "\n", 0644, "open to everybody" },
	{ "alice\n", 0600, "keys:1: expected user:key" },
	{ ":" KEY "\n", 0600, "keys:1: expected user:key" },
	{ "# keys\n\nalice:" KEY "x\n", 0600, "keys:3: the key is not" },
	{ "alice:" KEY "0\n", 0600, "keys:1: the key is not" },
	{ "alice:0011\n", 0600, "less than 128 bits" },
};

START_TEST(a_wrong_file_of_keys_is_told_with_its_line)
{
	const struct key_file *keys = &key_files[_i];
	struct tls_options options = { .psk = "keys" };
	struct tls_server *server;
	struct err err;
	FILE *file = fopen("keys", "w");

	fputs(keys->text, file);
	fclose(file);
	chmod("keys", keys->mode);
	ck_assert_int_lt(tls_server_create(&server, &options, &err), 0);
	ck_assert_ptr_null(server);
	ck_assert_msg(strstr(err.text, keys->expected), "%s", err.text);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_loop_test(tcase, what_is_sent_arrives_in_both_directions, 0, 4);
	tcase_add_loop_test(tcase, receives_of_any_size_find_every_byte, 0, 2);
	tcase_add_test(tcase, cancelling_ends_a_send_that_waits);
	tcase_add_loop_test(tcase, a_wrong_key_is_refused, 0, 2);
	tcase_add_loop_test(tcase, who_speaks_no_tls_or_stops_is_left, 0, ARRAY_LEN(crude_clients));
	tcase_add_loop_test(
		tcase, what_came_before_a_rude_end_is_received, 0, ARRAY_LEN(rude_clients));
	tcase_add_loop_test(
		tcase, a_wrong_file_of_keys_is_told_with_its_line, 0, ARRAY_LEN(key_files));
}

int main(void)
{
	return test_run_suite("tls", fill);
}
