/*
 * nbdload: a load generator for NBD servers that costs so little that the server is the bottleneck.
 *
 * One thread drives all connections.  Per wake-up of a connection it does one large receive,
 * accounts every reply in it, and sends one batch with a new request for each, so that `depth`
 * requests stay in flight per connection.  A single connection blocks in recv(); several share an
 * epoll.  Payloads are received into one small buffer that stays in the processor's cache, and
 * sent from one.  Time is read once per receive, never per request.
 *
 * Every reply is checked: magic, cookie (slot and generation: a reply twice, or to nothing, is
 * fatal) and error (counted).  The contents of what is read are not looked at.
 *
 * The figures cover a window: after the warm-up, until `seconds` later.  Then the requests in
 * flight are waited for, and the result is printed as one line of JSON.  Sends block: a server
 * that stops reading while it waits to send would stop us both, and is reported as a stall.
 */
#include "client.h"
#include "cpu.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	RECEIVE_BYTES = 256 * 1024, /* fits the second-level cache */
	CONNS_MAX = 1024,
	DEPTH_MAX = 4096,
	BLOCK_MAX = 32 << 20, /* what servers accept without being asked */
	HIST_SUB_BITS = 5,    /* 32 steps per power of two: 3 % resolution */
	HIST_SUBS = 1 << HIST_SUB_BITS,
	HIST_BUCKETS = HIST_SUBS * (64 - HIST_SUB_BITS + 1),
	DEFAULT_WAIT_MS = 5000,
};

enum pattern { RANDREAD, RANDWRITE, SEQREAD, SEQWRITE, PATTERN_COUNT };

static const char *const pattern_names[] = { "randread", "randwrite", "seqread", "seqwrite" };

struct options {
	const char *addr;
	const char *export_name;
	enum pattern pattern;
	uint32_t block_bytes;
	unsigned int depth;
	unsigned int conns;
	double seconds;
	unsigned int warmup_ms;
	unsigned int wait_ms;
	uint64_t span_bytes; /* 0: the whole export */
	uint64_t count;      /* end after so many requests; 0: no limit */
	uint64_t seed;
	unsigned int flush_every; /* a flush after so many requests; 0: never */
	pid_t server_pid;         /* 0: do not measure */
};

struct slot {
	uint64_t sent_ns;
	uint32_t generation;
	bool in_flight;
	enum client_command command;
};

struct conn {
	struct client client;
	struct slot *slots; /* [depth] */
	unsigned int *free; /* stack of free slots' indices */
	unsigned int free_count;
	uint64_t random;
	uint64_t first_block; /* sequential patterns: each connection has a region of its own */
	uint64_t end_block;
	uint64_t next_block;
	unsigned int since_flush;
	uint8_t head[CLIENT_REPLY_BYTES]; /* of the reply being received */
	unsigned int head_len;
	uint64_t payload_left_bytes;
	struct slot *payload_slot;
};

struct totals {
	uint64_t requests;
	uint64_t flushes;
	uint64_t errors;
	uint64_t hist[HIST_BUCKETS]; /* latencies in nanoseconds, flushes left out */
};

struct load {
	struct options opt;
	struct conn *conns;
	int epoll_fd;
	uint64_t issued;
	unsigned int in_flight;
	bool stopping;
	struct totals totals;
	uint8_t *requests; /* headers of one batch: [depth][CLIENT_REQUEST_BYTES] */
	struct iovec *iov; /* [2 * depth] */
	uint8_t *payload;  /* what writes write: [block_bytes] */
	uint8_t *receive;  /* [RECEIVE_BYTES] */
	unsigned int first_error;
};

struct window {
	uint64_t start_ns;
	uint64_t end_ns;
	uint64_t client_cpu_ns;
	uint64_t server_cpu_ns;
};

static uint64_t next_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15U); /* splitmix64 */

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
	return z ^ (z >> 31);
}

static unsigned int hist_bucket(uint64_t value)
{
	unsigned int shift;

	if (value < HIST_SUBS)
		return (unsigned int)value;
	shift = 63 - (unsigned int)__builtin_clzll(value) - HIST_SUB_BITS;
	return (shift + 1) * HIST_SUBS + (unsigned int)(value >> shift) - HIST_SUBS;
}

