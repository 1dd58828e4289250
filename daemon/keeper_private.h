/*
 * What keeper.c and the other files of the keeper, keeper-*.c, share. Everything belongs to the main thread, but for
 * the job of a device while it runs.
 */
#pragma once

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/util.h"
#include "daemon/kernel-dev.h"
#include "daemon/keeper-wire.h"

struct keeper;
struct held;

/* --- devices: keeper-devices.c ---------------------------------------------------------------- */

typedef int job_fn(struct held *held, struct err *err);

/* What may take long, on the device's thread. One at a time. */
struct job {
	job_fn *run;
	bool running;
	uint64_t server;               /* which server asked; 0: the keeper itself */
	struct keeper_message request; /* checked */
	struct kernel_ends ends;       /* of a reconnect, with its journal or -1 */
	int journal;
	int ret;
	struct err err;
};

struct held {
	struct keeper *keeper;
	uint32_t slot;
	struct kernel_dev *dev; /* NULL while it is being claimed */
	struct kernel_ends ends;
	int journal;                 /* the servers' own, never looked into */
	int stored;                  /* what the service manager's store knows of it; -1: nothing */
	struct keeper_message facts; /* export, device and sizes as they were claimed or changed */
	pthread_t thread;
	sem_t wanted; /* a job, or without one the thread's end */
	struct job job;
	bool ended; /* the driver gave it up */
	int end_reason;
};

struct devices {
	struct held *slots[KEEPER_DEVICES_MAX];
	unsigned count;
	int events[2]; /* a pipe: what threads tell the main one */
};

int devices_init(struct devices *devices);
/* A request about a device; it is answered now or later. Takes what it needs of fds. */
void devices_request(
	struct keeper *keeper, const struct keeper_message *request, struct keeper_fds *fds);
/* The pipe is readable. */
void devices_events(struct keeper *keeper);
/*
 * One that the driver has, and whose parts were kept beyond the end of another keeper: they are taken over. On an
 * error they stay the caller's.
 */
int devices_adopt(struct keeper *keeper, const struct keeper_message *facts, const char *name,
	struct kernel_ends *ends, int journal, int stored, struct err *err);
/* How many nobody has given back; at a restart only those that end with this process. */
unsigned devices_left(const struct devices *devices, bool restart);
/* The end: names and disconnects what is left, without a flush, since nobody serves it. */
void devices_free(struct keeper *keeper, bool restart);

/* --- listening sockets: keeper-listeners.c ----------------------------------------------------- */

struct kept_listener {
	int fd;
	char name[32]; /* of the service manager's, "" for the server's own */
};

struct listeners {
	struct kept_listener items[KEEPER_LISTENERS_MAX];
	unsigned count;
};

/* Takes fd over. */
int listeners_add(struct listeners *listeners, int fd, const char *name);
/*
 * KEEP: those that the server has bound, in place of those before, at once. Answers: 0; -EINVAL, -ENOSPC, and nothing is
 * changed. The descriptors of those before come into the message: a client may have put into one of them what takes its
 * time to close.
 */
void listeners_keep(
	struct keeper *keeper, const struct keeper_message *request, struct keeper_fds *fds);
/* How many of them came by KEEP. */
unsigned listeners_kept_count(const struct listeners *listeners);
_Static_assert(KEEPER_LISTENERS_MAX + KEEPER_FDS_MAX <= ARRAY_LEN(((struct keeper_fds *)0)->fd),
	"they fit beside those of a message");

/* --- closing what servers sent: keeper-closers.c ----------------------------------------------- */

#define KEEPER_CLOSERS 4 /* each holds as many descriptors as come with a message at most */

struct closers {
	pthread_mutex_t mutex; /* of what follows */
	pthread_cond_t wanted;
	struct keeper_fds waiting[KEEPER_CLOSERS];
	unsigned waiting_count;
	unsigned busy; /* those that wait, and those that are being closed */
	int event;     /* readable when one has become free */
};

int closers_init(struct closers *closers);
/* Whether one can take something. */
bool closers_free(struct closers *closers);
/* Takes the descriptors over. One is free. */
void closers_take(struct closers *closers, struct keeper_fds *fds);
/* The event is readable. */
void closers_event(struct closers *closers);

/* --- notes: keeper-notes.c --------------------------------------------------------------------- */

