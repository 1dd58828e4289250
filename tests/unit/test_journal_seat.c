/*
 * Connections that outlive their server, case by case: killed at every single step, next to other
 * clients, over new sockets, on disks and journals that cannot be taken over.
 *
 * JOURNAL_KILLS=1000 takes every step instead of some, and so many spoiled journals; SEED=...
 */
#include <check.h>

#include "seat_rig.h"

/* --- at every step ---------------------------------------------------------------------------- */

static void issue_script(struct seat_rig *rig)
{
	static const struct seat_op script[] = {
		{ .type = NBD_CMD_WRITE, .off = 0, .len = 4096 },
		{ .type = NBD_CMD_WRITE, .off = 8192, .len = 65536 },
		{ .type = NBD_CMD_READ, .off = 1 << 20, .len = 150016 },
		{ .type = NBD_CMD_FLUSH },
		{ .type = NBD_CMD_WRITE_ZEROES, .off = 2 << 20, .len = 65536 },
		{ .type = NBD_CMD_TRIM, .off = 3 << 20, .len = 65536 },
		{ .type = NBD_CMD_WRITE, .flags = NBD_CMD_FLAG_FUA, .off = 100352, .len = 512 },
	};

	for (unsigned i = 0; i < ARRAY_LEN(script); i++) {
		struct seat_op op = script[i];

		op.connection = i % rig->seat.connections;
		seat_issue_at(rig, i, op);
	}
}

/*
 * The same requests twice: in the second round, those of the first one may still be kept. The first server dies at
 * step `first`, the next one at step `second`. False when the first one had no such step.
 */
static bool die_at(const char *stack, unsigned long first, unsigned long second)
{
	struct seat_rig rig;
	bool died = false;

	seat_rig_init(&rig, stack, 2);
	rig.quiet = true;
	seat_start(&rig, first);
	for (int round = 0; round < 2; round++) {
		issue_script(&rig);
		while (rig.busy) {
			seat_pump(&rig);
			if (!seat_died(&rig))
				continue;
			seat_start(&rig, died ? 0 : second);
			died = true;
		}
	}
	seat_kill(&rig);
	seat_start(&rig, 0);
	ck_assert_int_eq(seat_disconnect(&rig), SEAT_EXIT_OVER);
	seat_compare_disk(&rig);
	seat_rig_fini(&rig);
	return died;
}

/* By default every few steps only. */
static void die_everywhere(const char *stack, void (*make)(void), void (*check)(void))
{
	unsigned stride = getenv("JOURNAL_KILLS") ? 1 : 9;
	unsigned long step = 1 + test_random(stride), lives = 0;
	bool died = true;

	for (; died; step += stride, lives++) {
		make();
		died = die_at(stack, step, 1 + test_random(40));
		check();
	}
	printf("no step %lu, %lu lives\n", step - stride, lives);
}

static void no_check(void)
{
}

START_TEST(test_each_step)
{
	test_seed();
	if (_i)
		die_everywhere(SEAT_QCOW, seat_make_qcow, seat_check_qcow);
	else
		die_everywhere(SEAT_FILE, seat_make_file, no_check);
}
END_TEST

/* --- other doors ------------------------------------------------------------------------------ */

static void visit(struct seat_rig *rig, struct nbd_request_header header, const void *payload)
{
	const uint32_t payload_bytes = payload ? be32_get(header.len) : 0;
	struct nbd_simple_reply reply;

	header.magic = be32_make(NBD_REQUEST_MAGIC);
	require(send(rig->visitor_fds[0], &header, sizeof(header), 0) == sizeof(header));
	if (payload)
		require(send(rig->visitor_fds[0], payload, payload_bytes, 0) == payload_bytes);
	require(recv(rig->visitor_fds[0], &reply, sizeof(reply), MSG_WAITALL) == sizeof(reply));
	ck_assert_uint_eq(be32_get(reply.error), 0);
}

static const struct nbd_request_header flush = { .type = { { 0, NBD_CMD_FLUSH } } };

