# The life of a file system on /dev/nbd0, for any stack. Sourced after lib.sh.
# shellcheck shell=bash
#
#     life EXPORT SIZE_MIB BIGGER_MIB MKFS...
#
# made, mounted, filled, grown while mounted, filled more, half deleted, trimmed, checked, unmounted,
# checked again, read back, while a second client reads the export over the NBD socket. space_used,
# if the test defines it, says how many bytes the stack takes up: trimming must lower that.

life() {
	local export=$1 size=$(($2 << 20)) bigger=$(($3 << 20)) mkfs=("${@:4}")
	local before after blocks

	[[ $(size_of /dev/nbd0) = "$size" ]] || fail "/dev/nbd0 has $(size_of /dev/nbd0) bytes"
	step "${mkfs[0]}, mount, fill; seed $seed"
	"${mkfs[@]}" -q /dev/nbd0
	mount /dev/nbd0 "$mnt"
	reader_start "$export"
	fill "$mnt/first" 60
	verify "$mnt/first"

	step "resize to $3 MiB while mounted and read"
	blocks=$(stat -f -c %b "$mnt")
	ctl resize "$export" "${3}M"
	[[ $(size_of /dev/nbd0) = "$bigger" ]] || fail "/dev/nbd0 has $(size_of /dev/nbd0) bytes"
	[[ $(nbdinfo --size "$(uri "$export")") = "$bigger" ]] || fail "new clients see the old size"
	grow_fs "${mkfs[0]}" /dev/nbd0 "$mnt"
	(($(stat -f -c %b "$mnt") > blocks)) || fail "the file system did not grow"
	fill "$mnt/second" 60
	verify "$mnt/first"
	verify "$mnt/second"

	step "delete half, fstrim"
	sync
	before=$(space_used)
	rm -r "$mnt/second"
	sync
	fstrim -v "$mnt"
	after=$(space_used)
	echo "   $((before >> 20)) MiB before, $((after >> 20)) MiB after"
	((after + (8 << 20) < before)) || fail "trimming gave no space back"
	verify "$mnt/first"
	reader_stop

	step "unmount, check, detach, attach again, read back"
	umount "$mnt"
	check_fs "${mkfs[0]}" /dev/nbd0
	ctl detach "$export"
	[[ $(size_of /dev/nbd0) = 0 ]] || fail "/dev/nbd0 is still there"
	nbdcopy "$(uri "$export")" copy.img
	check_fs "${mkfs[0]}" copy.img
	rm copy.img
	ctl attach "$export"
	mount /dev/nbd0 "$mnt"
	verify "$mnt/first"
	umount "$mnt"
	log_check
}

grow_fs() {
	case $1 in
	mkfs.xfs) xfs_growfs "$3" >/dev/null ;;
	*) resize2fs "$2" 2>/dev/null ;;
	esac
}

check_fs() {
	case $1 in
	mkfs.xfs) xfs_repair -n -f "$2" >fsck.log 2>&1 ;;
	*) e2fsck -fn "$2" >fsck.log 2>&1 ;;
	esac || fail "$2: the file system has errors: $(<fsck.log)"
}