/* The lowest value that falls into the bucket. */
static uint64_t hist_value(unsigned int bucket)
{
	if (bucket < HIST_SUBS)
		return bucket;
	return (uint64_t)(HIST_SUBS + bucket % HIST_SUBS) << (bucket / HIST_SUBS - 1);
}

static double hist_percentile_us(const struct totals *totals, double share)
{
	uint64_t wanted = (uint64_t)((double)totals->requests * share);
	uint64_t seen = 0;

	for (unsigned int i = 0; i < HIST_BUCKETS; i++) {
		seen += totals->hist[i];
		if (seen > wanted)
			return (double)hist_value(i) / 1000;
	}
	return 0;
}

static bool is_random(enum pattern pattern)
{
	return pattern == RANDREAD || pattern == RANDWRITE;
}

static bool is_write(enum pattern pattern)
{
	return pattern == RANDWRITE || pattern == SEQWRITE;
}

static uint64_t next_offset(const struct options *opt, struct conn *conn)
{
	uint64_t blocks = conn->end_block - conn->first_block;
	uint64_t block;

	if (is_random(opt->pattern)) {
		/* Scales 32 random bits; there are at most 2^32 blocks, see limit_span(). */
		block = ((next_random(&conn->random) >> 32) * blocks) >> 32;
		return (conn->first_block + block) * opt->block_bytes;
	}
	block = conn->next_block++;
	if (conn->next_block == conn->end_block)
		conn->next_block = conn->first_block;
	return block * opt->block_bytes;
}

static enum client_command next_command(const struct options *opt, struct conn *conn)
{
	if (opt->flush_every && conn->since_flush == opt->flush_every) {
		conn->since_flush = 0;
		return CLIENT_FLUSH;
	}
	conn->since_flush++;
	return is_write(opt->pattern) ? CLIENT_WRITE : CLIENT_READ;
}

static bool may_issue(const struct load *load)
{
	return !load->stopping && (!load->opt.count || load->issued < load->opt.count);
}

