/*
 * A seat for tests: this process plays keeper and driver, a forked child serves, is killed, and another one
 * takes over.
 *
 * The driver is like the kernel's block layer: many requests in flight over all connections, none that
 * overlaps a change in flight. It keeps a model of the disk: what a read must give is known when it is
 * issued. Requests leave it, and replies come, in pieces of any size.
 *
 * A server ends by a kill from outside at any time, by a kill from inside between two chosen stores to
 * the journal, or parked; never otherwise.
 */
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nbd/journal.h"
#include "nbd/journal_private.h"

#include "conf_build.h"
#include "testing.h"

#define SEAT_DISK_BYTES  (4U << 20)
#define SEAT_BLOCK_BYTES 512U
#define SEAT_OPS         64U
#define SEAT_OUT_BYTES   (2U << 20)
#define SEAT_HANG_MS     300000

enum { SEAT_EXIT_OVER = 0, SEAT_EXIT_PARKED = 10, SEAT_EXIT_REFUSED = 11, SEAT_EXIT_BROKEN = 12 };

struct seat_op {
	bool busy;
	uint16_t type, flags;
	uint64_t off, cookie;
	uint32_t len;
	unsigned connection;
};

struct seat_end { /* the driver's */
	int fd;
	uint8_t *out; /* to be sent: out[out_pos..out_len) */
	size_t out_pos, out_len;
	uint8_t *in; /* the reply that is coming */
	size_t in_len;
};

struct seat_rig {
	struct nbd_seat seat;
	struct seat_end ends[NBD_SEAT_CONNECTIONS_MAX];
	const char *stack; /* as conf_build() takes it */
	uint8_t *model;
	struct seat_op ops[SEAT_OPS];
	unsigned busy, max_busy;
	uint64_t next_cookie, replies;
	unsigned longest; /* request */
	bool quiet;       /* no new requests */

	int visitor_fds[2]; /* where there is one: a client of another door, and the server's end */

	void (*notice)(const struct blk *blk, const char *text); /* of the server's disk */

	pid_t server;
	int stop_fd; /* a byte parks the server */
	unsigned long kills, parks;
};

/* --- the server ------------------------------------------------------------------------------- */

struct seat_server {
	struct seat_rig *rig;
	struct nbd_export export;
	struct nbd_journal *journal;
	struct watch stop;
	struct co_group serving;
	struct task start[NBD_SEAT_CONNECTIONS_MAX];
	unsigned next;
	int exit_status;
};

static unsigned long seat_steps_left;

static void seat_die_here(void)
{
	if (seat_steps_left && !--seat_steps_left)
		kill(getpid(), SIGKILL);
}

static suspends void seat_serve_one(void *arg)
{
	struct seat_server *server = arg;
	struct nbd_session session = { .fd = -1,
		.limits = &nbd_limits_default,
		.peer = "driver",
		.journal = server->journal,
		.connection = server->next++ };
	int ret = nbd_serve(&server->export, &session);

	if (ret == NBD_PARKED)
		server->exit_status = SEAT_EXIT_PARKED;
	if (ret < 0) {
		fprintf(stderr, "connection %u: %s\n", session.connection, strerror(-ret));
		server->exit_status = SEAT_EXIT_BROKEN;
	}
}

static suspends void seat_serve_visitor(void *arg)
{
	struct seat_server *server = arg;
	struct nbd_session session = {
		.fd = fcntl(server->rig->visitor_fds[1], F_DUPFD_CLOEXEC, 0),
		.limits = &nbd_limits_default,
		.peer = "visitor",
	};

	nbd_serve(&server->export, &session);
}

static suspends void seat_close_export(void *arg)
{
	struct seat_server *server = arg;

	nbd_export_close(&server->export, 20 * NS_PER_SEC);
}

static void seat_stop(struct watch *watch, uint32_t events)
{
	struct seat_server *server = container_of(watch, struct seat_server, stop);

	watch_remove(watch);
	watch->fd = -1;
	co_group_start(&server->serving, seat_close_export, server);
}

static suspends int seat_sit_down(struct seat_server *server, struct blk *blk, struct err *err)
{
	int ret = nbd_journal_open(&server->rig->seat, &server->journal, err);

	if (ret)
		return ret;
	/* A power of two apart from all else that is one, so that it happens anywhere. */
	server->journal->rearm_bytes = 100001;
	return nbd_journal_replay(server->journal, &server->export, err);
}

