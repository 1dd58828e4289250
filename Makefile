# blkstack. Targets: all check check-rt check-kernel soak-kernel check-vm bench lint format install help
#
# BUILD=release (default) | debug | asan | tsan | cov | fuzz. Everything built lands in build/ for
# release and build-$(BUILD)/ for the others. V=1 shows the commands.

VERSION  := 0.1.0
BUILD    ?= release
PREFIX   ?= /usr/local
SBINDIR  ?= $(PREFIX)/sbin
BINDIR   ?= $(PREFIX)/bin
MANDIR   ?= $(PREFIX)/share/man
SYSCONFDIR ?= /etc
SHAREDIR ?= $(PREFIX)/share/blkstack
LIBDIR_SYSTEM ?= /usr/lib
UNITDIR  ?= $(LIBDIR_SYSTEM)/systemd/system
CC       ?= gcc
PKG_CONFIG ?= pkg-config

LIB_PKGS    := jansson liburing zlib libzstd
# Not linked, but loaded when needed: lib/base/library.h.
LOADED_PKGS := gnutls libnbd
DAEMON_PKGS := libconfig libsystemd libmnl
IMG_PKGS    := nettle
TEST_PKGS   := check gnutls

O := $(if $(filter release,$(BUILD)),build,build-$(BUILD))

CFLAGS_release := -O2 -g -D_FORTIFY_SOURCE=2
CFLAGS_debug   := -O0 -g3
CFLAGS_asan    := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
CFLAGS_tsan    := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
CFLAGS_cov     := -O0 -g --coverage
# clang: it does not define __SANITIZE_ADDRESS__, and knows fewer warnings
CFLAGS_fuzz    := -O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined \
	-D__SANITIZE_ADDRESS__=1 -Wno-unknown-warning-option
ifeq ($(BUILD),fuzz)
CC := clang
endif

WARNINGS := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
	-Wwrite-strings -Wundef -Wformat-security -Wno-format-truncation -Wvla -Wno-unused-parameter -Wno-missing-field-initializers

need_pkgs = $(if $(shell $(PKG_CONFIG) --exists $(1) && echo yes),,$(error \
	missing development packages, one of: $(1). Run scripts/deps as root, it installs them))
ifeq ($(filter help format,$(MAKECMDGOALS)),)
$(call need_pkgs,$(LIB_PKGS) $(LOADED_PKGS) $(DAEMON_PKGS))
endif

CPPFLAGS += -D_GNU_SOURCE -Ilib -I. -DBLKSTACK_VERSION='"$(VERSION)"' \
	$(shell $(PKG_CONFIG) --cflags $(LIB_PKGS) $(LOADED_PKGS) $(DAEMON_PKGS))
ALL_CFLAGS := -std=gnu17 $(CFLAGS_$(BUILD)) $(WARNINGS) -fstack-protector-strong -fstack-clash-protection -pthread $(CFLAGS)
LDLIBS   := $(shell $(PKG_CONFIG) --libs $(LIB_PKGS)) -pthread
# LeakSanitizer looks for pointers in the thread-local storage of libraries, and crashes at that of a late one.
ifeq ($(BUILD),asan)
LDLIBS   += -Wl,--no-as-needed $(shell $(PKG_CONFIG) --libs $(LOADED_PKGS)) -Wl,--as-needed
endif
IMG_LIBS := $(shell $(PKG_CONFIG) --libs $(IMG_PKGS))
DAEMON_LIBS := $(shell $(PKG_CONFIG) --libs $(DAEMON_PKGS))
TEST_LIBS := $(shell $(PKG_CONFIG) --libs $(TEST_PKGS))

