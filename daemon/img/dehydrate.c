/*
 * blkstack-img dehydrate and rehydrate: the metadata of a qcow2 image alone, to send with a bug report.
 *
 * The file is a zstd stream of
 *	"BLKSDRY1", be64 length of the image file
 *	be64 offset, be64 length, that many bytes; again and again, until the end
 * with the header's cluster and all tables that the image points to, damaged or not; no guest data. The names of
 * backing files, snapshots and bitmaps are in it. rehydrate makes a sparse file of that: the same tables at the same
 * places, holes instead of data.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zstd.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "blk/qcow/check_private.h"
#include "daemon/img/commands.h"

#define MAGIC   "BLKSDRY1"
#define PIECE   (UINT64_C(1) << 20) /* records are no longer */
#define LEVEL   6
#define LEN_MAX (UINT64_C(1) << 56) /* of the image file */

struct head {
	char magic[8];
	be64 file_size;
};
struct record {
	be64 off, len;
};

/* --- dehydrate -------------------------------------------------------------------------------- */

struct drain {
	struct img *img;
	const struct image *image;
	FILE *out;
	ZSTD_CCtx *zstd;
	uint8_t *piece, *packed;
	size_t packed_size;
	uint64_t bytes;
};

static int pack(struct drain *drain, const void *data, size_t len, ZSTD_EndDirective end)
{
	ZSTD_inBuffer in = { data, len, 0 };
	size_t left;

	do {
		ZSTD_outBuffer out = { drain->packed, drain->packed_size, 0 };

		left = ZSTD_compressStream2(drain->zstd, &out, &in, end);
		if (ZSTD_isError(left))
			return err_set(&drain->img->err, EIO, "cannot compress");
		if (fwrite(drain->packed, 1, out.pos, drain->out) != out.pos)
			return err_sys(&drain->img->err, errno, "cannot write the output");
	} while (end == ZSTD_e_end ? left : in.pos < in.size);
	return 0;
}

static suspends int put_range(struct drain *drain, uint64_t off, uint64_t len)
{
	uint64_t file_size = drain->image->file_size;
	int ret = 0;

	if (off >= file_size)
		return 0;
	len = MIN(len, file_size - off);
	for (uint64_t at = 0; at < len && !ret; at += PIECE) {
		uint64_t now = MIN(len - at, PIECE);
		struct record record = { be64_make(off + at), be64_make(now) };

		ret = image_read(drain->image, off + at, drain->piece, now);
		if (ret)
			return err_sys(&drain->img->err, -ret, "cannot read the image");
		ret = pack(drain, &record, sizeof(record), ZSTD_e_continue);
		if (!ret)
			ret = pack(drain, drain->piece, (size_t)now, ZSTD_e_continue);
		drain->bytes += now;
	}
	return ret;
}

static suspends int put_snapshots(struct drain *drain, const struct qcow_snapshots *list)
{
	int ret = put_range(drain, drain->image->header->snapshots_off, list->len);

	for (uint32_t i = 0; i < list->count && !ret; i++)
		if (list->items[i].l1_entry_count <= QCOW_L1_LEN_MAX_BYTES / 8)
			ret = put_range(drain, list->items[i].l1_off,
				(uint64_t)list->items[i].l1_entry_count * 8);
	return ret;
}

static suspends int put_metadata(struct drain *drain, const struct check *check)
{
	const struct image *image = &check->image;
	const struct qcow_header *header = image->header;
	struct head head = { .file_size = be64_make(image->file_size) };
	int ret;

	memcpy(head.magic, MAGIC, sizeof(head.magic));
	ret = pack(drain, &head, sizeof(head), ZSTD_e_continue);
	if (!ret)
		ret = put_range(drain, 0, image->cluster_size);
	if (!ret)
		ret = put_range(drain, header->refcount_table_off, image->refcount_table_count * 8);
	for (uint64_t i = 0; i < image->refcount_table_count && !ret; i++)
		if (image->refcount_table[i])
			ret = put_range(drain, image->refcount_table[i] & QCOW_REFTABLE_OFF_MASK,
				image->cluster_size);
	if (!ret)
		ret = put_range(drain, header->l1_off, (uint64_t)header->l1_entry_count * 8);
	if (!ret)
		ret = put_snapshots(drain, &check->snapshots);
	for (size_t i = 0; i < check->tables.count && !ret; i++)
		ret = put_range(drain, check->tables.items[i].host_off, image->cluster_size);
	return ret ? ret : pack(drain, NULL, 0, ZSTD_e_end);
}