static suspends void seat_server_main(void *arg)
{
	struct seat_server *server = arg;
	struct seat_rig *rig = server->rig;
	struct blk_env env;
	struct blk *blk;
	struct err err = { 0 };
	struct conf *conf = conf_build("%s", rig->stack);

	blk_env_init(&env);
	env.successor = true;
	env.notice = rig->notice;
	if (stack_open(conf, &env, false, &blk, &err)) {
		fprintf(stderr, "stack: %s\n", err.text);
		_exit(SEAT_EXIT_BROKEN);
	}
	nbd_export_init(&server->export, "disk", NULL, blk, reactor_self(), false);
	if (seat_sit_down(server, blk, &err)) {
		fprintf(stderr, "seat: %s\n", err.text);
		_exit(SEAT_EXIT_REFUSED);
	}
	watch_add(&server->stop, server->stop.fd, POLLIN, seat_stop);
	co_group_init(&server->serving);
	for (unsigned i = 0; i < rig->seat.connections; i++) {
		const int bytes = 8192;

		co_group_start(&server->serving, seat_serve_one, server);
		/* So that replies come in pieces. */
		setsockopt(rig->seat.ends[i].fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	}
	if (rig->visitor_fds[1])
		co_start(seat_serve_visitor, server);
	co_group_wait(&server->serving);
	if (server->stop.fd >= 0)
		watch_remove(&server->stop);
	nbd_export_close(&server->export, 0);
	nbd_journal_close(server->journal);
	stack_close(blk);
	blk_env_fini(&env);
	conf_free(conf);
}

/* die_at: the step at which it kills itself; 0: at none. */
static inline void seat_start(struct seat_rig *rig, unsigned long die_at)
{
	int fds[2];

	require(!pipe2(fds, O_CLOEXEC));
	fflush(NULL);
	rig->server = fork();
	require(rig->server >= 0);
	if (!rig->server) {
		struct seat_server server = { .rig = rig, .stop.fd = fds[0] };

		close(fds[1]);
		seat_steps_left = die_at;
		nbd_journal_step = seat_die_here;
		test_run_co(seat_server_main, &server);
		_exit(server.exit_status);
	}
	close(fds[0]);
	rig->stop_fd = fds[1];
	if (test_random(2)) /* what was sent is not all taken when the server looks */
		poll(NULL, 0, (int)test_random(20));
}

static inline int seat_wait(struct seat_rig *rig)
{
	int status;

	require(waitpid(rig->server, &status, 0) == rig->server);
	close(rig->stop_fd);
	rig->server = 0;
	return status;
}

/* Whether it is gone, by its own hand. */
static inline bool seat_died(struct seat_rig *rig)
{
	int status;
	pid_t pid = waitpid(rig->server, &status, WNOHANG);

	require(pid >= 0);
	if (!pid)
		return false;
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
		ck_abort_msg("the server ended with status 0x%x", status);
	close(rig->stop_fd);
	rig->server = 0;
	rig->kills++;
	return true;
}

static inline void seat_kill(struct seat_rig *rig)
{
	kill(rig->server, SIGKILL);
	require(WIFSIGNALED(seat_wait(rig)));
	rig->kills++;
}

/* --- the seat --------------------------------------------------------------------------------- */

static inline void seat_connect(struct seat_rig *rig, unsigned i)
{
	const int bytes = 16384;
	int fds[2];

	require(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
	rig->seat.ends[i] = (struct nbd_seat_ends){ .fd = fds[0], .driver_fd = fds[1] };
	setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	fcntl(fds[1], F_SETFL, O_NONBLOCK);
	rig->ends[i].fd = fds[1];
}

static inline void seat_rig_init(struct seat_rig *rig, const char *stack, unsigned connections)
{
	*rig = (struct seat_rig){ .stack = stack, .max_busy = SEAT_OPS, .longest = 256U << 10 };
	rig->seat.connections = connections;
	rig->seat.memory_fd = memfd_create("journal", MFD_CLOEXEC);
	require(!ftruncate(rig->seat.memory_fd, (off_t)nbd_journal_size(connections, 0)));
	rig->model = calloc(1, SEAT_DISK_BYTES);
	for (unsigned i = 0; i < connections; i++) {
		struct seat_end *end = &rig->ends[i];

		seat_connect(rig, i);
		end->out = malloc(SEAT_OUT_BYTES);
		end->in = malloc(SEAT_OUT_BYTES);
	}
}

static inline void seat_rig_fini(struct seat_rig *rig)
{
	for (unsigned i = 0; i < rig->seat.connections; i++) {
		close(rig->seat.ends[i].fd);
		close(rig->seat.ends[i].driver_fd);
		free(rig->ends[i].out);
		free(rig->ends[i].in);
	}
	close(rig->seat.memory_fd);
	free(rig->model);
}

/* --- the driver ------------------------------------------------------------------------------- */

static inline bool seat_op_changes(const struct seat_op *op)
{
	return op->type == NBD_CMD_WRITE || op->type == NBD_CMD_TRIM ||
	       op->type == NBD_CMD_WRITE_ZEROES;
}

static inline bool seat_conflicts(const struct seat_rig *rig, const struct seat_op *op)
{
	for (unsigned i = 0; i < SEAT_OPS; i++) {
		const struct seat_op *other = &rig->ops[i];

		if (other->busy && (seat_op_changes(op) || seat_op_changes(other)) &&
			ranges_overlap(op->off, op->len, other->off, other->len))
			return true;
	}
	return false;
}

static inline void seat_choose(struct seat_rig *rig, struct seat_op *op)
{
	static const uint16_t types[] = { NBD_CMD_READ, NBD_CMD_READ, NBD_CMD_READ, NBD_CMD_WRITE,
		NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_TRIM,
		NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH };
	unsigned longest = test_random(8) ? MIN(rig->longest, 16384U) : rig->longest;

	*op = (struct seat_op){ .type = types[test_random(ARRAY_LEN(types))] };
	if (op->type == NBD_CMD_FLUSH) {
		op->type = test_random(4) ? NBD_CMD_WRITE : NBD_CMD_FLUSH;
		if (op->type == NBD_CMD_FLUSH)
			return;
	}
	op->len = (test_random(longest / SEAT_BLOCK_BYTES) + 1) * SEAT_BLOCK_BYTES;
	/* Half of them where others are, too. */
	unsigned area_bytes = test_random(2) ? SEAT_DISK_BYTES : SEAT_DISK_BYTES / 8;
	op->off = test_random((area_bytes - op->len) / SEAT_BLOCK_BYTES) * SEAT_BLOCK_BYTES;
	if (seat_op_changes(op) && !test_random(8))
		op->flags |= NBD_CMD_FLAG_FUA;
	if (op->type == NBD_CMD_WRITE_ZEROES && test_random(2))
		op->flags |= NBD_CMD_FLAG_NO_HOLE;
}

static inline void seat_put(struct seat_end *end, const void *bytes, size_t len)
{
	if (end->out_pos) {
		memmove(end->out, end->out + end->out_pos, end->out_len - end->out_pos);
		end->out_len -= end->out_pos;
		end->out_pos = 0;
	}
	require(end->out_len + len <= SEAT_OUT_BYTES);
	memcpy(end->out + end->out_len, bytes, len);
	end->out_len += len;
}

/* A write's content is put into the model before. */
static inline void seat_send(struct seat_rig *rig, const struct seat_op *op)
{
	struct seat_end *end = &rig->ends[op->connection];
	struct nbd_request_header header = {
		.magic = be32_make(NBD_REQUEST_MAGIC),
		.flags = be16_make(op->flags),
		.type = be16_make(op->type),
		.cookie = be64_make(op->cookie),
		.off = be64_make(op->off),
		.len = be32_make(op->len),
	};

	seat_put(end, &header, sizeof(header));
	if (op->type == NBD_CMD_WRITE)
		seat_put(end, rig->model + op->off, op->len);
}

static inline void seat_issue(struct seat_rig *rig, struct seat_op *op)
{
	op->busy = true;
	rig->busy++;
	if (op->type == NBD_CMD_WRITE) {
		for (uint32_t i = 0; i < op->len; i += sizeof(uint32_t)) {
			uint32_t word = (uint32_t)random();

			memcpy(rig->model + op->off + i, &word, sizeof(word));
		}
	} else if (seat_op_changes(op)) {
		memset(rig->model + op->off, 0, op->len);
	}
	seat_send(rig, op);
}

/* The sockets died with everybody who had them; the driver repeats over new ones what was not answered. */
static inline void seat_reconnect(struct seat_rig *rig)
{
	rig->seat.inherited = true;
	for (unsigned i = 0; i < rig->seat.connections; i++) {
		struct seat_end *end = &rig->ends[i];

		close(rig->seat.ends[i].fd);
		close(rig->seat.ends[i].driver_fd);
		seat_connect(rig, i);
		end->out_pos = end->out_len = end->in_len = 0;
	}
	for (unsigned i = 0; i < SEAT_OPS; i++)
		if (rig->ops[i].busy)
			seat_send(rig, &rig->ops[i]);
}

static inline void seat_issue_at(struct seat_rig *rig, unsigned slot, struct seat_op op)
{
	op.cookie = ++rig->next_cookie << 8 | slot;
	rig->ops[slot] = op;
	seat_issue(rig, &rig->ops[slot]);
}

/* A random request, where there is room for one and no conflict. */
static inline void seat_issue_some(struct seat_rig *rig)
{
	unsigned connection = test_random(rig->seat.connections);
	struct seat_op op;

	if (rig->quiet || rig->busy >= rig->max_busy ||
		rig->ends[connection].out_len - rig->ends[connection].out_pos > SEAT_OUT_BYTES / 2)
		return;
	seat_choose(rig, &op);
	if (seat_conflicts(rig, &op))
		return;
	for (unsigned i = 0; i < SEAT_OPS; i++) {
		if (rig->ops[i].busy)
			continue;
		op.connection = connection;
		seat_issue_at(rig, i, op);
		return;
	}
}

static inline void seat_check_data(
	const struct seat_rig *rig, const struct seat_op *op, const uint8_t *data)
{
	for (uint32_t i = 0; i < op->len; i++)
		if (data[i] != rig->model[op->off + i])
			ck_abort_msg("byte %llu reads as %02x instead of %02x",
				(unsigned long long)(op->off + i), data[i],
				rig->model[op->off + i]);
}

/* The reply at the beginning of in, when it is complete: its length, else 0. */
static inline size_t seat_take_reply(struct seat_rig *rig, const struct seat_end *end)
{
	struct nbd_simple_reply reply;

	if (end->in_len < sizeof(reply))
		return 0;
	memcpy(&reply, end->in, sizeof(reply));
	uint64_t cookie = be64_get(reply.cookie);
	struct seat_op *op = &rig->ops[cookie & 0xff];
	ck_assert_uint_eq(be32_get(reply.magic), NBD_SIMPLE_REPLY_MAGIC);
	ck_assert_uint_eq(be32_get(reply.error), 0);
	if ((cookie & 0xff) >= SEAT_OPS || !op->busy || op->cookie != cookie ||
		&rig->ends[op->connection] != end)
		ck_abort_msg("a reply to no request, cookie %llx", (unsigned long long)cookie);
	size_t data_bytes = op->type == NBD_CMD_READ ? op->len : 0;
	if (end->in_len < sizeof(reply) + data_bytes)
		return 0;
	if (data_bytes)
		seat_check_data(rig, op, end->in + sizeof(reply));
	op->busy = false;
	rig->busy--;
	rig->replies++;
	return sizeof(reply) + data_bytes;
}

/* Sends and receives a little; whether anything moved. */
static inline bool seat_pump_end(struct seat_rig *rig, struct seat_end *end)
{
	size_t most = 1 + test_random(test_random(2) ? 100 : 40000), used;
	ssize_t sent = 0, got;

	if (end->out_len > end->out_pos)
		sent = send(end->fd, end->out + end->out_pos,
			MIN(most, end->out_len - end->out_pos), MSG_NOSIGNAL);
	end->out_pos += sent > 0 ? (size_t)sent : 0;
	most = 1 + test_random(test_random(2) ? 100 : 40000);
	got = recv(end->fd, end->in + end->in_len, MIN(most, SEAT_OUT_BYTES - end->in_len), 0);
	if (got > 0)
		end->in_len += (size_t)got;
	if ((sent < 0 && errno != EAGAIN) || !got)
		ck_abort_msg("the connection ended");
	while ((used = seat_take_reply(rig, end))) {
		end->in_len -= used;
		memmove(end->in, end->in + used, end->in_len);
	}
	return sent > 0 || got > 0;
}

static inline void seat_pump(struct seat_rig *rig)
{
	bool moved = false;

	for (unsigned i = test_random(8); i; i--)
		seat_issue_some(rig);
	for (unsigned i = 0; i < rig->seat.connections; i++)
		moved |= seat_pump_end(rig, &rig->ends[i]);
	if (!moved)
		poll(NULL, 0, 1);
}

/* Until every request has its reply. */
static inline void seat_drain(struct seat_rig *rig)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	time_t give_up = now.tv_sec + SEAT_HANG_MS / 1000;
	rig->quiet = true;
	while (rig->busy) {
		seat_pump(rig);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec > give_up)
			ck_abort_msg("%u requests have no reply", rig->busy);
		for (unsigned i = 0; i < rig->seat.connections; i++)
			ck_assert_uint_lt(rig->ends[i].in_len, SEAT_OUT_BYTES);
	}
	rig->quiet = false;
	for (unsigned i = 0; i < rig->seat.connections; i++)
		ck_assert_uint_eq(rig->ends[i].in_len, 0);
}

