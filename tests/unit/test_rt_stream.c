/*
 * Streams over unix and TCP socket pairs: content, ends, deadlines, cancelling, moving, fairness.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/stream.h"
#include "tests/unit/testing.h"

#define TRANSFER_BYTES (2 * 1024 * 1024)

static void tcp_pair(int fds[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len_bytes = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ck_assert(!bind(listener, (struct sockaddr *)&address, len_bytes));
	ck_assert(!listen(listener, 1));
	ck_assert(!getsockname(listener, (struct sockaddr *)&address, &len_bytes));
	ck_assert(!connect(fds[0], (struct sockaddr *)&address, len_bytes));
	fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	ck_assert_int_ge(fds[1], 0);
	close(listener);
}

enum family { UNIX, TCP, FAMILIES };

static void connected_pair(enum family family, int fds[2])
{
	if (family == TCP)
		tcp_pair(fds);
	else
		ck_assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
}

static void stream_pair(enum family family, struct stream pair[2])
{
	int fds[2];

	connected_pair(family, fds);
	for (int i = 0; i < 2; i++)
		ck_assert(!stream_init(&pair[i], fds[i]));
}

static void pair_fini(struct stream pair[2])
{
	stream_fini(&pair[0]);
	stream_fini(&pair[1]);
}

/* --- content ---------------------------------------------------------------------------------- */

/* What byte stands at a place of the transfer: no place looks like another one near it. */
static unsigned char byte_at(size_t place)
{
	return (unsigned char)((place * 2654435761U) >> 13);
}

static suspends void send_all(void *arg)
{
	struct stream *stream = arg;
	size_t sent_bytes = 0;

	while (sent_bytes < TRANSFER_BYTES) {
		struct iovec iov[8] = { 0 };
		unsigned char bytes[8][700];
		int iov_count = (int)test_random(9);

		for (int i = 0; i < iov_count; i++) {
			iov[i].iov_base = bytes[i];
			iov[i].iov_len = MIN(test_random(700), TRANSFER_BYTES - sent_bytes);
			for (size_t j = 0; j < iov[i].iov_len; j++)
				bytes[i][j] = byte_at(sent_bytes++);
		}
		require(!stream_send(stream, iov, iov_count, NO_DEADLINE));
	}
}

static suspends void receive_all(void *arg)
{
	struct stream *stream = arg;
	size_t got_bytes = 0;

	while (got_bytes < TRANSFER_BYTES) {
		unsigned char bytes[8000];
		size_t max_bytes = MIN(1 + test_random(sizeof(bytes)), TRANSFER_BYTES - got_bytes);
		ssize_t count;

		if (test_random(2))
			count = stream_recv(stream, bytes, max_bytes, NO_DEADLINE);
		else if (!stream_recv_exact(stream, bytes, max_bytes, NO_DEADLINE))
			count = (ssize_t)max_bytes;
		else
			count = -1;
		require(count > 0 && (size_t)count <= max_bytes);
		for (ssize_t i = 0; i < count; i++)
			require(bytes[i] == byte_at(got_bytes++));
		if (!test_random(10))
			co_yield ();
	}
}

/* Both ways at once, through small socket buffers, so that most sends are partial. */
static suspends void transfer(void *arg)
{
	struct stream pair[2];
	struct co_group group;
	int small_bytes = 4096;

	stream_pair((enum family)(intptr_t)arg, pair);
	co_group_init(&group);
	for (int i = 0; i < 2; i++) {
		setsockopt(pair[i].fd, SOL_SOCKET, SO_SNDBUF, &small_bytes, sizeof(small_bytes));
		co_group_start(&group, send_all, &pair[i]);
		co_group_start(&group, receive_all, &pair[i]);
	}
	co_group_wait(&group);
	pair_fini(pair);
}

START_TEST(what_is_sent_arrives_whole_and_in_order)
{
	test_seed();
	test_run_co(transfer, (void *)(intptr_t)_i);
}
END_TEST

