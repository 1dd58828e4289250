/*
 * blkstack-img snapshot: the internal snapshots of a qcow2 image.
 *
 * An image whose refcounts are stale (it was not closed properly) has to be repaired before its snapshots change.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "blk/qcow/snapshot.h"
#include "daemon/img/commands.h"

typedef int change_fn(struct blk *file, struct qcow_header *header, const char *name, bool discard,
	struct err *err);

static suspends int change(struct img *img, change_fn *fn)
{
	struct qcow_header header;
	struct blk *file;
	int ret = img_open_file(img, img->operands[1], false, &file);

	if (ret)
		return ret;
	ret = qcow_header_load(file, &header, &img->err);
	if (!ret) {
		if (header.incompatible & QCOW_INCOMPAT_DIRTY)
			ret = err_set(&img->err, EUCLEAN,
				"the image was not closed properly: repair it first");
		else
			ret = fn(file, &header, img->operands[2], true, &img->err);
		qcow_header_fini(&header);
	}
	stack_close(file);
	return ret ? img_wrap_path(img, img->operands[1]) : 0;
}

static suspends enum img_exit run(struct img *img)
{
	const char *verb = img->operands[0];
	int ret;

	if (!strcmp(verb, "list") && img->operand_count == 2)
		return img_show_snapshots(img, img->operands[1]);
	if (img->operand_count == 3 && !strcmp(verb, "create"))
		ret = change(img, qcow_snapshot_create);
	else if (img->operand_count == 3 && !strcmp(verb, "apply"))
		ret = change(img, qcow_snapshot_apply);
	else if (img->operand_count == 3 && !strcmp(verb, "delete"))
		ret = change(img, qcow_snapshot_delete);
	else {
		err_set(&img->err, EINVAL,
			"snapshot takes: list FILE, create FILE NAME, apply FILE NAME, or delete "
			"FILE "
			"NAME");
		return IMG_USAGE;
	}
	if (!ret && img->json)
		img_print_json(json_pack("{s:o, s:o}", "filename", img_json_text(img->operands[1]),
			"snapshot", img_json_text(img->operands[2])));
	return ret ? IMG_FAILED : IMG_OK;
}

const struct img_command img_snapshot = {
	.name = "snapshot",
	.operands = "list|create|apply|delete FILE [NAME]",
	.summary = "list, make, go back to or delete snapshots inside an image",
	.help = "apply makes the disk what it was when the snapshot was taken; what was written "
		"since is "
		"lost,\nunless another snapshot has it. NAME of apply and delete may be an id as "
		"listed.\n"
		"A crash leaves the image as it was before or as it is afterwards, nothing "
		"between.\n",
	.operands_min = 2,
	.operands_max = 3,
	.run = run,
};
