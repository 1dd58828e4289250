/*
 * What blkstack-img prints besides a command's own tables: JSON, names from images, progress.
 *
 * Names inside an image are somebody else's bytes: they reach neither a terminal nor a JSON parser unfiltered.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/img/img.h"

#define BAR_WIDTH 40

void img_print_json(json_t *value)
{
	json_dumpf(value, stdout, JSON_INDENT(4) | JSON_ENCODE_ANY);
	putchar('\n');
	json_decref(value);
}

json_t *img_json_text(const char *text)
{
	json_t *string = json_string(text);
	char clean[2048];

	return string ? string : json_string(img_plain_text(text, clean, sizeof(clean)));
}

char *img_plain_text(const char *text, char *out, size_t out_size)
{
	bool is_utf8;
	json_t *string = json_string(text);
	size_t i;

	is_utf8 = string;
	json_decref(string);
	for (i = 0; text[i] && i + 1 < out_size; i++) {
		unsigned char byte = (unsigned char)text[i];
		bool control = byte < 0x20 || byte == 0x7f || (!is_utf8 && byte >= 0x80);

		out[i] = control ? '?' : text[i];
	}
	out[i] = '\0';
	return out;
}

void img_progress_init(struct img_progress *progress, const struct img *img, const char *label)
{
	progress->label = label;
	progress->shown = -1;
	progress->enabled = !img->quiet && !img->json && isatty(STDERR_FILENO);
}

void img_progress(struct img_progress *progress, uint64_t done, uint64_t total)
{
	int percent = total ? (int)((double)done * 100 / (double)total) : 100;
	int filled = percent * BAR_WIDTH / 100;

	if (!progress->enabled || percent == progress->shown)
		return;
	progress->shown = percent;
	fprintf(stderr, "\r%s [%.*s%*s] %3d %%", progress->label, filled,
		"########################################", BAR_WIDTH - filled, "", percent);
	fflush(stderr);
}

void img_progress_end(struct img_progress *progress)
{
	if (progress->shown >= 0)
		fprintf(stderr, "\r\033[K");
	progress->shown = -1;
}
