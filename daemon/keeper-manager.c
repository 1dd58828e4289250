/*
 * The service manager: what it shows of us, and what it is about to do with us, asked when it says SIGTERM.
 *
 * systemd says the same for a stop and for a restart, and only its job knows which it is. It answers on a socket of
 * its own, which root may use, or else on the system's bus. In doubt it is a stop: then everything is flushed and given
 * back, which is never wrong.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <systemd/sd-bus.h>
#include <systemd/sd-daemon.h>

#include "base/log.h"
#include "daemon/keeper_private.h"

#define MANAGER    "org.freedesktop.systemd1"
#define SOCKET     "unix:path=/run/systemd/private"
#define TIMEOUT_US UINT64_C(3000000) /* for an answer, and for what was sent to have been read */

static sd_bus *open_bus(void)
{
	sd_bus *bus = NULL;

	if (sd_bus_new(&bus) < 0)
		return NULL;
	if (sd_bus_set_address(bus, SOCKET) >= 0 && sd_bus_start(bus) >= 0)
		return bus;
	sd_bus_unref(bus);
	return sd_bus_open_system(&bus) < 0 ? NULL : bus;
}

/* The object path of our unit; the caller's. NULL. */
static char *find_unit(sd_bus *bus)
{
	sd_bus_message *reply = NULL;
	const char *path = NULL;
	char *unit = NULL;

	if (sd_bus_call_method(bus, MANAGER, "/org/freedesktop/systemd1", MANAGER ".Manager",
		    "GetUnitByPID", NULL, &reply, "u", (uint32_t)getpid()) >= 0 &&
		sd_bus_message_read(reply, "o", &path) > 0)
		unit = strdup(path);
	sd_bus_message_unref(reply);
	return unit;
}

/* Whether a job of this type is under way for the unit. */
static bool has_job(sd_bus *bus, const char *unit, const char *type)
{
	sd_bus_message *reply = NULL;
	const char *path = NULL;
	uint32_t id = 0;
	char *text = NULL;

	if (sd_bus_get_property(bus, MANAGER, unit, MANAGER ".Unit", "Job", NULL, &reply, "(uo)") >=
			0 &&
		sd_bus_message_read(reply, "(uo)", &id, &path) > 0 && id)
		sd_bus_get_property_string(
			bus, MANAGER, path, MANAGER ".Job", "JobType", NULL, &text);
	bool has = text && !strcmp(text, type);
	free(text);
	sd_bus_message_unref(reply);
	return has;
}

/* How many descriptors its store has. */
static unsigned stored_count(sd_bus *bus, const char *unit)
{
	uint32_t count = 0;

	sd_bus_get_property_trivial(
		bus, MANAGER, unit, MANAGER ".Service", "NFileDescriptorStore", NULL, 'u', &count);
	return count;
}

bool manager_restarts(unsigned fd_count)
{
	bool restarts = false;

	if (!getenv("NOTIFY_SOCKET"))
		return false;
	/* What was put into the store is there when it is counted. */
	sd_notify_barrier(0, TIMEOUT_US);
	sd_bus *bus = open_bus();
	if (!bus) {
		log_warning("keeper: cannot ask the service manager whether this is a restart: "
			    "taking it for a stop");
		return false;
	}
	sd_bus_set_method_call_timeout(bus, TIMEOUT_US);
	char *unit = find_unit(bus);
	if (unit && has_job(bus, unit, "restart")) {
		unsigned stored = stored_count(bus, unit);

		restarts = stored >= fd_count;
		if (!restarts)
			log_error(
				"keeper: the service manager keeps only %u of %u descriptors "
				"(FileDescriptorStoreMax): devices and sockets are given back, not "
				"kept over the restart",
				stored, fd_count);
	}
	free(unit);
	sd_bus_flush_close_unref(bus);
	return restarts;
}

void manager_status(const char *text)
{
	char line[KEEPER_TEXT_LEN];
	size_t len = 0;

	/* What the server says is no word of ours. */
	for (; *text && len + 1 < sizeof(line); text++)
		line[len++] = (unsigned char)*text < ' ' ? ' ' : *text;
	line[len] = '\0';
	sd_notifyf(0, "STATUS=%s", line);
}
