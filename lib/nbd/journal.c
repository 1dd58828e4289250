/*
 * Seats: what makes a connection outlive the process that serves it; see journal.h, and
 * journal_private.h for what lies where.
 *
 * The process may die between any two instructions, inside a system call too; what it has stored until then
 * is there for the successor. So nothing ever has to be undone, and whatever takes several
 * stores becomes valid by one more, the last one:
 *
 *	received	Bytes go from the socket to their place in the ring, which follows from their
 *			position alone. How many did is counted by the kernel (journal_count.c).
 *	a request	Its entry is filled in, then `parsed` moves behind it. Before that the successor finds
 *			its bytes in the ring and parses them; afterwards it finds the entry. Where a
 *			request and its payload are incomplete nothing is noted at all.
 *	a reply		Everything that decides its bytes is in the entry (the data of a read in its ring)
 *			before `state` says so, and that before the first of them is sent. How many
 *			were is counted by the kernel. So the successor knows for each entry whether its
 *			reply was sent (it is done with), cut off (the rest, byte for byte, is sent), or not begun.
 *	done with	`state` becomes free, or kept, and only then is the space in the rings used again.
 *
 * A request that was not answered is done again. Nobody was told of it, so it is as if it had taken longer;
 * nobody who waits for what he wrote writes the same place meanwhile.
 *
 * The sockets may die as well, and the memory live on. Then nobody can tell what was sent. All that was answered may have
 * been acknowledged, and is done again; the driver repeats the rest over new sockets.
 *
 * A stack may keep what was written in its memory until a flush (blk_caps.caches_writes). What was acknowledged
 * is then kept here too, for the same time, and done again by the successor: journal_keep.c.
 *
 * What is found in the memory is input: every value is checked before it is used, and is refused
 * with an error when it cannot be. After that nobody else writes to it.
 *
 *	journal.c	the memory: sizes, mapping, checks
 *	journal_count.c	positions from what the kernel counts
 *	journal_line.c	what receive.c and reply.c do differently for such a connection
 *	journal_keep.c	acknowledged writes that are not durable yet
 */
#include "nbd/journal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"
#include "nbd/journal_private.h"

void (*nbd_journal_step)(void);

/* --- sizes ------------------------------------------------------------------------------------ */

static uint64_t ring_bytes_of(unsigned connections, uint64_t arena_bytes)
{
	uint64_t bytes = MIN(arena_bytes, NBD_JOURNAL_ARENA_MAX_BYTES) / 2 / connections;

	bytes = MAX(bytes, JOURNAL_RING_MIN_BYTES);
	return UINT64_C(1) << (63 - __builtin_clzll(bytes));
}

static uint64_t line_bytes(uint64_t ring_bytes)
{
	return JOURNAL_RINGS_OFF + 2 * ring_bytes;
}

static uint64_t memory_bytes_of(unsigned connections, uint64_t ring_bytes)
{
	return JOURNAL_PAGE_BYTES + connections * line_bytes(ring_bytes);
}

/* Room in a ring for more than the longest request alone. */
static uint32_t max_request_of(uint64_t ring_bytes)
{
	return (uint32_t)MIN(ring_bytes / 4 * 3, (uint64_t)BLK_REQUEST_MAX);
}

size_t nbd_journal_size(unsigned connections, uint64_t arena_bytes)
{
	return memory_bytes_of(connections, ring_bytes_of(connections, arena_bytes));
}

uint32_t nbd_journal_max_request(unsigned connections, uint64_t arena_bytes)
{
	return max_request_of(ring_bytes_of(connections, arena_bytes));
}

uint32_t nbd_line_max_request(const struct nbd_line *line)
{
	return max_request_of(line->journal->ring_bytes);
}

/* --- mapping ---------------------------------------------------------------------------------- */

/* What ring size makes a memory of so many bytes; 0: none does. */
static uint64_t ring_bytes_in(unsigned connections, uint64_t memory_bytes)
{
	for (uint64_t bytes = JOURNAL_RING_MIN_BYTES; bytes <= NBD_JOURNAL_ARENA_MAX_BYTES;
		bytes *= 2)
		if (memory_bytes_of(connections, bytes) == memory_bytes)
			return bytes;
	return 0;
}

