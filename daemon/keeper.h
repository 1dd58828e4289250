/*
 * The keeper: the process that holds what must outlive the server. See README.md in this folder.
 *
 *	service manager -- keeper -- server	one program, two processes
 *
 * The keeper holds kernel devices with the sockets and the journal of each, and listening sockets; it starts the
 * server, and starts it again when it dies. It reads no config, no image and no byte of a client, and
 * believes nothing that the server says without a look.
 */
#pragma once

#include <stdbool.h>

/* Whether the service manager passed what a keeper before us left: then this start needs one, too. */
bool store_has_anything(void);

/*
 * Runs until the service ends; the exit status. argv: the command line of a server, without what tells it from
 * a keeper. Nothing may be open yet, and no thread run.
 */
int keeper_run(char *const *argv);
