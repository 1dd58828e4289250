/*
 * Who may enter: rules over what the system itself says of the other end of a socket (networks of
 * TCP clients, users and groups behind unix sockets, virtual machines behind vsock).
 *
 * Without any rule everybody may who can connect. With some, a client has to match one of them: a TCP
 * client a network, a client on a unix socket a user or a group, a virtual machine its number.
 */
#pragma once

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "base/conf.h"
#include "base/err.h"

struct access_network {
	struct in6_addr address; /* IPv4 as ::ffff:a.b.c.d */
	unsigned prefix_bits;    /* of the 128 */
};

struct access_rules {
	struct access_network *networks;
	uid_t *uids;
	gid_t *gids;
	unsigned *cids;
	size_t network_count, uid_count, gid_count, cid_count;
};

/*
 * What a config says of it, as conf_strings_get() gives it; each may be NULL. Networks "10.0.0.0/8", "192.0.2.7",
 * "2001:db8::/32"; users and groups as names or numbers; CIDs of virtual machines as numbers.
 */
struct access_lists {
	const struct conf *networks, *users, *groups, *cids;
};

/* An error has its place. */
int access_parse(struct access_rules *rules, const struct access_lists *lists, struct err *err);
void access_fini(struct access_rules *rules);

/* Who is at the other end of a connected socket. */
struct access_peer {
	sa_family_t family;      /* AF_UNIX, AF_INET6 (IPv4 too), AF_VSOCK, or another */
	struct in6_addr address; /* of AF_INET6 */
	uid_t uid;               /* of AF_UNIX; (uid_t)-1 when unknown */
	gid_t *gids;             /* and all groups, owned */
	size_t gid_count;
	unsigned cid; /* of AF_VSOCK */
};

void access_peer_init(struct access_peer *peer, int fd);
void access_peer_fini(struct access_peer *peer);

bool access_allows(const struct access_rules *rules, const struct access_peer *peer);

/*
 * Whether both come from one place, as far as limits go: an IPv4 address, a /64 of IPv6 (which is what one
 * machine has at its disposal), a user, a virtual machine.
 */
bool access_same_place(const struct access_peer *a, const struct access_peer *b);

/* A user or group by name or number; false when there is none. */
bool access_find_user(const char *text, uid_t *uid);
bool access_find_group(const char *text, gid_t *gid);
