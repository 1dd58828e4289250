/*
 * The log: one hook, set once by the program before threads start; without it, standard error.
 *
 * lib/ logs at debug only (what matters is returned as an error, and the program decides what to say);
 * daemon/ uses all levels. A message is one line without a newline.
 */
#pragma once

#include <stdarg.h>

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

typedef void log_hook(enum log_level level, const char *text);

void log_set_hook(log_hook *hook);
/* Messages above this level are dropped before they are formatted. Default: info. */
void log_set_level(enum log_level level);
void log_msg(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...)   log_msg(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warning(...) log_msg(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_info(...)    log_msg(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...)   log_msg(LOG_LEVEL_DEBUG, __VA_ARGS__)