/* The process's addresses: the same order, each ring twice. */
static uint64_t mapped_line_bytes(uint64_t ring_bytes)
{
	return JOURNAL_RINGS_OFF + 4 * ring_bytes;
}

static int map_at(uint8_t *at, uint64_t bytes, int fd, uint64_t off)
{
	void *mapped = mmap(at, bytes, PROT_READ | PROT_WRITE,
		MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, (off_t)off);

	return mapped == MAP_FAILED ? -errno : 0;
}

static int map_ring(uint8_t *at, uint64_t ring_bytes, int fd, uint64_t off)
{
	int ret = map_at(at, ring_bytes, fd, off);

	return ret ? ret : map_at(at + ring_bytes, ring_bytes, fd, off);
}

static int map_line(struct nbd_line *line, uint8_t *at, int fd, uint64_t off)
{
	uint64_t ring_bytes = line->journal->ring_bytes;
	int ret = map_at(at, JOURNAL_RINGS_OFF, fd, off);

	line->shared = (struct journal_line *)at;
	line->entries = (struct journal_entry *)(at + JOURNAL_ENTRIES_OFF);
	line->in = at + JOURNAL_RINGS_OFF;
	line->out = line->in + 2 * ring_bytes;
	if (!ret)
		ret = map_ring(line->in, ring_bytes, fd, off + JOURNAL_RINGS_OFF);
	if (!ret)
		ret = map_ring(line->out, ring_bytes, fd, off + JOURNAL_RINGS_OFF + ring_bytes);
	return ret;
}

