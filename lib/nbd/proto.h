/*
 * NBD on the wire. Everything is big-endian; the structs have no padding. The words in quotes are the
 * section titles of the specification, NBD's doc/proto.md; extended headers are specified in that file's
 * branch extension-ext-header, under the same titles.
 */
#pragma once

#include "base/endian.h"

#define NBD_STRING_MAX_BYTES 4096 /* "Conventions": names, descriptions, error texts */

/* --- handshake: "Newstyle negotiation", "Fixed newstyle negotiation" -------------------------- */

#define NBD_MAGIC              UINT64_C(0x4e42444d41474943) /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC       UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_OPTION_REPLY_MAGIC UINT64_C(0x0003e889045565a9)

/* "Handshake flags", and the client's answer, "Client flags" */
#define NBD_FLAG_FIXED_NEWSTYLE   (1 << 0)
#define NBD_FLAG_NO_ZEROES        (1 << 1)
#define NBD_FLAG_C_FIXED_NEWSTYLE (1U << 0)
#define NBD_FLAG_C_NO_ZEROES      (1U << 1)

/* The server speaks first. */
struct nbd_greeting {
	be64 magic;        /* NBD_MAGIC */
	be64 option_magic; /* NBD_OPTION_MAGIC */
	be16 flags;
};
_Static_assert(sizeof(struct nbd_greeting) == 18, "as on the wire");

struct nbd_option_header {
	be64 magic; /* NBD_OPTION_MAGIC */
	be32 option;
	be32 len; /* of the data that follows */
};
_Static_assert(sizeof(struct nbd_option_header) == 16, "as on the wire");

/* "Option types" */
enum nbd_option {
	NBD_OPT_EXPORT_NAME = 1,
	NBD_OPT_ABORT = 2,
	NBD_OPT_LIST = 3,
	NBD_OPT_STARTTLS = 5,
	NBD_OPT_INFO = 6,
	NBD_OPT_GO = 7,
	NBD_OPT_STRUCTURED_REPLY = 8,
	NBD_OPT_LIST_META_CONTEXT = 9,
	NBD_OPT_SET_META_CONTEXT = 10,
	NBD_OPT_EXTENDED_HEADERS = 11,
};

struct nbd_option_reply {
	be64 magic; /* NBD_OPTION_REPLY_MAGIC */
	be32 option;
	be32 type;
	be32 len; /* of the data that follows */
};
_Static_assert(sizeof(struct nbd_option_reply) == 20, "as on the wire");

/* "Option reply types" */
#define NBD_REP_ACK                 1U
#define NBD_REP_SERVER              2U
#define NBD_REP_INFO                3U
#define NBD_REP_META_CONTEXT        4U
#define NBD_REP_ERR(n)              ((1U << 31) + (n))
#define NBD_REP_ERR_UNSUP           NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY          NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID         NBD_REP_ERR(3)
#define NBD_REP_ERR_TLS_REQD        NBD_REP_ERR(5)
#define NBD_REP_ERR_UNKNOWN         NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN        NBD_REP_ERR(7)
#define NBD_REP_ERR_TOO_BIG         NBD_REP_ERR(9)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR(10)

/* The answer to NBD_OPT_EXPORT_NAME. The zeroes are not sent after NBD_FLAG_C_NO_ZEROES. */
struct nbd_export_name_reply {
	be64 size;
	be16 flags; /* transmission flags */
	uint8_t zeroes[124];
};
_Static_assert(sizeof(struct nbd_export_name_reply) == 134, "as on the wire");

/* The data of NBD_REP_INFO starts with its type. */
enum nbd_info {
	NBD_INFO_EXPORT = 0,
	NBD_INFO_NAME = 1,        /* the name follows */
	NBD_INFO_DESCRIPTION = 2, /* the text follows */
	NBD_INFO_BLOCK_SIZE = 3,
};

struct nbd_info_export {
	be16 type;
	be64 size;
	be16 flags; /* transmission flags */
};
_Static_assert(sizeof(struct nbd_info_export) == 12, "as on the wire");

/* "Size constraints" */
struct nbd_info_block_size {
	be16 type;
	be32 minimum, preferred, max_payload;
};
_Static_assert(sizeof(struct nbd_info_block_size) == 14, "as on the wire");

/* "Transmission flags" */
#define NBD_FLAG_HAS_FLAGS         (1 << 0)
#define NBD_FLAG_READ_ONLY         (1 << 1)
#define NBD_FLAG_SEND_FLUSH        (1 << 2)
#define NBD_FLAG_SEND_FUA          (1 << 3)
#define NBD_FLAG_SEND_TRIM         (1 << 5)
#define NBD_FLAG_SEND_WRITE_ZEROES (1 << 6)
#define NBD_FLAG_SEND_DF           (1 << 7)
#define NBD_FLAG_CAN_MULTI_CONN    (1 << 8)
#define NBD_FLAG_SEND_CACHE        (1 << 10)
#define NBD_FLAG_SEND_FAST_ZERO    (1 << 11)

#define NBD_FLAG_BLOCK_STATUS_PAYLOAD (1 << 12)

/* --- transmission ----------------------------------------------------------------------------- */

#define NBD_REQUEST_MAGIC          0x25609513U
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71U
#define NBD_SIMPLE_REPLY_MAGIC     0x67446698U
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efU
#define NBD_EXTENDED_REPLY_MAGIC   0x6e8a278cU

