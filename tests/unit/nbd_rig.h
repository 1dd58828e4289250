/*
 * What the NBD tests share: a server with two memory disks, and a client that speaks the protocol byte
 * by byte over blocking sockets on the test's thread. The server and the first disk have one reactor thread,
 * the second disk has another.
 *
 * A test that waits for a byte that never comes fails after a generous time instead of hanging. At its end
 * the server must have given back every descriptor (rig_stop()); what loops a thousand times looks at
 * the memory, too (struct rig_footprint).
 */
#pragma once

#include <check.h>
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"
#include "blk/blk.h"
#include "nbd/conn.h"
#include "nbd/handshake.h"
#include "nbd/proto.h"
#include "nbd/server.h"
#include "rt/reactor.h"

#include "conf_build.h"
#include "seed.h"
#include "testing.h"

#define RIG_WAIT_MS 300000
#define RIG_EXPORTS 2
#define RIG_SIZE    (8U << 20)
#ifndef RIG_FIRST_SIZE /* of the first export; the second one has twice RIG_SIZE */
#define RIG_FIRST_SIZE RIG_SIZE
#endif

struct rig_export {
	struct nbd_export nbd;
	struct blk_env *env;
	struct conf *stack;
	struct blk *top;
};

struct rig {
	pthread_t thread, second_thread;
	struct reactor *reactor, *second_reactor;
	struct blk_env env;
	struct nbd_server server;
	struct nbd_limits limits;
	const char *upper_layers; /* of the first export */
	struct rig_export exports[RIG_EXPORTS];
	struct co_group clients;
	uint64_t visitor_id;    /* of clients with a handshake */
	struct nbd_trace trace; /* of all clients; its `line` must be set before it is on */
	int last_ret;           /* of the client that left last */
	unsigned fds_before;    /* when the server is gone, as many are open */
};

/* --- what is held -------------------------------------------------------------------------------- */

/* What the whole process holds. The sanitizers' allocator does not tell: there the heap is always empty. */
struct rig_footprint {
	unsigned fds;
	size_t heap_bytes;
};

static inline struct rig_footprint rig_footprint(void)
{
	return (struct rig_footprint){ count_open_files(), mallinfo2().uordblks };
}

/* Pools come and go by some 100 KiB, however long it runs; a connection left behind has 64. */
#define RIG_HEAP_SLACK_BYTES (1U << 20)

static inline void rig_expect_footprint(struct rig_footprint before)
{
	struct rig_footprint now = rig_footprint();

	ck_assert_uint_eq(now.fds, before.fds);
	ck_assert_uint_le(now.heap_bytes, before.heap_bytes + RIG_HEAP_SLACK_BYTES);
}

/* --- running things on the server's thread ---------------------------------------------------- */

struct rig_call {
	struct task task;
	co_fn *fn;
	void *arg;
	sem_t done;
};

static suspends void rig_call_run(void *arg)
{
	struct rig_call *call = arg;

	call->fn(call->arg);
	sem_post(&call->done);
}

static void rig_call_start(struct task *task)
{
	co_start(rig_call_run, container_of(task, struct rig_call, task));
}

/* Runs fn(arg) as a coroutine on the server's reactor and waits for its end. */
static inline void rig_run(struct rig *rig, co_fn *fn, void *arg)
{
	struct rig_call call = { .fn = fn, .arg = arg };

	task_init(&call.task, rig_call_start);
	sem_init(&call.done, 0, 0);
	reactor_post(rig->reactor, &call.task);
	while (sem_wait(&call.done))
		;
	sem_destroy(&call.done);
}

/* --- starting and stopping -------------------------------------------------------------------- */

static void *rig_thread(void *arg)
{
	reactor_run(arg);
	return NULL;
}

static suspends void rig_open_disk(void *arg)
{
	struct rig_export *export = arg;
	struct err err;

	ck_assert_msg(
		!stack_open(export->stack, export->env, false, &export->top, &err), "%s", err.text);
}

static suspends void rig_close_disk(void *arg)
{
	struct rig_export *export = arg;

	ck_assert(list_empty(&export->nbd.conns));
	stack_close(export->top);
}

