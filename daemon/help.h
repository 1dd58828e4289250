/*
 * blkstackd --help: the command line, the keys of the config file, and the layers with their options, all
 * of it from the tables that also parse them.
 */
#pragma once

#include <stdio.h>

void help_print(FILE *out);
