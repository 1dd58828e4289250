/*
 * From a config file to checked structs; see config.h.
 *
 * Three steps. config-text.c reads the file and what it includes; libconfig (known to this file only)
 * parses that, and its tree becomes one of struct conf; the option tables below turn that into struct
 * config, with what tables cannot say checked by hand: names, addresses, modes, users, devices and
 * files that are used twice. The layers check their own options, through stack_check().
 *
 * Nothing is opened but the config file itself, and nothing is created: files of stacks are looked at
 * (stat) to find out whether two exports write the same one.
 *
 * Failure modes: every one is an error of one line with the place of the value that is wrong.
 */
#include "daemon/config.h"

#include <ctype.h>
#include <errno.h>
#include <libconfig.h>
#include <pwd.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "blk/blk.h"
#include "daemon/config-text.h"
#include "daemon/config-write.h"
#include "daemon/config_private.h"
#include "daemon/listen.h"

#define EXPORTS_MAX     1024
#define EXPORT_NAME_MAX 64 /* also a file name below /dev/blkstack */
#define REACTORS_MAX    64

static const char *const log_levels[] = { "error", "warning", "info", "debug", NULL };
static const char *const engines[] = { "auto", "uring", "threads", NULL };

/* What the top level of the file says, before checks that need more than a table. */
struct settings {
	const char *control, *control_mode, *control_user, *control_group, *state;
	const struct conf *listen;
	const char *listen_mode, *listen_group;
	int64_t max_connections, handshake_timeout_s, stop_timeout_s, stuck_after_s, reactors;
	struct config_limits limits;
	int engine, log_level;
	bool keeper;
	const char *user, *group;
	const struct conf *exports;
};

static const struct opt settings_options[] = {
	{ "control", OPT_STRING, offsetof(struct settings, control), "",
		.help = "path of the control socket; without it there is none" },
	{ "control-mode", OPT_STRING, offsetof(struct settings, control_mode), "0660",
		.help = "mode of the control socket's file, octal" },
	{ "control-user", OPT_STRING, offsetof(struct settings, control_user),
		.help = "who may change things besides root; owns the control socket" },
	{ "control-group", OPT_STRING, offsetof(struct settings, control_group),
		.help = "whose members may change things; group of the control socket" },
	{ "listen", OPT_MIXED, offsetof(struct settings, listen),
		.help = "NBD sockets: \"unix:PATH\", \"tcp:HOST:PORT\", or { address = ...; ... "
			"}" },
	{ "listen-mode", OPT_STRING, offsetof(struct settings, listen_mode), "0660",
		.help = "mode of unix NBD sockets' files, octal, unless they say another" },
	{ "listen-group", OPT_STRING, offsetof(struct settings, listen_group),
		.help = "group of unix NBD sockets' files, unless they say another" },
	{ "max-connections", OPT_INT, offsetof(struct settings, max_connections), "256", .min = 1,
		.max = 65536, .help = "NBD clients at once, of all exports together" },
	{ "max-connections-per-peer", OPT_INT, offsetof(struct settings, limits.peer_connections),
		"128", .min = 0, .max = 65536,
		.help = "of these, from one address, user or virtual machine; 0: no limit" },
	{ "handshake-timeout", OPT_INT, offsetof(struct settings, handshake_timeout_s), "10",
		.min = 1, .max = 3600, .help = "seconds an NBD client has to choose an export" },
	{ "handshake-options", OPT_INT, offsetof(struct settings, limits.handshake_options), "64",
		.min = 8, .max = 65536, .help = "options an NBD client may send in its handshake" },
	{ "idle-timeout", OPT_INT, offsetof(struct settings, limits.idle_timeout_s), "0", .min = 0,
		.max = 86400,
		.help = "seconds after which an NBD client on which nothing moves is cut; 0: "
			"never" },
	{ "max-requests", OPT_INT, offsetof(struct settings, limits.requests), "256", .min = 1,
		.max = 4096, .help = "requests in flight on one connection" },
	{ "max-buffer", OPT_SIZE, offsetof(struct settings, limits.buffer_bytes), "32M",
		.min = 1 << 20, .help = "memory that one connection may take" },
	{ "export-max-requests", OPT_INT, offsetof(struct settings, limits.export_requests), "4096",
		.min = 1, .max = 1 << 20,
		.help = "requests in flight of one export, which its connections share evenly" },
	{ "export-max-buffer", OPT_SIZE, offsetof(struct settings, limits.export_buffer_bytes),
		"256M", .min = 1 << 20,
		.help = "memory that the connections of one export share evenly" },
	{ "stop-timeout", OPT_INT, offsetof(struct settings, stop_timeout_s), "30", .min = 1,
		.max = 3600, .help = "seconds requests in flight have when the daemon stops" },
	{ "stuck-after", OPT_INT, offsetof(struct settings, stuck_after_s), "60", .min = 0,
		.max = 86400,
		.help = "seconds in which a disk with requests in hand must end one, or is called "
			"stuck; 0: never" },
	{ "state", OPT_STRING, offsetof(struct settings, state),
		.help = "folder that remembers what was changed while it ran; by default "
			"$STATE_DIRECTORY, or the config's own" },
	{ "engine", OPT_ENUM, offsetof(struct settings, engine), "auto", .choices = engines,
		.help = "how files are read and written" },
	{ "log-level", OPT_ENUM, offsetof(struct settings, log_level), "info",
		.choices = log_levels, .help = "what is logged, and all that weighs more" },
	{ "reactors", OPT_INT, offsetof(struct settings, reactors), "0", .min = 0,
		.max = REACTORS_MAX,
		.help = "threads that serve; 0: one per processor, at most one per export" },
	{ "user", OPT_STRING, offsetof(struct settings, user),
		.help = "who the server becomes when its sockets are bound" },
	{ "group", OPT_STRING, offsetof(struct settings, group),
		.help = "its group; by default the user's" },
	{ "keeper", OPT_BOOL, offsetof(struct settings, keeper),
		.help = "whether a process of its own holds devices and sockets while the server "
			"restarts; by default where an export has a device" },
	{ "exports", OPT_LIST, offsetof(struct settings, exports), .required = true,
		.help = "the disks" },
	{}
};

