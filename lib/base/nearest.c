/*
 * Finds what somebody meant to type; see nearest.h.
 *
 * The distance is the number of letters to insert, delete, change, or swap with their neighbour. At most
 * a third of the letters (and one, for short names) may differ, or the hint would only confuse. Longer
 * names than NAME_MAX_LEN get no hint. '-' and '_' are the same, as in config files.
 */
#include "base/nearest.h"

#include <stdbool.h>
#include <string.h>

#include "base/util.h"

#define NAME_MAX_LEN 40

static bool same_letter(char a, char b)
{
	return (a == '_' ? '-' : a) == (b == '_' ? '-' : b);
}

/* Optimal string alignment, over a table with one row and column more than there are letters. */
static unsigned distance(const char *a, size_t a_len, const char *b, size_t b_len)
{
	unsigned d[NAME_MAX_LEN + 1][NAME_MAX_LEN + 1];

	for (size_t i = 0; i <= a_len; i++)
		d[i][0] = (unsigned)i;
	for (size_t j = 0; j <= b_len; j++)
		d[0][j] = (unsigned)j;
	for (size_t i = 1; i <= a_len; i++) {
		for (size_t j = 1; j <= b_len; j++) {
			unsigned change = d[i - 1][j - 1] + !same_letter(a[i - 1], b[j - 1]);
			unsigned insert_or_delete = MIN(d[i - 1][j], d[i][j - 1]) + 1;

			d[i][j] = MIN(change, insert_or_delete);
			if (i > 1 && j > 1 && same_letter(a[i - 1], b[j - 2]) &&
				same_letter(a[i - 2], b[j - 1]))
				d[i][j] = MIN(d[i][j], d[i - 2][j - 2] + 1);
		}
	}
	return d[a_len][b_len];
}

void nearest_init(struct nearest *nearest, const char *wanted)
{
	*nearest = (struct nearest){
		.wanted = wanted,
		.best_distance = (unsigned)MAX(strlen(wanted) / 3, 1U) + 1,
	};
}

void nearest_offer(struct nearest *nearest, const char *candidate)
{
	size_t wanted_len = strlen(nearest->wanted), len = strlen(candidate);

	if (wanted_len > NAME_MAX_LEN || len > NAME_MAX_LEN)
		return;

	unsigned found = distance(nearest->wanted, wanted_len, candidate, len);

	if (found < nearest->best_distance) {
		nearest->best_distance = found;
		nearest->best = candidate;
	}
}
