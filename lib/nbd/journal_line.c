/*
 * A connection with a journal, as receive.c, request.c and reply.c go along; see journal.c.
 *
 * Such a connection receives into a ring in which each byte has its place, so conn->pos and conn->fill
 * are positions in the stream. A write's payload stays in that ring until its entry is free; what is read is
 * put into the other ring until it is sent. Space is given out in the order of the stream and comes back in
 * that order too: what is still in use at one end holds up what lies behind.
 */
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "nbd/journal_private.h"

/* --- beginning and end ------------------------------------------------------------------------ */

struct nbd_line *nbd_line_of(struct nbd_journal *journal, unsigned connection)
{
	return connection < journal->line_count ? &journal->lines[connection] : NULL;
}

int nbd_line_fd(const struct nbd_line *line)
{
	return line->ends.fd;
}

bool nbd_line_may_begin(const struct nbd_line *line, const struct nbd_export *export)
{
	return line->journal->export == export && !line->conn;
}

/* Replies that were sent to their end are done with; those that were not begun are forgotten. */
static void sort_answered(struct nbd_line *line, struct nbd_held *held)
{
	struct journal_entry *entry = held->entry;

	if (entry->state != JOURNAL_ANSWERED)
		return;
	if (journal_reply_end(entry) <= line->sent)
		journal_done(held);
	else if (entry->reply_at >= line->sent)
		entry->state = JOURNAL_RECEIVED;
	else
		line->reply_end = journal_reply_end(entry);
	journal_step();
}

void nbd_line_begin(struct nbd_line *line, struct nbd_conn *conn)
{
	line->conn = conn;
	line->reply_end = line->sent;
	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++)
		sort_answered(line, &line->held[i]);
	conn->pos = line->shared->parsed;
	conn->fill = line->received;
}

void nbd_line_end(struct nbd_line *line)
{
	line->conn = NULL;
}

static void restore(struct nbd_held *held, struct nbd_request *request)
{
	const struct journal_entry *entry = held->entry;
	struct nbd_line *line = held->line;

	*request = (struct nbd_request){
		.conn = line->conn,
		.held = held,
		.type = entry->type,
		.flags = entry->flags,
		.cookie = entry->cookie,
		.off = entry->off,
		.len = entry->len,
	};
	if (journal_payload_bytes(entry))
		request->payload = journal_in(line, journal_payload_at(entry));
}

bool nbd_line_next_unanswered(
	struct nbd_line *line, const struct nbd_held *after, struct nbd_request *request)
{
	struct nbd_held *next = NULL;

	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++) {
		struct nbd_held *held = &line->held[i];

		if (held->entry->state == JOURNAL_RECEIVED &&
			(!after || held->entry->order > after->entry->order) &&
			(!next || held->entry->order < next->entry->order))
			next = held;
	}
	if (next)
		restore(next, request);
	return next;
}

bool nbd_line_cut_off(struct nbd_line *line, struct nbd_request *request, enum nbd_error *error,
	size_t *sent_bytes)
{
	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++) {
		struct nbd_held *held = &line->held[i];

		if (held->entry->state != JOURNAL_ANSWERED)
			continue;
		restore(held, request);
		*error = held->entry->error;
		*sent_bytes = line->sent - held->entry->reply_at;
		if (request->type == NBD_CMD_READ && !*error && request->len)
			request->payload = journal_out(line, held->out_at);
		return true;
	}
	return false;
}

/* --- receiving -------------------------------------------------------------------------------- */

uint8_t *nbd_line_at(const struct nbd_line *line, uint64_t position)
{
	return journal_in(line, position);
}

size_t nbd_line_space(const struct nbd_line *line)
{
	uint64_t oldest = line->shared->parsed;

	if (!list_empty(&line->in_use))
		oldest = journal_payload_at(
			list_entry(line->in_use.next, struct nbd_held, link)->entry);
	return line->journal->ring_bytes - (line->received - oldest);
}

int nbd_line_received(struct nbd_line *line, size_t bytes)
{
	line->received += bytes;
	journal_step();
	if (line->received - line->received_armed < line->journal->rearm_bytes)
		return 0;
	return journal_arm_received(line);
}

bool nbd_line_has_room(const struct nbd_line *line, size_t payload_bytes)
{
	uint64_t used_bytes = 0;

	if (!list_empty(&line->out_use))
		used_bytes = line->out_end -
			     list_entry(line->out_use.next, struct nbd_held, out_link)->out_at;
	return line->free_count && round_up(payload_bytes, JOURNAL_PAGE_BYTES) <=
					   line->journal->ring_bytes - used_bytes;
}

void nbd_line_enter(struct nbd_line *line, struct nbd_request *request)
{
	struct nbd_held *held = list_entry(list_pop_front(&line->free), struct nbd_held, link);
	struct journal_entry *entry = held->entry;
	uint64_t end = line->conn->pos;

	line->free_count--;
	*entry = (struct journal_entry){
		.at = line->shared->parsed,
		.order = line->journal->next_order++,
		.cookie = request->cookie,
		.off = request->off,
		.len = (uint32_t)request->len,
		.type = request->type,
		.flags = request->flags,
		.state = JOURNAL_FREE,
	};
	journal_step();
	entry->state = JOURNAL_RECEIVED;
	journal_step();
	line->shared->parsed = end;
	journal_step();

	held->durable = false;
	if (journal_payload_bytes(entry))
		list_push_back(&line->in_use, &held->link);
	if (journal_changes_disk(entry->type))
		list_push_back(&line->journal->log, &held->log_link);
	request->held = held;
}

/* --- what is read ----------------------------------------------------------------------------- */

uint8_t *nbd_line_payload_get(struct nbd_request *request, size_t size_bytes)
{
	struct nbd_held *held = request->held;
	struct nbd_line *line = held->line;

	/* Where nothing is in use any place will do: the one that is in the processor's cache. */
	if (list_empty(&line->out_use))
		line->out_end = 0;
	held->out_at = line->out_end;
	line->out_end += round_up(size_bytes, JOURNAL_PAGE_BYTES);
	list_push_back(&line->out_use, &held->out_link);
	return journal_out(line, held->out_at);
}

void nbd_line_payload_put(struct nbd_request *request)
{
	if (request->held)
		list_remove(&request->held->out_link);
}

/* --- replying --------------------------------------------------------------------------------- */

static bool caches_writes(const struct nbd_line *line)
{
	return blk_caps(line->conn->export->blk)->caches_writes;
}

void nbd_line_answer(struct nbd_request *request)
{
	struct nbd_held *held = request->held;
	struct nbd_line *line = held->line;
	struct journal_entry *entry = held->entry;
	struct nbd_simple_reply reply;

	memcpy(&reply, request->head.bytes, sizeof(reply));
	held->epoch = line->journal->epoch;
	entry->error = be32_get(reply.error);
	entry->data_at = held->out_at;
	entry->reply_at = line->reply_end;
	entry->safe = held->durable || !caches_writes(line);
	journal_step();
	entry->state = JOURNAL_ANSWERED;
	journal_step();
	line->reply_end += request->reply_bytes;
}

int nbd_line_sent(struct nbd_line *line, size_t bytes)
{
	line->sent += bytes;
	journal_step();
	if (line->sent - line->sent_armed < line->journal->rearm_bytes)
		return 0;
	return journal_arm_sent(line);
}

void nbd_line_done(struct nbd_request *request)
{
	struct nbd_held *held = request->held;

	nbd_line_payload_put(request);
	request->held = NULL;
	journal_done(held);
}
