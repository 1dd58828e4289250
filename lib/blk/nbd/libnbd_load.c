/*
 * Loading libnbd; see libnbd_load.h.
 *
 * The table is filled once, under a mutex, and never changes again. The library stays loaded.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>

#define LIBNBD_NAMES_ONLY
#include "blk/nbd/libnbd_load.h"

#include "base/util.h"

#define LIBNBD_FILE "libnbd.so.0"

struct libnbd_calls libnbd_calls;

#define LIBNBD_SYMBOL(name) { #name, offsetof(struct libnbd_calls, name) },
static const struct {
	const char *name;
	size_t member;
} symbols[] = { LIBNBD_CALLS(LIBNBD_SYMBOL) };

static int load(struct err *err)
{
	void *library = dlopen(LIBNBD_FILE, RTLD_NOW | RTLD_LOCAL);

	if (!library)
		return err_set(
			err, ENOENT, "the nbd layer needs libnbd (package libnbd0): %s", dlerror());
	for (size_t i = 0; i < ARRAY_LEN(symbols); i++) {
		void *symbol = dlsym(library, symbols[i].name);

		if (!symbol) {
			dlclose(library);
			return err_set(err, ENOSYS, "%s is too old: it has no %s", LIBNBD_FILE,
				symbols[i].name);
		}
		*(void **)((char *)&libnbd_calls + symbols[i].member) = symbol;
	}
	return 0;
}

int libnbd_load(struct err *err)
{
	static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	static bool loaded;
	int ret = 0;

	pthread_mutex_lock(&mutex);
	if (!loaded) {
		ret = load(err);
		loaded = !ret;
	}
	pthread_mutex_unlock(&mutex);
	return ret;
}
