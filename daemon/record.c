/*
 * The files of records; see record.h.
 *
 * Written whole beside the old one, flushed, renamed, the folder flushed: after a crash there is the old one or
 * the new one. Failure: a record that cannot be written fails the change that it is to remember; one that cannot
 * be read, or makes no sense, fails the start of its export, since the config alone may name an old disk.
 */
#include "daemon/record.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/config-write.h"

#define RECORD_MAX_BYTES (1U << 20)

/* --- where ------------------------------------------------------------------------------------ */

/* The service manager names a list of folders, with colons. */
static char *state_folder(const struct config *config)
{
	const char *named = getenv("STATE_DIRECTORY");
	CLEANUP(free) char *copy = strdup(config->path);

	if (config->state)
		return strdup(config->state);
	if (named && *named)
		return strndup(named, strcspn(named, ":"));
	return copy ? strdup(dirname(copy)) : NULL;
}

char *record_path(const struct config *config, const char *export)
{
	CLEANUP(free) char *folder = state_folder(config), *copy = strdup(config->path);
	char *path;

	if (!folder || !copy ||
		asprintf(&path, "%s/%s.%s.stack", folder, basename(copy), export) < 0)
		abort();
	return path;
}

/* --- writing ---------------------------------------------------------------------------------- */

static void write_record(const char *export, const char *reason, const struct conf *instead_of,
	const struct conf *stack, FILE *out)
{
	fputs("# Written by blkstackd, which reads it when it starts; see blkstack.conf(5), "
	      "\"state\".\n"
	      "# What the export is served from since it was changed while it ran:\n",
		out);
	fputs("export = ", out);
	config_write_text(export, out);
	fputs(";\nreason = ", out);
	config_write_text(reason, out);
	fprintf(out, ";\ntime = %lld;\nstack = ", (long long)time(NULL));
	config_write_value(stack, out);
	fputs(";\n# as long as the config says:\ninstead-of = ", out);
	config_write_value(instead_of, out);
	fputs(";\n", out);
}

static int sync_folder(const char *path)
{
	CLEANUP(free) char *copy = strdup(path);
	CLEANUP(fd) int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return fd < 0 || fsync(fd) ? -errno : 0;
}

int record_write(const char *path, const char *export, const char *reason,
	const struct conf *instead_of, const struct conf *stack, struct err *err)
{
	CLEANUP(free) char *fresh = NULL;
	int ret = 0;

	if (asprintf(&fresh, "%s.new", path) < 0)
		abort();

	int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	FILE *out = fd < 0 ? NULL : fdopen(fd, "w");

	if (!out)
		return err_sys(err, errno,
			"cannot remember the change in \"%s\" (setting \"state\" names another "
			"folder)",
			fresh);
	write_record(export, reason, instead_of, stack, out);
	if (fflush(out) || fsync(fd))
		ret = -errno;
	if (fclose(out) && !ret)
		ret = -errno;
	if (!ret && rename(fresh, path))
		ret = -errno;
	if (!ret)
		ret = sync_folder(path);
	if (!ret)
		return 0;
	unlink(fresh);
	return err_sys(err, -ret, "cannot remember the change in \"%s\"", path);
}

int record_remove(const char *path, struct err *err)
{
	if (unlink(path))
		return errno == ENOENT ? 0 : err_sys(err, errno, "cannot remove \"%s\"", path);
	int ret = sync_folder(path);
	return ret ? err_sys(err, -ret, "cannot remove \"%s\" for good", path) : 0;
}

/* --- reading ---------------------------------------------------------------------------------- */

/* NULL with err filled, or without (code 0) when there is none. */
static char *slurp(const char *path, struct err *err)
{
	CLEANUP(fd) int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	struct stat st;

	err->code = 0;
	if (fd < 0 && errno == ENOENT)
		return NULL;
	if (fd < 0 || fstat(fd, &st)) {
		err_sys(err, errno, "\"%s\"", path);
		return NULL;
	}
	if (!S_ISREG(st.st_mode) || st.st_size > RECORD_MAX_BYTES) {
		err_set(err, EINVAL, "\"%s\" is no record of a change", path);
		return NULL;
	}

	char *content = calloc(1, (size_t)st.st_size + 1);

	if (!content)
		abort();
	if (read(fd, content, (size_t)st.st_size) != st.st_size) {
		err_set(err, EIO, "\"%s\" cannot be read", path);
		free(content);
		return NULL;
	}
	return content;
}

int record_read(const char *path, struct record **found, struct err *err)
{
	struct fields {
		struct record record;
		const char *export;
	} fields = {};
	static const struct opt table[] = {
		{ "export", OPT_STRING, offsetof(struct fields, export), .required = true },
		{ "reason", OPT_STRING, offsetof(struct fields, record.reason), .required = true },
		{ "time", OPT_INT, offsetof(struct fields, record.time), .required = true },
		{ "stack", OPT_LIST, offsetof(struct fields, record.stack), .required = true },
		{ "instead-of", OPT_LIST, offsetof(struct fields, record.instead_of),
			.required = true },
		{},
	};
	CLEANUP(free) char *content = slurp(path, err);
	int ret;

	*found = NULL;
	if (!content)
		return -err->code;
	ret = config_parse_snippet(path, content, &fields.record.root, err);
	if (!ret)
		ret = opts_parse(table, fields.record.root, &fields, err);
	if (!ret && (!fields.record.stack->item_count || !fields.record.instead_of->item_count))
		ret = err_set(err, EINVAL, "\"%s\": a stack is empty", path);
	if (ret) {
		conf_free(fields.record.root);
		return ret;
	}
	*found = malloc(sizeof(**found));
	if (!*found || !(fields.record.file = strdup(path)))
		abort();
	**found = fields.record;
	return 0;
}

void record_free(struct record *record)
{
	if (!record)
		return;
	conf_free(record->root);
	free(record->file);
	free(record);
}

/* --- what it means ---------------------------------------------------------------------------- */

/* What the last layer stores its bytes in. */
static bool same_disk(const struct conf *a, const struct conf *b)
{
	static const char *const keys[] = { "layer", "path", "uri", "name" };
	const struct conf *leaves[] = { a->items[a->item_count - 1], b->items[b->item_count - 1] };

	for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
		const struct conf *values[] = { conf_get(leaves[0], keys[i]),
			conf_get(leaves[1], keys[i]) };

		if (!values[0] != !values[1] || (values[0] && !conf_equal(values[0], values[1])))
			return false;
	}
	return true;
}

enum record_use record_judge(const struct record *record, const struct conf *config_stack)
{
	if (conf_equal(config_stack, record->instead_of))
		return RECORD_HOLDS;
	if (same_disk(config_stack, record->stack))
		return RECORD_IS_DONE;
	return same_disk(config_stack, record->instead_of) ? RECORD_HOLDS : RECORD_CONFLICTS;
}

static bool is_about_creation(const struct conf *group, const char *name)
{
	const struct conf *layer = conf_get(group, "layer");
	bool is_file = layer && layer->type == CONF_STRING && !strcmp(layer->string, "file");

	return is_file && (conf_name_equal(name, "create") || conf_name_equal(name, "size"));
}

struct conf *record_to_open(const struct conf *stack)
{
	struct conf *copy = conf_new(stack->type, stack->name, stack->where);

	for (size_t i = 0; i < stack->item_count; i++) {
		const struct conf *item = stack->items[i];
		bool nested = item->type == CONF_LIST || item->type == CONF_GROUP;

		if (stack->type == CONF_LIST || !is_about_creation(stack, item->name))
			conf_add(copy, nested ? record_to_open(item) : conf_copy(item));
	}
	return copy;
}
