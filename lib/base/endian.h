/*
 * Big-endian fields of on-disk and on-wire structs, as types that cannot be used unswapped.
 * The structs are packed by construction: every field is an array of bytes, alignment 1.
 */
#pragma once

#include <stdint.h>
#include <string.h>

typedef struct be16 {
	uint8_t bytes[2];
} be16;
typedef struct be32 {
	uint8_t bytes[4];
} be32;
typedef struct be64 {
	uint8_t bytes[8];
} be64;

#define ENDIAN_DEFINE(bits)                                                                     \
	static inline uint##bits##_t be##bits##_get(be##bits field)                             \
	{                                                                                       \
		uint##bits##_t raw;                                                             \
		memcpy(&raw, field.bytes, sizeof(raw));                                         \
		return (uint##bits##_t)(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__               \
						? __builtin_bswap##bits(raw)                    \
						: raw);                                         \
	}                                                                                       \
	static inline be##bits be##bits##_make(uint##bits##_t value)                            \
	{                                                                                       \
		be##bits field;                                                                 \
		uint##bits##_t raw = (uint##bits##_t)(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ \
							      ? __builtin_bswap##bits(value)    \
							      : value);                         \
		memcpy(field.bytes, &raw, sizeof(raw));                                         \
		return field;                                                                   \
	}

ENDIAN_DEFINE(16)
ENDIAN_DEFINE(32)
ENDIAN_DEFINE(64)
#undef ENDIAN_DEFINE
