/*
 * Block status: what of a range is data, zero or hole, and who has the data; one metadata context or both.
 *
 * Layers describe as much as they know in one call; they are asked again until the range is described, the
 * list is full or they were asked often enough: a shorter answer is a right answer ("Structured reply
 * types"). It never goes beyond the range, so that lengths fit into 32 bits where they have to.
 *
 * The buffer has a part for the extents and one for the descriptors of each context. Both contexts describe
 * the same range, each with neighbours alike merged.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "nbd/conn.h"

#define CALLS_MAX   256
#define PART_BYTES  (NBD_STATUS_BUFFER_BYTES / (1 + NBD_CONTEXTS_MAX) / 64 * 64)
#define EXTENTS_MAX (PART_BYTES / sizeof(struct blk_extent))

_Static_assert(sizeof(struct nbd_extended_descriptor) <= sizeof(struct blk_extent) &&
		       sizeof(struct nbd_descriptor) <= sizeof(struct blk_extent),
	"as many descriptors as extents fit into a part");
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

/* What a context says of an extent. */
static uint32_t value_of(const struct blk_extent *extent, unsigned context)
{
	if (context == NBD_ALLOCATION_ID)
		return extent->flags;
	return extent->flags & BLK_EXTENT_HOLE ? 0 : extent->depth + 1;
}

static uint8_t *put_descriptor(enum nbd_form form, uint8_t *to, uint64_t len, uint32_t value)
{
	const struct nbd_extended_descriptor extended = { be64_make(len), be64_make(value) };
	const struct nbd_descriptor compact = { be32_make((uint32_t)len), be32_make(value) };

	if (form == NBD_EXTENDED)
		return mempcpy(to, &extended, sizeof(extended));
	return mempcpy(to, &compact, sizeof(compact));
}

/* The count of descriptors. */
static unsigned describe(enum nbd_form form, const struct blk_extents *extents, unsigned context,
	uint8_t *descriptors)
{
	unsigned count = 0;

	for (unsigned i = 0; i < extents->count; count++) {
		uint32_t value = value_of(&extents->list[i], context);
		uint64_t len = 0;

		while (i < extents->count && value_of(&extents->list[i], context) == value)
			len += extents->list[i++].len;
		descriptors = put_descriptor(form, descriptors, len, value);
	}
	return count;
}

static void form_reply(struct nbd_request *request, const struct blk_extents *extents)
{
	unsigned left = request->contexts;

	for (unsigned id = NBD_ALLOCATION_ID; id < NBD_CONTEXT_IDS; id++) {
		uint8_t *descriptors = request->payload + id * PART_BYTES;

		if (!(request->contexts >> id & 1))
			continue;
		left &= ~(1U << id);
		unsigned count = describe(request->conn->form, extents, id, descriptors);
		if (request->fragments)
			nbd_form_part_status(request, id, descriptors, count, !left);
		else
			nbd_form_status(request, id, descriptors, count);
	}
}

suspends int nbd_status(struct nbd_request *request)
{
	unsigned extents_max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;
	bool single = is_pow2(request->contexts);
	struct blk_extents extents;
	int ret = 0;

	if (!nbd_payload_get(request, NBD_STATUS_BUFFER_BYTES) ||
		(!single && !nbd_fragments_get(request)))
		ret = -ENOMEM;
	blk_extents_init(&extents, (struct blk_extent *)request->payload, extents_max);
	extents.tells_depth = request->contexts >> NBD_DEPTH_ID & 1;
	if (!ret)
		ret = find_extents(request, &extents);
	if (ret) {
		nbd_fragments_put(request);
		nbd_payload_put(request);
		nbd_form_error(request, nbd_refusal_of(request, ret), &request->off);
		return ret;
	}
	assert(extents.count && extents.end <= request->off + request->len);
	form_reply(request, &extents);
	return 0;
}
