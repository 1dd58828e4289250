/*
 * Slices of tables in memory: a hash by host offset, least recently used go first.
 *
 * A slice is in one of these states: free (host_off 0), loading (others wait in `loaded`), clean, dirty. Dirty
 * ones leave only through a commit, so when nothing clean and unused is left, whoever needs room
 * starts a commit and waits. Memory is one mapping, which takes pages as the cache fills, gives none back
 * before the end, and is bounded by the configured size; what a commit
 * copies comes on top, and is bounded by dirty_max.
 *
 * Lookups that hit never suspend and allocate nothing.
 */
#include "blk/qcow/qcow.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* At least this many slices, however small the configuration: several are in use at the same time. */
#define CACHE_SLICES_MIN UINT64_C(32)
#define SLICE_SIZE_MAX   UINT64_C(4096)

/* What a slice costs beside its data: itself, and up to four buckets. */
#define SLICE_OVERHEAD (sizeof(struct slice) + 4 * sizeof(struct slice *))

/* A commit is due when half of a small cache is dirty, or an eighth of a large one: it copies all that is. */
#define DIRTY_BYTES (UINT64_C(2) << 20)

static size_t data_len(const struct cache *cache)
{
	return cache->capacity * cache->slice_size;
}

int cache_init(struct cache *cache, struct qcow *q, uint64_t size_bytes)
{
	size_t buckets = 64;

	cache->q = q;
	cache->slice_size = (uint32_t)MIN(q->cluster_size, SLICE_SIZE_MAX);
	cache->capacity = MAX(size_bytes / (cache->slice_size + SLICE_OVERHEAD), CACHE_SLICES_MIN);
	cache->dirty_max = MIN(
		cache->capacity / 2, MAX(cache->capacity / 8, DIRTY_BYTES / cache->slice_size));
	while (buckets < 2 * cache->capacity)
		buckets *= 2;
	cache->hash_mask = buckets - 1;
	list_init(&cache->lru);
	list_init(&cache->dirty);
	co_queue_init(&cache->evictable);
	cache->slices = calloc(cache->capacity, sizeof(*cache->slices));
	cache->hash = calloc(buckets, sizeof(*cache->hash));
	/* malloc would take nearly twice as much for pieces as aligned as this. */
	cache->data = mmap(NULL, data_len(cache), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (cache->data == MAP_FAILED)
		cache->data = NULL;
	return cache->slices && cache->hash && cache->data ? 0 : -ENOMEM;
}

void cache_fini(struct cache *cache)
{
	if (cache->data)
		munmap(cache->data, data_len(cache));
	free(cache->slices);
	free(cache->hash);
	cache->data = NULL;
	cache->slices = NULL;
	cache->hash = NULL;
	cache->count = 0;
}

/* --- the hash --------------------------------------------------------------------------------- */

static struct slice **bucket(struct cache *cache, uint64_t host_off)
{
	uint64_t key = host_off / cache->slice_size * UINT64_C(0x9e3779b97f4a7c15);

	return &cache->hash[(key >> 32) & cache->hash_mask];
}

static struct slice *find(struct cache *cache, uint64_t host_off)
{
	struct slice *slice = *bucket(cache, host_off);

	while (slice && slice->host_off != host_off)
		slice = slice->hash_next;
	return slice;
}

static void unhash(struct cache *cache, struct slice *slice)
{
	struct slice **link = bucket(cache, slice->host_off);

	while (*link != slice)
		link = &(*link)->hash_next;
	*link = slice->hash_next;
	slice->host_off = 0;
}

static void rehash(struct cache *cache, struct slice *slice, uint64_t host_off)
{
	struct slice **link = bucket(cache, host_off);

	slice->host_off = host_off;
	slice->hash_next = *link;
	*link = slice;
}

/* --- room ------------------------------------------------------------------------------------- */

static struct slice *add_slice(struct cache *cache)
{
	struct slice *slice = &cache->slices[cache->count];

	slice->data = cache->data + cache->count * cache->slice_size;
	list_init(&slice->link);
	co_queue_init(&slice->loaded);
	cache->count++;
	return slice;
}

/* A slice that holds nothing; NULL: none can be had now. */
static struct slice *take_unused(struct cache *cache)
{
	if (cache->count < cache->capacity)
		return add_slice(cache);
	/* Dirty slices are on another list, so whatever is on this one may go. */
	struct list *link = list_pop_front(&cache->lru);
	if (!link)
		return NULL;
	struct slice *slice = list_entry(link, struct slice, link);
	if (slice->host_off)
		unhash(cache, slice);
	return slice;
}

static void maybe_evictable(struct cache *cache, struct slice *slice)
{
	if (slice->users || slice->dirty || slice->loading || !list_empty(&slice->link))
		return;
	list_push_back(&cache->lru, &slice->link);
	co_queue_wake_one(&cache->evictable);
}

void cache_use(struct slice *slice)
{
	if (!slice->users++ && !slice->dirty)
		list_remove(&slice->link);
}

/*
 * A slice for host_off with one user: found, or an empty one put in its place. When all are dirty or in
 * use it waits for a commit, and gives up when that fails: the image below is full or broken.
 */
static suspends int claim(
	struct cache *cache, uint64_t host_off, struct slice **claimed, bool *found)
{
	for (;;) {
		struct slice *slice = find(cache, host_off);

		*found = slice;
		if (!slice && (slice = take_unused(cache)))
			rehash(cache, slice, host_off);
		if (slice) {
			cache_use(slice);
			*claimed = slice;
			return 0;
		}
		uint64_t errors = cache->q->stats.commit_errors;
		qcow_commit_soon(cache->q);
		co_queue_wait(&cache->evictable);
		if (cache->q->stats.commit_errors != errors)
			return -EIO;
	}
}

/* --- what the layer uses ---------------------------------------------------------------------- */

struct slice *cache_peek(struct cache *cache, uint64_t host_off)
{
	struct slice *slice = find(cache, host_off);

	if (!slice || slice->loading)
		return NULL;
	if (!list_empty(&slice->link) && !slice->dirty && cache->lru.prev != &slice->link) {
		list_remove(&slice->link);
		list_push_back(&cache->lru, &slice->link);
	}
	cache->hits++;
	return slice;
}

suspends int cache_get(struct cache *cache, uint64_t host_off, struct slice **got)
{
	struct slice *slice;
	bool found;
	int ret = claim(cache, host_off, &slice, &found);

	if (ret)
		return ret;
	if (!found) {
		cache->misses++;
		slice->loading = true;
		slice->load_error = qcow_read_host(
			cache->q, host_off, slice->data, cache->slice_size);
		slice->loading = false;
		co_queue_wake_all(&slice->loaded);
	} else {
		cache->hits++;
		while (slice->loading)
			co_queue_wait(&slice->loaded);
	}
	if (slice->load_error) {
		ret = slice->load_error;
		/* The last one to leave forgets it, so that the next attempt reads again. */
		if (slice->users == 1 && slice->host_off) {
			unhash(cache, slice);
			slice->load_error = 0;
		}
		cache_put(cache, slice);
		return ret;
	}
	*got = slice;
	return 0;
}

suspends int cache_get_new(struct cache *cache, uint64_t host_off, struct slice **got)
{
	struct slice *slice;
	bool found;
	int ret = claim(cache, host_off, &slice, &found);

	if (ret)
		return ret;
	while (slice->loading)
		co_queue_wait(&slice->loaded);
	slice->load_error = 0;
	memset(slice->data, 0, cache->slice_size);
	*got = slice;
	return 0;
}

void cache_put(struct cache *cache, struct slice *slice)
{
	assert(slice->users);
	slice->users--;
	maybe_evictable(cache, slice);
}

void cache_mark_dirty(struct cache *cache, struct slice *slice)
{
	assert(slice->host_off);
	if (slice->dirty)
		return;
	slice->dirty = true;
	list_remove(&slice->link);
	list_push_back(&cache->dirty, &slice->link);
	cache->dirty_count++;
	if (cache->dirty_count > cache->dirty_max)
		qcow_commit_soon(cache->q);
	else
		qcow_commit_later(cache->q);
}

void cache_mark_clean(struct cache *cache, struct slice *slice)
{
	if (!slice->dirty)
		return;
	slice->dirty = false;
	list_remove(&slice->link);
	cache->dirty_count--;
	maybe_evictable(cache, slice);
}

void cache_forget(struct cache *cache, uint64_t host_off, uint64_t len)
{
	for (uint64_t off = host_off; off < host_off + len; off += cache->slice_size) {
		struct slice *slice = find(cache, off);

		if (!slice)
			continue;
		/* Whoever still uses it keeps what it holds, but nobody finds it any more. */
		unhash(cache, slice);
		cache_mark_clean(cache, slice);
	}
}

void cache_forget_all(struct cache *cache)
{
	for (size_t i = 0; i < cache->count; i++) {
		struct slice *slice = &cache->slices[i];

		assert(!slice->users && !slice->dirty && !slice->loading);
		if (slice->host_off)
			unhash(cache, slice);
	}
}
