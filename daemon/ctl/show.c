/*
 * Tables for people: `list` in one line per export, `status` as a tree with counters.
 *
 * Everything fits in 80 columns unless names are long. What an answer lacks shows as "?" or 0: the
 * daemon may be older or newer than this command.
 */
#include <langinfo.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/units.h"
#include "base/util.h"
#include "daemon/ctl/ctl.h"

#define LINE_COLUMNS     80
#define NAME_COLUMNS     22 /* of the tree in `status` */
#define PREFIX_MAX_BYTES 128
#define AMOUNT_TEXT_LEN  16

/* --- pieces ----------------------------------------------------------------------------------- */

void show_json(const json_t *value)
{
	json_dumpf(value, stdout, JSON_INDENT(2));
	putchar('\n');
}

static const char *get_text(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "?";
}

static uint64_t get_number(const json_t *object, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(object, key));
}

static bool get_flag(const json_t *object, const char *key)
{
	return json_is_true(json_object_get(object, key));
}

/* Columns that text takes on a terminal: UTF-8 continuation bytes take none. */
static int columns_of(const char *text)
{
	int columns = 0;

	for (; *text; text++)
		columns += (*text & 0xc0) != 0x80;
	return columns;
}

/* Text, then blanks up to that many columns. */
static void print_padded(const char *text, int columns)
{
	printf("%s%*s", text, MAX(columns - columns_of(text), 0), "");
}

/* Three digits and a prefix: "4.61 GiB" (unit 1024, of bytes) or "12.3M" (unit 1000, of things). */
static const char *format_amount(uint64_t amount, unsigned unit, char text[AMOUNT_TEXT_LEN])
{
	static const char prefixes[] = " KMGTPE";
	double value = (double)amount;
	size_t power = 0;

	while (value >= unit - 0.5) {
		value /= unit;
		power++;
	}
	int decimals = !power || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
	if (unit == 1024)
		snprintf(text, AMOUNT_TEXT_LEN, "%.*f %.*s%s", decimals, value, power ? 1 : 0,
			prefixes + power, power ? "iB" : "B");
	else
		snprintf(text, AMOUNT_TEXT_LEN, "%.*f%.*s", decimals, value, power ? 1 : 0,
			prefixes + power);
	return text;
}

/* A count: in full while it fits. */
static const char *format_count(uint64_t count, char text[AMOUNT_TEXT_LEN])
{
	if (count >= 1000000)
		return format_amount(count, 1000, text);
	snprintf(text, AMOUNT_TEXT_LEN, "%llu", (unsigned long long)count);
	return text;
}

/* --- list ------------------------------------------------------------------------------------- */

static void show_list_line(const json_t *export, int name_columns, int device_columns)
{
	char size[UNITS_SIZE_TEXT_LEN];
	const char *device = json_string_value(json_object_get(export, "device"));
	const json_t *layers = json_object_get(export, "layers"), *layer;
	size_t i;

	print_padded(get_text(export, "name"), name_columns);
	printf("  %10s  %-4s  ", units_format_size(get_number(export, "size"), size),
		get_flag(export, "read_only") ? "ro" : "rw");
	print_padded(device ? device : "-", device_columns);
	printf("  %7llu  ", (unsigned long long)get_number(export, "clients"));
	json_array_foreach(layers, i, layer)
		printf("%s%s", i ? ", " : "", json_string_value(layer));
	putchar('\n');
}

void show_list(const json_t *exports)
{
	int name_columns = 4, device_columns = 6;
	const json_t *export;
	size_t i;

	json_array_foreach(exports, i, export)
	{
		name_columns = MAX(name_columns, columns_of(get_text(export, "name")));
		if (json_is_string(json_object_get(export, "device")))
			device_columns = MAX(
				device_columns, columns_of(get_text(export, "device")));
	}
	print_padded("NAME", name_columns);
	printf("  %10s  MODE  ", "SIZE");
	print_padded("DEVICE", device_columns);
	printf("  CLIENTS  LAYERS\n");
	json_array_foreach(exports, i, export) show_list_line(export, name_columns, device_columns);
}

/* --- clients ---------------------------------------------------------------------------------- */

/* "45 s", "12 min", "5 h", "30 d" */
static const char *format_age(uint64_t seconds, char text[AMOUNT_TEXT_LEN])
{
	static const struct {
		uint64_t seconds;
		const char *unit;
	} units[] = { { 86400, "d" }, { 3600, "h" }, { 60, "min" }, { 1, "s" } };
	size_t i = 0;

	while (i + 1 < ARRAY_LEN(units) && seconds < 2 * units[i].seconds)
		i++;
	snprintf(text, AMOUNT_TEXT_LEN, "%llu %s", (unsigned long long)(seconds / units[i].seconds),
		units[i].unit);
	return text;
}