/* An export with what needs more than a table. */
struct export_settings {
	struct config_export export;
	struct access_lists allow;
};

/* In the order of enum kernel_dev_mode. */
static const char *const device_modes[] = { "auto", "ioctl", "netlink", NULL };

static const struct opt export_options[] = {
	{ "name", OPT_STRING, offsetof(struct config_export, name), .required = true,
		.help = "what clients ask for" },
	{ "description", OPT_STRING, offsetof(struct config_export, description), "",
		.help = "a text for people" },
	{ "device", OPT_STRING, offsetof(struct config_export, device), "",
		.help = "kernel device: \"/dev/nbd0\", or \"auto\" for the first free one" },
	{ "device-block-size", OPT_SIZE, offsetof(struct config_export, device_block_size), "0",
		.min = 0, .max = 4096,
		.help = "logical block size of the kernel device; 0: the stack's, at least 512" },
	{ "device-timeout", OPT_INT, offsetof(struct config_export, device_timeout_s), "0",
		.min = 0, .max = 86400,
		.help = "seconds after which a stuck request fails the kernel device; 0: never" },
	{ "device-mode", OPT_ENUM, offsetof(struct config_export, device_mode), "auto",
		.choices = device_modes,
		.help = "how the kernel is told: by netlink, the device outlives the daemon" },
	{ "device-connections", OPT_INT, offsetof(struct config_export, device_connections), "1",
		.min = 1, .max = 16, .help = "connections between the kernel and the daemon" },
	{ "device-dead-timeout", OPT_INT, offsetof(struct config_export, device_dead_timeout_s),
		"300", .min = 1, .max = 86400,
		.help = "seconds that requests wait for a daemon that died, by netlink" },
	{ "read-only", OPT_BOOL, offsetof(struct config_export, read_only), "false",
		.help = "refuse writes, whatever the layers allow" },
	{ "tls-required", OPT_BOOL, offsetof(struct config_export, tls_required), "false",
		.help = "for NBD clients with TLS only, on every listener" },
	{ "allow", OPT_STRINGS, offsetof(struct export_settings, allow.networks),
		.help = "networks of the TCP clients it is there for" },
	{ "allow-users", OPT_STRINGS, offsetof(struct export_settings, allow.users),
		.help = "users on unix sockets it is there for" },
	{ "allow-groups", OPT_STRINGS, offsetof(struct export_settings, allow.groups),
		.help = "groups on unix sockets it is there for" },
	{ "allow-cids", OPT_STRINGS, offsetof(struct export_settings, allow.cids),
		.help = "virtual machines on vsock it is there for" },
	{ "max-connections", OPT_INT, offsetof(struct config_export, max_connections), "64",
		.min = 1, .max = 65536, .help = "NBD clients of this export at once" },
	{ "stack", OPT_LIST, offsetof(struct config_export, stack), .required = true,
		.help = "the layers, top first" },
	{}
};

