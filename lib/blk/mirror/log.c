/*
 * The write-intent log: after a crash, only what it names is copied again. The format is in log_format.h.
 *
 * log.durable is what is on the disk. A change of a region whose bit is missing there waits for it
 * (mirror_log_require()); whoever comes first writes all that are wanted by then, so many wait for one write.
 * Bits are taken back by the settler only (mirror_log_relax()). Both hold log.mutex; a bit that is about to be
 * cleared on the disk is cleared in `durable` first.
 *
 * Opening. A log that fits the mirror is believed. One that is damaged, of another size, or of another secondary
 * means a full copy, and `note` says why. A file that holds something else altogether is refused: it may be
 * somebody's data. So is a log whose mirror was promoted: with the old roles, the copy would destroy
 * what was written since. Who writes to a leg behind the mirror's back must remove the log.
 *
 * Failure: when the log cannot be written, the secondary is given up (degraded), and the log is written anew
 * before it is used again. Until then the log on the disk does not know of what is written to the primary: a
 * crash meanwhile, with the log readable again afterwards, leaves differences that nobody knows of
 * (`blkstackctl mirror verify` finds them). So does a mirror that ended, while its log cannot be told.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "blk/mirror/log_format.h"
#include "blk/mirror/mirror_private.h"
#include "rt/buf.h"

static_assert(LOG_REGIONS_MAX == MIRROR_REGIONS_MAX, "the log has a bit for each region");

/* --- identity --------------------------------------------------------------------------------- */

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t len)
{
	for (size_t i = 0; i < len; i++)
		hash = (hash ^ ((const uint8_t *)bytes)[i]) * UINT64_C(0x100000001b3); /* FNV-1a */
	return hash;
}

/* How a disk is made when it is not there does not make it another one. */
static uint64_t hash_conf(uint64_t hash, const struct conf *conf)
{
	const char *name = conf->name ? conf->name : "", *text = conf->string ? conf->string : "";

	if (conf_name_equal(name, "create") || conf_name_equal(name, "size"))
		return hash;

	hash = hash_bytes(hash, name, strlen(name) + 1);
	hash = hash_bytes(hash, text, strlen(text) + 1);
	hash = hash_bytes(hash, &conf->integer, sizeof(conf->integer));
	hash = hash_bytes(hash, &conf->boolean, sizeof(conf->boolean));
	for (size_t i = 0; i < conf->item_count; i++)
		hash = hash_conf(hash, conf->items[i]);
	return hash;
}

/* What a leg was opened with; of a secondary that could not be opened, what it is to be opened with. */
static uint64_t identity_of(const struct mirror *mirror, const struct blk *leg)
{
	uint64_t hash = UINT64_C(0xcbf29ce484222325);

	for (size_t i = 0; !leg && i < mirror->secondary_conf->item_count; i++)
		hash = hash_conf(hash, mirror->secondary_conf->items[i]);
	for (; leg; leg = leg->below)
		hash = hash_conf(hash, leg->conf);
	return hash;
}

/* --- writing ---------------------------------------------------------------------------------- */

static uint32_t map_sectors(const struct mirror *mirror)
{
	return (uint32_t)((mirror->region_count + LOG_SECTOR_REGIONS - 1) / LOG_SECTOR_REGIONS);
}

static void fill_map(struct log_map *map, uint32_t index, const uint64_t *regions)
{
	memset(map, 0, sizeof(*map));
	map->index = be32_make(index);
	for (unsigned i = 0; i < LOG_WORDS && index * LOG_WORDS + i < MIRROR_REGION_WORDS; i++)
		map->words[i] = be64_make(regions[index * LOG_WORDS + i]);
	map->checksum = be32_make((uint32_t)crc32(0, (const Bytef *)map + sizeof(map->checksum),
		sizeof(*map) - sizeof(map->checksum)));
}

static bool sector_differs(uint32_t index, const uint64_t *a, const uint64_t *b)
{
	for (unsigned i = index * LOG_WORDS; i < (index + 1) * LOG_WORDS && i < MIRROR_REGION_WORDS;
		i++)
		if (a[i] != b[i])
			return true;
	return false;
}

