/*
 * The nbd layer against real servers: nbdkit and qemu-nbd, started, stopped, frozen and killed.
 *
 * What the disk holds is compared with a model, through several connections, through small blocks and
 * requests, and through the death of the server under load. What may be lost must be told: by a flush.
 */
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "blk/nbd/remote.h"
#include "model.h"

#define SIZE_BYTES (1U << 20)
#define WORKERS    8
#define STEPS      60

/* --- the far server --------------------------------------------------------------------------- */

struct far {
	pid_t pid;
};

static bool answers(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "far" };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bool connected = !connect(fd, (struct sockaddr *)&address, sizeof(address));

	close(fd);
	return connected;
}

/* A command in the foreground, words separated by spaces, that listens on the unix socket "far". */
static suspends void far_start(struct far *far, const char *format, ...)
{
	char text[512], *words[32], *rest = NULL;
	int count = 0;
	va_list ap;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
		words[count++] = word;
	words[count] = NULL;
	unlink("far");
	far->pid = fork();
	if (!far->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(words[0], words);
		_exit(127);
	}
	while (!answers()) {
		ck_assert_msg(waitpid(far->pid, NULL, WNOHANG) == 0, "%s ended", words[0]);
		co_sleep_ns(5 * NS_PER_MS);
	}
}

static void far_kill(struct far *far)
{
	kill(far->pid, SIGKILL);
	waitpid(far->pid, NULL, 0);
}

static void freeze(struct far *far)
{
	kill(far->pid, SIGSTOP);
	waitpid(far->pid, NULL, WUNTRACED);
}

static void make_file(const char *path, off_t size)
{
	FILE *file = fopen(path, "w");

	ck_assert_ptr_nonnull(file);
	ck_assert_int_eq(ftruncate(fileno(file), size), 0);
	fclose(file);
}

#define NBDKIT "nbdkit -f -U far "

static suspends struct blk *far_disk(const char *options)
{
	return stack("nbd uri=nbd+unix:///disk?socket=far %s", options);
}

static json_int_t status_number(struct blk *blk, const char *key)
{
	json_t *status = blk_status(blk);
	json_int_t value = json_integer_value(json_object_get(status, key));

	json_decref(status);
	return value;
}

struct trouble {
	char text[sizeof(((struct err *)NULL)->text)]; /* "": none so far */
};

static struct trouble last_trouble(struct blk *blk)
{
	json_t *status = blk_status(blk);
	const char *text = json_string_value(
		json_object_get(json_object_get(status, "last_trouble"), "text"));
	struct trouble trouble;

	snprintf(trouble.text, sizeof(trouble.text), "%s", text ? text : "");
	json_decref(status);
	return trouble;
}

static bool is_trouble(struct blk *blk, const char *text)
{
	return !strcmp(last_trouble(blk).text, text);
}

static bool has_trouble(struct blk *blk, const char *part)
{
	return strstr(last_trouble(blk).text, part) != NULL;
}

static void expect_status(struct blk *blk, const char *state, const char *trouble)
{
	json_t *status = blk_status(blk);

	ck_assert_str_eq(json_string_value(json_object_get(status, "state")), state);
	if (trouble)
		ck_assert_str_eq(last_trouble(blk).text, trouble);
	json_decref(status);
}

/* --- the same bytes --------------------------------------------------------------------------- */

struct worker {
	struct model model; /* of its part alone */
	struct blk *blk;
	uint64_t start, len;
	unsigned steps, failed_flushes;
	bool may_fail_flush;
	struct co_group *group;
};