/* --- ends ------------------------------------------------------------------------------------- */

/* Data and the end of the stream come with one event, before anybody reads. */
static suspends void end_behind_data(void *arg)
{
	struct stream stream;
	int fds[2];
	char bytes[64];

	connected_pair((enum family)(intptr_t)arg, fds);
	ck_assert(!stream_init(&stream, fds[0]));
	ck_assert_int_eq(write(fds[1], "0123456789", 10), 10);
	close(fds[1]);
	co_sleep_ns(5 * NS_PER_MS);
	ck_assert_int_eq(stream_recv(&stream, bytes, sizeof(bytes), NO_DEADLINE), 10);
	ck_assert_int_eq(stream_recv(&stream, bytes, sizeof(bytes), NO_DEADLINE), 0);
	ck_assert_int_eq(stream_recv(&stream, bytes, sizeof(bytes), NO_DEADLINE), 0);
	stream_fini(&stream);
}

START_TEST(the_end_is_seen_behind_the_last_data)
{
	test_run_co(end_behind_data, (void *)(intptr_t)_i);
}
END_TEST

static suspends void end_too_early(void *arg)
{
	struct stream pair[2];
	char bytes[64] = { 0 };
	struct iovec iov = { .iov_base = bytes, .iov_len = 10 };

	stream_pair((enum family)(intptr_t)arg, pair);
	ck_assert(!stream_send(&pair[0], &iov, 1, NO_DEADLINE));
	stream_fini(&pair[0]);
	ck_assert_int_eq(stream_recv_exact(&pair[1], bytes, 11, NO_DEADLINE), -ECONNRESET);
	int ret = 0;
	for (int i = 0; i < 100 && !ret; i++) { /* TCP learns it from the answer to the first */
		iov = (struct iovec){ .iov_base = bytes, .iov_len = 10 };
		ret = stream_send(&pair[1], &iov, 1, NO_DEADLINE);
		co_sleep_ns(NS_PER_MS);
	}
	ck_assert(ret == -EPIPE || ret == -ECONNRESET);
	stream_fini(&pair[1]);
}

START_TEST(an_early_end_is_an_error_for_both_directions)
{
	test_run_co(end_too_early, (void *)(intptr_t)_i);
}
END_TEST

/* --- deadlines and cancelling ----------------------------------------------------------------- */

/* Sends until the socket is full. */
static void stuff(struct stream *stream)
{
	static char block[64 * 1024];
	struct iovec iov = { .iov_base = block, .iov_len = sizeof(block) };

	while (stream_send_some(stream, &iov, 1) > 0)
		;
	ck_assert_int_eq(stream_send_some(stream, &iov, 1), 0);
}

static suspends void run_out_of_time(void *arg)
{
	struct stream pair[2];
	char bytes[16] = { 0 };
	struct iovec iov = { .iov_base = bytes, .iov_len = 16 };

	stream_pair(UNIX, pair);
	ck_assert_int_eq(
		stream_recv(&pair[0], bytes, 16, reactor_now_ns() + NS_PER_MS), -ETIMEDOUT);
	ck_assert_int_eq(
		stream_recv_exact(&pair[0], bytes, 16, reactor_now_ns() + NS_PER_MS), -ETIMEDOUT);
	stuff(&pair[0]);
	ck_assert_int_eq(stream_send(&pair[0], &iov, 1, reactor_now_ns() + NS_PER_MS), -ETIMEDOUT);
	/* A deadline in the past does not hide what is there already. */
	co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(stream_recv(&pair[1], bytes, 16, 0), 16);
	pair_fini(pair);
}

START_TEST(a_deadline_ends_a_wait)
{
	test_run_co(run_out_of_time, NULL);
}
END_TEST

static suspends void receive_cancelled(void *arg)
{
	char byte;

	ck_assert_int_eq(stream_recv(arg, &byte, 1, NO_DEADLINE), -ECANCELED);
}

