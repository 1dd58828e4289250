/*
 * A minimal NBD client: connect, fixed newstyle handshake with NBD_OPT_GO, request headers.
 *
 * It asks for nothing optional (no structured replies, no TLS, no meta contexts), so that every
 * server is measured over the same bytes.  There is no recovery: whatever goes wrong ends the
 * program with a line that says what was expected and what came.
 */
#include "client.h"

#include <endian.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NBD_MAGIC     0x4e42444d41474943ULL /* "NBDMAGIC" */
#define OPTION_MAGIC  0x49484156454f5054ULL /* "IHAVEOPT" */
#define OPTION_REPLY  0x0003e889045565a9ULL
#define REQUEST_MAGIC 0x25609513U

enum {
	FLAG_FIXED_NEWSTYLE = 1 << 0,
	FLAG_NO_ZEROES = 1 << 1,
	OPTION_GO = 7,
	REPLY_ACK = 1,
	REPLY_INFO = 3,
	INFO_EXPORT = 0,
	EXPORT_NAME_MAX = 4096, /* the specification's limit for strings */
	OPTION_DATA_MAX = 4096 + 16,
	RETRY_NS = 20 * 1000,
};

noreturn void die(const char *fmt, ...)
{
	va_list args;

	fprintf(stderr, "%s: ", program_invocation_short_name);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
	exit(1);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000U + (uint64_t)ts.tv_nsec;
}

uint64_t parse_size(const char *what, const char *text)
{
	char *end;
	uint64_t value;
	unsigned int shift = 0;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || text[0] == '-')
		die("--%s: \"%s\" is not a number", what, text);
	if (*end == 'K')
		shift = 10;
	else if (*end == 'M')
		shift = 20;
	else if (*end == 'G')
		shift = 30;
	if (end[shift ? 1 : 0])
		die("--%s: \"%s\": unknown unit (use K, M or G)", what, text);
	if (value > UINT64_MAX >> shift)
		die("--%s: \"%s\" is too large", what, text);
	return value << shift;
}

void put_be16(uint8_t *out, uint16_t value)
{
	value = htobe16(value);
	memcpy(out, &value, sizeof(value));
}

void put_be32(uint8_t *out, uint32_t value)
{
	value = htobe32(value);
	memcpy(out, &value, sizeof(value));
}

void put_be64(uint8_t *out, uint64_t value)
{
	value = htobe64(value);
	memcpy(out, &value, sizeof(value));
}

uint16_t get_be16(const uint8_t *in)
{
	uint16_t value;

	memcpy(&value, in, sizeof(value));
	return be16toh(value);
}

uint32_t get_be32(const uint8_t *in)
{
	uint32_t value;

	memcpy(&value, in, sizeof(value));
	return be32toh(value);
}

uint64_t get_be64(const uint8_t *in)
{
	uint64_t value;

	memcpy(&value, in, sizeof(value));
	return be64toh(value);
}

