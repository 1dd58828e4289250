/*
 * Sets and lists of host clusters; see qcow.h.
 *
 * Both only ever lose something when memory runs out: the set guards against damaged images, and what a list of
 * freed clusters misses leaks, which is harmless and found by a check.
 */
#include <errno.h>
#include <stdlib.h>

#include "blk/qcow/qcow.h"

static size_t set_slot(const struct cluster_set *set, uint64_t index)
{
	size_t slot = (size_t)((index * UINT64_C(0x9e3779b97f4a7c15)) >> 20) & set->mask;

	while (set->keys[slot] && set->keys[slot] != index)
		slot = (slot + 1) & set->mask;
	return slot;
}

bool cluster_set_has(const struct cluster_set *set, uint64_t index)
{
	return set->keys && set->keys[set_slot(set, index)] == index;
}

void cluster_set_add(struct cluster_set *set, uint64_t index)
{
	if (!set->keys || set->count * 2 > set->mask) {
		struct cluster_set bigger = { .mask = set->keys ? 2 * set->mask + 1 : 255 };

		bigger.keys = calloc(bigger.mask + 1, sizeof(*bigger.keys));
		if (!bigger.keys)
			return; /* the set only guards against damaged images */
		for (size_t i = 0; set->keys && i <= set->mask; i++)
			if (set->keys[i])
				bigger.keys[set_slot(&bigger, set->keys[i])] = set->keys[i];
		bigger.count = set->count;
		free(set->keys);
		*set = bigger;
	}
	size_t slot = set_slot(set, index);
	set->count += !set->keys[slot];
	set->keys[slot] = index;
}

void cluster_set_remove(struct cluster_set *set, uint64_t index)
{
	if (!cluster_set_has(set, index))
		return;
	size_t slot = set_slot(set, index);
	set->keys[slot] = 0;
	set->count--;
	/* Those behind it that had to step aside for it move up. */
	for (slot = (slot + 1) & set->mask; set->keys[slot]; slot = (slot + 1) & set->mask) {
		uint64_t key = set->keys[slot];

		set->keys[slot] = 0;
		set->keys[set_slot(set, key)] = key;
	}
}

int freed_list_add(struct freed_list *list, uint64_t index, uint64_t count)
{
	struct freed *last = list->count ? &list->items[list->count - 1] : NULL;

	if (last && last->index + last->count == index) {
		last->count += count;
		return 0;
	}
	if (list->count == list->capacity) {
		size_t capacity = MAX((size_t)64, 2 * list->capacity);
		void *items = realloc(list->items, capacity * sizeof(*list->items));

		if (!items)
			return -ENOMEM; /* these clusters leak: harmless, and found by a check */
		list->items = items;
		list->capacity = capacity;
	}
	list->items[list->count++] = (struct freed){ .index = index, .count = count };
	return 0;
}