const struct opt *const config_options = settings_options;
const struct opt *const config_export_options = export_options;

/* --- libconfig's tree to ours ----------------------------------------------------------------- */

struct place {
	const struct config_text *text;
	const char *export; /* what the setting is part of: `export "db"`, or NULL */
};

/* Line 0 is the file as a whole. */
static char *place_text(const struct place *place, unsigned line)
{
	const struct config_line *from = config_text_place(place->text, line);
	char *where;
	int len;

	if (!line)
		len = asprintf(&where, "%s", place->text->files[0]);
	else if (place->export)
		len = asprintf(&where, "%s:%u: %s", from->file, from->number, place->export);
	else
		len = asprintf(&where, "%s:%u", from->file, from->number);
	if (len < 0)
		abort();
	return where;
}

/* Errors quote the texts of the config, and are one line each. */
static bool has_control_character(const char *text)
{
	for (; *text; text++)
		if (iscntrl((unsigned char)*text))
			return true;
	return false;
}

/* `export "db"`, for the items of the list of exports; the caller frees it. */
static char *export_label(config_setting_t *setting)
{
	const char *name;
	char *label;
	int len = config_setting_lookup_string(setting, "name", &name) &&
				  !has_control_character(name)
			  ? asprintf(&label, "export \"%s\"", name)
			  : asprintf(&label, "export %d", config_setting_index(setting) + 1);
	if (len < 0)
		abort();
	return label;
}

static bool is_export(const config_setting_t *setting)
{
	const config_setting_t *list = config_setting_parent(setting);

	return config_setting_is_group(setting) && list && config_setting_is_list(list) &&
	       config_setting_parent(list) && config_setting_is_root(config_setting_parent(list)) &&
	       conf_name_equal(config_setting_name(list), "exports");
}

/* NULL on error, as below. */
static struct conf *convert_string(config_setting_t *setting, const char *where, struct err *err)
{
	const char *string = config_setting_get_string(setting);

	if (!has_control_character(string))
		return conf_new_string(config_setting_name(setting), where, string);
	err_set(err, EINVAL, "%s: a text holds a control character, such as a tab", where);
	return NULL;
}

static struct conf *convert(const struct place *outer, config_setting_t *setting, struct err *err)
{
	CLEANUP(free) char *label = is_export(setting) ? export_label(setting) : NULL;
	struct place place = { outer->text, label ? label : outer->export };
	CLEANUP(free) char *where = place_text(&place, config_setting_source_line(setting));
	const char *name = config_setting_name(setting);
	struct conf *conf;

	switch (config_setting_type(setting)) {
	case CONFIG_TYPE_BOOL:
		return conf_new_bool(name, where, config_setting_get_bool(setting));
	case CONFIG_TYPE_INT:
	case CONFIG_TYPE_INT64:
		return conf_new_int(name, where, config_setting_get_int64(setting));
	case CONFIG_TYPE_STRING:
		return convert_string(setting, where, err);
	case CONFIG_TYPE_GROUP:
		conf = conf_new(CONF_GROUP, name, where);
		break;
	case CONFIG_TYPE_LIST:
	case CONFIG_TYPE_ARRAY:
		conf = conf_new(CONF_LIST, name, where);
		break;
	default:
		err_set(err, EINVAL, "%s: a number with a point is expected nowhere", where);
		return NULL;
	}
	for (int i = 0; i < config_setting_length(setting); i++) {
		struct conf *item = convert(
			&place, config_setting_get_elem(setting, (unsigned)i), err);
		if (!item) {
			conf_free(conf);
			return NULL;
		}
		conf_add(conf, item);
	}
	return conf;
}

