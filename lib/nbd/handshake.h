/*
 * The handshake of one client; private to lib/nbd. Lives on the server's reactor.
 */
#pragma once

#include "nbd/server.h"
#include "rt/stream.h"

/* The longest option data we can have a use for: a name, and some information requests. */
#define NBD_OPTION_DATA_MAX_BYTES (NBD_STRING_MAX_BYTES + 4096)

struct nbd_handshake {
	struct list link; /* in server->handshakes */
	struct nbd_server *server;
	struct stream stream;
	uint64_t deadline_ns;
	bool no_zeroes;
	struct nbd_export *chosen; /* counted in chosen->clients */

	/* The option being answered. */
	uint32_t option, len;
	uint8_t data[NBD_OPTION_DATA_MAX_BYTES];
	uint8_t *replies; /* collected until the option is answered, then sent; malloc()ed */
	size_t replies_bytes;
	bool no_memory; /* replies are incomplete */
};

/*
 * Until the client has chosen an export (0, and chosen is set), or left (0, and it is not), or broke the
 * rules (-errno).
 */
suspends int nbd_handshake_run(struct nbd_handshake *handshake);
