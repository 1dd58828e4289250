/*
 * memory: a sparse disk in memory, gone when the program ends.
 *
 * A disk is one anonymous mapping as long as the disk, which the kernel backs page by page as it is
 * written, and a bitmap of the 4 KiB blocks that have been. Invariant: a block whose bit is clear is all
 * zeroes and has no memory. So a read of a hole touches nothing, extents are exact, and a discard gives
 * pages back. Both mappings grow and shrink by mremap().
 *
 * A disk with a name is found again by it: from another export, also on another reactor, and after the
 * export that made it is gone, until memory_forget() or the end of the program. Hence a rwlock per disk
 * (nothing here suspends, so it is never held across a suspension). A resize by one layer is posted to
 * the reactors of the others; until it arrives, blk.c believes the old size: range is checked again here.
 *
 * The memory is not reserved beforehand: when the machine runs out of it, the kernel kills somebody.
 */
#include "blk/memory.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/list.h"
#include "base/util.h"
#include "blk/layers.h"
#include "rt/reactor.h"

/* The unit of allocation: a page, or a part of one on machines with larger pages. */
#define BLOCK 4096U

struct memory_disks {
	pthread_mutex_t lock; /* taken before a disk's own */
	struct list disks;    /* those that have a name */
};

struct memory_disk {
	struct list link;
	char *name;          /* NULL: private to its one layer */
	struct list layers;  /* that use it; guarded by the registry's lock */
	uint32_t block_size; /* never changes */

	pthread_rwlock_t lock; /* guards what follows */
	uint64_t size;
	uint8_t *data;
	size_t data_len_bytes;
	uint64_t *bitmap;
	size_t bitmap_len_bytes;
	uint64_t allocated_blocks;
};

struct memory_layer {
	struct blk blk;

	/* options */
	uint64_t size;
	const char *name;
	uint64_t block_size;

	struct memory_disk *disk;
	bool created; /* the disk, by our open() */
	struct list link;
	struct reactor *home;
	struct task resized; /* another layer changed the size */
	bool resized_posted; /* guarded by the registry's lock */
	struct co *closer;   /* waits for the posted task to be over */
};

static struct memory_layer *to_memory(struct blk *blk)
{
	return container_of(blk, struct memory_layer, blk);
}

static const struct opt memory_options[] = {
	{ "size", OPT_SIZE, offsetof(struct memory_layer, size), .min = 1, .max = BLK_SIZE_MAX,
		.help = "needed for a new disk; memory is taken as it is written" },
	{ "name", OPT_STRING, offsetof(struct memory_layer, name),
		.help = "the same name is the same disk, in all exports, until the program ends" },
	{ "block-size", OPT_SIZE, offsetof(struct memory_layer, block_size), .min = 1,
		.max = BLK_BLOCK_SIZE_MAX, .pow2 = true, .help = "1 by default" },
	{ 0 },
};

static int memory_check(const struct blk *blk, struct err *err)
{
	const struct memory_layer *memory = container_of(blk, struct memory_layer, blk);

	if (!memory->size && !memory->name)
		return err_set(err, EINVAL, "a memory disk needs a size");
	return blk_check_size(blk->conf, memory->size, MAX(memory->block_size, 1U), err);
}

/* --- disks ------------------------------------------------------------------------------------ */

static size_t data_bytes(uint64_t size)
{
	return round_up(size, BLOCK);
}

static size_t bitmap_bytes(uint64_t size)
{
	return round_up(bitmap_words(data_bytes(size) / BLOCK) * sizeof(uint64_t), BLOCK);
}

static void *map(size_t len_bytes)
{
	void *mapped = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return mapped == MAP_FAILED ? NULL : mapped;
}

static void disk_free(struct memory_disk *disk)
{
	if (!disk)
		return;
	if (disk->data)
		munmap(disk->data, disk->data_len_bytes);
	if (disk->bitmap)
		munmap(disk->bitmap, disk->bitmap_len_bytes);
	pthread_rwlock_destroy(&disk->lock);
	list_remove(&disk->link);
	free(disk->name);
	free(disk);
}