/* One request, and its reply. */
static inline void seat_do(struct seat_rig *rig, struct seat_op op)
{
	seat_issue_at(rig, 0, op);
	seat_drain(rig);
}

/* As a driver that is told to let go; the server's exit status. */
static inline int seat_disconnect(struct seat_rig *rig)
{
	struct nbd_request_header header = {
		.magic = be32_make(NBD_REQUEST_MAGIC),
		.type = be16_make(NBD_CMD_DISC),
	};

	for (unsigned i = 0; i < rig->seat.connections; i++) {
		struct pollfd end = { .fd = rig->ends[i].fd, .events = POLLIN };
		char byte;

		require(send(end.fd, &header, sizeof(header), 0) == sizeof(header));
		require(poll(&end, 1, SEAT_HANG_MS) == 1);
		ck_assert_int_eq(recv(end.fd, &byte, 1, 0), 0);
	}
	return seat_wait(rig);
}

static inline void seat_park(struct seat_rig *rig)
{
	int status;

	require(write(rig->stop_fd, "", 1) == 1);
	while (!waitpid(rig->server, &status, WNOHANG)) {
		rig->quiet = true;
		seat_pump(rig);
	}
	rig->quiet = false;
	close(rig->stop_fd);
	ck_assert_int_eq(status, SEAT_EXIT_PARKED << 8);
	rig->parks++;
}

