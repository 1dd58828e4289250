/*
 * Errors with a text, for the control path: opening, configuring, attaching.
 *
 * The data path returns plain -errno. The control path fills a struct err, passed as the last
 * argument, and each caller on the way up may wrap it with what it was doing:
 *
 *	return err_set(err, EINVAL, "l1 table at %lu lies beyond the end of the file", off);
 *	...
 *	return err_wrap(err, "qcow \"%s\"", path);
 *
 * The text ends up as "qcow "disk.img": l1 table at 8192 lies beyond the end of the file".
 * It is bounded: a text that does not fit loses its end, never its beginning.
 *
 * An error may name a place (a line of a config file). The place stays in front, whatever wraps the
 * rest: err_place(err, "blkstack.conf:41") and then err_wrap(err, "export \"db\"") on the text above
 * give "blkstack.conf:41: export "db": qcow "disk.img": l1 table at 8192 lies ...".
 */
#pragma once

struct err {
	int code;           /* a positive errno, 0 while there is no error */
	unsigned place_len; /* bytes of text that are the place and its ": " */
	char text[512];
};

/* Fills *err (which may be NULL) and returns -code, so that callers can `return err_set(...)`. */
int err_set(struct err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Like err_set() for a failed system call: appends ": " and the text of errno code. */
int err_sys(struct err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Puts "place: " in front, unless the error has a place or place is NULL: the innermost is the best. */
void err_place(struct err *err, const char *place);

/* Puts "prefix: " in front of the text, behind the place. Returns -err->code. */
int err_wrap(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
