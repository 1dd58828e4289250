/*
 * What a TLS server shows its clients and asks of them: certificates, keys, the list of subjects; see tls.h.
 *
 * A client's certificate is checked within the handshake: by then no byte of the protocol inside was
 * exchanged. It has to come from the CA, be valid now, not be revoked and not be made for another
 * purpose; if there is a list, its subject has to be in it as a whole. There are no patterns: a name within a
 * subject may hold any character.
 *
 * A session of a client that knows a pre-shared key asks for no certificate: the key is the proof.
 * The file of keys is read at every handshake, so keys come and go without a restart.
 *
 * Failure modes: everything that can be wrong with the files is told at the start, with the file's name.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "rt/tls_private.h"

#define VERSIONS      "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"
#define VERSIONS_PSK  VERSIONS ":+ECDHE-PSK:+DHE-PSK"
#define KEY_MIN_BYTES 16 /* what is shorter can be guessed by trying */

struct tls_server {
	unsigned references;
	gnutls_certificate_credentials_t certificates; /* NULL: none */
	gnutls_psk_server_credentials_t keys;          /* NULL: none */
	gnutls_priority_t priority;
	bool verify_clients;
	char **subjects;
	size_t subject_count;
};

/* --- certificates ----------------------------------------------------------------------------- */

/* "FOLDER/NAME", which must be there. NULL on error; the caller frees it. */
static char *path_in(const char *folder, const char *name, struct err *err)
{
	char *path;

	if (asprintf(&path, "%s/%s", folder, name) < 0)
		abort();
	if (!access(path, R_OK))
		return path;
	err_sys(err, errno, "TLS: cannot read \"%s\"", path);
	free(path);
	return NULL;
}

static int load_key(struct tls_server *server, const char *folder, struct err *err)
{
	CLEANUP(free) char *cert = path_in(folder, "server-cert.pem", err);
	CLEANUP(free) char *key = cert ? path_in(folder, "server-key.pem", err) : NULL;

	if (!key)
		return -EINVAL;
	int ret = gnutls_certificate_set_x509_key_file(
		server->certificates, cert, key, GNUTLS_X509_FMT_PEM);
	if (ret < 0)
		return err_set(err, EINVAL, "TLS: \"%s\" with \"%s\": %s", cert, key,
			gnutls_strerror(ret));
	return 0;
}

static int load_authority(struct tls_server *server, const char *folder, struct err *err)
{
	CLEANUP(free) char *ca = path_in(folder, "ca-cert.pem", err);
	CLEANUP(free) char *crl = ca ? path_in(folder, "ca-crl.pem", NULL) : NULL;

	if (!ca)
		return err_wrap(err, "to verify clients");
	int ret = gnutls_certificate_set_x509_trust_file(
		server->certificates, ca, GNUTLS_X509_FMT_PEM);
	if (ret <= 0)
		return err_set(err, EINVAL, "TLS: \"%s\": %s", ca,
			ret ? gnutls_strerror(ret) : "holds no certificate");
	if (!crl)
		return 0;
	ret = gnutls_certificate_set_x509_crl_file(server->certificates, crl, GNUTLS_X509_FMT_PEM);
	if (ret <= 0)
		return err_set(err, EINVAL, "TLS: \"%s\": %s", crl,
			ret ? gnutls_strerror(ret) : "holds no list of revoked certificates");
	return 0;
}

static bool subject_allowed(const struct tls_server *server, const char *subject)
{
	for (size_t i = 0; i < server->subject_count; i++)
		if (!strcmp(server->subjects[i], subject))
			return true;
	return !server->subject_count;
}

/* The subject of the client's certificate, as RFC 4514 writes it; -errno when there is none. */
static int peer_subject(gnutls_session_t session, char *subject, size_t max_bytes)
{
	unsigned count = 0;
	const gnutls_datum_t *chain = gnutls_certificate_get_peers(session, &count);
	gnutls_x509_crt_t cert;

	if (!count || gnutls_x509_crt_init(&cert))
		return -ENOENT;
	gnutls_datum_t name = {};
	int ret = gnutls_x509_crt_import(cert, &chain[0], GNUTLS_X509_FMT_DER);
	if (!ret)
		ret = gnutls_x509_crt_get_dn3(cert, &name, 0);
	gnutls_x509_crt_deinit(cert);
	if (!ret && name.size < max_bytes)
		strcpy(subject, (const char *)name.data);
	else
		ret = -EINVAL;
	gnutls_free(name.data);
	return ret;
}

