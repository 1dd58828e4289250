/*
 * The listeners of a config file: a text is an address, a group is an address and what holds for it.
 *
 * TLS: a TCP socket that others than this machine can reach has to have it, or has to say that it has not
 * (tls = "off"). A listener with certificates or keys requires it, unless it says another thing.
 *
 * Failure modes: what does not go together is an error at the listener's place, so that nobody believes
 * a door to be guarded that is not: users on TCP, networks on a unix socket, files without TLS.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "daemon/config_private.h"
#include "daemon/listen.h"

static const char *const tls_modes[] = {
	[NBD_TLS_OFF] = "off", [NBD_TLS_ON] = "on", [NBD_TLS_REQUIRED] = "required", NULL
};

/* A listener with what needs more than a table. */
struct listen_settings {
	struct config_listen listen;
	const char *mode, *user, *group;
	int tls;
	struct access_lists allow;
};

#define FIELD(name) offsetof(struct listen_settings, name)

static const struct opt listen_options[] = {
	{ "address", OPT_STRING, FIELD(listen.address), .required = true,
		.help = "\"unix:PATH\", \"tcp:HOST:PORT\", \"vsock:PORT\"" },
	{ "mode", OPT_STRING, FIELD(mode),
		.help = "of a unix socket's file, octal (default listen-mode)" },
	{ "user", OPT_STRING, FIELD(user), .help = "who owns that file" },
	{ "group", OPT_STRING, FIELD(group), .help = "and its group (default listen-group)" },
	{ "tls", OPT_ENUM, FIELD(tls), .choices = tls_modes,
		.help = "default \"required\" where there are certificates or keys" },
	{ "tls-certificates", OPT_STRING, FIELD(listen.tls_certificates),
		.help = "folder with server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem" },
	{ "tls-psk", OPT_STRING, FIELD(listen.tls_psk),
		.help = "file of pre-shared keys, lines of user:hexkey" },
	{ "tls-verify-clients", OPT_BOOL, FIELD(listen.tls_verify_clients), "true",
		.help = "ask clients for a certificate of the CA in ca-cert.pem" },
	{ "tls-allow", OPT_STRINGS, FIELD(listen.tls_allow),
		.help = "subjects of certificates, \"CN=alice,O=example\"; without it all the "
			"CA's" },
	{ "tls-priority", OPT_STRING, FIELD(listen.tls_priority),
		.help = "GnuTLS priority string: versions and ciphers" },
	{ "exports", OPT_STRINGS, FIELD(listen.exports),
		.help = "names of the exports that are there; without it all" },
	{ "read-only", OPT_BOOL, FIELD(listen.read_only), "false",
		.help = "refuse writes to all exports" },
	{ "allow", OPT_STRINGS, FIELD(allow.networks),
		.help = "networks of TCP clients: \"10.0.0.0/8\", \"2001:db8::/32\", "
			"\"192.0.2.7\"" },
	{ "allow-users", OPT_STRINGS, FIELD(allow.users),
		.help = "users who may connect to a unix socket" },
	{ "allow-groups", OPT_STRINGS, FIELD(allow.groups),
		.help = "groups whose members may connect to a unix socket" },
	{ "allow-cids", OPT_STRINGS, FIELD(allow.cids),
		.help = "numbers of the virtual machines that may connect by vsock" },
	{}
};

const struct opt *const config_listen_options = listen_options;

/* --- what does not go together ---------------------------------------------------------------- */

/* The first of the keys that the group has, or NULL. */
static const struct conf *first_of(const struct conf *group, const char *const *keys)
{
	for (; *keys; keys++)
		if (conf_get(group, *keys))
			return conf_get(group, *keys);
	return NULL;
}

/* Keys that only one kind of listener has. */
static const struct kind_keys {
	enum listen_kind kind;
	const char *name;
	const char *keys[6];
} kind_keys[] = {
	{ LISTEN_UNIX, "unix sockets", { "mode", "user", "group", "allow-users", "allow-groups" } },
	{ LISTEN_TCP, "TCP", { "allow" } },
	{ LISTEN_VSOCK, "vsock", { "allow-cids" } },
};

static int check_kind(const struct config_listen *listen, struct err *err)
{
	for (size_t i = 0; i < ARRAY_LEN(kind_keys); i++) {
		const struct conf *wrong = first_of(listen->conf, kind_keys[i].keys);

		if (wrong && listener_kind(listen->address) != kind_keys[i].kind)
			return conf_error(wrong, err, "\"%s\" is for %s; this is \"%s\"",
				wrong->name, kind_keys[i].name, listen->address);
	}
	return 0;
}

static int check_tls(const struct config_listen *listen, struct err *err)
{
	static const char *const keys[] = { "tls-certificates", "tls-psk", "tls-verify-clients",
		"tls-allow", "tls-priority", NULL };
	static const char *const x509_keys[] = { "tls-verify-clients", "tls-allow", NULL };
	const struct conf *wrong = NULL, *tls = conf_get(listen->conf, "tls");
	bool has_files = listen->tls_certificates || listen->tls_psk;

	if (listen->tls != NBD_TLS_OFF && !has_files)
		return conf_error(tls, err,
			"tls is \"%s\": that needs tls-certificates or tls-psk, or both",
			tls_modes[listen->tls]);
	if (listen->tls == NBD_TLS_OFF && (wrong = first_of(listen->conf, keys)))
		return conf_error(wrong, err, "\"%s\" means nothing without TLS", wrong->name);
	if (!listen->tls_certificates && (wrong = first_of(listen->conf, x509_keys)))
		return conf_error(
			wrong, err, "\"%s\" means nothing without tls-certificates", wrong->name);
	if (listen->tls_allow && !listen->tls_verify_clients)
		return conf_error(listen->tls_allow, err,
			"tls-allow means nothing while tls-verify-clients is false");
	return 0;
}

