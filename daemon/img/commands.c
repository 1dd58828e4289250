/*
 * The list of commands, in the order of blkstack-img --help.
 */
#include "daemon/img/commands.h"

const struct img_command *const img_commands[] = {
	&img_create,
	&img_info,
	&img_check,
	&img_repair,
	&img_snapshot,
	&img_map,
	&img_resize,
	&img_convert,
	&img_compare,
	&img_digest,
	&img_sparsify,
	&img_compact,
	&img_dehydrate,
	&img_rehydrate,
	NULL,
};
