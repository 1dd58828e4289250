/*
 * Connections that outlive their server: nothing is lost, doubled or torn when it is killed.
 *
 * JOURNAL_KILLS=5000 makes each of the long tests kill so many servers; SEED=... repeats a run as far as the
 * scheduler lets it.
 */
#include <check.h>

#include "seat_rig.h"

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
	seat_make_file();
	live_many_lives(SEAT_FILE, 1 + (unsigned)_i, seat_kills_wanted(20));
}
END_TEST

START_TEST(test_qcow)
{
	test_seed();
	seat_make_qcow();
	live_many_lives(SEAT_QCOW, 1 + (unsigned)_i, seat_kills_wanted(20));
	seat_check_qcow();
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
