/*
 * blkstack-img compare and digest: what disks contain, whatever the images look like.
 *
 * Holes are not read: two that coincide are equal, and for a digest they are so many zeroes. The digest is the
 * SHA-256 of the disk, the same that sha256sum prints for a raw copy of it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nettle/sha2.h>

#include "base/cleanup.h"
#include "daemon/img/commands.h"
#include "rt/reactor.h"

#define CHUNK (UINT32_C(1) << 20)

typedef unsigned long long ull;

/* One side of a comparison; a shorter disk goes on as zeroes. */
struct side {
	struct img *img;
	struct blk *disk;
	struct img_mapped mapped;
	uint64_t size;
	uint8_t *data;
	uint64_t off;
	size_t len;
	bool zero; /* known without reading: data is not filled */
	int result;
};

static suspends void fill(void *arg)
{
	struct side *side = arg;
	size_t inside = side->off < side->size
				? (size_t)MIN((uint64_t)side->len, side->size - side->off)
				: 0;

	side->result = 0;
	side->zero = true;
	if (!inside)
		return;
	side->mapped.disk = side->disk;
	if (!img_mapped_find(&side->mapped, side->off) && side->mapped.start >= side->off + inside)
		return;
	side->zero = false;
	memset(side->data + inside, 0, side->len - inside);
	side->result = blk_read(side->disk, side->off, side->data, inside);
}

/* True when they are equal; else *at is the first byte that differs. */
static bool sides_equal(const struct side *a, const struct side *b, uint64_t *at)
{
	static const uint8_t zeroes[CHUNK];
	const uint8_t *a_data = a->zero ? zeroes : a->data, *b_data = b->zero ? zeroes : b->data;
	size_t i = 0;

	if ((a->zero && b->zero) || !memcmp(a_data, b_data, a->len))
		return true;
	while (a_data[i] == b_data[i])
		i++;
	*at = a->off + i;
	return false;
}

/* 1: differ at *at; 0: equal. */
static suspends int compare(struct side *a, struct side *b, uint64_t *at)
{
	uint64_t size = MAX(a->size, b->size);
	struct img_progress progress;
	int ret = 0;

	img_progress_init(&progress, a->img, "comparing");
	for (uint64_t off = 0; off < size && !ret; off += CHUNK) {
		struct co_group group;

		co_group_init(&group);
		a->off = b->off = off;
		a->len = b->len = (size_t)MIN((uint64_t)CHUNK, size - off);
		co_group_start(&group, fill, a);
		co_group_start(&group, fill, b);
		co_group_wait(&group);
		ret = a->result ? a->result : b->result;
		if (ret)
			img_cannot_read(
				a->img, a->result ? "the first disk" : "the second disk", off, ret);
		else if (!sides_equal(a, b, at))
			ret = 1;
		img_progress(&progress, off, size);
	}
	img_progress_end(&progress);
	return ret;
}

static const struct img_option compare_options[] = {
	IMG_OPTION_FORMAT,
	{ 'F', "second-format", "FORMAT", "of SECOND" },
	{ 's', "strict", NULL, "disks of different size differ, though the rest be zeroes" },
	IMG_OPTION_ALLOW,
	{},
};

static void say(
	const struct img *img, const struct side *a, const struct side *b, int result, uint64_t at)
{
	if (img->json)
		img_print_json(json_pack("{s:b, s:o, s:I, s:I}", "identical", !result, "differs-at",
			result ? json_integer((json_int_t)at) : json_null(), "first-size",
			(json_int_t)a->size, "second-size", (json_int_t)b->size));
	else if (result)
		printf("The contents differ at offset %llu.\n", (ull)at);
	else if (!img->quiet)
		printf("The contents are identical%s.\n",
			a->size == b->size ? "" : ", but for the size: the rest is zeroes");
}

