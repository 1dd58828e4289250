/*
 * Who may enter; see access.h.
 *
 * IPv4 addresses are kept as IPv6 ones (RFC 4291, 2.5.5.2), which is how a socket of both families shows
 * them: one comparison serves both. Groups of a peer are those it had when it connected.
 *
 * Failure modes: a peer that the system tells nothing about matches no rule.
 */
#include "daemon/access.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <linux/vm_sockets.h>

#include "base/util.h"

#define V4_PREFIX_BITS 96 /* of ::ffff:0:0/96 */
#define GROUPS_MAX     1024

/* --- rules ------------------------------------------------------------------------------------ */

static bool parse_address(const char *text, struct in6_addr *address, unsigned *base_bits)
{
	char mapped[INET6_ADDRSTRLEN + 8];
	struct in_addr v4;

	*base_bits = 0;
	if (inet_pton(AF_INET6, text, address) == 1)
		return true;
	if (inet_pton(AF_INET, text, &v4) != 1)
		return false;
	snprintf(mapped, sizeof(mapped), "::ffff:%s", text);
	*base_bits = V4_PREFIX_BITS;
	return inet_pton(AF_INET6, mapped, address) == 1;
}

/* NULL, or what is wrong with the text. */
static const char *parse_network(const char *text, struct access_network *network)
{
	char address[INET6_ADDRSTRLEN + 1];
	const char *slash = strchr(text, '/');
	size_t len = slash ? (size_t)(slash - text) : strlen(text);
	unsigned base_bits;

	if (len >= sizeof(address))
		return "is no network";
	memcpy(address, text, len);
	address[len] = '\0';
	if (!parse_address(address, &network->address, &base_bits))
		return "is no network: expected one like 10.0.0.0/8 or 2001:db8::/32";
	network->prefix_bits = 128;
	if (slash) {
		char *end;
		unsigned long bits = strtoul(slash + 1, &end, 10);

		if (!isdigit((unsigned char)slash[1]) || *end || bits > 128 - base_bits)
			return "has no such prefix length";
		network->prefix_bits = base_bits + (unsigned)bits;
	}
	for (unsigned bit = network->prefix_bits; bit < 128; bit++)
		if (network->address.s6_addr[bit / 8] & 0x80 >> bit % 8)
			return "has bits set behind its prefix";
	return NULL;
}

/* A number need not belong to a name. */
static bool parse_id(const char *text, unsigned *id)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (!isdigit((unsigned char)*text) || *end || value >= UINT32_MAX)
		return false;
	*id = (unsigned)value;
	return true;
}

bool access_find_user(const char *text, uid_t *uid)
{
	const struct passwd *entry = parse_id(text, uid) ? NULL : getpwnam(text);

	if (entry)
		*uid = entry->pw_uid;
	return entry || parse_id(text, uid);
}

bool access_find_group(const char *text, gid_t *gid)
{
	const struct group *entry = parse_id(text, gid) ? NULL : getgrnam(text);

	if (entry)
		*gid = entry->gr_gid;
	return entry || parse_id(text, gid);
}

static int item_error(
	const struct conf *list, size_t index, const char *what, const char *fault, struct err *err)
{
	const struct conf *item = list->type == CONF_LIST ? list->items[index] : list;

	return conf_error(item, err, "%s%s\"%s\" %s", what, *what ? " " : "",
		conf_strings_get(list, index), fault);
}

static void *array_for(const struct conf *strings, size_t item_bytes)
{
	void *array = calloc(conf_strings_count(strings) + 1, item_bytes);

	if (!array)
		abort();
	return array;
}

static int parse_networks(struct access_rules *rules, const struct conf *texts, struct err *err)
{
	rules->networks = array_for(texts, sizeof(*rules->networks));
	for (size_t i = 0; i < conf_strings_count(texts); i++) {
		const char *fault = parse_network(
			conf_strings_get(texts, i), &rules->networks[rules->network_count++]);
		if (fault)
			return item_error(texts, i, "", fault, err);
	}
	return 0;
}

static int parse_users(struct access_rules *rules, const struct conf *texts, struct err *err)
{
	rules->uids = array_for(texts, sizeof(*rules->uids));
	for (size_t i = 0; i < conf_strings_count(texts); i++)
		if (!access_find_user(conf_strings_get(texts, i), &rules->uids[rules->uid_count++]))
			return item_error(texts, i, "user", "is not known on this system", err);
	return 0;
}

static int parse_groups(struct access_rules *rules, const struct conf *texts, struct err *err)
{
	rules->gids = array_for(texts, sizeof(*rules->gids));
	for (size_t i = 0; i < conf_strings_count(texts); i++)
		if (!access_find_group(
			    conf_strings_get(texts, i), &rules->gids[rules->gid_count++]))
			return item_error(texts, i, "group", "is not known on this system", err);
	return 0;
}

