/*
 * Opening and creating files, and the disks in them.
 *
 * Everything goes through stacks, as in the daemon: a file is a stack of one layer, a disk in a qcow2 image
 * one of two. So locks, checks and error texts are the daemon's. What an image names is opened only if it
 * lies in a folder given with --allow-backing, and its format is what the image says, never guessed.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "blk/qcow/qcow.h"
#include "daemon/img/img.h"

bool img_format_value(struct img *img, const char *option, int *format)
{
	static const char *const names[] = { "raw", "qcow2", NULL };
	unsigned index;

	*format = -1;
	if (!img_flag(img, option))
		return true;
	if (!img_choice(img, option, names, &index))
		return false;
	*format = (int)index;
	return true;
}

int img_wrap_path(struct img *img, const char *path)
{
	char quoted[sizeof(img->err.text)];

	snprintf(quoted, sizeof(quoted), "\"%s\"", path);
	return strstr(img->err.text, quoted) ? -img->err.code : err_wrap(&img->err, "%s", quoted);
}

int img_cannot_read(struct img *img, const char *what, uint64_t off, int ret)
{
	return err_set(&img->err, -ret, "cannot read %s at %llu: %s%s", what,
		(unsigned long long)off, strerror(-ret),
		ret == -EIO ? " (if it is a qcow2 image, blkstack-img check may tell why)" : "");
}

/* An empty stack; it lives as long as img. */
static struct conf *new_stack(struct img *img)
{
	if (!img->confs)
		img->confs = conf_new(CONF_LIST, NULL, NULL);
	return conf_add(img->confs, conf_new(CONF_LIST, NULL, NULL));
}

static struct conf *add_layer(struct conf *stack, const char *name)
{
	struct conf *layer = conf_add(stack, conf_new(CONF_GROUP, NULL, NULL));

	conf_add(layer, conf_new_string("layer", NULL, name));
	return layer;
}

static struct conf *add_file_layer(struct conf *stack, const char *path)
{
	struct conf *layer = add_layer(stack, "file");

	conf_add(layer, conf_new_string("path", NULL, path));
	return layer;
}

suspends int img_open_file(struct img *img, const char *path, bool read_only, struct blk **file)
{
	struct conf *stack = new_stack(img);

	add_file_layer(stack, path);
	return stack_open(stack, &img->env, read_only, file, &img->err);
}

/* An existing file may be overwritten: only when that was asked for. */
static int prepare_existing(struct img *img, const char *path, const struct stat *st)
{
	if (!img_flag(img, "force"))
		return err_set(&img->err, EEXIST, "\"%s\" exists; --force overwrites it", path);
	/* The file layer takes no file without a size. */
	if (S_ISREG(st->st_mode) && !st->st_size && truncate(path, 512))
		return err_sys(&img->err, errno, "\"%s\" cannot be given a size", path);
	return 0;
}

suspends int img_create_file(struct img *img, const char *path, uint64_t size, struct blk **file)
{
	struct conf *stack = new_stack(img), *layer = add_file_layer(stack, path);
	struct stat st;
	int ret = 0;

	if (!stat(path, &st)) {
		ret = prepare_existing(img, path, &st);
	} else {
		conf_add(layer, conf_new_bool("create", NULL, true));
		conf_add(layer, conf_new_int("size", NULL, (int64_t)MAX(size, UINT64_C(512))));
	}
	if (!ret)
		ret = stack_open(stack, &img->env, false, file, &img->err);
	if (ret || blk_caps(*file)->size == size || !size)
		return ret;
	ret = blk_resize(*file, size, BLK_FORCE, &img->err);
	if (ret && blk_caps(*file)->size < size) {
		stack_close(take_ptr(*file));
		return img_wrap_path(img, path);
	}
	return 0;
}

suspends int img_probe(struct img *img, struct blk *file, enum img_format *format)
{
	be32 magic = { 0 };
	int ret = 0;

	if (blk_caps(file)->size >= sizeof(magic))
		ret = blk_read(file, 0, &magic, sizeof(magic));
	*format = be32_get(magic) == QCOW_MAGIC ? IMG_QCOW2 : IMG_RAW;
	return ret ? err_sys(&img->err, -ret, "cannot read the file's first bytes") : 0;
}

static suspends int find_format(struct img *img, const char *path, int *format)
{
	enum img_format found;
	struct blk *file;
	int ret;

	if (*format >= 0)
		return 0;
	ret = img_open_file(img, path, true, &file);
	if (ret)
		return ret;
	ret = img_probe(img, file, &found);
	stack_close(file);
	*format = (int)found;
	return ret;
}

/* The folders of --allow-backing; one that is not there is a mistake. */
static int add_allowed(struct img *img, struct conf *folders)
{
	const char *folder;
	struct stat st;

	for (size_t i = 0; (folder = img_nth_value(img, "allow-backing", i)); i++) {
		if (stat(folder, &st) || !S_ISDIR(st.st_mode))
			return err_set(&img->err, ENOENT,
				"--allow-backing: there is no folder \"%s\"", folder);
		conf_add(folders, conf_new_string(NULL, NULL, folder));
	}
	return 0;
}

static int add_qcow_layer(struct img *img, struct conf *stack)
{
	struct conf *layer = add_layer(stack, "qcow");

	if (!img_nth_value(img, "allow-backing", 0))
		return 0;
	return add_allowed(img, conf_add(layer, conf_new(CONF_LIST, "allow-backing", NULL)));
}

suspends int img_resolve_backing(struct img *img, const char *image, const char *name, char **path)
{
	struct conf *allowed = conf_new(CONF_LIST, NULL, NULL);
	CLEANUP(free) char *real = realpath(image, NULL);
	char *slash = real ? strrchr(real, '/') : NULL;

	if (slash)
		slash[slash == real] = '\0';
	int ret = add_allowed(img, allowed);
	if (ret) {
		conf_free(allowed);
		return ret;
	}
	ret = qcow_resolve(allowed, real, name, path);
	conf_free(allowed);
	if (ret == -EACCES)
		return err_set(&img->err, EACCES,
			"\"%s\" wants \"%s\" as its backing file: allow its folder with "
			"--allow-backing",
			image, name);
	return ret ? err_sys(&img->err, -ret, "cannot open the backing file \"%s\"", name) : 0;
}

suspends int img_open_disk(struct img *img, const char *path, int format, bool read_only,
	struct blk **disk, enum img_format *found)
{
	int ret = find_format(img, path, &format);

	if (ret)
		return ret;
	struct conf *stack = new_stack(img);
	if (format == IMG_QCOW2 && (ret = add_qcow_layer(img, stack)))
		return ret;
	add_file_layer(stack, path);
	if (found)
		*found = (enum img_format)format;
	ret = stack_open(stack, &img->env, read_only, disk, &img->err);
	return ret ? img_wrap_path(img, path) : 0;
}

suspends int img_mapped_find(struct img_mapped *mapped, uint64_t off)
{
	int ret;

	if (off < mapped->end) {
		mapped->start = MAX(mapped->start, off);
		return 0;
	}
	ret = blk_seek_mapped(mapped->disk, off, &mapped->start);
	mapped->end = mapped->start;
	if (!ret && mapped->start < blk_caps(mapped->disk)->size)
		ret = blk_seek_unmapped(mapped->disk, mapped->start, &mapped->end);
	return ret;
}
