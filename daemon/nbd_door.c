/*
 * Accepts NBD clients and sends each on its way: nbd_client() in a coroutine of its own.
 *
 * All clients together are bounded; who comes beyond, or may not come at all, is closed at once, before a
 * byte is exchanged. What a client may choose from is asked for by the handshake (may_enter()): the exports
 * that its listener serves and that are there for somebody like it, by the config of that moment.
 *
 * A reload opens new sockets and reads certificates while the old ones serve, and changes over only when nothing
 * can fail any more. A listener whose address stays keeps its socket; who is inside stays, whatever changed.
 *
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

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "daemon/access.h"
#include "daemon/listen.h"
#include "nbd/server.h"
#include "rt/tls.h"

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
	const struct config_listen *config; /* exchanged by a reload; NULL: closed by one */
	struct tls_server *tls;             /* for new clients; NULL: none */
	struct nbd_door *door;
	unsigned client_count; /* who came in here; the entrance outlives them */
};

struct nbd_door {
	struct nbd_server server;
	struct entrance **entrances;
	size_t entrance_count;
	struct co_group clients;
	unsigned client_max;
	uint64_t accepted, refused; /* accepted: also the id of the last client */
	bool told_full;             /* one warning per time of being full */
};

struct client {
	struct entrance *entrance;
	int fd;
	char text[PEER_TEXT_LEN];
	struct access_peer peer;
	struct nbd_visitor visitor;
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

static bool may_enter(const struct nbd_visitor *visitor, const struct nbd_export *nbd)
{
	const struct client *client = container_of(visitor, struct client, visitor);
	const struct config_export *export = container_of(nbd, struct export, nbd)->config;
	const struct config_listen *config = client->entrance->config;
	const struct conf *names = config ? config->exports : NULL;
	bool served = config && !names;

	for (size_t i = 0; i < conf_strings_count(names); i++)
		served = served || !strcmp(conf_strings_get(names, i), export->name);
	return served && access_allows(&export->access, &client->peer);
}

/* A closed one, when its last client has left. */
static void entrance_free_unused(struct entrance *entrance)
{
	if (entrance->config || entrance->client_count)
		return;
	tls_server_free(entrance->tls);
	free(entrance);
}

static void client_free(struct client *client)
{
	struct entrance *entrance = client->entrance;

	tls_server_free(client->visitor.tls_server);
	access_peer_fini(&client->peer);
	free(client);
	entrance->client_count--;
	entrance_free_unused(entrance);
}

static suspends void client_run(void *arg)
{
	struct client *client = arg;
	struct nbd_door *door = client->entrance->door;

	log_debug("nbd: client %s connected", client->text);
	int ret = nbd_client(&door->server, client->fd, &client->visitor);
	log_debug("nbd: client %s left%s%s", client->text, ret ? ": " : "",
		ret ? strerror(-ret) : "");
	client_free(client);
	door->told_full = false;
	co_group_leave(&door->clients);
}

static struct client *client_create(struct entrance *entrance, int fd)
{
	struct client *client = calloc(1, sizeof(*client));

	if (!client)
		return NULL;
	client->entrance = entrance;
	entrance->client_count++;
	client->fd = fd;
	describe_peer(fd, client->text);
	access_peer_init(&client->peer, fd);
	client->visitor = (struct nbd_visitor){
		.peer = client->text,
		.tls = entrance->config->tls,
		.tls_server = entrance->tls ? tls_server_get(entrance->tls) : NULL,
		.read_only = entrance->config->read_only,
		.may_enter = may_enter,
	};
	return client;
}

/* Whether there is room for one more. */
static bool has_room(struct nbd_door *door, const struct listener *listener)
{
	if (door->clients.running < door->client_max)
		return true;
	if (!door->told_full)
		log_warning(
			"%s: refusing clients: %u are connected, as many as max-connections allows",
			listener->text, door->clients.running);
	door->told_full = true;
	return false;
}

static void client_accepted(struct listener *listener, int fd)
{
	struct entrance *entrance = container_of(listener, struct entrance, listener);
	struct nbd_door *door = entrance->door;
	struct client *client = has_room(door, listener) ? client_create(entrance, fd) : NULL;

	if (client && !access_allows(&entrance->config->access, &client->peer)) {
		log_debug("nbd: %s may not connect to %s", client->text, listener->text);
		client_free(client);
		client = NULL;
	}
	if (!client) {
		door->refused++;
		close(fd);
		return;
	}
	prepare_tcp(fd);
	client->visitor.id = ++door->accepted;
	co_group_enter(&door->clients);
	co_start(client_run, client);
}

/* --- the door --------------------------------------------------------------------------------- */

static int create_tls(
	struct entrance *entrance, const struct config_listen *config, struct err *err)
{
	struct tls_options options = {
		.certificates = config->tls_certificates,
		.psk = config->tls_psk,
		.verify_clients = config->tls_verify_clients,
		.subject_count = conf_strings_count(config->tls_allow),
		.priority = config->tls_priority,
	};
	CLEANUP(free)
	const char **subjects = calloc(options.subject_count + 1, sizeof(*subjects));

