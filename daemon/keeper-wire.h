/*
 * What the keeper and the server say to each other: messages of one fixed size over a SOCK_SEQPACKET socket
 * pair, with descriptors beside them where it says so. No pointers, no lengths, no parsing.
 *
 * The keeper trusts the server with nothing: a message of another size, with a text that does not end or an
 * unexpected count of descriptors is refused (keeper_receive()), and what a request names is checked by
 * who carries it out.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define KEEPER_VERSION 4 /* keeper and server must agree, also across an upgrade of the server */

#define KEEPER_DEVICES_MAX     256
#define KEEPER_LISTENERS_MAX   64
#define KEEPER_NOTES_MAX       256
#define KEEPER_CONNECTIONS_MAX 16 /* per device */
#define KEEPER_FDS_MAX         64 /* with one message */

#define KEEPER_JOURNAL_MAX_BYTES (INT64_C(2) << 30)
#define KEEPER_CONFIG_MAX_BYTES \
	(INT64_C(16) << 20) /* of each half; longer than any file with all it includes */

#define KEEPER_EXPORT_LEN 65 /* with the final NUL, as all of them */
#define KEEPER_DEVICE_LEN 40
#define KEEPER_TEXT_LEN   512
#define KEEPER_NOTE_LEN   64

_Static_assert(
	KEEPER_FDS_MAX >= KEEPER_LISTENERS_MAX && KEEPER_FDS_MAX >= 2 * KEEPER_CONNECTIONS_MAX + 1,
	"all sockets, and a device's connections with its journal");

enum keeper_word {
	/* Requests of the server; each gets an ANSWER with its id. */
	KEEPER_HELLO = 1, /* version. Answer: restarts, text: why the last server ended */
	/* slot. Answer: the first device held at or after it, as CLAIM's, perhaps without connections; -ENOENT: none */
	KEEPER_NEXT,
	/* export, device, sizes, flags, connections. Answer: slot, device, connections; the server's ends,
	   as many of the driver's, and the journal if there is one. */
	KEEPER_CLAIM,
	KEEPER_JOURNAL, /* slot, as all that follow; memory of a sealed size, for the next server */
	/* Drops the journal. Answer: as CLAIM's, with new connections. After an error there are none. */
	KEEPER_RECONNECT,
	KEEPER_SETTLE,
	KEEPER_RESIZE,  /* size_bytes */
	KEEPER_USERS,   /* force: without opening it. An error says who uses it */
	KEEPER_RELEASE, /* force */
	KEEPER_FREE,    /* force: what is on it is lost, so it is disconnected in any case */
	KEEPER_KEEP, /* listening sockets: the next server gets these and those of the service manager */
	KEEPER_NOTE, /* export, text: for the servers to come; no text: no note */
	KEEPER_READ, /* slot. Answer: the first note at or after it, with its slot; -ENOENT: none */
	/* Two sealed memories: the next server gets them, from when this one is ready. */
	KEEPER_CONFIG,
	/* force: also if it is the one that runs (else -EALREADY). */
	KEEPER_UPGRADE, /* start the program that is installed now when this server has ended */

	/* Said by the server, not answered. */
	KEEPER_READY,
	KEEPER_STATUS,    /* text */
	KEEPER_RELOADING, /* until it is ready again */
	KEEPER_ALIVE,     /* its reactors turn */
	KEEPER_STOPPING,  /* its end is wanted: what it does not give back is to be disconnected */
	KEEPER_PARKED,    /* its end is wanted, and the next one takes everything over */

	/* Said by the keeper. */
	KEEPER_ANSWER, /* ret, text: the error's */
	KEEPER_ENDED,  /* slot, ret: the driver gave the device up, for that reason */
	KEEPER_STOP,   /* SIGTERM or SIGINT came */
	KEEPER_RELOAD, /* SIGHUP came */
	KEEPER_PARK, /* the service is restarted: end with PARKED, and give back what dies with the keeper */
	KEEPER_WORDS
};

struct keeper_message {
	uint32_t word; /* enum keeper_word */
	uint32_t version;
	uint32_t id;
	int32_t ret; /* 0 or -errno */
	uint32_t slot;
	uint32_t block_size, timeout_s, dead_timeout_s; /* as in kernel_dev_opts */
	uint32_t flags, mode, connections;
	uint32_t force;
	uint32_t by_hand; /* of a claim: the export is not in the config */
	uint32_t settled; /* the device is ready for its users */
	uint32_t ended;   /* 0: the driver has it still; else 1 and the errno why not */
	uint32_t
		adopted; /* a keeper before this one attached it: not all that its servers did is known */
	uint32_t restarts; /* servers started before this one; of a device: that had it before */
	uint64_t size_bytes;
	uint64_t watchdog_ns; /* ALIVE is wanted twice in that time; 0: never */
	char export[KEEPER_EXPORT_LEN];
	char device[KEEPER_DEVICE_LEN];
	char text[KEEPER_TEXT_LEN];
};

/* As many as the kernel passes with one message, so that it closes none of them by itself. */
struct keeper_fds {
	int fd[253];
	unsigned count;
};

/* 0 or -errno; -EAGAIN when the other side does not read. Any thread; messages never mix. */
int keeper_send(int sock, const struct keeper_message *message, const int *fds, unsigned fd_count);

/*
 * 1: a message, fds received with it are the caller's (close-on-exec); 0: end of file; -EAGAIN: nothing yet,
 * on a non-blocking socket; -EPROTO: not a message as it has to be. fds are the caller's in any case.
 */
int keeper_receive(int sock, struct keeper_message *message, struct keeper_fds *fds);

void keeper_fds_close(struct keeper_fds *fds);
