/*
 * Accepts NBD clients and sends each on its way: nbd_client() in a coroutine of its own.
 *
 * All clients together are bounded; who comes beyond is closed at once, before a byte is exchanged.
 * TCP sockets: no delay (replies are gathered already), and keepalive, so that a client whose
 * machine died frees its place one day.
 */
#include "daemon/nbd_door.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon/listen.h"
#include "nbd/server.h"

/* A dead peer is noticed after idle + interval * count: two minutes. */
#define KEEPALIVE_IDLE_S     60
#define KEEPALIVE_INTERVAL_S 15
#define KEEPALIVE_COUNT      4

#define PEER_TEXT_LEN 96

/* At the end, for clients in their handshake to be told and to leave by themselves. */
#define HANDSHAKE_GRACE_NS (200 * NS_PER_MS)

/* A listener that knows its door. */
struct entrance {
	struct listener listener;
	struct nbd_door *door;
};

struct nbd_door {
	struct nbd_server server;
	struct entrance *entrances;
	size_t entrance_count;
	struct co_group clients;
	unsigned client_max;
	uint64_t accepted, refused;
	bool told_full; /* one warning per time of being full */
};

struct client {
	struct nbd_door *door;
	int fd;
	char peer[PEER_TEXT_LEN];
};

/* --- one client ------------------------------------------------------------------------------- */

static void describe_unix(int fd, char *text)
{
	struct ucred cred;
	socklen_t cred_len = sizeof(cred);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_len))
		snprintf(text, PEER_TEXT_LEN, "unix");
	else
		snprintf(text, PEER_TEXT_LEN, "unix: process %d, user %u", (int)cred.pid,
			(unsigned)cred.uid);
}

static void describe_peer(int fd, char *text)
{
	struct sockaddr_storage peer = {};
	socklen_t peer_len = sizeof(peer);
	char host[NI_MAXHOST] = "?", port[sizeof("65535")] = "?";

	if (getpeername(fd, (struct sockaddr *)&peer, &peer_len)) {
		snprintf(text, PEER_TEXT_LEN, "gone already");
		return;
	}
	if (peer.ss_family == AF_UNIX) {
		describe_unix(fd, text);
		return;
	}
	getnameinfo((struct sockaddr *)&peer, peer_len, host, sizeof(host), port, sizeof(port),
		NI_NUMERICHOST | NI_NUMERICSERV);
	snprintf(text, PEER_TEXT_LEN, peer.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
}

/* Fails on unix sockets, where nothing of it is needed. */
static void prepare_tcp(int fd)
{
	const int on = 1, idle_s = KEEPALIVE_IDLE_S, interval_s = KEEPALIVE_INTERVAL_S,
		  count = KEEPALIVE_COUNT;

	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)))
		return;
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
}

static suspends void client_run(void *arg)
{
	struct client *client = arg;
	struct nbd_door *door = client->door;

	log_debug("nbd: client %s connected", client->peer);
	int ret = nbd_client(&door->server, client->fd, client->peer);
	log_debug("nbd: client %s left%s%s", client->peer, ret ? ": " : "",
		ret ? strerror(-ret) : "");
	free(client);
	door->told_full = false;
	co_group_leave(&door->clients);
}

static void client_accepted(struct listener *listener, int fd)
{
	struct nbd_door *door = container_of(listener, struct entrance, listener)->door;
	struct client *client = NULL;

	if (door->clients.running < door->client_max)
		client = calloc(1, sizeof(*client));
	else if (!door->told_full)
		log_warning(
			"%s: refusing clients: %u are connected, as many as max-connections allows",
			listener->text, door->clients.running);
	if (!client) {
		door->told_full = true;
		door->refused++;
		close(fd);
		return;
	}
	client->door = door;
	client->fd = fd;
	describe_peer(fd, client->peer);
	prepare_tcp(fd);
	door->accepted++;
	co_group_enter(&door->clients);
	co_start(client_run, client);
}

/* --- the door --------------------------------------------------------------------------------- */

int nbd_door_open(struct nbd_door **opened, const struct config *config, struct err *err)
{
	struct listen_access access = { config->listen_mode, (uid_t)-1, config->listen_gid };
	struct nbd_limits limits = nbd_limits_default;
	struct nbd_door *door = calloc(1, sizeof(*door));

	*opened = NULL;
	if (door)
		door->entrances = calloc(config->listen_count + 1, sizeof(*door->entrances));
	if (!door || !door->entrances) {
		free(door);
		return err_set(err, ENOMEM, "no memory for the NBD door");
	}
	limits.handshake_ns = (uint64_t)config->handshake_timeout_s * NS_PER_SEC;
	nbd_server_init(&door->server, &limits);
	co_group_init(&door->clients);
	door->client_max = (unsigned)config->max_connections;
	for (size_t i = 0; i < config->listen_count; i++) {
		struct entrance *entrance = &door->entrances[i];
		int ret = listener_open(&entrance->listener, config->listen[i], &access, err);
		if (ret) {
			nbd_door_abandon(door);
			return ret;
		}
		entrance->door = door;
		door->entrance_count++;
	}
	*opened = door;
	return 0;
}

int nbd_door_publish(struct nbd_door *door, struct export *export, struct err *err)
{
	return nbd_publish(&door->server, &export->nbd, err);
}

int nbd_door_start(struct nbd_door *door, struct err *err)
{
	for (size_t i = 0; i < door->entrance_count; i++) {
		struct listener *listener = &door->entrances[i].listener;
		int ret = listener_start(listener, client_accepted);
		if (ret) {
			nbd_door_stop(door);
			return err_sys(err, -ret, "cannot accept clients on %s", listener->text);
		}
		log_info("NBD clients are served on %s", listener->text);
	}
	return 0;
}

void nbd_door_stop(struct nbd_door *door)
{
	for (size_t i = 0; i < door->entrance_count; i++)
		listener_stop(&door->entrances[i].listener);
	nbd_server_stop(&door->server);
}

void nbd_door_abandon(struct nbd_door *door)
{
	if (!door)
		return;
	for (size_t i = 0; i < door->entrance_count; i++)
		listener_close(&door->entrances[i].listener);
	free(door->entrances);
	free(door);
}

suspends void nbd_door_close(struct nbd_door *door)
{
	if (!door)
		return;
	nbd_server_close(&door->server, HANDSHAKE_GRACE_NS);
	co_group_wait(&door->clients);
	nbd_door_abandon(door);
}

json_t *nbd_door_status(const struct nbd_door *door)
{
	json_t *listen = json_array();

	for (size_t i = 0; i < door->entrance_count; i++)
		json_array_append_new(listen, json_string(door->entrances[i].listener.text));
	return json_pack("{s:o, s:i, s:i, s:I, s:I}", "listen", listen, "clients",
		(int)door->clients.running, "max_clients", (int)door->client_max, "accepted",
		(json_int_t)door->accepted, "refused", (json_int_t)door->refused);
}
