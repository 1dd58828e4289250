/*
 * An intrusive, doubly linked, circular list. The element is embedded; container_of() leads back.
 */
#pragma once

#include <stdbool.h>

#include "base/util.h"

struct list {
	struct list *next, *prev;
};

static inline void list_init(struct list *head)
{
	head->next = head->prev = head;
}

static inline bool list_empty(const struct list *head)
{
	return head->next == head;
}

static inline void list_insert(struct list *item, struct list *prev, struct list *next)
{
	item->prev = prev;
	item->next = next;
	prev->next = item;
	next->prev = item;
}

static inline void list_push_front(struct list *head, struct list *item)
{
	list_insert(item, head, head->next);
}

static inline void list_push_back(struct list *head, struct list *item)
{
	list_insert(item, head->prev, head);
}

/* Leaves item a list of its own, so removing twice is harmless. */
static inline void list_remove(struct list *item)
{
	item->prev->next = item->next;
	item->next->prev = item->prev;
	list_init(item);
}

/* NULL when empty. */
static inline struct list *list_pop_front(struct list *head)
{
	struct list *item = head->next;

	if (item == head)
		return NULL;
	list_remove(item);
	return item;
}

/* Moves everything in from to the end of to. */
static inline void list_splice_back(struct list *to, struct list *from)
{
	if (list_empty(from))
		return;
	from->next->prev = to->prev;
	to->prev->next = from->next;
	from->prev->next = to;
	to->prev = from->prev;
	list_init(from);
}

#define list_entry(item, type, member) container_of(item, type, member)

#define list_for_each(item, head) \
	for (struct list *item = (head)->next; item != (head); item = item->next)

/* The current item may be removed in the body; no other item may. */
#define list_for_each_safe(item, head)                                                    \
	for (struct list *item = (head)->next, *item##_next = item->next; item != (head); \
		item = item##_next, item##_next = item->next)
