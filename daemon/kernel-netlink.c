/*
 * Messages to the NBD driver's generic netlink family; see kernel-netlink.h.
 *
 * The family is looked up each time: the module may be loaded and unloaded, and all this is rare. Of what
 * it offers, LINK_DEAD and STATUS are not used: a connection's end shows on our own socket, and STATUS
 * calls a device connected as long as anybody has it open.
 *
 * The driver works on a message while the sender waits in sendmsg(), and no other message of any generic
 * netlink family gets through meanwhile: whoever sends one that may wait (a size) makes sure that
 * the device's requests move.
 */
#include "daemon/kernel-netlink.h"

#include <errno.h>
#include <libmnl/libmnl.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "base/util.h"

#define MESSAGE_MAX 4096 /* sixteen sockets take less than 400 */

union message {
	char bytes[MESSAGE_MAX];
	struct nlmsghdr head;
};

static struct nlmsghdr *message_init(union message *message, uint16_t family, uint8_t command)
{
	struct nlmsghdr *head = mnl_nlmsg_put_header(message->bytes);
	struct genlmsghdr *generic = mnl_nlmsg_put_extra_header(head, sizeof(*generic));

	head->nlmsg_type = family;
	head->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	head->nlmsg_seq = 1;
	generic->cmd = command;
	generic->version = family == GENL_ID_CTRL ? 2 : NBD_GENL_VERSION;
	return head;
}

/* An attribute of the answer. */
struct wanted {
	uint16_t type;
	bool found;
	uint32_t value;
};

static int take_attr(const struct nlattr *attr, void *arg)
{
	struct wanted *wanted = arg;

	if (mnl_attr_get_type(attr) == wanted->type &&
		mnl_attr_get_payload_len(attr) >= sizeof(uint16_t)) {
		wanted->value = mnl_attr_get_payload_len(attr) >= sizeof(uint32_t)
					? mnl_attr_get_u32(attr)
					: mnl_attr_get_u16(attr);
		wanted->found = true;
	}
	return MNL_CB_OK;
}

static int take_answer(const struct nlmsghdr *head, void *arg)
{
	return arg ? mnl_attr_parse(head, sizeof(struct genlmsghdr), take_attr, arg) : MNL_CB_OK;
}

/* Sends it, and reads until it is acknowledged; -errno as the kernel says. */
static int talk(const struct nlmsghdr *head, struct wanted *wanted)
{
	struct mnl_socket *sock = mnl_socket_open2(NETLINK_GENERIC, SOCK_CLOEXEC);
	union message answer;
	int ret = MNL_CB_OK;

	if (!sock)
		return -errno;
	if (mnl_socket_bind(sock, 0, MNL_SOCKET_AUTOPID) ||
		mnl_socket_sendto(sock, head, head->nlmsg_len) < 0)
		ret = MNL_CB_ERROR;
	while (ret == MNL_CB_OK) {
		ssize_t len = mnl_socket_recvfrom(sock, answer.bytes, sizeof(answer));

		ret = len < 0 ? MNL_CB_ERROR
			      : mnl_cb_run(answer.bytes, (size_t)len, head->nlmsg_seq,
					mnl_socket_get_portid(sock), take_answer, wanted);
	}
	ret = ret == MNL_CB_ERROR ? -errno : 0;
	mnl_socket_close(sock);
	return ret;
}

static int find_family(uint16_t *family, struct err *err)
{
	struct wanted id = { .type = CTRL_ATTR_FAMILY_ID };
	union message message;
	struct nlmsghdr *head = message_init(&message, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);

	mnl_attr_put_strz(head, CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME);

	int ret = talk(head, &id);

	if (ret == -ENOENT || ret == -EPROTONOSUPPORT || ret == -EAFNOSUPPORT ||
		(!ret && !id.found))
		return err_set(err, EOPNOTSUPP,
			"the kernel's NBD driver cannot be reached by netlink: it is too old "
			"(Linux 4.12), or this is a network namespace of its own");
	if (ret)
		return err_sys(err, -ret, "netlink: the NBD driver's family");
	*family = (uint16_t)id.value;
	return 0;
}

static void put_sockets(struct nlmsghdr *head, const struct kernel_netlink *message)
{
	struct nlattr *list = mnl_attr_nest_start(head, NBD_ATTR_SOCKETS);

	for (unsigned i = 0; i < message->socket_count; i++) {
		struct nlattr *item = mnl_attr_nest_start(head, NBD_SOCK_ITEM);

		mnl_attr_put_u32(head, NBD_SOCK_FD, (uint32_t)message->sockets[i]);
		mnl_attr_nest_end(head, item);
	}
	mnl_attr_nest_end(head, list);
}

static void put_number(struct nlmsghdr *head, uint16_t type, uint64_t number)
{
	if (number)
		mnl_attr_put_u64(head, type, number);
}

static int command(uint8_t command, const char *name, const struct kernel_netlink *what,
	struct wanted *wanted, struct err *err)
{
	union message message;
	uint16_t family = 0;
	int ret = find_family(&family, err);

	if (ret)
		return ret;

	struct nlmsghdr *head = message_init(&message, family, command);

	if (what->index >= 0)
		mnl_attr_put_u32(head, NBD_ATTR_INDEX, (uint32_t)what->index);
	put_number(head, NBD_ATTR_SIZE_BYTES, what->size_bytes);
	put_number(head, NBD_ATTR_BLOCK_SIZE_BYTES, what->block_size);
	if (what->timeout_s != KERNEL_NETLINK_TIMEOUT_KEEP)
		mnl_attr_put_u64(head, NBD_ATTR_TIMEOUT, what->timeout_s);
	put_number(head, NBD_ATTR_DEAD_CONN_TIMEOUT, what->dead_timeout_s);
	put_number(head, NBD_ATTR_SERVER_FLAGS, what->flags);
	if (what->identifier)
		mnl_attr_put_strz(head, NBD_ATTR_BACKEND_IDENTIFIER, what->identifier);
	if (what->socket_count)
		put_sockets(head, what);
	ret = talk(head, wanted);
	return ret ? err_sys(err, -ret, "netlink: %s", name) : 0;
}

int kernel_netlink_probe(struct err *err)
{
	uint16_t family;

	return find_family(&family, err);
}

int kernel_netlink_connect(const struct kernel_netlink *message, unsigned *index, struct err *err)
{
	struct wanted answer = { .type = NBD_ATTR_INDEX };
	int ret = command(NBD_CMD_CONNECT, "connect", message, &answer, err);

	if (!ret && !answer.found)
		return err_set(err, EPROTO, "netlink: connect: the driver names no device");
	*index = answer.value;
	return ret;
}

int kernel_netlink_reconfigure(const struct kernel_netlink *message, struct err *err)
{
	return command(NBD_CMD_RECONFIGURE, "reconfigure", message, NULL, err);
}

int kernel_netlink_disconnect(unsigned index, struct err *err)
{
	const struct kernel_netlink message = {
		.index = (int)index,
		.timeout_s = KERNEL_NETLINK_TIMEOUT_KEEP,
	};

	return command(NBD_CMD_DISCONNECT, "disconnect", &message, NULL, err);
}

/* The driver gives each socket that it takes the device's time-out, for sending; that can be seen. */
bool kernel_netlink_took(int socket)
{
	struct timeval timeout = { 0 };
	socklen_t len = sizeof(timeout);

	return !getsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, &len) &&
	       (timeout.tv_sec || timeout.tv_usec);
}

void kernel_netlink_unmark(int socket)
{
	const struct timeval none = { 0 };

	(void)setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof(none));
}