/* What another client made durable is not overwritten by what the device wrote before. */
START_TEST(test_visitor)
{
	uint8_t newer[4096];
	struct seat_rig rig;

	seat_make_qcow();
	seat_rig_init(&rig, SEAT_QCOW, 2);
	for (unsigned round = 0; round < 8; round++) {
		const bool fua = round % 2;
		const struct nbd_request_header header = {
			.type = be16_make(NBD_CMD_WRITE),
			.flags = be16_make(fua ? NBD_CMD_FLAG_FUA : 0),
			.off = be64_make(2048),
			.len = be32_make(sizeof(newer)),
		};

		require(!socketpair(AF_UNIX, SOCK_STREAM, 0, rig.visitor_fds));
		seat_start(&rig, 0);
		seat_do(&rig,
			(struct seat_op){
				.type = NBD_CMD_WRITE, .len = 8192, .connection = round / 2 % 2 });
		memset(newer, (int)round + 1, sizeof(newer));
		memcpy(rig.model + 2048, newer, sizeof(newer));
		visit(&rig, header, newer);
		if (!fua)
			visit(&rig, flush, NULL);
		seat_kill(&rig);
		close(rig.visitor_fds[0]);
		close(rig.visitor_fds[1]);
		rig.visitor_fds[1] = 0;
		seat_start(&rig, 0);
		seat_do(&rig, (struct seat_op){ .type = NBD_CMD_READ, .len = 8192 });
		seat_kill(&rig);
	}
	seat_rig_fini(&rig);
}
END_TEST

/* --- a disk that does not flush --------------------------------------------------------------- */

#define NEVER_FLUSHED                                         \
	"( { layer = 'fault'; ops = ['flush']; every = 1 }, " \
	"{ layer = 'qcow' }, "                                \
	"{ layer = 'file'; path = 'disk.qcow2'; sync = 'none' } )"

