/*
 * The command "doctor": what on this machine stands in the way of blkstackd, and what to do about it.
 *
 * It only looks: nothing is changed, loaded or opened for writing, no device is opened at all (that alone
 * makes the kernel try a dead one again), and it needs no daemon. Each check adds findings; they are shown
 * when all are there, one line each, with the remedy indented below. See doctor.h for the files.
 *
 * What it reads of the system may stand below another folder (--root): another system's tree that is mounted
 * here, or one made by a test. What is asked of the running kernel by system calls is left out then.
 *
 * Failure modes: a file that cannot be read counts as not there, which the finding then says.
 */
#include "daemon/ctl/doctor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define TEXT_LEN 1024

/* --- findings --------------------------------------------------------------------------------- */

static const char *const state_names[] = {
	[DOCTOR_OK] = "ok", [DOCTOR_NOTE] = "note", [DOCTOR_PROBLEM] = "problem"
};

void doctor_find(struct doctor *doctor, enum doctor_state state, const char *check,
	const char *remedy, const char *fmt, ...)
{
	char text[TEXT_LEN];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	/* Texts hold names of files and output of other programs, which a terminal must not obey. */
	json_t *plain = json_string(text);
	for (char *c = text; *c; c++)
		if ((unsigned char)*c < ' ' || *c == 127 || (!plain && (unsigned char)*c > 127))
			*c = '?';
	json_decref(plain);
	doctor->notes += state == DOCTOR_NOTE;
	doctor->problems += state == DOCTOR_PROBLEM;
	json_array_append_new(
		doctor->findings, json_pack("{s:s, s:s, s:s, s:s}", "check", check, "state",
					  state_names[state], "text", text, "remedy", remedy));
}

static void show_remedy(const char *remedy)
{
	while (*remedy) {
		size_t len = strcspn(remedy, "\n");

		printf("%25s%.*s\n", "", (int)len, remedy);
		remedy += len + (remedy[len] == '\n');
	}
}

static void show_finding(const json_t *finding, bool colour)
{
	static const char *const colours[] = {
		[DOCTOR_OK] = "\033[32m", [DOCTOR_NOTE] = "\033[33m", [DOCTOR_PROBLEM] = "\033[31m"
	};
	const char *check, *state, *text, *remedy;
	size_t i = 0;

	/* Packed by doctor_find(), so all are there. */
	json_unpack((json_t *)finding, "{s:s, s:s, s:s, s:s}", "check", &check, "state", &state,
		"text", &text, "remedy", &remedy);
	while (i + 1 < ARRAY_LEN(state_names) && strcmp(state_names[i], state))
		i++;
	printf("%s%-9s%s%-13s %s\n", colour ? colours[i] : "", state, colour ? "\033[m" : "", check,
		text);
	show_remedy(remedy);
}

static void show_report(const struct doctor *doctor)
{
	const char *no_colour = getenv("NO_COLOR");
	bool colour = isatty(STDOUT_FILENO) && !(no_colour && *no_colour);
	const json_t *finding;
	size_t i;

	json_array_foreach(doctor->findings, i, finding)
	{
		show_finding(finding, colour);
	}
	printf("\n%zu problem%s, %zu note%s\n", doctor->problems, doctor->problems == 1 ? "" : "s",
		doctor->notes, doctor->notes == 1 ? "" : "s");
}

/* --- files ------------------------------------------------------------------------------------ */

const char *doctor_path(const struct doctor *doctor, char path[PATH_MAX], const char *fmt, ...)
{
	size_t root_len = (size_t)snprintf(path, PATH_MAX, "%s", doctor->root);
	va_list ap;

	root_len = MIN(root_len, (size_t)PATH_MAX - 1);
	va_start(ap, fmt);
	vsnprintf(path + root_len, PATH_MAX - root_len, fmt, ap);
	va_end(ap);
	return path;
}

bool doctor_exists(const struct doctor *doctor, const char *path)
{
	char full[PATH_MAX];

	return !access(doctor_path(doctor, full, "%s", path), F_OK);
}

bool doctor_read(const struct doctor *doctor, const char *path, char *text, size_t len_bytes)
{
	char full[PATH_MAX];
	CLEANUP(file) FILE *file = fopen(doctor_path(doctor, full, "%s", path), "re");

	if (!file || !fgets(text, (int)len_bytes, file))
		return false;
	text[strcspn(text, "\n")] = '\0';
	return true;
}

