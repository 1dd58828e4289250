/*
 * What a config file says, as a small tree for people; the output of blkstackd --check.
 *
 *	db  on /dev/nbd0
 *	└─ padded  align = "4K"
 *	   └─ file  path = "/srv/db.img"
 */
#include <inttypes.h>

#include "daemon/kernel-dev.h"
#include "daemon/config.h"

#define STEP_COLUMNS 3 /* the width of "└─ " */

static void print_value(const struct conf *value, FILE *out)
{
	switch (value->type) {
	case CONF_BOOL:
		fputs(value->boolean ? "true" : "false", out);
		break;
	case CONF_INT:
		fprintf(out, "%" PRId64, value->integer);
		break;
	case CONF_STRING:
		fprintf(out, "\"%s\"", value->string);
		break;
	case CONF_LIST:
	case CONF_GROUP:
		fputs("(", out);
		for (size_t i = 0; i < value->item_count; i++) {
			fputs(i ? ", " : "", out);
			print_value(value->items[i], out);
		}
		fputs(")", out);
		break;
	}
}

/* An item that is a stack of its own, like a mirror's secondary. */
static bool is_stack(const struct conf *item)
{
	return item->type == CONF_LIST && item->item_count && item->items[0]->type == CONF_GROUP;
}

static void print_stack(const struct conf *stack, int columns, FILE *out);

static void print_layer(const struct conf *layer, int columns, FILE *out)
{
	const struct conf *kind = conf_get(layer, "layer");

	fprintf(out, "%*s└─ %s", columns, "", kind->string);
	for (size_t i = 0; i < layer->item_count; i++) {
		const struct conf *item = layer->items[i];
		if (item == kind || is_stack(item))
			continue;
		fprintf(out, "  %s = ", item->name);
		print_value(item, out);
	}
	fputc('\n', out);
	for (size_t i = 0; i < layer->item_count; i++) {
		const struct conf *item = layer->items[i];
		if (!is_stack(item))
			continue;
		fprintf(out, "%*s%s:\n", columns + STEP_COLUMNS, "", item->name);
		print_stack(item, columns + STEP_COLUMNS, out);
	}
}

static void print_stack(const struct conf *stack, int columns, FILE *out)
{
	for (size_t i = 0; i < stack->item_count; i++)
		print_layer(stack->items[i], columns + (int)i * STEP_COLUMNS, out);
}

static void print_export(const struct config_export *export, FILE *out)
{
	fprintf(out, "\n%s", export->name);
	if (*export->device)
		fprintf(out, "  device %s%s", export->device,
			export->device_mode == KERNEL_DEV_NETLINK ? " by netlink" : "");
	if (export->read_only)
		fputs("  read-only", out);
	if (*export->description)
		fprintf(out, "  \"%s\"", export->description);
	fputc('\n', out);
	print_stack(export->stack, 0, out);
}

static void print_listen(const struct config_listen *listen, FILE *out)
{
	static const char *const tls_texts[] = { [NBD_TLS_OFF] = "",
		[NBD_TLS_ON] = "  TLS if asked for",
		[NBD_TLS_REQUIRED] = "  TLS" };

	fprintf(out, "listen   %s%s%s\n", listen->address, tls_texts[listen->tls],
		listen->read_only ? "  read-only" : "");
}

void config_print(const struct config *config, FILE *out)
{
	fprintf(out, "%s: no errors, %zu export%s\n", config->path, config->export_count,
		config->export_count == 1 ? "" : "s");
	fprintf(out, "control  %s\n", *config->control ? config->control : "none");
	for (size_t i = 0; i < config->listen_count; i++)
		print_listen(&config->listen[i], out);
	for (size_t i = 0; i < config->export_count; i++)
		print_export(config->exports[i], out);
}
