/*
 * blk: the one interface of everything that stores bytes.
 *
 * A stack is a chain of layers, top first. A door (the NBD socket, the kernel device) calls blk_read()
 * and its sisters on the top; each layer does its part with the same calls on the layer below; the
 * last one stores the bytes.
 *
 *	door -> blk_write() -> padded -> blk_write() -> qcow -> blk_write() -> file -> disk
 *
 * The calls (this file, upper half) are for users of a disk; they check, split and align. The op table
 * (lower half) is what a layer provides; it is only ever called by blk.c, with arguments that are right.
 *
 * Everything runs in a coroutine on the stack's home reactor and may suspend. Data calls return 0 or -errno,
 * never a short count. Offsets and lengths are in bytes; size is at most BLK_SIZE_MAX.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "base/conf.h"
#include "base/err.h"
#include "base/list.h"
#include "rt/co.h"
#include "rt/lock.h"

struct blk;
struct blk_ops;

#define BLK_SIZE_MAX       (UINT64_C(1) << 62) /* sums of an offset and a length never overflow */
#define BLK_REQUEST_MAX    (32U << 20)         /* the longest read or write, as doors accept it */
#define BLK_BLOCK_SIZE_MAX (64U << 10)

enum blk_flags {
	BLK_FUA = 1 << 0,       /* write, zero, discard: durable at return */
	BLK_NO_HOLE = 1 << 1,   /* zero: keep the space allocated */
	BLK_FAST_ZERO = 1 << 2, /* zero: -EOPNOTSUPP and no change rather than writing data */
	BLK_FORCE = 1 << 3,     /* resize: allow to shrink */
};

/*
 * What a disk is like. A layer sets it in open(), inheriting what is below; size may change later.
 * What a leaf leaves 0 becomes: block_size 1, preferred_size 4096 (or block_size if larger),
 * max_request BLK_REQUEST_MAX, mem_align 1.
 */
struct blk_caps {
	uint64_t size; /* a multiple of block_size */
	uint32_t
		block_size; /* ops are called with multiples of this: a power of two, 1 = any byte */
	uint32_t
		preferred_size; /* what requests are best aligned to: a power of two, >= block_size */
	uint32_t
		max_request; /* longest read or write an op is called with, a multiple of block_size */
	uint32_t mem_align; /* alignment of buffers ops are called with: a power of two <= 4096 */
	bool read_only;     /* set before open() when the stack is opened so: open() obeys */
	bool fua;           /* write/zero/discard ops honour BLK_FUA; else blk.c adds a flush */
	bool zero_fast;     /* zero is faster than writing zeroes */
	bool discard;       /* discard gives space back */
	bool maps_cheaply;  /* extents() costs next to nothing beside a read of some length */
	bool grows;         /* a resize to more works, and what is added reads as zeroes */
	bool multi_reactor; /* ops may be called from several reactors at once */
	/*
	 * What a death of this process alone (not of the machine) costs, for whoever wants to start a new one
	 * that carries on. Both are inherited upward: a layer adds its own to those of its children.
	 */
	bool caches_writes; /* a write that returned may be lost unless a flush, or FUA, followed */
	bool dies_with_process; /* all of the content is lost, flushed or not */
};

/* --- extents ---------------------------------------------------------------------------------- */

/* As NBD's base:allocation: a hole has no space of its own; zero reads as zeroes. Data is 0. */
enum blk_extent_flags { BLK_EXTENT_DATA = 0, BLK_EXTENT_HOLE = 1, BLK_EXTENT_ZERO = 2 };

struct blk_extent {
	uint64_t len;
	uint32_t flags;
	uint32_t depth; /* see blk_extents.tells_depth; else 0 */
};

/*
 * A list being filled; neighbours alike are merged. The array is the caller's. blk_extents() appends
 * to it: the first call on an empty list sets where it starts, a later one goes on at its end.
 */
