/*
 * Connections that outlive their server: nothing is lost, doubled or torn when it is killed.
 *
 * JOURNAL_KILLS=5000 makes each of the long tests kill so many servers; SEED=... repeats a run as far as the
 * scheduler lets it.
 */
#include <check.h>

#include "seat_rig.h"

#define FILE_STACK "( { layer = 'file'; path = 'disk'; sync = 'none'; lock = false } )"
#define QCOW_STACK                                                                            \
	"( { layer = 'qcow' }, { layer = 'file'; path = 'disk.qcow2'; sync = 'none'; lock = " \
	"false } )"

static unsigned long kills_wanted(unsigned long by_default)
{
	const char *given = getenv("JOURNAL_KILLS");

	return given ? strtoul(given, NULL, 0) : by_default;
}

static void make_file(void)
{
	int fd = open("disk", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	require(fd >= 0 && !ftruncate(fd, SEAT_DISK_BYTES));
	close(fd);
}

static void make_qcow(void)
{
	char command[200];

	snprintf(command, sizeof(command),
		"qemu-img create -q -f qcow2 -o cluster_size=%u disk.qcow2 %u",
		4096U << test_random(5), SEAT_DISK_BYTES);
	ck_assert_int_eq(system(command), 0);
}

/* Leaked clusters are allowed. */
static void check_qcow(void)
{
	int status = system("qemu-img check -f qcow2 disk.qcow2 >check.log 2>&1");

	if (status && status != 3 << 8) {
		ck_assert_int_eq(system("cat check.log >&2"), 0);
		ck_abort_msg("qemu-img check: status 0x%x", status);
	}
}

/* One server's life, from its start to its end. */
static void live_and_die(struct seat_rig *rig)
{
	unsigned way = test_random(10);

	if (way < 5) {
		seat_start(rig, 1 + test_random(test_random(2) ? 40 : 1500));
		while (!seat_died(rig))
			seat_pump(rig);
		return;
	}
	seat_start(rig, 0);
	for (unsigned turns = test_random(test_random(2) ? 30 : 400); turns; turns--)
		seat_pump(rig);
	if (way == 9)
		seat_park(rig);
	else
		seat_kill(rig);
}

static void live_many_lives(const char *stack, unsigned connections, unsigned long kills)
{
	struct seat_rig rig;

	seat_rig_init(&rig, stack, connections);
	while (rig.kills < kills)
		live_and_die(&rig);
	seat_start(&rig, 0);
	seat_drain(&rig);
	ck_assert_int_eq(seat_disconnect(&rig), SEAT_EXIT_OVER);
	seat_compare_disk(&rig);
	printf("%u connections: %lu kills, %lu parks, %llu replies\n", connections, rig.kills,
		rig.parks, (unsigned long long)rig.replies);
	fflush(stdout);
	seat_rig_fini(&rig);
}

START_TEST(test_file)
{
	test_seed();
	make_file();
	live_many_lives(FILE_STACK, 1 + (unsigned)_i, kills_wanted(40));
}
END_TEST

START_TEST(test_qcow)
{
	test_seed();
	make_qcow();
	live_many_lives(QCOW_STACK, 1 + (unsigned)_i, kills_wanted(40));
	check_qcow();
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_set_timeout(tcase, 3600);
	tcase_add_loop_test(tcase, test_file, 0, 4);
	tcase_add_loop_test(tcase, test_qcow, 0, 4);
}

int main(void)
{
	return test_run_suite("journal", fill);
}
