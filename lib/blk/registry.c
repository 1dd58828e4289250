/*
 * The layers there are. A new layer adds its line to layers.h and to the list here; the order is that of
 * --help.
 */
#include <string.h>

#include "blk/blk.h"
#include "blk/layers.h"

const struct blk_ops *const blk_layers[] = {
	&file_ops,
	&memory_ops,
	&qcow_ops,
	&padded_ops,
	&mirror_ops,
	&nbd_ops,
	&null_ops,
	&fault_ops,
	NULL,
};

const struct blk_ops *blk_layer_find(const char *name)
{
	for (const struct blk_ops *const *ops = blk_layers; *ops; ops++)
		if (conf_name_equal((*ops)->name, name))
			return *ops;
	return NULL;
}
