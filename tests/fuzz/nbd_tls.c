/*
 * Fuzzes the NBD server through TLS: an input is what one client sends; see nbd_session.h for its first byte.
 *
 * In the handshake phase the client asks for TLS in the clear. MODE_STRUCTURED: it does the handshake of TLS as it
 * should, and the input is what it says inside. Without: the input is what comes instead, or as records that are
 * none. MODE_EXTENDED: TLS 1.2, else 1.3. Without the handshake phase there is no TLS: nothing is done.
 *
 * The client is a thread of its own with a blocking socket, as GnuTLS likes it. The same inputs are replayed by
 * tests/unit/test_nbd_corpus.c.
 */
#include "nbd_session.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gnutls/gnutls.h>

#include "rt/tls.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define KEY     "00112233445566778899aabbccddeeff"
#define TLS_1_2 "NORMAL:-VERS-ALL:+VERS-TLS1.2:+ECDHE-PSK"
#define TLS_1_3 "NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK"

static bool receive_exactly(int fd, void *buf, size_t len_bytes)
{
	return recv(fd, buf, len_bytes, MSG_WAITALL) == (ssize_t)len_bytes;
}

/* Greeting, flags, NBD_OPT_STARTTLS and its answer. */
static bool ask_for_tls(int fd)
{
	static const char question[] = "\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0";
	char greeting[18], answer[20];

	return receive_exactly(fd, greeting, sizeof(greeting)) &&
	       send(fd, question, sizeof(question), MSG_NOSIGNAL) == sizeof(question) &&
	       receive_exactly(fd, answer, sizeof(answer));
}

static void drain(int fd)
{
	char bytes[4096];

	shutdown(fd, SHUT_WR);
	while (recv(fd, bytes, sizeof(bytes), 0) > 0)
		;
}

static void send_outside(const struct session *session)
{
	size_t piece_bytes = session_piece_bytes(session);

	for (size_t pos = 0; pos < session->size; pos += piece_bytes)
		if (send(session->client_fd, session->data + pos,
			    MIN(piece_bytes, session->size - pos), MSG_NOSIGNAL) < 0)
			return;
}

/* Whatever replies are there are read between two pieces, so that neither end waits for the other for ever. */
static bool read_replies(gnutls_session_t tls, int fd, bool to_the_end)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };
	static char bytes[65536];

	while (gnutls_record_check_pending(tls) || poll(&pollfd, 1, to_the_end ? -1 : 0) == 1) {
		ssize_t count = gnutls_record_recv(tls, bytes, sizeof(bytes));

		if (count == 0 || (count < 0 && gnutls_error_is_fatal((int)count)))
			return false;
	}
	return true;
}

static void send_inside(const struct session *session, gnutls_session_t tls)
{
	size_t piece_bytes = MIN(session_piece_bytes(session), (size_t)16384);
	bool open = true;

	for (size_t pos = 0; pos < session->size && open; pos += piece_bytes) {
		open = gnutls_record_send(tls, session->data + pos,
			       MIN(piece_bytes, session->size - pos)) >= 0 &&
		       read_replies(tls, session->client_fd, false);
	}
	if (open && !gnutls_bye(tls, GNUTLS_SHUT_WR))
		read_replies(tls, session->client_fd, true);
}

static void speak_tls(const struct session *session)
{
	static const gnutls_datum_t key = { (unsigned char *)KEY, sizeof(KEY) - 1 };
	gnutls_psk_client_credentials_t credentials;
	gnutls_session_t tls;
	int ret;

	if (gnutls_psk_allocate_client_credentials(&credentials) ||
		gnutls_psk_set_client_credentials(credentials, "alice", &key, GNUTLS_PSK_KEY_HEX) ||
		gnutls_init(&tls, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL) ||
		gnutls_priority_set_direct(
			tls, session->mode & MODE_EXTENDED ? TLS_1_2 : TLS_1_3, NULL) ||
		gnutls_credentials_set(tls, GNUTLS_CRD_PSK, credentials))
		abort();
	gnutls_transport_set_int(tls, session->client_fd);
	do {
		ret = gnutls_handshake(tls);
	} while (ret && !gnutls_error_is_fatal(ret));
	if (!ret)
		send_inside(session, tls);
	gnutls_deinit(tls);
	gnutls_psk_free_client_credentials(credentials);
}

struct tls_client {
	const struct session *session;
	struct reactor *reactor;
	struct co *waiter;
	struct task done;
};

static void *client_thread(void *arg)
{
	struct tls_client *client = arg;
	const struct session *session = client->session;

	if (!ask_for_tls(session->client_fd))
		abort();
	if (session->mode & MODE_STRUCTURED)
		speak_tls(session);
	else
		send_outside(session);
	drain(session->client_fd);
	close(session->client_fd);
	reactor_post(client->reactor, &client->done);
	return NULL;
}

static void client_done(struct task *task)
{
	co_wake(container_of(task, struct tls_client, done)->waiter);
}

static suspends void tls_client(void *arg)
{
	struct tls_client client = {
		.session = arg, .reactor = reactor_self(), .waiter = co_self()
	};
	pthread_t thread;

	task_init(&client.done, client_done);
	if (pthread_create(&thread, NULL, client_thread, &client))
		abort();
	co_suspend();
	pthread_join(thread, NULL);
}

static struct tls_server *make_server(void)
{
	char path[] = "/tmp/blkstack-fuzz-keys.XXXXXX";
	struct tls_options options = { .psk = path };
	static const char keys[] = "alice:" KEY "\n";
	struct tls_server *server;
	struct err err;
	int fd = mkstemp(path);

	if (fd < 0 || write(fd, keys, strlen(keys)) < 0 || close(fd))
		abort();
	if (tls_server_create(&server, &options, &err)) {
		fprintf(stderr, "%s\n", err.text);
		abort();
	}
	return server; /* which reads the file at each handshake: it stays */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct reactor *reactor;
	static struct tls_server *server;
	struct err err;

	if (!size || !(data[0] & MODE_HANDSHAKE))
		return 0;
	if (!reactor && reactor_create(&reactor, "threads", &err))
		abort();
	if (!server)
		server = make_server();
	struct session session = { .mode = data[0],
		.data = data + 1,
		.size = size - 1,
		.tls_server = server,
		.client = tls_client };
	reactor_run_main(reactor, session_run, &session);
	return 0;
}