static suspends void work_once(struct worker *worker)
{
	struct model *model = &worker->model;
	uint64_t at = random_below(&model->random, worker->len);
	uint64_t len = 1 + random_below(&model->random, worker->len - at);
	uint64_t off = worker->start + at;
	unsigned flags = random_below(&model->random, 8) ? 0 : BLK_FUA;

	switch (random_below(&model->random, 8)) {
	case 0:
		ck_assert_int_eq(blk_discard(worker->blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 1:
		ck_assert_int_eq(blk_zero(worker->blk, off, len, flags), 0);
		memset(model->bytes + off, 0, len);
		break;
	case 2:
		if (blk_flush(worker->blk)) {
			ck_assert(worker->may_fail_flush);
			worker->failed_flushes++;
		}
		break;
	case 3:
	case 4:
		model_read(model, worker->blk, off, len);
		break;
	default:
		model_write(model, worker->blk, off, len, flags);
	}
}

static suspends void work(void *arg)
{
	struct worker *worker = arg;

	for (unsigned i = 0; i < worker->steps; i++)
		work_once(worker);
}

static suspends void start_workers(struct worker *workers, struct co_group *group,
	struct model *model, struct blk *blk, unsigned steps, bool may_fail_flush)
{
	co_group_init(group);
	for (unsigned i = 0; i < WORKERS; i++) {
		workers[i] = (struct worker){ *model, blk, model->size / WORKERS * i,
			model->size / WORKERS, steps, .may_fail_flush = may_fail_flush };
		workers[i].model.random = random_next(&model->random);
		co_group_start(group, work, &workers[i]);
	}
}

static suspends void same_bytes(const char *options, const char *server, bool exact_extents)
{
	struct worker workers[WORKERS];
	struct co_group group;
	struct model model;
	struct far far;

	far_start(&far, "%s", server);
	struct blk *blk = far_disk(options);
	model_init(&model, SIZE_BYTES);
	ck_assert_uint_eq(blk_caps(blk)->size, SIZE_BYTES);
	model_verify(&model, blk);
	start_workers(workers, &group, &model, blk, STEPS, false);
	co_group_wait(&group);
	model_run(&model, blk, STEPS);
	if (exact_extents) {
		uint64_t found_off;

		ck_assert_int_eq(blk_discard(blk, 0, SIZE_BYTES, 0), 0);
		ck_assert_int_eq(blk_seek_mapped(blk, 0, &found_off), 0);
		ck_assert_uint_eq(found_off, SIZE_BYTES);
	}
	ck_assert_int_eq(status_number(blk, "reconnects"), 0);
	stack_close(blk);
	model_fini(&model);
	far_kill(&far);
}

static suspends void case_same_bytes(void)
{
	make_file("image", SIZE_BYTES);
	same_bytes("", NBDKIT "memory 1M", true);
	same_bytes("connections=4", NBDKIT "memory 1M", true);
	same_bytes("connections=4", NBDKIT "file image", true);
	same_bytes("connections=16 write-through=true",
		NBDKIT "--filter=delay memory 1M rdelay=1ms wdelay=3ms", true);
}

static suspends void case_same_bytes_with_less_able_servers(void)
{
	same_bytes("connections=2",
		NBDKIT "--filter=blocksize-policy memory 1M blocksize-minimum=4096 "
		       "blocksize-preferred=64K blocksize-maximum=64K blocksize-error-policy=error",
		true);
	same_bytes("",
		NBDKIT
		"--filter=blocksize-policy memory 1M blocksize-minimum=512 "
		"blocksize-preferred=4096 blocksize-maximum=4096 blocksize-error-policy=error",
		true);
	same_bytes("", NBDKIT "--filter=nozero memory 1M", false);
	same_bytes("", NBDKIT "--filter=fua --filter=noextents memory 1M", false);
	same_bytes("", NBDKIT "--no-sr memory 1M", false);
}

/* It wants to be told the whole path of its socket. */
static suspends void same_bytes_with_qemu_nbd(const char *image)
{
	char server[512], folder[256];

	ck_assert_ptr_nonnull(getcwd(folder, sizeof(folder)));
	snprintf(server, sizeof(server),
		"qemu-nbd --shared=8 --persistent --discard=unmap -x disk -k %s/far %s", folder,
		image);
	same_bytes("connections=4", server, true);
}

static suspends void case_same_bytes_with_qemu_nbd(void)
{
	make_file("image", SIZE_BYTES);
	same_bytes_with_qemu_nbd("-f raw image");
	ck_assert_int_eq(system("qemu-img create -q -f qcow2 image.qcow2 1M"), 0);
	same_bytes_with_qemu_nbd("-f qcow2 image.qcow2");
}

static suspends void case_takes_over_what_the_server_can(void)
{
	struct far far;

	far_start(&far, NBDKIT "--filter=blocksize-policy memory 1M blocksize-minimum=4096 "
			       "blocksize-preferred=64K blocksize-maximum=1M");
	struct blk *blk = far_disk("");
	const struct blk_caps *caps = blk_caps(blk);
	ck_assert_uint_eq(caps->block_size, 4096);
	ck_assert_uint_eq(caps->preferred_size, 65536);
	ck_assert_uint_eq(caps->max_request, 1 << 20);
	ck_assert(caps->fua && caps->zero_fast && caps->discard && !caps->read_only);
	stack_close(blk);
	far_kill(&far);

	far_start(&far, NBDKIT "-r memory 1M");
	stack_refused("nbd: \"nbd+unix:///disk?socket=far\": the server offers it read-only, which "
		      "needs read-only = true",
		"nbd uri=nbd+unix:///disk?socket=far");
	blk = far_disk("read-only=true connections=3");
	ck_assert(blk_caps(blk)->read_only);
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), -EPERM);
	ck_assert_int_eq(blk_flush(blk), 0);
	stack_close(blk);
	far_kill(&far);
}

