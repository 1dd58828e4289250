/*
 * The configuration in force as sealed memory; see in-force.h.
 *
 * Failure modes: memory that is none, is not sealed, or longer than a config can be; a text that another version
 * wrote and this one does not read. All of them are errors, and nothing is guessed.
 */
#include "daemon/in-force.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/keeper-wire.h"

#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

/* --- writing ---------------------------------------------------------------------------------- */

static int seal(const char *text, size_t len, struct err *err)
{
	CLEANUP(fd) int fd = memfd_create("blkstack-config", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (len > KEEPER_CONFIG_MAX_BYTES)
		return err_set(err, EFBIG, "the configuration is too long to be kept");
	if (fd < 0 || write(fd, text, len) != (ssize_t)len || fchmod(fd, 0600) ||
		fcntl(fd, F_ADD_SEALS, SEALS))
		return err_sys(err, errno, "the configuration cannot be kept");
	return take_fd(&fd);
}

int in_force_settings(const struct config *config, struct err *err)
{
	CLEANUP(free) char *text = NULL;
	size_t len;
	FILE *out = open_memstream(&text, &len);

	if (!out)
		abort();
	config_write_settings(config, out);
	fclose(out);
	return seal(text, len, err);
}

int in_force_exports(const struct config_written_export *exports, size_t count, struct err *err)
{
	CLEANUP(free) char *text = NULL;
	size_t len;
	FILE *out = open_memstream(&text, &len);

	if (!out)
		abort();
	config_write_exports(exports, count, out);
	fclose(out);
	return seal(text, len, err);
}

/* --- reading ---------------------------------------------------------------------------------- */

static int append(int fd, FILE *out, struct err *err)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;

	if (seals < 0 || (seals & SEALS) != SEALS || fstat(fd, &st) ||
		st.st_size > KEEPER_CONFIG_MAX_BYTES)
		return err_set(err, EINVAL, "it is no sealed memory");

	CLEANUP(free) char *text = malloc((size_t)st.st_size + 1);
	if (!text || pread(fd, text, (size_t)st.st_size, 0) != st.st_size)
		return err_sys(err, errno, "it cannot be read");
	if (memchr(text, '\0', (size_t)st.st_size))
		return err_set(err, EINVAL, "it is no text");
	fwrite(text, 1, (size_t)st.st_size, out);
	return 0;
}

static bool is_worth_ours(const struct stat *st)
{
	return !st->st_uid || st->st_uid == geteuid();
}

int in_force_check_owner(const struct in_force *in_force, uid_t user, struct err *err)
{
	struct stat st;

	if (fstat(in_force->exports, &st))
		return err_sys(err, errno, "it cannot be looked at");
	if (!is_worth_ours(&st) && st.st_uid != user)
		return err_set(
			err, EPERM, "user %u wrote it, who is not to serve any more", st.st_uid);
	return 0;
}

int in_force_load(const struct in_force *in_force, const char *path, struct config **config,
	uid_t *owner, gid_t *group, struct err *err)
{
	CLEANUP(free) char *text = NULL;
	size_t len;
	struct stat st;
	FILE *out = open_memstream(&text, &len);

	*config = NULL;
	if (!out)
		abort();
	int ret = append(in_force->settings, out, err);
	if (!ret)
		ret = append(in_force->exports, out, err);
	fclose(out);
	if (ret)
		return ret;
	if (fstat(in_force->settings, &st))
		return err_sys(err, errno, "it cannot be looked at");
	*owner = is_worth_ours(&st) ? (uid_t)-1 : st.st_uid;
	*group = st.st_gid;
	ret = config_load_written(path, text, config, err);
	if (!ret)
		ret = in_force_check_owner(
			in_force, *owner == (uid_t)-1 ? (*config)->uid : *owner, err);
	if (ret) {
		config_free(*config);
		*config = NULL;
	}
	return ret;
}