bool doctor_field(const struct doctor *doctor, const char *path, const char *key, char *text,
	size_t len_bytes)
{
	char full[PATH_MAX], line[512];
	CLEANUP(file) FILE *file = fopen(doctor_path(doctor, full, "%s", path), "re");
	size_t key_len = strlen(key);

	while (file && fgets(line, sizeof(line), file)) {
		if (strncmp(line, key, key_len) || !strchr(":= ", line[key_len]))
			continue;
		const char *value = line + key_len + 1;
		value += strspn(value, " \t");
		snprintf(text, len_bytes, "%.*s", (int)strcspn(value, "\n"), value);
		return true;
	}
	return false;
}

void doctor_release(const struct doctor *doctor, char *text, size_t len_bytes)
{
	struct utsname kernel = {};

	if (doctor_read(doctor, "/proc/sys/kernel/osrelease", text, len_bytes))
		return;
	uname(&kernel);
	snprintf(text, len_bytes, "%s", kernel.release);
}

/* --- other programs --------------------------------------------------------------------------- */

static void exec_with_output(const char *const *words, int output)
{
	int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

	dup2(null, STDIN_FILENO);
	dup2(output, STDOUT_FILENO);
	dup2(output, STDERR_FILENO);
	execvp(words[0], (char *const *)words);
	_exit(127);
}

int doctor_run(const char *const *words, char *output, size_t len_bytes)
{
	int pipe_fds[2], status;
	size_t used_bytes = 0;
	ssize_t got;

	*output = '\0';
	if (pipe2(pipe_fds, O_CLOEXEC))
		return -1;
	fflush(stdout);
	CLEANUP(fd) int source = pipe_fds[0];
	pid_t child = fork();
	if (!child)
		exec_with_output(words, pipe_fds[1]);
	close(pipe_fds[1]);
	if (child < 0)
		return -1;
	while ((got = read(source, output + used_bytes, len_bytes - 1 - used_bytes)) > 0 ||
		(got < 0 && errno == EINTR)) {
		used_bytes += got > 0 ? (size_t)got : 0;
		/* What is too long loses its older half. */
		if (used_bytes == len_bytes - 1) {
			used_bytes -= len_bytes / 2;
			memmove(output, output + len_bytes / 2, used_bytes);
		}
	}
	output[used_bytes] = '\0';
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return WIFEXITED(status) && WEXITSTATUS(status) != 127 ? WEXITSTATUS(status) : -1;
}

/* --- the command ------------------------------------------------------------------------------ */

const char ctl_doctor_help[] =
	"It needs no daemon, and changes nothing. Exit status 0 when there is no problem, 1 when "
	"there\n"
	"is one; a note is worth knowing and no problem.\n\n"
	"  --config FILE       check this config file too, and the sockets it names\n"
	"  --root DIR          look at the system whose tree is mounted on DIR\n";

enum ctl_exit ctl_doctor_option(struct ctl_doctor *options, char ***words, bool *taken)
{
	const struct {
		const char *name;
		const char **text;
	} known[] = { { "--config", &options->config }, { "--root", &options->root } };
	const char *word = **words;

	*taken = false;
	for (size_t i = 0; i < ARRAY_LEN(known); i++) {
		size_t len = strlen(known[i].name);

		if (strncmp(word, known[i].name, len) || (word[len] && word[len] != '='))
			continue;
		*taken = true;
		options->given = known[i].name;
		if (word[len])
			*known[i].text = word + len + 1;
		else if ((*words)[1])
			*known[i].text = *++*words;
		else
			return ctl_fail(CTL_USAGE, "%s needs an argument", word);
	}
	return CTL_OK;
}

enum ctl_exit ctl_doctor_run(struct ctl *ctl, const char **operands, int operand_count)
{
	struct doctor doctor = {
		.ctl = ctl,
		.root = ctl->doctor.root ? ctl->doctor.root : "",
		.config = ctl->doctor.config,
		.findings = json_array(),
	};

	snprintf(doctor.control, sizeof(doctor.control), "%s", ctl->socket_path);
	/* In this order: the config names the sockets, and the daemon is who has the limits. */
	doctor_check_config(&doctor);
	doctor_check_daemon(&doctor);
	doctor_check_listen(&doctor);
	doctor_check_kernel(&doctor);
	doctor_check_driver(&doctor);
	doctor_check_devices(&doctor);
	doctor_check_io_uring(&doctor);
	doctor_check_permissions(&doctor);
	doctor_check_limits(&doctor);
	doctor_check_udev(&doctor);
	doctor_check_systemd(&doctor);

	json_t *report = json_pack("{s:I, s:I, s:O}", "problems", (json_int_t)doctor.problems,
		"notes", (json_int_t)doctor.notes, "checks", doctor.findings);
	if (ctl->json)
		show_json(report);
	else
		show_report(&doctor);
	json_decref(report);
	json_decref(doctor.findings);
	json_decref(doctor.listen);
	return doctor.problems ? CTL_FAILED : CTL_OK;
}
