/*
 * The insides of the qcow layer, shared by the files of this folder.
 *
 *	qcow.c		the op table, open and close, resize, status
 *	header.c	reading, checking and rewriting the header
 *	cache.c		slices of L2 tables and refcount blocks in memory
 *	map.c		from guest offsets to host offsets: L1, L2, entries
 *	refcount.c	reference counts, allocation, deferred frees
 *	clusters.c	sets and lists of clusters
 *	data.c		reads and writes, copy on write
 *	zero.c		zero and discard
 *	compressed.c	compressed clusters
 *	commit.c	the order in which metadata reaches the disk
 *	resize.c	other sizes
 *	backing.c	the files an image refers to
 *	snapshot.c check.c compact.c	what their names say
 *	compact_auto.c	compaction that starts by itself
 *	live.c		checks and snapshots of an image in use
 *
 * How an image stays sound (the format's rules are kept at every instant, for any subset of unflushed
 * writes reaching the disk):
 *
 * - All changes to tables are made in memory (cache, L1, refcount table) and marked dirty. commit.c
 *   writes them in three phases with a flush of the layer below between them:
 *	1. refcount blocks
 *	2. the refcount table (points to blocks of phase 1)
 *	3. L2 tables and the L1 table (point to data, and to new tables, both written before phase 1)
 *   What a commit writes is copied when it begins; later changes wait for the next one.
 * - An L2 entry changes in memory only after the data it points to was written below.
 * - A cluster that is no longer pointed to keeps its refcount until the commit that unlinks it has
 *   succeeded and every request that was in flight then has ended (qcow_pin()); only then is it
 *   discarded below, its count lowered in memory, and may be allocated again.
 * - Writes to guest ranges hold q->writes: shared when they go in place, exclusive (whole clusters) when they
 *   change the mapping. Reads hold nothing but their pin.
 */
#pragma once

#include "base/bitmap.h"
#include "base/util.h"
#include "blk/blk.h"
#include "blk/qcow/format.h"
#include "rt/reactor.h"

/* --- the header, decoded ---------------------------------------------------------------------- */

struct qcow_header {
	uint32_t version, cluster_bits, refcount_order, header_len;
	uint32_t crypt_method, compression;
	uint64_t size;
	uint64_t l1_off, refcount_table_off, snapshots_off;
	uint32_t l1_entry_count, refcount_table_clusters, snapshot_count;
	uint64_t incompatible, compatible, autoclear;
	uint32_t bitmap_count;
	uint64_t bitmap_directory_off, bitmap_directory_len;
	char *backing_name, *backing_format, *data_file_name; /* owned; NULL when absent */
};

/* --- the metadata cache ----------------------------------------------------------------------- */

/* A part of a table, as it is on disk (big-endian). */
struct slice {
	struct list
		link; /* in cache->lru while clean and unused, oldest first; or in cache->dirty */
	struct slice *hash_next;
	uint64_t host_off;
	uint8_t *data;
	unsigned users; /* who holds it with cache_get(): not evicted */
	bool loading, dirty;
	int load_error;
	struct co_queue loaded;
};

struct cache {
	struct qcow *q;
	uint32_t slice_size;                 /* bytes; a power of two, at most a cluster */
	size_t capacity, count, dirty_count; /* slices */
	size_t dirty_max;                    /* with more a commit is due */
	struct slice *slices;
	uint8_t *data; /* of all slices */
	struct slice **hash;
	size_t hash_mask;
	struct list lru, dirty;
	struct co_queue evictable; /* who waits for room */
	uint64_t hits, misses;
};

/* --- clusters that are given up --------------------------------------------------------------- */

/* count clusters from host cluster `index` on lose one reference each. */
struct freed {
	uint64_t index, count;
};
struct freed_list {
	struct freed *items;
	size_t count, capacity;
};

/* A set of host clusters (open addressing), for "is this one metadata?". 0 is never a member. */
struct cluster_set {
	uint64_t *keys;
	size_t count, mask;
};