/* name may be NULL. */
static struct memory_disk *disk_create(const char *name, uint64_t size, uint32_t block_size)
{
	struct memory_disk *disk = calloc(1, sizeof(*disk));

	if (!disk)
		return NULL;
	pthread_rwlock_init(&disk->lock, NULL);
	list_init(&disk->link);
	list_init(&disk->layers);
	disk->size = size;
	disk->block_size = block_size;
	disk->name = name ? strdup(name) : NULL;
	disk->data_len_bytes = data_bytes(size);
	disk->data = map(disk->data_len_bytes);
	disk->bitmap_len_bytes = bitmap_bytes(size);
	disk->bitmap = map(disk->bitmap_len_bytes);
	if (!disk->data || !disk->bitmap || (name && !disk->name)) {
		disk_free(disk);
		return NULL;
	}
	/* A huge page would take 2 MiB for one written block; a core dump is no place for a disk. */
	madvise(disk->data, disk->data_len_bytes, MADV_NOHUGEPAGE);
	madvise(disk->data, disk->data_len_bytes, MADV_DONTDUMP);
	return disk;
}

struct memory_disks *memory_disks_create(void)
{
	struct memory_disks *disks = malloc(sizeof(*disks));

	if (disks) {
		pthread_mutex_init(&disks->lock, NULL);
		list_init(&disks->disks);
	}
	return disks;
}

void memory_disks_free(struct memory_disks *disks)
{
	if (!disks)
		return;
	list_for_each_safe (item, &disks->disks)
		disk_free(list_entry(item, struct memory_disk, link));
	pthread_mutex_destroy(&disks->lock);
	free(disks);
}

/* The registry's lock is held. */
static struct memory_disk *disk_find(struct memory_disks *disks, const char *name)
{
	list_for_each (item, &disks->disks) {
		struct memory_disk *disk = list_entry(item, struct memory_disk, link);
		if (!strcmp(disk->name, name))
			return disk;
	}
	return NULL;
}

int memory_forget(struct blk_env *env, const char *name, struct err *err)
{
	struct memory_disks *disks = env->memory_disks;
	int result = 0;

	pthread_mutex_lock(&disks->lock);
	struct memory_disk *disk = disk_find(disks, name);
	if (!disk)
		result = err_set(err, ENOENT, "there is no memory disk \"%s\"", name);
	else if (!list_empty(&disk->layers))
		result = err_set(err, EBUSY, "memory disk \"%s\" is in use by an export", name);
	else
		disk_free(disk);
	pthread_mutex_unlock(&disks->lock);
	return result;
}

/* --- blocks; the disk's lock is held ---------------------------------------------------------- */

/*
 * Whether the block at off has memory, and in *run_end how far that goes on, at most to end: the way all
 * loops below walk through a disk.
 */
static bool find_run(const struct memory_disk *disk, uint64_t off, uint64_t end, uint64_t *run_end)
{
	uint64_t first = off / BLOCK;
	uint64_t count = bitmap_run(disk->bitmap, first, (end - 1) / BLOCK - first + 1);

	*run_end = MIN((first + count) * BLOCK, end);
	return bitmap_test(disk->bitmap, first);
}

static void mark_allocated(struct memory_disk *disk, uint64_t off, uint64_t end)
{
	for (uint64_t run_end; off < end; off = run_end) {
		if (find_run(disk, off, end, &run_end))
			continue;
		uint64_t count = (run_end - 1) / BLOCK - off / BLOCK + 1;
		bitmap_set(disk->bitmap, off / BLOCK, count);
		disk->allocated_blocks += count;
	}
}

/* A daemon with a kernel device locks its memory: only the second form, of Linux 5.18, gives that back. */
static bool give_back(void *data, size_t len_bytes)
{
	return getpagesize() <= (int)BLOCK &&
	       (!madvise(data, len_bytes, MADV_DONTNEED) ||
		       !madvise(data, len_bytes, MADV_DONTNEED_LOCKED));
}

