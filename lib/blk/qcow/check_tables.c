/*
 * What L1 tables, L2 tables and bitmaps of an image point to.
 *
 * L2 tables are shared by snapshots, so check_l1() only collects them, with the number of their users, and
 * check_l2_tables() then reads each once, in the order of the file, and counts what it points to that
 * many times. The time is proportional to the metadata there is, not to the number of snapshots.
 *
 * Hostile images: L1 tables may overlap, and L2 tables too when they are not aligned. Of the first no more
 * than fits into the file (and some) is read, of the second UNALIGNED_MAX.
 */
#include "blk/qcow/check_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define L1_READ_WORDS    (UINT64_C(64) << 10)
#define L1_SLACK_BYTES   (UINT64_C(128) << 20)
#define UNALIGNED_MAX    1024
#define TABLES_COUNT_MIN 256

typedef unsigned long long ull;

/* --- the set of L2 tables --------------------------------------------------------------------- */

static struct l2_table *place_of(const struct l2_tables *tables, uint64_t host_off)
{
	size_t mask = tables->capacity - 1;
	size_t at = (size_t)((host_off >> 9) * UINT64_C(0x9e3779b97f4a7c15) >> 20) & mask;

	while (tables->items[at].users && tables->items[at].host_off != host_off)
		at = (at + 1) & mask;
	return &tables->items[at];
}

static int grow(struct l2_tables *tables)
{
	struct l2_tables grown = {
		.count = tables->count,
		.capacity = MAX(tables->capacity * 2, (size_t)TABLES_COUNT_MIN),
	};

	grown.items = calloc(grown.capacity, sizeof(*grown.items));
	if (!grown.items)
		return -ENOMEM;
	for (size_t i = 0; i < tables->capacity; i++)
		if (tables->items[i].users)
			*place_of(&grown, tables->items[i].host_off) = tables->items[i];
	free(tables->items);
	*tables = grown;
	return 0;
}

static int add_table(struct l2_tables *tables, uint64_t host_off, struct l2_table **table)
{
	int ret = tables->count * 2 >= tables->capacity ? grow(tables) : 0;

	if (ret)
		return ret;
	*table = place_of(tables, host_off);
	if (!(*table)->users) {
		(*table)->host_off = host_off;
		tables->count++;
	}
	(*table)->users++;
	return 0;
}

static int by_host_off(const void *a, const void *b)
{
	uint64_t a_off = ((const struct l2_table *)a)->host_off;
	uint64_t b_off = ((const struct l2_table *)b)->host_off;

	return a_off < b_off ? -1 : a_off > b_off;
}

/* From a hash to a sorted list without holes. */
static void sort_tables(struct l2_tables *tables)
{
	size_t kept = 0;

	for (size_t i = 0; i < tables->capacity; i++)
		if (tables->items[i].users)
			tables->items[kept++] = tables->items[i];
	if (kept)
		qsort(tables->items, kept, sizeof(*tables->items), by_host_off);
}

/* --- L1 --------------------------------------------------------------------------------------- */

/* True in *judged when the count on disk is known. */
static suspends int check_l1_copied(
	struct check *check, uint64_t index, uint64_t entry, bool *judged)
{
	uint64_t table_off = entry & QCOW_ENTRY_OFF_MASK, refcount;

	*judged = false;
	if (!table_off)
		return 0;
	int ret = image_refcount(&check->image, table_off >> check->image.cluster_bits, &refcount);
	if (ret)
		return ret == -ENOMEM ? ret : 0;
	*judged = true;
	if ((refcount == 1) != !!(entry & QCOW_ENTRY_COPIED))
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"L1 entry %llu: the copied flag is %s, but the L2 table at %llu has "
			"refcount "
			"%llu",
			(ull)index, entry & QCOW_ENTRY_COPIED ? "set" : "clear", (ull)table_off,
			(ull)refcount);
	return 0;
}

static suspends int check_l1_entry(
	struct check *check, uint64_t index, uint64_t entry, bool active, const char *name)
{
	uint64_t table_off = entry & QCOW_ENTRY_OFF_MASK;
	struct l2_table *table;
	bool judged = false;
	int ret;

