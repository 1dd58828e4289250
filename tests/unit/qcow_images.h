/*
 * Images for the tests of the qcow layer, made by the real qemu-img, and its verdict on what became of them.
 */
#pragma once

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <check.h>

/* One kind of image. The disk is filled from `seed.img` first where convert_options are given. */
struct image_kind {
	const char *name;
	const char *create_options;  /* of qemu-img create, or NULL */
	const char *convert_options; /* of qemu-img convert */
	uint64_t backing_size;       /* 0: none */
	bool snapshot;               /* an internal snapshot is taken of the filled disk */
	const char *layer_options;   /* of the qcow layer */
};

static const struct image_kind image_kinds[] = {
	{ "plain", "cluster_size=64k" },
	{ "v2-small", "compat=0.10,cluster_size=512" },
	{ "v3-512", "cluster_size=512,refcount_bits=64" },
	{ "refcount-1", "cluster_size=4k,refcount_bits=1" },
	{ "refcount-2", "cluster_size=2k,refcount_bits=2" },
	{ "refcount-8", "cluster_size=1k,refcount_bits=8" },
	{ "2m", "cluster_size=2M,refcount_bits=32" },
	{ "extended", "extended_l2=on,cluster_size=16k" },
	{ "extended-64k", "extended_l2=on,cluster_size=64k" },
	{ "lazy", "cluster_size=4k,lazy_refcounts=on" },
	{ "tiny-cache", "cluster_size=512", .layer_options = "cache = '64K';" },
	{ "backing-short", "cluster_size=4k", .backing_size = 1000 * 1024 + 512 },
	{ "backing-long", "cluster_size=16k", .backing_size = 12 << 20 },
	{ "backing-extended", "extended_l2=on,cluster_size=32k", .backing_size = 3 << 20 },
	{ "backing-v2", "compat=0.10,cluster_size=4k", .backing_size = 5 << 20 },
	{ "compressed", .convert_options = "-c -o cluster_size=16k" },
	{ "compressed-zstd", .convert_options = "-c -o cluster_size=64k,compression_type=zstd" },
	{ "snapshot", .convert_options = "-o cluster_size=4k", .snapshot = true },
	{ "snapshot-compressed", .convert_options = "-c -o cluster_size=8k", .snapshot = true },
	{ "snapshot-extended", .convert_options = "-o cluster_size=16k,extended_l2=on",
		.snapshot = true },
};

#define IMAGE_KINDS (sizeof(image_kinds) / sizeof(image_kinds[0]))

/* The same with an external data file, "data": whose layers the test names in layer_options. */
static const struct {
	const char *name, *create_options;
	bool raw; /* it is a raw image at all times */
} image_data_kinds[] = {
	{ "data-64k", "cluster_size=64k,data_file=data" },
	{ "data-512", "cluster_size=512,data_file=data" },
	{ "data-extended", "extended_l2=on,cluster_size=16k,data_file=data" },
	{ "data-lazy", "cluster_size=4k,lazy_refcounts=on,data_file=data" },
	{ "data-raw", "cluster_size=4k,data_file=data,data_file_raw=on", true },
	{ "data-raw-extended", "extended_l2=on,cluster_size=64k,data_file=data,data_file_raw=on",
		true },
};

#define IMAGE_DATA_KINDS (sizeof(image_data_kinds) / sizeof(image_data_kinds[0]))

__attribute__((format(printf, 1, 2))) static inline int image_command(const char *fmt, ...)
{
	char command[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(command, sizeof(command), fmt, ap);
	va_end(ap);
	int status = system(command);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#define image_must(...) ck_assert_msg(!image_command(__VA_ARGS__), "a command failed")

static inline void image_write_file(const char *path, const void *content, size_t len)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(write(fd, content, len), (ssize_t)len);
	close(fd);
}

/*
 * Makes `path` of the given kind in the current folder. content (size bytes) receives what the disk
 * holds. It is filled from the random source `fill`.
 */
static inline void image_make(const struct image_kind *kind, const char *path, uint8_t *content,
	uint64_t size, void (*fill)(void *arg, uint8_t *buf, size_t len), void *arg)
{
	memset(content, 0, size);
	if (kind->convert_options) {
		fill(arg, content, size / 2);
		memset(content + size / 8, 0x55, size / 8); /* something that compresses */
		image_write_file("seed.img", content, size);
		image_must("qemu-img convert -f raw -O qcow2 %s seed.img %s", kind->convert_options,
			path);
	} else if (kind->backing_size) {
		uint8_t *backing = calloc(1, kind->backing_size);

		fill(arg, backing, kind->backing_size);
		image_write_file("backing.img", backing, kind->backing_size);
		memcpy(content, backing, kind->backing_size < size ? kind->backing_size : size);
		free(backing);
		image_must("qemu-img create -q -f qcow2 -b backing.img -F raw -o %s %s %llu",
			kind->create_options, path, (unsigned long long)size);
	} else {
		image_must("qemu-img create -q -f qcow2 -o %s %s %llu", kind->create_options, path,
			(unsigned long long)size);
	}
	if (kind->snapshot)
		image_must("qemu-img snapshot -c first %s", path);
}

/* The layers of a stack on it, as text for conf_build(): top first, without what stores the bytes. */
static inline const char *image_layer(const struct image_kind *kind)
{
	static char text[512];

	snprintf(text, sizeof(text), "{ layer = 'qcow'; %s %s }",
		kind->layer_options ? kind->layer_options : "",
		kind->backing_size ? "backing = ( { layer = 'padded'; align = 512; }, { layer = "
				     "'file'; path = 'backing.img' } );"
				   : "");
	return text;
}

/* qemu-img's verdict: no errors; leaks (its exit status 3) only where they are allowed. */
static inline void image_check(const char *path, bool leaks_allowed)
{
	int status = image_command("qemu-img check -q %s >check.log 2>&1", path);

	if (status && !(status == 3 && leaks_allowed)) {
		image_command("cat check.log");
		ck_abort_msg("qemu-img check says %d of %s", status, path);
	}
}