static int parse_cids(struct access_rules *rules, const struct conf *texts, struct err *err)
{
	rules->cids = array_for(texts, sizeof(*rules->cids));
	for (size_t i = 0; i < conf_strings_count(texts); i++)
		if (!parse_id(conf_strings_get(texts, i), &rules->cids[rules->cid_count++]))
			return item_error(
				texts, i, "", "is no number of a virtual machine (CID)", err);
	return 0;
}

int access_parse(struct access_rules *rules, const struct access_lists *lists, struct err *err)
{
	*rules = (struct access_rules){};
	int ret = parse_networks(rules, lists->networks, err);

	if (!ret)
		ret = parse_users(rules, lists->users, err);
	if (!ret)
		ret = parse_groups(rules, lists->groups, err);
	if (!ret)
		ret = parse_cids(rules, lists->cids, err);
	return ret;
}

void access_fini(struct access_rules *rules)
{
	free(rules->networks);
	free(rules->uids);
	free(rules->gids);
	free(rules->cids);
	*rules = (struct access_rules){};
}

/* --- peers ------------------------------------------------------------------------------------ */

static void peer_of_unix(struct access_peer *peer, int fd)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);

	peer->uid = (uid_t)-1;
	peer->gids = calloc(GROUPS_MAX + 1, sizeof(*peer->gids));
	if (!peer->gids || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len))
		return;
	peer->uid = cred.uid;
	peer->gids[peer->gid_count++] = cred.gid;
	len = GROUPS_MAX * sizeof(*peer->gids);
	if (!getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, peer->gids + 1, &len))
		peer->gid_count += len / sizeof(*peer->gids);
}

void access_peer_init(struct access_peer *peer, int fd)
{
	struct sockaddr_storage address = {};
	socklen_t len = sizeof(address);

	*peer = (struct access_peer){ .family = AF_UNSPEC };
	if (getpeername(fd, (struct sockaddr *)&address, &len))
		return;
	peer->family = address.ss_family;
	if (peer->family == AF_UNIX) {
		peer_of_unix(peer, fd);
	} else if (peer->family == AF_VSOCK) {
		peer->cid = ((struct sockaddr_vm *)&address)->svm_cid;
	} else if (peer->family == AF_INET6) {
		peer->address = ((struct sockaddr_in6 *)&address)->sin6_addr;
	} else if (peer->family == AF_INET) {
		peer->family = AF_INET6;
		peer->address.s6_addr[10] = peer->address.s6_addr[11] = 0xff;
		memcpy(&peer->address.s6_addr[12], &((struct sockaddr_in *)&address)->sin_addr, 4);
	}
}

void access_peer_fini(struct access_peer *peer)
{
	free(peer->gids);
	peer->gids = NULL;
}

/* --- the question ----------------------------------------------------------------------------- */

static bool in_network(const struct in6_addr *address, const struct access_network *network)
{
	unsigned bytes = network->prefix_bits / 8, bits = network->prefix_bits % 8;
	uint8_t differing = bytes < 16 ? address->s6_addr[bytes] ^ network->address.s6_addr[bytes]
				       : 0;

	return !memcmp(address, &network->address, bytes) && !(differing >> (8 - bits));
}

static bool is_user(const struct access_rules *rules, const struct access_peer *peer)
{
	for (size_t i = 0; i < rules->uid_count; i++)
		if (rules->uids[i] == peer->uid)
			return true;
	for (size_t i = 0; i < rules->gid_count; i++)
		for (size_t j = 0; j < peer->gid_count; j++)
			if (rules->gids[i] == peer->gids[j])
				return true;
	return false;
}

static bool is_in_network(const struct access_rules *rules, const struct access_peer *peer)
{
	for (size_t i = 0; i < rules->network_count; i++)
		if (in_network(&peer->address, &rules->networks[i]))
			return true;
	return false;
}

static bool is_machine(const struct access_rules *rules, const struct access_peer *peer)
{
	for (size_t i = 0; i < rules->cid_count; i++)
		if (rules->cids[i] == peer->cid)
			return true;
	return false;
}

bool access_allows(const struct access_rules *rules, const struct access_peer *peer)
{
	if (!rules->network_count && !rules->uid_count && !rules->gid_count && !rules->cid_count)
		return true;
	switch (peer->family) {
	case AF_UNIX:
		return is_user(rules, peer);
	case AF_INET6:
		return is_in_network(rules, peer);
	case AF_VSOCK:
		return is_machine(rules, peer);
	default:
		return false;
	}
}

bool access_same_place(const struct access_peer *a, const struct access_peer *b)
{
	if (a->family != b->family)
		return false;
	switch (a->family) {
	case AF_UNIX:
		return a->uid == b->uid;
	case AF_INET6:
		return !memcmp(&a->address, &b->address,
			IN6_IS_ADDR_V4MAPPED(&a->address) ? sizeof(a->address) : 8);
	case AF_VSOCK:
		return a->cid == b->cid;
	default:
		return false;
	}
}