static void send_batch(struct conn *conn, struct iovec *iov, size_t iov_count)
{
	while (iov_count > 0) {
		struct msghdr msg = {
			.msg_iov = iov,
			.msg_iovlen = iov_count < IOV_MAX ? iov_count : IOV_MAX,
		};
		ssize_t n = sendmsg(conn->client.fd, &msg, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			die("send: %s", errno == EAGAIN ? "the server stalled" : strerror(errno));
		while (iov_count > 0 && (size_t)n >= iov->iov_len) {
			n -= (ssize_t)iov->iov_len;
			iov++;
			iov_count--;
		}
		if (iov_count > 0) {
			iov->iov_base = (uint8_t *)iov->iov_base + n;
			iov->iov_len -= (size_t)n;
		}
	}
}

/* Put a request into every free slot and send them all at once. */
static void issue(struct load *load, struct conn *conn, uint64_t time_ns)
{
	const struct options *opt = &load->opt;
	uint8_t *request = load->requests;
	struct iovec *iov = load->iov;

	while (conn->free_count > 0 && may_issue(load)) {
		unsigned int index = conn->free[--conn->free_count];
		struct slot *slot = &conn->slots[index];
		enum client_command command = next_command(opt, conn);
		uint64_t offset = command == CLIENT_FLUSH ? 0 : next_offset(opt, conn);
		uint32_t len_bytes = command == CLIENT_FLUSH ? 0 : opt->block_bytes;

		slot->sent_ns = time_ns;
		slot->generation++;
		slot->in_flight = true;
		slot->command = command;
		client_encode(request, command, (uint64_t)slot->generation << 32 | index, offset,
			len_bytes);
		*iov++ = (struct iovec){ request, CLIENT_REQUEST_BYTES };
		if (command == CLIENT_WRITE)
			*iov++ = (struct iovec){ load->payload, len_bytes };
		request += CLIENT_REQUEST_BYTES;
		load->issued++;
		load->in_flight++;
	}
	if (is_write(opt->pattern)) {
		send_batch(conn, load->iov, (size_t)(iov - load->iov));
	} else if (request != load->requests) {
		struct iovec all = { load->requests, (size_t)(request - load->requests) };

		send_batch(conn, &all, 1);
	}
}

static void finish(struct load *load, struct conn *conn, struct slot *slot, uint64_t time_ns)
{
	slot->in_flight = false;
	conn->free[conn->free_count++] = (unsigned int)(slot - conn->slots);
	load->in_flight--;
	if (slot->command == CLIENT_FLUSH) {
		load->totals.flushes++;
		return;
	}
	load->totals.requests++;
	load->totals.hist[hist_bucket(time_ns - slot->sent_ns)]++;
}

/* A whole reply header is in conn->head. */
static void take_reply(struct load *load, struct conn *conn, uint64_t time_ns)
{
	uint32_t magic = get_be32(conn->head);
	uint32_t error = get_be32(conn->head + 4);
	uint64_t cookie = get_be64(conn->head + 8);
	uint32_t index = (uint32_t)cookie;
	struct slot *slot;

	if (magic != CLIENT_REPLY_MAGIC)
		die("reply with magic 0x%08x: the stream is out of step", magic);
	if (index >= load->opt.depth)
		die("reply with cookie 0x%016llx, which was never sent",
			(unsigned long long)cookie);
	slot = &conn->slots[index];
	if (!slot->in_flight || slot->generation != cookie >> 32)
		die("second reply to cookie 0x%016llx", (unsigned long long)cookie);
	if (error) {
		load->totals.errors++;
		load->first_error = load->first_error ? load->first_error : error;
	}
	if (!error && slot->command == CLIENT_READ) {
		conn->payload_left_bytes = load->opt.block_bytes;
		conn->payload_slot = slot;
		return;
	}
	finish(load, conn, slot, time_ns);
}

static void parse(
	struct load *load, struct conn *conn, const uint8_t *at, size_t len_bytes, uint64_t time_ns)
{
	while (len_bytes > 0) {
		size_t n;

		if (conn->payload_left_bytes > 0) {
			n = len_bytes < conn->payload_left_bytes ? len_bytes
								 : conn->payload_left_bytes;
			conn->payload_left_bytes -= n;
			if (conn->payload_left_bytes == 0)
				finish(load, conn, conn->payload_slot, time_ns);
		} else {
			n = CLIENT_REPLY_BYTES - conn->head_len;
			n = len_bytes < n ? len_bytes : n;
			memcpy(conn->head + conn->head_len, at, n);
			conn->head_len += (unsigned int)n;
			if (conn->head_len == CLIENT_REPLY_BYTES) {
				conn->head_len = 0;
				take_reply(load, conn, time_ns);
			}
		}
		at += n;
		len_bytes -= n;
	}
}

/* One receive, and new requests for what it completed.  Returns the time it happened. */
static uint64_t serve(struct load *load, struct conn *conn)
{
	ssize_t n;
	uint64_t time_ns;

	do
		n = recv(conn->client.fd, load->receive, RECEIVE_BYTES, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		die("receive: %s", errno == EAGAIN ? "the server stalled" : strerror(errno));
	if (n == 0)
		die("the server closed the connection with %u requests in flight", load->in_flight);
	time_ns = now_ns();
	parse(load, conn, load->receive, (size_t)n, time_ns);
	issue(load, conn, time_ns);
	return time_ns;
}

/* Serve every connection that has something for us, once.  Returns the time afterwards. */
static uint64_t turn(struct load *load)
{
	struct epoll_event events[64];
	uint64_t time_ns = 0;
	int n;

	if (load->opt.conns == 1)
		return serve(load, &load->conns[0]);
	do
		n = epoll_wait(load->epoll_fd, events, 64, CLIENT_STALL_S * 1000);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		die("epoll_wait: %s", strerror(errno));
	if (n == 0)
		die("the server stalled with %u requests in flight", load->in_flight);
	for (int i = 0; i < n; i++)
		time_ns = serve(load, events[i].data.ptr);
	return time_ns;
}

static uint64_t own_cpu_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000U + (uint64_t)ts.tv_nsec;
}

static uint64_t run_until(struct load *load, uint64_t end_ns)
{
	uint64_t time_ns = now_ns();

	while (time_ns < end_ns && load->in_flight > 0)
		time_ns = turn(load);
	return time_ns;
}

static void run(struct load *load, struct window *window)
{
	const struct options *opt = &load->opt;
	struct cpu_sample before = { 0 };
	struct cpu_sample after = { 0 };
	uint64_t start_ns = now_ns();

	for (unsigned int i = 0; i < opt->conns; i++)
		issue(load, &load->conns[i], start_ns);
	run_until(load, start_ns + (uint64_t)opt->warmup_ms * 1000000U);

	if (opt->server_pid)
		cpu_sample_take(&before, opt->server_pid);
	load->totals = (struct totals){ 0 };
	window->client_cpu_ns = own_cpu_ns();
	window->start_ns = now_ns();
	window->end_ns = run_until(load, window->start_ns + (uint64_t)(opt->seconds * 1e9));
	window->client_cpu_ns = own_cpu_ns() - window->client_cpu_ns;
	if (opt->server_pid) {
		cpu_sample_take(&after, opt->server_pid);
		window->server_cpu_ns = cpu_sample_delta_ns(&before, &after);
	}
}

/* Wait for what is in flight, so that the server is left in good order; not counted. */
static void drain(struct load *load)
{
	const struct totals measured = load->totals;
	uint64_t errors;

	load->stopping = true;
	while (load->in_flight > 0)
		turn(load);
	errors = load->totals.errors;
	load->totals = measured;
	load->totals.errors = errors;
	for (unsigned int i = 0; i < load->opt.conns; i++)
		client_close(&load->conns[i].client);
}

static void report(const struct load *load, const struct window *window)
{
	const struct options *opt = &load->opt;
	const struct totals *totals = &load->totals;
	double seconds = (double)(window->end_ns - window->start_ns) / 1e9;
	double requests = (double)totals->requests;

	if (totals->requests == 0)
		die("no request ended within the window");
	printf("{\"pattern\": \"%s\", \"bs\": %u, \"depth\": %u, \"conns\": %u, \"seed\": %llu, "
	       "\"seconds\": %.6f, \"requests\": %llu, \"flushes\": %llu, \"errors\": %llu, "
	       "\"first_error\": %u, ",
		pattern_names[opt->pattern], opt->block_bytes, opt->depth, opt->conns,
		(unsigned long long)opt->seed, seconds, (unsigned long long)totals->requests,
		(unsigned long long)totals->flushes, (unsigned long long)totals->errors,
		load->first_error);
	printf("\"iops\": %.1f, \"mb_per_s\": %.2f, \"p50_us\": %.1f, \"p99_us\": %.1f, ",
		(double)totals->requests / seconds,
		(double)totals->requests * opt->block_bytes / seconds / 1e6,
		hist_percentile_us(totals, 0.50), hist_percentile_us(totals, 0.99));
	if (opt->server_pid)
		printf("\"server_cpu_us\": %.4f, \"server_busy\": %.3f, ",
			(double)window->server_cpu_ns / 1000 / requests,
			(double)window->server_cpu_ns / 1e9 / seconds);
	printf("\"client_cpu_us\": %.4f, \"client_busy\": %.3f}\n",
		(double)window->client_cpu_ns / 1000 / requests,
		(double)window->client_cpu_ns / 1e9 / seconds);
}

static void *allocate(size_t count, size_t size_bytes)
{
	void *memory = calloc(count, size_bytes);

	if (!memory)
		die("out of memory");
	return memory;
}

static void open_conn(struct load *load, unsigned int index)
{
	const struct options *opt = &load->opt;
	struct conn *conn = &load->conns[index];
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = conn };

	client_open(&conn->client, opt->addr, opt->export_name, opt->wait_ms);
	if (is_write(opt->pattern) && (conn->client.flags & CLIENT_FLAG_READ_ONLY))
		die("export \"%s\" is read-only", opt->export_name);
	if (opt->flush_every && !(conn->client.flags & CLIENT_FLAG_SEND_FLUSH))
		die("export \"%s\" does not offer flush", opt->export_name);
	if (epoll_ctl(load->epoll_fd, EPOLL_CTL_ADD, conn->client.fd, &event) < 0)
		die("epoll_ctl: %s", strerror(errno));
	conn->slots = allocate(opt->depth, sizeof(*conn->slots));
	conn->free = allocate(opt->depth, sizeof(*conn->free));
	while (conn->free_count < opt->depth) {
		conn->free[conn->free_count] = conn->free_count;
		conn->free_count++;
	}
	conn->random = opt->seed + index * 0x632be59bd9b4e019U;
}