void client_send(const struct client *client, const void *buf, size_t len_bytes)
{
	const uint8_t *at = buf;

	while (len_bytes > 0) {
		ssize_t n = send(client->fd, at, len_bytes, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			die("send: %s", strerror(errno));
		at += n;
		len_bytes -= (size_t)n;
	}
}

void client_receive(const struct client *client, void *buf, size_t len_bytes)
{
	uint8_t *at = buf;

	while (len_bytes > 0) {
		ssize_t n = recv(client->fd, at, len_bytes, MSG_WAITALL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			die("receive: %s", strerror(errno));
		if (n == 0)
			die("receive: the server closed the connection");
		at += n;
		len_bytes -= (size_t)n;
	}
}

/* One attempt; returns a socket, or -errno. */
static int try_connect(const struct sockaddr *addr, socklen_t addr_len)
{
	int fd = socket(addr->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket: %s", strerror(errno));
	if (connect(fd, addr, addr_len) < 0) {
		int code = errno;

		close(fd);
		return -code;
	}
	return fd;
}

static socklen_t resolve_tcp(const char *addr, struct sockaddr_storage *out)
{
	const struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	const char *colon = strrchr(addr, ':');
	struct addrinfo *found;
	char host[256];
	socklen_t len;
	int code;

	if (!colon || (size_t)(colon - addr) >= sizeof(host))
		die("\"%s\" is neither a path nor HOST:PORT", addr);
	memcpy(host, addr, (size_t)(colon - addr));
	host[colon - addr] = '\0';
	code = getaddrinfo(host, colon + 1, &hints, &found);
	if (code)
		die("%s: %s", addr, gai_strerror(code));
	len = found->ai_addrlen;
	memcpy(out, found->ai_addr, len);
	freeaddrinfo(found);
	return len;
}

static socklen_t resolve(const char *addr, struct sockaddr_storage *out)
{
	struct sockaddr_un local = { .sun_family = AF_UNIX };

	if (!strchr(addr, '/'))
		return resolve_tcp(addr, out);
	if (strlen(addr) >= sizeof(local.sun_path))
		die("%s: too long for a unix socket", addr);
	memcpy(local.sun_path, addr, strlen(addr));
	memcpy(out, &local, sizeof(local));
	return sizeof(local);
}

static int connect_within(const char *addr, unsigned int wait_ms)
{
	const struct timespec pause = { .tv_nsec = RETRY_NS };
	uint64_t deadline_ns = now_ns() + (uint64_t)wait_ms * 1000000U;
	struct sockaddr_storage where;
	socklen_t where_len = resolve(addr, &where);

	for (;;) {
		int fd = try_connect((struct sockaddr *)&where, where_len);

		if (fd >= 0)
			return fd;
		if ((fd != -ENOENT && fd != -ECONNREFUSED && fd != -EAGAIN) ||
			now_ns() >= deadline_ns)
			die("%s: %s", addr, strerror(-fd));
		nanosleep(&pause, NULL);
	}
}

static void set_socket_options(int fd)
{
	const struct timeval stall = { .tv_sec = CLIENT_STALL_S };
	int one = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof(stall));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof(stall));
	/* Refused on a unix socket, where there is nothing to switch off. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

/* Section "Newstyle negotiation": the server's greeting and our flags. */
static void greet(const struct client *client)
{
	uint8_t greeting[18];
	uint8_t flags[4];
	uint16_t server_flags;

	client_receive(client, greeting, sizeof(greeting));
	if (get_be64(greeting) != NBD_MAGIC || get_be64(greeting + 8) != OPTION_MAGIC)
		die("handshake: not a newstyle NBD server");
	server_flags = get_be16(greeting + 16);
	if (!(server_flags & FLAG_FIXED_NEWSTYLE))
		die("handshake: the server does not speak fixed newstyle");
	put_be32(flags, server_flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
	client_send(client, flags, sizeof(flags));
}

static void send_go(const struct client *client, const char *export_name)
{
	uint8_t option[16 + 4 + EXPORT_NAME_MAX + 2];
	uint32_t name_len = (uint32_t)strlen(export_name);

	if (name_len > EXPORT_NAME_MAX)
		die("the export's name is longer than %d bytes", EXPORT_NAME_MAX);
	put_be64(option, OPTION_MAGIC);
	put_be32(option + 8, OPTION_GO);
	put_be32(option + 12, 4 + name_len + 2);
	put_be32(option + 16, name_len);
	memcpy(option + 20, export_name, name_len);
	put_be16(option + 20 + name_len, 0);
	client_send(client, option, 20 + name_len + 2);
}

/* NBD_OPT_GO: information replies, of which we keep NBD_INFO_EXPORT, then the acknowledgement. */
static void negotiate_go(struct client *client, const char *export_name)
{
	uint8_t head[20];
	uint8_t data[OPTION_DATA_MAX];
	uint32_t type;
	uint32_t len;

	send_go(client, export_name);
	for (;;) {
		client_receive(client, head, sizeof(head));
		if (get_be64(head) != OPTION_REPLY || get_be32(head + 8) != OPTION_GO)
			die("handshake: malformed reply to NBD_OPT_GO");
		type = get_be32(head + 12);
		len = get_be32(head + 16);
		if (len > sizeof(data))
			die("handshake: option reply of %u bytes", len);
		client_receive(client, data, len);
		if (type == REPLY_ACK)
			break;
		if (type & (1U << 31))
			die("export \"%s\" refused: error %u: %.*s", export_name,
				type & ~(1U << 31), (int)len, (const char *)data);
		if (type != REPLY_INFO || len < 2)
			die("handshake: unexpected reply type %u of %u bytes", type, len);
		if (get_be16(data) == INFO_EXPORT && len == 12) {
			client->size_bytes = get_be64(data + 2);
			client->flags = get_be16(data + 10);
		}
	}
	if (client->size_bytes == 0)
		die("handshake: export \"%s\" is empty, or its size was not sent", export_name);
}

void client_open(
	struct client *client, const char *addr, const char *export_name, unsigned int wait_ms)
{
	*client = (struct client){ .fd = connect_within(addr, wait_ms) };
	set_socket_options(client->fd);
	greet(client);
	negotiate_go(client, export_name);
}

void client_close(struct client *client)
{
	uint8_t request[CLIENT_REQUEST_BYTES];

	client_encode(request, CLIENT_DISC, 0, 0, 0);
	client_send(client, request, sizeof(request));
	close(client->fd);
	client->fd = -1;
}

void client_encode(uint8_t *out, enum client_command command, uint64_t cookie, uint64_t offset,
	uint32_t len_bytes)
{
	put_be32(out, REQUEST_MAGIC);
	put_be16(out + 4, 0);
	put_be16(out + 6, (uint16_t)command);
	put_be64(out + 8, cookie);
	put_be64(out + 16, offset);
	put_be32(out + 24, len_bytes);
}
