/*
 * Metadata contexts in the handshake: "Metadata querying", and the two options of that name.
 *
 * There are those in the table below. They can be listed by their names, by their namespaces ("base:") and by no
 * query at all, and selected by their names alone. Queries we do not know find nothing, which is no error.
 *
 * A selection belongs to an export, which is remembered by name: the export itself may go away before
 * the client chooses it. Every attempt to select, a failed one too, replaces the one before.
 */
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "nbd/conn.h"
#include "nbd/handshake.h"

#define QUERIES_MAX 64

static const char *const context_names[NBD_CONTEXT_IDS] = {
	[NBD_ALLOCATION_ID] = NBD_CONTEXT_ALLOCATION,
	[NBD_DEPTH_ID] = NBD_CONTEXT_DEPTH,
};

#define ALL_CONTEXTS (1U << NBD_ALLOCATION_ID | 1U << NBD_DEPTH_ID)

void nbd_meta_forget(struct nbd_handshake *handshake)
{
	free(handshake->meta_export);
	handshake->meta_export = NULL;
	handshake->meta_contexts = 0;
}

unsigned nbd_meta_selected(const struct nbd_handshake *handshake, const struct nbd_export *export)
{
	bool of_this = handshake->meta_export && !strcmp(handshake->meta_export, export->name);

	return of_this ? handshake->meta_contexts : 0;
}

/* --- taking the data apart -------------------------------------------------------------------- */

struct cursor {
	const uint8_t *at;
	size_t left_bytes;
};

static bool take_count(struct cursor *cursor, uint32_t *count)
{
	be32 field;

	if (cursor->left_bytes < sizeof(field))
		return false;
	memcpy(&field, cursor->at, sizeof(field));
	cursor->at += sizeof(field);
	cursor->left_bytes -= sizeof(field);
	*count = be32_get(field);
	return true;
}

/* A string after its length. */
static bool take_string(struct cursor *cursor, const uint8_t **string, uint32_t *len_bytes)
{
	if (!take_count(cursor, len_bytes) || *len_bytes > cursor->left_bytes ||
		*len_bytes > NBD_STRING_MAX_BYTES)
		return false;
	*string = cursor->at;
	cursor->at += *len_bytes;
	cursor->left_bytes -= *len_bytes;
	return true;
}

static bool is(const char *text, size_t text_bytes, const uint8_t *string, uint32_t len_bytes)
{
	return text_bytes == len_bytes && !memcmp(text, string, len_bytes);
}

/* The contexts that a query finds, by id. */
static unsigned find_contexts(const uint8_t *query, uint32_t query_bytes, bool lists)
{
	unsigned found = 0;

	for (unsigned id = NBD_ALLOCATION_ID; id < NBD_CONTEXT_IDS; id++) {
		const char *name = context_names[id];
		size_t namespace_bytes = (size_t)(strchr(name, ':') + 1 - name);

		if (is(name, strlen(name), query, query_bytes) ||
			(lists && is(name, namespace_bytes, query, query_bytes)))
			found |= 1U << id;
	}
	return found;
}

/* What all queries find. False when their lengths do not add up. */
static bool read_queries(struct cursor cursor, uint32_t count, bool lists, unsigned *found)
{
	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *query;
		uint32_t query_bytes;

		if (!take_string(&cursor, &query, &query_bytes))
			return false;
		*found |= find_contexts(query, query_bytes, lists);
	}
	return !cursor.left_bytes;
}

/* --- answering -------------------------------------------------------------------------------- */

static void answer(struct nbd_handshake *handshake, const struct nbd_export *export, unsigned found)
{
	bool lists = handshake->option == NBD_OPT_LIST_META_CONTEXT;

	if (found && !lists) {
		handshake->meta_export = strdup(export->name);
		handshake->no_memory = handshake->no_memory || !handshake->meta_export;
		handshake->meta_contexts = found;
	}
	for (unsigned id = NBD_ALLOCATION_ID; id < NBD_CONTEXT_IDS; id++) {
		be32 head = be32_make(lists ? 0 : id);

		if (found >> id & 1)
			nbd_option_reply(handshake, NBD_REP_META_CONTEXT, &head, sizeof(head),
				context_names[id]);
	}
	nbd_option_ack(handshake);
}

void nbd_meta_answer(struct nbd_handshake *handshake)
{
	bool lists = handshake->option == NBD_OPT_LIST_META_CONTEXT;
	struct cursor cursor = { handshake->data, handshake->len };
	uint32_t name_bytes, count;
	const uint8_t *name;
	unsigned found = 0;

	if (!lists)
		nbd_meta_forget(handshake);
	if (handshake->form == NBD_SIMPLE) {
		nbd_option_error(handshake, NBD_REP_ERR_INVALID,
			"structured replies or extended headers have to be negotiated first");
		return;
	}
	if (!take_string(&cursor, &name, &name_bytes) || !take_count(&cursor, &count)) {
		nbd_option_error(
			handshake, NBD_REP_ERR_INVALID, "the lengths in the data do not add up");
		return;
	}
	if (count > QUERIES_MAX) {
		nbd_option_error(handshake, NBD_REP_ERR_TOO_BIG, "too many queries");
		return;
	}
	if (!read_queries(cursor, count, lists, &found)) {
		nbd_option_error(
			handshake, NBD_REP_ERR_INVALID, "the lengths of the queries do not add up");
		return;
	}
	const struct nbd_export *export = nbd_find_export(handshake, name, name_bytes);
	if (!export)
		nbd_option_error(handshake, NBD_REP_ERR_UNKNOWN, "there is no export of that name");
	else if (nbd_lacks_tls(handshake, export))
		nbd_option_error(handshake, NBD_REP_ERR_TLS_REQD, "this export needs TLS");
	else
		answer(handshake, export, lists && !count ? ALL_CONTEXTS : found);
}