struct blk_extents {
	uint64_t off;   /* where the first one starts */
	uint64_t end;   /* where the last one ends: off + the sum of all */
	uint64_t limit; /* end never goes beyond: longer ones are cut */
	struct blk_extent *list;
	unsigned count, max_count;
	/*
	 * Set by a caller who wants to know who has the data: then an extent with space of its own has in
	 * `depth` how far down the chain of backing images that is, 0 for the disk itself.
	 */
	bool tells_depth;
	uint32_t depth; /* what is added now has this one */
};

void blk_extents_init(struct blk_extents *extents, struct blk_extent *list, unsigned max_count);
/* Appends; false when the limit is reached or the list is full, which ends the search. */
bool blk_extents_add(struct blk_extents *extents, uint64_t len, uint32_t flags);

/* --- using a disk ----------------------------------------------------------------------------- */

/*
 * Order of refusal: bad arguments -EINVAL, disconnected -ESHUTDOWN, read-only -EPERM (writes), out of
 * range -EINVAL (reads, extents) or -ENOSPC (writes). A length of 0 succeeds and does nothing. The
 * counters count what was not refused.
 * Buffers belong to the caller until return. Read and write: len <= BLK_REQUEST_MAX; the others: any.
 */
suspends int blk_read(struct blk *blk, uint64_t off, void *buf, size_t len);
suspends int blk_write(struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags);

/* Every write, zero and discard that returned before the call is durable at return. */
suspends int blk_flush(struct blk *blk);

/* The range reads as zeroes afterwards, exactly that range, whatever the alignment. */
suspends int blk_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);

/* Like blk_zero(), and the space is given back where the layers can. */
suspends int blk_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);

/*
 * Describes [off, off + len) from its start: at least one extent, not necessarily all. Conservative:
 * what may hold data is data (rounded outward). Never fails for want of the information: it is data then.
 */
suspends int blk_extents(struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents);

/* The first mapped (not reading as known zeroes), or unmapped, byte at or after off; the size when there is none. */
suspends int blk_seek_mapped(struct blk *blk, uint64_t off, uint64_t *found_off);
suspends int blk_seek_unmapped(struct blk *blk, uint64_t off, uint64_t *found_off);

/*
 * To size (rounded up to the block size; not 0). To shrink needs BLK_FORCE: what lies beyond is lost.
 * Waits for what is under way; one resize of a disk at a time. When it fails, all is as it was.
 */
suspends int blk_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err);

/* A list of buffers; a helper, one request per buffer. */
struct iovec;
suspends int blk_readv(struct blk *blk, uint64_t off, const struct iovec *iov, int iov_count);
suspends int blk_writev(
	struct blk *blk, uint64_t off, const struct iovec *iov, int iov_count, unsigned flags);

/*
 * Nothing runs in blk, and new calls wait, between the two. For changes to a live graph. May nest.
 * A layer must not drain itself from inside one of its own ops.
 */
suspends void blk_drain_begin(struct blk *blk);
void blk_drain_end(struct blk *blk);

/*
 * The whole tree from blk down as JSON, a new reference:
 *	{ "layer": "file", "size": N, "block_size": N, "preferred_size": N, "max_request": N,
 *	  "read_only": B, "fua": B, "zero_fast": B, "discard": B, "in_flight": N,
 *	  "counters": { "read": { "requests": N, "bytes": N, "errors": N }, "write": ... },
 *	  "last_error": { "op": "write", "code": N, "text": T, "off": N, "len": N, "time": UNIX_SECONDS },
 *	  (keys of the layer's own), "children": [ the layer below, then extra children ] }
 * "last_error" is there once there was one.
 */
json_t *blk_status(struct blk *blk);

const struct blk_caps *blk_caps(const struct blk *blk);

/* Called on the home reactor when the size of the top of a stack changes. */
struct blk_listener {
	void (*size_changed)(struct blk_listener *listener, uint64_t size);
};
void blk_set_listener(struct blk *top, struct blk_listener *listener); /* NULL: nobody */