/* "Request message" */
struct nbd_request_header {
	be32 magic; /* NBD_REQUEST_MAGIC */
	be16 flags;
	be16 type;
	be64 cookie;
	be64 off;
	be32 len;
};
_Static_assert(sizeof(struct nbd_request_header) == 28, "as on the wire");

/* The same after NBD_OPT_EXTENDED_HEADERS. */
struct nbd_extended_request_header {
	be32 magic; /* NBD_EXTENDED_REQUEST_MAGIC */
	be16 flags;
	be16 type;
	be64 cookie;
	be64 off;
	be64 len; /* of the payload with NBD_CMD_FLAG_PAYLOAD_LEN, else of the range */
};
_Static_assert(sizeof(struct nbd_extended_request_header) == 32, "as on the wire");

/* "Request types" */
enum nbd_command {
	NBD_CMD_READ = 0,
	NBD_CMD_WRITE = 1,
	NBD_CMD_DISC = 2,
	NBD_CMD_FLUSH = 3,
	NBD_CMD_TRIM = 4,
	NBD_CMD_CACHE = 5,
	NBD_CMD_WRITE_ZEROES = 6,
	NBD_CMD_BLOCK_STATUS = 7,
};

/* "Command flags" */
#define NBD_CMD_FLAG_FUA         (1 << 0)
#define NBD_CMD_FLAG_NO_HOLE     (1 << 1)
#define NBD_CMD_FLAG_DF          (1 << 2)
#define NBD_CMD_FLAG_REQ_ONE     (1 << 3)
#define NBD_CMD_FLAG_FAST_ZERO   (1 << 4)
#define NBD_CMD_FLAG_PAYLOAD_LEN (1 << 5)

/* The payload of NBD_CMD_BLOCK_STATUS with NBD_CMD_FLAG_PAYLOAD_LEN. */
struct nbd_status_payload {
	be64 len; /* of the range */
	be32 contexts[];
};
_Static_assert(sizeof(struct nbd_status_payload) == 8, "as on the wire");

/* "Simple reply message" */
struct nbd_simple_reply {
	be32 magic; /* NBD_SIMPLE_REPLY_MAGIC */
	be32 error;
	be64 cookie;
};
_Static_assert(sizeof(struct nbd_simple_reply) == 16, "as on the wire");

/* "Structured reply chunk message" */
struct nbd_structured_reply {
	be32 magic; /* NBD_STRUCTURED_REPLY_MAGIC */
	be16 flags; /* NBD_REPLY_FLAG_... */
	be16 type;
	be64 cookie;
	be32 len; /* of the payload that follows */
};
_Static_assert(sizeof(struct nbd_structured_reply) == 20, "as on the wire");

/* "Extended reply chunk message" */
struct nbd_extended_reply {
	be32 magic; /* NBD_EXTENDED_REPLY_MAGIC */
	be16 flags;
	be16 type;
	be64 cookie;
	be64 off; /* the request's */
	be64 len; /* of the payload that follows */
};
_Static_assert(sizeof(struct nbd_extended_reply) == 32, "as on the wire");

#define NBD_REPLY_FLAG_DONE (1 << 0)

/* "Structured reply types" */
enum nbd_reply_type {
	NBD_REPLY_NONE = 0,
	NBD_REPLY_OFFSET_DATA = 1, /* be64 offset, data */
	NBD_REPLY_OFFSET_HOLE = 2,
	NBD_REPLY_BLOCK_STATUS = 5,
	NBD_REPLY_BLOCK_STATUS_EXT = 6,
	NBD_REPLY_ERROR = (1 << 15) + 1,
	NBD_REPLY_ERROR_OFFSET = (1 << 15) + 2, /* as NBD_REPLY_ERROR, then be64 offset */
};

struct nbd_reply_hole {
	be64 off;
	be32 len;
};
_Static_assert(sizeof(struct nbd_reply_hole) == 12, "as on the wire");

struct nbd_reply_error {
	be32 error; /* enum nbd_error */
	be16 text_bytes;
	/* the text follows */
};
_Static_assert(sizeof(struct nbd_reply_error) == 6, "as on the wire");

/* NBD_REPLY_BLOCK_STATUS: be32 context, then some of these; flags are those of the context. */
struct nbd_descriptor {
	be32 len;
	be32 flags;
};
_Static_assert(sizeof(struct nbd_descriptor) == 8, "as on the wire");

/* NBD_REPLY_BLOCK_STATUS_EXT: be32 context, be32 count, then count of these. */
struct nbd_extended_descriptor {
	be64 len;
	be64 flags;
};
_Static_assert(sizeof(struct nbd_extended_descriptor) == 16, "as on the wire");

/*
 * "base:allocation metadata context": what it says are the flags of struct blk_extent. And one of our own: 0 where
 * nobody has space for the data, 1 for the disk itself, 2 for its backing image, and so on.
 */
#define NBD_CONTEXT_ALLOCATION "base:allocation"
#define NBD_CONTEXT_DEPTH      "blkstack:allocation-depth"
#define NBD_STATE_HOLE         (1 << 0)
#define NBD_STATE_ZERO         (1 << 1)

/* "Error values" */
enum nbd_error {
	NBD_SUCCESS = 0,
	NBD_EPERM = 1,
	NBD_EIO = 5,
	NBD_ENOMEM = 12,
	NBD_EINVAL = 22,
	NBD_ENOSPC = 28,
	NBD_EOVERFLOW = 75,
	NBD_ENOTSUP = 95,
	NBD_ESHUTDOWN = 108,
};
