/*
 * The snapshot table: reading, finding, encoding. See snapshot_table.h.
 *
 * Entries have variable length, so one that lies about its length makes nonsense of all that follow: each
 * is bounded, and so is the table. Extra data is kept as it is, for fields this program does not know.
 */
#include "blk/qcow/snapshot_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define EXTRA_V3 ((uint32_t)sizeof(struct qcow_disk_snapshot_extra))

void qcow_snapshot_fini(struct qcow_snapshot *snapshot)
{
	free(take_ptr(snapshot->id));
	free(take_ptr(snapshot->name));
	free(take_ptr(snapshot->extra));
}

void qcow_snapshots_fini(struct qcow_snapshots *list)
{
	for (uint32_t i = 0; i < list->count; i++)
		qcow_snapshot_fini(&list->items[i]);
	free(take_ptr(list->items));
	list->count = 0;
	list->len = 0;
}

static char *copy_text(const uint8_t *bytes, size_t len)
{
	char *text = calloc(1, len + 1);

	if (text && len)
		memcpy(text, bytes, len);
	return text;
}

static void decode_extra(struct qcow_snapshot *snapshot, uint64_t image_size)
{
	struct qcow_disk_snapshot_extra extra;

	snapshot->disk_size = image_size;
	memcpy(&extra, snapshot->extra, MIN(snapshot->extra_len, EXTRA_V3));
	if (snapshot->extra_len >= sizeof(extra.vm_state_len))
		snapshot->vm_state_len = be64_get(extra.vm_state_len);
	if (snapshot->extra_len >= EXTRA_V3)
		snapshot->disk_size = be64_get(extra.disk_size);
}

/* What follows an entry's fixed part: extra data, id, name. */
static suspends int load_variable(const struct image *image, uint64_t host_off, uint32_t extra_len,
	struct qcow_snapshot *snapshot)
{
	size_t len = (size_t)extra_len + snapshot->id_len + snapshot->name_len;
	CLEANUP(free) uint8_t *bytes = malloc(len + 1);
	int ret = bytes ? image_read(image, host_off, bytes, len) : -ENOMEM;

	if (ret)
		return ret;
	snapshot->extra = (uint8_t *)copy_text(bytes, extra_len);
	snapshot->extra_len = extra_len;
	snapshot->id = copy_text(bytes + extra_len, snapshot->id_len);
	snapshot->name = copy_text(bytes + extra_len + snapshot->id_len, snapshot->name_len);
	if (!snapshot->extra || !snapshot->id || !snapshot->name)
		return -ENOMEM;
	decode_extra(snapshot, image->header->size);
	return 0;
}

static suspends int load_entry(const struct image *image, uint32_t index, uint64_t *len,
	struct qcow_snapshot *snapshot, struct err *err)
{
	uint64_t host_off = image->header->snapshots_off + *len;
	struct qcow_disk_snapshot disk;
	int ret = image_read(image, host_off, &disk, sizeof(disk));

	if (ret)
		return err_sys(err, -ret, "cannot read the snapshot table");
	snapshot->l1_off = be64_get(disk.l1_off);
	snapshot->l1_entry_count = be32_get(disk.l1_entry_count);
	snapshot->id_len = be16_get(disk.id_len);
	snapshot->name_len = be16_get(disk.name_len);
	snapshot->time_s = be32_get(disk.time_s);
	snapshot->time_ns = be32_get(disk.time_ns);
	snapshot->vm_clock_ns = be64_get(disk.vm_clock_ns);
	snapshot->vm_state_len = be32_get(disk.vm_state_len);

	uint32_t extra_len = be32_get(disk.extra_data_len);
	if (extra_len > QCOW_SNAPSHOT_EXTRA_MAX_BYTES)
		return err_set(err, EINVAL,
			"snapshot table entry %u has %u bytes of extra data, at most %u are "
			"allowed",
			index, extra_len, QCOW_SNAPSHOT_EXTRA_MAX_BYTES);
	*len += round_up(sizeof(disk) + extra_len + snapshot->id_len + snapshot->name_len, 8);
	if (*len > QCOW_SNAPSHOT_TABLE_MAX_BYTES)
		return err_set(err, EINVAL, "the snapshot table is longer than %u bytes",
			QCOW_SNAPSHOT_TABLE_MAX_BYTES);
	ret = load_variable(image, host_off + sizeof(disk), extra_len, snapshot);
	return ret ? err_sys(err, -ret, "cannot read snapshot table entry %u", index) : 0;
}