static void note_it(const struct blk *blk, const char *text)
{
	int fd = open("noticed", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	require(blk && strstr(text, "cannot be flushed") && fd >= 0);
	close(fd);
}

static void write_so_much(struct seat_rig *rig, unsigned bytes)
{
	const unsigned piece_bytes = 128U << 10;

	for (unsigned off = 0; off < bytes; off += piece_bytes)
		seat_do(rig, (struct seat_op){ .type = NBD_CMD_WRITE,
				     .len = piece_bytes,
				     .off = off % SEAT_DISK_BYTES });
}

/*
 * The door's own flush fails, which the device has not been told: what it wrote is there after a kill. When no more
 * can be kept, that is said and the device goes on.
 */
START_TEST(test_flush_fails)
{
	const bool full = _i;
	struct seat_rig rig;

	seat_make_qcow();
	unlink("noticed");
	seat_rig_init(&rig, NEVER_FLUSHED, 1);
	rig.notice = note_it;
	seat_start(&rig, 0);
	write_so_much(&rig, full ? 3 * JOURNAL_RING_MIN_BYTES : JOURNAL_RING_MIN_BYTES * 3 / 4);
	ck_assert_int_eq(!access("noticed", F_OK), full);
	seat_kill(&rig);
	rig.stack = SEAT_QCOW;
	seat_start(&rig, 0);
	if (!full)
		seat_do(&rig, (struct seat_op){ .type = NBD_CMD_READ, .len = 1U << 20 });
	seat_kill(&rig);
	seat_check_qcow();
	seat_rig_fini(&rig);
}
END_TEST

/* --- new sockets ------------------------------------------------------------------------------ */

/* Dies by itself at a step, soon or late, or is killed after a while. */
static void serve_for_a_while(struct seat_rig *rig)
{
	seat_start(rig, 1 + test_random(test_random(2) ? 40 : 4000));
	for (unsigned i = test_random(400); i; i--) {
		seat_pump(rig);
		if (seat_died(rig))
			return;
	}
	seat_kill(rig);
}

/* Only the memory stays, now and then, and not even that is read to its end. */
START_TEST(test_orphans)
{
	const bool qcow = _i;
	struct seat_rig rig;

	test_seed();
	qcow ? seat_make_qcow() : seat_make_file();
	seat_rig_init(&rig, qcow ? SEAT_QCOW : SEAT_FILE, 1 + test_random(3));
	/* A memory that no server has come to use yet tells nothing: that is the next test. */
	seat_start(&rig, 0);
	seat_do(&rig, (struct seat_op){ .type = NBD_CMD_READ, .len = 512 });
	seat_kill(&rig);
	for (unsigned long round = seat_kills_wanted(30); round; round--) {
		serve_for_a_while(&rig);
		if (test_random(2))
			seat_reconnect(&rig);
	}
	seat_start(&rig, 0);
	seat_drain(&rig);
	ck_assert_int_eq(seat_disconnect(&rig), SEAT_EXIT_OVER);
	seat_compare_disk(&rig);
	if (qcow)
		seat_check_qcow();
	printf("%lu kills, %llu replies\n", rig.kills, (unsigned long long)rig.replies);
	seat_rig_fini(&rig);
}
END_TEST

/* Not even the memory stays: no matter to a file, but who knows what a qcow had acknowledged? */
START_TEST(test_lost)
{
	const bool qcow = _i;
	struct seat_rig rig;

	qcow ? seat_make_qcow() : seat_make_file();
	seat_rig_init(&rig, qcow ? SEAT_QCOW : SEAT_FILE, 2);
	seat_start(&rig, 0);
	seat_do(&rig, (struct seat_op){ .type = NBD_CMD_WRITE, .len = 512 });
	seat_kill(&rig);
	seat_reconnect(&rig);
	require(!ftruncate(rig.seat.memory_fd, 0));
	require(!ftruncate(rig.seat.memory_fd, (off_t)nbd_journal_size(2, 0)));
	for (unsigned i = 0; i < 2; i++) {
		seat_start(&rig, 0);
		if (qcow)
			ck_assert_int_eq(seat_wait(&rig), SEAT_EXIT_REFUSED << 8);
		else
			seat_kill(&rig);
	}
	if (!qcow) {
		seat_start(&rig, 0);
		seat_do(&rig, (struct seat_op){ .type = NBD_CMD_READ, .len = 512 });
		seat_kill(&rig);
	}
	seat_rig_fini(&rig);
}
END_TEST

/* --- what cannot be resumed ------------------------------------------------------------------- */

START_TEST(test_memory)
{
	struct seat_rig rig;

	seat_rig_init(&rig, "( { layer = 'memory'; size = '4M' } )", 1);
	seat_start(&rig, 0);
	seat_do(&rig, (struct seat_op){ .type = NBD_CMD_WRITE, .len = 512 });
	seat_kill(&rig);
	seat_start(&rig, 0);
	ck_assert_int_eq(seat_wait(&rig), SEAT_EXIT_REFUSED << 8);
	seat_rig_fini(&rig);
}
END_TEST

static int try_open(const struct seat_rig *rig)
{
	struct nbd_journal *journal;
	struct err err = { 0 };
	int ret = nbd_journal_open(&rig->seat, &journal, &err);

	ck_assert_int_eq(!ret, !err.text[0]);
	ck_assert_int_eq(!ret, journal != NULL);
	nbd_journal_close(journal);
	return ret;
}

static void poke(const struct seat_rig *rig, uint64_t off, const void *bytes, size_t len)
{
	require(pwrite(rig->seat.memory_fd, bytes, len, (off_t)off) == (ssize_t)len);
}

/* The value at off is replaced, refused, and put right again. */
static void expect(const struct seat_rig *rig, int ret, uint64_t off, uint64_t bad, size_t len)
{
	uint64_t right;

	require(pread(rig->seat.memory_fd, &right, len, (off_t)off) == (ssize_t)len);
	poke(rig, off, &bad, len);
	ck_assert_int_eq(try_open(rig), ret);
	poke(rig, off, &right, len);
}

static void expect_entry_refused(const struct seat_rig *rig, uint64_t off)
{
	struct journal_entry entry;

	require(pread(rig->seat.memory_fd, &entry, sizeof(entry), (off_t)off) == sizeof(entry));
	if (entry.state != JOURNAL_KEPT)
		return;
	expect(rig, -EUCLEAN, off + offsetof(struct journal_entry, state), 4, 2);
	expect(rig, -EUCLEAN, off + offsetof(struct journal_entry, type), NBD_CMD_READ, 2);
	expect(rig, -EUCLEAN, off + offsetof(struct journal_entry, len), 1 << 20, 4);
	if (entry.at)
		expect(rig, -EUCLEAN, off + offsetof(struct journal_entry, at), entry.at - 7, 8);
}

START_TEST(test_refused)
{
	const uint64_t line = JOURNAL_PAGE_BYTES, entries = line + JOURNAL_ENTRIES_OFF;
	struct seat_rig rig;

	test_seed();
	seat_make_qcow();
	seat_rig_init(&rig, SEAT_QCOW, 2);
	ck_assert_int_eq(try_open(&rig), 0); /* makes it one */
	ck_assert_int_eq(try_open(&rig), 0);
	seat_start(&rig, 0);
	for (unsigned i = 0; i < 8; i++)
		seat_do(&rig,
			(struct seat_op){ .type = NBD_CMD_WRITE, .len = 512, .off = i * 512 });
	seat_kill(&rig);

	expect(&rig, -EUCLEAN, offsetof(struct journal_head, magic), 1, 8);
	expect(&rig, -EPROTONOSUPPORT, offsetof(struct journal_head, version), JOURNAL_VERSION + 1,
		4);
	expect(&rig, -EUCLEAN, offsetof(struct journal_head, connections), 3, 4);
	expect(&rig, -EUCLEAN, offsetof(struct journal_head, memory_bytes), 1, 8);
	expect(&rig, -EUCLEAN, offsetof(struct journal_head, ring_bytes), 4096, 8);
	expect(&rig, -EUCLEAN, line + offsetof(struct journal_line, parsed), 1 << 30, 8);
	expect(&rig, -EUCLEAN, line + offsetof(struct journal_line, received.current), 2, 4);
	expect(&rig, -EUCLEAN, line + offsetof(struct journal_line, sent.current), 77, 4);
	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++)
		expect_entry_refused(&rig, entries + i * sizeof(struct journal_entry));
	rig.seat.connections = 3;
	ck_assert_int_eq(try_open(&rig), -EUCLEAN);
	rig.seat.connections = 0;
	ck_assert_int_eq(try_open(&rig), -EINVAL);
	rig.seat.connections = 2;

	/* None of it did any harm. */
	seat_start(&rig, 0);
	seat_do(&rig, (struct seat_op){ .type = NBD_CMD_READ, .len = 8192 });
	seat_kill(&rig);
	seat_rig_fini(&rig);
}
END_TEST