/* Give every connection its blocks: all of them, or for sequential patterns an equal share. */
static void limit_span(struct load *load)
{
	const struct options *opt = &load->opt;
	uint64_t size_bytes = load->conns[0].client.size_bytes;
	uint64_t span_bytes = opt->span_bytes ? opt->span_bytes : size_bytes;
	uint64_t blocks = span_bytes / opt->block_bytes;
	uint64_t share = is_random(opt->pattern) ? blocks : blocks / opt->conns;

	if (span_bytes > size_bytes)
		die("--span: the export has only %llu bytes", (unsigned long long)size_bytes);
	if (share == 0)
		die("the span of %llu bytes is too small", (unsigned long long)span_bytes);
	if (blocks > UINT32_MAX)
		die("the span of %llu bytes has more than 2^32 blocks",
			(unsigned long long)span_bytes);
	for (unsigned int i = 0; i < opt->conns; i++) {
		struct conn *conn = &load->conns[i];

		conn->first_block = is_random(opt->pattern) ? 0 : i * share;
		conn->end_block = conn->first_block + share;
		conn->next_block = conn->first_block;
	}
}

static void load_init(struct load *load)
{
	const struct options *opt = &load->opt;
	uint64_t random = opt->seed;

	load->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (load->epoll_fd < 0)
		die("epoll_create1: %s", strerror(errno));
	load->conns = allocate(opt->conns, sizeof(*load->conns));
	load->requests = allocate(opt->depth, CLIENT_REQUEST_BYTES);
	load->iov = allocate(2 * (size_t)opt->depth, sizeof(*load->iov));
	load->payload = allocate(1, opt->block_bytes);
	load->receive = allocate(1, RECEIVE_BYTES);
	for (uint32_t i = 0; i < opt->block_bytes; i++)
		load->payload[i] = (uint8_t)next_random(&random);
	for (unsigned int i = 0; i < opt->conns; i++)
		open_conn(load, i);
	limit_span(load);
}

