/*
 * Clients that misbehave, vanish, do not read, come in crowds; and exports that end under them.
 *
 * The gate: with the stack drained (blk_drain_begin()) requests stay under way until it is opened again.
 */
#include <fcntl.h>
#include <stdatomic.h>

#include "nbd_rig.h"

static struct rig rig;

static void setup(void)
{
	struct nbd_limits limits = nbd_limits_default;

	limits.requests = 16;
	limits.buffer_bytes = 1U << 20;
	limits.linger_ns = 100 * NS_PER_MS;
	rig_start(&rig, &limits, NULL);
}

static void teardown(void)
{
	rig_all_left(&rig);
	rig_stop(&rig);
}

static suspends void shut_gate_run(void *arg)
{
	blk_drain_begin(rig.exports[0].top);
}

static suspends void open_gate_run(void *arg)
{
	blk_drain_end(rig.exports[0].top);
}

static void shut_gate(void)
{
	rig_run(&rig, shut_gate_run, NULL);
}

static void open_gate(void)
{
	rig_run(&rig, open_gate_run, NULL);
}

/* What the first export's connections hold together. */
struct held {
	unsigned conns, in_flight;
	uint64_t buffered_bytes;
};

static suspends void look(void *arg)
{
	struct held *held = arg;

	*held = (struct held){ 0 };
	list_for_each (link, &rig.exports[0].nbd.conns) {
		struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);

		held->conns++;
		held->in_flight += conn->in_flight;
		held->buffered_bytes += conn->buffered_bytes;
	}
}

static struct held held_now(void)
{
	struct held held;

	rig_run(&rig, look, &held);
	return held;
}

/* Until the server has so many requests under way. */
static void await_in_flight(unsigned count)
{
	for (int i = 0; held_now().in_flight != count; i++) {
		ck_assert_int_lt(i, RIG_WAIT_MS);
		usleep(1000);
	}
}

/* Sends without end until the server has stopped reading; the bytes it took. */
static size_t send_until_full(int fd, const void *data, size_t len)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLOUT };
	size_t total = 0;

	fcntl(fd, F_SETFL, O_NONBLOCK);
	while (poll(&pollfd, 1, 300) == 1) {
		ssize_t sent = send(
			fd, (const char *)data + total % len, len - total % len, MSG_NOSIGNAL);
		ck_assert(sent > 0 || errno == EAGAIN);
		total += sent > 0 ? (size_t)sent : 0;
		ck_assert_msg(total < (64U << 20), "the server reads without end");
	}
	fcntl(fd, F_SETFL, 0);
	return total;
}

static void expect_bounded(void)
{
	struct held held = held_now();

	ck_assert_uint_le(held.in_flight, rig.limits.requests);
	ck_assert_uint_le(held.buffered_bytes, rig.limits.buffer_bytes);
}

/* --- clients that do not read ----------------------------------------------------------------- */

START_TEST(test_never_reads)
{
	const uint32_t lens[] = { 0, 4096, 65536, 200000 };
	static uint8_t buf[200000];

	for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
		struct nbd_request_header header = rig_header(NBD_CMD_READ, 0, 5, 0, lens[i]);
		int fd = rig_serve(&rig);
		size_t bytes = send_until_full(fd, &header, sizeof(header));

		expect_bounded();
		int other = rig_serve(&rig);
		rig_expect_alive(other);
		rig_disconnect(other);
		/* It comes to its senses: nothing was lost. */
		for (size_t n = 0; n < bytes / sizeof(header); n++) {
			ck_assert_uint_eq(rig_reply(fd, 5), NBD_SUCCESS);
			rig_recv(fd, buf, lens[i]);
		}
		rig_send(fd, (char *)&header + bytes % sizeof(header),
			sizeof(header) - bytes % sizeof(header));
		ck_assert_uint_eq(rig_reply(fd, 5), NBD_SUCCESS);
		rig_recv(fd, buf, lens[i]);
		rig_disconnect(fd);
	}
}
END_TEST