static void spoil(const struct seat_rig *rig)
{
	const uint64_t head_bytes = JOURNAL_PAGE_BYTES + JOURNAL_ENTRIES_OFF + 4096;
	uint64_t where = 8 * test_random(head_bytes / 8), value = test_random(8);

	if (test_random(2))
		value = (uint64_t)random() << test_random(40);
	if (test_random(2))
		where = JOURNAL_PAGE_BYTES + where % 128;
	poke(rig, where, &value, 1U << test_random(4));
}

/* Whatever stands there: a server refuses it, or serves something, and ends in order. */
START_TEST(test_spoiled)
{
	unsigned long rounds = seat_kills_wanted(40);

	test_seed();
	signal(SIGPIPE, SIG_IGN);
	for (unsigned long round = 0; round < rounds; round++) {
		struct seat_rig rig;
		int status;

		seat_make_file();
		seat_rig_init(&rig, SEAT_FILE, 1 + test_random(2));
		seat_start(&rig, 1 + test_random(200));
		while (!seat_died(&rig))
			seat_pump(&rig);
		for (unsigned i = 1 + test_random(4); i; i--)
			spoil(&rig);
		seat_start(&rig, 0);
		(void)!write(rig.stop_fd, "", 1); /* it may be gone by now */
		while (!waitpid(rig.server, &status, WNOHANG)) {
			for (unsigned i = 0; i < rig.seat.connections; i++)
				(void)!recv(rig.ends[i].fd, rig.ends[i].in, SEAT_OUT_BYTES, 0);
			poll(NULL, 0, 1);
		}
		close(rig.stop_fd);
		ck_assert_msg(!status || status == SEAT_EXIT_PARKED << 8 ||
				      status == SEAT_EXIT_REFUSED << 8 ||
				      status == SEAT_EXIT_BROKEN << 8,
			"the server ended with status 0x%x", status);
		seat_rig_fini(&rig);
	}
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_set_timeout(tcase, 3600);
	tcase_add_loop_test(tcase, test_each_step, 0, 2);
	tcase_add_test(tcase, test_visitor);
	tcase_add_loop_test(tcase, test_flush_fails, 0, 2);
	tcase_add_loop_test(tcase, test_orphans, 0, 2);
	tcase_add_loop_test(tcase, test_lost, 0, 2);
	tcase_add_test(tcase, test_memory);
	tcase_add_test(tcase, test_refused);
	tcase_add_test(tcase, test_spoiled);
}

int main(void)
{
	return test_run_suite("journal seat", fill);
}