static suspends int drain_image(struct img *img, struct blk *file, FILE *out, uint64_t *bytes)
{
	struct drain drain = { .img = img,
		.out = out,
		.zstd = ZSTD_createCCtx(),
		.piece = malloc(PIECE),
		.packed_size = ZSTD_CStreamOutSize() };
	struct qcow_header header;
	struct qcow_check_result result;
	struct check check;
	int ret = qcow_header_load(file, &header, &img->err);

	drain.packed = malloc(drain.packed_size);
	if (!ret) {
		/* The check finds all tables, whatever else it finds. */
		ret = check_run(&check, file, &header, NULL, &result, &img->err);
		drain.image = &check.image;
		if (!ret && (!drain.zstd || !drain.piece || !drain.packed))
			ret = err_set(&img->err, ENOMEM, "no memory");
		if (!ret) {
			ZSTD_CCtx_setParameter(drain.zstd, ZSTD_c_compressionLevel, LEVEL);
			ret = put_metadata(&drain, &check);
		}
		check_fini(&check);
		qcow_header_fini(&header);
	}
	*bytes = drain.bytes;
	ZSTD_freeCCtx(drain.zstd);
	free(drain.piece);
	free(drain.packed);
	return ret;
}

static suspends enum img_exit run_dehydrate(struct img *img)
{
	const char *path = img->operands[1];
	struct blk *file;
	uint64_t bytes;
	int ret = img_open_file(img, img->operands[0], true, &file);

	if (ret)
		return IMG_FAILED;
	FILE *out = fopen(path, img_flag(img, "force") ? "we" : "wxe");
	if (!out) {
		err_sys(&img->err, errno, "\"%s\" cannot be created", path);
		stack_close(file);
		return IMG_FAILED;
	}
	ret = drain_image(img, file, out, &bytes);
	stack_close(file);
	if (fclose(out) && !ret)
		ret = err_sys(&img->err, errno, "cannot write \"%s\"", path);
	if (ret) {
		remove(path);
		img_wrap_path(img, img->operands[0]);
		return IMG_FAILED;
	}
	if (img->json)
		img_print_json(json_pack("{s:I}", "metadata-bytes", (json_int_t)bytes));
	else if (!img->quiet)
		printf("\"%s\": %llu bytes of metadata\n", path, (unsigned long long)bytes);
	return IMG_OK;
}

static const struct img_option dehydrate_options[] = {
	{ 0, "force", NULL, "overwrite OUTPUT if it exists" },
	{},
};

const struct img_command img_dehydrate = {
	.name = "dehydrate",
	.operands = "FILE OUTPUT",
	.summary = "save the metadata of a qcow2 image without its data",
	.help = "For a bug report: tables, no guest data. Names of backing files and snapshots are "
		"in it.\n",
	.operands_min = 2,
	.operands_max = 2,
	.options = dehydrate_options,
	.run = run_dehydrate,
};

/* --- rehydrate -------------------------------------------------------------------------------- */

struct refill {
	struct img *img;
	FILE *in;
	ZSTD_DCtx *zstd;
	uint8_t *packed, *piece;
	ZSTD_inBuffer buffer;
	bool complete; /* the stream has ended where it should */
};

