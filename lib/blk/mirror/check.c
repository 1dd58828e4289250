/*
 * Whether two disks can be a mirror: block sizes, lengths, who may be written, and that they are two.
 *
 * Two legs that are one disk would be found out by the file's lock only, and with a text that does not help; so
 * the config of the secondary is compared with that of every layer of the primary before anything is opened:
 * the same file (also through links), the same named memory disk, the same NBD export.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/units.h"
#include "blk/mirror/mirror_private.h"

/* --- is it the same disk? --------------------------------------------------------------------- */

struct identity_job {
	const struct mirror *mirror;
	struct err *err;
	int ret;
};

static const char *text_of(const struct conf *layer, const char *key)
{
	const struct conf *item = conf_get(layer, key);

	return item && item->type == CONF_STRING ? item->string : NULL;
}

static bool same_file(const char *a, const char *b)
{
	struct stat a_stat, b_stat;

	if (!strcmp(a, b))
		return true;
	if (stat(a, &a_stat) || stat(b, &b_stat))
		return false;
	if (S_ISBLK(a_stat.st_mode) && S_ISBLK(b_stat.st_mode))
		return a_stat.st_rdev == b_stat.st_rdev;
	return a_stat.st_dev == b_stat.st_dev && a_stat.st_ino == b_stat.st_ino;
}

/* What both layers store their bytes in, when that is the same; else NULL. */
static const char *same_store(const struct conf *a, const struct conf *b)
{
	const char *a_path = text_of(a, "path"), *b_path = text_of(b, "path");
	const char *a_uri = text_of(a, "uri"), *b_uri = text_of(b, "uri");
	const char *a_name = text_of(a, "name"), *b_name = text_of(b, "name");
	const char *a_layer = text_of(a, "layer"), *b_layer = text_of(b, "layer");

	if (!a_layer || !b_layer || strcmp(a_layer, b_layer))
		return NULL;
	if (a_path && b_path && same_file(a_path, b_path))
		return a_path;
	if (a_uri && b_uri && !strcmp(a_uri, b_uri))
		return a_uri;
	return a_name && b_name && !strcmp(a_name, b_name) ? a_name : NULL;
}

/* The stack and what it holds below its options, against one layer. */
static const char *find_store(const struct conf *stack, const struct conf *layer)
{
	const char *found = NULL;

	for (size_t i = 0; i < stack->item_count && !found; i++) {
		const struct conf *other = stack->items[i];

		if (other->type != CONF_GROUP)
			continue;
		found = same_store(other, layer);
		for (size_t j = 0; j < other->item_count && !found; j++)
			if (other->items[j]->type == CONF_LIST)
				found = find_store(other->items[j], layer);
	}
	return found;
}

static int check_tree(const struct mirror *mirror, const struct blk *blk, struct err *err)
{
	int ret = 0;

	for (; blk && !ret; blk = blk->below) {
		const char *store = find_store(mirror->secondary_conf, blk->conf);

		if (store)
			return conf_error(mirror->secondary_conf, err,
				"the secondary is the primary itself: both are %s \"%s\"",
				blk->ops->name, store);
		if (blk->ops == mirror->blk.ops)
			return conf_error(mirror->blk.conf, err,
				"there is a mirror below already, and a mirror of a mirror is not "
				"supported");
		list_for_each (link, &blk->extra_children)
			ret = ret ? ret
				  : check_tree(mirror,
					    list_entry(link, const struct blk, extra_link), err);
	}
	return ret;
}

static void identity_job_run(void *arg)
{
	struct identity_job *job = arg;

	job->ret = check_tree(job->mirror, job->mirror->primary, job->err);
}

suspends int mirror_check_identity(const struct mirror *mirror, struct err *err)
{
	struct identity_job job = { mirror, err, 0 };

	co_offload(identity_job_run, &job);
	return job.ret;
}

/* Whether there is a mirror in it. */
bool mirror_conf_nests(const struct conf *stack)
{
	for (size_t i = 0; i < stack->item_count; i++) {
		const struct conf *layer = stack->items[i];
		const char *name = layer->type == CONF_GROUP ? text_of(layer, "layer") : NULL;

		if (name && conf_name_equal(name, "mirror"))
			return true;
		for (size_t j = 0; layer->type == CONF_GROUP && j < layer->item_count; j++)
			if (layer->items[j]->type == CONF_LIST &&
				mirror_conf_nests(layer->items[j]))
				return true;
	}
	return false;
}

/* --- do they fit? ----------------------------------------------------------------------------- */

int mirror_check_legs(const struct mirror *mirror, const struct blk *secondary_blk, struct err *err)
{
	const struct blk_caps *primary = blk_caps(mirror->primary);
	const struct blk_caps *secondary = blk_caps(secondary_blk);
	char text[2][UNITS_SIZE_TEXT_LEN];

	if (!is_aligned(primary->size, secondary->block_size))
		return err_set(err, EINVAL,
			"the secondary's block size, %u, does not fit: the primary's length, %llu "
			"bytes, is no multiple of it",
			secondary->block_size, (unsigned long long)primary->size);
	if (!is_aligned(secondary->size, primary->block_size))
		return err_set(err, EINVAL,
			"the primary's block size, %u, does not fit: the secondary's length, %llu "
			"bytes, is no multiple of it",
			primary->block_size, (unsigned long long)secondary->size);
	if (primary->size != secondary->size)
		return err_set(err, EINVAL,
			"lengths differ: the primary has %llu bytes (%s), the secondary %llu (%s). "
			"Make the secondary as long as the primary, also after a crash amid a "
			"resize",
			(unsigned long long)primary->size,
			units_format_size(primary->size, text[0]),
			(unsigned long long)secondary->size,
			units_format_size(secondary->size, text[1]));
	if (secondary->read_only)
		return err_set(err, EROFS, "the secondary is read-only");
	return 0;
}
