/*
 * Sizes with binary suffixes; see units.h.
 *
 * A fraction ("1.5G") must come out as a whole number of bytes ("1.5" alone or "0.3K" do not) and
 * everything is checked for overflow, since these texts come from config files and commands.
 */
#include "base/units.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"

static const char suffixes[] = "BKMGTPE";

/* Returns the power of 1024 that the suffix stands for, or -1. */
static int suffix_power(const char *text)
{
	if (!*text)
		return 0;
	const char *found = strchr(suffixes, toupper((unsigned char)*text));
	if (!found)
		return -1;
	int power = (int)(found - suffixes);
	const char *rest = text + 1;
	if (power && (!strcasecmp(rest, "iB") || !strcasecmp(rest, "B")))
		return power;
	return *rest ? -1 : power;
}

/* Adds the digits behind the point, scaled to unit; false unless they are a whole number of bytes. */
static bool add_fraction(
	const char *digits, size_t digit_count, uint64_t unit, uint64_t *size_bytes)
{
	uint64_t numerator = 0, denominator = 1, scaled;

	for (size_t i = 0; i < digit_count; i++) {
		if (mul_overflows(denominator, 10, &denominator))
			return false;
		numerator = numerator * 10 + (uint64_t)(digits[i] - '0');
	}
	if (mul_overflows(numerator, unit, &scaled) || scaled % denominator)
		return false;
	return !add_overflows(*size_bytes, scaled / denominator, size_bytes);
}

int units_parse_size(const char *text, uint64_t *size_bytes, struct err *err)
{
	const char *p = text;
	uint64_t whole = 0;
	bool overflow = false;

	if (!isdigit((unsigned char)*p))
		return err_set(err, EINVAL, "\"%s\" is not a size (try 512, 64K, 10G)", text);
	for (; isdigit((unsigned char)*p); p++)
		overflow |= mul_overflows(whole, 10, &whole) ||
			    add_overflows(whole, (uint64_t)(*p - '0'), &whole);

	const char *fraction = p + (*p == '.');
	size_t fraction_digits = *p == '.' ? strspn(fraction, "0123456789") : 0;
	int power = suffix_power(fraction + fraction_digits);
	if (power < 0 || (*p == '.' && !fraction_digits))
		return err_set(err, EINVAL, "\"%s\" is not a size (try 512, 64K, 10G)", text);

	uint64_t unit = UINT64_C(1) << (10 * power);
	overflow |= mul_overflows(whole, unit, &whole);
	if (overflow)
		return err_set(err, ERANGE, "size \"%s\" is 16 EiB or more", text);
	if (!add_fraction(fraction, fraction_digits, unit, &whole))
		return err_set(err, EINVAL, "size \"%s\" is not a whole number of bytes", text);
	*size_bytes = whole;
	return 0;
}

char *units_format_size(uint64_t size_bytes, char text[UNITS_SIZE_TEXT_LEN])
{
	int power = 0;

	while (power < 6 && size_bytes >> (10 * power) >= 1024)
		power++;
	uint64_t unit = UINT64_C(1) << (10 * power);
	if (size_bytes % unit == 0)
		snprintf(text, UNITS_SIZE_TEXT_LEN, "%llu %c%s",
			(unsigned long long)(size_bytes / unit), suffixes[power],
			power ? "iB" : "");
	else if (size_bytes < 10 * 1024 * 1024 && size_bytes % 1024)
		snprintf(text, UNITS_SIZE_TEXT_LEN, "%llu B", (unsigned long long)size_bytes);
	else
		snprintf(text, UNITS_SIZE_TEXT_LEN, "%.2f %ciB", (double)size_bytes / (double)unit,
			suffixes[power]);
	return text;
}