static suspends void rig_open(void *arg)
{
	struct rig *rig = arg;
	static const char *const names[RIG_EXPORTS] = { "first", "second" };
	struct err err;

	nbd_server_init(&rig->server, &rig->limits);
	co_group_init(&rig->clients);
	for (int i = 0; i < RIG_EXPORTS; i++) {
		struct rig_export *export = &rig->exports[i];
		struct reactor *home = i ? rig->second_reactor : rig->reactor;

		export->env = &rig->env;
		export->stack = conf_build("( %s { layer = 'memory'; size = %llu; } )",
			i ? "" : rig->upper_layers,
			(unsigned long long)(i ? 2 * RIG_SIZE : RIG_FIRST_SIZE));
		co_call_on(home, rig_open_disk, export);
		nbd_export_init(&export->nbd, names[i], i ? NULL : "a disk of memory", export->top,
			home, false);
		ck_assert_msg(!nbd_publish(&rig->server, &export->nbd, &err), "%s", err.text);
	}
}

static suspends void rig_close(void *arg)
{
	struct rig *rig = arg;

	for (int i = 0; i < RIG_EXPORTS; i++)
		nbd_withdraw(&rig->exports[i].nbd, 0);
	nbd_server_close(&rig->server, 0);
	co_group_wait(&rig->clients);
	for (int i = 0; i < RIG_EXPORTS; i++) {
		co_call_on(rig->exports[i].nbd.home, rig_close_disk, &rig->exports[i]);
		conf_free(rig->exports[i].stack);
	}
}

/* limits: NULL for the default ones; upper_layers: of the first export, as text; NULL for none. */
static inline void rig_start(
	struct rig *rig, const struct nbd_limits *limits, const char *upper_layers)
{
	struct err err;

	memset(rig, 0, sizeof(*rig));
	rig->limits = limits ? *limits : nbd_limits_default;
	rig->upper_layers = upper_layers ? upper_layers : "";
	signal(SIGPIPE, SIG_IGN);
	rig->fds_before = count_open_files();
	ck_assert_int_eq(blk_env_init(&rig->env), 0);
	ck_assert_msg(!reactor_create(&rig->reactor, "auto", &err), "%s", err.text);
	ck_assert_msg(!reactor_create(&rig->second_reactor, "auto", &err), "%s", err.text);
	ck_assert(!pthread_create(&rig->thread, NULL, rig_thread, rig->reactor));
	ck_assert(!pthread_create(&rig->second_thread, NULL, rig_thread, rig->second_reactor));
	rig_run(rig, rig_open, rig);
}

/* The test has closed all its clients. */
static inline void rig_stop(struct rig *rig)
{
	rig_run(rig, rig_close, rig);
	reactor_stop(rig->reactor);
	reactor_stop(rig->second_reactor);
	pthread_join(rig->thread, NULL);
	pthread_join(rig->second_thread, NULL);
	reactor_free(rig->reactor);
	reactor_free(rig->second_reactor);
	blk_env_fini(&rig->env);
	ck_assert_uint_eq(count_open_files(), rig->fds_before);
}

/* --- connecting ------------------------------------------------------------------------------- */

struct rig_client {
	struct rig *rig;
	struct nbd_export *export; /* NULL: handshake first */
	struct nbd_session session;
};

static suspends void rig_client_run(void *arg)
{
	struct rig_client client = *(struct rig_client *)arg;
	struct rig *rig = client.rig;

	const struct nbd_visitor visitor = {
		.peer = "test", .id = rig->visitor_id, .trace = &rig->trace
	};

	rig->last_ret = client.export ? nbd_serve(client.export, &client.session)
				      : nbd_client(&rig->server, client.session.fd, &visitor);
}

static suspends void rig_client_start(void *arg)
{
	struct rig_client *client = arg;

	co_group_start(&client->rig->clients, rig_client_run, client);
}

/* A client that has sent data already when the server sees it: no time limit of the server's can pass before. */
static inline int rig_connect_with(struct rig *rig, struct nbd_export *export,
	struct nbd_session session, const void *data, size_t len)
{
	struct rig_client client = { .rig = rig, .export = export, .session = session };
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	ck_assert_int_eq(send(fds[0], data, len, MSG_NOSIGNAL), (ssize_t)len);
	client.session.fd = fds[1];
	client.session.limits = &rig->limits;
	client.session.peer = "test";
	client.session.trace = &rig->trace;
	rig_run(rig, rig_client_start, &client);
	return fds[0];
}

