/*
 * Limits and fairness: idle clients, shares of an export, clients that would keep the server to themselves,
 * 500 connections of which 100 are stuck, and what is left after hundreds of bad ones.
 *
 *	SOAK=20000 build/tests/unit/test_nbd_limits	so many bad ones
 */
#include <fcntl.h>
#include <sys/resource.h>

#include "nbd_rig.h"

#include "blk/fault.h"

#define LOG_NAME "limits.log"

static struct rig rig;
static struct nbd_limits limits;

static void setup(void)
{
	limits = nbd_limits_default;
}

static void teardown(void)
{
	rig_stop(&rig);
	unlink(LOG_NAME);
}

/* --- idleness --------------------------------------------------------------------------------- */

static suspends void shut_gate(void *arg)
{
	blk_drain_begin(rig.exports[0].top);
}

static suspends void open_gate(void *arg)
{
	blk_drain_end(rig.exports[0].top);
}

START_TEST(test_idle)
{
	struct nbd_request_header headers[64];

	limits.idle_ns = 100 * NS_PER_MS;
	rig_start(&rig, &limits, NULL);
	/* Silent from the start, in the middle of a header, of a payload. */
	headers[0] = headers[1] = rig_header(NBD_CMD_WRITE, 0, 1, 0, 100000);
	int silent = rig_serve(&rig), half = rig_serve_with(&rig, headers, sizeof(headers[0]) - 1),
	    payload = rig_serve_with(&rig, headers, 2 * sizeof(headers[0]));
	rig_expect_end(silent);
	rig_expect_end(half);
	rig_expect_end(payload);
	/* One that does not read its replies. */
	for (int i = 0; i < 64; i++)
		headers[i] = rig_header(NBD_CMD_READ, 0, 1, 0, 1 << 20);
	int deaf = rig_serve_with(&rig, headers, sizeof(headers));
	rig_all_left(&rig);
	close(deaf);
}
END_TEST

/* Whoever waits for the disk is not idle, however long it takes. */
START_TEST(test_waiting_is_not_idle)
{
	struct nbd_request_header flush = rig_header(NBD_CMD_FLUSH, 0, 7, 0, 0);

	limits.idle_ns = 20 * NS_PER_MS;
	rig_start(&rig, &limits, NULL);
	rig_run(&rig, shut_gate, NULL);
	int fd = rig_serve_with(&rig, &flush, sizeof(flush));
	usleep(400000);
	rig_run(&rig, open_gate, NULL);
	ck_assert_uint_eq(rig_reply(fd, 7), NBD_SUCCESS);
	close(fd);
}
END_TEST

/* --- shares ----------------------------------------------------------------------------------- */

struct held {
	unsigned max_in_flight;
	uint64_t max_bytes;
};

static suspends void look(void *arg)
{
	struct held *held = arg;

	*held = (struct held){ 0 };
	list_for_each (link, &rig.exports[0].nbd.conns) {
		struct nbd_conn *conn = list_entry(link, struct nbd_conn, link);

		held->max_in_flight = MAX(held->max_in_flight, conn->in_flight);
		held->max_bytes = MAX(held->max_bytes, conn->buffered_bytes);
	}
}

/* Until what they hold grows no more. */
static struct held settled(void)
{
	struct held before, now = { 0 };

	do {
		before = now;
		usleep(100000);
		rig_run(&rig, look, &now);
	} while (memcmp(&before, &now, sizeof(now)));
	return now;
}

#define DEAF       8
#define READ_BYTES 65536