static void load_fini(struct load *load)
{
	for (unsigned int i = 0; i < load->opt.conns; i++) {
		free(load->conns[i].slots);
		free(load->conns[i].free);
	}
	free(load->conns);
	free(load->requests);
	free(load->iov);
	free(load->payload);
	free(load->receive);
	close(load->epoll_fd);
}

enum option_id {
	OPT_CONNECT = 1,
	OPT_EXPORT,
	OPT_PATTERN,
	OPT_BS,
	OPT_DEPTH,
	OPT_CONNS,
	OPT_SECONDS,
	OPT_WARMUP_MS,
	OPT_WAIT_MS,
	OPT_SPAN,
	OPT_COUNT,
	OPT_SEED,
	OPT_FLUSH_EVERY,
	OPT_SERVER_PID,
	OPT_HELP,
};

static const struct option option_table[] = {
	{ "connect", required_argument, NULL, OPT_CONNECT },
	{ "export", required_argument, NULL, OPT_EXPORT },
	{ "pattern", required_argument, NULL, OPT_PATTERN },
	{ "bs", required_argument, NULL, OPT_BS },
	{ "depth", required_argument, NULL, OPT_DEPTH },
	{ "conns", required_argument, NULL, OPT_CONNS },
	{ "seconds", required_argument, NULL, OPT_SECONDS },
	{ "warmup-ms", required_argument, NULL, OPT_WARMUP_MS },
	{ "wait-ms", required_argument, NULL, OPT_WAIT_MS },
	{ "span", required_argument, NULL, OPT_SPAN },
	{ "count", required_argument, NULL, OPT_COUNT },
	{ "seed", required_argument, NULL, OPT_SEED },
	{ "flush-every", required_argument, NULL, OPT_FLUSH_EVERY },
	{ "server-pid", required_argument, NULL, OPT_SERVER_PID },
	{ "help", no_argument, NULL, OPT_HELP },
	{ 0 },
};

static const char usage[] =
	"Usage: nbdload --connect PATH|HOST:PORT [OPTION...]\n"
	"Load an NBD export and print the figures as one line of JSON.\n"
	"\n"
	"  --connect ADDR     path of a unix socket, or HOST:PORT\n"
	"  --export NAME      export to use (default: the empty name)\n"
	"  --pattern NAME     randread, randwrite, seqread or seqwrite (default randread)\n"
	"  --bs SIZE          bytes per request (default 4K)\n"
	"  --depth N          requests in flight per connection (default 1)\n"
	"  --conns N          connections (default 1)\n"
	"  --seconds S        length of the measured window (default 1)\n"
	"  --warmup-ms MS     load before the window (default 100)\n"
	"  --wait-ms MS       time a server may take to appear (default 5000)\n"
	"  --span SIZE        use only the export's first SIZE bytes\n"
	"  --count N          end after N requests, warm-up included\n"
	"  --flush-every N    one flush after every N requests of a connection\n"
	"  --seed N           seed of offsets and of written bytes (default 1)\n"
	"  --server-pid PID   also report the processor time of PID and its children\n"
	"\n"
	"The exit status is 0 when every reply was well-formed and free of errors.\n";

