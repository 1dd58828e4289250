/*
 * Reads. Most are one call and one piece of data.
 *
 * A client that takes chunks gets the holes of a long read as holes: they are neither read nor sent. It
 * is told so only where looking for them costs next to nothing (blk_caps.maps_cheaply), and only up to a
 * number of extents; whatever lies behind those is read as data.
 *
 * A read that fails answers in one chunk, with the offset from which on nothing is known; what was read
 * before that is sent as data in front of it. Without chunks there is an error and no data.
 */
#include <errno.h>

#include "base/util.h"
#include "nbd/conn.h"

/* Below this, finding holes costs as much as reading and sending zeroes. */
#define HOLES_FROM_BYTES (32U << 10)

static suspends int read_whole(struct nbd_request *request)
{
	if (!nbd_payload_get(request, (uint32_t)request->len))
		return -ENOMEM;
	int ret = blk_read(
		request->conn->export->blk, request->off, request->payload, request->len);
	if (!ret)
		nbd_form_data(request);
	return ret;
}

static bool looks_for_holes(const struct nbd_request *request)
{
	return request->len >= HOLES_FROM_BYTES && request->conn->form != NBD_SIMPLE &&
	       !(request->flags & NBD_CMD_FLAG_DF) &&
	       blk_caps(request->conn->export->blk)->maps_cheaply;
}

/* Merges what is no zeroes, and calls everything behind the last extent data. */
static unsigned find_parts(
	const struct blk_extents *extents, uint64_t end, struct blk_extent *parts)
{
	struct blk_extents merged;

	blk_extents_init(&merged, parts, NBD_READ_EXTENTS_MAX);
	merged.off = merged.end = extents->off;
	for (unsigned i = 0; i < extents->count; i++)
		blk_extents_add(&merged, extents->list[i].len,
			extents->list[i].flags & BLK_EXTENT_ZERO ? BLK_EXTENT_ZERO : 0);
	if (merged.end < end)
		blk_extents_add(&merged, end - merged.end, BLK_EXTENT_DATA);
	return merged.count;
}

/* One data part after the other, each where it belongs in the payload. */
static suspends int read_parts(
	struct nbd_request *request, const struct blk_extent *parts, unsigned count)
{
	uint64_t off = request->off;

	for (unsigned i = 0; i < count; off += parts[i++].len) {
		uint32_t len = (uint32_t)parts[i].len;
		int ret = 0;

		if (parts[i].flags & BLK_EXTENT_ZERO) {
			nbd_form_part_hole(request, off, len, i + 1 == count);
			continue;
		}
		ret = blk_read(request->conn->export->blk, off,
			request->payload + (off - request->off), len);
		if (ret) {
			nbd_form_part_error(request, nbd_refusal_of(request, ret), off);
			return ret;
		}
		nbd_form_part_data(request, off, len, i + 1 == count);
	}
	return 0;
}

static suspends int read_with_holes(struct nbd_request *request)
{
	/* One is kept for what lies behind the last one found. */
	struct blk_extent list[NBD_READ_EXTENTS_MAX - 1], parts[NBD_READ_EXTENTS_MAX];
	struct blk_extents extents;

	blk_extents_init(&extents, list, ARRAY_LEN(list));
	int ret = blk_extents(request->conn->export->blk, request->off, request->len, &extents);
	unsigned count = ret ? 0 : find_parts(&extents, request->off + request->len, parts);
	bool all_hole = count == 1 && parts[0].flags & BLK_EXTENT_ZERO;

	if (!count || (count == 1 && !all_hole))
		return read_whole(request);
	if (!nbd_fragments_get(request) ||
		(!all_hole && !nbd_payload_get(request, (uint32_t)request->len))) {
		nbd_fragments_put(request);
		return -ENOMEM;
	}
	return read_parts(request, parts, count);
}

suspends int nbd_read(struct nbd_request *request)
{
	int ret = 0;

	if (!request->len)
		nbd_form_success(request);
	else
		ret = looks_for_holes(request) ? read_with_holes(request) : read_whole(request);
	if (ret && !request->fragments) {
		nbd_payload_put(request);
		nbd_form_error(request, nbd_refusal_of(request, ret), &request->off);
	}
	return ret;
}
