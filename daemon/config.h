/*
 * The config file: what it says, after every check that can be made without touching anything.
 *
 * config.c is the only file that knows libconfig. It turns the file, with what it includes, into a
 * struct conf tree whose values know their place, and that by option tables into these structs.
 * The place of everything within an export says so: `blkstack.conf:41: export "db"`.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "base/conf.h"
#include "base/err.h"
#include "daemon/access.h"
#include "nbd/server.h"

/* A socket on which NBD clients come in. Texts point into the config's tree. */
struct config_listen {
	const char *address; /* as listener_open() takes it */
	mode_t mode;         /* of a unix socket's file */
	uid_t uid;           /* and its owners; (uid_t)-1, (gid_t)-1: as they come */
	gid_t gid;
	enum nbd_tls tls;
	const char *tls_certificates, *tls_psk, *tls_priority; /* as in tls_options */
	bool tls_verify_clients;
	const struct conf *tls_allow; /* subjects; conf_strings_get() */
	const struct conf *exports;   /* names of those that are served here; NULL: all */
	bool read_only;
	struct access_rules access; /* who may connect */
	const struct conf *conf;    /* its group or text; NULL: not from the file */
};

/*
 * What the config says of one export, with the tree it points into. It outlives the config it came in: whoever
 * uses it keeps a reference. Never changed; all on one thread.
 */
struct config_export {
	unsigned references;
	const char *name;           /* letters, digits and -_.:+@, at most 64 */
	const char *description;    /* "" when there is none */
	const char *device;         /* "/dev/nbd0", "auto", or "" for no kernel device */
	uint64_t device_block_size; /* bytes: 512, 1024, 2048, 4096; 0: the stack's, at least 512 */
	int64_t device_timeout_s;   /* 0: requests of the device may take any time */
	int device_mode;            /* enum kernel_dev_mode */
	int64_t device_connections;
	int64_t device_dead_timeout_s; /* requests of a device whose daemon died wait as long */
	bool read_only;
	bool tls_required;          /* whatever the listeners demand */
	struct access_rules access; /* which NBD clients it is there for */
	int64_t max_connections;    /* NBD clients of this export */
	bool by_hand;               /* from another server, which had it by the control socket */
	const struct conf *stack;   /* CONF_LIST, top first, checked by stack_check() */
	struct conf *conf;          /* the export's group, owned */
};

struct config_export *config_export_get(struct config_export *export); /* returns it */
void config_export_put(struct config_export *export);                  /* NULL is fine */

/* What clients of the NBD door may use; see struct nbd_limits. */
struct config_limits {
	int64_t peer_connections; /* see access_same_place(); 0: any number */
	int64_t idle_timeout_s;   /* 0: none */
	int64_t handshake_options;
	int64_t requests, export_requests;
	uint64_t buffer_bytes, export_buffer_bytes;
};

struct config {
	char *path;
	bool written; /* what another server had in force; exports need not go together with all that is said of them */
	struct conf *root; /* owned; everything below points into it, but the exports */

	/* control */
	char *control;       /* address of the control socket, owned; "" for none */
	mode_t control_mode; /* of the socket file */
	uid_t control_uid;   /* who may change things besides root; (uid_t)-1: nobody */
	gid_t control_gid;   /* (gid_t)-1: no group */

	/* NBD door */
	struct config_listen *listen; /* owned array */
	size_t listen_count;
	mode_t listen_mode;          /* of the files of unix sockets */
	gid_t listen_gid;            /* and their group; (gid_t)-1: as it comes */
	int64_t max_connections;     /* of all exports together, handshakes included */
	int64_t handshake_timeout_s; /* a client that has not chosen an export by then is dropped */
	struct config_limits limits;

	const char *state;      /* folder of records; NULL: see record.c */
	const char *engine;     /* "auto", "uring" or "threads" */
	const char *log_level;  /* "error" to "debug" */
	unsigned reactor_count; /* threads, at least 1 */
	int64_t stuck_after_s;  /* a disk that ends nothing for so long is told of; 0: never */
	int64_t stop_timeout_s; /* how long requests in flight may take at the end */

	uid_t uid; /* who the server becomes; (uid_t)-1: nobody else */
	gid_t gid;
	bool keeper; /* a process of its own holds what outlives this one */

	struct config_export **exports; /* owned array, a reference each */
	size_t export_count;
};

/* The tables, for --help; ended by a row without a name. */
extern const struct opt *const config_options;
extern const struct opt *const config_listen_options;
extern const struct opt *const config_export_options;

/* Reads and checks the whole file; creates and changes nothing. The error is one line, place included. */
int config_load(const char *path, struct config **config, struct err *err);
void config_free(struct config *config); /* NULL is fine */

/*
 * The same from what a server wrote (config-write.h). Only what stands alone is checked, for what ran together may:
 * an export can have come by hand, and another one, that is still named somewhere, be gone.
 */
int config_load_written(
	const char *path, const char *content, struct config **config, struct err *err);

/* One export less, if it is there. */
void config_drop_export(struct config *config, const char *name);

/*
 * Content of a config file that came another way (from the control socket): its settings, unchecked, as a group
 * that the caller frees. name: what stands for the file in the places of errors.
 */
int config_parse_snippet(
	const char *name, const char *content, struct conf **group, struct err *err);

/*
 * One export that came another way: its settings, bare or in { } or as a list `exports` of one. Checked like
 * those of a file; the caller's reference. name as above.
 */
int config_parse_export(
	const char *name, const char *content, struct config_export **export, struct err *err);

/* Whether all of them can run at once: names, devices and files are used by one only. */
int config_check_together(
	struct config_export *const *exports, size_t export_count, struct err *err);

/* Whether an export has a kernel device. */
bool config_has_device(const struct config *config);

bool config_engine_known(const char *name);
bool config_log_level_known(const char *name);
void config_apply_log_level(const struct config *config);
void config_set_control(struct config *config, const char *address);
/* A listener with nothing said about it but the address. Its error is config_load()'s. */
int config_add_listen(struct config *config, const char *address, struct err *err);

/* Doors and stacks as a small tree, for people. */
void config_print(const struct config *config, FILE *out);