/* --- opening and closing a stack -------------------------------------------------------------- */

/* What the stacks of one program share. Outlives them all. */
struct blk_env {
	struct memory_disks *memory_disks; /* the named disks of the memory layer (memory.c) */
	bool start_failed; /* set before closing after a failed start: what open() created is removed */
	bool read_only;    /* open everything read-only (tools that only look) */
	bool command_line; /* there is no config: errors advise by options of a command */
	/*
	 * This process goes on where a predecessor was killed. What that one had handed to the kernel may be under
	 * way still, and hold its locks: files are waited for, which keeps old writes from coming after new ones.
	 */
	bool successor;
	/* Stacks that wait for their last requests before they close, and nobody for them; see mirror/leg.c. */
	_Atomic unsigned left_behind;
	/* Hears what no caller is told, such as the loss of a server; see blk_notice(). NULL: nobody. */
	void (*notice)(const struct blk *blk, const char *text);
};

int blk_env_init(struct blk_env *env);
void blk_env_fini(struct blk_env *env);

/*
 * Checks layers, option names and values of `list` (CONF_LIST of groups, top first); touches nothing.
 * Errors of this and stack_open() read "PLACE: LAYER: what is wrong" (see err_place()): whoever wraps
 * them gets "PLACE: export "db": LAYER: what is wrong".
 */
int stack_check(const struct conf *list, struct err *err);

/*
 * Opens from the bottom up; on an error everything is closed again and *top is NULL. The layers keep copies
 * of what they need of `list`. read_only: whatever the layers say.
 */
suspends int stack_open(const struct conf *list, struct blk_env *env, bool read_only,
	struct blk **top, struct err *err);

/*
 * Flushes and closes each layer from the top down. Waits for what is under way (calls that come later
 * than this one are not allowed). Who wants to know whether the flush worked calls blk_flush() before.
 * NULL is fine.
 */
suspends void stack_close(struct blk *top);

/* Adds the configurations of the layers from top down to `end`, which is not one of them (NULL: all) to the list. */
void stack_describe(const struct blk *top, const struct blk *end, struct conf *list);

/*
 * Nobody waits for what is under way any more, and nobody will call again: new requests get -ESHUTDOWN, layers end
 * what they can end. What cannot be ended goes on, on buffers that stay valid, until it ends by itself. Closing
 * comes later, as ever.
 */
void blk_abandon(struct blk *top);

/* --- being a layer ---------------------------------------------------------------------------- */

/*
 * The contract of the ops. blk.c has checked range, alignment (to caps.block_size), memory
 * alignment, lengths, read-only and flags: a layer asserts and does not re-check. Requests run
 * concurrently; overlapping ones may run in any order.
 *
 * A missing op means one thing: a layer with a child passes the call on to it unchanged; a leaf gets
 * the emulation in blk.c (zero: writes; discard: zero; flush: nothing to do; extents: all data) or -EOPNOTSUPP (resize).
 * A zero or discard op may itself answer -EOPNOTSUPP for a range: blk.c then emulates that call.
 *
 * zero and discard come with any length that is a multiple of block_size. discard must leave zeroes.
 */
struct blk_ops {
	const char *name;
	const char *summary; /* one line for --help and the manual */
	const struct opt
		*options;   /* fields are offsets in the layer's struct; an OPT_LIST is a stack */
	size_t struct_size; /* of the layer's struct, whose first member is struct blk */
	bool is_leaf;       /* stores bytes itself: stands last in a stack */

	/* Whether the options, just parsed, fit together. Touches nothing. May be missing. */
	int (*check)(const struct blk *blk, struct err *err);

	/* Children are open, options checked, caps inherited from the child (zeroed for a leaf). */
	suspends int (*open)(struct blk *blk, struct err *err);
	/* Also after a failed open(): handle half-built. May take time; cannot fail. Children close after. */
	suspends void (*close)(struct blk *blk);

