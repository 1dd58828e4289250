/*
 * Accepts NBD clients and sends each on its way: nbd_client() in a coroutine of its own.
 *
 * All clients together are bounded, and those of one place; who comes beyond, or may not come at all, is closed
 * at once, before a byte is exchanged. The log tells of it, but of no more than TROUBLES_PER_MINUTE. What a client
 * may choose from is asked for by the handshake (may_enter()): the exports that its listener serves and that are
 * there for somebody like it, by the config of that moment.
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

#include <linux/vm_sockets.h>

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

/* What strangers can make us write into the log is bounded. */
#define TROUBLES_PER_MINUTE 10

struct troubles {
	uint64_t minute_end_ns;
	unsigned told, untold; /* in this minute */
};

struct nbd_door {
	struct nbd_server server;
	struct entrance **entrances;
	size_t entrance_count;
	struct co_group clients;
	struct list inside; /* of struct client */
	struct config_limits limits;
	unsigned client_max;
	uint64_t accepted, refused; /* accepted: also the id of the last client */
	uint64_t tls_failures;
	bool told_full; /* one warning per time of being full */
	bool debug;     /* the protocol of clients to come is logged */
	struct troubles troubles;
};

struct client {
	struct list link; /* in door->inside */
	struct entrance *entrance;
	int fd;
	char text[PEER_TEXT_LEN];
	struct access_peer peer;
	struct nbd_visitor visitor;
	struct nbd_trace trace;
};

/* --- the log ---------------------------------------------------------------------------------- */

/* Whether one more trouble may be told in this minute. */
static bool may_tell(struct nbd_door *door)
{
	struct troubles *troubles = &door->troubles;
	uint64_t now_ns = reactor_now_ns();

	if (now_ns >= troubles->minute_end_ns) {
		if (troubles->untold)
			log_warning("nbd: %u more clients were refused", troubles->untold);
		*troubles = (struct troubles){ .minute_end_ns = now_ns + 60 * NS_PER_SEC };
	}
	if (troubles->told < TROUBLES_PER_MINUTE) {
		troubles->told++;
		return true;
	}
	troubles->untold++;
	return false;
}

static void tls_failed(const struct nbd_visitor *visitor, const char *reason)
{
	const struct client *client = container_of(visitor, struct client, visitor);
	struct nbd_door *door = client->entrance->door;

	door->tls_failures++;
	if (may_tell(door))
		log_warning(
			"%s: client %s: %s", client->entrance->listener.text, client->text, reason);
}

/* Told to whoever asked for it; any reactor. */
static void log_protocol(const struct nbd_trace *trace, const char *text)
{
	const struct client *client = container_of(trace, struct client, trace);

	log_info("client %llu, %s: %s", (unsigned long long)client->visitor.id, client->text, text);
}

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
	if (peer.ss_family == AF_VSOCK) {
		const struct sockaddr_vm *vm = (const void *)&peer;
		snprintf(text, PEER_TEXT_LEN, "vsock:%u:%u", vm->svm_cid, vm->svm_port);
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

	list_remove(&client->link);
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
	list_init(&client->link);
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
		.trace = &client->trace,
		.tls_failed = tls_failed,
		.may_enter = may_enter,
	};
	client->trace.line = log_protocol;
	atomic_init(&client->trace.on, entrance->door->debug);
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

/* Whether there is room for one more from where the client comes from. */
static bool has_room_for_peer(struct nbd_door *door, const struct client *client)
{
	int64_t count = 0;

	if (!door->limits.peer_connections)
		return true;
	list_for_each (link, &door->inside)
		count += access_same_place(
			&list_entry(link, struct client, link)->peer, &client->peer);
	if (count < door->limits.peer_connections)
		return true;
	if (may_tell(door))
		log_warning("%s: refusing client %s: %lld are connected from there, as many as "
			    "max-connections-per-peer allows",
			client->entrance->listener.text, client->text, (long long)count);
	return false;
}

static bool may_come_in(struct nbd_door *door, const struct client *client)
{
	if (access_allows(&client->entrance->config->access, &client->peer))
		return has_room_for_peer(door, client);
	if (may_tell(door))
		log_warning("%s: refusing client %s: it matches no rule of allow...",
			client->entrance->listener.text, client->text);
	return false;
}

static void client_accepted(struct listener *listener, int fd)
{
	struct entrance *entrance = container_of(listener, struct entrance, listener);
	struct nbd_door *door = entrance->door;
	struct client *client = has_room(door, listener) ? client_create(entrance, fd) : NULL;

	if (client && !may_come_in(door, client)) {
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
	list_push_back(&door->inside, &client->link);
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
	door->limits = config->limits;
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
	list_init(&door->inside);
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

struct listener *nbd_door_listener(struct nbd_door *door, size_t index)
{
	return index < door->entrance_count ? &door->entrances[index]->listener : NULL;
}

struct nbd_server *nbd_door_server(struct nbd_door *door)
{
	return &door->server;
}

int nbd_door_debug(struct nbd_door *door, uint64_t id, bool on)
{
	int count = 0;

	if (!id)
		door->debug = on;
	list_for_each (link, &door->inside) {
		struct client *client = list_entry(link, struct client, link);

		if (id && client->visitor.id != id)
			continue;
		atomic_store(&client->trace.on, on);
		count++;
	}
	return id && !count ? -ENOENT : count;
}

/* --- status ----------------------------------------------------------------------------------- */

static json_t *listeners_status(const struct nbd_door *door)
{
	static const char *const tls_names[] = {
		[NBD_TLS_OFF] = "off", [NBD_TLS_ON] = "on", [NBD_TLS_REQUIRED] = "required"
	};
	json_t *listeners = json_array();

	for (size_t i = 0; i < door->entrance_count; i++) {
		const struct entrance *entrance = door->entrances[i];

		json_array_append_new(listeners,
			json_pack("{s:s, s:s, s:b, s:i}", "address", entrance->listener.text, "tls",
				tls_names[entrance->config->tls], "read_only",
				entrance->config->read_only, "clients",
				(int)entrance->client_count));
	}
	return listeners;
}

static json_t *limits_status(const struct nbd_door *door)
{
	const struct nbd_limits *limits = &door->server.limits;

	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "max_connections",
		(json_int_t)door->client_max, "max_connections_per_peer",
		(json_int_t)door->limits.peer_connections, "handshake_timeout",
		(json_int_t)(limits->handshake_ns / NS_PER_SEC), "handshake_options",
		(json_int_t)limits->handshake_options, "idle_timeout",
		(json_int_t)(limits->idle_ns / NS_PER_SEC), "max_requests",
		(json_int_t)limits->requests, "max_buffer", (json_int_t)limits->buffer_bytes,
		"export_max_requests", (json_int_t)limits->export_requests, "export_max_buffer",
		(json_int_t)limits->export_buffer_bytes);
}

json_t *nbd_door_status(const struct nbd_door *door)
{
	return json_pack("{s:o, s:i, s:I, s:I, s:I, s:b, s:o}", "listeners", listeners_status(door),
		"clients", (int)door->clients.running, "accepted", (json_int_t)door->accepted,
		"refused", (json_int_t)door->refused, "tls_failures",
		(json_int_t)door->tls_failures, "debug", door->debug, "limits",
		limits_status(door));
}
