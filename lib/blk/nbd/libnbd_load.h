/*
 * libnbd, loaded when the first nbd layer is opened.
 *
 * It brings thirty other libraries along, which would double the time blkstackd takes to start and
 * its memory, for everybody who has no such layer. So it is not linked: the calls below go through a
 * table that libnbd_load() fills. The names stay libnbd's own.
 */
#pragma once

#include <libnbd.h>

#include "base/err.h"

/* Call before any of the others; any thread, blocks. -ENOENT: the library is not installed. */
int libnbd_load(struct err *err);

#define LIBNBD_CALLS(X)             \
	X(nbd_add_meta_context)     \
	X(nbd_aio_block_status)     \
	X(nbd_aio_connect_uri)      \
	X(nbd_aio_disconnect)       \
	X(nbd_aio_flush)            \
	X(nbd_aio_get_direction)    \
	X(nbd_aio_get_fd)           \
	X(nbd_aio_is_closed)        \
	X(nbd_aio_is_dead)          \
	X(nbd_aio_is_ready)         \
	X(nbd_aio_notify_read)      \
	X(nbd_aio_notify_write)     \
	X(nbd_aio_pread)            \
	X(nbd_aio_pwrite)           \
	X(nbd_aio_trim)             \
	X(nbd_aio_zero)             \
	X(nbd_can_fast_zero)        \
	X(nbd_can_flush)            \
	X(nbd_can_fua)              \
	X(nbd_can_meta_context)     \
	X(nbd_can_multi_conn)       \
	X(nbd_can_trim)             \
	X(nbd_can_zero)             \
	X(nbd_close)                \
	X(nbd_create)               \
	X(nbd_get_block_size)       \
	X(nbd_get_errno)            \
	X(nbd_get_error)            \
	X(nbd_get_size)             \
	X(nbd_is_read_only)         \
	X(nbd_set_tls_certificates) \
	X(nbd_set_tls_psk_file)     \
	X(nbd_set_tls_verify_peer)

#define LIBNBD_MEMBER(name) __typeof__(name) *name;
struct libnbd_calls {
	LIBNBD_CALLS(LIBNBD_MEMBER)
};
extern struct libnbd_calls libnbd_calls;

#ifndef LIBNBD_NAMES_ONLY
#define nbd_add_meta_context     libnbd_calls.nbd_add_meta_context
#define nbd_aio_block_status     libnbd_calls.nbd_aio_block_status
#define nbd_aio_connect_uri      libnbd_calls.nbd_aio_connect_uri
#define nbd_aio_disconnect       libnbd_calls.nbd_aio_disconnect
#define nbd_aio_flush            libnbd_calls.nbd_aio_flush
#define nbd_aio_get_direction    libnbd_calls.nbd_aio_get_direction
#define nbd_aio_get_fd           libnbd_calls.nbd_aio_get_fd
#define nbd_aio_is_closed        libnbd_calls.nbd_aio_is_closed
#define nbd_aio_is_dead          libnbd_calls.nbd_aio_is_dead
#define nbd_aio_is_ready         libnbd_calls.nbd_aio_is_ready
#define nbd_aio_notify_read      libnbd_calls.nbd_aio_notify_read
#define nbd_aio_notify_write     libnbd_calls.nbd_aio_notify_write
#define nbd_aio_pread            libnbd_calls.nbd_aio_pread
#define nbd_aio_pwrite           libnbd_calls.nbd_aio_pwrite
#define nbd_aio_trim             libnbd_calls.nbd_aio_trim
#define nbd_aio_zero             libnbd_calls.nbd_aio_zero
#define nbd_can_fast_zero        libnbd_calls.nbd_can_fast_zero
#define nbd_can_flush            libnbd_calls.nbd_can_flush
#define nbd_can_fua              libnbd_calls.nbd_can_fua
#define nbd_can_meta_context     libnbd_calls.nbd_can_meta_context
#define nbd_can_multi_conn       libnbd_calls.nbd_can_multi_conn
#define nbd_can_trim             libnbd_calls.nbd_can_trim
#define nbd_can_zero             libnbd_calls.nbd_can_zero
#define nbd_close                libnbd_calls.nbd_close
#define nbd_create               libnbd_calls.nbd_create
#define nbd_get_block_size       libnbd_calls.nbd_get_block_size
#define nbd_get_errno            libnbd_calls.nbd_get_errno
#define nbd_get_error            libnbd_calls.nbd_get_error
#define nbd_get_size             libnbd_calls.nbd_get_size
#define nbd_is_read_only         libnbd_calls.nbd_is_read_only
#define nbd_set_tls_certificates libnbd_calls.nbd_set_tls_certificates
#define nbd_set_tls_psk_file     libnbd_calls.nbd_set_tls_psk_file
#define nbd_set_tls_verify_peer  libnbd_calls.nbd_set_tls_verify_peer
#endif