static suspends enum img_exit run_compare(struct img *img)
{
	struct side a = { .img = img, .data = malloc(CHUNK) };
	struct side b = { .img = img, .data = malloc(CHUNK) };
	enum img_exit status = IMG_USAGE;
	int a_format, b_format, ret = 0;
	uint64_t at = 0;

	if (!img_format_value(img, "format", &a_format) ||
		!img_format_value(img, "second-format", &b_format))
		goto out;
	status = IMG_FAILED;
	if (!a.data || !b.data)
		ret = err_set(&img->err, ENOMEM, "no memory");
	if (!ret)
		ret = img_open_disk(img, img->operands[0], a_format, true, &a.disk, NULL);
	if (!ret)
		ret = img_open_disk(img, img->operands[1], b_format, true, &b.disk, NULL);
	if (ret)
		goto out;
	a.size = blk_caps(a.disk)->size;
	b.size = blk_caps(b.disk)->size;
	at = MIN(a.size, b.size);
	ret = img_flag(img, "strict") && a.size != b.size ? 1 : compare(&a, &b, &at);
	if (ret < 0)
		goto out;
	say(img, &a, &b, ret, at);
	status = ret ? IMG_CORRUPT : IMG_OK;
out:
	stack_close(b.disk);
	stack_close(a.disk);
	free(a.data);
	free(b.data);
	return status;
}

const struct img_command img_compare = {
	.name = "compare",
	.operands = "FIRST SECOND",
	.summary = "say whether two disks have the same content",
	.help = "The longer one may have zeroes behind the end of the other. Exit status 3: they "
		"differ.\n",
	.operands_min = 2,
	.operands_max = 2,
	.options = compare_options,
	.run = run_compare,
};

/* --- digest ----------------------------------------------------------------------------------- */

struct hash {
	struct sha256_ctx context;
	const uint8_t *data;
	size_t len;
};

static void hash_chunk(void *arg)
{
	struct hash *hash = arg;

	sha256_update(&hash->context, hash->len, hash->data);
}

static suspends int digest(struct side *side, struct hash *hash)
{
	static const uint8_t zeroes[CHUNK];
	struct img_progress progress;
	int ret = 0;

	img_progress_init(&progress, side->img, "reading");
	sha256_init(&hash->context);
	for (side->off = 0; side->off < side->size; side->off += CHUNK) {
		side->len = (size_t)MIN((uint64_t)CHUNK, side->size - side->off);
		fill(side);
		ret = side->result;
		if (ret)
			break;
		hash->data = side->zero ? zeroes : side->data;
		hash->len = side->len;
		co_offload(hash_chunk, hash);
		img_progress(&progress, side->off, side->size);
	}
	img_progress_end(&progress);
	return ret ? img_cannot_read(side->img, "the disk", side->off, ret) : 0;
}

static const struct img_option digest_options[] = {
	IMG_OPTION_FORMAT,
	IMG_OPTION_ALLOW,
	{},
};

static suspends enum img_exit run_digest(struct img *img)
{
	struct side side = { .img = img, .data = malloc(CHUNK) };
	char text[2 * SHA256_DIGEST_SIZE + 1];
	uint8_t bytes[SHA256_DIGEST_SIZE];
	struct hash hash;
	int format, ret;

	if (!img_format_value(img, "format", &format)) {
		free(side.data);
		return IMG_USAGE;
	}
	ret = side.data ? img_open_disk(img, img->operands[0], format, true, &side.disk, NULL)
			: err_set(&img->err, ENOMEM, "no memory");
	if (!ret) {
		side.size = blk_caps(side.disk)->size;
		ret = digest(&side, &hash);
		stack_close(side.disk);
	}
	free(side.data);
	if (ret)
		return IMG_FAILED;
	sha256_digest(&hash.context, sizeof(bytes), bytes);
	for (size_t i = 0; i < sizeof(bytes); i++)
		snprintf(text + 2 * i, 3, "%02x", bytes[i]);
	if (img->json)
		img_print_json(
			json_pack("{s:o, s:s, s:I}", "filename", img_json_text(img->operands[0]),
				"sha256", text, "virtual-size", (json_int_t)side.size));
	else
		printf("%s  %s\n", text, img->operands[0]);
	return IMG_OK;
}

const struct img_command img_digest = {
	.name = "digest",
	.operands = "FILE",
	.summary = "print the SHA-256 of a disk's content",
	.help = "It is what sha256sum prints for a raw copy of the disk.\n",
	.operands_min = 1,
	.operands_max = 1,
	.options = digest_options,
	.run = run_digest,
};