static suspends void send_cancelled(void *arg)
{
	char byte = 0;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };

	ck_assert_int_eq(stream_send(arg, &iov, 1, NO_DEADLINE), -ECANCELED);
}

static suspends void cancel(void *arg)
{
	struct stream pair[2];
	struct co_group group;

	stream_pair(UNIX, pair);
	stuff(&pair[0]);
	co_group_init(&group);
	co_group_start(&group, receive_cancelled, &pair[0]);
	co_group_start(&group, send_cancelled, &pair[0]);
	co_yield ();
	ck_assert_uint_eq(group.running, 2);
	stream_cancel(&pair[0]);
	co_group_wait(&group);
	receive_cancelled(&pair[0]); /* and so does every later call */
	send_cancelled(&pair[0]);
	pair_fini(pair);
}

START_TEST(cancelling_ends_every_wait_and_every_later_call)
{
	test_run_co(cancel, NULL);
}
END_TEST

/* --- the rest --------------------------------------------------------------------------------- */

static suspends void release(void *arg)
{
	struct stream pair[2], again;
	char bytes[4];

	stream_pair(UNIX, pair);
	ck_assert_int_eq(write(pair[1].fd, "ping", 4), 4);
	co_sleep_ns(NS_PER_MS);
	int fd = stream_release(&pair[0]);
	stream_fini(&pair[0]); /* harmless */
	/* The event for the data came to the old one; the new one sees it all the same. */
	ck_assert(!stream_init(&again, fd));
	ck_assert(!stream_recv_exact(&again, bytes, 4, NO_DEADLINE));
	stream_fini(&again);
	stream_fini(&pair[1]);
}

START_TEST(a_released_connection_goes_on_elsewhere)
{
	test_run_co(release, NULL);
}
END_TEST

static int turns_of_others;
static bool reader_done;

static suspends void count_turns(void *arg)
{
	while (!reader_done) {
		turns_of_others++;
		co_yield ();
	}
}

static suspends void read_without_end(void *arg)
{
	struct stream pair[2];
	char bytes[64];

	stream_pair(UNIX, pair);
	stuff(&pair[0]);
	co_sleep_ns(NS_PER_MS);
	co_start(count_turns, NULL);
	for (int i = 0; i < 100; i++)
		ck_assert_int_eq(stream_recv(&pair[1], bytes, 64, NO_DEADLINE), 64);
	reader_done = true;
	co_yield ();
	ck_assert_int_ge(turns_of_others, 90);
	pair_fini(pair);
}

START_TEST(a_reader_that_always_finds_data_lets_others_run)
{
	test_run_co(read_without_end, NULL);
}
END_TEST

static suspends void init_with_a_file(void *arg)
{
	struct stream stream;
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	ck_assert_int_eq(stream_init(&stream, fd), -EPERM);
	ck_assert_int_eq(fcntl(fd, F_GETFD), -1); /* closed */
	stream_fini(&stream);
}

START_TEST(what_cannot_be_polled_is_refused)
{
	test_run_co(init_with_a_file, NULL);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_loop_test(tcase, what_is_sent_arrives_whole_and_in_order, 0, FAMILIES);
	tcase_add_loop_test(tcase, the_end_is_seen_behind_the_last_data, 0, FAMILIES);
	tcase_add_loop_test(tcase, an_early_end_is_an_error_for_both_directions, 0, FAMILIES);
	tcase_add_test(tcase, a_deadline_ends_a_wait);
	tcase_add_test(tcase, cancelling_ends_every_wait_and_every_later_call);
	tcase_add_test(tcase, a_released_connection_goes_on_elsewhere);
	tcase_add_test(tcase, a_reader_that_always_finds_data_lets_others_run);
	tcase_add_test(tcase, what_cannot_be_polled_is_refused);
}

int main(void)
{
	return test_run_suite("stream", fill);
}
