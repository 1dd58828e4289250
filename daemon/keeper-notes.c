/*
 * Notes of the servers to their successors, one per export, in words that the keeper only passes on.
 *
 * They live as long as the keeper: from server to server, and not from one start of the service to the next.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/keeper_private.h"

/* The one of that export, or a free one; NULL: none is left. */
static struct note *find(struct notes *notes, const char *export)
{
	struct note *free_one = NULL;

	for (unsigned i = 0; i < KEEPER_NOTES_MAX; i++) {
		struct note *note = &notes->items[i];

		if (!strcmp(note->export, export))
			return note;
		if (!free_one && !note->export[0])
			free_one = note;
	}
	return free_one;
}

static int write_note(struct notes *notes, const struct keeper_message *request)
{
	struct note *note = find(notes, request->export);

	if (!request->export[0] || strlen(request->text) >= sizeof(note->text))
		return -EINVAL;
	if (!note)
		return request->text[0] ? -ENOSPC : 0;
	*note = (struct note){};
	if (request->text[0]) {
		snprintf(note->export, sizeof(note->export), "%s", request->export);
		snprintf(
			note->text, sizeof(note->text), "%.*s", KEEPER_NOTE_LEN - 1, request->text);
	}
	return 0;
}

void notes_write(struct keeper *keeper, const struct keeper_message *request)
{
	const struct keeper_message answer = {
		.id = request->id,
		.ret = write_note(&keeper->notes, request),
	};

	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}

void notes_read(struct keeper *keeper, const struct keeper_message *request)
{
	struct keeper_message answer = { .id = request->id, .ret = -ENOENT };

	for (uint32_t slot = request->slot; slot < KEEPER_NOTES_MAX && answer.ret; slot++) {
		const struct note *note = &keeper->notes.items[slot];

		if (!note->export[0])
			continue;
		answer.ret = 0;
		answer.slot = slot;
		snprintf(answer.export, sizeof(answer.export), "%s", note->export);
		snprintf(answer.text, sizeof(answer.text), "%s", note->text);
	}
	keeper_say(keeper, KEEPER_ANSWER, &answer, NULL, 0);
}
