/*
 * Fuzzes the NBD server: an input is what one client sends; see nbd_session.h for its first byte.
 *
 * The client closes its end at the end of its input, while it goes on reading until the server closes too. The
 * server must come to an end by itself; that it does not crash or leak is for the sanitizers to say.
 *
 * The same inputs are replayed by tests/unit/test_nbd_corpus.c.
 */
#include "nbd_session.h"

#include "rt/stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct plain_client {
	struct session *session;
	struct stream stream;
};

static suspends void send_input(void *arg)
{
	struct plain_client *client = arg;
	const struct session *session = client->session;
	size_t piece_bytes = session_piece_bytes(session);
	int ret = 0;

	for (size_t pos = 0; pos < session->size && !ret; pos += piece_bytes) {
		struct iovec iov = { (void *)(session->data + pos),
			MIN(piece_bytes, session->size - pos) };

		ret = stream_send(&client->stream, &iov, 1, NO_DEADLINE);
		co_yield ();
	}
	shutdown(client->stream.fd, SHUT_WR);
}

static suspends void read_replies(void *arg)
{
	struct plain_client *client = arg;
	CLEANUP(free) uint8_t *replies = malloc(65536);

	while (stream_recv(&client->stream, replies, 65536, NO_DEADLINE) > 0)
		;
}

static suspends void plain_client(void *arg)
{
	struct session *session = arg;
	struct plain_client client = { .session = session };
	struct co_group both;

	if (stream_init(&client.stream, session->client_fd))
		abort();
	co_group_init(&both);
	co_group_start(&both, read_replies, &client);
	co_group_start(&both, send_input, &client);
	co_group_wait(&both);
	stream_fini(&client.stream);
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
		.mode = data[0], .data = data + 1, .size = size - 1, .client = plain_client
	};
	reactor_run_main(reactor, session_run, &session);
	return 0;
}