/* --- the layer -------------------------------------------------------------------------------- */

struct qcow {
	struct blk blk;

	/* options */
	const struct conf *backing_conf, *data_file_conf, *allow_backing_conf;
	bool opt_lazy_refcounts, opt_discard;
	uint64_t opt_cache_size;
	int64_t opt_commit_interval_s, opt_backing_depth;
	const char *opt_compact_after;
	int64_t opt_compact_idle_s;
	uint64_t opt_compact_rate;

	struct qcow_header header;
	struct blk *backing; /* NULL: what is not mapped reads as zeroes */
	struct blk *data;    /* where guest data lies: below, or the external data file */
	bool data_file, raw_data_file;
	bool read_only; /* nothing in the image is changed */
	bool corrupt;   /* found so: writes are refused */
	char corrupt_text[160];
	bool frozen; /* nobody knows what is on disk: neither tables nor counts change any more */
	char frozen_text[160];
	struct co_mutex header_mutex; /* storing the header */
	struct co_mutex beginning;
	bool began_writing; /* autoclear bits are cleared, the dirty bit is set if lazy */

	/* geometry */
	uint64_t cluster_size;
	uint32_t cluster_bits, l2_bits; /* an L2 table has 1 << l2_bits entries */
	uint32_t entry_size;            /* 8, or 16 with extended entries */
	uint32_t subclusters;           /* per cluster: 1, or 32 */
	uint32_t subcluster_bits;       /* of bytes */
	uint32_t refcount_bits;         /* width */
	uint32_t refblock_bits;         /* a refcount block has 1 << refblock_bits entries */

	/* tables in memory, host byte order */
	uint64_t *l1, *refcount_table;
	uint32_t l1_capacity;          /* entries that fit in the clusters the table has on disk */
	uint32_t refcount_table_count; /* entries */
	uint64_t *l1_dirty, *refcount_table_dirty; /* bitmaps, a bit per entry */
	bool l1_any_dirty, refcount_table_any_dirty;
	struct cache l2_cache, refcount_cache;
	struct cluster_set metadata; /* L2 tables and refcount blocks */

	/* allocation: who waits for a refcount block holds the mutex, and relies on the indices standing still */
	struct co_mutex alloc_mutex;
	struct co_mutex l2_mutex; /* linking a new L2 table */
	uint64_t free_index;      /* no free cluster lies below */
	uint64_t fresh_index; /* clusters from here on were never written: they read as zeroes */
	uint64_t end_index;   /* clusters from here on were never allocated */
	uint64_t counted_to;  /* clusters below are counted in used_clusters; UINT64_MAX: all */
	uint64_t used_clusters;
	bool below_grows; /* blk_resize() of below works: clusters beyond its end are zero */

	/* requests */
	struct range_lock writes;
	unsigned pins[2];
	unsigned pin_epoch;

	/* commit */
	struct co_mutex commit_mutex;
	uint64_t commits_begun, commits_done; /* see commit.c */
	struct freed_list unlinked;           /* in memory only, so far */
	struct freed_list committed;          /* durably unlinked, waiting for requests in flight */
	struct co_group background;
	bool grace_running;
	struct co_queue unpinned, settled;
	struct timer commit_timer;
	struct task commit_task;
	bool commit_scheduled, closing;

	/*
	 * Held by who rearranges the image: a resize, check or snapshot as long as it takes (with the layer
	 * drained), a compaction for each of its steps. Taken before all other locks.
	 */
	struct co_mutex moving;
	struct qcow_compact *compacting; /* NULL: none runs */

	/* compact_auto.c */
	struct {
		uint64_t limit_bytes; /* free space inside the file that is left alone: so much, */
		unsigned limit_percent; /* or this share of the file */
		uint64_t left_clusters; /* free ones that were left the last time */
		uint64_t requests;      /* of guests, until the last look */
		uint64_t runs;
		struct timer timer;
		struct co_group looking;
	} auto_compact;

	struct inflated *inflated; /* compressed.c: the cluster last decompressed */