static suspends void case_space_is_given_back(void)
{
	struct far far;
	struct stat st;
	char *bytes = malloc(SIZE_BYTES);

	make_file("image", SIZE_BYTES);
	memset(bytes, 'x', SIZE_BYTES);
	far_start(&far, NBDKIT "file image");
	struct blk *blk = far_disk("");
	ck_assert_int_eq(blk_write(blk, 0, bytes, SIZE_BYTES, 0), 0);
	ck_assert_int_eq(blk_zero(blk, 0, SIZE_BYTES / 2, BLK_NO_HOLE | BLK_FUA), 0);
	stat("image", &st);
	ck_assert_int_ge(st.st_blocks * 512, SIZE_BYTES);
	ck_assert_int_eq(blk_discard(blk, 0, SIZE_BYTES, 0), 0);
	stat("image", &st);
	ck_assert_int_eq(st.st_blocks, 0);
	ck_assert_int_eq(blk_read(blk, 0, bytes, SIZE_BYTES), 0);
	ck_assert(all_bytes_are(bytes, SIZE_BYTES, 0));
	stack_close(blk);
	far_kill(&far);
	free(bytes);
}

/* --- loss of the server ----------------------------------------------------------------------- */

/* The file survives its server. What is not known to survive is told by a flush; the bytes are right. */
static suspends void case_server_killed_under_load(void)
{
	struct worker workers[WORKERS];
	struct co_group group;
	struct model model;
	struct far far;
	uint64_t random = unit_seed;
	/* Slow, so that something is under way whenever it is killed. */
	const char *server = NBDKIT "--filter=delay file image rdelay=1ms wdelay=1ms";

	make_file("image", SIZE_BYTES);
	for (int connections = 1; connections <= 4; connections += 3) {
		char options[64];

		far_start(&far, "%s", server);
		snprintf(options, sizeof(options), "connections=%d reconnect=30", connections);
		struct blk *blk = far_disk(options);
		model_init(&model, SIZE_BYTES);
		ck_assert_int_eq(blk_zero(blk, 0, SIZE_BYTES, 0), 0);
		start_workers(workers, &group, &model, blk, 4 * STEPS, true);
		for (int kills = 0; kills < 3 && group.running; kills++) {
			co_sleep_ns((5 + random_below(&random, 20)) * NS_PER_MS);
			far_kill(&far);
			co_sleep_ns(random_below(&random, 100) * NS_PER_MS);
			far_start(&far, "%s", server);
		}
		co_group_wait(&group);
		blk_flush(blk);
		model_verify(&model, blk);
		ck_assert_int_eq(blk_flush(blk), 0);
		ck_assert_int_ge(status_number(blk, "reconnects"), 1);
		ck_assert_int_ge(status_number(blk, "repeated_requests"), 1);
		stack_close(blk);
		model_fini(&model);
		far_kill(&far);
	}
}

