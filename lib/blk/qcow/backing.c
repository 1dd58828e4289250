/*
 * The files an image refers to: its backing and its external data file.
 *
 * A name inside an image is somebody else's text. It is opened only when the config gives the stack to use
 * (`backing`, `data-file`), or lists folders that such names may lead to (`allow-backing`). Then the name is taken
 * relative to the image's folder and resolved beneath an allowed one by the kernel (openat2 with
 * RESOLVE_BENEATH: no "..", no symbolic link leads out), must be a regular file or block device, and has
 * the format the image states; nothing is ever probed. A chain of images is followed as far as backing-depth
 * allows, which also ends one that leads back to itself.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "base/cleanup.h"
#include "blk/qcow/qcow.h"

/* --- resolving a name ------------------------------------------------------------------------- */

struct resolve_job {
	const struct conf *allowed;
	const char *name;    /* as the image has it */
	const char *folder;  /* of the image, NULL when it has none */
	char path[PATH_MAX]; /* the answer */
	int result;
};

/* The image's name for the file as an absolute path without "." and "..", not yet trusted. */
static int absolute_name(const struct resolve_job *job, char path[PATH_MAX])
{
	char joined[PATH_MAX];
	size_t used = 0;

	if (job->name[0] != '/' && !job->folder)
		return -EINVAL;
	int len = job->name[0] == '/'
			  ? snprintf(joined, sizeof(joined), "%s", job->name)
			  : snprintf(joined, sizeof(joined), "%s/%s", job->folder, job->name);
	if (len < 0 || (size_t)len >= sizeof(joined))
		return -ENAMETOOLONG;
	path[0] = '\0';
	for (char *save, *part = strtok_r(joined, "/", &save); part;
		part = strtok_r(NULL, "/", &save)) {
		if (!strcmp(part, "."))
			continue;
		if (!strcmp(part, "..")) {
			while (used && path[--used] != '/')
				;
			path[used] = '\0';
			continue;
		}
		used += (size_t)snprintf(path + used, PATH_MAX - used, "/%s", part);
	}
	return 0;
}

/* The part of path below folder, or NULL when it is not below it. */
static const char *below_folder(const char *path, const char *folder)
{
	size_t len = strlen(folder);

	while (len > 1 && folder[len - 1] == '/')
		len--;
	if (strncmp(path, folder, len) || (len > 1 && path[len] != '/'))
		return NULL;
	while (path[len] == '/')
		len++;
	return path + len;
}

static int open_beneath(const char *folder, const char *rest)
{
	struct open_how how = { .flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS };
	CLEANUP(fd) int folder_fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (folder_fd < 0)
		return -errno;
	int fd = (int)syscall(SYS_openat2, folder_fd, rest, &how, sizeof(how));
	return fd < 0 ? -errno : fd;
}

static int resolve_in(struct resolve_job *job, const char *folder, const char *rest)
{
	char link[64];
	struct stat st;
	CLEANUP(fd) int fd = open_beneath(folder, rest);

	if (fd < 0)
		return fd;
	if (fstat(fd, &st))
		return -errno;
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return -EINVAL;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t len = readlink(link, job->path, sizeof(job->path) - 1);
	if (len < 0)
		return -errno;
	job->path[len] = '\0';
	return 0;
}

static void resolve_run(void *arg)
{
	struct resolve_job *job = arg;
	char path[PATH_MAX];

	job->result = absolute_name(job, path);
	if (job->result)
		return;
	job->result = -EACCES;
	for (size_t i = 0; i < conf_strings_count(job->allowed); i++) {
		CLEANUP(free) char *folder = realpath(conf_strings_get(job->allowed, i), NULL);
		const char *rest = folder ? below_folder(path, folder) : NULL;

		if (!rest || !*rest)
			continue;
		job->result = resolve_in(job, folder, rest);
		if (!job->result)
			return;
	}
}

suspends int qcow_resolve(
	const struct conf *allowed, const char *folder, const char *name, char **path)
{
	struct resolve_job job = { .allowed = allowed, .name = name, .folder = folder };

	co_offload(resolve_run, &job);
	*path = job.result ? NULL : strdup(job.path);
	return job.result ? job.result : *path ? 0 : -ENOMEM;
}

/* --- building the stack ----------------------------------------------------------------------- */

/* The folder of the image itself: that of the file layer's path, when the stack says so. */
static char *image_folder(const struct qcow *q)
{
	const struct blk *leaf = &q->blk;

	while (leaf->below)
		leaf = leaf->below;
	const struct conf *path = leaf->conf ? conf_get(leaf->conf, "path") : NULL;
	if (!path || path->type != CONF_STRING)
		return NULL;
	char *real = realpath(path->string, NULL), *slash = real ? strrchr(real, '/') : NULL;
	if (slash)
		slash[slash == real] = '\0';
	return real;
}

/* A stack for the file at path in the given format, which may refer on to further allowed files. */
static struct conf *stack_for(const struct qcow *q, const char *path, bool is_qcow)
{
	struct conf *list = conf_new(CONF_LIST, NULL, NULL), *group, *allowed;