START_TEST(test_shares)
{
	int deaf[DEAF];

	limits.export_requests = DEAF * 10;
	limits.export_buffer_bytes = DEAF << 20;
	rig_start(&rig, &limits, NULL);
	for (int i = 0; i < DEAF; i++)
		deaf[i] = rig_serve(&rig);
	for (int i = 0; i < DEAF; i++)
		for (int n = 0; n < 200; n++)
			rig_request(deaf[i], NBD_CMD_READ, 0, 1, 0, i % 2 ? READ_BYTES : 1);
	struct held held = settled();
	ck_assert_uint_le(held.max_in_flight, 10);
	ck_assert_uint_le(held.max_bytes, 1 << 20);
	/* They cannot keep a newcomer out. */
	int fd = rig_serve(&rig);
	rig_expect_alive(fd);
	rig_disconnect(fd);
	/* When most have left there is more for who stays. */
	for (int i = 0; i < DEAF; i++)
		if (i != 1)
			close(deaf[i]);
	ck_assert_uint_gt(settled().max_in_flight, 10);
	close(deaf[1]);
}
END_TEST

/* --- turns ------------------------------------------------------------------------------------ */

#define BURST 3000

static sem_t blocked, sent;

static suspends void block_reactor(void *arg)
{
	sem_post(&blocked);
	while (sem_wait(&sent))
		;
}

static void *block_thread(void *arg)
{
	rig_run(&rig, block_reactor, NULL);
	return NULL;
}

/* How many writes at offset 0 the disk saw before the one elsewhere. */
static unsigned writes_before_other(void)
{
	struct fault_log_record record;
	unsigned count = 0;
	int fd = open(LOG_NAME, O_RDONLY);

	while (read(fd, &record, sizeof(record)) == sizeof(record)) {
		if (be16_get(record.kind) != FAULT_LOG_WRITE)
			continue;
		if (be64_get(record.off))
			break;
		lseek(fd, (off_t)be64_get(record.len), SEEK_CUR);
		count++;
	}
	close(fd);
	return count;
}

/*
 * One client sends thousands of writes, another one a single one. Both have sent before the server's
 * thread goes on: the single one has its turn long before the others are through.
 */
START_TEST(test_turns)
{
	static struct {
		struct nbd_request_header header;
		uint8_t payload;
	} burst[BURST];
	pthread_t blocker;

	rig_start(&rig, &limits, "{ layer = 'fault'; log = '" LOG_NAME "' },");
	int greedy = rig_serve(&rig), modest = rig_serve(&rig);
	sem_init(&blocked, 0, 0);
	sem_init(&sent, 0, 0);
	ck_assert(!pthread_create(&blocker, NULL, block_thread, NULL));
	while (sem_wait(&blocked))
		;
	for (int i = 0; i < BURST; i++)
		burst[i].header = rig_header(NBD_CMD_WRITE, 0, (uint64_t)i, 0, 1);
	rig_send(greedy, burst, sizeof(burst));
	burst[0].header = rig_header(NBD_CMD_WRITE, 0, 1, 4096, 1);
	rig_send(modest, burst, sizeof(burst[0]));
	sem_post(&sent);
	pthread_join(blocker, NULL);
	ck_assert_uint_eq(rig_reply(modest, 1), NBD_SUCCESS);
	for (int i = 0; i < BURST; i++) {
		uint64_t cookie;

		ck_assert_uint_eq(rig_any_reply(greedy, &cookie), NBD_SUCCESS);
	}
	/* The turn that the greedy one was having, and another one at most. */
	ck_assert_uint_le(writes_before_other(), 2 * 64);
	rig_disconnect(greedy);
	rig_disconnect(modest);
}
END_TEST

/* --- many ------------------------------------------------------------------------------------- */

#define MANY         500
#define STUCK        100
#define ROUNDS       4
#define AREA_BYTES   8192U
#define AREA_OFF(fd) ((uint64_t)(fd)*AREA_BYTES)

static void allow_descriptors(void)
{
	struct rlimit limit;

	ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
	limit.rlim_cur = limit.rlim_max;
	ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
	ck_assert_msg(limit.rlim_max > 2 * MANY + 100, "needs %d descriptors", 2 * MANY + 100);
}