/* --- the disk afterwards ---------------------------------------------------------------------- */

static inline suspends void seat_compare(void *arg)
{
	struct seat_rig *rig = arg;
	struct conf *conf = conf_build("%s", rig->stack);
	uint8_t *bytes = malloc(SEAT_DISK_BYTES);
	struct blk_env env;
	struct blk *blk;
	struct err err;

	blk_env_init(&env);
	env.successor = true;
	ck_assert_msg(!stack_open(conf, &env, true, &blk, &err), "%s", err.text);
	ck_assert_int_eq(blk_read(blk, 0, bytes, SEAT_DISK_BYTES), 0);
	const struct seat_op whole = { .len = SEAT_DISK_BYTES };
	seat_check_data(rig, &whole, bytes);
	stack_close(blk);
	blk_env_fini(&env);
	conf_free(conf);
	free(bytes);
}

/* In a process of its own: the threads of a reactor here would be missing in servers forked later. */
static inline void seat_compare_disk(struct seat_rig *rig)
{
	int status;

	fflush(NULL);
	pid_t pid = fork();
	require(pid >= 0);
	if (!pid) {
		test_run_co(seat_compare, rig);
		_exit(0);
	}
	require(waitpid(pid, &status, 0) == pid);
	ck_assert_int_eq(status, 0);
}