	struct {
		uint64_t allocated, freed, cow_bytes, commits, commit_errors;
	} stats;
};

static inline struct qcow *qcow_of(struct blk *blk)
{
	return container_of(blk, struct qcow, blk);
}

/* Requests in flight pin every host cluster they may see; see the head of this file. */
static inline unsigned qcow_pin(struct qcow *q)
{
	unsigned epoch = q->pin_epoch & 1;

	q->pins[epoch]++;
	return epoch;
}
void qcow_unpin(struct qcow *q, unsigned epoch); /* commit.c */

/* --- qcow.c ----------------------------------------------------------------------------------- */

/* Reads L1 and refcount table as the header has them, and finds the end of the image. The old ones are kept on an error. */
suspends int qcow_load_tables(struct qcow *q, struct err *err);

/* --- header.c --------------------------------------------------------------------------------- */

suspends int qcow_header_load(struct blk *file, struct qcow_header *header, struct err *err);
void qcow_header_fini(struct qcow_header *header);
/* Its size and L1 table, when they are others than those of the file. */
int qcow_header_check_disk(const struct qcow_header *header, uint64_t file_size, struct err *err);
/* Rewrites the fixed fields in place (one write within the first sector), nothing else. */
suspends int qcow_header_write(struct blk *file, const struct qcow_header *header);
suspends int qcow_header_store(struct qcow *q);
/* Where everything is, and the size: what changes when tables are replaced. */
void qcow_header_take(struct qcow_header *to, const struct qcow_header *from);
/*
 * Makes q->header durable. On an error the old one is in memory and certainly on disk again, so that what the new one
 * points to may be reused; or else the layer is frozen.
 */
