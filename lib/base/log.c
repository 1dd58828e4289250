/*
 * The log hook; see log.h.
 *
 * The default hook prefixes the line with sd-daemon's "<N>" priority only when standard error is
 * connected to the journal (JOURNAL_STREAM is set); a terminal gets plain text. One write(2) per
 * line, so lines from several threads do not mix.
 */
#include "base/log.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static _Atomic(enum log_level) max_level = LOG_LEVEL_INFO;
static log_hook *hook;

static void log_stderr(enum log_level level, const char *text)
{
	static const int syslog_priority[] = { 3, 4, 6, 7 };
	char line[1200];
	int len_bytes;

	if (getenv("JOURNAL_STREAM"))
		len_bytes = snprintf(line, sizeof(line), "<%d>%s\n", syslog_priority[level], text);
	else
		len_bytes = snprintf(line, sizeof(line), "%s\n", text);
	if (write(STDERR_FILENO, line, (size_t)len_bytes) < 0)
		return; /* nowhere left to say it */
}

void log_set_hook(log_hook *new_hook)
{
	hook = new_hook;
}

void log_set_level(enum log_level level)
{
	max_level = level;
}

void log_msg(enum log_level level, const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	if (level > max_level)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	(hook ? hook : log_stderr)(level, text);
}