static int map_all(struct nbd_journal *journal, int fd)
{
	uint64_t ring_bytes = journal->ring_bytes;

	journal->mapped_bytes = JOURNAL_PAGE_BYTES +
				journal->line_count * mapped_line_bytes(ring_bytes);
	void *mapped = mmap(NULL, journal->mapped_bytes, PROT_NONE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (mapped == MAP_FAILED)
		return -errno;
	journal->mapped = mapped;
	journal->head = mapped;
	int ret = map_at(journal->mapped, JOURNAL_PAGE_BYTES, fd, 0);
	for (unsigned i = 0; i < journal->line_count && !ret; i++)
		ret = map_line(&journal->lines[i],
			journal->mapped + JOURNAL_PAGE_BYTES + i * mapped_line_bytes(ring_bytes),
			fd, JOURNAL_PAGE_BYTES + i * line_bytes(ring_bytes));
	return ret;
}

/* --- a new seat ------------------------------------------------------------------------------- */

/* Counters are armed, or armed anew: what they say stays the same. */
static int arm_all(struct nbd_journal *journal, struct err *err)
{
	for (unsigned i = 0; i < journal->line_count; i++) {
		int ret = journal_arm_received(&journal->lines[i]);

		if (!ret)
			ret = journal_arm_sent(&journal->lines[i]);
		if (ret)
			return err_sys(err, -ret, "cannot count what connection %u consumes", i);
	}
	return 0;
}

/* Never the same for two sockets; 0 where it cannot be told. */
static uint64_t socket_of(const struct nbd_line *line)
{
	uint64_t cookie = 0;
	socklen_t len = sizeof(cookie);

	return getsockopt(line->ends.fd, SOL_SOCKET, SO_COOKIE, &cookie, &len) ? 0 : cookie;
}

static int format(struct nbd_journal *journal, uint64_t memory_bytes, struct err *err)
{
	for (unsigned i = 0; i < journal->line_count; i++) {
		struct nbd_line *line = &journal->lines[i];

		memset(line->shared, 0, sizeof(*line->shared));
		memset(line->entries, 0, JOURNAL_ENTRIES * sizeof(struct journal_entry));
		line->shared->socket = socket_of(line);
	}
	int ret = arm_all(journal, err);
	if (ret)
		return ret;
	*journal->head = (struct journal_head){
		.magic = journal->head->magic, /* of a blank one still, should this be the end */
		.version = JOURNAL_VERSION,
		.connections = journal->line_count,
		.memory_bytes = memory_bytes,
		.ring_bytes = journal->ring_bytes,
	};
	journal_step();
	journal->head->magic = journal->lost ? JOURNAL_LOST : JOURNAL_MAGIC;
	return 0;
}

/* --- a predecessor's -------------------------------------------------------------------------- */

static int check_head(const struct nbd_journal *journal, uint64_t memory_bytes, struct err *err)
{
	const struct journal_head *head = journal->head;

	if (head->magic != JOURNAL_MAGIC)
		return err_set(err, EUCLEAN, "this is no journal");
	if (head->version != JOURNAL_VERSION)
		return err_set(err, EPROTONOSUPPORT, "it is of version %u, this program's is %u",
			head->version, JOURNAL_VERSION);
	if (head->connections != journal->line_count)
		return err_set(err, EUCLEAN, "it is of %u connections, not of %u",
			head->connections, journal->line_count);
	if (head->memory_bytes != memory_bytes || head->ring_bytes != journal->ring_bytes)
		return err_set(err, EUCLEAN, "it was made for %llu bytes in rings of %llu",
			(unsigned long long)head->memory_bytes,
			(unsigned long long)head->ring_bytes);
	return 0;
}

static int check_entry(
	const struct nbd_line *line, const struct journal_entry *entry, struct err *err)
{
	const struct journal_line *shared = line->shared;
	uint64_t ring_bytes = line->journal->ring_bytes;

	if (entry->state > JOURNAL_KEPT)
		return err_set(err, EUCLEAN, "a request's state is %u", entry->state);
	if (entry->state == JOURNAL_KEPT && !journal_changes_disk(entry->type))
		return err_set(err, EUCLEAN, "a request of type %u is kept", entry->type);
	if (journal_request_end(entry) > shared->parsed)
		return err_set(err, EUCLEAN, "a request at %llu is only half there",
			(unsigned long long)entry->at);
	if (journal_payload_bytes(entry) && line->received - journal_payload_at(entry) > ring_bytes)
		return err_set(err, EUCLEAN, "the payload of a request at %llu is overwritten",
			(unsigned long long)entry->at);
	if (entry->state == JOURNAL_ANSWERED && entry->type == NBD_CMD_READ && !entry->error &&
		entry->len > ring_bytes)
		return err_set(err, EUCLEAN, "a read of %u bytes does not fit", entry->len);
	return 0;
}

static int by_position(const void *a, const void *b)
{
	const struct nbd_held *const *first = a, *const *second = b;
	uint64_t first_at = (*first)->entry->at, second_at = (*second)->entry->at;

	return (first_at > second_at) - (first_at < second_at);
}

static int by_order(const void *a, const void *b)
{
	const struct nbd_held *const *first = a, *const *second = b;
	uint64_t first_order = (*first)->entry->order, second_order = (*second)->entry->order;

	return (first_order > second_order) - (first_order < second_order);
}

static bool is_cut_off(const struct nbd_line *line, const struct journal_entry *entry)
{
	return entry->state == JOURNAL_ANSWERED && entry->reply_at < line->sent &&
	       journal_reply_end(entry) > line->sent;
}

/* found are the entries in use, by position: they do not overlap, and one reply at most is cut off. */
static int check_order(
	const struct nbd_line *line, struct nbd_held *const *found, unsigned count, struct err *err)
{
	unsigned cut_off = 0;

	for (unsigned i = 0; i < count; i++) {
		const struct journal_entry *entry = found[i]->entry;

		cut_off += is_cut_off(line, entry);
		if (i && journal_request_end(found[i - 1]->entry) > entry->at)
			return err_set(err, EUCLEAN, "two requests at %llu overlap",
				(unsigned long long)entry->at);
	}
	if (cut_off > 1)
		return err_set(err, EUCLEAN, "%u replies were cut off at once", cut_off);
	return 0;
}

/* Entries in use go to their places in the lists; the others are free. */
static int take_entries(struct nbd_line *line, struct nbd_held **found, struct err *err)
{
	unsigned count = 0;

	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++) {
		struct nbd_held *held = &line->held[i];
		struct journal_entry *entry = held->entry;

		if (entry->at >= line->shared->parsed)
			entry->state = JOURNAL_FREE; /* the last one, never entered */
		if (entry->state == JOURNAL_FREE)
			continue;
		int ret = check_entry(line, entry, err);
		if (ret)
			return ret;
		list_remove(&held->link);
		line->free_count--;
		found[count++] = held;
	}
	qsort(found, count, sizeof(struct nbd_held *), by_position);
	for (unsigned i = 0; i < count; i++) {
		struct nbd_held *held = found[i];

		if (journal_payload_bytes(held->entry))
			list_push_back(&line->in_use, &held->link);
		if (is_cut_off(line, held->entry)) {
			held->out_at = held->entry->data_at;
			line->out_end = held->out_at +
					round_up(held->entry->len, JOURNAL_PAGE_BYTES);
			list_push_back(&line->out_use, &held->out_link);
		}
	}
	return check_order(line, found, count, err);
}

