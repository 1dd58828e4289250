/*
 * Sizes as people write them: "512", "4K", "10G", "1.5T" (powers of 1024; KiB and kB forms too).
 */
#pragma once

#include <stdint.h>

#include "base/err.h"

/* Parses text into *size_bytes. Suffixes B K M G T P E, either case, an optional "iB" or "B" after. */
int units_parse_size(const char *text, uint64_t *size_bytes, struct err *err);

#define UNITS_SIZE_TEXT_LEN 24
/* Writes "4 KiB", "1.5 GiB", "1000001 B": exact when short, otherwise to two decimals. Returns text. */
char *units_format_size(uint64_t size_bytes, char text[UNITS_SIZE_TEXT_LEN]);