static enum pattern parse_pattern(const char *text)
{
	for (int i = 0; i < PATTERN_COUNT; i++)
		if (strcmp(text, pattern_names[i]) == 0)
			return (enum pattern)i;
	die("--pattern: \"%s\" is not one of randread, randwrite, seqread, seqwrite", text);
}

static uint64_t parse_range(const char *what, const char *text, uint64_t min, uint64_t max)
{
	uint64_t value = parse_size(what, text);

	if (value < min || value > max)
		die("--%s: %s is outside %llu to %llu", what, text, (unsigned long long)min,
			(unsigned long long)max);
	return value;
}

static double parse_seconds(const char *text)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value > 0 && value <= 86400))
		die("--seconds: \"%s\" is not a time in seconds", text);
	return value;
}

static void apply_option(struct options *opt, enum option_id id, const char *name, const char *text)
{
	switch (id) {
	case OPT_CONNECT:
		opt->addr = text;
		break;
	case OPT_EXPORT:
		opt->export_name = text;
		break;
	case OPT_PATTERN:
		opt->pattern = parse_pattern(text);
		break;
	case OPT_BS:
		opt->block_bytes = (uint32_t)parse_range(name, text, 1, BLOCK_MAX);
		break;
	case OPT_DEPTH:
		opt->depth = (unsigned int)parse_range(name, text, 1, DEPTH_MAX);
		break;
	case OPT_CONNS:
		opt->conns = (unsigned int)parse_range(name, text, 1, CONNS_MAX);
		break;
	case OPT_SECONDS:
		opt->seconds = parse_seconds(text);
		break;
	case OPT_WARMUP_MS:
		opt->warmup_ms = (unsigned int)parse_range(name, text, 0, UINT32_MAX);
		break;
	case OPT_WAIT_MS:
		opt->wait_ms = (unsigned int)parse_range(name, text, 0, UINT32_MAX);
		break;
	case OPT_SPAN:
		opt->span_bytes = parse_size(name, text);
		break;
	case OPT_COUNT:
		opt->count = parse_size(name, text);
		break;
	case OPT_SEED:
		opt->seed = parse_size(name, text);
		break;
	case OPT_FLUSH_EVERY:
		opt->flush_every = (unsigned int)parse_range(name, text, 0, UINT32_MAX);
		break;
	case OPT_SERVER_PID:
		opt->server_pid = (pid_t)parse_range(name, text, 1, INT_MAX);
		break;
	case OPT_HELP:
		fputs(usage, stdout);
		exit(0);
	}
}

static void parse_options(struct options *opt, int argc, char **argv)
{
	int index;
	int id;

	while ((id = getopt_long(argc, argv, "", option_table, &index)) != -1) {
		if (id == '?')
			exit(1);
		apply_option(opt, (enum option_id)id, option_table[index].name, optarg);
	}
	if (optind < argc)
		die("unexpected argument \"%s\"", argv[optind]);
	if (!opt->addr)
		die("--connect is missing; see --help");
}

int main(int argc, char **argv)
{
	struct load load = {
		.opt = {
			.export_name = "",
			.block_bytes = 4096,
			.depth = 1,
			.conns = 1,
			.seconds = 1,
			.warmup_ms = 100,
			.wait_ms = DEFAULT_WAIT_MS,
			.seed = 1,
		},
	};
	struct window window = { 0 };
	bool failed;

	parse_options(&load.opt, argc, argv);
	load_init(&load);
	run(&load, &window);
	drain(&load);
	report(&load, &window);
	failed = load.totals.errors > 0;
	if (failed)
		fprintf(stderr, "nbdload: %llu requests failed, the first with error %u\n",
			(unsigned long long)load.totals.errors, load.first_error);
	load_fini(&load);
	return failed ? 1 : 0;
}
