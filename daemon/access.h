/*
 * Who may enter: rules over what the system itself says of the other end of a socket (networks of
 * TCP clients, users and groups behind unix sockets).
 *
 * Without any rule everybody may who can connect. With some, a client has to match one of them: a TCP
 * client a network, a client on a unix socket a user or a group.
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
	size_t network_count, uid_count, gid_count;
};

/*
 * Texts as conf_strings_get() gives them: networks "10.0.0.0/8", "192.0.2.7", "2001:db8::/32"; users and
 * groups as names or numbers. An error has its place.
 */
int access_parse(struct access_rules *rules, const struct conf *networks, const struct conf *users,
	const struct conf *groups, struct err *err);
void access_fini(struct access_rules *rules);

/* Who is at the other end of a connected socket. */
struct access_peer {
	sa_family_t family;      /* AF_UNIX, AF_INET6 (IPv4 too), or another */
	struct in6_addr address; /* of AF_INET6 */
	uid_t uid;               /* of AF_UNIX; (uid_t)-1 when unknown */
	gid_t *gids;             /* and all groups, owned */
	size_t gid_count;
};

void access_peer_init(struct access_peer *peer, int fd);
void access_peer_fini(struct access_peer *peer);

bool access_allows(const struct access_rules *rules, const struct access_peer *peer);

/* A user or group by name or number; false when there is none. */
bool access_find_user(const char *text, uid_t *uid);
bool access_find_group(const char *text, gid_t *gid);
