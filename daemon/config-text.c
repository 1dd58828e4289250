/*
 * Reads a config file before libconfig does; see config-text.h.
 *
 * libconfig 1.5 has habits that a disk cannot live with: a number beyond 32 bits loses its upper half
 * without a word (4294967808 is 512), unless an L follows it; a folder where a file is expected ends the
 * process; includes are looked for in one folder only, or the working one. So this file does the reading:
 * it puts included files in place, writes an L behind every number, and remembers for each line of
 * the result where it came from. Strings and comments pass as they are; of the grammar nothing else is
 * known here, and what is wrong with it libconfig finds.
 *
 * A text that a server wrote for the next one says itself where its lines came from, and includes nothing: it may come
 * from an ordinary user.
 *
 * Failure modes: a file that cannot be read, is none, is too long or holds a NUL; includes nested too
 * deep (or in a circle); a number beyond 64 bits; a missing quote. All of them name file and line.
 */
#include "daemon/config-text.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"

#define FILE_MAX_BYTES    (1U << 20) /* a thousand exports fit; /dev/zero does not */
#define INCLUDE_DEPTH_MAX 10         /* as libconfig; also what ends a circle */

static const char include_word[] = "@include", place_word[] = "#@ ";

/* One file being copied. */
struct reader {
	struct config_text *text;
	FILE *out;
	const char *file;
	unsigned number; /* of the current line */
	int depth;
	bool written; /* by a server, for this one */
	bool in_comment, in_string;
};

static void *grow(void *array, size_t count, size_t item_bytes)
{
	/* Powers of two, so that adding one at a time is cheap. */
	if (count & (count - 1))
		return array;
	array = reallocarray(array, count ? 2 * count : 1, item_bytes);
	if (!array)
		abort();
	return array;
}

static const char *add_file(struct config_text *text, char *file)
{
	text->files = grow(text->files, text->file_count, sizeof(*text->files));
	text->files[text->file_count++] = file;
	return file;
}

static void add_line(struct config_text *text, const char *file, unsigned number)
{
	text->lines = grow(text->lines, text->line_count, sizeof(*text->lines));
	text->lines[text->line_count++] = (struct config_line){ file, number };
}

