/*
 * The service manager's store: what the keeper holds is also held there, so that the next start finds it, whether the
 * keeper was told to end (`systemctl restart`) or died.
 *
 * A device is a set of descriptors, each under a name of its own:
 *
 *	nbd0-facts	memory with a struct facts, written anew when one of them changes
 *	nbd0-journal	the servers' record of its requests
 *	nbd0-server0	the server's end of its first connection
 *	nbd0-driver0	a descriptor of the driver's end
 *
 *	config-settings-6		the configuration that the server had in force (keeper-config.c),
 *	config-exports-7-with-6		its seventh
 *
 * Only what a device by netlink consists of goes there: one by ioctl dies with the keeper. Listening sockets that the
 * server has bound are there too, by the name that it knows them by anyhow.
 *
 * A set that is not whole is not used: the manager drops a socket whose other end was closed, and another
 * version may have put them there. Then its connections are shut, and the device, which the driver still has, is
 * taken up like one whose keeper died without a store.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/keeper.h"
#include "daemon/keeper_private.h"
#include "daemon/listen.h"

#define FACTS_MAGIC 0x626c6b73
#define NAME_LEN    (KERNEL_NAME_LEN + 16)

/* What is known of a device and cannot be asked of the driver. */
struct facts {
	uint32_t magic, version; /* KEEPER_VERSION, of the message; another one is not read */
	uint32_t size_bytes;     /* of all this */
	uint32_t has_journal;
	char name[KERNEL_NAME_LEN];
	struct keeper_message message;
};

/* --- giving ----------------------------------------------------------------------------------- */

static void put(int fd, const char *name)
{
	char text[64];

	snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
	sd_pid_notify_with_fds(0, 0, text, &fd, 1);
}

static void take_out(const char *name)
{
	sd_notifyf(0, "FDSTOREREMOVE=1\nFDNAME=%s", name);
}

static void name_of(const struct held *held, const char *what, int number, char name[NAME_LEN])
{
	const char *device = kernel_dev_name(held->dev);

	if (number < 0)
		snprintf(name, NAME_LEN, "%s-%s", device, what);
	else
		snprintf(name, NAME_LEN, "%s-%s%d", device, what, number);
}

static void put_part(const struct held *held, int fd, const char *what, int number)
{
	char name[NAME_LEN];

	name_of(held, what, number, name);
	put(fd, name);
}

static int write_facts(const struct held *held)
{
	struct facts facts = {
		.magic = FACTS_MAGIC,
		.version = KEEPER_VERSION,
		.size_bytes = sizeof(facts),
		.has_journal = held->journal >= 0,
		.message = held->facts,
	};

	snprintf(facts.name, sizeof(facts.name), "%s", kernel_dev_name(held->dev));
	facts.message.connections = held->ends.count;
	return pwrite(held->stored, &facts, sizeof(facts), 0) == sizeof(facts) ? 0 : -EIO;
}

static void put_parts(const struct held *held)
{
	put_part(held, held->stored, "facts", -1);
	for (unsigned i = 0; i < held->ends.count; i++) {
		put_part(held, held->ends.server[i], "server", (int)i);
		put_part(held, held->ends.driver[i], "driver", (int)i);
	}
	if (held->journal >= 0)
		put_part(held, held->journal, "journal", -1);
}

void store_put_device(struct held *held)
{
	if (!getenv("NOTIFY_SOCKET") || kernel_dev_mode(held->dev) != KERNEL_DEV_NETLINK)
		return;
	held->stored = memfd_create("blkstack-facts", MFD_CLOEXEC);
	if (held->stored < 0 || write_facts(held)) {
		log_warning("keeper: %s is not kept over a restart: %s", kernel_dev_name(held->dev),
			strerror(errno));
		store_forget_device(held);
		return;
	}
	put_parts(held);
}

void store_put_journal(const struct held *held)
{
	store_note_device(
		held); /* before: without the one that it speaks of the set is not whole */
	if (held->stored >= 0)
		put_part(held, held->journal, "journal", -1);
}

void store_note_device(const struct held *held)
{
	if (held->stored >= 0 && write_facts(held))
		log_error("keeper: %s: what the service manager keeps of it is out of date",
			kernel_dev_name(held->dev));
}

void store_forget_device(struct held *held)
{
	char name[NAME_LEN];

	if (held->stored < 0)
		return;
	close(take_fd(&held->stored));
	name_of(held, "facts", -1, name);
	take_out(name);
	name_of(held, "journal", -1, name);
	take_out(name);
	for (unsigned i = 0; i < held->ends.count; i++) {
		name_of(held, "server", (int)i, name);
		take_out(name);
		name_of(held, "driver", (int)i, name);
		take_out(name);
	}
}

bool store_has_all(const struct keeper *keeper)
{
	bool all = true;

	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++) {
		const struct held *held = keeper->devices.slots[i];

		all = all && (!held || held->stored >= 0 || held->ended);
	}
	return all;
}