static int parse(const struct config_text *text, struct conf **root, struct err *err)
{
	struct place place = { .text = text };
	config_t parsed;
	int ret = 0;

	config_init(&parsed);
	if (config_read_string(&parsed, text->text)) {
		*root = convert(&place, config_root_setting(&parsed), err);
		if (!*root)
			ret = -EINVAL;
	} else {
		CLEANUP(free)
		char *where = place_text(&place, (unsigned)config_error_line(&parsed));
		ret = err_set(err, EINVAL, "%s: %s", where, config_error_text(&parsed));
	}
	config_destroy(&parsed);
	return ret;
}

/* --- single values ---------------------------------------------------------------------------- */

int config_parse_mode(
	const struct conf *group, const char *key, const char *text, mode_t *mode, struct err *err)
{
	char *end;
	unsigned long value = strtoul(text, &end, 8);

	if (!isdigit((unsigned char)*text) || *end || value > 0777) {
		const struct conf *conf = conf_get(group, key);
		return conf_error(conf ? conf : group, err,
			"%s: \"%s\" is no mode: expected octal digits like \"0660\"", key, text);
	}
	*mode = (mode_t)value;
	return 0;
}

int config_parse_user(
	const struct conf *group, const char *key, const char *text, uid_t *uid, struct err *err)
{
	*uid = (uid_t)-1;
	if (!text || access_find_user(text, uid))
		return 0;
	return conf_error(
		conf_get(group, key), err, "%s: there is no user \"%s\" on this system", key, text);
}

int config_parse_group(
	const struct conf *group, const char *key, const char *text, gid_t *gid, struct err *err)
{
	*gid = (gid_t)-1;
	if (!text || access_find_group(text, gid))
		return 0;
	return conf_error(conf_get(group, key), err, "%s: there is no group \"%s\" on this system",
		key, text);
}

static int check_address(const struct conf *conf, const char *address, struct err *err)
{
	struct err reason = {};

	if (listener_check(address, &reason))
		return conf_error(conf, err, "%s", reason.text);
	return 0;
}

bool config_has_device(const struct config *config)
{
	for (size_t i = 0; i < config->export_count; i++)
		if (*config->exports[i]->device)
			return true;
	return false;
}

static bool is_one_of(const char *name, const char *const *names)
{
	for (; *names; names++)
		if (!strcmp(*names, name))
			return true;
	return false;
}

bool config_engine_known(const char *name)
{
	return is_one_of(name, engines);
}

bool config_log_level_known(const char *name)
{
	return is_one_of(name, log_levels);
}

void config_apply_log_level(const struct config *config)
{
	for (int i = 0; log_levels[i]; i++)
		if (!strcmp(log_levels[i], config->log_level))
			log_set_level((enum log_level)i); /* in the order of log.h */
}

void config_set_control(struct config *config, const char *address)
{
	free(config->control);
	config->control = strdup(address);
	if (!config->control)
		abort();
}

static int take_user(struct config *config, const struct settings *settings, struct err *err)
{
	const struct conf *root = config->root;
	int ret = config_parse_user(root, "user", settings->user, &config->uid, err);

	if (!ret)
		ret = config_parse_group(root, "group", settings->group, &config->gid, err);
	if (ret || !settings->user)
		return !ret && settings->group
			       ? conf_error(conf_get(root, "group"), err, "group goes with user")
			       : ret;
	const struct passwd *user = getpwuid(config->uid);
	if (config->gid == (gid_t)-1 && user)
		config->gid = user->pw_gid;
	if (config->gid == (gid_t)-1)
		return conf_error(conf_get(root, "user"), err,
			"user \"%s\" has no group of its own here: say which (group)",
			settings->user);
	if (!config->keeper && config_has_device(config))
		return conf_error(conf_get(root, "user"), err,
			"kernel devices take root: a server that becomes another user needs a "
			"keeper for them (keeper = true)");
	return 0;
}