/* The content of a regular file (or a pipe), ended by NUL. */
static int slurp(const char *file, char **content, struct err *err)
{
	CLEANUP(fd) int fd = open(file, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		return err_sys(err, errno, "cannot open config file");
	if (S_ISDIR(st.st_mode))
		return err_set(err, EISDIR, "is a folder; a config file is expected");

	CLEANUP(free) char *buf = malloc(FILE_MAX_BYTES + 2);
	size_t len_bytes = 0;
	ssize_t got;
	if (!buf)
		return err_sys(err, ENOMEM, "cannot read config file");
	do {
		got = read(fd, buf + len_bytes, FILE_MAX_BYTES + 1 - len_bytes);
		if (got < 0)
			return err_sys(err, errno, "cannot read config file");
		len_bytes += (size_t)got;
		if (len_bytes > FILE_MAX_BYTES)
			return err_set(
				err, EFBIG, "config file is longer than %u bytes", FILE_MAX_BYTES);
	} while (got > 0);
	buf[len_bytes] = '\0';
	if (strlen(buf) != len_bytes)
		return err_set(err, EINVAL, "config file holds a NUL byte: it is not a text");
	*content = take_ptr(buf);
	return 0;
}

static bool is_name_char(char c)
{
	return isalnum((unsigned char)c) || c == '_' || c == '-' || c == '*';
}

/* Copies the number at p, with an L when it is an integer. Returns what comes after it, NULL on error. */
static const char *copy_number(struct reader *reader, const char *p, struct err *err)
{
	const char *end = p + (*p == '-' || *p == '+');
	bool hex = end[0] == '0' && (end[1] == 'x' || end[1] == 'X');
	char *integer_end;

	errno = 0;
	(void)strtoll(p, &integer_end, hex ? 16 : 10);
	if (errno == ERANGE) {
		err_set(err, ERANGE, "%s:%u: the number %.*s is too large", reader->file,
			reader->number, (int)(integer_end - p), p);
		return NULL;
	}
	end = integer_end;
	bool integer = *end != '.' && *end != 'e' && *end != 'E';
	while (is_name_char(*end) || *end == '.')
		end++;
	fwrite(p, 1, (size_t)(end - p), reader->out);
	if (integer && end == integer_end)
		fputc('L', reader->out);
	return end;
}

/* What is at p begins a string, a comment or neither; copies its first characters. Returns the rest. */
static const char *copy_inside(struct reader *reader, const char *p)
{
	int len = 1;

	if (reader->in_comment) {
		if (p[0] == '*' && p[1] == '/') {
			reader->in_comment = false;
			len = 2;
		}
	} else if (p[0] == '\\' && p[1] && p[1] != '\n') {
		len = 2;
	} else if (p[0] == '"') {
		reader->in_string = false;
	}
	fwrite(p, 1, (size_t)len, reader->out);
	return p + len;
}

/* One word or sign outside of strings and comments. Returns what comes after it, NULL on error. */
static const char *copy_token(struct reader *reader, const char *p, struct err *err)
{
	size_t len = 1;
	bool sign = *p == '-' || *p == '+';

	if (isdigit((unsigned char)p[sign]))
		return copy_number(reader, p, err);
	if (*p == '#' || (p[0] == '/' && p[1] == '/')) {
		len = strcspn(p, "\n");
	} else if (p[0] == '/' && p[1] == '*') {
		reader->in_comment = true;
		len = 2;
	} else if (*p == '"') {
		reader->in_string = true;
	} else {
		while (is_name_char(p[0]) && is_name_char(p[len]))
			len++;
	}
	fwrite(p, 1, len, reader->out);
	return p + len;
}

static int copy_file(struct config_text *text, FILE *out, const char *file, const char *asker,
	int depth, struct err *err);

/* The name in a line `@include "NAME"`; the caller frees it. NULL when the line is something else. */
static char *included_name(const char *line)
{
	const char *p = line + strspn(line, " \t");

	if (strncmp(p, include_word, strlen(include_word)))
		return NULL;
	p += strlen(include_word);
	p += strspn(p, " \t");
	size_t len = *p == '"' ? strcspn(p + 1, "\"\n") : 0;
	return len && p[len + 1] == '"' ? strndup(p + 1, len) : NULL;
}

static int copy_included(struct reader *reader, const char *name, struct err *err)
{
	const char *slash = strrchr(reader->file, '/');
	char *file;

	if (name[0] == '/' || !slash)
		file = strdup(name);
	else if (asprintf(&file, "%.*s/%s", (int)(slash - reader->file), reader->file, name) < 0)
		file = NULL;
	if (!file)
		abort();
	add_file(reader->text, file);
	if (reader->depth + 1 >= INCLUDE_DEPTH_MAX)
		return err_set(err, ELOOP, "%s:%u: includes are nested more than %d deep",
			reader->file, reader->number, INCLUDE_DEPTH_MAX);

	CLEANUP(free) char *asker = NULL;
	if (asprintf(&asker, "%s:%u: \"%s\"", reader->file, reader->number, file) < 0)
		abort();
	return copy_file(reader->text, reader->out, file, asker, reader->depth + 1, err);
}

/* True when the line is one that tells where the next one came from. */
static bool take_place(struct reader *reader, const char *line)
{
	char *end;

	if (strncmp(line, place_word, strlen(place_word)))
		return false;
	unsigned long number = strtoul(line + strlen(place_word), &end, 10);
	size_t len = *end == ' ' ? strcspn(++end, "\n") : 0;
	if (strlen(reader->file) != len || memcmp(reader->file, end, len)) {
		char *file = strndup(end, len);
		if (!file)
			abort();
		reader->file = add_file(reader->text, file);
	}
	reader->number = (unsigned)number - 1;
	return true;
}

static int copy_content(struct reader reader, const char *content, struct err *err)
{
	int ret = 0;

	for (const char *p = content; !ret && *p;) {
		if (reader.written && take_place(&reader, p)) {
			p += strcspn(p, "\n");
			p += *p == '\n';
			continue;
		}
		reader.number++;
		CLEANUP(free)
		char *included = reader.in_comment || reader.written ? NULL : included_name(p);
		if (included) {
			ret = copy_included(&reader, included, err);
			p += strcspn(p, "\n");
			p += *p == '\n';
			continue;
		}
		add_line(reader.text, reader.file, reader.number);
		while (p && *p && *p != '\n') {
			if (reader.in_comment || reader.in_string)
				p = copy_inside(&reader, p);
			else
				p = copy_token(&reader, p, err);
		}
		if (!p)
			return -ERANGE;
		if (reader.in_string)
			return err_set(err, EINVAL,
				"%s:%u: a text in quotes does not end on its line", reader.file,
				reader.number);
		p += *p == '\n';
		fputc('\n', reader.out);
	}
	if (!ret && reader.in_comment)
		ret = err_set(err, EINVAL, "%s:%u: the file ends inside a comment", reader.file,
			reader.number);
	return ret;
}

/* asker: what an error says when the file cannot be read. */
static int copy_file(struct config_text *text, FILE *out, const char *file, const char *asker,
	int depth, struct err *err)
{
	CLEANUP(free) char *content = NULL;
	const struct reader reader = { .text = text, .out = out, .file = file, .depth = depth };
	int ret = slurp(file, &content, err);

	return ret ? err_wrap(err, "%s", asker) : copy_content(reader, content, err);
}

/* content: NULL for that of the file. */
static int read_text(struct config_text *text, const char *path, const char *content, bool written,
	struct err *err)
{
	size_t size_bytes;

	*text = (struct config_text){};
	char *file = strdup(path);
	FILE *out = open_memstream(&text->text, &size_bytes);
	if (!out || !file)
		abort();
	add_file(text, file);
	const struct reader reader = { .text = text, .out = out, .file = file, .written = written };
	int ret = content ? copy_content(reader, content, err)
			  : copy_file(text, out, file, path, 0, err);
	fclose(out);
	if (!text->text)
		abort();
	return ret;
}

int config_text_read(struct config_text *text, const char *path, struct err *err)
{
	return read_text(text, path, NULL, false, err);
}

int config_text_take(
	struct config_text *text, const char *name, const char *content, struct err *err)
{
	return read_text(text, name, content, false, err);
}

int config_text_take_written(
	struct config_text *text, const char *name, const char *content, struct err *err)
{
	return read_text(text, name, content, true, err);
}

void config_text_fini(struct config_text *text)
{
	for (size_t i = 0; i < text->file_count; i++)
		free(text->files[i]);
	free(text->files);
	free(text->lines);
	free(text->text);
	*text = (struct config_text){};
}

const struct config_line *config_text_place(const struct config_text *text, unsigned line)
{
	static const struct config_line nowhere = { "?", 0 };

	/* libconfig finds a missing end behind the last line. */
	if (line > text->line_count)
		line = (unsigned)text->line_count;
	return line ? &text->lines[line - 1] : &nowhere;
}
