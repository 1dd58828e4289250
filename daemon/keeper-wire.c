/*
 * Messages between the keeper and the server; see keeper-wire.h.
 *
 * One message is one packet. Whatever is not exactly one (shorter, longer, cut, with descriptors cut off, a
 * text without an end) is -EPROTO. One that is empty is the end.
 */
#include "daemon/keeper-wire.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"

void keeper_fds_close(struct keeper_fds *fds)
{
	while (fds->count)
		close(fds->fd[--fds->count]);
}

union control {
	struct cmsghdr align;
	char bytes[CMSG_SPACE(sizeof(int) * KEEPER_FDS_MAX)];
};

int keeper_send(int sock, const struct keeper_message *message, const int *fds, unsigned fd_count)
{
	struct iovec iov = { (void *)message, sizeof(*message) };
	union control control = {};
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t sent;

	if (fd_count > KEEPER_FDS_MAX)
		return -EINVAL;
	if (fd_count) {
		header.msg_control = control.bytes;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
		struct cmsghdr *part = CMSG_FIRSTHDR(&header);
		part->cmsg_level = SOL_SOCKET;
		part->cmsg_type = SCM_RIGHTS;
		part->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(part), fds, sizeof(int) * fd_count);
	}
	do {
		sent = sendmsg(sock, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : 0;
}

static void take_fds(struct msghdr *header, struct keeper_fds *fds)
{
	for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
			if (fds->count < ARRAY_LEN(fds->fd))
				fds->fd[fds->count++] = fd;
			else
				close(fd);
		}
	}
}

static bool ends(const char *text, size_t len)
{
	return memchr(text, '\0', len);
}

static bool well_formed(const struct keeper_message *message)
{
	return message->word && message->word < KEEPER_WORDS &&
	       ends(message->export, sizeof(message->export)) &&
	       ends(message->device, sizeof(message->device)) &&
	       ends(message->text, sizeof(message->text)) &&
	       message->connections <= KEEPER_CONNECTIONS_MAX;
}

int keeper_receive(int sock, struct keeper_message *message, struct keeper_fds *fds)
{
	struct iovec iov = { message, sizeof(*message) };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(fds->fd))];
	} control;
	struct msghdr header = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	ssize_t got;

	fds->count = 0;
	do {
		got = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
	} while (got < 0 && errno == EINTR);
	if (got < 0)
		return errno == ECONNRESET ? 0 : -errno;
	take_fds(&header, fds);
	if (!got)
		return 0;
	bool is_one = (size_t)got == sizeof(*message) &&
		      !(header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
		      fds->count <= KEEPER_FDS_MAX && well_formed(message);
	return is_one ? 1 : -EPROTO;
}
