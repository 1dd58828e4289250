/*
 * The op tables of all layers, for registry.c. See blk.h on being a layer.
 */
#pragma once

#include "blk/blk.h"

extern const struct blk_ops fault_ops;
extern const struct blk_ops file_ops;
extern const struct blk_ops memory_ops;
extern const struct blk_ops mirror_ops;
extern const struct blk_ops nbd_ops;
extern const struct blk_ops null_ops;
extern const struct blk_ops padded_ops;
extern const struct blk_ops qcow_ops;