static inline int rig_connect_as(
	struct rig *rig, struct nbd_export *export, struct nbd_session session)
{
	return rig_connect_with(rig, export, session, NULL, 0);
}

static inline int rig_connect_to(struct rig *rig, struct nbd_export *export, bool read_only)
{
	return rig_connect_as(rig, export, (struct nbd_session){ .read_only = read_only });
}

/* A client before its handshake. */
static inline int rig_connect(struct rig *rig)
{
	return rig_connect_to(rig, NULL, false);
}

/* A client in transmission. */
static inline int rig_serve(struct rig *rig)
{
	return rig_connect_to(rig, &rig->exports[0].nbd, false);
}

static suspends void rig_wait_clients(void *arg)
{
	struct rig *rig = arg;

	co_group_wait(&rig->clients);
}

/* The same; it has sent data already. */
static inline int rig_serve_with(struct rig *rig, const void *data, size_t len)
{
	return rig_connect_with(rig, &rig->exports[0].nbd, (struct nbd_session){ 0 }, data, len);
}

/* Until every client has left; the result of the last one. */
static inline int rig_all_left(struct rig *rig)
{
	rig_run(rig, rig_wait_clients, rig);
	return rig->last_ret;
}

/* --- bytes ------------------------------------------------------------------------------------ */

static inline void rig_send(int fd, const void *data, size_t len)
{
	while (len) {
		ssize_t sent = send(fd, data, len, MSG_NOSIGNAL);

		ck_assert_msg(sent > 0, "send: %s", strerror(errno));
		data = (const char *)data + sent;
		len -= (size_t)sent;
	}
}

/* At most len bytes; 0 at the end. */
static inline size_t rig_recv_some(int fd, void *data, size_t len)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };

	ck_assert_msg(poll(&pollfd, 1, RIG_WAIT_MS) == 1, "nothing came in time");
	ssize_t got = recv(fd, data, len, 0);
	return got < 0 ? 0 : (size_t)got;
}

static inline void rig_recv(int fd, void *data, size_t len)
{
	while (len) {
		size_t got = rig_recv_some(fd, data, len);

		ck_assert_msg(got, "the server closed with %zu bytes missing", len);
		data = (char *)data + got;
		len -= got;
	}
}

/* The server closes and sends nothing more. */
static inline void rig_expect_end(int fd)
{
	char byte;

	ck_assert_msg(!rig_recv_some(fd, &byte, 1), "a byte instead of the end");
	close(fd);
}

/* --- handshake -------------------------------------------------------------------------------- */

