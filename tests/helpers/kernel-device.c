/*
 * The kernel door's lower half (daemon/kernel-dev.h) on a real driver, with a server of its own that can
 * misbehave as blkstackd never should:
 *
 *	kernel-device deaf	the server ignores NBD_CMD_DISC: release must end all the same
 *	kernel-device slow	release waits for a request that takes its time, and loses nothing
 *	kernel-device stuck	a request is never answered: the time-out ends the device, says why
 *	kernel-device race N	N processes claim "auto" at once: nobody gets a device twice
 *	kernel-device stalled	a size is not set while a request hangs; when it is answered, it is
 *	kernel-device reconnect	by netlink: what one connection swallowed the next one is asked again
 *	kernel-device cut_off	by netlink: its connections are gone for good, and so is the device at a word
 *
 * KERNEL_DEVICE=netlink attaches by netlink, ioctl (the default) by ioctl.
 * Run by tests/kernel/device.test as root in a guest. A failed check prints its line and exits with 1.
 */
#include "daemon/kernel-dev.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/nbd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/util.h"

#define DISK_SIZE (16U << 20)

#define CHECK(cond)                                                                              \
	do {                                                                                     \
		if (!(cond)) {                                                                   \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #cond, err.text); \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

static struct err err;

struct wire_request {
	be32 magic, type;
	uint8_t cookie[8];
	be64 off;
	be32 len;
};

struct wire_reply {
	be32 magic, error;
	uint8_t cookie[8];
};

struct server {
	int fd;
	pthread_t thread;
	bool deaf;           /* ignores NBD_CMD_DISC */
	unsigned slow_ms;    /* before each reply to a write */
	bool stuck;          /* answers no read */
	atomic_bool hold;    /* answers no read for now */
	atomic_bool swallow; /* nor ever those that are held */
	atomic_int ends;     /* calls of on_end */
	atomic_int reason;   /* of the last one */
	unsigned char *disk;
};

static bool receive(int fd, void *buf, size_t len)
{
	for (size_t done = 0; done < len;) {
		ssize_t got = read(fd, (char *)buf + done, len - done);

		if (got <= 0)
			return false;
		done += (size_t)got;
	}
	return true;
}

/* Handles one request; false when the connection is to end. */
static bool serve_one(struct server *server)
{
	struct wire_reply reply = { .magic = be32_make(NBD_REPLY_MAGIC) };
	struct wire_request request;

	if (!receive(server->fd, &request, sizeof(request)))
		return false;

	uint32_t type = be32_get(request.type) & 0xffff, len = be32_get(request.len);
	uint64_t off = be64_get(request.off);

	if (type == NBD_CMD_DISC)
		return server->deaf;
	CHECK(type == NBD_CMD_FLUSH || range_ok(off, len, DISK_SIZE));
	if (type == NBD_CMD_READ && server->stuck)
		return true;
	while (type == NBD_CMD_READ && server->hold && !server->swallow)
		poll(NULL, 0, 10);
	if (type == NBD_CMD_READ && server->swallow)
		return true;
	if (type == NBD_CMD_WRITE) {
		if (!receive(server->fd, server->disk + off, len))
			return false;
		poll(NULL, 0, (int)server->slow_ms);
	}
	memcpy(reply.cookie, request.cookie, sizeof(reply.cookie));
	if (write(server->fd, &reply, sizeof(reply)) != sizeof(reply))
		return false;
	return type != NBD_CMD_READ || write(server->fd, server->disk + off, len) == (ssize_t)len;
}

static void *serve(void *arg)
{
	struct server *server = arg;

	while (serve_one(server))
		;
	close(server->fd);
	return NULL;
}

static void on_end(void *arg, int reason)
{
	struct server *server = arg;

	server->reason = reason;
	server->ends++;
}

/* NULL when no device is free. */
static struct kernel_dev *attach(struct server *server, uint32_t timeout_s)
{
	const char *mode = getenv("KERNEL_DEVICE");
	char export[32];
	struct kernel_dev_opts opts = {
		.device = "auto",
		.export = export,
		.mode = mode && !strcmp(mode, "netlink") ? KERNEL_DEV_NETLINK : KERNEL_DEV_IOCTL,
		.dead_timeout_s = 3600,
		.size_bytes = DISK_SIZE,
		.block_size = 512,
		.connections = 1,
		.timeout_s = timeout_s,
		.flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH,
	};
	struct kernel_ends ends;
	struct kernel_dev *dev;

	snprintf(export, sizeof(export), "test-%d", (int)getpid());

	int ret = kernel_dev_claim(&opts, on_end, server, &dev, &ends, &err);

	if (ret == -EBUSY)
		return NULL;
	CHECK(!ret);
	server->fd = take_fd(&ends.server[0]);
	kernel_ends_close(&ends);
	server->disk = calloc(1, DISK_SIZE);
	CHECK(server->disk && !pthread_create(&server->thread, NULL, serve, server));
	if (!server->stuck)
		CHECK(!kernel_dev_settle(dev, &err));
	return dev;
}

/* Releases, frees, and sees that the end was told exactly once. */
static void end(struct server *server, struct kernel_dev *dev)
{
	CHECK(!kernel_dev_release(dev, false, &err));
	kernel_dev_free(dev);
	CHECK(server->ends == 1);
	CHECK(!pthread_join(server->thread, NULL));
	free(server->disk);
}

static int open_node(const struct kernel_dev *dev, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/dev/%s", kernel_dev_name(dev));
	return open(path, flags | O_CLOEXEC);
}

static void deaf(void)
{
	struct server server = { .deaf = true };
	struct kernel_dev *dev = attach(&server, 0);

	CHECK(dev);
	end(&server, dev);
	CHECK(server.reason == KERNEL_DEV_RELEASED);
}

static void slow(void)
{
	struct server server = { .slow_ms = 300 };
	struct kernel_dev *dev = attach(&server, 0);
	unsigned char block[4096];

	CHECK(dev);
	memset(block, 0xa5, sizeof(block));

	int fd = open_node(dev, O_WRONLY);

	CHECK(fd >= 0 && pwrite(fd, block, sizeof(block), 8192) == sizeof(block));
	close(fd); /* what was written is only in the kernel's cache now */
	CHECK(!kernel_dev_release(dev, false, &err));
	CHECK(!memcmp(server.disk + 8192, block, sizeof(block)));
	end(&server, dev);
}

static void stuck(void)
{
	struct server server = { .stuck = true };
	struct kernel_dev *dev = attach(&server, 1);
	unsigned char block[4096];

	CHECK(dev);

	int fd = open_node(dev, O_RDONLY);

	CHECK(fd >= 0 && pread(fd, block, sizeof(block), 0) <= 0);
	close(fd);
	while (!server.ends)
		poll(NULL, 0, 10);
	end(&server, dev);
	CHECK(server.reason == ETIMEDOUT || server.reason == EIO || server.reason == 0);
}

struct reader {
	int fd;
	pthread_t thread;
	atomic_bool done;
	ssize_t got;
	unsigned char block[4096];
};

static void *read_one(void *arg)
{
	struct reader *reader = arg;

	reader->got = pread(reader->fd, reader->block, sizeof(reader->block), 1 << 20);
	reader->done = true;
	return NULL;
}

/* Opening reads the partitions anew after a new size: that is to be answered yet. */
static void start_reading(
	struct reader *reader, const struct kernel_dev *dev, struct server *server)
{
	reader->fd = open_node(dev, O_RDONLY);
	CHECK(reader->fd >= 0);
	server->hold = true;
	CHECK(!pthread_create(&reader->thread, NULL, read_one, reader));
	poll(NULL, 0,
		300); /* long enough for the request to be on its way; it does not matter if not */
}

static void finish_reading(struct reader *reader)
{
	CHECK(!pthread_join(reader->thread, NULL));
	CHECK(reader->got == sizeof(reader->block));
	close(reader->fd);
}

static void stalled(void)
{
	struct server server = { 0 };
	struct kernel_dev *dev = attach(&server, 0);
	struct reader reader = { 0 };

	CHECK(dev);
	CHECK(!kernel_dev_resize(dev, 2 * DISK_SIZE, &err));
	CHECK(!kernel_dev_resize(dev, DISK_SIZE, &err));
	start_reading(&reader, dev, &server);
	CHECK(kernel_dev_resize(dev, 2 * DISK_SIZE, &err) == -EBUSY);
	CHECK(strstr(err.text, "not resized") && !reader.done);
	server.hold = false;
	finish_reading(&reader);
	CHECK(!kernel_dev_resize(dev, 2 * DISK_SIZE, &err));
	CHECK(!kernel_dev_resize(dev, DISK_SIZE, &err));
	end(&server, dev);
}

static void reconnect(void)
{
	struct server server = { 0 };
	struct kernel_dev *dev = attach(&server, 0);
	struct reader reader = { 0 };
	struct kernel_ends ends;

	CHECK(dev);
	memset(server.disk + (1 << 20), 0x5a, 4096);
	start_reading(&reader, dev, &server);
	CHECK(!reader.done);
	server.swallow = true;
	CHECK(!kernel_dev_reconnect(dev, &ends, &err) && ends.count == 1);
	CHECK(!pthread_join(server.thread, NULL));
	server.hold = server.swallow = false;
	server.fd = take_fd(&ends.server[0]);
	kernel_ends_close(&ends);
	CHECK(!pthread_create(&server.thread, NULL, serve, &server));
	finish_reading(&reader);
	CHECK(reader.block[0] == 0x5a && reader.block[4095] == 0x5a);
	CHECK(!server.ends);
	end(&server, dev);
}

/* What waits in the cache would wait for other connections. */
static void cut_off(void)
{
	struct server server = { 0 };
	struct kernel_dev *dev = attach(&server, 0);
	unsigned char block[4096] = { 1 };

	CHECK(dev);

	int fd = open_node(dev, O_WRONLY);

	CHECK(fd >= 0 && pwrite(fd, block, sizeof(block), 8192) == sizeof(block));
	shutdown(server.fd, SHUT_RDWR);
	CHECK(kernel_dev_release(dev, false, &err) == -EIO && strstr(err.text, "broken"));
	CHECK(!kernel_dev_release(dev, true, &err));
	close(fd);
	CHECK(kernel_dev_resize(dev, 2 * DISK_SIZE, &err) == -ENODEV);
	CHECK(kernel_dev_settle(dev, &err) == -ENODEV);
	end(&server, dev);
}

static int claim_one(unsigned index)
{
	struct server server = { 0 };
	struct kernel_dev *dev = attach(&server, 0);
	unsigned char mine[4096], read_back[4096];

	if (!dev)
		return 2;
	memset(mine, (int)index + 1, sizeof(mine));

	int fd = open_node(dev, O_RDWR | O_SYNC);

	CHECK(fd >= 0 && pwrite(fd, mine, sizeof(mine), 0) == sizeof(mine));
	sleep(1);
	CHECK(pread(fd, read_back, sizeof(mine), 0) == sizeof(mine));
	CHECK(!memcmp(mine, read_back, sizeof(mine)));
	CHECK(!memcmp(mine, server.disk, sizeof(mine)));
	close(fd);
	end(&server, dev);
	return 0;
}

static void race(unsigned process_count)
{
	unsigned got = 0, refused = 0;

	for (unsigned i = 0; i < process_count; i++)
		if (!fork())
			_exit(claim_one(i));
	for (int status; wait(&status) > 0;) {
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) != 1);
		*(WEXITSTATUS(status) ? &refused : &got) += 1;
	}
	printf("%u got a device, %u were refused\n", got, refused);
	CHECK(got >= 1 && got + refused == process_count);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "deaf"))
		deaf();
	else if (!strcmp(what, "slow"))
		slow();
	else if (!strcmp(what, "stuck"))
		stuck();
	else if (!strcmp(what, "stalled"))
		stalled();
	else if (!strcmp(what, "reconnect"))
		reconnect();
	else if (!strcmp(what, "cut_off"))
		cut_off();
	else if (!strcmp(what, "race") && argc > 2)
		race((unsigned)atoi(argv[2]));
	else
		return 2;
	return 0;
}
