/*
 * Files that two exports use, one of them to write: found in the config, before anything is opened.
 *
 * Paths are followed to the file they lead to (stat), so that two names of one file are seen; nothing is
 * opened. What a layer opens by another option than `path` is left to the file's lock.
 */
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "daemon/config_private.h"

struct file_use {
	char *identity;
	bool writes;
	const struct config_export *export;
	const struct conf *layer;
};

struct file_uses {
	struct file_use *list;
	size_t count;
};

/* Equal for two paths exactly if they lead to the same file, also one that does not exist yet. */
static char *file_identity(const char *path)
{
	CLEANUP(free) char *copy = strdup(path), *copy2 = strdup(path);
	struct stat st;
	char *identity;
	int len;

	if (!copy || !copy2)
		abort();
	if (!stat(path, &st)) {
		bool device = S_ISBLK(st.st_mode);
		len = asprintf(&identity, "%s %lx %lx", device ? "device" : "file",
			device ? st.st_rdev : st.st_dev, device ? 0 : st.st_ino);
	} else {
		const char *folder = dirname(copy);
		CLEANUP(free) char *real = realpath(folder, NULL);
		len = asprintf(&identity, "path %s/%s", real ? real : folder, basename(copy2));
	}
	if (len < 0)
		abort();
	return identity;
}

static int use_file(struct file_uses *uses, const struct config_export *export,
	const struct conf *layer, bool writes, struct err *err)
{
	const char *path = conf_get(layer, "path")->string;
	const struct conf *read_only = conf_get(layer, "read-only");
	struct file_use use = { file_identity(path), writes && !(read_only && read_only->boolean),
		export, layer };

	uses->list = reallocarray(uses->list, uses->count + 1, sizeof(*uses->list));
	if (!uses->list)
		abort();
	uses->list[uses->count] = use;
	for (size_t i = 0; i < uses->count; i++) {
		const struct file_use *other = &uses->list[i];
		if (strcmp(other->identity, use.identity) || !(other->writes || use.writes))
			continue;
		uses->count++;
		return conf_error(layer, err, "%s: \"%s\" is %s by export \"%s\" too (%s)",
			conf_get(layer, "layer")->string, path, other->writes ? "written" : "read",
			other->export->name, other->layer->where);
	}
	uses->count++;
	return 0;
}

/*
 * Layers with stacks of their own are walked into; an image's backing file is only read. The options are
 * known to be right.
 */
static int use_files(struct file_uses *uses, const struct config_export *export,
	const struct conf *stack, bool writes, struct err *err)
{
	int ret = 0;

	for (size_t i = 0; i < stack->item_count && !ret; i++) {
		const struct conf *layer = stack->items[i];
		if (conf_get(layer, "path"))
			ret = use_file(uses, export, layer, writes, err);
		for (size_t j = 0; j < layer->item_count && !ret; j++) {
			const struct conf *item = layer->items[j];
			bool backing = item->name && conf_name_equal(item->name, "backing");
			if (item->type == CONF_LIST)
				ret = use_files(uses, export, item, writes && !backing, err);
		}
	}
	return ret;
}

int config_check_files(struct config_export *const *exports, size_t export_count, struct err *err)
{
	struct file_uses uses = {};
	int ret = 0;

	for (size_t i = 0; i < export_count && !ret; i++) {
		const struct config_export *export = exports[i];
		ret = use_files(&uses, export, export->stack, !export->read_only, err);
	}
	for (size_t i = 0; i < uses.count; i++)
		free(uses.list[i].identity);
	free(uses.list);
	return ret;
}
