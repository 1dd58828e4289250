/*
 * Shared libraries that are loaded when they are needed, because few need them and they cost everybody.
 *
 * The caller has a table of pointers, one per function and in the order of names, and calls through
 * it; a macro of the function's name hides that. See rt/gnutls_load.h for the pattern.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"
#include "base/util.h"

struct library {
	const char *file;         /* "libnbd.so.0" */
	const char *need;         /* for the error: who needs it, and what to install */
	const char *const *names; /* of its symbols */
	void **table;             /* filled with their addresses */
	size_t count;
	pthread_mutex_t mutex;
	bool loaded;
};

#define LIBRARY(file_name, need_text, symbol_names, pointers)                   \
	{                                                                       \
		.file = file_name, .need = need_text, .names = symbol_names,    \
		.table = (void **)(pointers), .count = ARRAY_LEN(symbol_names), \
		.mutex = PTHREAD_MUTEX_INITIALIZER,                             \
	}
#define LIBRARY_NAME(name) #name, /* for a list of names */

/* Once is enough, more often is fine. It stays loaded. Any thread, blocks. -ENOENT: not installed. */
int library_load(struct library *library, struct err *err);