/* says_tls: whether the config has a word on it. */
static int check_exposure(const struct config_listen *listen, bool says_tls, struct err *err)
{
	static const char text[] =
		"can be reached from other machines and has no TLS: give it tls-certificates or "
		"tls-psk, or say tls = \"off\" in { address = ...; }";

	if (says_tls || listen->tls != NBD_TLS_OFF ||
		listener_kind(listen->address) == LISTEN_UNIX ||
		listener_is_loopback(listen->address))
		return 0;
	if (listen->conf)
		return conf_error(listen->conf, err, "\"%s\" %s", listen->address, text);
	return err_set(err, EINVAL, "\"%s\" %s", listen->address, text);
}

static int check_twins(
	const struct config *config, const struct config_listen *listen, struct err *err)
{
	for (size_t i = 0; i < config->listen_count; i++)
		if (!strcmp(config->listen[i].address, listen->address))
			return conf_error(listen->conf, err, "listen: \"%s\" is given twice",
				listen->address);
	return 0;
}

/* --- one listener ----------------------------------------------------------------------------- */

static void add(struct config *config, const struct config_listen *listen)
{
	config->listen = reallocarray(
		config->listen, config->listen_count + 1, sizeof(*config->listen));
	if (!config->listen)
		abort();
	config->listen[config->listen_count++] = *listen;
}

static int take_file_access(
	struct config_listen *listen, const struct listen_settings *settings, struct err *err)
{
	int ret = 0;

	if (settings->mode)
		ret = config_parse_mode(listen->conf, "mode", settings->mode, &listen->mode, err);
	if (!ret)
		ret = config_parse_user(listen->conf, "user", settings->user, &listen->uid, err);
	if (!ret && settings->group)
		ret = config_parse_group(listen->conf, "group", settings->group, &listen->gid, err);
	return ret;
}

/* Fills listen from a group; what is checked here does not need the others. */
static int take_group(struct config_listen *listen, struct err *err)
{
	const struct conf *group = listen->conf;
	struct listen_settings settings = {};
	int ret = opts_parse(listen_options, group, &settings, err);

	if (ret)
		return ret;
	settings.listen.conf = group;
	settings.listen.mode = listen->mode;
	settings.listen.gid = listen->gid;
	settings.listen.tls = (enum nbd_tls)settings.tls;
	*listen = settings.listen;
	if (!conf_get(group, "tls") && (listen->tls_certificates || listen->tls_psk))
		listen->tls = NBD_TLS_REQUIRED;
	ret = take_file_access(listen, &settings, err);
	if (!ret)
		ret = check_tls(listen, err);
	if (!ret)
		ret = access_parse(&listen->access, &settings.allow, err);
	return ret;
}

static int take_one(struct config *config, const struct conf *item, struct err *err)
{
	struct config_listen listen = { .address = item->string,
		.mode = config->listen_mode,
		.uid = (uid_t)-1,
		.gid = config->listen_gid,
		.conf = item };
	bool is_group = item->type == CONF_GROUP;
	struct err reason = {};
	int ret = is_group ? take_group(&listen, err) : 0;

	if (!ret && listener_check(listen.address, &reason))
		ret = conf_error(
			is_group ? conf_get(item, "address") : item, err, "%s", reason.text);
	if (!ret)
		ret = check_twins(config, &listen, err);
	if (!ret)
		ret = check_kind(&listen, err);
	if (!ret)
		ret = check_exposure(&listen, conf_get(item, "tls"), err);
	if (ret)
		access_fini(&listen.access);
	else
		add(config, &listen);
	return ret;
}

/* --- all of them ------------------------------------------------------------------------------ */

int config_take_listen(struct config *config, const struct conf *listen, struct err *err)
{
	int ret = 0;

	if (!listen)
		return 0;
	if (listen->type != CONF_LIST)
		return take_one(config, listen, err);
	for (size_t i = 0; i < listen->item_count && !ret; i++)
		ret = take_one(config, listen->items[i], err);
	return ret;
}

static bool has_export(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->export_count; i++)
		if (!strcmp(config->exports[i]->name, name))
			return true;
	return false;
}

int config_check_listen(const struct config *config, struct err *err)
{
	for (size_t i = 0; i < config->listen_count; i++) {
		const struct conf *names = config->listen[i].exports;
		for (size_t j = 0; j < conf_strings_count(names); j++)
			if (!has_export(config, conf_strings_get(names, j)))
				return conf_error(names, err, "exports: there is no export \"%s\"",
					conf_strings_get(names, j));
	}
	return 0;
}

int config_add_listen(struct config *config, const char *address, struct err *err)
{
	struct conf *item = conf_new_string(NULL, NULL, address);
	struct config_listen listen = { .address = item->string,
		.mode = config->listen_mode,
		.uid = (uid_t)-1,
		.gid = config->listen_gid };
	int ret = check_exposure(&listen, false, err);

	if (ret) {
		conf_free(item);
		return ret;
	}
	/* The tree owns the text. */
	item->name = strdup("listen");
	if (!item->name)
		abort();
	conf_add(config->root, item);
	add(config, &listen);
	return 0;
}
