/*
 * The write-intent log on the disk. All numbers are big-endian.
 *
 *	sector 0	the header
 *	sector 1 + n	the bits of regions n * 4032 .. n * 4032 + 4031
 *
 * A sector has 512 bytes, and is written whole; a device that tears one is found out by its checksum. A set bit
 * says: the legs may differ in this region, [i * region_size, (i + 1) * region_size). It is durable before the
 * first leg is written, and cleared, at leisure, when both are the same there and both durable.
 */
#pragma once

#include <assert.h>

#include "base/endian.h"

#define LOG_SECTOR          512U
#define LOG_MAGIC           "BSMIRLOG"
#define LOG_VERSION         1
#define LOG_WORDS           63U /* of 64 bits, in a sector */
#define LOG_SECTOR_REGIONS  (LOG_WORDS * 64)
#define LOG_REGIONS_MAX     65536U
#define LOG_MAP_SECTORS_MAX ((LOG_REGIONS_MAX + LOG_SECTOR_REGIONS - 1) / LOG_SECTOR_REGIONS)
#define LOG_SIZE            (16U << 10) /* of a new file; what a log needs at most, and some */

enum log_state {
	LOG_IN_USE = 0, /* the bits tell the truth */
	LOG_PROMOTED =
		1,     /* the secondary was made the primary: this mirror must not run as it was */
	LOG_ENDED = 2, /* the legs went separate ways: everything may differ */
	LOG_TURNED =
		3, /* in use, since a promotion turned the mirror round: not with the roles from before */
};

struct log_header {
	char magic[8];
	be32 version;
	be32 state;       /* enum log_state */
	be64 size;        /* of the disk, bytes */
	be64 region_size; /* bytes, a power of two */
	be64 region_count;
	be64 identity;         /* a hash of the secondary's configuration */
	be64 primary_identity; /* and of the primary's */
	uint8_t reserved[LOG_SECTOR - 60];
	be32 checksum; /* CRC-32 (as zlib's) of all before it */
};

struct log_map {
	be32 checksum; /* of all behind it */
	be32 index;    /* n, of sector 1 + n */
	be64 words[LOG_WORDS];
};

static_assert(sizeof(struct log_header) == LOG_SECTOR, "a sector");
static_assert(sizeof(struct log_map) == LOG_SECTOR, "a sector");
static_assert((1 + LOG_MAP_SECTORS_MAX) * LOG_SECTOR <= LOG_SIZE, "room for the largest map");
