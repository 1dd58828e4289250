/*
 * Replays the fuzzer's inputs: what once broke the NBD server, or leads deep into it. test_nbd_tls_corpus.c does
 * it for those of the fuzzer through TLS.
 */
#ifndef CORPUS
#define CORPUS "nbd"
#include "../fuzz/nbd.c"
#endif

#include <check.h>
#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

#include "testing.h"

/* tests/fuzz/corpus/... in the source tree, from BUILD_DIR/tests/unit/PROGRAM. */
static void corpus_path(char *path)
{
	char program[PATH_MAX];
	ssize_t len = readlink("/proc/self/exe", program, sizeof(program) - 1);

	ck_assert_int_gt(len, 0);
	program[len] = '\0';
	for (int i = 0; i < 4; i++)
		*strrchr(program, '/') = '\0';
	snprintf(path, PATH_MAX, "%s/tests/fuzz/corpus/" CORPUS, program);
}

static void replay(const char *path)
{
	static uint8_t input[1 << 20];
	FILE *file = fopen(path, "rb");

	ck_assert_msg(file, "cannot open %s", path);
	size_t size = fread(input, 1, sizeof(input), file);
	fclose(file);
	printf("%s\n", path);
	fflush(stdout);
	LLVMFuzzerTestOneInput(input, size);
}

START_TEST(test_corpus)
{
	char folder[PATH_MAX], path[PATH_MAX + NAME_MAX + 2];
	struct dirent *entry;
	unsigned count = 0;

	corpus_path(folder);
	DIR *dir = opendir(folder);
	ck_assert_msg(dir, "cannot open %s", folder);
	while ((entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
		replay(path);
		count++;
	}
	closedir(dir);
	ck_assert_uint_ge(count, 10);
}
END_TEST

static void fill(TCase *tcase)
{
	tcase_add_test(tcase, test_corpus);
}

int main(void)
{
	return test_run_suite(CORPUS " corpus", fill);
}
