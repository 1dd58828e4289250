/*
 * The log of the protocol, for one client at a time: what it asks and what it is told, a line each. Costs
 * a look at a flag while it is off. Private to lib/nbd.
 *
 * What a client sent never gets into a line as it came: names are escaped.
 */
#pragma once

#include "nbd/conn.h"
#include "nbd/handshake.h"

static inline bool nbd_traced(const struct nbd_trace *trace)
{
	return __builtin_expect(
		trace && atomic_load_explicit(&trace->on, memory_order_relaxed), false);
}

/* A line as by printf(). Only while nbd_traced(). */
void nbd_trace(const struct nbd_trace *trace, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* In the handshake: an option and the beginning of its data, and a reply to it. */
void nbd_trace_option(const struct nbd_handshake *handshake);
void nbd_trace_option_reply(
	const struct nbd_handshake *handshake, uint32_t type, size_t len_bytes, const char *text);

/* In transmission: a request, and how it ended (refusal.error may be NBD_SUCCESS). */
void nbd_trace_request(const struct nbd_request *request);
void nbd_trace_end(const struct nbd_request *request, struct nbd_refusal refusal);