	if (!entry)
		return 0;
	if (entry & IMAGE_L1_RESERVED)
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"%s: entry %llu has reserved bits set: %#llx", name, (ull)index,
			(ull)entry);
	ret = check_reference(check, table_off, check->image.cluster_size, 1, "L2 table");
	if (ret)
		return ret;
	if (!is_aligned(table_off, check->image.cluster_size))
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"%s: entry %llu points to %llu, which is not aligned to a cluster", name,
			(ull)index, (ull)table_off);
	if (active && (ret = check_l1_copied(check, index, entry, &judged)))
		return ret;
	/* Beyond the file there are only zeroes. */
	if (table_off >= check->image.file_size)
		return 0;
	ret = add_table(&check->tables, table_off, &table);
	if (ret)
		return ret;
	if (active) {
		if (!table->active++)
			table->l1_index = (uint32_t)index;
		table->judged += judged;
	}
	return 0;
}

suspends int check_l1(
	struct check *check, uint64_t l1_off, uint32_t entry_count, bool active, const char *name)
{
	const struct image *image = &check->image;
	CLEANUP(free) uint64_t *words = malloc(L1_READ_WORDS * 8);
	uint64_t end = l1_off < image->file_size
			       ? MIN((uint64_t)entry_count, (image->file_size - l1_off) / 8 + 1)
			       : 0;
	int ret;

	if (!entry_count)
		return 0;
	if (!words)
		return -ENOMEM;
	ret = check_reference(check, l1_off, (uint64_t)entry_count * 8, 1, name);
	check->l1_bytes += end * 8;
	if (check->l1_bytes > image->file_size + L1_SLACK_BYTES)
		return -ELOOP;
	for (uint64_t at = 0; at < end && !ret; at += L1_READ_WORDS) {
		uint64_t count = MIN(end - at, L1_READ_WORDS);

		ret = image_read_words(image, l1_off + at * 8, words, count);
		for (uint64_t i = 0; i < count && !ret; i++)
			ret = check_l1_entry(check, at + i, words[i], active, name);
	}
	return ret;
}

/* --- L2 --------------------------------------------------------------------------------------- */

/* One entry of an L2 table, and where it stands. */
struct entry {
	const struct l2_table *table;
	uint32_t index;
	uint64_t value;
	uint64_t bitmap;    /* of subclusters; 0 without extended entries */
	uint64_t *next_off; /* where the host cluster of the next entry would be contiguous */
};

static void entry_found(struct check *check, const struct entry *entry, const char *text)
{
	const struct image *image = &check->image;
	const struct l2_table *table = entry->table;

	if (table->active) {
		uint64_t cluster = (uint64_t)table->l1_index * image->l2_entries + entry->index;

		check_found(check, QCOW_FINDING_CORRUPTION, table->users,
			"guest offset %llu: L2 entry %#llx %s",
			(ull)(cluster << image->cluster_bits), (ull)entry->value, text);
	} else {
		check_found(check, QCOW_FINDING_CORRUPTION, table->users,
			"snapshot's L2 table at %llu, entry %u: %#llx %s", (ull)table->host_off,
			entry->index, (ull)entry->value, text);
	}
}

static int check_compressed(struct check *check, const struct entry *entry)
{
	uint64_t host_off, len;

	if (entry->value & QCOW_ENTRY_COPIED)
		entry_found(check, entry, "is compressed with the copied flag set");
	if (check->image.data_file) {
		entry_found(check, entry, "is compressed, in an image with a data file");
		return 0;
	}
	if (entry->bitmap) {
		entry_found(check, entry, "is compressed and has a subcluster bitmap");
		return 0;
	}
	image_compressed_range(&check->image, entry->value, &host_off, &len);
	check->result->allocated_clusters += entry->table->active;
	check->result->compressed_clusters += entry->table->active;
	check->result->fragmented_clusters += entry->table->active;
	return check_reference(check, host_off, len, entry->table->users, "compressed data");
}

