/*
 * Replays the inputs of the fuzzer through TLS: tests/fuzz/nbd_tls.c.
 */
#define CORPUS "nbd_tls"
#include "../fuzz/nbd_tls.c"

#include "test_nbd_corpus.c"