START_TEST(test_never_reads_and_leaves)
{
	struct nbd_request_header header = rig_header(NBD_CMD_READ, 0, 5, 0, 65536);

	int fd = rig_serve(&rig);
	send_until_full(fd, &header, sizeof(header));
	close(fd);
	rig_all_left(&rig);

	/* Half a close: the server gives up waiting after linger_ns. */
	fd = rig_serve(&rig);
	for (int i = 0; i < 10; i++)
		rig_send(fd, &header, sizeof(header));
	shutdown(fd, SHUT_WR);
	rig_all_left(&rig);
	close(fd);
}
END_TEST

/* Writes to a disk that is stuck: payloads pin what they were received in. */
START_TEST(test_stuck_writes_are_bounded)
{
	const uint32_t lens[] = { 0, 1, 4096, 65536, 65537, 300000 };
	static struct {
		struct nbd_request_header header;
		uint8_t payload[300000];
	} write;

	for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
		size_t len = sizeof(write.header) + lens[i];
		int fd = rig_serve(&rig);

		shut_gate();
		write.header = rig_header(NBD_CMD_WRITE, 0, 5, 0, lens[i]);
		size_t bytes = send_until_full(fd, &write, len);
		expect_bounded();
		open_gate();
		for (size_t n = 0; n < bytes / len; n++)
			ck_assert_uint_eq(rig_reply(fd, 5), NBD_SUCCESS);
		rig_send(fd, (char *)&write + bytes % len, len - bytes % len);
		ck_assert_uint_eq(rig_reply(fd, 5), NBD_SUCCESS);
		rig_expect_alive(fd);
		rig_disconnect(fd);
	}
}
END_TEST

/* One request that needs more than the limit is served all the same. */
START_TEST(test_request_above_limit)
{
	uint8_t *buf = calloc(1, 4U << 20);
	int fd = rig_serve(&rig);

	rig_write(fd, 0, buf, 4U << 20);
	rig_read(fd, 0, buf, 4U << 20);
	rig_disconnect(fd);
	free(buf);
}
END_TEST

/* --- clients that vanish ---------------------------------------------------------------------- */

START_TEST(test_vanishes_in_the_middle)
{
	const uint32_t lens[] = { 100, 60000, 70000, 1000000 };
	static uint8_t bytes[sizeof(struct nbd_request_header) + 1000000];

	for (size_t i = 0; i < 4 * ARRAY_LEN(lens); i++) {
		uint32_t len = lens[i / 4];
		struct nbd_request_header header = rig_header(
			NBD_CMD_WRITE, 0, i, i % 2 ? RIG_SIZE : 0, len); /* received, or skipped */
		int fd = rig_serve(&rig);

		memcpy(bytes, &header, sizeof(header));
		rig_send(fd, bytes, i % 4 < 2 ? sizeof(header) + len - 1 : 27);
		close(fd);
		ck_assert_int_eq(rig_all_left(&rig), -ECONNRESET);
	}
}
END_TEST

/* The layers still use the buffers: the connection waits for them, and then is gone. */
START_TEST(test_vanishes_with_requests_under_way)
{
	static uint8_t payload[100000];
	int fd = rig_serve(&rig);

	shut_gate();
	for (unsigned i = 0; i < 4; i++) {
		uint32_t len = i % 2 ? 100000 : 1000;

		rig_request(fd, NBD_CMD_WRITE, 0, i, 0, len);
		rig_send(fd, payload, len);
		rig_request(fd, NBD_CMD_READ, 0, i, 0, len);
	}
	await_in_flight(8);
	close(fd);
	usleep(2 * (unsigned)(rig.limits.linger_ns / 1000));
	ck_assert_uint_eq(held_now().in_flight, 8);
	open_gate();
	rig_all_left(&rig);
	ck_assert_uint_eq(held_now().conns, 0);
}
END_TEST

START_TEST(test_half_close_is_answered)
{
	uint8_t buf[512];
	int fd = rig_serve(&rig);

	shut_gate();
	rig_request(fd, NBD_CMD_READ, 0, 1, 0, 512);
	await_in_flight(1);
	shutdown(fd, SHUT_WR);
	open_gate();
	ck_assert_uint_eq(rig_reply(fd, 1), NBD_SUCCESS);
	rig_recv(fd, buf, sizeof(buf));
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), NBD_SHUT);
}
END_TEST