/* The sectors in which `regions` differs from what is durable. The mutex is held. */
static suspends int write_map(struct mirror *mirror, const uint64_t *regions, bool all, bool flush)
{
	struct mirror_log *log = &mirror->log;
	struct log_map *map = buf_get(sizeof(*map));
	int ret = map ? 0 : -ENOMEM;

	for (uint32_t i = 0; i < map_sectors(mirror) && !ret; i++) {
		if (!all && !sector_differs(i, regions, log->durable))
			continue;
		fill_map(map, i, regions);
		ret = blk_write(log->blk, (1 + i) * LOG_SECTOR, map, sizeof(*map), 0);
		log->writes++;
	}
	buf_put(map, sizeof(*map));
	if (!ret && flush)
		ret = blk_flush(log->blk);
	return ret;
}

static suspends int write_header(struct mirror *mirror, enum log_state state)
{
	struct log_header *header = buf_get(sizeof(*header));

	if (!header)
		return -ENOMEM;
	memset(header, 0, sizeof(*header));
	memcpy(header->magic, LOG_MAGIC, sizeof(header->magic));
	header->version = be32_make(LOG_VERSION);
	header->state = be32_make(state);
	header->size = be64_make(mirror->blk.caps.size);
	header->region_size = be64_make(mirror->region_size);
	header->region_count = be64_make(mirror->region_count);
	header->identity = be64_make(identity_of(mirror, mirror->secondary));
	header->primary_identity = be64_make(identity_of(mirror, mirror->primary));
	header->checksum = be32_make((uint32_t)crc32(
		0, (const Bytef *)header, sizeof(*header) - sizeof(header->checksum)));
	int ret = blk_write(mirror->log.blk, 0, header, sizeof(*header), BLK_FUA);

	buf_put(header, sizeof(*header));
	return ret;
}

/* Nothing is durable but what is certain: all bits, until they have been written. */
static void failed(struct mirror *mirror)
{
	mirror->log.broken = true;
	memset(mirror->log.durable, 0, sizeof(mirror->log.durable));
}

static suspends int rewrite(struct mirror *mirror)
{
	struct mirror_log *log = &mirror->log;
	uint64_t needed[MIRROR_REGION_WORDS];
	int ret;

	ret = write_header(mirror, LOG_ENDED); /* a torn rewrite means a full copy */
	mirror_regions_needed(mirror, needed);
	if (!ret)
		ret = write_map(mirror, needed, true, true);
	if (!ret)
		ret = write_header(mirror, log->turned ? LOG_TURNED : LOG_IN_USE);
	log->broken = ret != 0;
	if (!ret)
		memcpy(log->durable, needed, sizeof(needed));
	return ret;
}

suspends int mirror_log_rewrite(struct mirror *mirror)
{
	struct mirror_log *log = &mirror->log;
	int ret = 0;

	if (!log->blk)
		return 0;
	co_mutex_lock(&log->mutex);
	/* Whoever was about to when the mirror ended comes too late. */
	if (!log->ended)
		ret = rewrite(mirror);
	co_mutex_unlock(&log->mutex);
	return ret;
}

static bool is_durable(const struct mirror *mirror, uint64_t off, uint64_t len)
{
	uint64_t first = off / mirror->region_size;
	uint64_t count = (off + len - 1) / mirror->region_size - first + 1;

	return bitmap_test(mirror->log.durable, first) &&
	       (count == 1 || bitmap_run(mirror->log.durable, first, count) == count);
}

/* Not inlined: its frame is large, and it is rarely needed. */
__attribute__((noinline)) static suspends int make_durable(
	struct mirror *mirror, uint64_t off, uint64_t len)
{
	struct mirror_log *log = &mirror->log;
	uint64_t wanted[MIRROR_REGION_WORDS];
	int ret;

	if (log->broken)
		return -EIO;
	if (is_durable(mirror, off, len))
		return 0;
	/* All that anybody wants: who waits for the mutex marked it recent before. */
	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		wanted[i] = log->durable[i] | mirror->recent[i];
	ret = write_map(mirror, wanted, false, true);
	if (ret)
		failed(mirror);
	else
		memcpy(log->durable, wanted, sizeof(wanted));
	return ret;
}

suspends int mirror_log_require(struct mirror *mirror, uint64_t off, uint64_t len)
{
	struct mirror_log *log = &mirror->log;
	int ret;

	if (!log->blk || likely(is_durable(mirror, off, len)))
		return 0;
	co_mutex_lock(&log->mutex);
	ret = make_durable(mirror, off, len);
	co_mutex_unlock(&log->mutex);
	return ret;
}