	suspends int (*read)(struct blk *blk, uint64_t off, void *buf, size_t len);
	suspends int (*write)(
		struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags);
	suspends int (*flush)(struct blk *blk);
	suspends int (*zero)(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
	suspends int (*discard)(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
	suspends int (*extents)(
		struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents);

	/* Called drained. The op ends with blk_size_changed(). */
	suspends int (*resize)(struct blk *blk, uint64_t size, unsigned flags, struct err *err);
	/* A child's size changed, blk's own is not adjusted yet. Missing: blk takes the size of below over. */
	void (*child_resized)(struct blk *blk, struct blk *child);

	/* The layer's configuration as it is now, a new group. Missing: it is what it was opened with. */
	struct conf *(*describe)(const struct blk *blk);
	/* See blk_abandon(); the children are told by themselves. Missing: nothing can be ended early. */
	void (*abandon)(struct blk *blk);

	/* Adds the layer's own keys to the object. */
	void (*status)(struct blk *blk, json_t *object);
};

enum blk_counter {
	BLK_COUNT_READ,
	BLK_COUNT_WRITE,
	BLK_COUNT_FLUSH,
	BLK_COUNT_ZERO,
	BLK_COUNT_DISCARD,
	BLK_COUNT_EXTENTS,
	BLK_COUNTERS
};

struct blk_counters {
	uint64_t requests[BLK_COUNTERS];
	uint64_t bytes[BLK_COUNTERS];
	uint64_t errors[BLK_COUNTERS];
	/* the last error, for status */
	int last_error; /* errno, 0: none so far */
	enum blk_counter last_error_op;
	uint64_t last_error_off, last_error_len;
	int64_t last_error_time; /* CLOCK_REALTIME, seconds */
};

/* First member of every layer's struct. Layers read ops, below, caps, env and conf; the rest is blk.c's. */
struct blk {
	const struct blk_ops *ops;
	struct blk *below; /* the next layer of the stack; NULL for a leaf. Owned */
	struct blk_caps caps;
	struct blk_env *env;
	const struct conf *
		conf; /* the layer's group, its own copy: options point into it, errors name its place */

	struct blk *parent; /* the layer above, NULL for the top */
	struct blk_listener *listener;
	struct blk_counters counters;
	struct co_group in_flight;
	bool start_failed; /* as in blk_env, for this stack alone: set by stack_open() */
	bool disconnected; /* calls answer -ESHUTDOWN; also set by a layer whose disk is gone for good */
	struct co_mutex resizing;
	unsigned drained;          /* depth of blk_drain_begin() */
	struct co_queue undrained; /* who waits for it to be over */
	struct range_lock
		writes; /* writes in flight, where block_size > 1: see blk.c on read-modify-write */
	struct conf *own_conf; /* made by the layer for its children; freed after they are closed */
	struct list extra_children; /* stacks opened by blk_open_child() */
	struct list extra_link;
};

/* Tells the administrator (the daemon's log) of something that no request's error tells. Any reactor. */
void blk_notice(const struct blk *blk, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* A layer's own size is now `size`: tells the layers above and the doors. */
void blk_size_changed(struct blk *blk, uint64_t size);

/* For layers with more children than the one below (a mirror's secondary, a qcow's backing): a stack of its own, closed with blk. */
suspends int blk_open_child(struct blk *blk, const struct conf *list, bool read_only,
	struct blk **child, struct err *err);

/* For check(): size must be a multiple of block_size; the error names the place of option "size" of group. */
int blk_check_size(const struct conf *group, uint64_t size, uint64_t block_size, struct err *err);

/* The layers there are, in lib/blk/registry.c; ended by NULL. */
extern const struct blk_ops *const blk_layers[];
const struct blk_ops *blk_layer_find(const char *name); /* NULL when there is none */