	if (!subjects)
		return err_set(err, ENOMEM, "no memory for the NBD door");
	for (size_t i = 0; i < options.subject_count; i++)
		subjects[i] = conf_strings_get(config->tls_allow, i);
	options.subjects = subjects;
	return tls_server_create(&entrance->tls, &options, err);
}

/* Plain code, may block. bind: not only what TLS needs, the socket too. */
static int entrance_open(struct entrance *entrance, bool bind, struct err *err)
{
	const struct config_listen *config = entrance->config;
	struct listen_access access = { config->mode, config->uid, config->gid };
	int ret = 0;

	if (config->tls != NBD_TLS_OFF)
		ret = create_tls(entrance, config, err);
	if (!ret && bind)
		ret = listener_open(&entrance->listener, config->address, &access, err);
	if (ret && config->conf)
		err_place(err, config->conf->where);
	return ret;
}

static void entrances_free(struct entrance **entrances, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		listener_close(&entrances[i]->listener);
		tls_server_free(entrances[i]->tls);
		free(entrances[i]);
	}
	free(entrances);
}

/* One for each of config->listen; those that the door has by that address are not opened a second time. */
struct nbd_door_change {
	struct nbd_door *door;
	const struct config *config;
	struct entrance **entrances;
	size_t entrance_count;
	struct err *err;
	int ret;
};

/* The door's entrance of that address, or NULL. */
static struct entrance *find_entrance(const struct nbd_door *door, const char *address)
{
	for (size_t i = 0; i < door->entrance_count; i++)
		if (listener_same_address(door->entrances[i]->config->address, address))
			return door->entrances[i];
	return NULL;
}

/* Plain code, may block. */
static int open_entrances(struct nbd_door_change *change, struct err *err)
{
	const struct config *config = change->config;
	int ret = 0;

	change->entrances = calloc(config->listen_count + 1, sizeof(*change->entrances));
	if (!change->entrances)
		return err_set(err, ENOMEM, "no memory for the NBD door");
	for (size_t i = 0; i < config->listen_count && !ret; i++) {
		struct entrance *entrance = calloc(1, sizeof(*entrance));

		if (!entrance)
			return err_set(err, ENOMEM, "no memory for the NBD door");
		entrance->listener.fd = -1;
		entrance->config = &config->listen[i];
		entrance->door = change->door;
		change->entrances[change->entrance_count++] = entrance;
		ret = entrance_open(
			entrance, !find_entrance(change->door, entrance->config->address), err);
	}
	return ret;
}

static void set_limits(struct nbd_door *door, const struct config *config)
{
	struct nbd_limits limits = nbd_limits_default;

	limits.handshake_ns = (uint64_t)config->handshake_timeout_s * NS_PER_SEC;
	limits.handshake_options = (unsigned)config->limits.handshake_options;
	limits.idle_ns = (uint64_t)config->limits.idle_timeout_s * NS_PER_SEC;
	limits.requests = (unsigned)config->limits.requests;
	limits.buffer_bytes = config->limits.buffer_bytes;
	limits.export_requests = (unsigned)config->limits.export_requests;
	limits.export_buffer_bytes = config->limits.export_buffer_bytes;
	nbd_server_set_limits(&door->server, &limits);
	door->client_max = (unsigned)config->max_connections;
}

int nbd_door_open(struct nbd_door **opened, const struct config *config, struct err *err)
{
	struct nbd_door *door = calloc(1, sizeof(*door));
	struct nbd_door_change change = { .door = door, .config = config };

	*opened = NULL;
	if (!door)
		return err_set(err, ENOMEM, "no memory for the NBD door");
	nbd_server_init(&door->server, &nbd_limits_default);
	set_limits(door, config);
	co_group_init(&door->clients);
	int ret = open_entrances(&change, err);
	door->entrances = change.entrances;
	door->entrance_count = change.entrance_count;
	if (ret)
		nbd_door_abandon(door);
	else
		*opened = door;
	return ret;
}