/* Half a header, half a payload, or replies that nobody reads; the last one goes on for ever. */
static void get_stuck(int fd, int how)
{
	struct nbd_request_header header = rig_header(NBD_CMD_WRITE, 0, 1, RIG_SIZE - 65536, 60000);

	if (how == 0)
		rig_send(fd, &header, 13);
	else if (how == 1)
		rig_send(fd, &header, sizeof(header));
	else
		for (int i = 0; i < 20; i++)
			rig_request(fd, NBD_CMD_READ, 0, 1, 0, 1 << 20);
}

static void check_area(int fd, int number, int round)
{
	uint8_t there[AREA_BYTES], back[AREA_BYTES];

	memset(there, number + round, sizeof(there));
	rig_write(fd, AREA_OFF(number), there, sizeof(there));
	rig_read(fd, AREA_OFF(number), back, sizeof(back));
	ck_assert_mem_eq(there, back, sizeof(back));
}

START_TEST(test_many_connections)
{
	static int fds[MANY];

	allow_descriptors();
	limits.linger_ns = 100 * NS_PER_MS;
	rig_start(&rig, &limits, NULL);
	for (int i = 0; i < MANY; i++)
		fds[i] = rig_serve(&rig);
	for (int i = 0; i < STUCK; i++)
		get_stuck(fds[i], i % 3);
	for (int round = 0; round < ROUNDS; round++)
		for (int i = STUCK; i < MANY; i++)
			check_area(fds[i], i, round);
	for (int i = 0; i < MANY; i++)
		close(fds[i]);
	rig_all_left(&rig);
}
END_TEST

/* --- again and again --------------------------------------------------------------------------- */

/* A client in some phase and form that sends something, sensible or not, and vanishes. */
static void abuse(struct seed *seed)
{
	struct nbd_session session = {
		.form = (enum nbd_form)seed_below(seed, 3),
		.contexts = (unsigned)seed_below(seed, 4) << NBD_ALLOCATION_ID,
		.read_only = true, /* what is written takes memory, too */
	};
	uint8_t noise[512];
	int fd = seed_below(seed, 2) ? rig_connect(&rig)
				     : rig_connect_as(&rig, &rig.exports[0].nbd, session);

	for (unsigned i = 0; i < seed_below(seed, 8); i++) {
		struct nbd_request_header header = rig_header((uint16_t)seed_below(seed, 9), 0, i,
			seed_below(seed, RIG_SIZE), (uint32_t)seed_below(seed, 100000));

		send(fd, &header, sizeof(header), MSG_NOSIGNAL); /* it may have been cut already */
	}
	for (size_t i = 0; i < sizeof(noise); i++)
		noise[i] = (uint8_t)seed_below(seed, 256);
	send(fd, noise, seed_below(seed, sizeof(noise)), MSG_NOSIGNAL);
	close(fd);
	rig_all_left(&rig);
}

START_TEST(test_soak)
{
	struct seed seed = seed_start("soak");
	const char *given = getenv("SOAK");
	int cycles = given ? atoi(given) : 1000;
	struct rig_footprint before = { 0 };

	limits.linger_ns = 10 * NS_PER_MS;
	rig_start(&rig, &limits, NULL);
	for (int i = 0; i < cycles; i++) {
		if (i == 100) /* pools are filled by now */
			before = rig_footprint();
		abuse(&seed);
	}
	rig_expect_footprint(before);
	int fd = rig_serve(&rig);
	rig_expect_alive(fd);
	rig_disconnect(fd);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_checked_fixture(tcase, setup, teardown);
	tcase_set_timeout(tcase, getenv("SOAK") ? 0 : TEST_TIMEOUT_S);
	tcase_add_test(tcase, test_idle);
	tcase_add_test(tcase, test_waiting_is_not_idle);
	tcase_add_test(tcase, test_shares);
	tcase_add_test(tcase, test_turns);
	tcase_add_test(tcase, test_many_connections);
	tcase_add_test(tcase, test_soak);
}

int main(void)
{
	return test_run_suite("nbd limits", fill);
}
