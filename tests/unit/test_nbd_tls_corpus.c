/* Replays the inputs of the fuzzer through TLS. */
#define CORPUS "nbd_tls"
#include "../fuzz/nbd_tls.c"

#include "test_nbd_corpus.c"