static inline void rig_greet(int fd, uint32_t client_flags)
{
	struct nbd_greeting greeting;
	be32 flags = be32_make(client_flags);

	rig_recv(fd, &greeting, sizeof(greeting));
	ck_assert_uint_eq(be64_get(greeting.magic), NBD_MAGIC);
	ck_assert_uint_eq(be64_get(greeting.option_magic), NBD_OPTION_MAGIC);
	ck_assert_uint_eq(be16_get(greeting.flags), NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
	rig_send(fd, &flags, sizeof(flags));
}

static inline void rig_option_header(int fd, uint32_t option, uint32_t len)
{
	struct nbd_option_header header = {
		.magic = be64_make(NBD_OPTION_MAGIC),
		.option = be32_make(option),
		.len = be32_make(len),
	};

	rig_send(fd, &header, sizeof(header));
}

static inline void rig_option(int fd, uint32_t option, const void *data, uint32_t len)
{
	rig_option_header(fd, option, len);
	rig_send(fd, data, len);
}

/* Receives a reply to option and returns its type; its data, at most size bytes of it, lands in data. */
static inline uint32_t rig_option_reply(
	int fd, uint32_t option, void *data, size_t size, uint32_t *len)
{
	struct nbd_option_reply reply;
	char dummy[NBD_STRING_MAX_BYTES * 2 + 64];

	rig_recv(fd, &reply, sizeof(reply));
	ck_assert_uint_eq(be64_get(reply.magic), NBD_OPTION_REPLY_MAGIC);
	ck_assert_uint_eq(be32_get(reply.option), option);
	uint32_t reply_len = be32_get(reply.len);
	ck_assert_uint_le(reply_len, sizeof(dummy));
	rig_recv(fd, dummy, reply_len);
	if (data)
		memcpy(data, dummy, MIN((size_t)reply_len, size));
	if (len)
		*len = reply_len;
	return be32_get(reply.type);
}

/* The data of INFO and GO; returns its length. */
static inline uint32_t rig_info_data(
	uint8_t *data, const char *name, const uint16_t *infos, unsigned count)
{
	be32 name_len = be32_make((uint32_t)strlen(name));
	uint8_t *end = data;

	memcpy(end, &name_len, sizeof(name_len));
	end += sizeof(name_len);
	memcpy(end, name, strlen(name));
	end += strlen(name);
	for (unsigned i = 0; i <= count; i++) {
		be16 field = be16_make(i ? infos[i - 1] : (uint16_t)count);

		memcpy(end, &field, sizeof(field));
		end += sizeof(field);
	}
	return (uint32_t)(end - data);
}

/* --- transmission ----------------------------------------------------------------------------- */

static inline struct nbd_request_header rig_header(
	uint16_t type, uint16_t flags, uint64_t cookie, uint64_t off, uint32_t len)
{
	return (struct nbd_request_header){
		.magic = be32_make(NBD_REQUEST_MAGIC),
		.flags = be16_make(flags),
		.type = be16_make(type),
		.cookie = be64_make(cookie),
		.off = be64_make(off),
		.len = be32_make(len),
	};
}

static inline void rig_request(
	int fd, uint16_t type, uint16_t flags, uint64_t cookie, uint64_t off, uint32_t len)
{
	struct nbd_request_header header = rig_header(type, flags, cookie, off, len);

	rig_send(fd, &header, sizeof(header));
}

/* Receives the head of a reply; its error. */
static inline uint32_t rig_any_reply(int fd, uint64_t *cookie)
{
	struct nbd_simple_reply reply;

	rig_recv(fd, &reply, sizeof(reply));
	ck_assert_uint_eq(be32_get(reply.magic), NBD_SIMPLE_REPLY_MAGIC);
	*cookie = be64_get(reply.cookie);
	return be32_get(reply.error);
}

static inline uint32_t rig_reply(int fd, uint64_t expected_cookie)
{
	uint64_t cookie;
	uint32_t error = rig_any_reply(fd, &cookie);

	ck_assert_uint_eq(cookie, expected_cookie);
	return error;
}

/* One request and its reply, without data from the server. */
static inline uint32_t rig_command(
	int fd, uint16_t type, uint16_t flags, uint64_t off, uint32_t len, const void *payload)
{
	static uint64_t cookie = 0x8000000000000000;

	rig_request(fd, type, flags, ++cookie, off, len);
	if (payload)
		rig_send(fd, payload, len);
	return rig_reply(fd, cookie);
}

static inline void rig_write(int fd, uint64_t off, const void *data, uint32_t len)
{
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_WRITE, 0, off, len, data), NBD_SUCCESS);
}

static inline void rig_read(int fd, uint64_t off, void *data, uint32_t len)
{
	ck_assert_uint_eq(rig_command(fd, NBD_CMD_READ, 0, off, len, NULL), NBD_SUCCESS);
	rig_recv(fd, data, len);
}

/* The connection is in order and between two requests: a write that is read back. */
static inline void rig_expect_alive(int fd)
{
	static uint32_t count;
	uint32_t there = 0x5eed0000 + count++, back = 0;

	rig_write(fd, RIG_SIZE - 4096, &there, sizeof(there));
	rig_read(fd, RIG_SIZE - 4096, &back, sizeof(back));
	ck_assert_uint_eq(back, there);
}

static inline void rig_disconnect(int fd)
{
	rig_request(fd, NBD_CMD_DISC, 0, 0, 0, 0);
	rig_expect_end(fd);
}