suspends void mirror_log_relax(struct mirror *mirror)
{
	struct mirror_log *log = &mirror->log;
	uint64_t needed[MIRROR_REGION_WORDS];

	if (!log->blk || log->broken || !mirror_leg_used(mirror))
		return;
	co_mutex_lock(&log->mutex);
	mirror_regions_needed(mirror, needed);
	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		needed[i] &= log->durable[i];
	if (memcmp(needed, log->durable, sizeof(needed))) {
		uint64_t was[MIRROR_REGION_WORDS];

		memcpy(was, log->durable, sizeof(was));
		memcpy(log->durable, needed, sizeof(needed));
		for (uint32_t i = 0; i < map_sectors(mirror) && !log->broken; i++) {
			struct log_map map;

			if (!sector_differs(i, needed, was))
				continue;
			fill_map(&map, i, needed);
			if (blk_write(log->blk, (1 + i) * LOG_SECTOR, &map, sizeof(map), 0))
				failed(mirror);
			log->writes++;
		}
	}
	co_mutex_unlock(&log->mutex);
}

suspends int mirror_log_turn(struct mirror *mirror)
{
	mirror->log.turned = true;
	return mirror_log_rewrite(mirror);
}

/* The mutex is held. */
static suspends void write_end(struct mirror *mirror)
{
	struct mirror_log *log = &mirror->log;
	int ret = write_header(mirror, log->promoted ? LOG_PROMOTED : LOG_ENDED);

	if (ret && !log->end_untold)
		blk_notice(&mirror->blk,
			"the intent log \"%s\" cannot be told that the mirror has ended, which is "
			"tried again: %s",
			mirror->log_path, strerror(-ret));
	log->end_untold = ret != 0;
	log->ended = true;
	if (ret)
		mirror_want_settling(mirror);
}

suspends void mirror_log_end(struct mirror *mirror, bool promoted)
{
	struct mirror_log *log = &mirror->log;

	if (!log->blk || likely(log->ended))
		return;
	co_mutex_lock(&log->mutex);
	if (!log->ended) {
		log->promoted = promoted;
		write_end(mirror);
	}
	co_mutex_unlock(&log->mutex);
}

suspends void mirror_log_end_again(struct mirror *mirror)
{
	struct mirror_log *log = &mirror->log;

	co_mutex_lock(&log->mutex);
	if (log->end_untold)
		write_end(mirror);
	co_mutex_unlock(&log->mutex);
}

/* --- opening ---------------------------------------------------------------------------------- */

static bool all_zero(const void *bytes, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (((const uint8_t *)bytes)[i])
			return false;
	return true;
}

/* One rule per if. NULL: the header is sound and fits; else why the log cannot be used. */
static const char *header_problem(const struct mirror *mirror, const struct log_header *header)
{
	if (be32_get(header->checksum) !=
		(uint32_t)crc32(0, (const Bytef *)header, sizeof(*header) - sizeof(be32)))
		return "is damaged (checksum of the header)";
	if (be32_get(header->version) != LOG_VERSION)
		return "has a version that is not known";
	if (be64_get(header->size) != mirror->blk.caps.size)
		return "is that of a disk of another size";
	if (be64_get(header->region_size) != mirror->region_size ||
		be64_get(header->region_count) != mirror->region_count)
		return "has regions of another size";
	if (be64_get(header->identity) != identity_of(mirror, mirror->secondary))
		return "is that of another secondary";
	if (be32_get(header->state) == LOG_ENDED)
		return "says that the legs went separate ways";
	if (be32_get(header->state) > LOG_TURNED)
		return "is damaged (state)";
	return NULL;
}

/* Into `regions`; NULL or what is wrong. */
static suspends const char *read_map(struct mirror *mirror, uint64_t *regions)
{
	struct log_map map;

	for (uint32_t index = 0; index < map_sectors(mirror); index++) {
		if (blk_read(mirror->log.blk, (1 + index) * LOG_SECTOR, &map, sizeof(map)))
			return "cannot be read";
		if (be32_get(map.checksum) != (uint32_t)crc32(0, (const Bytef *)&map + sizeof(be32),
						      sizeof(map) - sizeof(be32)) ||
			be32_get(map.index) != index)
			return "is damaged (checksum of the map)";
		for (unsigned i = 0; i < LOG_WORDS; i++)
			if (index * LOG_WORDS + i < MIRROR_REGION_WORDS)
				regions[index * LOG_WORDS + i] = be64_get(map.words[i]);
	}
	return NULL;
}