static uint64_t sum_requests(json_t *requests)
{
	const char *key;
	json_t *traffic;
	uint64_t sum = 0;

	json_object_foreach(requests, key, traffic) sum += get_number(traffic, "requests");
	return sum;
}

static const char *client_export(const json_t *client)
{
	const char *name = json_string_value(json_object_get(client, "export"));

	return name ? name : "-";
}

static void show_client(const json_t *client, int export_columns)
{
	json_t *requests = json_object_get(client, "requests");
	const char *tls = get_text(client, "tls");
	char text[4][AMOUNT_TEXT_LEN];

	printf("%6llu  ", (unsigned long long)get_number(client, "id"));
	print_padded(client_export(client), export_columns);
	printf("  %6s  %8s  %8s  %8s  %6llu  %s%s%s%s\n",
		format_age(get_number(client, "connected_seconds"), text[0]),
		format_count(sum_requests(requests), text[1]),
		format_amount(
			get_number(json_object_get(requests, "read"), "bytes"), 1024, text[2]),
		format_amount(
			get_number(json_object_get(requests, "write"), "bytes"), 1024, text[3]),
		(unsigned long long)get_number(client, "in_flight"), get_text(client, "peer"),
		get_flag(client, "read_only") ? ", read-only" : "", *tls ? ", " : "", tls);
}

void show_clients(const json_t *clients)
{
	int export_columns = 6;
	const json_t *client;
	size_t i;

	json_array_foreach(clients, i, client)
		export_columns = MAX(export_columns, columns_of(client_export(client)));
	printf("%6s  ", "ID");
	print_padded("EXPORT", export_columns);
	printf("  %6s  %8s  %8s  %8s  %6s  %s\n", "SINCE", "REQUESTS", "READ", "WRITTEN", "FLIGHT",
		"CLIENT");
	json_array_foreach(clients, i, client) show_client(client, export_columns);
}

/* --- status: rows of the table ---------------------------------------------------------------- */

static void show_header(void)
{
	print_padded("", NAME_COLUMNS);
	printf("%9s %6s %9s %6s %9s %7s %6s\n", "SIZE", "READS", "READ", "WRITES", "WRITTEN",
		"FLUSHES", "ERRORS");
}

/* requests: an object with read, write and flush, each with requests and bytes. */
static void show_row(const char *prefix, const char *name, const char *size, const json_t *requests,
	uint64_t errors)
{
	const json_t *read = json_object_get(requests, "read");
	const json_t *write = json_object_get(requests, "write");
	const json_t *flush = json_object_get(requests, "flush");
	char text[6][AMOUNT_TEXT_LEN];

	fputs(prefix, stdout);
	print_padded(name, NAME_COLUMNS - columns_of(prefix));
	printf("%9s %6s %9s %6s %9s %7s %6s\n", size,
		format_count(get_number(read, "requests"), text[0]),
		format_amount(get_number(read, "bytes"), 1024, text[1]),
		format_count(get_number(write, "requests"), text[2]),
		format_amount(get_number(write, "bytes"), 1024, text[3]),
		format_count(get_number(flush, "requests"), text[4]),
		format_count(errors, text[5]));
}

static uint64_t sum_errors(json_t *counters)
{
	const char *key;
	json_t *count;
	uint64_t errors = 0;

	json_object_foreach(counters, key, count) errors += get_number(count, "errors");
	return errors;
}

/* --- status: what stands below a layer -------------------------------------------------------- */

/* A paragraph with a prefix before each line, broken between words. */
struct paragraph {
	const char *prefix;
	int column; /* 0: no line begun */
};

static void end_paragraph(struct paragraph *paragraph)
{
	if (paragraph->column)
		putchar('\n');
	paragraph->column = 0;
}

static void add_word(struct paragraph *paragraph, const char *word)
{
	if (paragraph->column && paragraph->column + 1 + columns_of(word) >= LINE_COLUMNS)
		end_paragraph(paragraph);
	const char *before = paragraph->column ? " " : paragraph->prefix;
	printf("%s%s", before, word);
	paragraph->column += columns_of(before) + columns_of(word);
}

static bool ends_with(const char *text, const char *end)
{
	size_t text_len = strlen(text), end_len = strlen(end);

	return text_len >= end_len && !strcmp(text + text_len - end_len, end);
}