static suspends void restart(struct far *far, const char *server)
{
	far_kill(far);
	far_start(far, "%s", server);
}

static suspends void case_flush_tells_of_a_loss(void)
{
	const char *server = NBDKIT "memory 1M";
	struct far far;

	far_start(&far, "%s", server);
	struct blk *blk = far_disk("");

	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), 0);
	restart(&far, server);
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), 0); /* that goes on is no excuse */
	ck_assert_int_eq(blk_flush(blk), -EIO);
	expect_status(blk, "connected",
		"a flush was refused: the connection was lost after writes that had not been "
		"flushed, and whether the server still has them cannot be known");
	ck_assert_int_eq(blk_flush(blk), 0);

	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), 0);
	ck_assert_int_eq(blk_flush(blk), 0);
	restart(&far, server);
	ck_assert_int_eq(blk_flush(blk), 0); /* nothing was at risk */

	ck_assert_int_eq(blk_write(blk, 0, "x", 1, BLK_FUA), 0);
	restart(&far, server);
	ck_assert_int_eq(blk_flush(blk), 0);

	ck_assert_int_eq(blk_zero(blk, 0, 1, 0), 0);
	restart(&far, server);
	ck_assert_int_eq(blk_flush(blk), -EIO);
	ck_assert_int_eq(status_number(blk, "refused_flushes"), 2);
	stack_close(blk);

	blk = far_disk("write-through=true");
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), 0);
	ck_assert_int_eq(blk_discard(blk, 0, 1, 0), 0);
	restart(&far, server);
	ck_assert_int_eq(blk_flush(blk), 0);
	stack_close(blk);
	far_kill(&far);
}

static suspends void case_server_gone_for_good(void)
{
	char byte;
	struct far far;

	far_start(&far, NBDKIT "memory 1M");
	struct blk *blk = far_disk("reconnect=1 reconnect-delay=1");
	far_kill(&far);
	ck_assert_int_eq(blk_read(blk, 0, &byte, 1), -EIO);
	expect_status(blk, "down", NULL);
	ck_assert_int_eq(blk_write(blk, 0, &byte, 1, 0), -EIO);
	struct blk_extent list[1];
	struct blk_extents extents;
	blk_extents_init(&extents, list, 1);
	ck_assert_int_eq(blk_extents(blk, 0, 512, &extents), -EIO);

	/* Nothing is for good. */
	far_start(&far, NBDKIT "memory 1M");
	while (blk_read(blk, 0, &byte, 1))
		co_sleep_ns(20 * NS_PER_MS);
	expect_status(blk, "connected", NULL);
	ck_assert_int_eq(blk_flush(blk), 0);
	stack_close(blk);
	far_kill(&far);
}

static suspends void case_server_freezes(void)
{
	char byte;
	struct far far;

	far_start(&far, NBDKIT "memory 1M");
	struct blk *blk = far_disk("timeout=1 reconnect=1");
	freeze(&far);
	ck_assert_int_eq(blk_read(blk, 0, &byte, 1), -EIO);
	kill(far.pid, SIGCONT);
	while (blk_read(blk, 0, &byte, 1))
		co_sleep_ns(20 * NS_PER_MS);
	/* Closing says goodbye to somebody who does not listen, and does not wait for long. */
	freeze(&far);
	stack_close(blk);
	far_kill(&far);
}

static suspends void expect_refused(struct blk *blk, const char *text)
{
	char byte;

	/* Until it is noticed, requests wait for what is to come, or are refused for the last reason. */
	for (;;) {
		ck_assert_int_eq(blk_read(blk, 0, &byte, 1), -EIO);
		if (is_trouble(blk, text))
			break;
		co_sleep_ns(20 * NS_PER_MS);
	}
	expect_status(blk, "refused", text);
	ck_assert_int_eq(blk_write(blk, 0, &byte, 1, 0), -EIO);
}