unsigned store_count(const struct keeper *keeper)
{
	unsigned count = listeners_kept_count(&keeper->listeners);

	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++) {
		const struct held *held = keeper->devices.slots[i];

		if (held && held->stored >= 0 && !held->ended)
			count += 1 + (held->journal >= 0) + 2 * held->ends.count;
	}
	return count ? count + 2 * kept_config_is_known(&keeper->config) : 0;
}

#define CONFIG   "config-"
#define SETTINGS CONFIG "settings-%lu"
#define EXPORTS  CONFIG "exports-%lu-with-%lu"

void store_put_settings(const struct kept_config *config)
{
	char name[64];

	snprintf(name, sizeof(name), SETTINGS, config->settings);
	put(config->fds[0], name);
}

void store_put_exports(const struct kept_config *config)
{
	char name[64];

	snprintf(name, sizeof(name), EXPORTS, config->exports, config->settings);
	put(config->fds[1], name);
}

void store_forget_settings(const struct kept_config *config)
{
	if (config->settings)
		sd_notifyf(0, "FDSTOREREMOVE=1\nFDNAME=" SETTINGS, config->settings);
}

void store_forget_exports(const struct kept_config *config)
{
	if (config->exports)
		sd_notifyf(
			0, "FDSTOREREMOVE=1\nFDNAME=" EXPORTS, config->exports, config->settings);
}

bool store_is_settings(const char *name, unsigned long *settings)
{
	return sscanf(name, SETTINGS, settings) == 1;
}

bool store_is_exports(const char *name, unsigned long *exports, unsigned long *settings)
{
	return sscanf(name, EXPORTS, exports, settings) == 2;
}

/* The manager drops what it has already. Listening sockets the server has kept anew. */
void store_put_again(const struct keeper *keeper)
{
	for (size_t i = 0; i < KEEPER_DEVICES_MAX; i++) {
		const struct held *held = keeper->devices.slots[i];

		if (held && held->stored >= 0)
			put_parts(held);
	}
	if (kept_config_is_known(&keeper->config)) {
		store_put_settings(&keeper->config);
		store_put_exports(&keeper->config);
	}
}

void store_put_listener(int fd)
{
	put(fd, LISTEN_KEPT);
}

void store_forget_listeners(void)
{
	take_out(LISTEN_KEPT);
}

/* --- finding ---------------------------------------------------------------------------------- */

/* A device as it comes back, piece by piece. */
struct found {
	struct found *next;
	char name[KERNEL_NAME_LEN];
	int facts, journal;
	int server[KERNEL_CONNECTIONS_MAX], driver[KERNEL_CONNECTIONS_MAX];
};

static struct found *find(struct found **all, const char *name)
{
	for (struct found *found = *all; found; found = found->next)
		if (!strcmp(found->name, name))
			return found;

	struct found *found = calloc(1, sizeof(*found));

	if (!found)
		return NULL;
	found->next = *all;
	*all = found;
	snprintf(found->name, sizeof(found->name), "%s", name);
	found->facts = found->journal = -1;
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++)
		found->server[i] = found->driver[i] = -1;
	return found;
}

/* Where a descriptor of that name belongs, or NULL. */
static int *place(struct found *found, const char *what)
{
	static const char server[] = "server", driver[] = "driver";
	const size_t len = sizeof(server) - 1;
	char *end;

	if (!strcmp(what, "facts"))
		return &found->facts;
	if (!strcmp(what, "journal"))
		return &found->journal;
	int *ends = !strncmp(what, server, len)   ? found->server
		    : !strncmp(what, driver, len) ? found->driver
						  : NULL;
	if (!ends || !what[len])
		return NULL;
	unsigned long number = strtoul(what + len, &end, 10);
	return *end || number >= KERNEL_CONNECTIONS_MAX ? NULL : &ends[number];
}

/* True: it belongs to a device. */
static bool sort_in(struct found **all, int fd, const char *name)
{
	const char *dash = strchr(name, '-');
	char device[KERNEL_NAME_LEN];

	if (!dash || strncmp(name, "nbd", 3) || dash - name >= (long)sizeof(device))
		return false;
	snprintf(device, sizeof(device), "%.*s", (int)(dash - name), name);
	struct found *found = find(all, device);
	int *fd_place = found ? place(found, dash + 1) : NULL;
	if (!fd_place || *fd_place >= 0)
		return false;
	*fd_place = fd;
	return true;
}

bool store_has_anything(void)
{
	char **names = NULL;
	int count = sd_listen_fds_with_names(0, &names);
	bool has = false;

	for (int i = 0; i < count; i++) {
		const char *dash = strrchr(names[i], '-');

		has = has || !strcmp(names[i], LISTEN_KEPT) || (dash && !strcmp(dash, "-facts"));
		free(names[i]);
	}
	free(names);
	return has;
}

/* --- taking over ------------------------------------------------------------------------------ */

