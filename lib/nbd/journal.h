/*
 * A seat: a kernel device's connections that outlive the process that serves them.
 *
 * Whoever keeps the seat (a process that hardly ever dies) holds the sockets and one piece of shared
 * memory, the journal. Whoever sits on it serves: it notes in the journal what it has received and not
 * yet answered. When it is killed, at any instant, its successor opens the same journal, finds out from
 * the sockets themselves how many bytes were received and sent, finishes the requests under way, completes
 * a reply that was cut off, and goes on at the right byte. The driver at the other end notices nothing.
 *
 *	keeper		nbd_journal_size(), memfd_create(), socketpair(); gives the driver one end of each
 *			pair and keeps duplicates of everything; never looks inside
 *	server		nbd_journal_open(), nbd_journal_replay(), nbd_serve() for each connection,
 *			nbd_export_close(), nbd_journal_close()
 *
 * The memory outlives processes, not the machine: it is no help against a power cut and needs none,
 * because what was acknowledged before a power cut and not flushed may be lost.
 *
 * Both sides of the rules are in journal.c; this file is all that the keeper needs.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "rt/co.h"

struct nbd_export;
struct nbd_journal;

#define NBD_SEAT_CONNECTIONS_MAX 16

/* What the journal of one device holds of requests and their data, all its connections together. */
#define NBD_JOURNAL_ARENA_DEFAULT_BYTES (UINT64_C(32) << 20)
#define NBD_JOURNAL_ARENA_MAX_BYTES     (UINT64_C(1) << 30)

/*
 * The memory's size in bytes for so many connections (1..NBD_SEAT_CONNECTIONS_MAX) that share arena_bytes.
 * An arena too small for the connections (4 MiB each) is made larger; at most NBD_JOURNAL_ARENA_MAX_BYTES.
 */
size_t nbd_journal_size(unsigned connections, uint64_t arena_bytes);

/*
 * The longest read or write of such a device; longer ones are answered with an error. The device's
 * queue/max_sectors_kb must not be above it. At least 1 MiB, at most BLK_REQUEST_MAX.
 */
uint32_t nbd_journal_max_request(unsigned connections, uint64_t arena_bytes);

/* All descriptors stay the caller's and must stay open as long as the journal is. */
struct nbd_seat {
	/* A memfd of nbd_journal_size() bytes, full of zeroes at first; best sealed against resizing. */
	int memory_fd;
	unsigned connections;
	struct nbd_seat_ends {
		int fd; /* the server's end: AF_UNIX, SOCK_STREAM, not used before for anything */
		int driver_fd; /* a duplicate of the driver's end; asked for its state, never read */
	} ends[NBD_SEAT_CONNECTIONS_MAX];
	/* The device was served before, over sockets that are gone; the memory is the one of then, or new. */
	bool inherited;
};

/*
 * Maps the journal, all of it (populated; locked when the process's memory is). Memory full of zeroes is a
 * new seat and becomes a journal; else the positions of all connections are taken from the sockets and
 * everything is checked. Nobody else may serve this seat any more: a predecessor was waited for, and so is
 * what it had handed to the kernel (blk_env.successor).
 *
 * -EPROTONOSUPPORT: another version's journal. -EUCLEAN: nonsense. -ENOTSUP: this kernel does not count
 * what a socket consumes. -EINVAL, -ENOMEM, or what a system call says. After an error nothing was
 * received, sent or changed; the seat cannot be served, and the device is to be re-attached with new
 * sockets and new memory: that loses no acknowledged write unless the stack keeps some in its memory.
 */
int nbd_journal_open(const struct nbd_seat *seat, struct nbd_journal **journal, struct err *err);

/* Whether there was a predecessor on the seat. */
bool nbd_journal_resumed(const struct nbd_journal *journal);

/*
 * When everybody died who had the sockets, the keeper too, the device gets new ones, and the driver asks again for
 * what was not answered. Memory that outlived them is opened with the new sockets like any other: it knows its
 * own, and what was acknowledged over those is done again, made durable and forgotten. Without it nobody knows
 * what that was (nbd_seat.inherited).
 *
 * Home reactor; before the first nbd_serve() of the journal, and before the export has other clients.
 * Binds the journal to the export (one journal per export at a time) and does again, in their order, the
 * acknowledged writes, zeroes and discards that the predecessor's stack may have had in its memory only.
 * -ENOTRECOVERABLE when there was a predecessor and the disk's content, or what was acknowledged and is known to nobody
 * now, died with it. -EBUSY: the export has one.
 * On an error of the disk the journal is unchanged: the call may be repeated, also by a successor.
 */
suspends int nbd_journal_replay(
	struct nbd_journal *journal, struct nbd_export *export, struct err *err);

/*
 * Home reactor. What the journal keeps of acknowledged writes in case of a crash becomes durable and is
 * forgotten. Needed after anything has changed the export's disk other than by its connections, such as a
 * discard or a shrinking resize by command: else a successor could do an older write again on top.
 * 0 at once when there is no journal, or nothing in it. Else what blk_flush() says.
 */
suspends int nbd_journal_settle(struct nbd_export *export);

/*
 * Home reactor, once no nbd_serve() runs on it. Parts it from the export and unmaps; what it says stays
 * in the memory, for a successor. NULL is fine.
 */
suspends void nbd_journal_close(struct nbd_journal *journal);
