/*
 * A model of a disk (an array of bytes) and random operations on a disk and its model: whatever a
 * client does, both hold the same.
 */
#pragma once

#include "unit.h"

struct model {
	uint64_t random;
	uint64_t size;
	uint8_t *bytes;
	uint64_t align;    /* of offsets, lengths */
	unsigned buf_skew; /* buffers lie this far from a page boundary, at most */
};

static inline void model_init(struct model *model, uint64_t size)
{
	*model = (struct model){ .random = unit_seed, .size = size, .align = 1, .buf_skew = 64 };
	model->bytes = calloc(1, size);
}

static inline void model_fini(struct model *model)
{
	free(model->bytes);
}

static inline suspends void model_verify(struct model *model, struct blk *blk)
{
	uint8_t *buf = malloc(model->size);

	ck_assert_uint_eq(blk_caps(blk)->size, model->size);
	ck_assert_int_eq(blk_read(blk, 0, buf, model->size), 0);
	uint64_t i = 0;
	while (i < model->size && buf[i] == model->bytes[i])
		i++;
	if (i < model->size)
		ck_abort_msg("byte %llu is %02x, should be %02x", (unsigned long long)i, buf[i],
			model->bytes[i]);
	free(buf);
}

/* The extents of the whole disk lie side by side, and what they call zero is. */
static inline suspends void model_verify_extents(struct model *model, struct blk *blk)
{
	struct blk_extent list[7];
	struct blk_extents extents;

	for (uint64_t off = 0; off < model->size; off = extents.end) {
		blk_extents_init(&extents, list, ARRAY_LEN(list));
		ck_assert_int_eq(blk_extents(blk, off, model->size - off, &extents), 0);
		ck_assert_uint_ge(extents.count, 1);
		uint64_t at = off;
		for (unsigned i = 0; i < extents.count; at += list[i++].len) {
			ck_assert_uint_gt(list[i].len, 0);
			ck_assert_uint_le(at + list[i].len, model->size);
			if (!(list[i].flags & BLK_EXTENT_ZERO))
				continue;
			for (uint64_t pos = at; pos < at + list[i].len; pos++)
				if (model->bytes[pos])
					ck_abort_msg("byte %llu is called zero and is %02x",
						(unsigned long long)pos, model->bytes[pos]);
		}
		ck_assert_uint_eq(at, extents.end);
	}
}

/* A random range: mostly short, sometimes up to max_len. */
static inline void model_range(struct model *model, uint64_t max_len, uint64_t *off, uint64_t *len)
{
	uint64_t *random = &model->random;
	uint64_t longest = random_below(random, 4) ? MIN(max_len, 3 * 4096U) : max_len;

	*len = random_below(random, longest / model->align) * model->align + model->align;
	*off = random_below(random, (model->size - *len) / model->align + 1) * model->align;
}

static inline suspends void model_write(
	struct model *model, struct blk *blk, uint64_t off, uint64_t len, unsigned flags)
{
	uint8_t *buf = aligned_alloc(4096, round_up(len + model->buf_skew + 1, 4096));
	uint8_t *start = buf + random_below(&model->random, model->buf_skew + 1);

	random_fill(&model->random, start, len);
	ck_assert_int_eq(blk_write(blk, off, start, len, flags), 0);
	memcpy(model->bytes + off, start, len);
	free(buf);
}

static inline suspends void model_read(
	struct model *model, struct blk *blk, uint64_t off, uint64_t len)
{
	uint8_t *buf = aligned_alloc(4096, round_up(len + model->buf_skew + 1, 4096));
	uint8_t *start = buf + random_below(&model->random, model->buf_skew + 1);

	memset(buf, 0xaa, len + model->buf_skew + 1);
	ck_assert_int_eq(blk_read(blk, off, start, len), 0);
	ck_assert_int_eq(memcmp(start, model->bytes + off, len), 0);
	free(buf);
}

/* One random operation on both. */
static inline suspends void model_step(struct model *model, struct blk *blk)
{
	unsigned flags = random_below(&model->random, 8) ? 0 : BLK_FUA;
	uint64_t off, len;

	model_range(model, MAX(model->size / 3, model->align), &off, &len);
	switch (random_below(&model->random, 8)) {
	case 0:
	case 1:
	case 2:
		model_write(model, blk, off, len, flags);
		break;
	case 3:
	case 4:
		model_read(model, blk, off, len);
		break;
	case 5:
		flags |= random_below(&model->random, 2) ? BLK_NO_HOLE : 0;
		ck_assert_int_eq(blk_zero(blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 6:
		ck_assert_int_eq(blk_discard(blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 7:
		ck_assert_int_eq(blk_flush(blk), 0);
		break;
	}
}

static inline suspends void model_run(struct model *model, struct blk *blk, unsigned steps)
{
	while (steps--)
		model_step(model, blk);
	model_verify(model, blk);
	model_verify_extents(model, blk);
}

/* To size; what is new reads as zeroes. */
static inline suspends void model_resize(struct model *model, struct blk *blk, uint64_t size)
{
	struct err err;

	ck_assert_msg(!blk_resize(blk, size, BLK_FORCE, &err), "%s", err.text);
	model->bytes = realloc(model->bytes, size);
	if (size > model->size)
		memset(model->bytes + model->size, 0, size - model->size);
	model->size = size;
}