START_TEST(test_disconnect_waits_for_requests)
{
	int fd = rig_serve(&rig);

	shut_gate();
	rig_request(fd, NBD_CMD_WRITE, 0, 1, 0, 4);
	rig_send(fd, "data", 4);
	rig_request(fd, NBD_CMD_DISC, 0, 2, 0, 0);
	await_in_flight(1);
	open_gate();
	ck_assert_uint_eq(rig_reply(fd, 1), NBD_SUCCESS);
	rig_expect_end(fd);
	ck_assert_int_eq(rig_all_left(&rig), 0);
}
END_TEST

/* --- noise ------------------------------------------------------------------------------------ */

/* Random bytes behind a sensible beginning, in both phases. */
START_TEST(test_noise)
{
	struct seed seed = seed_start("noise");
	struct nbd_request_header header;
	uint8_t bytes[3000], sink[4096];

	for (unsigned i = 0; i < 400; i++) {
		size_t len = (size_t)seed_below(&seed, sizeof(bytes));
		bool handshake = i % 2;
		int fd = handshake ? rig_connect(&rig) : rig_serve(&rig);

		seed_fill(&seed, bytes, len);
		if (handshake && len > 20) {
			memcpy(bytes, "\0\0\0\1IHAVEOPT\0\0\0", 15);
			bytes[15] %= 8; /* an option that exists */
			bytes[16] = bytes[17] = bytes[18] = 0;
		} else if (!handshake && len > sizeof(header)) {
			header = rig_header(bytes[0] % 8, bytes[1] % 4 ? 0 : bytes[2], i,
				(uint64_t)bytes[3] << (bytes[4] % 64), bytes[5]);
			memcpy(bytes, &header, sizeof(header));
		}
		rig_send(fd, bytes, MIN(len, (size_t)1));
		rig_send(fd, bytes + MIN(len, (size_t)1), len - MIN(len, (size_t)1));
		shutdown(fd, SHUT_WR);
		while (rig_recv_some(fd, sink, sizeof(sink)))
			;
		close(fd);
	}
	int fd = rig_serve(&rig);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

#define CROWD 150

START_TEST(test_crowd)
{
	static int fds[CROWD];
	uint8_t buf[512];

	for (int round = 0; round < 2; round++) {
		for (int i = 0; i < CROWD; i++)
			fds[i] = i % 3 ? rig_serve(&rig) : rig_connect(&rig);
		for (int i = 0; i < CROWD; i++)
			if (i % 3)
				rig_request(fds[i], NBD_CMD_READ, 0, (uint64_t)i, 0, 512);
		for (int i = 0; i < CROWD; i++) {
			if (i % 3 == 1) {
				ck_assert_uint_eq(rig_reply(fds[i], (uint64_t)i), NBD_SUCCESS);
				rig_recv(fds[i], buf, sizeof(buf));
				rig_disconnect(fds[i]);
			} else {
				close(fds[i]); /* with a reply unread, or in the handshake */
			}
		}
		rig_all_left(&rig);
	}
}
END_TEST

/* --- the end of an export --------------------------------------------------------------------- */

struct withdrawal {
	uint64_t grace_ns;
	atomic_bool done;
};

static suspends void withdraw(void *arg)
{
	struct withdrawal *withdrawal = arg;

	nbd_withdraw(&rig.exports[0].nbd, withdrawal->grace_ns);
	withdrawal->done = true;
}

static suspends void withdraw_start(void *arg)
{
	co_start(withdraw, arg);
}

static suspends void nothing(void *arg)
{
}

static void await_done(const struct withdrawal *withdrawal)
{
	for (int i = 0; !withdrawal->done; i++) {
		ck_assert_int_lt(i, RIG_WAIT_MS);
		usleep(1000);
		rig_run(&rig, nothing, NULL);
	}
}

/* What was read is answered, what comes later is not, and the end waits for it. */
START_TEST(test_withdraw_drains)
{
	static struct withdrawal withdrawal;
	int idle = rig_serve(&rig), busy = rig_serve(&rig);

	withdrawal.grace_ns = 60 * NS_PER_SEC;
	shut_gate();
	rig_request(busy, NBD_CMD_WRITE, 0, 1, 0, 4);
	rig_send(busy, "data", 4);
	await_in_flight(1);
	rig_run(&rig, withdraw_start, &withdrawal);
	rig_expect_end(idle);
	int late = rig_serve(&rig);
	rig_expect_end(late);
	ck_assert(!withdrawal.done);
	open_gate();
	ck_assert_uint_eq(rig_reply(busy, 1), NBD_SUCCESS);
	rig_expect_end(busy);
	await_done(&withdrawal);
}
END_TEST

/* A request that has begun is received to its end, and answered. */
START_TEST(test_withdraw_in_the_middle)
{
	static struct withdrawal withdrawal;
	static uint8_t payload[200000];
	struct nbd_request_header header = rig_header(NBD_CMD_WRITE, 0, 1, 0, sizeof(payload));
	int fd = rig_serve(&rig);

	withdrawal.grace_ns = 60 * NS_PER_SEC;
	rig_expect_alive(fd);
	rig_send(fd, &header, sizeof(header));
	rig_send(fd, payload, 1000);
	while (held_now().buffered_bytes == NBD_CHUNK_BYTES)
		usleep(1000);
	rig_run(&rig, withdraw_start, &withdrawal);
	rig_send(fd, payload + 1000, sizeof(payload) - 1000);
	ck_assert_uint_eq(rig_reply(fd, 1), NBD_SUCCESS);
	rig_expect_end(fd);
	await_done(&withdrawal);
}
END_TEST

/* Who does not come to an end within the grace is cut; requests under way are waited for even then. */
START_TEST(test_withdraw_cuts)
{
	static struct withdrawal withdrawal;
	int stuck = rig_serve(&rig), half = rig_serve(&rig);

	withdrawal.grace_ns = 20 * NS_PER_MS;
	shut_gate();
	rig_request(stuck, NBD_CMD_READ, 0, 1, 0, 4096);
	rig_send(half, "\x25\x60", 2);
	await_in_flight(1);
	rig_run(&rig, withdraw_start, &withdrawal);
	rig_expect_end(half);
	usleep(50000);
	ck_assert(!withdrawal.done);
	open_gate();
	rig_expect_end(stuck);
	await_done(&withdrawal);
}
END_TEST

static suspends void withdraw_second(void *arg)
{
	nbd_withdraw(&rig.exports[1].nbd, *(uint64_t *)arg);
}

static suspends void publish_second(void *arg)
{
	struct rig_export *export = &rig.exports[1];
	struct err err;

	nbd_export_init(&export->nbd, "second", NULL, export->top, rig.second_reactor, false);
	ck_assert(!nbd_publish(&rig.server, &export->nbd, &err));
}

/* An export that goes at any moment of a client's way in, and comes again. */
START_TEST(test_withdraw_meets_arrivals)
{
	struct seed seed = seed_start("withdraw meets arrivals");
	struct nbd_request_header read_request = rig_header(NBD_CMD_READ, 0, 1, 0, 4096);
	uint8_t handshake[64] = { 0, 0, 0, NBD_FLAG_C_NO_ZEROES }, sink[8192];

	memcpy(handshake + 4, "IHAVEOPT\0\0\0\1\0\0\0\6second", 22);
	for (unsigned round = 0; round < 200; round++) {
		uint64_t grace_ns = seed_below(&seed, 2) ? 0 : 5 * NS_PER_MS;
		int fds[4];

		for (size_t i = 0; i < ARRAY_LEN(fds); i++) {
			fds[i] = rig_connect(&rig);
			rig_send(fds[i], handshake, 26);
			rig_send(
				fds[i], &read_request, seed_below(&seed, sizeof(read_request) + 1));
		}
		if (seed_below(&seed, 2))
			usleep((unsigned)seed_below(&seed, 300));
		rig_run(&rig, withdraw_second, &grace_ns);
		for (size_t i = 0; i < ARRAY_LEN(fds); i++) {
			while (rig_recv_some(fds[i], sink, sizeof(sink)))
				;
			close(fds[i]);
		}
		rig_run(&rig, publish_second, NULL);
	}
}
END_TEST

/* --- disconnecting ---------------------------------------------------------------------------- */

#define CLIENT_ID 7

struct hold {
	struct task task;
	sem_t let_go;
};

static void hold_thread(struct task *task)
{
	struct hold *hold = container_of(task, struct hold, task);

	while (sem_wait(&hold->let_go))
		;
}

static suspends void disconnect_client(void *arg)
{
	*(int *)arg = nbd_disconnect(&rig.server, CLIENT_ID);
}

/* The second export's thread is let go when the export is on its way out: nothing suspends in between. */
static suspends void withdraw_and_let_go(void *arg)
{
	struct hold *hold = arg;

	sem_post(&hold->let_go);
	nbd_withdraw(&rig.exports[1].nbd, 0);
}

static suspends void disconnect_meanwhile(void *arg)
{
	struct co_group calls;
	struct hold hold;

	co_group_init(&calls);
	task_init(&hold.task, hold_thread);
	sem_init(&hold.let_go, 0, 0);
	nbd_make_first(&rig.server, &rig.exports[1].nbd);
	reactor_post(rig.second_reactor, &hold.task);
	co_group_start(&calls, disconnect_client, arg);
	co_group_start(&calls, withdraw_and_let_go, &hold);
	co_group_wait(&calls);
	sem_destroy(&hold.let_go);
}

/* A client is found whatever happens to exports that it does not use. */
START_TEST(test_disconnect_while_another_export_goes)
{
	static const char choice[] = { "\0\0\0\2IHAVEOPT\0\0\0\1\0\0\0\5first" };
	uint8_t greeting_and_answer[18 + 10];
	int ret = -1;

	rig.visitor_id = CLIENT_ID;
	int fd = rig_connect(&rig);
	rig_send(fd, choice, sizeof(choice) - 1);
	rig_recv(fd, greeting_and_answer, sizeof(greeting_and_answer));
	rig_expect_alive(fd);
	rig_run(&rig, disconnect_meanwhile, &ret);
	ck_assert_int_eq(ret, 0);
	rig_expect_end(fd);
	rig_all_left(&rig);
	rig_run(&rig, disconnect_client, &ret);
	ck_assert_int_eq(ret, -ENOENT);
}
END_TEST

/* --- status ----------------------------------------------------------------------------------- */

static suspends void status(void *arg)
{
	*(json_t **)arg = nbd_export_status(&rig.exports[0].nbd);
}

START_TEST(test_status)
{
	json_t *object, *client;
	json_int_t requests, bytes, connections, errors;
	uint8_t buf[1000];
	int fd = rig_serve(&rig), gone = rig_serve(&rig);

	rig_read(gone, 0, buf, 1000);
	rig_disconnect(gone);
	rig_read(fd, 0, buf, 500);
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, RIG_SIZE, 1, NULL), NBD_EINVAL);
	while (held_now().conns != 1)
		usleep(1000);
	rig_run(&rig, status, &object);
	ck_assert(!json_unpack(object, "{s:I, s:{s:{s:I, s:I}}, s:I, s:[o]}", "connections",
		&connections, "requests", "read", "requests", &requests, "bytes", &bytes, "errors",
		&errors, "clients", &client));
	ck_assert_int_eq(connections, 1);
	ck_assert_int_eq(requests, 2);
	ck_assert_int_eq(bytes, 1500);
	ck_assert_int_eq(errors, 1);
	ck_assert_str_eq(json_string_value(json_object_get(client, "peer")), "test");
	json_decref(object);
	rig_disconnect(fd);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_add_test(tcase, test_never_reads);
	tcase_add_test(tcase, test_never_reads_and_leaves);
	tcase_add_test(tcase, test_stuck_writes_are_bounded);
	tcase_add_test(tcase, test_request_above_limit);
	tcase_add_test(tcase, test_vanishes_in_the_middle);
	tcase_add_test(tcase, test_vanishes_with_requests_under_way);
	tcase_add_test(tcase, test_half_close_is_answered);
	tcase_add_test(tcase, test_disconnect_waits_for_requests);
	tcase_add_test(tcase, test_noise);
	tcase_add_test(tcase, test_crowd);
	tcase_add_test(tcase, test_withdraw_drains);
	tcase_add_test(tcase, test_withdraw_in_the_middle);
	tcase_add_test(tcase, test_withdraw_cuts);
	tcase_add_test(tcase, test_withdraw_meets_arrivals);
	tcase_add_test(tcase, test_disconnect_while_another_export_goes);
	tcase_add_test(tcase, test_status);
}

int main(void)
{
	return test_run_suite("nbd abuse", fill);
}
