/*
 * How many bytes a connection has received and sent, whatever happened to who did it.
 *
 * The kernel counts: a receive takes what it consumed off its socket's SO_PEEK_OFF, in the same
 * breath and whether the process lives to see it or not; the option is for peeking, which nobody does here. On
 * the server's end that counts what we received. On the driver's end it counts what the driver took of
 * what we sent; the rest is still there, and SIOCINQ says how much.
 *
 * Reading the driver's end while it receives: the kernel changes the two values one after the other
 * under a lock of the socket, so they are read until the first one is the same before and after the
 * second one, and after waiting for that lock: a peek at no bytes takes it, and nothing else.
 *
 * A counter stands still at 0, so it is armed again long before. For the instant in which it is neither
 * the old nor the new one, the note says the position itself: nothing is received, or sent, meanwhile.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd/journal_private.h"

/* --- what the kernel says --------------------------------------------------------------------- */

static int get_counter(int fd, int *counter)
{
	socklen_t len = sizeof(*counter);

	return getsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, counter, &len) ? -errno : 0;
}

static int set_counter(int fd, int counter)
{
	int ret;

	do {
		ret = setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &counter, sizeof(counter));
	} while (ret && errno == EINTR);
	return ret ? -errno : 0;
}

static int get_unread(int fd, int *unread_bytes)
{
	return ioctl(fd, SIOCINQ, unread_bytes) ? -errno : 0;
}

/* Who receives on fd is through with what it had begun. */
static void wait_for_receiver(int fd)
{
	char nothing;

	(void)!recv(fd, &nothing, 0, MSG_PEEK | MSG_DONTWAIT);
}

/* Both values as they are at one instant. */
static int get_both(int fd, int *counter, int *unread_bytes)
{
	int before, ret;

	do {
		ret = get_counter(fd, &before);
		if (!ret)
			ret = get_unread(fd, unread_bytes);
		wait_for_receiver(fd);
		if (!ret)
			ret = get_counter(fd, counter);
	} while (!ret && before != *counter);
	return ret;
}

static int probe(const int fds[2])
{
	int counter = 0, unread_bytes = 0;
	char bytes[3] = { 0 };
	int ret = set_counter(fds[1], 1000);

	if (ret)
		return ret;
	if (send(fds[0], bytes, 3, 0) != 3 || recv(fds[1], bytes, 1, 0) != 1)
		return -errno;
	ret = get_both(fds[1], &counter, &unread_bytes);
	return ret ? ret : counter == 999 && unread_bytes == 2 ? 0 : -ENOTSUP;
}

int journal_count_probe(struct err *err)
{
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds))
		return err_sys(err, errno, "cannot make a socket pair");
	int ret = probe(fds);
	close(fds[0]);
	close(fds[1]);
	if (ret)
		return err_set(err, ENOTSUP,
			"this kernel does not count what is consumed of a socket (SO_PEEK_OFF)");
	return 0;
}

/* --- notes ------------------------------------------------------------------------------------ */

/* The old one is valid until the one store that makes the new one valid. */
static void note(struct journal_count *count, uint64_t position, uint64_t armed)
{
	uint32_t next = count->current ^ 1;

	count->notes[next] = (struct journal_note){ position, armed };
	journal_step();
	count->current = next;
	journal_step();
}

static int arm(struct journal_count *count, int fd, uint64_t position)
{
	note(count, position, 0);
	int ret = set_counter(fd, (int)JOURNAL_ARMED_BYTES);
	journal_step();
	return ret;
}

int journal_arm_received(struct nbd_line *line)
{
	struct journal_count *count = &line->shared->received;
	int ret = arm(count, line->ends.fd, line->received);

	if (ret)
		return ret;
	note(count, line->received, JOURNAL_ARMED_BYTES);
	line->received_armed = line->received;
	return 0;
}

int journal_arm_sent(struct nbd_line *line)
{
	struct journal_count *count = &line->shared->sent;
	int counter, unread_bytes;
	int ret = arm(count, line->ends.driver_fd, line->sent);

	if (!ret)
		ret = get_both(line->ends.driver_fd, &counter, &unread_bytes);
	if (ret)
		return ret;
	/* The driver may have taken some just before and after. */
	uint64_t since_bytes = JOURNAL_ARMED_BYTES - (uint64_t)counter + (uint64_t)unread_bytes;
	note(count, line->sent - since_bytes, JOURNAL_ARMED_BYTES);
	line->sent_armed = line->sent;
	return 0;
}

/* --- positions -------------------------------------------------------------------------------- */

static int position_of(
	const struct journal_note *valid, int counter, uint64_t *position, struct err *err)
{
	if (valid->armed > JOURNAL_ARMED_BYTES || counter <= 0 || (uint64_t)counter > valid->armed)
		return err_set(err, EUCLEAN, "a socket's counter stands at %d, armed with %llu",
			counter, (unsigned long long)valid->armed);
	*position = valid->position + valid->armed - (uint64_t)counter;
	return 0;
}

static const struct journal_note *valid_note(const struct journal_count *count, struct err *err)
{
	if (count->current > 1) {
		err_set(err, EUCLEAN, "there is no note number %u", count->current);
		return NULL;
	}
	return &count->notes[count->current];
}

int journal_count_received(const struct nbd_line *line, uint64_t *position, struct err *err)
{
	const struct journal_note *valid = valid_note(&line->shared->received, err);
	int counter, ret;

	if (!valid)
		return -EUCLEAN;
	*position = valid->position;
	if (!valid->armed)
		return 0;
	ret = get_counter(line->ends.fd, &counter);
	if (ret)
		return err_sys(err, -ret, "cannot ask what was received");
	return position_of(valid, counter, position, err);
}

int journal_count_sent(const struct nbd_line *line, uint64_t *position, struct err *err)
{
	const struct journal_note *valid = valid_note(&line->shared->sent, err);
	int counter, unread_bytes, ret;

	if (!valid)
		return -EUCLEAN;
	*position = valid->position;
	if (!valid->armed)
		return 0;
	ret = get_both(line->ends.driver_fd, &counter, &unread_bytes);
	if (ret)
		return err_sys(err, -ret, "cannot ask what was sent");
	ret = position_of(valid, counter, position, err);
	*position += ret ? 0 : (uint64_t)unread_bytes;
	return ret;
}
