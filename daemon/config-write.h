/*
 * Values and whole configs as texts that config.c reads: for records, and for the next server.
 */
#pragma once

#include <stdio.h>

#include "daemon/config.h"

/* A setting that no file has: the names of exports that came by hand. */
#define CONFIG_BY_HAND "by-hand"

/* A text in quotes. */
void config_write_text(const char *text, FILE *out);
void config_write_value(const struct conf *value, FILE *out);

/*
 * The two halves of what config_load_written() takes, each value with the place it came from: what the file says but for the
 * exports; and exports, of which those by hand are marked so.
 */
void config_write_settings(const struct config *config, FILE *out);

struct config_written_export {
	const struct config_export *config;
	bool by_hand;
};
void config_write_exports(const struct config_written_export *exports, size_t count, FILE *out);