suspends int qcow_snapshots_load(
	const struct image *image, struct qcow_snapshots *list, struct err *err)
{
	uint32_t count = image->header->snapshot_count;
	int ret = 0;

	memset(list, 0, sizeof(*list));
	if (!count)
		return 0;
	list->items = calloc(count, sizeof(*list->items));
	if (!list->items)
		return err_set(err, ENOMEM, "no memory for %u snapshots", count);
	while (list->count < count && !ret) {
		uint32_t index = list->count++;

		ret = load_entry(image, index, &list->len, &list->items[index], err);
	}
	if (ret)
		qcow_snapshots_fini(list);
	return ret;
}

bool qcow_snapshot_incomplete(const struct image *image, const struct qcow_snapshot *snapshot)
{
	return image->header->version >= 3 && snapshot->extra_len < EXTRA_V3;
}

struct qcow_snapshot *qcow_snapshots_find(const struct qcow_snapshots *list, const char *id_or_name)
{
	for (uint32_t i = 0; i < list->count; i++)
		if (!strcmp(list->items[i].id, id_or_name))
			return &list->items[i];
	for (uint32_t i = 0; i < list->count; i++)
		if (!strcmp(list->items[i].name, id_or_name))
			return &list->items[i];
	return NULL;
}

/* --- encoding --------------------------------------------------------------------------------- */

static int complete_extra(struct qcow_snapshot *snapshot)
{
	struct qcow_disk_snapshot_extra extra = { .vm_state_len = be64_make(snapshot->vm_state_len),
		.disk_size = be64_make(snapshot->disk_size) };

	if (snapshot->extra_len < EXTRA_V3) {
		uint8_t *grown = realloc(snapshot->extra, EXTRA_V3);

		if (!grown)
			return -ENOMEM;
		snapshot->extra = grown;
		snapshot->extra_len = EXTRA_V3;
	}
	memcpy(snapshot->extra, &extra, sizeof(extra));
	return 0;
}

static uint64_t encoded_len(const struct qcow_snapshot *snapshot)
{
	return round_up(sizeof(struct qcow_disk_snapshot) + snapshot->extra_len + snapshot->id_len +
				snapshot->name_len,
		8);
}

static void encode_entry(const struct qcow_snapshot *snapshot, uint8_t *at)
{
	struct qcow_disk_snapshot disk = {
		.l1_off = be64_make(snapshot->l1_off),
		.l1_entry_count = be32_make(snapshot->l1_entry_count),
		.id_len = be16_make(snapshot->id_len),
		.name_len = be16_make(snapshot->name_len),
		.time_s = be32_make(snapshot->time_s),
		.time_ns = be32_make(snapshot->time_ns),
		.vm_clock_ns = be64_make(snapshot->vm_clock_ns),
		.vm_state_len = be32_make(
			(uint32_t)MIN(snapshot->vm_state_len, (uint64_t)UINT32_MAX)),
		.extra_data_len = be32_make(snapshot->extra_len),
	};

	memcpy(at, &disk, sizeof(disk));
	at += sizeof(disk);
	memcpy(at, snapshot->extra, snapshot->extra_len);
	at += snapshot->extra_len;
	memcpy(at, snapshot->id, snapshot->id_len);
	memcpy(at + snapshot->id_len, snapshot->name, snapshot->name_len);
}

int qcow_snapshots_encode(struct qcow_snapshots *list, uint8_t **table, uint64_t *len)
{
	uint64_t at = 0;

	*len = 0;
	for (uint32_t i = 0; i < list->count; i++) {
		int ret = complete_extra(&list->items[i]);

		if (ret)
			return ret;
		*len += encoded_len(&list->items[i]);
	}
	if (*len > QCOW_SNAPSHOT_TABLE_MAX_BYTES)
		return -EFBIG;
	*table = calloc(1, *len + 1);
	if (!*table)
		return -ENOMEM;
	for (uint32_t i = 0; i < list->count; i++) {
		encode_entry(&list->items[i], *table + at);
		at += encoded_len(&list->items[i]);
	}
	list->len = *len;
	return 0;
}
