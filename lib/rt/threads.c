/*
 * The "threads" engine: file I/O by blocking system calls on a pool of threads; see engine.h.
 *
 * For systems that forbid io_uring. What coroutines submit in one turn is handed to the pool in one go;
 * a thread posts the finished request to its reactor, and what is finished while the reactor is
 * busy shares one wake-up. The pool is shared by all reactors.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/util.h"
#include "rt/engine.h"
#include "rt/pool.h"

/* As deep as a disk profits from; threads are started only as they are needed. */
#define IO_THREADS_MAX 32

struct threads {
	struct engine engine;
	struct list batch; /* of this turn */
	unsigned batch_count;
};

static struct threads *to_threads(struct engine *engine)
{
	return container_of(engine, struct threads, engine);
}

/* --- in the pool's threads -------------------------------------------------------------------- */

static int64_t request_execute(const struct io_request *request)
{
	struct iovec iov = { .iov_base = request->buf, .iov_len = request->len_bytes };
	off_t off = (off_t)request->off;

	switch (request->op) {
	case IO_OP_READ:
		return preadv2(request->fd, &iov, 1, off, request->flags);
	case IO_OP_WRITE:
		return pwritev2(request->fd, &iov, 1, off, request->flags);
	case IO_OP_FDATASYNC:
		return fdatasync(request->fd);
	case IO_OP_FALLOCATE:
		return fallocate(request->fd, request->flags, off, (off_t)request->len_bytes);
	}
	errno = EINVAL;
	return -1;
}

static void request_done(struct task *task)
{
	struct io_request *request = container_of(task, struct io_request, task);

	engine_complete(request, request->result);
}

static void request_run(struct list *item)
{
	struct io_request *request = list_entry(item, struct io_request, task.link);
	int64_t result = request_execute(request);

	request->result = result < 0 ? -errno : result;
	task_init(&request->task, request_done);
	reactor_post(request->reactor, &request->task);
}

static struct pool io_pool = POOL_INIT(io_pool, "blk-io", IO_THREADS_MAX, request_run);

/* --- in the reactor's thread ------------------------------------------------------------------ */

static int threads_create(struct engine **engine, struct reactor *reactor, struct err *err)
{
	struct threads *threads = calloc(1, sizeof(*threads));

	if (!threads)
		return err_set(err, ENOMEM, "no memory for the threads engine");
	threads->engine.ops = &threads_engine_ops;
	list_init(&threads->batch);
	*engine = &threads->engine;
	return 0;
}

static int threads_start(struct engine *engine)
{
	return 0;
}

static void threads_submit(struct engine *engine, struct io_request *request)
{
	struct threads *threads = to_threads(engine);

	list_push_back(&threads->batch, &request->task.link);
	threads->batch_count++;
}

static bool threads_kick(struct engine *engine)
{
	struct threads *threads = to_threads(engine);

	if (threads->batch_count)
		pool_submit(&io_pool, &threads->batch, threads->batch_count);
	threads->batch_count = 0;
	return false;
}

static void threads_stop(struct engine *engine)
{
}

static void threads_free(struct engine *engine)
{
	free(to_threads(engine));
}

const struct engine_ops threads_engine_ops = {
	.name = "threads",
	.create = threads_create,
	.start = threads_start,
	.submit = threads_submit,
	.kick = threads_kick,
	.stop = threads_stop,
	.free = threads_free,
};
