# Completion of blkstackctl for bash: commands, options, names of exports and of devices.
# shellcheck shell=bash

_blkstackctl() {
	local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
	local commands="list status resize flush discard attach detach mirror compact check snapshot"
	commands+=" latency clients disconnect debug reload add remove upgrade shutdown call doctor version"
	local socket=() operands=() i

	# What stands on the line already: the command, its operands, and another socket.
	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		-s | --socket)
			[[ ${COMP_WORDS[i + 1]} == "=" ]] && ((i++)) # bash makes three words of --socket=PATH
			socket=(--socket "${COMP_WORDS[++i]}")
			;;
		-r | --rate | --config | --root | --config-snippet) ((i++)) ;;
		-[a-zA-Z-]*) ;;
		*) operands+=("${COMP_WORDS[i]}") ;;
		esac
	done

	local candidates=""
	case $previous in
	-s | --socket | --config | --root | =)
		mapfile -t COMPREPLY < <(compgen -f -- "$word")
		return
		;;
	esac
	if [[ $word == -* ]]; then
		candidates="--socket --json --help"
		case ${operands[0]:-} in
		resize | discard | detach | remove | upgrade) candidates+=" --force" ;;
		reload) candidates+=" --dry-run --upgrade" ;;
		add) candidates+=" --config-snippet" ;;
		mirror)
			case ${operands[1]:-} in
			start) candidates+=" --to --overwrite --rate --intent-log --paused" ;;
			promote) candidates+=" --force --keep" ;;
			esac
			;;
		compact) candidates+=" --rate --cancel --more" ;;
		snapshot) [[ ${operands[1]:-} == apply ]] && candidates+=" --force" ;;
		call) candidates+=" --more" ;;
		doctor) candidates+=" --config --root" ;;
		"") candidates+=" --version" ;;
		esac
	elif ((${#operands[@]} == 0)); then
		candidates=$commands
	elif ((${#operands[@]} == 1)); then
		case ${operands[0]} in
		add)
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
			return
			;;
		status | latency | resize | flush | discard | attach | detach | compact | check | clients | remove)
			candidates=$(blkstackctl "${socket[@]}" list 2>/dev/null | awk 'NR > 1 { print $1 }')
			;;
		mirror) candidates="start status wait pause resume rate promote cancel forget verify" ;;
		debug) candidates="on off" ;;
		disconnect)
			candidates=$(blkstackctl "${socket[@]}" clients 2>/dev/null | awk 'NR > 1 { print $1 }')
			;;
		snapshot) candidates="list create apply delete" ;;
		call)
			candidates="Info List Status Clients Disconnect Debug Resize Flush Discard Attach Detach Shutdown"
			candidates+=" MirrorStart MirrorStatus MirrorWait MirrorPause MirrorResume MirrorRate"
			candidates+=" MirrorCancel MirrorPromote MirrorForget MirrorVerify"
			candidates+=" Compact CancelCompact Check Snapshots CreateSnapshot ApplySnapshot"
			candidates+=" DeleteSnapshot Reload Add Remove Upgrade"
			;;
		esac
	elif ((${#operands[@]} == 2)) && [[ ${operands[0]} == @(mirror|snapshot) ]]; then
		candidates=$(blkstackctl "${socket[@]}" list 2>/dev/null | awk 'NR > 1 { print $1 }')
	elif ((${#operands[@]} == 2)) && [[ ${operands[0]} == debug ]]; then
		candidates=$(blkstackctl "${socket[@]}" clients 2>/dev/null | awk 'NR > 1 { print $1 }')
	elif ((${#operands[@]} == 2)) && [[ ${operands[0]} == attach ]]; then
		candidates="auto $(compgen -G '/dev/nbd*')"
	fi
	mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$word")
}
complete -F _blkstackctl blkstackctl
