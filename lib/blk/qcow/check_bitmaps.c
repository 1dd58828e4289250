/*
 * What the persistent bitmaps of an image point to (format, "Bitmaps").
 *
 * The directory is only believed while its autoclear bit is set; without, its clusters are leaks.
 */
#include "blk/qcow/check_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define DIRECTORY_LEN_MAX     (UINT64_C(65535) * (1024 + 24)) /* so many bitmaps, names so long */
#define TABLE_ENTRIES_MAX     (UINT32_C(0x8000000))           /* 1 GiB of table */
#define TABLE_READ_WORDS      (UINT64_C(8) << 10)
#define BITMAP_ENTRY_RESERVED UINT64_C(0xff000000000001fe)

typedef unsigned long long ull;

static suspends int check_bitmap_words(
	struct check *check, const uint64_t *words, uint64_t count, uint64_t table_off)
{
	const struct image *image = &check->image;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t host_off = words[i] & QCOW_ENTRY_OFF_MASK;

		if (words[i] & BITMAP_ENTRY_RESERVED || (host_off && words[i] & 1) ||
			!is_aligned(host_off, image->cluster_size)) {
			check_found(check, QCOW_FINDING_CORRUPTION, 1,
				"bitmap table at %llu: entry %#llx is not valid", (ull)table_off,
				(ull)words[i]);
			continue;
		}
		int ret = host_off ? check_reference(
					     check, host_off, image->cluster_size, 1, "bitmap data")
				   : 0;
		if (ret)
			return ret;
	}
	return 0;
}

static suspends int check_bitmap_table(struct check *check, uint64_t table_off, uint64_t count)
{
	CLEANUP(free) uint64_t *words = malloc(TABLE_READ_WORDS * 8);
	uint64_t in_file = table_off < check->image.file_size
				   ? MIN(count, (check->image.file_size - table_off) / 8 + 1)
				   : 0;
	int ret = words ? check_reference(check, table_off, count * 8, 1, "bitmap table") : -ENOMEM;

	for (uint64_t at = 0; at < in_file && !ret; at += TABLE_READ_WORDS) {
		uint64_t now = MIN(in_file - at, TABLE_READ_WORDS);

		ret = image_read_words(&check->image, table_off + at * 8, words, now);
		if (!ret)
			ret = check_bitmap_words(check, words, now, table_off);
	}
	return ret;
}

/* The length of the entry at `entry`, 0 when it is not valid or goes beyond left. */
static uint64_t entry_len(
	const struct image *image, const struct qcow_disk_bitmap *entry, uint64_t left)
{
	uint64_t len;

	if (left < sizeof(*entry))
		return 0;
	len = round_up(sizeof(*entry) + (uint64_t)be32_get(entry->extra_data_len) +
			       be16_get(entry->name_len),
		8);
	if (len > left || !be16_get(entry->name_len) || be16_get(entry->name_len) > 1023 ||
		!is_aligned(be64_get(entry->table_off), image->cluster_size) ||
		!be32_get(entry->table_entry_count) ||
		be32_get(entry->table_entry_count) > TABLE_ENTRIES_MAX)
		return 0;
	return len;
}

static suspends int check_directory(struct check *check, const uint8_t *directory, uint64_t len)
{
	uint32_t count = 0;
	uint64_t at = 0, table_bytes = 0;

	while (at < len) {
		const struct qcow_disk_bitmap *entry = (const void *)(directory + at);
		uint64_t entry_bytes = entry_len(&check->image, entry, len - at);

		if (!entry_bytes || ++count > check->image.header->bitmap_count) {
			check->bitmaps_broken = true;
			check_found(check, QCOW_FINDING_CORRUPTION, 1,
				"bitmap directory: the entry at byte %llu is not valid", (ull)at);
			return 0;
		}
		/* Tables that overlap could be read for ever. */
		table_bytes += (uint64_t)be32_get(entry->table_entry_count) * 8;
		if (table_bytes > check->image.file_size + TABLE_ENTRIES_MAX)
			return -ELOOP;
		int ret = check_bitmap_table(
			check, be64_get(entry->table_off), be32_get(entry->table_entry_count));
		if (ret)
			return ret;
		at += entry_bytes;
	}
	return 0;
}

suspends int check_bitmaps(struct check *check)
{
	const struct qcow_header *header = check->image.header;
	uint64_t len = header->bitmap_directory_len;

	if (!header->bitmap_count || !(header->autoclear & QCOW_AUTOCLEAR_BITMAPS))
		return 0;
	int ret = check_reference(check, header->bitmap_directory_off, len, 1, "bitmap directory");
	if (ret)
		return ret;
	if (len > DIRECTORY_LEN_MAX ||
		!range_ok(header->bitmap_directory_off, len, check->image.file_size)) {
		check->bitmaps_broken = true;
		check_found(check, QCOW_FINDING_CORRUPTION, 1,
			"bitmap directory of %llu bytes at %llu is not valid", (ull)len,
			(ull)header->bitmap_directory_off);
		return 0;
	}
	CLEANUP(free) uint8_t *directory = malloc(len + 1);
	ret = directory ? image_read(&check->image, header->bitmap_directory_off, directory, len)
			: -ENOMEM;
	return ret ? ret : check_directory(check, directory, len);
}
