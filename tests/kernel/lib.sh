# Sourced by the kernel tests, inside the guest: a daemon, files with known checksums, assertions.
# shellcheck shell=bash
#
# A test starts with `. "$(dirname "$0")/lib.sh"` and is then in $SCRATCH, where everything it makes
# belongs. A failing command ends it; so do `fail` and an error in the guest kernel's log at the end.
set -euo pipefail
shopt -s inherit_errexit
cd "$SCRATCH"

seed=${SEED:-$RANDOM}
control=$SCRATCH/control
socket=$SCRATCH/nbd
mnt=$SCRATCH/mnt
mkdir -p "$mnt"
log_at=0
daemon_options=()
daemon_config=

step() {
	echo "-- $*"
}

fail() {
	echo "FAILED: $*"
	exit 1
}

on_exit() {
	local status=$?
	((status == 0)) && return
	echo "status $status at line ${BASH_LINENO[0]} of ${BASH_SOURCE[1]##*/}, seed $seed"
	[[ ! -s blkstackd.log ]] || sed 's/^/    blkstackd: /' blkstackd.log
}
trap on_exit EXIT

ctl() {
	"$BUILD/blkstackctl" --socket "$control" "$@"
}

# Runs a command that must fail, with a message that matches; its output is printed.
refused() {
	local pattern=$1 output
	shift
	if output=$("$@" 2>&1); then
		fail "\"$*\" was not refused: $output"
	fi
	echo "   refused: $output"
	grep -qE -- "$pattern" <<<"$output" || fail "\"$*\" says nothing like \"$pattern\""
}

# The config has these exports (libconfig text) from now on.
config_write() {
	cat >blkstack.conf.new <<-CONF
	control = "$control";
	listen = [ "unix:$socket" ];
	$daemon_config
	exports = (
	$*
	);
	CONF
	mv blkstack.conf.new blkstack.conf
}

# Starts the daemon on the config as it is.
daemon_run() {
	"$BUILD/blkstackd" --config blkstack.conf "${daemon_options[@]}" 2>>blkstackd.log &
	daemon=$!
	local try
	for ((try = 0; try < 2400; try++)); do
		kill -0 "$daemon" 2>/dev/null || fail "blkstackd did not start"
		ctl list >/dev/null 2>&1 && return
		sleep 0.05
	done
	fail "blkstackd does not answer"
}

daemon_start() {
	config_write "$@"
	daemon_run
}

# Runs a command, and all that it starts, short of what $SCRATCH/short-of says then; see helpers/short-of.c.
with_shortages() {
	if grep -q __asan_init "$BUILD/blkstackd"; then
		echo "a sanitizer's program takes no library that comes before it"
		exit 77
	fi
	SHORT_OF=$SCRATCH/short-of LD_PRELOAD=$BUILD/tests/helpers/short-of.so "$@"
}

# Ends the daemon as systemd would; it must end by itself, and well.
daemon_stop() {
	local status=0
	kill -TERM "$daemon"
	wait "$daemon" || status=$?
	((status == 0)) || fail "blkstackd ended with status $status"
}

# Loads kernel modules in user-mode Linux; other guests have all that tests need.
need_modules() {
	local module
	for module; do
		[[ ! -d /usr/lib/uml/modules/$(uname -r) ]] ||
			insmod "$(find "/usr/lib/uml/modules/$(uname -r)" -name "$module.ko" | head -n 1)" 2>/dev/null ||
			[[ -e /sys/module/${module//-/_} ]] || fail "no module $module"
	done
}

# Disconnects a device that nbd-client serves, and waits until it is free: the driver tells the other process only.
other_off() {
	nbd-client -d "$1" >/dev/null
	while [[ -e /sys/block/${1#/dev/}/pid ]]; do sleep 0.05; done
}

uri() {
	echo "nbd+unix:///$1?socket=$socket"
}

size_of() {
	blockdev --getsize64 "$1"
}

# Bytes a file takes up on its disk.
space_of() {
	echo $(($(stat -c '%b * %B' "$1")))
}

# Fills a folder with COUNT files of pseudorandom length and content, and notes their checksums. Of 24 files that follow
# each other none has the order of magnitude of another, so that together they have some 16 MiB whatever the seed is.
fill() {
	local dir=$1 count=$2
	mkdir -p "$dir"
	/usr/bin/python3 - "$dir" "$count" "$seed" <<-'PYTHON'
	import os, random, sys
	folder, count, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
	rng = random.Random(f"{os.path.basename(folder)} {seed}")
	powers = []
	for i in range(count):
	    powers = powers or rng.sample(range(24), 24)
	    with open(f"{folder}/{i}", "wb") as file:
	        file.write(rng.randbytes((1 << powers.pop()) + rng.randrange(4096)))
	PYTHON
	(cd "$dir" && sha256sum -- * >"$SCRATCH/${dir##*/}.sums")
}

# Reads the files back, not from memory.
verify() {
	sync
	echo 3 >/proc/sys/vm/drop_caches
	(cd "$1" && sha256sum --quiet --check "$SCRATCH/${1##*/}.sums") || fail "$1 differs"
}

# Reads the whole export again and again by its socket, until reader_stop.
reader_start() {
	rm -f reader.done reader.log
	(
		rounds=0
		while [[ ! -e reader.done ]]; do
			nbdcopy "$(uri "$1")" null: || exit 1
			rounds=$((rounds + 1))
		done
		echo "$rounds" >reader.log
	) &
	reader=$!
}

reader_stop() {
	touch reader.done
	wait "$reader" || fail "the second client, on the NBD socket, got an error"
	echo "   the second client read the export $(<reader.log) times meanwhile"
}

# The kernel met no error it did not expect; `log_skip` forgets those that were. By netlink requests that
# take more than three seconds are told of, and repeated ones among them: that is no error. Nor is a line like $1.
log_check() {
	local errors
	errors=$(dmesg | tail -n +$((log_at + 1)) | grep -vE "${1:-^$}" |
		grep -vE 'Possible stuck request .* Runtime [12]?[0-9] seconds' |
		grep -E 'I/O error|EXT4-fs error|EXT4-fs warning|XFS.*(error|orrupt)|timed out|stuck|Oops|BUG|WARNING') || return 0
	# What the server and the driver are busy with.
	ctl status 2>/dev/null | sed 's/^/    status: /' || true
	cat /proc/[0-9]*/comm 2>/dev/null | grep '+nbd' | sed 's/^/    busy: /' || true
	fail "the kernel's log has errors: $errors"
}

log_skip() {
	log_at=$(dmesg | wc -l)
}