/* What is wrong with the client's certificate: GNUTLS_CERT_... flags, 0 for nothing. */
static unsigned certificate_faults(gnutls_session_t session)
{
	gnutls_typed_vdata_st purpose = {
		.type = GNUTLS_DT_KEY_PURPOSE_OID,
		.data = (unsigned char *)GNUTLS_KP_TLS_WWW_CLIENT,
	};
	unsigned status = 0;

	if (gnutls_certificate_verify_peers(session, &purpose, 1, &status))
		return GNUTLS_CERT_INVALID;
	return status;
}

/* Called by GnuTLS when the client's certificate is there; anything but 0 ends the handshake. */
static int verify_client(gnutls_session_t session)
{
	const struct tls_server *server = gnutls_session_get_ptr(session);
	char subject[1024];

	if (certificate_faults(session))
		return GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR;
	if (peer_subject(session, subject, sizeof(subject)) || !subject_allowed(server, subject))
		return GNUTLS_E_CERTIFICATE_ERROR;
	return 0;
}

static int load_certificates(
	struct tls_server *server, const struct tls_options *options, struct err *err)
{
	if (gnutls_certificate_allocate_credentials(&server->certificates))
		return err_set(err, ENOMEM, "TLS: no memory for certificates");
	int ret = load_key(server, options->certificates, err);
	if (ret || !options->verify_clients)
		return ret;
	ret = load_authority(server, options->certificates, err);
	gnutls_certificate_set_verify_function(server->certificates, verify_client);
	return ret;
}

/* --- pre-shared keys -------------------------------------------------------------------------- */

/* What is wrong with a line of the file; NULL: nothing. */
static const char *key_fault(const char *line)
{
	const char *colon = strchr(line, ':');

	if (!*line || *line == '#')
		return NULL;
	if (!colon || colon == line)
		return "expected user:key";
	size_t digits = strspn(colon + 1, "0123456789abcdefABCDEF");
	if (colon[1 + digits] || digits % 2)
		return "the key is not an even number of hexadecimal digits";
	return digits < 2 * KEY_MIN_BYTES ? "the key has less than 128 bits" : NULL;
}

static int check_keys(const char *path, struct err *err)
{
	CLEANUP(file) FILE *file = fopen(path, "re");
	CLEANUP(free) char *line = NULL;
	size_t line_bytes = 0;
	unsigned number = 0;
	struct stat st;

	if (!file || fstat(fileno(file), &st))
		return err_sys(err, errno, "TLS: cannot read \"%s\"", path);
	if (!S_ISREG(st.st_mode))
		return err_set(err, EINVAL, "TLS: \"%s\" is no regular file", path);
	if (st.st_mode & 007)
		return err_set(err, EPERM,
			"TLS: \"%s\" is open to everybody (mode %04o): chmod o-rwx it", path,
			(unsigned)st.st_mode & 07777);
	while (getline(&line, &line_bytes, file) >= 0) {
		number++;
		line[strcspn(line, "\r\n")] = '\0';
		const char *fault = key_fault(line);
		if (fault)
			return err_set(err, EINVAL, "TLS: %s:%u: %s", path, number, fault);
	}
	return 0;
}

static int load_keys(struct tls_server *server, const char *path, struct err *err)
{
	int ret = check_keys(path, err);

	if (ret)
		return ret;
	if (gnutls_psk_allocate_server_credentials(&server->keys))
		return err_set(err, ENOMEM, "TLS: no memory for keys");
	ret = gnutls_psk_set_server_credentials_file(server->keys, path);
	if (!ret)
		ret = gnutls_psk_set_server_known_dh_params(server->keys, GNUTLS_SEC_PARAM_MEDIUM);
	return ret ? err_set(err, EINVAL, "TLS: \"%s\": %s", path, gnutls_strerror(ret)) : 0;
}

/* --- the whole -------------------------------------------------------------------------------- */

static void copy_subjects(struct tls_server *server, const struct tls_options *options)
{
	server->subjects = calloc(options->subject_count + 1, sizeof(*server->subjects));
	if (!server->subjects)
		abort();
	for (size_t i = 0; i < options->subject_count; i++)
		if (!(server->subjects[server->subject_count++] = strdup(options->subjects[i])))
			abort();
}