/* "path /srv/disk.img", "lock": false and what is no plain value is left to --json. */
static bool format_detail(const char *key, const json_t *value, char *text, size_t max_bytes)
{
	char size[UNITS_SIZE_TEXT_LEN];

	if (json_is_true(value))
		snprintf(text, max_bytes, "%s", key);
	else if (json_is_string(value))
		snprintf(text, max_bytes, "%s %s", key, json_string_value(value));
	else if (json_is_integer(value) && (ends_with(key, "bytes") || ends_with(key, "size")))
		snprintf(text, max_bytes, "%s %s", key,
			units_format_size((uint64_t)json_integer_value(value), size));
	else if (json_is_integer(value))
		snprintf(text, max_bytes, "%s %lld", key, (long long)json_integer_value(value));
	else
		return false;
	return true;
}

static void show_details(const char *prefix, json_t *details)
{
	struct paragraph paragraph = { .prefix = prefix };
	char text[4200]; /* a path has up to 4096 bytes */
	size_t left = 0;
	const char *key;
	json_t *value;

	json_object_foreach(details, key, value)
		left += format_detail(key, value, text, sizeof(text));
	json_object_foreach(details, key, value)
	{
		if (!format_detail(key, value, text, sizeof(text) - 1))
			continue;
		if (--left)
			strcat(text, ",");
		add_word(&paragraph, text);
	}
	end_paragraph(&paragraph);
}

static void show_last_error(const char *prefix, const json_t *error)
{
	time_t when = (time_t)get_number(error, "time");
	char time_text[32] = "?", size[UNITS_SIZE_TEXT_LEN];
	struct tm tm;

	if (!json_is_object(error))
		return;
	if (localtime_r(&when, &tm))
		strftime(time_text, sizeof(time_text), "%F %T", &tm);
	printf("%slast error: %s", prefix, get_text(error, "op"));
	if (get_number(error, "len"))
		printf(" of %s at %llu", units_format_size(get_number(error, "len"), size),
			(unsigned long long)get_number(error, "off"));
	printf(": %s, %s\n", get_text(error, "text"), time_text);
}

/* --- status: the tree ------------------------------------------------------------------------- */

struct tree_style {
	const char *branch, *last, *line, *blank;
};

static const struct tree_style *tree_style(void)
{
	static const struct tree_style utf8 = { "├─ ", "└─ ", "│  ", "   " };
	static const struct tree_style ascii = { "|- ", "`- ", "|  ", "   " };

	return strcmp(nl_langinfo(CODESET), "UTF-8") ? &ascii : &utf8;
}

/* prefix: of the layer's own line; below: what its children's lines begin with. */
static void show_layer(const json_t *layer, const char *prefix, const char *below)
{
	const struct tree_style *style = tree_style();
	json_t *children = json_object_get(layer, "children"), *child;
	json_t *counters = json_object_get(layer, "counters");
	char text[PREFIX_MAX_BYTES], child_below[PREFIX_MAX_BYTES], size[AMOUNT_TEXT_LEN];
	size_t i;

	show_row(prefix, get_text(layer, "layer"),
		format_amount(get_number(layer, "size"), 1024, size), counters,
		sum_errors(counters));
	snprintf(text, sizeof(text), "%s%s  ", below,
		json_array_size(children) ? style->line : style->blank);
	show_details(text, json_object_get(layer, "details"));
	show_last_error(text, json_object_get(layer, "last_error"));
	json_array_foreach(children, i, child)
	{
		bool is_last = i + 1 == json_array_size(children);
		snprintf(text, sizeof(text), "%s%s", below, is_last ? style->last : style->branch);
		snprintf(child_below, sizeof(child_below), "%s%s", below,
			is_last ? style->blank : style->line);
		show_layer(child, text, child_below);
	}
}

static void show_kernel(const json_t *kernel)
{
	if (!json_is_object(kernel))
		return;
	printf("  kernel device %s, %s", get_text(kernel, "device"), get_text(kernel, "state"));
	if (json_is_string(json_object_get(kernel, "reason")))
		printf(": %s", get_text(kernel, "reason"));
	printf(", by %s, blocks of %llu B", get_text(kernel, "mode"),
		(unsigned long long)get_number(kernel, "block_size"));
	if (get_number(kernel, "connections") > 1)
		printf(", %llu connections", (unsigned long long)get_number(kernel, "connections"));
	if (get_number(kernel, "timeout"))
		printf(", requests may take %llu s",
			(unsigned long long)get_number(kernel, "timeout"));
	putchar('\n');
}

/* "latency  read: half within 16 us, 99 % within 64 us, all within 1.0 ms" */
static void show_latency_line(const char *door, json_t *latency)
{
	char text[3][CTL_LATENCY_TEXT_LEN];
	const char *kind;
	json_t *counts;

	json_object_foreach(latency, kind, counts)
	{
		if (json_array_size(counts))
			printf("  %s: %s: half within %s, 99 %% within %s, all within %s\n", door,
				kind,
				ctl_format_latency(ctl_latency_quantile(counts, 500), text[0]),
				ctl_format_latency(ctl_latency_quantile(counts, 990), text[1]),
				ctl_format_latency(json_array_size(counts) - 1, text[2]));
	}
}