static bool is_orphaned(const struct nbd_journal *journal)
{
	for (unsigned i = 0; i < journal->line_count; i++) {
		const struct nbd_line *line = &journal->lines[i];

		if (line->shared->socket && line->shared->socket != socket_of(line))
			return true;
	}
	return false;
}

static int take_positions(struct nbd_line *line, struct err *err)
{
	if (line->journal->orphaned) {
		line->received = line->shared->parsed; /* at least */
		line->sent = UINT64_MAX;               /* at most */
		return 0;
	}
	int ret = journal_count_received(line, &line->received, err);
	return ret ? ret : journal_count_sent(line, &line->sent, err);
}

static int take_line(struct nbd_line *line, struct nbd_held **found, struct err *err)
{
	uint64_t parsed = line->shared->parsed;
	int ret = take_positions(line, err);

	if (ret)
		return ret;
	if (parsed > line->received || line->received - parsed > line->journal->ring_bytes)
		return err_set(err, EUCLEAN, "%llu bytes were received and %llu used",
			(unsigned long long)line->received, (unsigned long long)parsed);
	return take_entries(line, found, err);
}

/* What changes the disk, over all connections, in the order of receipt. */
static void take_log(struct nbd_journal *journal, struct nbd_held **found)
{
	unsigned count = 0;

	for (unsigned i = 0; i < journal->line_count * JOURNAL_ENTRIES; i++) {
		struct nbd_line *line = &journal->lines[i / JOURNAL_ENTRIES];
		struct nbd_held *held = &line->held[i % JOURNAL_ENTRIES];
		const struct journal_entry *entry = held->entry;

		if (entry->state == JOURNAL_FREE)
			continue;
		journal->next_order = MAX(journal->next_order, entry->order + 1);
		if (journal_changes_disk(entry->type))
			found[count++] = held;
	}
	qsort(found, count, sizeof(struct nbd_held *), by_order);
	for (unsigned i = 0; i < count; i++) {
		list_push_back(&journal->log, &found[i]->log_link);
		journal->kept_count += found[i]->entry->state == JOURNAL_KEPT;
	}
}

static int take_over(struct nbd_journal *journal, uint64_t memory_bytes, struct err *err)
{
	int ret = check_head(journal, memory_bytes, err);

	if (ret)
		return ret;
	struct nbd_held **found = calloc(journal->line_count * JOURNAL_ENTRIES, sizeof(*found));
	if (!found)
		return err_set(err, ENOMEM, "out of memory");
	journal->orphaned = is_orphaned(journal);
	for (unsigned i = 0; i < journal->line_count && !ret; i++) {
		ret = take_line(&journal->lines[i], found, err);
		if (ret)
			err_wrap(err, "connection %u", i);
	}
	if (!ret)
		take_log(journal, found);
	free(found);
	journal->resumed = true;
	return ret || journal->orphaned ? ret : arm_all(journal, err);
}

/* --- opening and closing ---------------------------------------------------------------------- */

static int line_init(struct nbd_line *line, struct nbd_journal *journal, struct nbd_seat_ends ends)
{
	line->journal = journal;
	line->ends = ends;
	line->held = calloc(JOURNAL_ENTRIES, sizeof(*line->held));
	return line->held ? 0 : -ENOMEM;
}

