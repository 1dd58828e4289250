/*
 * Loading GnuTLS; see gnutls_load.h, and base/library.h for how.
 */
#define GNUTLS_NAMES_ONLY
#include "rt/gnutls_load.h"

#include "base/library.h"

struct gnutls_calls gnutls_calls;

static const char *const names[] = { GNUTLS_CALLS(LIBRARY_NAME) };

int gnutls_load(struct err *err)
{
	static struct library gnutls = LIBRARY(
		"libgnutls.so.30", "TLS needs GnuTLS (package libgnutls30)", names, &gnutls_calls);

	return library_load(&gnutls, err);
}