static void show_record(const json_t *record)
{
	time_t time = (time_t)get_number(record, "time");
	char text[32];
	struct tm tm;

	if (!json_is_object(record))
		return;
	strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", localtime_r(&time, &tm));
	printf("  not what the config says, but as \"%s\" left it on %s; remembered in %s\n",
		get_text(record, "reason"), text, get_text(record, "file"));
}

static void show_status(const json_t *status)
{
	const json_t *export = json_object_get(status, "export");
	const json_t *nbd = json_object_get(status, "nbd");
	uint64_t connections = get_number(nbd, "connections");
	const char *description = get_text(export, "description");
	char text[UNITS_SIZE_TEXT_LEN], name[64];

	printf("%s: %s", get_text(export, "name"),
		units_format_size(get_number(export, "size"), text));
	if (get_number(export, "block_size") > 1)
		printf(", blocks of %s", units_format_size(get_number(export, "block_size"), text));
	printf("%s\n", get_flag(export, "read_only") ? ", read-only" : "");
	if (*description)
		printf("  %s\n", description);
	show_record(json_object_get(status, "record"));
	show_kernel(json_object_get(status, "kernel"));
	if (get_number(nbd, "oldest_seconds"))
		printf("  %llu request%s in the disk, the oldest for %llu s%s\n",
			(unsigned long long)get_number(nbd, "running"),
			get_number(nbd, "running") == 1 ? "" : "s",
			(unsigned long long)get_number(nbd, "oldest_seconds"),
			get_number(nbd, "stuck_seconds") ? ": STUCK" : "");
	show_header();
	snprintf(name, sizeof(name), "NBD, %llu connection%s", (unsigned long long)connections,
		connections == 1 ? "" : "s");
	show_row("", name, "", json_object_get(nbd, "requests"), get_number(nbd, "errors"));
	show_latency_line("clients", json_object_get(nbd, "latency"));
	show_latency_line("kernel", json_object_get(nbd, "kernel_latency"));
	show_layer(json_object_get(status, "stack"), "", "");
}

void show_statuses(const json_t *exports)
{
	const json_t *status;
	size_t i;

	setlocale(LC_CTYPE, "");
	json_array_foreach(exports, i, status)
	{
		if (i)
			putchar('\n');
		show_status(status);
	}
}

/* --- the door --------------------------------------------------------------------------------- */

/* "0" as what it means. */
static const char *format_limit(uint64_t number, const char *unit, char text[32])
{
	if (number)
		snprintf(text, 32, "%llu%s", (unsigned long long)number, unit);
	else
		snprintf(text, 32, "no limit");
	return text;
}

static void show_limits(const json_t *limits)
{
	char peer[32], idle[32], buffer[UNITS_SIZE_TEXT_LEN], export_buffer[UNITS_SIZE_TEXT_LEN];

	printf("  limits: %llu connections, per peer: %s; handshake %llu s, %llu options; idle: "
	       "%s\n",
		(unsigned long long)get_number(limits, "max_connections"),
		format_limit(get_number(limits, "max_connections_per_peer"), "", peer),
		(unsigned long long)get_number(limits, "handshake_timeout"),
		(unsigned long long)get_number(limits, "handshake_options"),
		format_limit(get_number(limits, "idle_timeout"), " s", idle));
	printf("  in flight: %llu requests, %s on a connection; %llu, %s of an export\n",
		(unsigned long long)get_number(limits, "max_requests"),
		units_format_size(get_number(limits, "max_buffer"), buffer),
		(unsigned long long)get_number(limits, "export_max_requests"),
		units_format_size(get_number(limits, "export_max_buffer"), export_buffer));
}

void show_door(const json_t *door)
{
	const json_t *listeners = json_object_get(door, "listeners"), *listener;
	size_t i;

	if (!json_is_object(door))
		return;
	printf("\nNBD clients: %llu connected; %llu came in, %llu refused, %llu failed at TLS%s\n",
		(unsigned long long)get_number(door, "clients"),
		(unsigned long long)get_number(door, "accepted"),
		(unsigned long long)get_number(door, "refused"),
		(unsigned long long)get_number(door, "tls_failures"),
		get_flag(door, "debug") ? "; the protocol is logged" : "");
	json_array_foreach(listeners, i, listener) printf("  %s, %llu client%s, TLS %s%s\n",
		get_text(listener, "address"), (unsigned long long)get_number(listener, "clients"),
		get_number(listener, "clients") == 1 ? "" : "s", get_text(listener, "tls"),
		get_flag(listener, "read_only") ? ", read-only" : "");
	show_limits(json_object_get(door, "limits"));
}