static void line_put_entries(struct nbd_line *line)
{
	list_init(&line->free);
	list_init(&line->in_use);
	list_init(&line->out_use);
	for (unsigned i = 0; i < JOURNAL_ENTRIES; i++) {
		struct nbd_held *held = &line->held[i];

		held->line = line;
		held->entry = &line->entries[i];
		held->epoch = line->journal->epoch;
		list_init(&held->out_link);
		list_init(&held->log_link);
		list_push_back(&line->free, &held->link);
	}
	line->free_count = JOURNAL_ENTRIES;
}

static void journal_free(struct nbd_journal *journal)
{
	if (!journal)
		return;
	for (unsigned i = 0; i < journal->line_count; i++)
		free(journal->lines[i].held);
	if (journal->mapped)
		munmap(journal->mapped, journal->mapped_bytes);
	free(journal);
}

static struct nbd_journal *journal_create(const struct nbd_seat *seat)
{
	struct nbd_journal *journal = calloc(1, sizeof(*journal));

	if (!journal)
		return NULL;
	journal->line_count = seat->connections;
	journal->epoch = 1;
	journal->rearm_bytes = JOURNAL_REARM_BYTES;
	list_init(&journal->log);
	co_group_init(&journal->flushes);
	for (unsigned i = 0; i < seat->connections; i++) {
		if (line_init(&journal->lines[i], journal, seat->ends[i])) {
			journal_free(journal);
			return NULL;
		}
	}
	return journal;
}

static int open_memory(
	struct nbd_journal *journal, int fd, uint64_t memory_bytes, bool inherited, struct err *err)
{
	journal->ring_bytes = ring_bytes_in(journal->line_count, memory_bytes);
	if (!journal->ring_bytes)
		return err_set(err, EUCLEAN, "memory of %llu bytes is no journal of %u connections",
			(unsigned long long)memory_bytes, journal->line_count);
	int ret = map_all(journal, fd);
	if (ret)
		return err_sys(err, -ret, "cannot map it");
	for (unsigned i = 0; i < journal->line_count; i++)
		line_put_entries(&journal->lines[i]);
	uint64_t magic = journal->head->magic;
	journal->lost = magic == JOURNAL_LOST || (!magic && inherited);
	if (journal->lost || !magic || magic == JOURNAL_BLANK)
		return format(journal, memory_bytes, err);
	return take_over(journal, memory_bytes, err);
}

int journal_renew(struct nbd_journal *journal, struct err *err)
{
	uint64_t memory_bytes = journal->head->memory_bytes;

	journal->head->magic = JOURNAL_BLANK;
	journal_step();
	list_init(&journal->log);
	journal->kept_count = 0;
	journal->orphaned = false;
	for (unsigned i = 0; i < journal->line_count; i++) {
		line_put_entries(&journal->lines[i]);
		journal->lines[i].received = journal->lines[i].sent = 0;
	}
	return format(journal, memory_bytes, err);
}

int nbd_journal_open(const struct nbd_seat *seat, struct nbd_journal **opened, struct err *err)
{
	struct stat stat;
	int ret = journal_count_probe(err);

	*opened = NULL;
	if (ret)
		return ret;
	if (!seat->connections || seat->connections > NBD_SEAT_CONNECTIONS_MAX)
		return err_set(err, EINVAL, "a seat of %u connections", seat->connections);
	if (fstat(seat->memory_fd, &stat))
		return err_sys(err, errno, "the journal's memory");
	struct nbd_journal *journal = journal_create(seat);
	if (!journal)
		return err_set(err, ENOMEM, "out of memory");
	ret = open_memory(journal, seat->memory_fd, (uint64_t)stat.st_size, seat->inherited, err);
	if (ret) {
		journal_free(journal);
		return err_wrap(err, "journal of a kernel device");
	}
	*opened = journal;
	return 0;
}

bool nbd_journal_resumed(const struct nbd_journal *journal)
{
	return journal->resumed;
}

suspends void nbd_journal_close(struct nbd_journal *journal)
{
	if (!journal)
		return;
	if (journal->export)
		journal->export->journal = NULL;
	co_group_wait(&journal->flushes);
	journal_free(journal);
}