suspends int qcow_header_switch(struct qcow *q, const struct qcow_header *old);
/* Stores q->header anew where another one may have reached the disk. On an error the layer is frozen. */
suspends int qcow_header_restore(struct qcow *q);
/* Before anything in the image changes for the first time: clears autoclear bits, sets the dirty bit when lazy. */
suspends int qcow_begin_writing(struct qcow *q);
/* Sets the corrupt bit and refuses writes from now on. Returns -EIO. */
suspends int qcow_mark_corrupt(struct qcow *q, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* --- cache.c ---------------------------------------------------------------------------------- */

int cache_init(struct cache *cache, struct qcow *q, uint64_t size_bytes);
void cache_fini(struct cache *cache);
/* The slice at host_off if it is in memory; valid until the caller suspends. */
struct slice *cache_peek(struct cache *cache, uint64_t host_off);
/* The same, loaded when needed, kept until cache_put(). */
suspends int cache_get(struct cache *cache, uint64_t host_off, struct slice **slice);
/* A slice of zeroes, not read from disk: for a new table. */
suspends int cache_get_new(struct cache *cache, uint64_t host_off, struct slice **slice);
void cache_use(struct slice *slice); /* one more user of a slice at hand */
void cache_put(struct cache *cache, struct slice *slice);
void cache_mark_dirty(struct cache *cache, struct slice *slice);
void cache_mark_clean(struct cache *cache, struct slice *slice);
/* Forgets (drops, dirty or not) every slice in the host range: its cluster is free. */
void cache_forget(struct cache *cache, uint64_t host_off, uint64_t len);
void cache_forget_all(struct cache *cache); /* none of them in use or dirty */

/* --- map.c ------------------------------------------------------------------------------------ */

/* A decoded L2 entry. Without extended entries a cluster is its own only subcluster. */
struct l2_entry {
	uint64_t
		host_off; /* of the cluster; 0: none. With compressed: the byte where the data starts */
	uint32_t alloc_bits; /* subclusters whose data lies in the host cluster */
	uint32_t zero_bits;  /* subclusters that read as zeroes */
	bool copied;         /* host_off is ours alone */
	bool compressed;
	uint32_t compressed_len; /* bytes that may belong to it, in whole sectors from host_off's */
};

/* Offset 0 is a host offset only in a data file, and then the copied bit is set. */
static inline bool qcow_entry_has_host(const struct qcow *q, const struct l2_entry *entry)
{
	return entry->host_off || (q->data_file && entry->copied);
}

struct l2_entry qcow_entry_decode(const struct qcow *q, const uint8_t *raw);
void qcow_entry_encode(const struct qcow *q, const struct l2_entry *entry, uint8_t *raw);
/* NULL, or what is wrong with an entry found at guest_off. */
const char *qcow_entry_fault(
	const struct qcow *q, const struct l2_entry *entry, uint64_t guest_off);

enum run_kind { RUN_HOLE, RUN_ZERO, RUN_DATA, RUN_COMPRESSED };

/* A stretch of the disk of one kind. */
struct run {
	enum run_kind kind;
	uint64_t len;          /* bytes from the guest offset asked for */
	uint64_t host_off;     /* RUN_DATA: of the first byte */
	bool in_place;         /* RUN_DATA: may be overwritten without a change to the mapping */
	bool has_host;         /* RUN_ZERO: has a host cluster all the same */
	struct l2_entry entry; /* of the first cluster */
};

/* Describes the disk from guest_off on, up to max_len bytes; contiguous in the host when RUN_DATA. */
suspends int qcow_map(struct qcow *q, uint64_t guest_off, uint64_t max_len, struct run *run);

/* The slice with guest_off's entry for changing it; makes or copies the L2 table as needed. */
suspends int qcow_entry_get(
	struct qcow *q, uint64_t guest_off, struct slice **slice, uint8_t **raw);
/* Moves an L2 table that is ours to the new cluster, which is taken over. Nobody may change it meanwhile. */
suspends int qcow_move_l2_table(struct qcow *q, uint64_t l1_index, uint64_t new_off);
/* After a change made through *raw. Also puts the slice. */
void qcow_entry_put_dirty(struct qcow *q, struct slice *slice);
/* How many clusters from guest_off on have their entries in the same slice. */
uint64_t qcow_clusters_in_slice(const struct qcow *q, uint64_t guest_off);
static inline uint64_t qcow_cluster_start(const struct qcow *q, uint64_t off)
{
	return off & ~(q->cluster_size - 1);
}

/* --- refcount.c ------------------------------------------------------------------------------- */

suspends int qcow_refcount_get(struct qcow *q, uint64_t index, uint64_t *refcount);
/* Counts the clusters in use, unless it is known: q->used_clusters says it from then on. Holds moving, not all the time. */
suspends int qcow_count_used(struct qcow *q);
/* Adds delta to the counts of host clusters [index, index + count). In memory; -ERANGE beyond the width or below 0. */
suspends int qcow_refcount_add(struct qcow *q, uint64_t index, uint64_t count, int64_t delta);
/* Between 1 and want contiguous clusters, counted once; *fresh: they read as zeroes. */
suspends int qcow_alloc(
	struct qcow *q, uint64_t want, uint64_t *host_off, uint64_t *got, bool *fresh);
/* Exactly count contiguous ones. */
suspends int qcow_alloc_exactly(struct qcow *q, uint64_t count, uint64_t *host_off, bool *fresh);
/* The next allocations look for free clusters from the start of the file. */
suspends void qcow_search_anew(struct qcow *q);
/* One cluster below host cluster `limit`, its content undefined; -ENOSPC when there is none. */
suspends int qcow_alloc_below(struct qcow *q, uint64_t limit, uint64_t *host_off);
/* Moves refcount blocks at or behind host cluster `mark` before it, as long as there is room: else -ENOSPC. */
suspends int qcow_move_refblocks(struct qcow *q, uint64_t mark);
/* The same for the refcount table. */
suspends int qcow_move_refcount_table(struct qcow *q, uint64_t mark);
/* Finds the end of what is in use again, drops refcount blocks behind it, and cuts the file. Settled before. */
suspends int qcow_cut_end(struct qcow *q);
/* Gives back what was never pointed to by anything. */
suspends void qcow_free_unused(struct qcow *q, uint64_t host_off, uint64_t count);
/* The entry that pointed there has been changed in memory: to be freed when that is durable. */
void qcow_free_unlinked(struct qcow *q, uint64_t host_off, uint64_t count);
void qcow_free_entry(
	struct qcow *q, const struct l2_entry *entry); /* the same for all that entry points to */
int freed_list_add(struct freed_list *list, uint64_t index, uint64_t count);
bool cluster_set_has(const struct cluster_set *set, uint64_t index);
void cluster_set_add(struct cluster_set *set, uint64_t index);
void cluster_set_remove(struct cluster_set *set, uint64_t index);
/* True when host cluster `index` holds metadata that data must not overwrite. */
bool qcow_is_metadata(const struct qcow *q, uint64_t index);

/* --- data.c ----------------------------------------------------------------------------------- */

suspends int qcow_read(struct blk *blk, uint64_t off, void *buf, size_t len);
suspends int qcow_write(struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags);
/* The disk's content as the guest sees it; the caller holds a pin. */
suspends int qcow_read_guest(struct qcow *q, uint64_t off, void *buf, size_t len);
/* Reads the image file; what lies beyond its end reads as zeroes. */
suspends int qcow_read_host(struct qcow *q, uint64_t host_off, void *buf, size_t len);

/* --- zero.c ----------------------------------------------------------------------------------- */

suspends int qcow_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
suspends int qcow_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags);
/* Gives back what the range has; where there is a backing, that may show. Writing has begun. */
suspends int qcow_unmap(struct qcow *q, uint64_t off, uint64_t len);
/* As data, where it does not read so already. May reach to the end of the disk's last cluster. Writing has begun. */
suspends int qcow_write_zeroes(struct qcow *q, uint64_t off, uint64_t end);

