/*
 * The log of the protocol; see trace.h.
 */
#include "nbd/trace.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"

#define LINE_MAX_BYTES 400
#define DATA_MAX_BYTES 48 /* of an option, shown */

void nbd_trace(const struct nbd_trace *trace, const char *fmt, ...)
{
	char text[LINE_MAX_BYTES];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	trace->line(trace, text);
}

/* --- handshake -------------------------------------------------------------------------------- */

static const char *option_name(uint32_t option)
{
	static const char *const names[] = {
		[NBD_OPT_EXPORT_NAME] = "EXPORT_NAME",
		[NBD_OPT_ABORT] = "ABORT",
		[NBD_OPT_LIST] = "LIST",
		[NBD_OPT_STARTTLS] = "STARTTLS",
		[NBD_OPT_INFO] = "INFO",
		[NBD_OPT_GO] = "GO",
		[NBD_OPT_STRUCTURED_REPLY] = "STRUCTURED_REPLY",
		[NBD_OPT_LIST_META_CONTEXT] = "LIST_META_CONTEXT",
		[NBD_OPT_SET_META_CONTEXT] = "SET_META_CONTEXT",
		[NBD_OPT_EXTENDED_HEADERS] = "EXTENDED_HEADERS",
	};

	return option < ARRAY_LEN(names) && names[option] ? names[option] : "unknown";
}

static const char *reply_name(uint32_t type)
{
	static const struct {
		uint32_t type;
		const char *name;
	} names[] = {
		{ NBD_REP_ACK, "ACK" },
		{ NBD_REP_SERVER, "SERVER" },
		{ NBD_REP_INFO, "INFO" },
		{ NBD_REP_META_CONTEXT, "META_CONTEXT" },
		{ NBD_REP_ERR_UNSUP, "ERR_UNSUP" },
		{ NBD_REP_ERR_POLICY, "ERR_POLICY" },
		{ NBD_REP_ERR_INVALID, "ERR_INVALID" },
		{ NBD_REP_ERR_TLS_REQD, "ERR_TLS_REQD" },
		{ NBD_REP_ERR_UNKNOWN, "ERR_UNKNOWN" },
		{ NBD_REP_ERR_SHUTDOWN, "ERR_SHUTDOWN" },
		{ NBD_REP_ERR_TOO_BIG, "ERR_TOO_BIG" },
		{ NBD_REP_ERR_EXT_HEADER_REQD, "ERR_EXT_HEADER_REQD" },
	};

	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (names[i].type == type)
			return names[i].name;
	return "?";
}

/* Bytes as text: what is no plain character as \xNN. */
static const char *escape(const uint8_t *bytes, size_t len_bytes, char text[4 * DATA_MAX_BYTES + 4])
{
	char *end = text;

	for (size_t i = 0; i < MIN(len_bytes, (size_t)DATA_MAX_BYTES); i++)
		if (isprint(bytes[i]) && bytes[i] != '\\' && bytes[i] != '"')
			*end++ = (char)bytes[i];
		else
			end += sprintf(end, "\\x%02x", bytes[i]);
	strcpy(end, len_bytes > DATA_MAX_BYTES ? "..." : "");
	return text;
}

void nbd_trace_option(const struct nbd_handshake *handshake)
{
	char text[4 * DATA_MAX_BYTES + 4];
	size_t kept_bytes = handshake->len <= sizeof(handshake->data) ? handshake->len : 0;

	nbd_trace(handshake->visitor->trace, "option %u (%s), %u bytes \"%s\"", handshake->option,
		option_name(handshake->option), handshake->len,
		escape(handshake->data, kept_bytes, text));
}

void nbd_trace_option_reply(
	const struct nbd_handshake *handshake, uint32_t type, size_t len_bytes, const char *text)
{
	bool is_error = type >> 31;

	nbd_trace(handshake->visitor->trace, "reply %s to %s, %zu bytes%s%s", reply_name(type),
		option_name(handshake->option), len_bytes, is_error && text ? ": " : "",
		is_error && text ? text : "");
}

/* --- transmission ----------------------------------------------------------------------------- */

static const char *command_name(uint16_t type)
{
	static const char *const names[] = {
		[NBD_CMD_READ] = "READ",
		[NBD_CMD_WRITE] = "WRITE",
		[NBD_CMD_DISC] = "DISC",
		[NBD_CMD_FLUSH] = "FLUSH",
		[NBD_CMD_TRIM] = "TRIM",
		[NBD_CMD_CACHE] = "CACHE",
		[NBD_CMD_WRITE_ZEROES] = "WRITE_ZEROES",
		[NBD_CMD_BLOCK_STATUS] = "BLOCK_STATUS",
	};

	return type < ARRAY_LEN(names) ? names[type] : "unknown";
}

/* " FUA DF", for those that are set. */
static const char *flag_names(uint16_t flags, char text[64])
{
	static const char *const names[] = { "FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO",
		"PAYLOAD_LEN" };
	char *end = text;

	*end = '\0';
	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (flags >> i & 1)
			end += sprintf(end, " %s", names[i]);
	if (flags >> ARRAY_LEN(names))
		sprintf(end, " and more");
	return text;
}

void nbd_trace_request(const struct nbd_request *request)
{
	char flags[64];

	nbd_trace(request->conn->trace, "request %llx: %u (%s), offset %llu, length %llu, flags%s",
		(unsigned long long)be64_get(request->cookie), request->type,
		command_name(request->type), (unsigned long long)request->off,
		(unsigned long long)request->len,
		request->flags ? flag_names(request->flags, flags) : " none");
}

void nbd_trace_end(const struct nbd_request *request, struct nbd_refusal refusal)
{
	nbd_trace(request->conn->trace, "request %llx: error %u%s%s",
		(unsigned long long)be64_get(request->cookie), (unsigned)refusal.error,
		refusal.error ? ", " : "", refusal.error ? refusal.text : "");
}
