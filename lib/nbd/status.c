/*
 * Block status: what of a range is data, zero or hole, as the metadata context base:allocation.
 *
 * Layers describe as much as they know in one call; they are asked again until the range is described, the
 * list is full or they were asked often enough: a shorter answer is a right answer ("Structured reply
 * types"). It never goes beyond the range, so that lengths fit into 32 bits where they have to.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "nbd/conn.h"

#define EXTENTS_MAX (NBD_STATUS_BUFFER_BYTES / sizeof(struct blk_extent))
#define CALLS_MAX   256

_Static_assert(sizeof(struct nbd_extended_descriptor) <= sizeof(struct blk_extent) &&
		       sizeof(struct nbd_descriptor) <= sizeof(struct blk_extent),
	"descriptors take the place of the extents they are made from");
_Static_assert((int)BLK_EXTENT_HOLE == NBD_STATE_HOLE && (int)BLK_EXTENT_ZERO == NBD_STATE_ZERO,
	"the flags go out as they are");

static suspends int find_extents(struct nbd_request *request, struct blk_extents *extents)
{
	struct blk *blk = request->conn->export->blk;
	uint64_t end = request->off + request->len, off = request->off;

	for (unsigned i = 0; i < CALLS_MAX; i++) {
		int ret = blk_extents(blk, off, end - off, extents);

		/* What was found before an error is a right answer too. */
		if (ret)
			return extents->count ? 0 : ret;
		if (extents->end == end || extents->count == extents->max_count)
			break;
		off = extents->end;
	}
	return 0;
}

/* Extents to descriptors, in place. */
static void describe(const struct nbd_request *request, unsigned count)
{
	const uint8_t *from = request->payload;
	uint8_t *to = request->payload;

	for (unsigned i = 0; i < count; i++) {
		struct blk_extent extent;

		memcpy(&extent, from, sizeof(extent));
		from += sizeof(extent);
		if (request->conn->form == NBD_EXTENDED) {
			struct nbd_extended_descriptor descriptor = { be64_make(extent.len),
				be64_make(extent.flags) };
			memcpy(to, &descriptor, sizeof(descriptor));
			to += sizeof(descriptor);
		} else {
			struct nbd_descriptor descriptor = { be32_make((uint32_t)extent.len),
				be32_make(extent.flags) };
			memcpy(to, &descriptor, sizeof(descriptor));
			to += sizeof(descriptor);
		}
	}
}

suspends int nbd_status(struct nbd_request *request)
{
	unsigned extents_max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;
	struct blk_extents extents;

	int ret = nbd_payload_get(request, NBD_STATUS_BUFFER_BYTES) ? 0 : -ENOMEM;
	blk_extents_init(&extents, (struct blk_extent *)request->payload, extents_max);
	if (!ret)
		ret = find_extents(request, &extents);
	if (ret) {
		nbd_payload_put(request);
		nbd_form_error(request, nbd_refusal_of(request, ret), &request->off);
		return ret;
	}
	assert(extents.count && extents.end <= request->off + request->len);
	describe(request, extents.count);
	nbd_form_status(request, extents.count);
	return 0;
}