static int take_settings(struct config *config, const struct settings *settings, struct err *err)
{
	const struct conf *root = config->root;
	int ret = config_parse_mode(
		root, "control-mode", settings->control_mode, &config->control_mode, err);

	if (!ret)
		ret = config_parse_mode(
			root, "listen-mode", settings->listen_mode, &config->listen_mode, err);
	if (!ret)
		ret = config_parse_user(
			root, "control-user", settings->control_user, &config->control_uid, err);
	if (!ret)
		ret = config_parse_group(
			root, "control-group", settings->control_group, &config->control_gid, err);
	if (!ret)
		ret = config_parse_group(
			root, "listen-group", settings->listen_group, &config->listen_gid, err);
	if (!ret && *settings->control)
		ret = check_address(conf_get(root, "control"), settings->control, err);
	if (!ret && !strncmp(settings->control, "tcp:", 4))
		ret = conf_error(conf_get(root, "control"), err,
			"control: \"%s\": only a unix socket tells who calls", settings->control);
	if (!ret)
		ret = config_take_listen(config, settings->listen, err);
	config_set_control(config, settings->control);
	config->max_connections = settings->max_connections;
	config->handshake_timeout_s = settings->handshake_timeout_s;
	config->limits = settings->limits;
	config->stop_timeout_s = settings->stop_timeout_s;
	config->stuck_after_s = settings->stuck_after_s;
	config->state = settings->state;
	config->engine = engines[settings->engine];
	config->log_level = log_levels[settings->log_level];
	return ret;
}

/* How many processors we may use, at most REACTORS_MAX. */
static size_t cpu_count(void)
{
	cpu_set_t cpus;

	if (sched_getaffinity(0, sizeof(cpus), &cpus))
		return 1;
	return MIN((size_t)CPU_COUNT(&cpus), (size_t)REACTORS_MAX);
}

/* --- exports ---------------------------------------------------------------------------------- */

static int check_name(const struct config_export *export, struct err *err)
{
	size_t len = strspn(export->name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
					  "0123456789-_.:+@");

	if (export->name[len] || !isalnum((unsigned char)export->name[0]))
		return conf_error(conf_get(export->conf, "name"), err,
			"a name starts with a letter or digit and goes on with those and - _ . : + "
			"@");
	if (len > EXPORT_NAME_MAX)
		return conf_error(conf_get(export->conf, "name"), err,
			"a name has at most %d characters", EXPORT_NAME_MAX);
	return 0;
}

static int check_device(const struct config_export *export, struct err *err)
{
	static const char prefix[] = "/dev/nbd";
	uint64_t block_size = export->device_block_size;

	if (block_size && (block_size < 512 || !is_pow2(block_size)))
		return conf_error(conf_get(export->conf, "device-block-size"), err,
			"device-block-size is 512, 1024, 2048 or 4096 (or 0: as the stack's)");
	if (!*export->device || !strcmp(export->device, "auto"))
		return 0;
	const char *number = export->device + strlen(prefix);
	if (strncmp(export->device, prefix, strlen(prefix)) || !*number ||
		number[strspn(number, "0123456789")] || strlen(number) > 6)
		return conf_error(conf_get(export->conf, "device"), err,
			"device \"%s\": expected \"/dev/nbd0\" or another number, or \"auto\"",
			export->device);
	return 0;
}

/* Whether export can run with the others. */
static int check_twins(struct config_export *const *others, size_t other_count,
	const struct config_export *export, struct err *err)
{
	for (size_t i = 0; i < other_count; i++) {
		const struct config_export *other = others[i];
		if (!strcmp(other->name, export->name))
			return conf_error(conf_get(export->conf, "name"), err,
				"the name is taken already (%s)", other->conf->where);
		if (*export->device && strcmp(export->device, "auto") &&
			!strcmp(export->device, other->device))
			return conf_error(conf_get(export->conf, "device"), err,
				"device \"%s\" is used by export \"%s\" too", export->device,
				other->name);
	}
	return 0;
}