/* Every block of [off, end) has memory: frees those that lie within whole, zeroes the edges. */
static void drop_run(struct memory_disk *disk, uint64_t off, uint64_t end)
{
	uint64_t first = round_up(off, BLOCK);
	uint64_t last = end == disk->size ? round_up(end, BLOCK) : round_down(end, BLOCK);

	if (first >= last) {
		memset(disk->data + off, 0, end - off);
		return;
	}
	memset(disk->data + off, 0, first - off);
	if (last < end)
		memset(disk->data + last, 0, end - last);
	/* Too coarse with large pages, refused by old kernels: then the invariant costs the memory. */
	if (!give_back(disk->data + first, last - first))
		memset(disk->data + first, 0, last - first);
	bitmap_clear(disk->bitmap, first / BLOCK, (last - first) / BLOCK);
	disk->allocated_blocks -= (last - first) / BLOCK;
}

static void drop(struct memory_disk *disk, uint64_t off, uint64_t end)
{
	for (uint64_t run_end; off < end; off = run_end)
		if (find_run(disk, off, end, &run_end))
			drop_run(disk, off, run_end);
}

/* --- opening and closing ---------------------------------------------------------------------- */

static int disk_make(struct memory_layer *memory, struct memory_disk **made, struct err *err)
{
	uint32_t block_size = memory->block_size ? (uint32_t)memory->block_size : 1;

	if (!memory->size)
		return err_set(err, EINVAL,
			"there is no memory disk \"%s\" yet: a new one needs a size", memory->name);
	*made = disk_create(memory->name, memory->size, block_size);
	if (!*made)
		return err_set(err, ENOMEM,
			"a memory disk of %" PRIu64
			" bytes is more than this machine can address or promise",
			memory->size);
	memory->created = true;
	return 0;
}

/* Whether the options fit a disk that is there already. */
static int disk_check(const struct memory_layer *memory, struct memory_disk *disk, struct err *err)
{
	if (memory->size && memory->size != disk->size)
		return err_set(err, EINVAL,
			"memory disk \"%s\" exists with %" PRIu64 " bytes, not %" PRIu64
			": give that size, or none",
			disk->name, disk->size, memory->size);
	if (memory->block_size && memory->block_size != disk->block_size)
		return err_set(err, EINVAL,
			"memory disk \"%s\" exists with block-size %u, not %" PRIu64
			": give that one, or none",
			disk->name, disk->block_size, memory->block_size);
	return 0;
}

/* The registry's lock is held. */
static int disk_get(struct memory_layer *memory, struct memory_disk **got, struct err *err)
{
	struct memory_disks *disks = memory->blk.env->memory_disks;
	int result;

	*got = memory->name ? disk_find(disks, memory->name) : NULL;
	if (*got) {
		pthread_rwlock_rdlock(&(*got)->lock);
		result = disk_check(memory, *got, err);
		pthread_rwlock_unlock(&(*got)->lock);
		return result;
	}
	result = disk_make(memory, got, err);
	if (!result && memory->name)
		list_push_back(&disks->disks, &(*got)->link);
	return result;
}

/* The size of the disk was changed through another layer. */
static void resized_task(struct task *task)
{
	struct memory_layer *memory = container_of(task, struct memory_layer, resized);
	struct memory_disks *disks = memory->blk.env->memory_disks;

	pthread_mutex_lock(&disks->lock);
	memory->resized_posted = false;
	pthread_rwlock_rdlock(&memory->disk->lock);
	uint64_t size = memory->disk->size;
	pthread_rwlock_unlock(&memory->disk->lock);
	pthread_mutex_unlock(&disks->lock);

	if (memory->closer)
		co_wake(memory->closer);
	else if (size != memory->blk.caps.size)
		blk_size_changed(&memory->blk, size);
}