/* --- disks ------------------------------------------------------------------------------------ */

#define SEAT_FILE "( { layer = 'file'; path = 'disk'; sync = 'none' } )"
#define SEAT_QCOW                \
	"( { layer = 'qcow' }, " \
	"{ layer = 'file'; path = 'disk.qcow2'; sync = 'none' } )"

static inline unsigned long seat_kills_wanted(unsigned long by_default)
{
	const char *given = getenv("JOURNAL_KILLS");

	return given ? strtoul(given, NULL, 0) : by_default;
}

static inline void seat_make_file(void)
{
	int fd = open("disk", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	require(fd >= 0 && !ftruncate(fd, SEAT_DISK_BYTES));
	close(fd);
}

static inline void seat_make_qcow(void)
{
	char command[200];

	snprintf(command, sizeof(command),
		"qemu-img create -q -f qcow2 -o cluster_size=%u disk.qcow2 %u",
		4096U << test_random(5), SEAT_DISK_BYTES);
	ck_assert_int_eq(system(command), 0);
}

/* Leaked clusters are allowed. */
static inline void seat_check_qcow(void)
{
	int status = system("qemu-img check -f qcow2 disk.qcow2 >check.log 2>&1");

	if (status && status != 3 << 8) {
		ck_assert_int_eq(system("cat check.log >&2"), 0);
		ck_abort_msg("qemu-img check: status 0x%x", status);
	}
}