int tls_server_create(
	struct tls_server **created, const struct tls_options *options, struct err *err)
{
	struct tls_server *server = calloc(1, sizeof(*server));
	const char *priority = options->priority, *at = NULL;
	int ret = 0;

	assert(options->certificates || options->psk);
	*created = NULL;
	if (!server)
		return err_set(err, ENOMEM, "TLS: no memory");
	ret = gnutls_load(err);
	if (ret) {
		free(server);
		return ret;
	}
	server->references = 1;
	server->verify_clients = options->verify_clients;
	copy_subjects(server, options);
	if (options->certificates)
		ret = load_certificates(server, options, err);
	if (!ret && options->psk)
		ret = load_keys(server, options->psk, err);
	if (!priority)
		priority = options->psk ? VERSIONS_PSK : VERSIONS;
	if (!ret && gnutls_priority_init(&server->priority, priority, &at))
		ret = err_set(err, EINVAL, "TLS: the priority string is wrong at \"%s\"",
			at ? at : priority);
	if (ret)
		tls_server_free(server);
	else
		*created = server;
	return ret;
}

struct tls_server *tls_server_get(struct tls_server *server)
{
	server->references++;
	return server;
}

void tls_server_free(struct tls_server *server)
{
	if (!server || --server->references)
		return;
	if (server->certificates)
		gnutls_certificate_free_credentials(server->certificates);
	if (server->keys)
		gnutls_psk_free_server_credentials(server->keys);
	if (server->priority)
		gnutls_priority_deinit(server->priority);
	for (size_t i = 0; i < server->subject_count; i++)
		free(server->subjects[i]);
	free(server->subjects);
	free(server);
}

/* --- for a session ---------------------------------------------------------------------------- */

int tls_server_apply(struct tls_server *server, gnutls_session_t session)
{
	int ret = gnutls_priority_set(session, server->priority);

	gnutls_session_set_ptr(session, server);
	if (!ret && server->certificates)
		ret = gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, server->certificates);
	if (!ret && server->keys)
		ret = gnutls_credentials_set(session, GNUTLS_CRD_PSK, server->keys);
	if (server->certificates && server->verify_clients)
		gnutls_certificate_server_set_request(session, GNUTLS_CERT_REQUIRE);
	return ret;
}

/* "expired; ..." in words, on one line. */
static int certificate_fault(gnutls_session_t session, struct err *err)
{
	gnutls_datum_t words = {};
	char subject[1024];
	unsigned status = certificate_faults(session);

	if (peer_subject(session, subject, sizeof(subject)))
		strcpy(subject, "?");
	if (status &&
		!gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &words, 0))
		err_set(err, EPROTO, "TLS: refused the certificate of \"%s\": %s", subject,
			words.data);
	else
		err_set(err, EPROTO, "TLS: tls-allow does not have \"%s\"", subject);
	gnutls_free(words.data);
	return -EPROTO;
}

int tls_handshake_error(gnutls_session_t session, int gnutls_error, struct err *err)
{
	switch (gnutls_error) {
	case GNUTLS_E_CERTIFICATE_ERROR:
	case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
		return certificate_fault(session, err);
	case GNUTLS_E_FATAL_ALERT_RECEIVED:
		return err_set(err, EPROTO, "TLS: the client gave up: %s",
			gnutls_alert_get_name(gnutls_alert_get(session)));
	case GNUTLS_E_MEMORY_ERROR:
		return err_set(err, ENOMEM, "TLS: %s", gnutls_strerror(gnutls_error));
	default:
		return err_set(err, EPROTO, "TLS: %s", gnutls_strerror(gnutls_error));
	}
}

void tls_describe(gnutls_session_t session, char text[TLS_TEXT_MAX_BYTES])
{
	const char *version = gnutls_protocol_get_name(gnutls_protocol_get_version(session));
	const char *cipher = gnutls_cipher_get_name(gnutls_cipher_get(session));
	const char *user = gnutls_psk_server_get_username(session);
	char subject[TLS_TEXT_MAX_BYTES / 2];
	int len = snprintf(text, TLS_TEXT_MAX_BYTES, "%s, %s", version, cipher);

	if (user)
		snprintf(text + len, TLS_TEXT_MAX_BYTES - (size_t)len, ", PSK %.64s", user);
	else if (!peer_subject(session, subject, sizeof(subject)))
		snprintf(text + len, TLS_TEXT_MAX_BYTES - (size_t)len, ", %s", subject);
}
