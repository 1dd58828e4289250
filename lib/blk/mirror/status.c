/*
 * What a mirror tells of itself: keys of blk_status(), described in org.blkstack.varlink (type Mirror).
 */
#include "blk/mirror/mirror_private.h"

/* Slots of seconds that went by without anything are empty. */
static void meter_turn(struct mirror_meter *meter)
{
	uint64_t now = reactor_now_ns() / NS_PER_SEC;

	if (now - meter->second > ARRAY_LEN(meter->slots))
		meter->second = now - ARRAY_LEN(meter->slots);
	while (meter->second < now)
		meter->slots[++meter->second % ARRAY_LEN(meter->slots)] = 0;
}

void mirror_meter_add(struct mirror_meter *meter, uint64_t amount)
{
	meter_turn(meter);
	meter->slots[meter->second % ARRAY_LEN(meter->slots)] += amount;
}

uint64_t mirror_meter_rate(struct mirror_meter *meter)
{
	const unsigned full = ARRAY_LEN(meter->slots) - 1;
	uint64_t sum = 0;

	meter_turn(meter);
	for (unsigned i = 1; i <= full; i++)
		sum += meter->slots[(meter->second + i) % ARRAY_LEN(meter->slots)];
	return sum / full;
}

static const char *phase_name(const struct mirror *mirror)
{
	static const char *const names[] = {
		[MIRROR_COPYING] = "copying",
		[MIRROR_IN_SYNC] = "in_sync",
		[MIRROR_DEGRADED] = "degraded",
		[MIRROR_DETACHED] = "ended",
	};

	if (mirror->paused && mirror->phase == MIRROR_COPYING)
		return "paused";
	if (mirror->phase == MIRROR_IN_SYNC && mirror->dirty_count)
		return "copying";
	return names[mirror->phase];
}

static json_t *failure_status(const struct mirror_failure *failure)
{
	if (!failure->count)
		return json_null();
	return json_pack("{s:s, s:I, s:I}", "text", failure->text, "time",
		(json_int_t)failure->time, "count", (json_int_t)failure->count);
}

static json_t *log_status(const struct mirror *mirror)
{
	const struct mirror_log *log = &mirror->log;
	json_int_t set = 0;

	if (!log->blk)
		return json_null();
	for (size_t i = 0; i < MIRROR_REGION_WORDS; i++)
		set += __builtin_popcountll(log->durable[i]);
	return json_pack("{s:s, s:I, s:I, s:I, s:I, s:b}", "path", mirror->log_path, "region_size",
		(json_int_t)mirror->region_size, "regions", (json_int_t)mirror->region_count,
		"regions_set", set, "writes", (json_int_t)log->writes, "broken", log->broken);
}

static void set(json_t *object, const char *key, uint64_t value)
{
	json_object_set_new(object, key, json_integer((json_int_t)value));
}

/* Of the time that guests' changes take, what is the secondary's alone. */
static double slowed_share(struct mirror *mirror)
{
	uint64_t total_ns = mirror_meter_rate(&mirror->change_ns);
	uint64_t wait_ns = mirror_meter_rate(&mirror->wait_ns);

	return total_ns ? (double)wait_ns / (double)total_ns : 0;
}

/* Rates are means since this copy began. */
static void progress_status(struct mirror *mirror, json_t *object)
{
	uint64_t size = mirror->blk.caps.size, dirty = mirror_bytes_dirty(&mirror->blk);
	uint64_t done = mirror->copied_bytes + mirror->skipped_bytes - mirror->began_bytes;
	double seconds = (double)(reactor_now_ns() - mirror->began_ns) / (double)NS_PER_SEC;
	bool copying = mirror->phase == MIRROR_COPYING && !mirror->paused;
	double rate = copying && seconds > 0 ? (double)done / seconds : 0;

	set(object, "bytes", size);
	set(object, "bytes_dirty", dirty);
	set(object, "bytes_copied", mirror->copied_bytes);
	set(object, "bytes_skipped", mirror->skipped_bytes);
	json_object_set_new(object, "percent",
		json_real((double)(size - dirty) * 100 / (double)MAX(size, UINT64_C(1))));
	set(object, "rate", (uint64_t)rate);
	set(object, "rate_limit", mirror->rate);
	json_object_set_new(object, "seconds_left",
		rate >= 1 ? json_integer((json_int_t)((double)dirty / rate)) : json_null());
	set(object, "guest_bytes_written", mirror->guest_written);
	set(object, "guest_rate", mirror_meter_rate(&mirror->written));
	set(object, "dirty_rate", mirror_meter_rate(&mirror->dirtied));
	json_object_set_new(object, "guests_slowed", json_real(slowed_share(mirror)));
	/* Nothing that is copied becomes dirty again, so it comes to an end if it moves at all. */
	json_object_set_new(
		object, "converges", json_boolean(copying || mirror->phase == MIRROR_IN_SYNC));
}

void mirror_add_status(struct blk *blk, json_t *object)
{
	struct mirror *mirror = to_mirror(blk);
	uint64_t now_ns = reactor_now_ns();
	bool retries = mirror->retry_at_ns > now_ns && mirror->retry_at_ns != NO_DEADLINE;

	json_object_set_new(object, "phase", json_string(phase_name(mirror)));
	set(object, "phase_since", (uint64_t)mirror->phase_time);
	json_object_set_new(object, "note", json_string(mirror->note));
	progress_status(mirror, object);
	set(object, "chunk", mirror->chunk_size);
	set(object, "completed", mirror->completed_count);
	set(object, "reads_from_secondary", mirror->served_by_secondary);
	json_object_set_new(object, "secondary_error", failure_status(&mirror->secondary_failure));
	json_object_set_new(object, "primary_error", failure_status(&mirror->primary_failure));
	json_object_set_new(object, "retry_seconds",
		retries ? json_integer((json_int_t)((mirror->retry_at_ns - now_ns) / NS_PER_SEC))
			: json_null());
	json_object_set_new(object, "intent_log", log_status(mirror));
}

json_t *mirror_status(struct blk *blk)
{
	json_t *object = json_object();

	mirror_add_status(blk, object);
	return object;
}
