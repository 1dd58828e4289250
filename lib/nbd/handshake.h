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
	const struct nbd_visitor *visitor;
	uint64_t since_ns;
	struct stream stream;
	uint64_t deadline_ns;
	bool no_zeroes;
	enum nbd_form form;
	char *meta_export;      /* for which metadata contexts are selected, or NULL; malloc()ed */
	unsigned meta_contexts; /* those, by id */
	struct nbd_export *chosen; /* entered */

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

/* The export gets a client, or loses it. */
void nbd_export_enter(struct nbd_export *export);
void nbd_export_leave(struct nbd_export *export);

/* Back to what it was before the first option, but for the flags: what NBD_OPT_STARTTLS asks for. */
void nbd_negotiation_forget(struct nbd_handshake *handshake);

/* --- for options ------------------------------------------------------------------------------ */

/* Collects a reply; its data is head, then tail. */
void nbd_option_reply(struct nbd_handshake *handshake, uint32_t type, const void *head,
	size_t head_bytes, const char *tail);
void nbd_option_ack(struct nbd_handshake *handshake);
/* The text is for the client's user. */
void nbd_option_error(struct nbd_handshake *handshake, uint32_t type, const char *text);
/* The export is for clients with TLS, and this one has none: NBD_REP_ERR_TLS_REQD. */
bool nbd_lacks_tls(const struct nbd_handshake *handshake, const struct nbd_export *export);
/* An empty name is the default export. NULL when there is none of that name for this client. */
struct nbd_export *nbd_find_export(
	struct nbd_handshake *handshake, const uint8_t *name, size_t name_bytes);

/* meta.c: NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. */
void nbd_meta_answer(struct nbd_handshake *handshake);
void nbd_meta_forget(struct nbd_handshake *handshake);
/* The contexts that block status can be asked for, of export, by id; 0: none. */
unsigned nbd_meta_selected(const struct nbd_handshake *handshake, const struct nbd_export *export);