/* What servers have to say to each other about an export, in words that the keeper does not know. */
struct notes {
	struct note {
		char export[KEEPER_EXPORT_LEN]; /* "": there is none here */
		char text[KEEPER_NOTE_LEN];
	} items[KEEPER_NOTES_MAX];
};

/* NOTE. Answers: 0; -ENOSPC, -EINVAL. */
void notes_write(struct keeper *keeper, const struct keeper_message *request);
/* READ. Answers with slot, export and text; -ENOENT: no more. */
void notes_read(struct keeper *keeper, const struct keeper_message *request);

/* --- the configuration in force: keeper-config.c ------------------------------------------------ */

/* Its settings and its exports, as the server gave them: sealed memory that the keeper does not look into. */
struct kept_config {
	int fds[2];       /* of the server that was ready last; -1: nothing is known */
	int next[2];      /* of one that is not ready yet */
	bool from_before; /* fds: left by another start of the service */
	unsigned long settings, exports; /* numbers in the store: when they came; 0: not there */
};

void kept_config_init(struct kept_config *config);
/* CONFIG. ready: who sends it. Answers. */
void kept_config_take(struct keeper *keeper, const struct keeper_message *request,
	struct keeper_fds *fds, bool ready);
/* Who sent what is to come is ready. */
void kept_config_is_in_force(struct kept_config *config);
/* Another server starts: what the last one sent and never was ready for is not in force. */
void kept_config_forget_next(struct kept_config *config);
/* Among the descriptors that the store had, from first on under these names. Takes what is its own. */
void kept_config_find(struct kept_config *config, int first, char *const *names, int count);
/* Nothing is left that it belongs to. */
void kept_config_drop(struct kept_config *config);
bool kept_config_is_known(const struct kept_config *config);

/* --- the service manager's store: keeper-store.c ----------------------------------------------- */

/* Once it is claimed. */
void store_put_device(struct held *held);
void store_put_journal(const struct held *held);
/* Its facts have changed. */
void store_note_device(const struct held *held);
/* Before it is freed. */
void store_forget_device(struct held *held);
/* All of these, for a manager that had no room for some (FileDescriptorStoreMax=), and may have it now. */
void store_put_again(const struct keeper *keeper);
void store_put_listener(int fd);
void store_forget_listeners(void);
/* Whether no device dies with the keeper. */
bool store_has_all(const struct keeper *keeper);
/* Under the numbers that it has. */
void store_put_settings(const struct kept_config *config);
void store_put_exports(const struct kept_config *config);
void store_forget_settings(const struct kept_config *config);
void store_forget_exports(const struct kept_config *config);
/* Reads the numbers out of a name. */
bool store_is_settings(const char *name, unsigned long *settings);
bool store_is_exports(const char *name, unsigned long *exports, unsigned long *settings);
/* How many descriptors have to be in it, those of devices and listening sockets, and the configuration. */
unsigned store_count(const struct keeper *keeper);
/* At the start: devices and listening sockets that the service manager passed. */
void store_take_over(struct keeper *keeper);

/* --- the service manager: keeper-manager.c ----------------------------------------------------- */

/* SIGTERM came: true if we are to be started again, and that many descriptors wait in the store. Blocks for a moment. */
bool manager_restarts(unsigned fd_count);
/* For whoever looks; one line, whatever is in it. */
void manager_status(const char *text);

/* --- the server: keeper-spawn.c --------------------------------------------------------------- */

struct keeper_spawn {
	int program;       /* opened with O_PATH: stays what it is when the file is replaced */
	char *const *argv; /* of the server, without the number of its socket */
	int sock;          /* the server's end */
	const struct listeners *listeners;
	const struct kept_config *config;
};

/* The pid, or -errno. The new process has the listeners from descriptor 3 on, then sock, then the config if there is one. */
pid_t keeper_spawn(const struct keeper_spawn *spawn);

/* --- the whole: keeper.c ---------------------------------------------------------------------- */

struct keeper {
	struct devices devices;
	struct listeners listeners;
	struct notes notes;
	struct closers closers;
	struct kept_config config;
	pid_t server;       /* 0: none runs */
	uint64_t server_id; /* counts servers, from 1 */
	int sock;           /* to the server that runs, or -1 */
};

/* To the server that is there now; lost when there is none. */
void keeper_say(struct keeper *keeper, enum keeper_word word, const struct keeper_message *said,
	const int *fds, unsigned fd_count);