static suspends void case_another_disk_is_refused(void)
{
	char byte;
	struct far far;

	far_start(&far, NBDKIT "memory 1M");
	struct blk *blk = far_disk("reconnect-delay=1");
	restart(&far, NBDKIT "memory 2M");
	expect_refused(blk,
		"the server is back with a disk of 2097152 bytes, it had 1048576: it is refused");
	restart(&far, NBDKIT "-r memory 1M");
	expect_refused(blk, "the server is back read-only: it is refused");
	restart(&far, NBDKIT "memory 1M");
	while (blk_read(blk, 0, &byte, 1))
		co_sleep_ns(20 * NS_PER_MS);
	expect_status(blk, "connected", NULL);
	stack_close(blk);
	far_kill(&far);
}

/* One connection is not taken back, while the other works: that is lost later, and may wait for the next server. */
static suspends void case_another_disk_for_one_connection(void)
{
	const char *server = NBDKIT "file image";
	char byte;
	struct far far;

	make_file("image", SIZE_BYTES);
	far_start(&far, "%s", server);
	struct blk *blk = far_disk("connections=2");
	while (status_number(blk, "connections") < 2)
		co_sleep_ns(20 * NS_PER_MS);
	ck_assert_int_eq(truncate("image", 2 * SIZE_BYTES), 0);
	remote_conn_lose(&container_of(blk, struct remote, blk)->conns[1], EIO, "a test");
	while (!has_trouble(
		blk, "is back with a disk of 2097152 bytes, it had 1048576: it is refused"))
		co_sleep_ns(20 * NS_PER_MS);
	expect_status(blk, "connected", NULL);
	/* The next attempt may be under way: it has its answer while the other connection works, or never. */
	freeze(&far);
	co_sleep_ns(NS_PER_SEC / 2);
	far_kill(&far);
	ck_assert_int_eq(truncate("image", SIZE_BYTES), 0);
	far_start(&far, "%s", server);
	ck_assert_int_eq(blk_read(blk, 0, &byte, 1), 0);
	stack_close(blk);
	far_kill(&far);
}

static suspends void resize_fails(struct blk *blk, uint64_t size, const char *text)
{
	struct err err;

	ck_assert_int_lt(blk_resize(blk, size, BLK_FORCE, &err), 0);
	ck_assert_msg(strstr(err.text, text) != NULL, "%s", err.text);
}

/* The server has done it, and the layer is told to look. */
static suspends void case_another_size(void)
{
	char byte = 0;
	struct far far;
	struct err err;

	make_file("image", SIZE_BYTES);
	far_start(&far, NBDKIT "file image");
	struct blk *blk = far_disk("connections=3 reconnect=1 reconnect-delay=1");
	resize_fails(blk, 2 * SIZE_BYTES, "has 1048576 bytes on its server, not 2097152");
	ck_assert_int_eq(status_number(blk, "reconnects"), 0);
	ck_assert_int_eq(blk_write(blk, 7, "x", 1, 0), 0);
	ck_assert_int_eq(truncate("image", 2 * SIZE_BYTES), 0);
	ck_assert_int_eq(blk_resize(blk, 2 * SIZE_BYTES, 0, &err), 0);
	ck_assert_uint_eq(blk_caps(blk)->size, 2 * SIZE_BYTES);
	while (status_number(blk, "connections") < 3)
		co_sleep_ns(20 * NS_PER_MS);
	ck_assert_int_eq(blk_write(blk, 2 * SIZE_BYTES - 1, "y", 1, 0), 0);
	ck_assert_int_eq(blk_read(blk, 7, &byte, 1), 0);
	ck_assert_int_eq(byte, 'x');
	ck_assert_int_eq(blk_flush(blk), 0); /* nothing is in doubt */

	ck_assert_int_eq(truncate("image", 3 * SIZE_BYTES), 0);
	/* A size that nobody has costs nothing: no new connection could be made with the old one. */
	resize_fails(blk, 4 * SIZE_BYTES, "has 3145728 bytes on its server, not 4194304");
	ck_assert_int_eq(blk_read(blk, 7, &byte, 1), 0);
	ck_assert_int_eq(blk_resize(blk, 3 * SIZE_BYTES, 0, &err), 0);
	ck_assert_int_eq(blk_read(blk, 2 * SIZE_BYTES - 1, &byte, 1), 0);
	ck_assert_int_eq(byte, 'y');
	ck_assert_int_eq(truncate("image", SIZE_BYTES), 0);
	ck_assert_int_eq(blk_resize(blk, SIZE_BYTES, BLK_FORCE, &err), 0);
	ck_assert_int_eq(blk_read(blk, SIZE_BYTES - 1, &byte, 1), 0);

	/* At once, one after the other: some connections are always on their way, with the size of before. */
	for (uint64_t size = 2 * SIZE_BYTES; size <= 32 * SIZE_BYTES; size += SIZE_BYTES) {
		ck_assert_int_eq(truncate("image", (off_t)size), 0);
		ck_assert_msg(!blk_resize(blk, size, 0, &err), "%s", err.text);
	}

	far_kill(&far);
	resize_fails(blk, 2 * SIZE_BYTES, "no new connection: ");
	stack_close(blk);
}

