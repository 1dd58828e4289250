/*
 * From root to an ordinary user, for good.
 */
#pragma once

#include <sys/types.h>

#include "base/err.h"

/*
 * The process becomes that user, with that group and the user's other groups; it keeps no capability and can
 * get none again. As much memory as there is may be locked before. While there is one thread. An error leaves the
 * process somewhere between, and must end it.
 */
int privileges_drop(uid_t uid, gid_t gid, struct err *err);
