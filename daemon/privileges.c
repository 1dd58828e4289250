/*
 * Giving up privileges; see privileges.h.
 *
 * What stays is what descriptors that are open already allow, the exemption from memory reclaim, and locked memory.
 * Every step is checked, and in the end what the process has is looked at: a step that silently did
 * nothing must not go unnoticed.
 */
#include "daemon/privileges.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <pwd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static int set_groups(uid_t uid, gid_t gid)
{
	const struct passwd *user = getpwuid(uid);

	if (user)
		return initgroups(user->pw_name, gid);
	return setgroups(1, &gid);
}

static void forget_bounding_set(void)
{
	for (int capability = 0; !prctl(PR_CAPBSET_READ, capability, 0, 0, 0) ||
				 prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1;
		capability++)
		prctl(PR_CAPBSET_DROP, capability, 0, 0,
			0); /* needs CAP_SETPCAP; below is enough */
}

static bool has_capabilities(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};

	if (syscall(SYS_capget, &header, data))
		return true;
	for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++)
		if (data[i].effective || data[i].permitted || data[i].inheritable)
			return true;
	return false;
}

static bool is_only(uid_t uid, gid_t gid)
{
	uid_t uids[3];
	gid_t gids[3];

	if (getresuid(&uids[0], &uids[1], &uids[2]) || getresgid(&gids[0], &gids[1], &gids[2]))
		return false;
	for (int i = 0; i < 3; i++)
		if (uids[i] != uid || gids[i] != gid)
			return false;
	return true;
}

int privileges_drop(uid_t uid, gid_t gid, struct err *err)
{
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	int parent_death_signal = 0;

	prctl(PR_GET_PDEATHSIG, &parent_death_signal);
	setrlimit(RLIMIT_MEMLOCK, &unlimited); /* what matters is locked later, or said */
	forget_bounding_set();
	if (set_groups(uid, gid))
		return err_sys(err, errno, "cannot become user %u: its groups", uid);
	if (setresgid(gid, gid, gid))
		return err_sys(err, errno, "cannot become user %u: group %u", uid, gid);
	if (setresuid(uid, uid, uid))
		return err_sys(err, errno, "cannot become user %u", uid);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return err_sys(err, errno, "cannot become user %u: no_new_privs", uid);
	/* A change of user resets both; the second is for our own files in /proc. */
	prctl(PR_SET_PDEATHSIG, parent_death_signal, 0, 0, 0);
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	if (!is_only(uid, gid) || has_capabilities() || (uid && !setuid(0)))
		return err_set(err, EPERM, "cannot become user %u: privileges are left", uid);
	return 0;
}