	if (is_qcow) {
		group = conf_add(list, conf_new(CONF_GROUP, NULL, NULL));
		conf_add(group, conf_new_string("layer", NULL, "qcow"));
		conf_add(group, conf_new_int("backing-depth", NULL, q->opt_backing_depth - 1));
		allowed = conf_add(group, conf_new(CONF_LIST, "allow-backing", NULL));
		for (size_t i = 0; i < conf_strings_count(q->allow_backing_conf); i++)
			conf_add(allowed, conf_new_string(NULL, NULL,
						  conf_strings_get(q->allow_backing_conf, i)));
	}
	group = conf_add(list, conf_new(CONF_GROUP, NULL, NULL));
	conf_add(group, conf_new_string("layer", NULL, "file"));
	conf_add(group, conf_new_string("path", NULL, path));
	return list;
}

static suspends int open_named(struct qcow *q, const char *what, const char *option,
	const char *name, const char *format, bool read_only, struct blk **child, struct err *err)
{
	CLEANUP(free) char *folder = image_folder(q);
	CLEANUP(free) char *path = NULL; /* a chain of images nests these calls: nothing large */

	if (!conf_strings_count(q->allow_backing_conf))
		return q->blk.env->command_line
			       ? err_set(err, EACCES,
					 "the image wants \"%s\" as its %s: allow its folder with "
					 "--allow-backing",
					 name, what)
			       : err_set(err, EACCES,
					 "the image wants \"%s\" as its %s: name the stack to use "
					 "in "
					 "%s = ( ... ), or its folder in allow-backing = [ "
					 "\"/folder/\" ]",
					 name, what, option);
	if (!q->opt_backing_depth)
		return err_set(err, ELOOP,
			"the chain of backing files is too deep, or leads back to itself: "
			"backing-depth "
			"says how deep it may be");
	if (!format)
		return q->blk.env->command_line
			       ? err_set(err, EINVAL,
					 "the image does not state the format of its %s \"%s\": "
					 "write it "
					 "there with qemu-img rebase -u -b NAME -F FORMAT",
					 what, name)
			       : err_set(err, EINVAL,
					 "the image does not state the format of its %s \"%s\": "
					 "name the "
					 "stack to use in %s = ( ... )",
					 what, name, option);
	if (strcmp(format, "raw") && strcmp(format, "qcow2"))
		return err_set(err, ENOTSUP,
			"the %s \"%s\" has the format \"%s\": raw and qcow2 can be opened", what,
			name, format);
	int ret = qcow_resolve(q->allow_backing_conf, folder, name, &path);
	if (ret == -EACCES)
		return err_set(err, EACCES,
			"the image wants \"%s\" as its %s, which is not in a folder that "
			"allow-backing lists",
			name, what);
	if (ret)
		return err_sys(err, -ret, "cannot open the %s \"%s\" of the image", what, name);
	struct conf *list = stack_for(q, path, !strcmp(format, "qcow2"));
	if (!q->blk.own_conf)
		q->blk.own_conf = conf_new(CONF_LIST, NULL, NULL);
	conf_add(q->blk.own_conf, list);
	ret = blk_open_child(&q->blk, list, read_only, child, err);
	if (ret == -ELOOP)
		return ret; /* all names on the way would leave no room for what is wrong */
	return ret ? err_wrap(err, "%s \"%s\"", what, path) : 0;
}

suspends int qcow_open_backing(struct qcow *q, struct err *err)
{
	const char *name = q->header.backing_name;

	if (!name) {
		if (q->backing_conf)
			return err_set(err, EINVAL, "backing is given, but the image has none");
		return 0;
	}
	if (q->backing_conf) {
		int ret = blk_open_child(&q->blk, q->backing_conf, true, &q->backing, err);

		return ret ? err_wrap(err, "backing") : 0;
	}
	return open_named(q, "backing file", "backing", name, q->header.backing_format, true,
		&q->backing, err);
}

suspends int qcow_open_data_file(struct qcow *q, struct err *err)
{
	q->data = q->blk.below;
	q->data_file = q->header.incompatible & QCOW_INCOMPAT_DATA_FILE;
	q->raw_data_file = q->data_file && q->header.autoclear & QCOW_AUTOCLEAR_RAW_DATA_FILE;
	if (!q->data_file) {
		if (q->data_file_conf)
			return err_set(err, EINVAL, "data-file is given, but the image has none");
		return 0;
	}
	if (q->data_file_conf) {
		int ret = blk_open_child(&q->blk, q->data_file_conf, q->read_only, &q->data, err);

		return ret ? err_wrap(err, "data-file") : 0;
	}
	if (!q->header.data_file_name)
		return err_set(err, EINVAL,
			"the image keeps its data in another file but does not name it: name the "
			"stack "
			"to use in data-file = ( ... )");
	return open_named(q, "data file", "data-file", q->header.data_file_name, "raw",
		q->read_only, &q->data, err);
}
