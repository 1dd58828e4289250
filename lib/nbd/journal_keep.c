/*
 * Acknowledged changes that die with the process: kept until a flush that began after them has ended.
 *
 * Only for stacks that say so (blk_caps.caches_writes). The successor does them again in the order of
 * their receipt; who waits for an answer before he changes the same place again gets that order, over all
 * connections. For it to be right, what is done again must be the newest:
 *
 *	- A flush frees entries from the oldest on, and before it is answered. An entry whose reply is
 *	  just being sent is marked `safe` at its place in that order.
 *	- A change with FUA is durable at once and needs no entry; but an older, kept one must not be done again on top
 *	  of it. Where one overlaps, the change is made without FUA and followed by a flush.
 *	- A change by anybody else, a client of the NBD door, is in no journal. Where it overlaps, what is
 *	  kept is flushed first. Flushes by others free entries as well.
 *
 * When entries or their payloads run short, the door flushes by itself. If that fails, nobody has been told of it
 * yet, and what is kept stays: a successor does it again, on a disk that may work by then. Only when there is no
 * room for a single request more, and one more flush has failed, it goes; that is said once.
 */
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "nbd/journal_private.h"

/* --- entries ---------------------------------------------------------------------------------- */

static void forget(struct nbd_held *held)
{
	struct nbd_line *line = held->line;

	line->journal->kept_count -= held->entry->state == JOURNAL_KEPT;
	held->entry->state = JOURNAL_FREE;
	journal_step();
	list_remove(&held->log_link);
	list_remove(&held->link);
	list_push_front(&line->free, &held->link);
	line->free_count++;
}

/* The flush that began at the end of that epoch has made durable what was done before. */
static void forget_until(struct nbd_journal *journal, uint64_t epoch)
{
	journal->durable_epoch = MAX(journal->durable_epoch, epoch);
	list_for_each_safe (link, &journal->log) {
		struct nbd_held *held = list_entry(link, struct nbd_held, log_link);

		if (held->epoch > epoch)
			continue;
		if (held->entry->state == JOURNAL_KEPT) {
			forget(held);
		} else if (held->entry->state == JOURNAL_ANSWERED) {
			held->entry->safe = true;
			journal_step();
		}
	}
}

/* Acknowledged, or about to be, and not durable: a kill of this process may take it away. */
static bool may_get_lost(const struct journal_entry *entry)
{
	return entry->state == JOURNAL_KEPT ||
	       (entry->state == JOURNAL_ANSWERED && !entry->error && !entry->safe);
}

static bool runs_short(const struct nbd_line *line)
{
	return line->free_count < JOURNAL_ENTRIES / 2 ||
	       nbd_line_space(line) < line->journal->ring_bytes / 2;
}

/* Its reply was sent. */
void journal_done(struct nbd_held *held)
{
	struct nbd_journal *journal = held->line->journal;
	struct journal_entry *entry = held->entry;

	if (!journal_changes_disk(entry->type) || entry->error || entry->safe ||
		held->epoch <= journal->durable_epoch) {
		forget(held);
		return;
	}
	entry->state = JOURNAL_KEPT;
	journal_step();
	journal->kept_count++;
	if (runs_short(held->line))
		nbd_line_wants_room(held->line, false);
}

/* --- flushing --------------------------------------------------------------------------------- */

/* The disk does not flush, and requests wait for the room. */
static void give_up(struct nbd_journal *journal, uint64_t epoch, int ret)
{
	if (!journal->gave_up)
		blk_notice(journal->export->blk,
			"cannot be flushed (%s), and there is no room to keep what was written "
			"since: "
			"what is not flushed is lost if the server is killed now",
			strerror(-ret));
	journal->gave_up = true;
	forget_until(journal, epoch);
}

static suspends int flush(struct nbd_journal *journal)
{
	uint64_t epoch = journal->epoch++;

	co_group_enter(&journal->flushes);
	int ret = blk_flush(journal->export->blk);
	journal->flush_failed = ret;
	if (!ret) {
		journal->gave_up = false;
		forget_until(journal, epoch);
	} else if (journal->full) {
		give_up(journal, epoch, ret);
	}
	journal->full = false;
	for (unsigned i = 0; i < journal->line_count; i++)
		if (journal->lines[i].conn)
			co_queue_wake_all(&journal->lines[i].conn->room);
	co_group_leave(&journal->flushes);
	return ret;
}

static suspends void flush_itself(void *arg)
{
	struct nbd_journal *journal = arg;

	flush(journal);
	journal->flushing_itself = false;
}

void nbd_line_wants_room(struct nbd_line *line, bool full)
{
	struct nbd_journal *journal = line->journal;

	journal->full = journal->full || full;
	if (journal->flushing_itself || !journal->kept_count || (journal->flush_failed && !full))
		return;
	journal->flushing_itself = true;
	co_start(flush_itself, journal);
}