/* conf is taken over. */
static int take_export(struct config *config, struct conf *conf, struct err *err)
{
	struct config_export *export = calloc(1, sizeof(*export));
	struct export_settings settings = {};

	if (!export)
		abort();
	int ret = opts_parse(export_options, conf, &settings, err);
	*export = settings.export;
	export->references = 1;
	export->conf = conf;
	config->exports[config->export_count++] = export;
	if (!ret)
		ret = access_parse(&export->access, &settings.allow, err);
	if (!ret)
		ret = check_name(export, err);
	if (!ret)
		ret = check_device(export, err);
	if (!ret && !config->written)
		ret = check_twins(config->exports, config->export_count - 1, export, err);
	if (!ret)
		ret = stack_check(export->stack, err);
	return ret;
}

static int take_exports(struct config *config, struct conf *exports, struct err *err)
{
	struct conf *item;
	int ret = 0;

	if (!exports->item_count && !config->written)
		return conf_error(exports, err, "exports is empty: there is nothing to serve");
	if (exports->item_count > EXPORTS_MAX)
		return conf_error(exports, err, "more than %d exports", EXPORTS_MAX);
	config->exports = calloc(exports->item_count + 1, sizeof(*config->exports));
	if (!config->exports)
		abort();
	while (!ret && (item = conf_take_first(exports)))
		ret = take_export(config, item, err);
	return ret;
}

int config_check_together(
	struct config_export *const *exports, size_t export_count, struct err *err)
{
	int ret = 0;

	for (size_t i = 0; i < export_count && !ret; i++)
		ret = check_twins(exports, i, exports[i], err);
	return ret ? ret : config_check_files(exports, export_count, err);
}

/* --- the whole -------------------------------------------------------------------------------- */

/* The names, which are no setting: taken out of the tree. NULL: there are none. */
static struct conf *take_by_hand(struct conf *root)
{
	for (size_t i = 0; i < root->item_count; i++) {
		struct conf *item = root->items[i];

		if (!conf_name_equal(item->name, CONFIG_BY_HAND))
			continue;
		root->items[i] = root->items[--root->item_count];
		return item;
	}
	return NULL;
}

static void mark_by_hand(struct config *config, const struct conf *names)
{
	for (size_t i = 0; names && i < names->item_count; i++)
		for (size_t j = 0; j < config->export_count; j++)
			if (names->items[i]->type == CONF_STRING &&
				!strcmp(names->items[i]->string, config->exports[j]->name))
				config->exports[j]->by_hand = true;
}

static int check_all(const struct config *config, struct err *err)
{
	int ret = config->written ? 0 : config_check_listen(config, err);

	return ret || config->written
		       ? ret
		       : config_check_files(config->exports, config->export_count, err);
}

/* content: what is written, or NULL for the file. */
static int load(struct config *config, const char *content, struct err *err)
{
	struct config_text text;
	struct settings settings;
	struct conf *by_hand = NULL;
	int ret = content ? config_text_take_written(&text, config->path, content, err)
			  : config_text_read(&text, config->path, err);

	config->written = content;
	if (!ret)
		ret = parse(&text, &config->root, err);
	config_text_fini(&text);
	if (!ret && content)
		by_hand = take_by_hand(config->root);
	if (!ret)
		ret = opts_parse(settings_options, config->root, &settings, err);
	if (!ret)
		ret = take_settings(config, &settings, err);
	if (!ret)
		ret = take_exports(config, (struct conf *)settings.exports, err);
	mark_by_hand(config, by_hand);
	conf_free(by_hand);
	if (!ret)
		config->keeper = conf_get(config->root, "keeper") ? settings.keeper
								  : config_has_device(config);
	if (!ret)
		ret = take_user(config, &settings, err);
	if (!ret)
		ret = check_all(config, err);
	if (!ret && settings.reactors)
		config->reactor_count = (unsigned)settings.reactors;
	else
		config->reactor_count = (unsigned)MAX(
			MIN(cpu_count(), config->export_count), (size_t)1);
	return ret;
}