/* --- compressed.c ----------------------------------------------------------------------------- */

suspends int qcow_read_compressed(struct qcow *q, const struct l2_entry *entry,
	uint64_t off_in_cluster, void *buf, size_t len);
void qcow_inflated_forget(struct qcow *q);
void qcow_inflated_free(struct qcow *q);

/* --- commit.c --------------------------------------------------------------------------------- */

void qcow_commit_init(struct qcow *q);
suspends void qcow_commit_fini(struct qcow *q); /* what is not committed by now is dropped */
/* Makes every change to the mapping that was made before the call durable, and all data. */
suspends int qcow_commit(struct qcow *q);
/* The same for who holds commit_mutex (and makes more changes before letting go of it). */
suspends int qcow_commit_locked(struct qcow *q);
/* Starts a commit in the background soon: the caches are full of dirty slices. */
void qcow_commit_soon(struct qcow *q);
/* Arms the timer that commits metadata nobody flushes. */
void qcow_commit_later(struct qcow *q);
bool qcow_metadata_dirty(const struct qcow *q);
/* Waits until everything that is unlinked is free (commits first). For close, shrink, compaction. */
suspends int qcow_settle(struct qcow *q);

/* --- compact_auto.c --------------------------------------------------------------------------- */

/* The option: *bytes or *percent becomes what it says, the other one 0. */
int qcow_compact_after_parse(const char *text, uint64_t *bytes, unsigned *percent, struct err *err);
void qcow_compact_auto_init(struct qcow *q);
void qcow_compact_auto_start(struct qcow *q); /* when the option is given, from now on */
suspends void qcow_compact_auto_stop(struct qcow *q);

/* --- resize.c, backing.c ---------------------------------------------------------------------- */

suspends int qcow_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err);
/*
 * The absolute path that a name inside an image leads to, seen from the image's folder (NULL: none), when that
 * is in an allowed folder; the caller's to free. -EACCES when it is in none.
 */
suspends int qcow_resolve(
	const struct conf *allowed, const char *folder, const char *name, char **path);
suspends int qcow_open_backing(struct qcow *q, struct err *err);
suspends int qcow_open_data_file(struct qcow *q, struct err *err);
