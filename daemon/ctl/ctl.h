/*
 * blkstackctl: what its files share. Blocking code, one call at a time.
 *
 *	main.c		the command line
 *	client.c	the connection to the daemon, calls and their errors
 *	commands.c	one function per command
 *	mirror.c	the command "mirror", which has several of its own
 *	qcow.c		the commands for exports with a qcow layer
 *	reload.c	the commands "reload", "add" and "remove"
 *	show.c		tables for people
 *	latency.c	and how long requests took
 *	doctor*.c	the command "doctor"; see doctor.h
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#define CTL_DEFAULT_SOCKET "/run/blkstack/control"

/* Exit statuses, as the manual page tells them. */
enum ctl_exit {
	CTL_OK = 0,
	CTL_FAILED = 1,
	CTL_USAGE = 2,
	CTL_NO_DAEMON = 3,
	CTL_NOT_PERMITTED = 4,
	CTL_NO_SUCH_EXPORT = 5,
	CTL_BUSY = 6,
};

/* Options of the command "mirror" alone. */
struct ctl_mirror {
	const char *given; /* the first one, NULL: none */
	const char *to, *intent_log;
	bool overwrite, paused, keep;
};

/* Options of the command "doctor" alone. */
struct ctl_doctor {
	const char *given; /* the last one, NULL: none */
	const char *config, *root;
};

struct ctl {
	const struct ctl_command *command;
	const char *socket_path;
	bool json, force, more, cancel, dry_run, upgrade; /* options */
	const char *snippet;                              /* of the command "add"; NULL: none */
	uint64_t rate_bytes_s;                            /* 0: no limit */
	struct ctl_mirror mirror;
	struct ctl_doctor doctor;
	int fd;       /* -1 until the first call */
	char *buffer; /* received, not yet looked at */
	size_t used_bytes, size_bytes;
};

enum ctl_option {
	CTL_FORCE = 1 << 0,
	CTL_MORE = 1 << 1,
	CTL_RATE = 1 << 2,
	CTL_CANCEL = 1 << 3,
	CTL_MIRROR = 1 << 4,
	CTL_DOCTOR = 1 << 5,
	CTL_DRY_RUN = 1 << 6,
	CTL_SNIPPET = 1 << 7,
	CTL_UPGRADE = 1 << 8,
};

struct ctl_command {
	const char *name;
	const char *operands; /* as in the usage line */
	int min_operands, max_operands;
	unsigned options; /* enum ctl_option, besides those that every command has */
	const char *summary;
	const char *help; /* NULL: the summary says all */
	enum ctl_exit (*run)(struct ctl *ctl, const char **operands, int operand_count);
};

/* commands.c; ended by a row without a name. */
extern const struct ctl_command ctl_commands[];

/* Calls a method whose reply people need not see; with --json it is shown. Takes parameters over. */
enum ctl_exit ctl_call_quietly(struct ctl *ctl, const char *method, json_t *parameters);

/* "10G" in bytes; what is wrong was said. */
enum ctl_exit ctl_parse_size(const char *text, uint64_t *size_bytes);

/* "blkstackctl: message" to standard error; returns status, so that callers can `return ctl_fail(...)`. */
enum ctl_exit ctl_fail(enum ctl_exit status, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* --- mirror.c --------------------------------------------------------------------------------- */

/*
 * Takes the word (and its argument: *words moves on) if it is an option of this command. CTL_OK and *taken, or
 * what is wrong with it.
 */
enum ctl_exit ctl_mirror_option(struct ctl_mirror *options, char ***words, bool *taken);
enum ctl_exit ctl_mirror_run(struct ctl *ctl, const char **operands, int operand_count);
extern const char ctl_mirror_help[];

/* --- doctor.c --------------------------------------------------------------------------------- */

/* As ctl_mirror_option(). */
enum ctl_exit ctl_doctor_option(struct ctl_doctor *options, char ***words, bool *taken);
enum ctl_exit ctl_doctor_run(struct ctl *ctl, const char **operands, int operand_count);
extern const char ctl_doctor_help[];

/* --- client.c --------------------------------------------------------------------------------- */

/*
 * Calls a method of org.blkstack, or one named in full. Takes over parameters (NULL: none). What went
 * wrong was said on standard error already. *reply, a new reference, is NULL on failure.
 */
enum ctl_exit ctl_call(struct ctl *ctl, const char *method, json_t *parameters, json_t **reply);

/* The same in two steps, for calls with several replies: *continues tells whether there is another one. */
enum ctl_exit ctl_send(struct ctl *ctl, const char *method, json_t *parameters, bool more);
enum ctl_exit ctl_receive(struct ctl *ctl, json_t **reply, bool *continues);

void ctl_close(struct ctl *ctl);

/* --- qcow.c ------------------------------------------------------------------------------------- */

enum ctl_exit ctl_reload(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_upgrade(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_add(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_remove(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_compact(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_check(struct ctl *ctl, const char **operands, int operand_count);
enum ctl_exit ctl_snapshot(struct ctl *ctl, const char **operands, int operand_count);

/* --- show.c ----------------------------------------------------------------------------------- */

void show_json(const json_t *value);
void show_list(const json_t *exports);     /* array of Export */
void show_clients(const json_t *clients);  /* array of Client */
void show_statuses(const json_t *exports); /* array of Status */
void show_door(const json_t *door);
/* latency.c */
void show_latencies(const json_t *exports); /* array of Status */
/* "5.0 ms": at most so many microseconds as bucket n of a Latencies means. */
#define CTL_LATENCY_TEXT_LEN 16
const char *ctl_format_latency(size_t bucket, char text[CTL_LATENCY_TEXT_LEN]);
/* In which bucket the request is that `permille` of them are not slower than. */
size_t ctl_latency_quantile(const json_t *counts, unsigned permille);