suspends int nbd_journal_flush(struct nbd_journal *journal)
{
	return flush(journal);
}

static bool has_any_to_lose(const struct nbd_journal *journal)
{
	list_for_each (link, &journal->log)
		if (may_get_lost(list_entry(link, struct nbd_held, log_link)->entry))
			return true;
	return false;
}

suspends int nbd_journal_settle(struct nbd_export *export)
{
	if (!export->journal || !has_any_to_lose(export->journal))
		return 0;
	return flush(export->journal);
}

/* --- changes ---------------------------------------------------------------------------------- */

static bool overlaps_kept(const struct nbd_journal *journal, uint64_t off, uint64_t len)
{
	list_for_each (link, &journal->log) {
		const struct journal_entry *entry =
			list_entry(link, struct nbd_held, log_link)->entry;

		if (may_get_lost(entry) && ranges_overlap(entry->off, entry->len, off, len))
			return true;
	}
	return false;
}

suspends int nbd_journal_change(struct nbd_journal *journal, struct nbd_request *request)
{
	struct nbd_change change = nbd_change_of(request);
	bool overlaps = overlaps_kept(journal, change.off, change.len);
	bool fua = change.flags & NBD_CMD_FLAG_FUA;
	int ret = 0;

	if (!request->held) {
		if (overlaps)
			ret = flush(journal);
		return ret ? ret : nbd_change(journal->export->blk, &change);
	}
	if (!overlaps) {
		ret = nbd_change(journal->export->blk, &change);
		request->held->durable = fua && !ret;
		return ret;
	}
	change.flags &= (uint16_t)~NBD_CMD_FLAG_FUA;
	ret = nbd_change(journal->export->blk, &change);
	if (!ret && fua)
		ret = flush(journal);
	return ret;
}

/* --- doing again ------------------------------------------------------------------------------ */

static bool was_acknowledged(const struct nbd_held *held)
{
	const struct journal_entry *entry = held->entry;

	if (entry->state == JOURNAL_ANSWERED && entry->reply_at >= held->line->sent)
		return false;
	return may_get_lost(entry);
}

static suspends int do_again(const struct nbd_held *held, struct blk *blk)
{
	const struct journal_entry *entry = held->entry;
	uint64_t size = blk_caps(blk)->size; /* which may be smaller meanwhile */
	uint64_t off = MIN(entry->off, size);
	const struct nbd_change change = {
		.type = entry->type,
		.flags = entry->flags & NBD_CMD_FLAG_NO_HOLE,
		.off = off,
		.len = MIN((uint64_t)entry->len, size - off),
		.payload = journal_in(held->line, journal_payload_at(entry)),
	};

	return nbd_change(blk, &change);
}

static suspends int do_all_again(struct nbd_journal *journal, struct blk *blk, struct err *err)
{
	list_for_each (link, &journal->log) {
		const struct nbd_held *held = list_entry(link, struct nbd_held, log_link);
		const struct journal_entry *entry = held->entry;
		int ret = was_acknowledged(held) ? do_again(held, blk) : 0;

		if (ret)
			return err_sys(err, -ret,
				"cannot do again what was written at %llu, %u bytes, before the "
				"server was killed",
				(unsigned long long)entry->off, entry->len);
	}
	return 0;
}

static int check_lost(
	const struct nbd_journal *journal, const struct blk_caps *caps, struct err *err)
{
	if ((journal->resumed || journal->lost) && caps->dies_with_process)
		return err_set(err, ENOTRECOVERABLE,
			"what the disk held was in the memory of the server that is gone");
	if (journal->lost && caps->caches_writes)
		return err_set(err, ENOTRECOVERABLE,
			"what was written and not flushed may have been in the memory of the "
			"server "
			"that is gone, and nobody knows what that was");
	return 0;
}

/* Nobody remembers it twice: it is durable before it is forgotten. */
static suspends int settle_orphan(struct nbd_journal *journal, struct blk *blk, struct err *err)
{
	int ret = blk_flush(blk);

	if (ret)
		return err_sys(
			err, -ret, "cannot flush what was written before the server was killed");
	return journal_renew(journal, err);
}

suspends int nbd_journal_replay(
	struct nbd_journal *journal, struct nbd_export *export, struct err *err)
{
	if (export->journal)
		return err_set(err, EBUSY, "the export has a journal already");
	int ret = check_lost(journal, blk_caps(export->blk), err);
	if (!ret)
		ret = do_all_again(journal, export->blk, err);
	if (!ret && journal->orphaned)
		ret = settle_orphan(journal, export->blk, err);
	if (ret)
		return ret;
	if (journal->lost)
		journal->head->magic = JOURNAL_MAGIC;
	journal->lost = false;
	journal->export = export;
	export->journal = journal;
	return 0;
}