static suspends int check_copied(struct check *check, const struct entry *entry)
{
	uint64_t host_off = entry->value & QCOW_ENTRY_OFF_MASK, refcount = 1;

	if (!entry->table->judged)
		return 0;
	if (!check->image.data_file) {
		int ret = image_refcount(
			&check->image, host_off >> check->image.cluster_bits, &refcount);

		if (ret)
			return ret == -ENOMEM ? ret : 0;
	}
	if ((refcount == 1) != !!(entry->value & QCOW_ENTRY_COPIED))
		check_found(check, QCOW_FINDING_CORRUPTION, entry->table->judged,
			"L2 table at %llu, entry %u: the copied flag is %s, but the cluster at "
			"%llu has refcount %llu",
			(ull)entry->table->host_off, entry->index,
			entry->value & QCOW_ENTRY_COPIED ? "set" : "clear", (ull)host_off,
			(ull)refcount);
	return 0;
}

static suspends int check_allocated(
	struct check *check, const struct entry *entry, enum entry_kind kind)
{
	const struct image *image = &check->image;
	uint64_t host_off = entry->value & QCOW_ENTRY_OFF_MASK;
	bool has_data = image->entry_words > 1 ? (uint32_t)entry->bitmap : kind == ENTRY_NORMAL;
	int ret = check_copied(check, entry);

	if (ret)
		return ret;
	if (entry->bitmap >> 32 & entry->bitmap)
		entry_found(check, entry, "has subclusters both allocated and zero");
	if (!is_aligned(host_off, image->cluster_size))
		entry_found(check, entry,
			has_data ? "is not aligned to a cluster"
				 : "is preallocated and not aligned to a cluster");
	check->result->allocated_clusters += entry->table->active;
	if (*entry->next_off && host_off != *entry->next_off)
		check->result->fragmented_clusters += entry->table->active;
	*entry->next_off = host_off + image->cluster_size;
	if (image->data_file)
		return 0;
	return check_reference(
		check, host_off, image->cluster_size, entry->table->users, "data cluster");
}

static suspends int check_entry(struct check *check, const struct entry *entry)
{
	enum entry_kind kind = image_entry_kind(&check->image, entry->value);

	if (kind != ENTRY_COMPRESSED && entry->value & IMAGE_L2_RESERVED)
		entry_found(check, entry, "has reserved bits set");
	switch (kind) {
	case ENTRY_COMPRESSED:
		return check_compressed(check, entry);
	case ENTRY_NORMAL:
	case ENTRY_ZERO_ALLOCATED:
		return check_allocated(check, entry, kind);
	case ENTRY_UNALLOCATED:
		if ((uint32_t)entry->bitmap)
			entry_found(check, entry, "is unallocated and has allocated subclusters");
		return 0;
	case ENTRY_ZERO_PLAIN:
		return 0;
	}
	return 0;
}

static suspends int check_l2(struct check *check, const struct l2_table *table, uint64_t *words)
{
	const struct image *image = &check->image;
	uint64_t next_off = 0;
	int ret = image_read_words(image, table->host_off, words, image->cluster_size / 8);

	if (ret) {
		check->unreadable = true;
		check_found(check, QCOW_FINDING_ERROR, 1, "L2 table at %llu cannot be read: %s",
			(ull)table->host_off, strerror(-ret));
		return 0;
	}
	for (uint32_t i = 0; i < image->l2_entries && !ret; i++) {
		struct entry entry = {
			.table = table,
			.index = i,
			.value = words[(size_t)i * image->entry_words],
			.bitmap = image->entry_words > 1 ? words[(size_t)i * 2 + 1] : 0,
			.next_off = &next_off,
		};

		if (entry.value | entry.bitmap)
			ret = check_entry(check, &entry);
	}
	return ret;
}

suspends int check_l2_tables(struct check *check)
{
	CLEANUP(free) uint64_t *words = malloc(check->image.cluster_size);
	int ret = words ? 0 : -ENOMEM;

	if (check->tables.count)
		sort_tables(&check->tables);
	check->total += check->tables.count;
	for (size_t i = 0; i < check->tables.count && !ret; i++) {
		const struct l2_table *table = &check->tables.items[i];

		if (!is_aligned(table->host_off, check->image.cluster_size) &&
			check->unaligned_tables++ >= UNALIGNED_MAX)
			continue;
		ret = check_l2(check, table, words);
		check_progress(check, 1);
	}
	return ret;
}