LIB_SRC    := $(wildcard lib/*/*.c lib/*/*/*.c)
DAEMON_SRC := $(wildcard daemon/*.c)
CTL_SRC    := $(wildcard daemon/ctl/*.c)
IMG_SRC    := $(wildcard daemon/img/*.c)
UNIT_SRC   := $(wildcard tests/unit/*.c)
PRELOADED  := $O/tests/helpers/short-of.so
HELPER_SRC := $(filter-out $(PRELOADED:$O/%.so=%.c),$(wildcard tests/helpers/*.c))
FUZZ_SRC   := $(wildcard tests/fuzz/*.c)

LIB_OBJ    := $(LIB_SRC:%.c=$O/%.o)
DAEMON_OBJ := $(DAEMON_SRC:%.c=$O/%.o)
CTL_OBJ    := $(CTL_SRC:%.c=$O/%.o) $(patsubst %,$O/daemon/kernel-%.o,lock sysfs users)
IMG_OBJ    := $(IMG_SRC:%.c=$O/%.o)

PROGRAMS := $(if $(wildcard daemon/main.c),$O/blkstackd) $(if $(CTL_SRC),$O/blkstackctl) \
	$(if $(IMG_SRC),$O/blkstack-img)
UNITS    := $(UNIT_SRC:%.c=$O/%)
HELPERS  := $(HELPER_SRC:%.c=$O/%) $(PRELOADED)
FUZZERS  := $(FUZZ_SRC:%.c=$O/%)
BENCHES  := $O/tests/bench/nbdload $O/tests/bench/firstbyte
BENCH_OBJ := $O/tests/bench/client.o $O/tests/bench/cpu.o

Q := $(if $(V),,@)
say = $(if $(V),,@printf '  %-5s %s\n' $(1) $(2))

all: $(PROGRAMS) $O/libblkstack.a

$O/%.o: %.c
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$Q$(CC) $(CPPFLAGS) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

$O/libblkstack.a: $(LIB_OBJ)
	$(call say,AR,$@)
	$Qrm -f $@ && ar rcs $@ $^

$O/blkstackd: $(DAEMON_OBJ) $O/libblkstack.a
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(DAEMON_LIBS) $(LDLIBS)

$O/blkstackctl: $(CTL_OBJ) $O/libblkstack.a
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$O/blkstack-img: $(IMG_OBJ) $O/libblkstack.a
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(IMG_LIBS) $(LDLIBS)

# A unit test is one program per file; it may use anything in lib/.
$(UNITS) $(HELPER_SRC:%.c=$O/%): $O/%: $O/%.o $O/libblkstack.a
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $(filter %.o,$^) $O/libblkstack.a $(TEST_LIBS) $(LDLIBS) -lm

$(PRELOADED): $O/%.so: %.c
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$Q$(CC) $(CPPFLAGS) $(ALL_CFLAGS) $(LDFLAGS) -MMD -MP -fPIC -shared -o $@ $< -ldl

# What the control interface is described by is linked in as it stands.
$O/daemon/control.o: daemon/org.blkstack.varlink
$O/tests/unit/test_varlink $O/tests/fuzz/varlink: $O/daemon/varlink.o

$O/tests/helpers/keeper-hostile: $O/daemon/keeper-wire.o $O/daemon/privileges.o
$O/tests/helpers/kernel-device: $(patsubst %,$O/daemon/kernel-%.o,dev dev-claim dev-ioctl dev-netlink lock memory netlink \
	receivers sysfs udev users)
$O/tests/helpers/kernel-device $O/tests/helpers/service-jobs: LDLIBS += $(DAEMON_LIBS)

$(BENCHES): $O/%: $O/%.o $(BENCH_OBJ)
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ -pthread

$(FUZZERS): $O/%: $O/%.o $O/libblkstack.a
	$(call say,LD,$@)
	$Q$(CC) $(ALL_CFLAGS) -fsanitize=fuzzer $(LDFLAGS) -o $@ $(filter %.o,$^) $(filter %.a,$^) $(LDLIBS)

$O/tests/fuzz/nbd_tls: LDLIBS += -lgnutls

# make BUILD=fuzz fuzz: every fuzzer for FUZZ_S seconds; what it finds is left in the build folder.
FUZZ_S ?= 60
fuzz: $(FUZZERS)
	$Qfor fuzzer in $(FUZZERS:$O/tests/fuzz/%=%); do \
		mkdir -p $O/corpus/$$fuzzer && $O/tests/fuzz/$$fuzzer -max_total_time=$(FUZZ_S) -max_len=70000 \
			-timeout=20 -print_final_stats=1 -artifact_prefix=$O/$$fuzzer- \
			$O/corpus/$$fuzzer tests/fuzz/corpus/$$fuzzer || exit; done

check: all units $(HELPERS)
	$Qtests/run $O unit integration

# What several threads meet in, for BUILD=tsan; the rest stays on one reactor.
check-rt: units
	$Qtests/run $O unit test_rt test_nbd test_varlink test_memory test_file test_blk test_align test_stack

check-kernel: all $(HELPERS)
	$Qtests/kernel/run $O

# The same under Debian's 6.1 and 6.12 kernels in QEMU. VM="6.12 netlink kill": that one, and those tests.
check-vm: all $(HELPERS)
	$Qscripts/deps vm
	$Qtests/kernel/check-vm $O $(VM)

# Hundreds of kills under every file system and stack; hours. SOAK="xfs qcow": the rows with these words.
soak-kernel: all
	$Qtests/kernel/soak-matrix $O $(SOAK)

# The unit under a real systemd, from boot to shutdown; minutes, and not in CI.
check-systemd: all
	$Qtests/kernel/systemd $O

# The assembly for a processor that is not here, in an emulator (packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross,
# qemu-user-static). Not in CI.
check-aarch64:
	$Qmkdir -p $O && for level in 0 2 3; do \
		aarch64-linux-gnu-gcc -std=gnu17 -D_GNU_SOURCE -O$$level $(WARNINGS) -static -Ilib -I. -o $O/switch-aarch64 \
			tests/unit/test_switch.c lib/rt/co_switch.c && qemu-aarch64-static $O/switch-aarch64 || exit; done

# BENCH="--rounds 1 --only randread" passes options; tests/bench/README.md has them.
bench: all $(BENCHES)
	$Qtests/bench/bench --build $O $(BENCH)

units: $(UNITS)

lint:
	$Qscripts/lint

format:
	$Qgit ls-files '*.c' '*.h' | xargs clang-format -i

clean:
	rm -rf build build-*

# Into DESTDIR: programs, manual pages, example configs, units. The config itself is the administrator's.
COMPLETIONDIR ?= $(PREFIX)/share/bash-completion/completions
MAN_PAGES := $(wildcard daemon/*.[18] daemon/*/*.[18] conf/*.5)
SYSTEM_UNITS := $(wildcard systemd/*.service systemd/*.socket)

install: all
	$(call say,INST,$(DESTDIR)$(PREFIX))
	$Qinstall -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(BINDIR) $(DESTDIR)$(SYSCONFDIR)/blkstack \
		$(DESTDIR)$(SHAREDIR)/examples $(DESTDIR)$(UNITDIR) \
		$(DESTDIR)$(LIBDIR_SYSTEM)/tmpfiles.d $(DESTDIR)$(LIBDIR_SYSTEM)/udev/rules.d
	$Qinstall -m 755 $O/blkstackd $(DESTDIR)$(SBINDIR)/
	$Qfor program in $(filter-out %/blkstackd,$(PROGRAMS)); do \
		install -m 755 $$program $(DESTDIR)$(BINDIR)/ || exit; done
	$Qinstall -m 644 conf/*.conf systemd/examples/* $(DESTDIR)$(SHAREDIR)/examples/
	$Qfor page in $(MAN_PAGES); do \
		install -D -m 644 $$page $(DESTDIR)$(MANDIR)/man$${page##*.}/$${page##*/} || exit; done
	$Qfor unit in $(SYSTEM_UNITS); do \
		sed 's|/usr/local/sbin/|$(SBINDIR)/|; s|/usr/local/bin/|$(BINDIR)/|; s|/etc/blkstack/|$(SYSCONFDIR)/blkstack/|' $$unit \
			> $(DESTDIR)$(UNITDIR)/$${unit##*/} || exit; done
	$Qinstall -D -m 644 daemon/ctl/blkstackctl.bash $(DESTDIR)$(COMPLETIONDIR)/blkstackctl
	$Qinstall -D -m 644 daemon/img/blkstack-img.bash $(DESTDIR)$(COMPLETIONDIR)/blkstack-img
	$Qinstall -m 644 systemd/blkstack.tmpfiles $(DESTDIR)$(LIBDIR_SYSTEM)/tmpfiles.d/blkstack.conf
	$Qinstall -m 644 systemd/99-blkstack.rules $(DESTDIR)$(LIBDIR_SYSTEM)/udev/rules.d/

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

.PHONY: all check check-rt check-kernel soak-kernel check-aarch64 check-systemd check-vm bench fuzz units lint format install clean help
.SECONDARY:
-include $(shell find $O -name '*.d' 2>/dev/null)
