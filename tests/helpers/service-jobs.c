/*
 * What the keeper asks of systemd, answered out of a file: service-jobs FOLDER
 *
 * Listens where systemd does, /run/systemd/private, so it is for guests only. FOLDER/job has the type of the job that is under way
 * for whatever unit is asked for; no file, no job. As many descriptors are in the store as anybody may expect.
 */
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <systemd/sd-bus.h>
#include <systemd/sd-id128.h>

static const char *folder;

static void read_job(char job[32])
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/job", folder);
	FILE *file = fopen(path, "re");

	if (!file || fscanf(file, "%31s", job) != 1)
		*job = '\0';
	if (file)
		fclose(file);
}

static int answer(sd_bus_message *call, void *userdata, sd_bus_error *error)
{
	const char *interface = NULL, *property = NULL;
	char job[32];

	read_job(job);
	if (sd_bus_message_is_method_call(call, NULL, "GetUnitByPID"))
		return sd_bus_reply_method_return(call, "o", "/unit");
	if (!sd_bus_message_is_method_call(call, "org.freedesktop.DBus.Properties", "Get") ||
		sd_bus_message_read(call, "ss", &interface, &property) < 0)
		return 0;
	if (!strcmp(property, "Job"))
		return sd_bus_reply_method_return(call, "v", "(uo)", *job != 0, "/job");
	if (!strcmp(property, "JobType"))
		return sd_bus_reply_method_return(call, "v", "s", job);
	if (!strcmp(property, "NFileDescriptorStore"))
		return sd_bus_reply_method_return(call, "v", "u", UINT32_MAX);
	return 0;
}

static void serve(int fd)
{
	sd_bus *bus = NULL;
	int ret = sd_bus_new(&bus);

	if (ret >= 0)
		ret = sd_bus_set_fd(bus, fd, fd);
	if (ret >= 0)
		ret = sd_bus_set_server(
			bus, 1, SD_ID128_MAKE(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
	if (ret >= 0)
		ret = sd_bus_add_filter(bus, NULL, answer, NULL);
	if (ret >= 0)
		ret = sd_bus_start(bus);
	while (ret >= 0) {
		ret = sd_bus_process(bus, NULL);
		if (!ret)
			ret = sd_bus_wait(bus, UINT64_MAX);
	}
	sd_bus_unref(bus);
}

int main(int argc, char **argv)
{
	const struct sockaddr_un address = { AF_UNIX, "/run/systemd/private" };
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (argc != 2)
		errx(2, "usage: service-jobs FOLDER");
	folder = argv[1];
	mkdir("/run/systemd", 0755);
	if (bind(listener, (const struct sockaddr *)&address, sizeof(address)) ||
		listen(listener, 8))
		err(1, "%s", address.sun_path);
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0)
			serve(fd);
	}
}
