/*
 * The server's side of the socket to the keeper; see keeper-link.h.
 *
 * A call waits in the list of calls until its answer comes; answers come in any order. The keeper reads at
 * once, always: a socket that is full would be a keeper that hangs, and the call fails.
 */
#include "daemon/keeper-link.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "base/log.h"
#include "base/util.h"

struct call {
	struct list link;
	uint32_t id;
	struct keeper_message *message;
	struct keeper_fds *fds; /* or NULL */
	struct co *co;
};

static void answered(
	struct keeper_link *link, const struct keeper_message *answer, struct keeper_fds *fds)
{
	list_for_each (item, &link->calls) {
		struct call *call = list_entry(item, struct call, link);

		if (call->id != answer->id)
			continue;
		list_remove(&call->link);
		*call->message = *answer;
		if (call->fds) {
			*call->fds = *fds;
			fds->count = 0;
		}
		co_wake(call->co);
		return;
	}
}

static void device_ended(struct keeper_link *link, const struct keeper_message *word)
{
	list_for_each (item, &link->devices) {
		struct keeper_device *device = list_entry(item, struct keeper_device, link);

		if (device->slot == word->slot) {
			device->ended(device, -word->ret);
			return;
		}
	}
}

static void hear(
	struct keeper_link *link, const struct keeper_message *message, struct keeper_fds *fds)
{
	switch (message->word) {
	case KEEPER_ANSWER:
		answered(link, message, fds);
		break;
	case KEEPER_ENDED:
		device_ended(link, message);
		break;
	case KEEPER_STOP:
		link->on_stop(link);
		break;
	case KEEPER_RELOAD:
		link->on_reload(link);
		break;
	case KEEPER_PARK:
		link->on_park(link);
		break;
	}
	keeper_fds_close(fds);
}

static void readable(struct watch *watch, uint32_t epoll_events)
{
	struct keeper_link *link = container_of(watch, struct keeper_link, watch);
	struct keeper_message message;
	struct keeper_fds fds;
	int ret;

	while ((ret = keeper_receive(link->sock, &message, &fds)) > 0)
		hear(link, &message, &fds);
	if (ret == -EAGAIN)
		return;
	log_error("the keeper is gone: ending at once; its devices are left as they are");
	_exit(EXIT_FAILURE);
}

suspends int keeper_call_with(struct keeper_link *link, enum keeper_word word,
	struct keeper_message *message, const int *sent, unsigned sent_count,
	struct keeper_fds *fds, struct err *err)
{
	struct call call = {
		.id = ++link->last_id, .message = message, .fds = fds, .co = co_self()
	};

	message->word = word;
	message->version = KEEPER_VERSION;
	message->id = call.id;
	int ret = keeper_send(link->sock, message, sent, sent_count);
	if (ret)
		return err_sys(err, -ret, "the keeper does not take requests");
	list_push_back(&link->calls, &call.link);
	co_suspend();
	return message->ret ? err_set(err, -message->ret, "%s", message->text) : 0;
}

suspends int keeper_call(struct keeper_link *link, enum keeper_word word,
	struct keeper_message *message, int fd, struct keeper_fds *fds, struct err *err)
{
	return keeper_call_with(link, word, message, &fd, fd >= 0, fds, err);
}

suspends int keeper_link_start(struct keeper_link *link, int sock, struct err *err)
{
	struct keeper_message hello = {};

	link->sock = sock;
	list_init(&link->calls);
	list_init(&link->devices);
	if (fcntl(sock, F_SETFL, O_NONBLOCK) || fcntl(sock, F_SETFD, FD_CLOEXEC))
		return err_sys(err, errno, "the socket to the keeper");
	int ret = watch_add(&link->watch, sock, EPOLLIN, readable);
	if (ret)
		return err_sys(err, -ret, "cannot watch the socket to the keeper");
	ret = keeper_call(link, KEEPER_HELLO, &hello, -1, NULL, err);
	link->restarts = hello.restarts;
	link->watchdog_ns = hello.watchdog_ns;
	snprintf(link->last_end, sizeof(link->last_end), "%s", hello.text);
	return ret;
}

void keeper_link_end(struct keeper_link *link)
{
	if (link)
		watch_remove(&link->watch);
}

static void tell_service_manager(enum keeper_word word, const char *text)
{
	const char *status = *text ? "STATUS=" : "";

	switch (word) {
	case KEEPER_READY:
		sd_notifyf(0, "READY=1\n%s%s", status, text);
		break;
	case KEEPER_STATUS:
		sd_notifyf(0, "STATUS=%s", text);
		break;
	case KEEPER_RELOADING:
		sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu\n%s%s",
			(unsigned long long)(reactor_now_ns() / 1000), status, text);
		break;
	case KEEPER_STOPPING:
		sd_notifyf(0, "STOPPING=1\n%s%s", status, text);
		break;
	case KEEPER_ALIVE:
		sd_notify(0, "WATCHDOG=1");
		break;
	default:
		break;
	}
}

void keeper_tell(struct keeper_link *link, enum keeper_word word, const char *fmt, ...)
{
	struct keeper_message message = { .word = word, .version = KEEPER_VERSION };
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(message.text, sizeof(message.text), fmt, ap);
	va_end(ap);
	if (link)
		keeper_send(link->sock, &message, NULL, 0);
	else
		tell_service_manager(word, message.text);
}
