# Sourced by ./uml and ./vm: what is the same for every machine that runs a script in a guest of its own.
# shellcheck shell=bash disable=SC2034,SC2154
#
#     guest_options "$@"; shift "$guest_shift"    fills timeout_s mem disk_size keep
#     guest_prepare DISK MODULE SCRIPT...         makes $work with the guest's first process, $work/init; DISK:
#                                                 its node for -d; MODULE: nbd.ko, "" if loaded already
#     guest_run COMMAND...                        runs the machine, whose console is its output, and exits

timeout_s=120
mem=1G
disk_size=
keep=
# What the environment tells tests.
knobs=(SEED KILLS KEEPER_KILLS UPGRADES RESIZES RELOADS FS MODE CONNECTIONS STACK STORM LAYERS KEYS MKFS)
me=$(basename "$0")

die() {
	echo "$me: $*" >&2
	exit 125
}

guest_options() {
	local opt
	while getopts t:m:d:k:h opt; do
		case $opt in
		t) timeout_s=$OPTARG ;;
		m) mem=$OPTARG ;;
		d) disk_size=$OPTARG ;;
		k) keep=$OPTARG ;;
		h) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
		*) exit 125 ;;
		esac
	done
	guest_shift=$((OPTIND - 1))
	((guest_shift < $#)) || die "which script? (-h for help)"
}

guest_prepare() {
	local disk=$1 module=$2 script name
	shift 2
	script=$(realpath -e -- "$1") || die "no script $1"
	[[ -x $script ]] || die "$script is not executable"
	shift
	guest_script=$script
	work=$(mktemp -d "${TMPDIR:-/tmp}/blkstack-guest.XXXXXX")
	trap 'rm -rf -- "$work"' EXIT
	mkdir "$work/scratch" "$work/home"
	# What the guest's first process needs, as shell text.
	{
		printf 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n'
		printf 'SCRATCH=%q\nTMPDIR=%q\n' "$work/scratch" "$work/scratch"
		printf 'HOME=%q\nLANG=C.UTF-8\nTERM=dumb\n' "$work/home"
		[[ -z $disk_size ]] || printf 'UML_DISK=%q\n' "$disk"
		for name in BUILD CI "${knobs[@]}"; do
			[[ -z ${!name+set} ]] || printf '%s=%q\n' "$name" "${!name}"
		done
		printf 'guest_cwd=%q\nnbd_module=%q\nwork=%q\n' "$PWD" "$module" "$work"
		printf 'post_mortem_s=%d\n' $((timeout_s > 10 ? timeout_s - 5 : timeout_s / 2))
		printf 'command=('
		printf '%q ' "$script" "$@"
		printf ')\n'
	} >"$work/env"

	guest_init >"$work/init"
	chmod +x "$work/init"
	if [[ -n $disk_size ]]; then
		truncate -s "$disk_size" "$work/disk"
	fi
}

guest_init() {
	cat <<GUEST
#!/bin/bash
# First process of the guest. A step that fails leaves no status file, which the host reports.
set -a
. '$work/env'
set +a
export -n guest_cwd nbd_module work post_mortem_s
GUEST
	cat <<'GUEST'
# Leaves what a post-mortem needs: the kernel's log, and on a hang who waits for what.
save_log() {
	if [[ $1 = hang ]]; then
		echo w >/proc/sysrq-trigger
		ps -eo pid,stat,wchan:24,args | grep -v ' \[' >"$work/processes"
		sync "$work/processes"
	fi
	dmesg >"$work/dmesg"
	sync "$work/dmesg"
}

boot() {
	mount -t proc proc /proc &&
	mount -t sysfs sysfs /sys &&
	{ mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev; } &&
	mkdir -p /dev/pts /dev/shm && mount -t devpts devpts /dev/pts &&
	mount -t tmpfs tmpfs /dev/shm &&
	mount -t tmpfs tmpfs /run &&
	mount -t tmpfs -o size=100% tmpfs "$TMPDIR" &&
	ip link set lo up &&
	{ [[ -z $nbd_module ]] || insmod "$nbd_module" nbds_max=4 max_part=15; }
}

# The host takes from the console what stands between the two marks.
exec </dev/null 2>&1
printf '\n@uml-start@\n'
: >"$work/began"
if boot; then
	echo 1 >/proc/sys/kernel/sysrq
	dmesg --clear
	dmesg --console-level 1
	{ sleep "$post_mortem_s" && save_log hang; } &
	cd "$guest_cwd" || cd /
	"${command[@]}" </dev/null
	status=$?
	save_log end
	echo "$status" >"$work/status"
	sync "$work/status"
else
	save_log boot
fi
printf '\n@uml-end@\n'
cd /
echo o >/proc/sysrq-trigger
sleep 60
GUEST
}

# Passes on, line by line as they come, those between the marks; what else a console carries is the kernel's own.
guest_console() {
	local line inside='' blank=''
	while IFS= read -r line || [[ -n $line ]]; do
		line=${line//$'\r'/} # lines end with CR LF there
		if [[ $line = @uml-start@ ]]; then
			inside=1
		elif [[ $line = @uml-end@ ]]; then
			inside=
		elif [[ -z $inside || $line =~ ^\[\ *[0-9.]+\]\ (sysrq|reboot): ]]; then
			printf '%s\n' "$line" >&3
		elif [[ -z $line ]]; then
			blank+=$'\n'
		else
			printf '%s%s\n' "$blank" "$line"
			blank=
		fi
	done 3>"$work/boot"
}

guest_run() {
	local guest=0 status why log name logs=()
	ulimit -c 0
	timeout -k 5 -s TERM "$timeout_s" "$@" </dev/null 2>"$work/stderr" | guest_console || guest=${PIPESTATUS[0]}

	name=$(basename "$guest_script")
	if [[ -s $work/status ]]; then
		status=$(<"$work/status")
		why="failed with status $status"
	elif ((guest == 124 || guest == 137)); then
		status=124
		why="ran out of its $timeout_s s"
	else
		status=125
		why="did not end: the guest died (exit status $guest)"
	fi
	if [[ -n $keep ]]; then
		mkdir -p "$keep"
		for log in dmesg processes boot stderr; do
			[[ ! -s $work/$log ]] || cp "$work/$log" "$keep/"
		done
	fi
	((status && status != 77)) || exit "$status"

	echo "$me: $name $why" >&2
	((status != 125)) || logs=(boot stderr)
	for log in "${logs[@]}" processes dmesg; do
		[[ -s $work/$log ]] || continue
		echo "$me: the guest's $log:" >&2
		tail -n 60 "$work/$log" | sed 's/^/    /' >&2
	done
	exit "$status"
}