static suspends int open_child(struct mirror *mirror, struct err *err)
{
	struct conf *list = conf_new(CONF_LIST, NULL, NULL);
	struct conf *file = conf_add(list, conf_new(CONF_GROUP, NULL, mirror->blk.conf->where));

	conf_add(file, conf_new_string("layer", NULL, "file"));
	conf_add(file, conf_new_string("path", NULL, mirror->log_path));
	conf_add(file, conf_new_bool("create", NULL, true));
	conf_add(file, conf_new_int("size", NULL, LOG_SIZE));
	mirror->blk.own_conf = list;

	int ret = blk_open_child(&mirror->blk, list, false, &mirror->log.blk, err);

	if (ret)
		return err_wrap(err, "intent-log");
	if (blk_caps(mirror->log.blk)->size < (1 + map_sectors(mirror)) * LOG_SECTOR)
		return err_set(err, EINVAL,
			"intent-log \"%s\" has %llu bytes, too few: a log needs %u",
			mirror->log_path, (unsigned long long)blk_caps(mirror->log.blk)->size,
			LOG_SIZE);
	return 0;
}

/* With these roles the copy would destroy what was written since a promotion. */
static bool has_newer_secondary(
	const struct mirror *mirror, const struct log_header *header, const char *problem)
{
	bool is_log = !memcmp(header->magic, LOG_MAGIC, sizeof(header->magic));

	if (!problem)
		return be32_get(header->state) == LOG_PROMOTED;
	return is_log && be32_get(header->state) == LOG_TURNED &&
	       be64_get(header->identity) == identity_of(mirror, mirror->primary) &&
	       be64_get(header->primary_identity) == identity_of(mirror, mirror->secondary);
}

/* What is dirty according to the log. -errno: this file must not be used at all. */
static suspends int believe(struct mirror *mirror, struct err *err)
{
	uint64_t regions[MIRROR_REGION_WORDS] = { 0 };
	const char *problem = NULL;
	struct log_header header;
	int ret = blk_read(mirror->log.blk, 0, &header, sizeof(header));

	if (ret)
		return err_sys(err, -ret, "intent-log \"%s\"", mirror->log_path);
	if (all_zero(&header, sizeof(header)))
		problem = "is new";
	else if (memcmp(header.magic, LOG_MAGIC, sizeof(header.magic)))
		return err_set(err, EINVAL,
			"intent-log \"%s\" is no intent log, but something else; name another file",
			mirror->log_path);
	else
		problem = header_problem(mirror, &header);
	if (has_newer_secondary(mirror, &header, problem))
		return err_set(err, EINVAL,
			"the secondary of this mirror was promoted: it has the current data, and "
			"the primary is old. Exchange them in the config, or remove the intent log "
			"\"%s\" to overwrite the secondary",
			mirror->log_path);
	if (!problem)
		problem = read_map(mirror, regions);
	mirror->log.turned = !problem && be32_get(header.state) == LOG_TURNED;
	if (problem) {
		snprintf(mirror->note, sizeof(mirror->note),
			"everything is copied: the intent log %s", problem);
		if (!mirror->overwrite)
			return err_set(err, EPERM,
				"the intent log %s, so the secondary would be overwritten: say "
				"overwrite = true",
				problem);
		return 0;
	}
	mirror_dirty_clear(mirror, 0, mirror->blk.caps.size);
	for (uint64_t i = 0; i < mirror->region_count; i++)
		if (bitmap_test(regions, i))
			mirror_dirty_set(mirror, i * mirror->region_size,
				MIN(mirror->region_size,
					mirror->blk.caps.size - i * mirror->region_size));
	snprintf(mirror->note, sizeof(mirror->note),
		"only what the intent log names is copied: %llu of %llu bytes",
		(unsigned long long)mirror_bytes_dirty(&mirror->blk),
		(unsigned long long)mirror->blk.caps.size);
	return 0;
}

suspends int mirror_log_open(struct mirror *mirror, struct err *err)
{
	int ret;

	if (!mirror->log_path) {
		snprintf(mirror->note, sizeof(mirror->note),
			"everything is copied: there is no intent log");
		return 0;
	}
	ret = open_child(mirror, err);
	if (!ret)
		ret = believe(mirror, err);
	if (ret)
		return ret;
	ret = mirror_log_rewrite(mirror);
	return ret ? err_sys(err, -ret, "intent-log \"%s\"", mirror->log_path) : 0;
}