static suspends int memory_open(struct blk *blk, struct err *err)
{
	struct memory_layer *memory = to_memory(blk);
	struct memory_disks *disks = blk->env->memory_disks;
	struct memory_disk *disk;

	list_init(&memory->link);
	task_init(&memory->resized, resized_task);
	memory->home = reactor_self();

	pthread_mutex_lock(&disks->lock);
	int result = disk_get(memory, &disk, err);
	if (!result) {
		memory->disk = disk;
		list_push_back(&disk->layers, &memory->link);
		blk->caps.size = disk->size;
		blk->caps.block_size = disk->block_size;
	}
	pthread_mutex_unlock(&disks->lock);
	if (result)
		return result;

	blk->caps.fua = true; /* nothing here is durable, or ever less durable than before */
	blk->caps.zero_fast = true;
	blk->caps.maps_cheaply = true;
	blk->caps.discard = true;
	blk->caps.grows = true;
	blk->caps.multi_reactor = true;
	blk->caps.dies_with_process = true;
	return 0;
}

static suspends void memory_close(struct blk *blk)
{
	struct memory_layer *memory = to_memory(blk);
	struct memory_disks *disks = blk->env->memory_disks;
	struct memory_disk *disk = memory->disk;

	if (!disk)
		return;
	pthread_mutex_lock(&disks->lock);
	list_remove(&memory->link); /* from now on nobody posts to us */
	if (memory->resized_posted)
		memory->closer = co_self();
	pthread_mutex_unlock(&disks->lock);
	if (memory->closer)
		co_suspend();

	pthread_mutex_lock(&disks->lock);
	bool start_failed = blk->start_failed || blk->env->start_failed;
	bool forget = !disk->name || (memory->created && start_failed);
	if (forget && list_empty(&disk->layers))
		disk_free(disk);
	pthread_mutex_unlock(&disks->lock);
}

/* --- data ------------------------------------------------------------------------------------- */

static suspends int memory_read(struct blk *blk, uint64_t off, void *buf, size_t len)
{
	struct memory_disk *disk = to_memory(blk)->disk;
	uint64_t end = off + len;
	int result = 0;

	pthread_rwlock_rdlock(&disk->lock);
	if (unlikely(!range_ok(off, len, disk->size))) {
		result = -EINVAL;
		end = off;
	}
	for (uint64_t run_end; off < end; off = run_end) {
		bool allocated = find_run(disk, off, end, &run_end);
		if (allocated)
			memcpy(buf, disk->data + off, run_end - off);
		else
			memset(buf, 0, run_end - off);
		buf = (uint8_t *)buf + (run_end - off);
	}
	pthread_rwlock_unlock(&disk->lock);
	return result;
}

static suspends int memory_write(
	struct blk *blk, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct memory_disk *disk = to_memory(blk)->disk;
	int result = -ENOSPC;

	pthread_rwlock_wrlock(&disk->lock);
	if (likely(range_ok(off, len, disk->size))) {
		mark_allocated(disk, off, off + len);
		memcpy(disk->data + off, buf, len);
		result = 0;
	}
	pthread_rwlock_unlock(&disk->lock);
	return result;
}

static suspends int memory_zero(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	struct memory_disk *disk = to_memory(blk)->disk;
	int result = 0;

	pthread_rwlock_wrlock(&disk->lock);
	if (!range_ok(off, len, disk->size)) {
		result = -ENOSPC;
	} else if (flags & BLK_NO_HOLE) {
		mark_allocated(disk, off, off + len);
		memset(disk->data + off, 0, len);
	} else {
		drop(disk, off, off + len);
	}
	pthread_rwlock_unlock(&disk->lock);
	return result;
}

static suspends int memory_discard(struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	return memory_zero(blk, off, len, 0);
}

static suspends int memory_extents(
	struct blk *blk, uint64_t off, uint64_t len, struct blk_extents *extents)
{
	struct memory_disk *disk = to_memory(blk)->disk;
	uint64_t end = off + len;
	bool more = true;

