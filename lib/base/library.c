/*
 * Loading shared libraries; see library.h.
 *
 * A table is filled once, whole or not at all, under the library's mutex, and never changes again.
 */
#include "base/library.h"

#include <dlfcn.h>
#include <errno.h>

static int load(struct library *library, struct err *err)
{
	void *handle = dlopen(library->file, RTLD_NOW | RTLD_LOCAL);

	if (!handle)
		return err_set(err, ENOENT, "%s: %s", library->need, dlerror());
	for (size_t i = 0; i < library->count; i++) {
		library->table[i] = dlsym(handle, library->names[i]);
		if (!library->table[i]) {
			dlclose(handle);
			return err_set(err, ENOSYS, "%s: %s is too old: it has no %s",
				library->need, library->file, library->names[i]);
		}
	}
	return 0;
}

int library_load(struct library *library, struct err *err)
{
	int ret = 0;

	pthread_mutex_lock(&library->mutex);
	if (!library->loaded) {
		ret = load(library, err);
		library->loaded = !ret;
	}
	pthread_mutex_unlock(&library->mutex);
	return ret;
}
