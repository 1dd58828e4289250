/*
 * Fuzzes the qcow layer: an input is an image.
 *
 * Its first byte is the seed of the requests that are made, the second says whether the image is opened
 * read-only; the rest is the file, in memory. What opens is read, written, discarded, flushed, checked and
 * compacted, and its snapshots are listed. Errors are fine; crashes, leaks and endless loops are for the
 * sanitizers and libFuzzer's limits to find.
 */
#include <stdlib.h>

#include "base/util.h"
#include "blk/qcow/compact.h"
#include "blk/qcow/live.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FILE_BYTES  (256 * 1024)
#define REQUESTS    24
#define REQUEST_MAX 8192

struct input {
	const uint8_t *data;
	size_t size;
};

static struct conf *layer(struct conf *stack, const char *name)
{
	struct conf *group = conf_add(stack, conf_new(CONF_GROUP, NULL, NULL));

	conf_add(group, conf_new_string("layer", NULL, name));
	return group;
}

/* The same name is the same disk, so one stack fills the file that the other has below its qcow. */
static struct conf *make_stack(bool with_qcow)
{
	struct conf *stack = conf_new(CONF_LIST, NULL, NULL);

	if (with_qcow)
		conf_add(layer(stack, "qcow"), conf_new_string("cache", NULL, "64K"));
	struct conf *memory = layer(stack, "memory");
	conf_add(memory, conf_new_string("name", NULL, "file"));
	conf_add(memory, conf_new_int("size", NULL, FILE_BYTES));
	return stack;
}

static suspends void use(struct blk *top, unsigned seed)
{
	static uint8_t buf[REQUEST_MAX];
	struct qcow_check_result result;
	struct qcow_snapshots list;
	struct qcow_compact job = { 0 };
	uint64_t size = blk_caps(top)->size;
	struct err err;

	for (int i = 0; i < REQUESTS; i++) {
		seed = seed * 1103515245 + 12345;
		uint64_t len = MIN(size, (uint64_t)(seed >> 8) % REQUEST_MAX + 1);
		/* Most of it where a small image has something. */
		uint64_t off = (seed >> 12) % MIN(size - len + 1, UINT64_C(65536));

		switch (seed >> 16 & 7) {
		case 0:
			blk_discard(top, off, len, 0);
			break;
		case 1:
			blk_flush(top);
			break;
		case 2:
		case 3:
			blk_write(top, off, buf, len, 0);
			break;
		default:
			blk_read(top, off, buf, len);
		}
	}
	qcow_live_check(top, NULL, &result, &err);
	if (!qcow_live_snapshots(top, &list, &err))
		qcow_snapshots_fini(&list);
	qcow_compact(top, &job, &err);
}

static suspends void run(void *arg)
{
	const struct input *input = arg;
	struct conf *file_conf = make_stack(false), *image_conf = make_stack(true);
	struct blk *file, *top;
	struct blk_env env;
	struct err err;

	if (blk_env_init(&env) || stack_open(file_conf, &env, false, &file, &err) ||
		blk_write(file, 0, input->data + 2, MIN(input->size - 2, (size_t)FILE_BYTES), 0))
		abort();
	if (!stack_open(image_conf, &env, input->data[1] & 1, &top, &err)) {
		use(top, input->data[0]);
		stack_close(top);
	}
	stack_close(file);
	blk_env_fini(&env);
	conf_free(file_conf);
	conf_free(image_conf);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = { .data = data, .size = size };
	struct reactor *reactor;
	struct err err;

	if (size < 2)
		return 0;
	if (reactor_create(&reactor, "threads", &err))
		abort();
	reactor_run_main(reactor, run, &input);
	reactor_free(reactor);
	return 0;
}