/* 1 when len bytes were read, 0 at the end, -errno. */
static int unpack(struct refill *refill, void *data, size_t len)
{
	ZSTD_outBuffer out = { data, len, 0 };

	while (out.pos < len) {
		size_t before = out.pos, left;

		if (refill->buffer.pos == refill->buffer.size) {
			refill->buffer.size = fread(
				refill->packed, 1, ZSTD_DStreamInSize(), refill->in);
			refill->buffer.pos = 0;
		}
		if (!refill->buffer.size && refill->complete && !out.pos)
			return 0;
		left = ZSTD_decompressStream(refill->zstd, &out, &refill->buffer);
		if (ZSTD_isError(left))
			return err_set(
				&refill->img->err, EINVAL, "not made by dehydrate, or damaged");
		refill->complete = !left;
		if (!refill->buffer.size && out.pos == before)
			return err_set(&refill->img->err, EINVAL, "the file ends too early");
	}
	return 1;
}

static suspends int fill_file(struct refill *refill, struct blk *file)
{
	uint64_t size = blk_caps(file)->size;
	struct record record;
	int ret;

	while ((ret = unpack(refill, &record, sizeof(record))) > 0) {
		uint64_t off = be64_get(record.off), len = be64_get(record.len);

		if (!len || len > PIECE || !range_ok(off, len, size))
			return err_set(&refill->img->err, EINVAL,
				"a record of %llu bytes at %llu is not valid",
				(unsigned long long)len, (unsigned long long)off);
		ret = unpack(refill, refill->piece, (size_t)len);
		if (ret <= 0)
			return ret ? ret
				   : err_set(&refill->img->err, EINVAL, "the file ends too early");
		ret = blk_write(file, off, refill->piece, (size_t)len, 0);
		if (ret)
			return err_sys(&refill->img->err, -ret, "cannot write the image");
	}
	if (!ret)
		ret = blk_flush(file);
	return ret;
}

static suspends int rehydrate(struct refill *refill)
{
	struct img *img = refill->img;
	struct head head;
	struct blk *file;
	int ret = unpack(refill, &head, sizeof(head));
	uint64_t size = ret > 0 ? be64_get(head.file_size) : 0;

	if (ret < 0)
		return ret;
	if (!ret || memcmp(head.magic, MAGIC, sizeof(head.magic)) != 0 || !size || size > LEN_MAX)
		return err_set(&img->err, EINVAL, "not made by dehydrate");
	ret = img_create_file(img, img->operands[1], size, &file);
	if (ret)
		return ret;
	ret = blk_discard(file, 0, size, 0);
	ret = ret ? err_sys(&img->err, -ret, "cannot empty the file") : fill_file(refill, file);
	img->env.start_failed = ret;
	stack_close(file);
	return ret;
}

static suspends enum img_exit run_rehydrate(struct img *img)
{
	CLEANUP(file) FILE *in = fopen(img->operands[0], "re");
	struct refill refill = { .img = img, .in = in, .zstd = ZSTD_createDCtx() };
	int ret;

	refill.packed = malloc(ZSTD_DStreamInSize());
	refill.piece = malloc(PIECE);
	refill.buffer.src = refill.packed;
	if (!in)
		ret = err_sys(&img->err, errno, "cannot open");
	else if (!refill.zstd || !refill.packed || !refill.piece)
		ret = err_set(&img->err, ENOMEM, "no memory");
	else
		ret = rehydrate(&refill);
	ZSTD_freeDCtx(refill.zstd);
	free(refill.packed);
	free(refill.piece);
	if (ret)
		img_wrap_path(img, img->operands[0]);
	else if (img->json)
		img_print_json(json_pack("{s:o}", "filename", img_json_text(img->operands[1])));
	return ret ? IMG_FAILED : IMG_OK;
}

const struct img_command img_rehydrate = {
	.name = "rehydrate",
	.operands = "INPUT FILE",
	.summary = "make an image without data of what dehydrate saved",
	.operands_min = 2,
	.operands_max = 2,
	.options = dehydrate_options,
	.run = run_rehydrate,
};