static suspends void resize_to_double(void *arg)
{
	resize_fails(arg, 2 * SIZE_BYTES, "has 1048576 bytes on its server, not 2097152");
}

/*
 * The connection that has the new size cannot be used: the size is not the disk's. Descriptors run out, all but
 * one, so there is one for the socket, and none for watching it.
 */
static suspends void case_another_size_in_vain(void)
{
	struct rlimit limit, old_limit;
	struct co_group group;
	char byte = 0;
	struct far far;
	int fds[1024], count = 0;

	make_file("image", SIZE_BYTES);
	far_start(&far, NBDKIT "file image");
	struct blk *blk = far_disk("reconnect-delay=1");
	const struct remote_conn *conn = &container_of(blk, struct remote, blk)->conns[0];
	ck_assert_int_lt(nbd_aio_get_fd(conn->handle), conn->watch.fd);
	ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &old_limit), 0);
	limit = old_limit;
	limit.rlim_cur = (rlim_t)conn->watch.fd;
	ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
	ck_assert_int_lt(conn->watch.fd, ARRAY_LEN(fds));
	while ((fds[count] = dup(STDIN_FILENO)) >= 0)
		count++;

	ck_assert_int_eq(truncate("image", 2 * SIZE_BYTES), 0);
	co_group_init(&group);
	co_group_start(&group, resize_to_double, blk);
	while (!has_trouble(blk, "the connection cannot be watched"))
		co_sleep_ns(NS_PER_MS);
	ck_assert_int_eq(truncate("image", SIZE_BYTES), 0);
	ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &old_limit), 0);
	co_group_wait(&group);
	ck_assert_int_eq(blk_read(blk, SIZE_BYTES - 1, &byte, 1), 0);
	while (count)
		close(fds[--count]);
	stack_close(blk);
	far_kill(&far);
}