/* --- a reload --------------------------------------------------------------------------------- */

static void prepare_offloaded(void *arg)
{
	struct nbd_door_change *change = arg;

	change->ret = open_entrances(change, change->err);
}

suspends int nbd_door_prepare(struct nbd_door *door, const struct config *config,
	struct nbd_door_change **prepared, struct err *err)
{
	struct nbd_door_change *change = calloc(1, sizeof(*change));

	*prepared = NULL;
	if (!change)
		return err_set(err, ENOMEM, "no memory for the NBD door");
	*change = (struct nbd_door_change){ .door = door, .config = config, .err = err };
	co_offload(prepare_offloaded, change);
	int ret = change->ret;
	if (ret)
		nbd_door_discard(change);
	else
		*prepared = change;
	return ret;
}

void nbd_door_discard(struct nbd_door_change *change)
{
	if (!change)
		return;
	entrances_free(change->entrances, change->entrance_count);
	free(change);
}

/* What changed takes the place of what was; the socket and its clients stay. */
static void renew(struct entrance *entrance, struct entrance *new)
{
	const struct config_listen *config = new->config;
	struct listen_access access = { config->mode, config->uid, config->gid };
	struct err err;

	if (listener_set_access(&entrance->listener, &access, &err))
		log_error("%s", err.text);
	tls_server_free(entrance->tls);
	entrance->tls = new->tls;
	entrance->config = config;
	free(new);
}

static void start_entrance(struct entrance *entrance)
{
	int ret = listener_start(&entrance->listener, client_accepted);

	if (ret)
		log_error(
			"cannot accept clients on %s: %s", entrance->listener.text, strerror(-ret));
	else
		log_info("NBD clients are served on %s%s", entrance->listener.text,
			entrance->tls ? " with TLS" : "");
}

void nbd_door_commit(struct nbd_door_change *change)
{
	struct nbd_door *door = change->door;

	set_limits(door, change->config);
	for (size_t i = 0; i < change->entrance_count; i++) {
		struct entrance *new = change->entrances[i];
		struct entrance *old = find_entrance(door, new->config->address);

		if (old) {
			renew(old, new);
			change->entrances[i] = old;
		} else {
			start_entrance(new);
		}
	}
	for (size_t i = 0; i < door->entrance_count; i++) {
		struct entrance *old = door->entrances[i];
		bool stays = false;

		for (size_t j = 0; j < change->entrance_count; j++)
			stays = stays || change->entrances[j] == old;
		if (stays)
			continue;
		log_info("NBD clients are not served on %s any more", old->listener.text);
		listener_stop(&old->listener);
		listener_close(&old->listener);
		old->config = NULL;
		entrance_free_unused(old);
	}
	free(door->entrances);
	door->entrances = change->entrances;
	door->entrance_count = change->entrance_count;
	free(change);
}

/* --- its life --------------------------------------------------------------------------------- */

int nbd_door_publish(struct nbd_door *door, struct export *export, struct err *err)
{
	return nbd_publish(&door->server, &export->nbd, err);
}

int nbd_door_start(struct nbd_door *door, struct err *err)
{
	for (size_t i = 0; i < door->entrance_count; i++) {
		struct listener *listener = &door->entrances[i]->listener;
		int ret = listener_start(listener, client_accepted);
		if (ret) {
			nbd_door_stop(door);
			return err_sys(err, -ret, "cannot accept clients on %s", listener->text);
		}
		log_info("NBD clients are served on %s%s", listener->text,
			door->entrances[i]->tls ? " with TLS" : "");
	}
	return 0;
}

void nbd_door_stop(struct nbd_door *door)
{
	for (size_t i = 0; i < door->entrance_count; i++)
		listener_stop(&door->entrances[i]->listener);
	nbd_server_stop(&door->server);
}

void nbd_door_abandon(struct nbd_door *door)
{
	if (!door)
		return;
	entrances_free(door->entrances, door->entrance_count);
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

struct nbd_server *nbd_door_server(struct nbd_door *door)
{
	return &door->server;
}

json_t *nbd_door_status(const struct nbd_door *door)
{
	json_t *listen = json_array();

	for (size_t i = 0; i < door->entrance_count; i++)
		json_array_append_new(listen, json_string(door->entrances[i]->listener.text));
	return json_pack("{s:o, s:i, s:i, s:I, s:I}", "listen", listen, "clients",
		(int)door->clients.running, "max_clients", (int)door->client_max, "accepted",
		(json_int_t)door->accepted, "refused", (json_int_t)door->refused);
}
