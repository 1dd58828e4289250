/*
 * Bounded error texts; see err.h.
 *
 * All functions build the new text in a local buffer first, so the arguments may point into
 * the error that is being changed. A NULL err is allowed everywhere: the caller then only wants the
 * code.
 */
#include "base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void err_store(struct err *err, int code, const char *text)
{
	err->code = code;
	err->place_len = 0;
	snprintf(err->text, sizeof(err->text), "%s", text);
}

int err_set(struct err *err, int code, const char *fmt, ...)
{
	if (err) {
		char text[sizeof(err->text)];
		va_list ap;

		va_start(ap, fmt);
		vsnprintf(text, sizeof(text), fmt, ap);
		va_end(ap);
		err_store(err, code, text);
	}
	return -code;
}

int err_sys(struct err *err, int code, const char *fmt, ...)
{
	if (err) {
		char what[sizeof(err->text)], text[2 * sizeof(err->text)];
		va_list ap;

		va_start(ap, fmt);
		vsnprintf(what, sizeof(what), fmt, ap);
		va_end(ap);
		snprintf(text, sizeof(text), "%s: %s", what, strerror(code));
		err_store(err, code, text);
	}
	return -code;
}

void err_place(struct err *err, const char *place)
{
	if (!err || !place || err->place_len)
		return;

	char text[2 * sizeof(err->text)];
	int len = snprintf(text, sizeof(text), "%.*s: ", (int)sizeof(err->text) / 2, place);

	snprintf(text + len, sizeof(text) - (size_t)len, "%s", err->text);
	err_store(err, err->code, text);
	err->place_len = (unsigned)len;
}

int err_wrap(struct err *err, const char *fmt, ...)
{
	if (!err)
		return -EIO;

	char prefix[sizeof(err->text)], text[2 * sizeof(err->text)];
	unsigned place_len = err->place_len;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(prefix, sizeof(prefix), fmt, ap);
	va_end(ap);
	snprintf(text, sizeof(text), "%.*s%s: %s", (int)place_len, err->text, prefix,
		err->text + place_len);
	err_store(err, err->code, text);
	err->place_len = place_len;
	return -err->code;
}
