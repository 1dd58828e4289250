/*
 * qcow2 on disk: structs, bits and limits, nothing else.
 *
 * Source: QEMU's docs/interop/qcow2 ("the format"); the section is named where a rule needs one. All
 * numbers are big-endian. Clusters are the unit of allocation; host offsets are offsets in the image
 * file, guest offsets are offsets in the disk it describes.
 */
#pragma once

#include <assert.h>

#include "base/endian.h"

#define QCOW_MAGIC UINT32_C(0x514649fb) /* "QFI\xfb" */

/* Format, "Header". Version 2 ends after snapshots_off. */
struct qcow_disk_header {
	be32 magic;
	be32 version;
	be64 backing_name_off;
	be32 backing_name_len;
	be32 cluster_bits;
	be64 size;
	be32 crypt_method;
	be32 l1_entry_count;
	be64 l1_off;
	be64 refcount_table_off;
	be32 refcount_table_clusters;
	be32 snapshot_count;
	be64 snapshots_off;
	be64 incompatible;
	be64 compatible;
	be64 autoclear;
	be32 refcount_order;
	be32 header_len;
	uint8_t compression; /* present when header_len > 104 */
	uint8_t padding[7];
};
static_assert(sizeof(struct qcow_disk_header) == 112, "the header is 72, 104 or 112 bytes");

#define QCOW_HEADER_LEN_V2 72
#define QCOW_HEADER_LEN_V3 104

enum qcow_incompatible {
	QCOW_INCOMPAT_DIRTY = 1 << 0,
	QCOW_INCOMPAT_CORRUPT = 1 << 1,
	QCOW_INCOMPAT_DATA_FILE = 1 << 2,
	QCOW_INCOMPAT_COMPRESSION = 1 << 3,
	QCOW_INCOMPAT_EXTENDED_L2 = 1 << 4,
	QCOW_INCOMPAT_KNOWN = (1 << 5) - 1,
};
enum qcow_compatible { QCOW_COMPAT_LAZY_REFCOUNTS = 1 << 0 };
enum qcow_autoclear { QCOW_AUTOCLEAR_BITMAPS = 1 << 0, QCOW_AUTOCLEAR_RAW_DATA_FILE = 1 << 1 };
enum qcow_compression { QCOW_COMPRESSION_ZLIB = 0, QCOW_COMPRESSION_ZSTD = 1 };

/* Format, "Header extensions": type, length, data padded to 8 bytes. */
struct qcow_disk_extension {
	be32 type;
	be32 len;
};
#define QCOW_EXT_END            UINT32_C(0x00000000)
#define QCOW_EXT_BACKING_FORMAT UINT32_C(0xe2792aca)
#define QCOW_EXT_FEATURE_TABLE  UINT32_C(0x6803f857)
#define QCOW_EXT_BITMAPS        UINT32_C(0x23852875)
#define QCOW_EXT_ENCRYPTION     UINT32_C(0x0537be77)
#define QCOW_EXT_DATA_FILE      UINT32_C(0x44415441)

/* Format, "Feature name table". */
struct qcow_disk_feature {
	uint8_t kind; /* 0 incompatible, 1 compatible, 2 autoclear */
	uint8_t bit;
	char name[46]; /* padded with zeroes, not always ended by one */
};
static_assert(sizeof(struct qcow_disk_feature) == 48, "feature name table entry");

/* Format, "Bitmaps extension". */
struct qcow_disk_bitmaps {
	be32 bitmap_count;
	be32 reserved;
	be64 directory_len;
	be64 directory_off;
};
static_assert(sizeof(struct qcow_disk_bitmaps) == 24, "bitmaps extension");

/* Format, "Bitmap directory". Followed by extra data, the name, padding to 8 bytes. */
struct qcow_disk_bitmap {
	be64 table_off;
	be32 table_entry_count;
	be32 flags;
	uint8_t type;
	uint8_t granularity_bits;
	be16 name_len;
	be32 extra_data_len;
};
static_assert(sizeof(struct qcow_disk_bitmap) == 24, "bitmap directory entry");

/* Format, "Snapshots". Followed by extra data, the id, the name, padding to 8 bytes. */
struct qcow_disk_snapshot {
	be64 l1_off;
	be32 l1_entry_count;
	be16 id_len;
	be16 name_len;
	be32 time_s;
	be32 time_ns;
	be64 vm_clock_ns;
	be32 vm_state_len;
	be32 extra_data_len;
};
static_assert(sizeof(struct qcow_disk_snapshot) == 40, "snapshot table entry");

/* The extra data this program knows; version 3 demands both. */
struct qcow_disk_snapshot_extra {
	be64 vm_state_len;
	be64 disk_size;
};

/* L1 entries, L2 entries, refcount table entries. */
#define QCOW_ENTRY_COPIED      (UINT64_C(1) << 63) /* L1, L2: the refcount is exactly one */
#define QCOW_ENTRY_COMPRESSED  (UINT64_C(1) << 62) /* L2 */
#define QCOW_ENTRY_ZERO        (UINT64_C(1) << 0)  /* L2, version 3, not with extended entries */
#define QCOW_ENTRY_OFF_MASK    UINT64_C(0x00fffffffffffe00) /* bits 9-55 */
#define QCOW_REFTABLE_OFF_MASK UINT64_C(0xfffffffffffffe00) /* bits 9-63 */
#define QCOW_SUBCLUSTERS       32                           /* with extended entries */

/* What this program takes; the same as QEMU's limits where it has one. */
#define QCOW_CLUSTER_BITS_MIN          9
#define QCOW_CLUSTER_BITS_MAX          21
#define QCOW_EXTENDED_CLUSTER_BITS_MIN 14
#define QCOW_L1_LEN_MAX_BYTES          (32U << 20)
#define QCOW_REFTABLE_LEN_MAX_BYTES    (8U << 20)
#define QCOW_SNAPSHOTS_MAX             65536
#define QCOW_SNAPSHOT_TABLE_MAX_BYTES  (64U << 20)
#define QCOW_SNAPSHOT_EXTRA_MAX_BYTES  1024
#define QCOW_BACKING_NAME_MAX_BYTES    1023
#define QCOW_BACKING_DEPTH_MAX         64 /* each level opens the next one on the same stack */
#define QCOW_HOST_OFF_MAX              (UINT64_C(1) << 56)