static bool is_text(const char *text, size_t len)
{
	return memchr(text, '\0', len);
}

static bool read_facts(const struct found *found, struct facts *facts)
{
	const struct keeper_message *message = &facts->message;

	return found->facts >= 0 &&
	       pread(found->facts, facts, sizeof(*facts), 0) == sizeof(*facts) &&
	       facts->magic == FACTS_MAGIC && facts->version == KEEPER_VERSION &&
	       facts->size_bytes == sizeof(*facts) && is_text(facts->name, sizeof(facts->name)) &&
	       !strcmp(facts->name, found->name) &&
	       is_text(message->export, sizeof(message->export)) &&
	       is_text(message->device, sizeof(message->device)) && message->connections &&
	       message->connections <= KERNEL_CONNECTIONS_MAX;
}

static bool take_ends(struct found *found, unsigned connections, struct kernel_ends *ends)
{
	ends->count = 0;
	for (unsigned i = 0; i < connections; i++) {
		if (found->server[i] < 0 || found->driver[i] < 0)
			return false;
		ends->server[i] = take_fd(&found->server[i]);
		ends->driver[i] = take_fd(&found->driver[i]);
		ends->count++;
	}
	return true;
}

static void shut(int *fd)
{
	if (*fd < 0)
		return;
	shutdown(*fd, SHUT_RDWR);
	close(take_fd(fd));
}

/* What is left of it: the driver is to see that its connections are over. */
static void give_up(struct found *found, struct kernel_ends *ends, const char *why)
{
	log_warning("keeper: %s is not taken over as it was left: %s", found->name, why);
	for (unsigned i = 0; i < ends->count; i++)
		shut(&ends->server[i]);
	kernel_ends_close(ends);
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++)
		shut(&found->server[i]);
}

/* Nothing of it must come back once more. */
static void clear(struct found *found, unsigned connections)
{
	char name[NAME_LEN];

	for (const char *const *what = (const char *const[]){ "facts", "journal", NULL }; *what;
		what++) {
		snprintf(name, sizeof(name), "%s-%s", found->name, *what);
		take_out(name);
	}
	for (unsigned i = 0; i < connections; i++) {
		snprintf(name, sizeof(name), "%s-server%u", found->name, i);
		take_out(name);
		snprintf(name, sizeof(name), "%s-driver%u", found->name, i);
		take_out(name);
	}
}

static void found_free(struct found *found)
{
	int *fds[] = { &found->facts, &found->journal };

	for (size_t i = 0; i < ARRAY_LEN(fds); i++)
		if (*fds[i] >= 0)
			close(*fds[i]);
	for (unsigned i = 0; i < KERNEL_CONNECTIONS_MAX; i++) {
		if (found->server[i] >= 0)
			close(found->server[i]);
		if (found->driver[i] >= 0)
			close(found->driver[i]);
	}
	free(found);
}

/* Whether it is of this version, if perhaps not whole. */
static bool take_over(struct keeper *keeper, struct found *found)
{
	struct kernel_ends ends = { 0 };
	struct facts facts;
	struct err err = { 0 };
	bool known = read_facts(found, &facts);
	int ret = -EINVAL;

	if (!known)
		err_set(&err, EINVAL, "another version left it, or it is not whole");
	else if (facts.has_journal && found->journal < 0)
		err_set(&err, ENOTCONN, "its journal is not there");
	else if (!take_ends(found, facts.message.connections, &ends))
		err_set(&err, ENOTCONN, "a connection of it has ended");
	else
		ret = devices_adopt(keeper, &facts.message, found->name, &ends, found->journal,
			found->facts, &err);
	if (ret) {
		give_up(found, &ends, err.text);
		clear(found, KERNEL_CONNECTIONS_MAX);
	} else {
		found->journal = found->facts = -1;
	}
	return known;
}

/* Not the one that counts: it was replaced, or is to replace it and not whole. */
static void drop_config(const struct kept_config *config, int fd, const char *name)
{
	if (fd == config->fds[0] || fd == config->fds[1])
		return;
	take_out(name);
	close(fd);
}

void store_take_over(struct keeper *keeper)
{
	struct found *all = NULL, *found;
	char **names = NULL;
	int count = sd_listen_fds_with_names(1, &names);
	bool known = false;

	kept_config_find(&keeper->config, SD_LISTEN_FDS_START, names, count);
	for (int i = 0; i < count; i++) {
		int fd = SD_LISTEN_FDS_START + i;

		if (!strncmp(names[i], CONFIG, strlen(CONFIG)))
			drop_config(&keeper->config, fd, names[i]);
		else if (!sort_in(&all, fd, names[i]) &&
			 listeners_add(&keeper->listeners, fd, names[i]))
			close(fd);
		free(names[i]);
	}
	free(names);
	while ((found = all)) {
		all = found->next;
		known = take_over(keeper, found) || known;
		found_free(found);
	}
	if (!known)
		kept_config_drop(&keeper->config);
}