	pthread_rwlock_rdlock(&disk->lock);
	if (!range_ok(off, len, disk->size)) {
		blk_extents_add(extents, len, BLK_EXTENT_DATA);
		more = false;
	}
	while (more && off < end) {
		uint64_t run_end;
		bool allocated = find_run(disk, off, end, &run_end);
		more = blk_extents_add(extents, run_end - off,
			allocated ? BLK_EXTENT_DATA : BLK_EXTENT_HOLE | BLK_EXTENT_ZERO);
		off = run_end;
	}
	pthread_rwlock_unlock(&disk->lock);
	return 0;
}

/* --- resize ----------------------------------------------------------------------------------- */

/* NULL when it cannot be had; nothing has changed then. */
static void *remap(void *mapping, size_t *len_bytes, size_t new_len_bytes)
{
	void *moved = mremap(mapping, *len_bytes, new_len_bytes, MREMAP_MAYMOVE);

	if (moved == MAP_FAILED)
		return NULL;
	*len_bytes = new_len_bytes;
	return moved;
}

/* The disk's lock is held. A mapping that stays too long, for want of a way to change it, does no harm. */
static int disk_resize(struct memory_disk *disk, uint64_t size)
{
	bool shrink = size < disk->size;

	if (shrink) {
		drop(disk, size, disk->size);
		disk->size = size;
	}
	void *bitmap = remap(disk->bitmap, &disk->bitmap_len_bytes, bitmap_bytes(size));
	if (bitmap)
		disk->bitmap = bitmap;
	void *data = remap(disk->data, &disk->data_len_bytes, data_bytes(size));
	if (data)
		disk->data = data;
	if (!shrink && !(bitmap && data))
		return -ENOMEM;
	disk->size = size;
	return 0;
}

static void tell_others(struct memory_layer *memory)
{
	struct memory_disks *disks = memory->blk.env->memory_disks;

	pthread_mutex_lock(&disks->lock);
	list_for_each (item, &memory->disk->layers) {
		struct memory_layer *other = list_entry(item, struct memory_layer, link);
		if (other == memory || other->resized_posted)
			continue;
		other->resized_posted = true;
		reactor_post(other->home, &other->resized);
	}
	pthread_mutex_unlock(&disks->lock);
}

static suspends int memory_resize(struct blk *blk, uint64_t size, unsigned flags, struct err *err)
{
	struct memory_layer *memory = to_memory(blk);
	struct memory_disk *disk = memory->disk;

	pthread_rwlock_wrlock(&disk->lock);
	int result = disk_resize(disk, size);
	pthread_rwlock_unlock(&disk->lock);
	if (result)
		return err_sys(err, -result, "a memory disk of %" PRIu64 " bytes", size);
	tell_others(memory);
	blk_size_changed(blk, size);
	return 0;
}

/* --- status ----------------------------------------------------------------------------------- */

static void memory_status(struct blk *blk, json_t *object)
{
	struct memory_disk *disk = to_memory(blk)->disk;
	struct memory_disks *disks = blk->env->memory_disks;
	json_int_t users = 0;

	pthread_mutex_lock(&disks->lock);
	list_for_each (item, &disk->layers)
		users++;
	pthread_mutex_unlock(&disks->lock);
	pthread_rwlock_rdlock(&disk->lock);
	uint64_t allocated_bytes = disk->allocated_blocks * BLOCK;
	pthread_rwlock_unlock(&disk->lock);

	if (disk->name)
		json_object_set_new(object, "name", json_string(disk->name));
	json_object_set_new(object, "users", json_integer(users));
	json_object_set_new(object, "allocated_bytes", json_integer((json_int_t)allocated_bytes));
}

const struct blk_ops memory_ops = {
	.name = "memory",
	.summary = "a sparse disk in memory",
	.options = memory_options,
	.struct_size = sizeof(struct memory_layer),
	.is_leaf = true,
	.check = memory_check,
	.open = memory_open,
	.close = memory_close,
	.read = memory_read,
	.write = memory_write,
	.zero = memory_zero,
	.discard = memory_discard,
	.extents = memory_extents,
	.resize = memory_resize,
	.status = memory_status,
};
