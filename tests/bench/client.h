/*
 * The little of the NBD protocol that a load generator needs.
 * Wire rules: NBD protocol specification, "The NBD protocol", sections "Newstyle negotiation" and
 * "Transmission".  All functions end the program with a message when something is wrong: these are
 * measuring tools, and a figure from a server that misbehaves is worth nothing.
 */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H

#include <stddef.h>
#include <stdint.h>
#include <stdnoreturn.h>

enum {
	CLIENT_REQUEST_BYTES = 28,
	CLIENT_REPLY_BYTES = 16,
	CLIENT_STALL_S = 20, /* a server silent for so long is taken for hung */
};

enum client_command {
	CLIENT_READ = 0,
	CLIENT_WRITE = 1,
	CLIENT_DISC = 2,
	CLIENT_FLUSH = 3,
};

#define CLIENT_REPLY_MAGIC 0x67446698U

/* Transmission flags, as sent with NBD_INFO_EXPORT. */
enum {
	CLIENT_FLAG_READ_ONLY = 1 << 1,
	CLIENT_FLAG_SEND_FLUSH = 1 << 2,
};

struct client {
	int fd; /* blocking; sends and receives fail after CLIENT_STALL_S */
	uint64_t size_bytes;
	uint16_t flags;
};

/* Print "NAME: message" on standard error and exit with status 1. */
noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t now_ns(void);

/* "4096", "4K", "1M", "2G"; `what` names the option in the error message. */
uint64_t parse_size(const char *what, const char *text);

/*
 * Connect to `addr` (a path of a unix socket, or HOST:PORT) and negotiate `export_name` with
 * NBD_OPT_GO.  A server that is not there yet is tried again for `wait_ms`.
 */
void client_open(
	struct client *client, const char *addr, const char *export_name, unsigned int wait_ms);

/* Send NBD_CMD_DISC and close the socket. */
void client_close(struct client *client);

/* Encode a request header of CLIENT_REQUEST_BYTES at `out`. */
void client_encode(uint8_t *out, enum client_command command, uint64_t cookie, uint64_t offset,
	uint32_t len_bytes);

void client_send(const struct client *client, const void *buf, size_t len_bytes);
void client_receive(const struct client *client, void *buf, size_t len_bytes);

/* Big-endian loads and stores at any address. */
void put_be16(uint8_t *out, uint16_t value);
void put_be32(uint8_t *out, uint32_t value);
void put_be64(uint8_t *out, uint64_t value);
uint16_t get_be16(const uint8_t *in);
uint32_t get_be32(const uint8_t *in);
uint64_t get_be64(const uint8_t *in);

#endif