/* A resize must neither fail for what may be lost, nor keep it from whoever flushes next. */
static suspends void case_another_size_and_a_loss(void)
{
	char byte = 0;
	struct far far;
	struct err err;

	make_file("image", SIZE_BYTES);
	far_start(&far, NBDKIT "file image");
	struct blk *blk = far_disk("reconnect-delay=1");
	ck_assert_int_eq(blk_write(blk, 7, "x", 1, 0), 0);
	restart(&far, NBDKIT "file image");
	ck_assert_int_eq(blk_write(blk, 8, "y", 1, 0), 0);
	ck_assert_int_eq(truncate("image", 2 * SIZE_BYTES), 0);
	ck_assert_msg(!blk_resize(blk, 2 * SIZE_BYTES, 0, &err), "%s", err.text);
	ck_assert_int_eq(blk_flush(blk), -EIO);
	ck_assert_int_eq(blk_flush(blk), 0);

	ck_assert_int_eq(blk_write(blk, 9, "z", 1, 0), 0);
	far_kill(&far);
	ck_assert_int_eq(truncate("image", 3 * SIZE_BYTES), 0);
	far_start(&far, NBDKIT "file image");
	expect_refused(blk,
		"the server is back with a disk of 3145728 bytes, it had 2097152: it is refused");
	ck_assert_msg(!blk_resize(blk, 3 * SIZE_BYTES, 0, &err), "%s", err.text);
	ck_assert_int_eq(blk_read(blk, 9, &byte, 1), 0);
	ck_assert_int_eq(byte, 'z');
	ck_assert_int_eq(blk_flush(blk), -EIO);
	ck_assert_int_eq(blk_flush(blk), 0);
	stack_close(blk);
	far_kill(&far);
}

/* --- errors of the server --------------------------------------------------------------------- */

static suspends void case_errors_pass(void)
{
	char byte;
	struct far far;

	far_start(&far,
		NBDKIT "--filter=error memory 1M error-pwrite=ENOSPC error-pread=EIO "
		       "error-zero=ENOMEM error-extents=EIO error-pwrite-rate=100%% "
		       "error-pread-rate=100%% error-zero-rate=100%% error-extents-rate=100%%");
	struct blk *blk = far_disk("");
	struct blk_extent list[1];
	struct blk_extents extents;
	blk_extents_init(&extents, list, 1);
	ck_assert_int_eq(blk_write(blk, 0, "x", 1, 0), -ENOSPC);
	ck_assert_int_eq(blk_read(blk, 0, &byte, 1), -EIO);
	ck_assert_int_eq(blk_zero(blk, 0, 512, 0), -ENOMEM);
	ck_assert_int_eq(blk_discard(blk, 0, 512, 0), -ENOMEM);
	ck_assert_int_eq(blk_extents(blk, 0, 512, &extents), 0);
	ck_assert_uint_eq(list[0].flags, BLK_EXTENT_DATA);
	ck_assert_int_eq(status_number(blk, "reconnects"), 0);
	stack_close(blk);
	far_kill(&far);
}

/* A server that is shutting down is as good as gone: the request waits for the next one. */
static suspends void case_server_shutting_down(void)
{
	char byte = 0;
	struct far far;

	far_start(&far, NBDKIT
		"--filter=error memory 1M error=ESHUTDOWN error-rate=100%% error-file=going");
	struct blk *blk = far_disk("reconnect=1");
	ck_assert_int_eq(blk_write(blk, 7, "x", 1, BLK_FUA), 0);
	make_file("going", 0);
	ck_assert_int_eq(blk_read(blk, 7, &byte, 1), -EIO);
	unlink("going");
	while (blk_read(blk, 7, &byte, 1))
		co_sleep_ns(20 * NS_PER_MS);
	ck_assert_int_eq(byte, 'x');
	ck_assert_int_ge(status_number(blk, "repeated_requests"), 1);
	stack_close(blk);
	far_kill(&far);
}

static const struct unit_case cases[] = {
	CASE(case_same_bytes),
	CASE(case_same_bytes_with_less_able_servers),
	CASE(case_same_bytes_with_qemu_nbd),
	CASE(case_takes_over_what_the_server_can),
	CASE(case_space_is_given_back),
	CASE(case_server_killed_under_load),
	CASE(case_flush_tells_of_a_loss),
	CASE(case_server_gone_for_good),
	CASE(case_server_freezes),
	CASE(case_another_disk_is_refused),
	CASE(case_another_disk_for_one_connection),
	CASE(case_another_size),
	CASE(case_another_size_in_vain),
	CASE(case_another_size_and_a_loss),
	CASE(case_errors_pass),
	CASE(case_server_shutting_down),
};

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	return unit_main("nbd layer", cases, ARRAY_LEN(cases));
}
