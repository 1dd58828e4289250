/*
 * GnuTLS, loaded when the first listener with TLS is opened.
 *
 * It brings a dozen other libraries along, which take longer to load than all the rest of blkstackd, for
 * everybody who has no TLS. So it is not linked: the calls below go through a table that
 * gnutls_load() fills. The names stay GnuTLS's own.
 */
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "base/err.h"

/* Call before any of the others; any thread, blocks. -ENOENT: the library is not installed. */
int gnutls_load(struct err *err);

#define GNUTLS_CALLS(X)                                 \
	X(gnutls_alert_get)                             \
	X(gnutls_alert_get_name)                        \
	X(gnutls_alert_send_appropriate)                \
	X(gnutls_bye)                                   \
	X(gnutls_certificate_allocate_credentials)      \
	X(gnutls_certificate_free_credentials)          \
	X(gnutls_certificate_get_peers)                 \
	X(gnutls_certificate_server_set_request)        \
	X(gnutls_certificate_set_verify_function)       \
	X(gnutls_certificate_set_x509_crl_file)         \
	X(gnutls_certificate_set_x509_key_file)         \
	X(gnutls_certificate_set_x509_trust_file)       \
	X(gnutls_certificate_verification_status_print) \
	X(gnutls_certificate_verify_peers)              \
	X(gnutls_cipher_get)                            \
	X(gnutls_cipher_get_name)                       \
	X(gnutls_credentials_set)                       \
	X(gnutls_deinit)                                \
	X(gnutls_error_is_fatal)                        \
	X(gnutls_free)                                  \
	X(gnutls_handshake)                             \
	X(gnutls_handshake_set_timeout)                 \
	X(gnutls_init)                                  \
	X(gnutls_priority_deinit)                       \
	X(gnutls_priority_init)                         \
	X(gnutls_priority_set)                          \
	X(gnutls_protocol_get_name)                     \
	X(gnutls_protocol_get_version)                  \
	X(gnutls_psk_allocate_server_credentials)       \
	X(gnutls_psk_free_server_credentials)           \
	X(gnutls_psk_server_get_username)               \
	X(gnutls_psk_set_server_credentials_file)       \
	X(gnutls_psk_set_server_known_dh_params)        \
	X(gnutls_record_recv)                           \
	X(gnutls_record_send)                           \
	X(gnutls_session_get_ptr)                       \
	X(gnutls_session_set_ptr)                       \
	X(gnutls_strerror)                              \
	X(gnutls_transport_set_errno)                   \
	X(gnutls_transport_set_ptr)                     \
	X(gnutls_transport_set_pull_function)           \
	X(gnutls_transport_set_pull_timeout_function)   \
	X(gnutls_transport_set_push_function)           \
	X(gnutls_x509_crt_deinit)                       \
	X(gnutls_x509_crt_get_dn3)                      \
	X(gnutls_x509_crt_import)                       \
	X(gnutls_x509_crt_init)

#define GNUTLS_MEMBER(name) __typeof__(name) *name;
struct gnutls_calls {
	GNUTLS_CALLS(GNUTLS_MEMBER)
};
extern struct gnutls_calls gnutls_calls;

#ifndef GNUTLS_NAMES_ONLY
#define gnutls_alert_get                        gnutls_calls.gnutls_alert_get
#define gnutls_alert_get_name                   gnutls_calls.gnutls_alert_get_name
#define gnutls_alert_send_appropriate           gnutls_calls.gnutls_alert_send_appropriate
#define gnutls_bye                              gnutls_calls.gnutls_bye
#define gnutls_certificate_allocate_credentials gnutls_calls.gnutls_certificate_allocate_credentials
#define gnutls_certificate_free_credentials     gnutls_calls.gnutls_certificate_free_credentials
#define gnutls_certificate_get_peers            gnutls_calls.gnutls_certificate_get_peers
#define gnutls_certificate_server_set_request   gnutls_calls.gnutls_certificate_server_set_request
#define gnutls_certificate_set_verify_function  gnutls_calls.gnutls_certificate_set_verify_function
#define gnutls_certificate_set_x509_crl_file    gnutls_calls.gnutls_certificate_set_x509_crl_file
#define gnutls_certificate_set_x509_key_file    gnutls_calls.gnutls_certificate_set_x509_key_file
#define gnutls_certificate_set_x509_trust_file  gnutls_calls.gnutls_certificate_set_x509_trust_file
#define gnutls_certificate_verification_status_print \
	gnutls_calls.gnutls_certificate_verification_status_print
#define gnutls_certificate_verify_peers        gnutls_calls.gnutls_certificate_verify_peers
#define gnutls_cipher_get                      gnutls_calls.gnutls_cipher_get
#define gnutls_cipher_get_name                 gnutls_calls.gnutls_cipher_get_name
#define gnutls_credentials_set                 gnutls_calls.gnutls_credentials_set
#define gnutls_deinit                          gnutls_calls.gnutls_deinit
#define gnutls_error_is_fatal                  gnutls_calls.gnutls_error_is_fatal
#define gnutls_free                            (*gnutls_calls.gnutls_free) /* a variable */
#define gnutls_handshake                       gnutls_calls.gnutls_handshake
#define gnutls_handshake_set_timeout           gnutls_calls.gnutls_handshake_set_timeout
#define gnutls_init                            gnutls_calls.gnutls_init
#define gnutls_priority_deinit                 gnutls_calls.gnutls_priority_deinit
#define gnutls_priority_init                   gnutls_calls.gnutls_priority_init
#define gnutls_priority_set                    gnutls_calls.gnutls_priority_set
#define gnutls_protocol_get_name               gnutls_calls.gnutls_protocol_get_name
#define gnutls_protocol_get_version            gnutls_calls.gnutls_protocol_get_version
#define gnutls_psk_allocate_server_credentials gnutls_calls.gnutls_psk_allocate_server_credentials
#define gnutls_psk_free_server_credentials     gnutls_calls.gnutls_psk_free_server_credentials
#define gnutls_psk_server_get_username         gnutls_calls.gnutls_psk_server_get_username
#define gnutls_psk_set_server_credentials_file gnutls_calls.gnutls_psk_set_server_credentials_file
#define gnutls_psk_set_server_known_dh_params  gnutls_calls.gnutls_psk_set_server_known_dh_params
#define gnutls_record_recv                     gnutls_calls.gnutls_record_recv
#define gnutls_record_send                     gnutls_calls.gnutls_record_send
#define gnutls_session_get_ptr                 gnutls_calls.gnutls_session_get_ptr
#define gnutls_session_set_ptr                 gnutls_calls.gnutls_session_set_ptr
#define gnutls_strerror                        gnutls_calls.gnutls_strerror
#define gnutls_transport_set_errno             gnutls_calls.gnutls_transport_set_errno
#define gnutls_transport_set_ptr               gnutls_calls.gnutls_transport_set_ptr
#define gnutls_transport_set_pull_function     gnutls_calls.gnutls_transport_set_pull_function
#define gnutls_transport_set_pull_timeout_function \
	gnutls_calls.gnutls_transport_set_pull_timeout_function
#define gnutls_transport_set_push_function gnutls_calls.gnutls_transport_set_push_function
#define gnutls_x509_crt_deinit             gnutls_calls.gnutls_x509_crt_deinit
#define gnutls_x509_crt_get_dn3            gnutls_calls.gnutls_x509_crt_get_dn3
#define gnutls_x509_crt_import             gnutls_calls.gnutls_x509_crt_import
#define gnutls_x509_crt_init               gnutls_calls.gnutls_x509_crt_init
#endif
