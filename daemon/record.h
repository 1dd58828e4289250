/*
 * Records: what an export is made of since that was changed while it ran (a mirror started, promoted or
 * cancelled), so that the next start serves the same disk. The config file is nobody's to write but the operator's.
 *
 * A record is a small file in the folder `state`, in the syntax of a config:
 *
 *	reason = "mirror promote"; time = 1700000000;
 *	instead-of = ( what the config said then );
 *	stack = ( what is served since );
 *
 * At the next start it holds as long as the config still names the disk that it was made instead of. When
 * the config names the disk that the record does, it has done its duty and is removed. A config that names a third
 * disk is refused: somebody has to decide.
 */
#pragma once

#include <stdint.h>

#include "base/conf.h"
#include "base/err.h"
#include "daemon/config.h"

struct record {
	char *file;
	struct conf *root; /* owned; the rest points into it */
	const char *reason;
	int64_t time;
	const struct conf *instead_of, *stack;
};

/* Where the record of the export is, whether there is one or not. To be freed. */
char *record_path(const struct config *config, const char *export);

/* Plain code that blocks, as the two below. *record is NULL when there is none. */
int record_read(const char *path, struct record **record, struct err *err);
void record_free(struct record *record); /* NULL is fine */

/* Durable when it returns. */
int record_write(const char *path, const char *export, const char *reason,
	const struct conf *instead_of, const struct conf *stack, struct err *err);
int record_remove(const char *path, struct err *err); /* fine when there is none */

/*
 * A copy of the stack for opening it, to be freed: nothing is created, for a disk that is gone must not be made
 * anew, empty, without anybody being asked.
 */
struct conf *record_to_open(const struct conf *stack);

enum record_use { RECORD_HOLDS, RECORD_IS_DONE, RECORD_CONFLICTS };
enum record_use record_judge(const struct record *record, const struct conf *config_stack);