int config_parse_snippet(
	const char *name, const char *content, struct conf **group, struct err *err)
{
	struct config_text text;
	int ret = config_text_take(&text, name, content, err);

	*group = NULL;
	if (!ret)
		ret = parse(&text, group, err);
	config_text_fini(&text);
	return ret;
}

struct config_export *config_export_get(struct config_export *export)
{
	export->references++;
	return export;
}

void config_export_put(struct config_export *export)
{
	if (!export || --export->references)
		return;
	access_fini(&export->access);
	conf_free(export->conf);
	free(export);
}

static void config_fini(struct config *config)
{
	conf_free(config->root);
	for (size_t i = 0; i < config->listen_count; i++)
		access_fini(&config->listen[i].access);
	for (size_t i = 0; i < config->export_count; i++)
		config_export_put(config->exports[i]);
	free(config->listen);
	free(config->control);
	free(config->exports);
	free(config->path);
}

/* Where the first word of content begins, behind spaces and comments. */
static const char *first_word(const char *content)
{
	const char *end;

	for (;;) {
		content += strspn(content, " \t\r\n");
		if (*content == '#' || !strncmp(content, "//", 2))
			end = strchr(content, '\n');
		else if (!strncmp(content, "/*", 2))
			end = strstr(content + 2, "*/") ? strstr(content + 2, "*/") + 1 : NULL;
		else
			return content;
		if (!end)
			return content + strlen(content);
		content = end + 1;
	}
}

/* The content as a config file with nothing but the list of exports. The caller frees it. */
static char *as_config(const char *content)
{
	const char *word = first_word(content), *before = "exports = ( { ", *behind = "} );";
	char *text;

	if (*word == '{') {
		before = "exports = ( ";
		behind = ");";
	} else if (!strncmp(word, "exports", 7) && strchr(" \t\r\n=:", word[7])) {
		before = behind = "";
	}
	/* The end on a line of its own: the last one may be a comment. */
	if (asprintf(&text, "%s%s\n%s", before, content, behind) < 0)
		abort();
	return text;
}

int config_parse_export(
	const char *name, const char *content, struct config_export **export, struct err *err)
{
	CLEANUP(free) char *text = as_config(content);
	struct config config = {};
	int ret = config_parse_snippet(name, text, &config.root, err);

	*export = NULL;
	if (ret)
		return ret;
	const struct conf *exports = conf_get(config.root, "exports");
	if (config.root->item_count != 1 || !exports || exports->type != CONF_LIST ||
		exports->item_count != 1)
		ret = err_set(err, EINVAL,
			"%s: expected the settings of one export and nothing else: name, stack, "
			"...",
			name);
	else
		ret = take_exports(&config, (struct conf *)exports, err);
	if (!ret)
		ret = config_check_files(config.exports, config.export_count, err);
	if (!ret)
		*export = config_export_get(config.exports[0]);
	config_fini(&config);
	return ret;
}

static int load_new(const char *path, const char *content, struct config **loaded, struct err *err)
{
	struct config *config = calloc(1, sizeof(*config));

	if (!config || !(config->path = strdup(path)))
		abort();
	int ret = load(config, content, err);
	if (ret) {
		config_free(config);
		config = NULL;
	}
	*loaded = config;
	return ret;
}

int config_load(const char *path, struct config **loaded, struct err *err)
{
	return load_new(path, NULL, loaded, err);
}

int config_load_written(
	const char *path, const char *content, struct config **loaded, struct err *err)
{
	return load_new(path, content, loaded, err);
}

void config_drop_export(struct config *config, const char *name)
{
	for (size_t i = 0; i < config->export_count; i++) {
		if (strcmp(config->exports[i]->name, name))
			continue;
		config_export_put(config->exports[i]);
		config->export_count--;
		memmove(config->exports + i, config->exports + i + 1,
			(config->export_count - i) * sizeof(struct config_export *));
		return;
	}
}

void config_free(struct config *config)
{
	if (!config)
		return;
	config_fini(config);
	free(config);
}
