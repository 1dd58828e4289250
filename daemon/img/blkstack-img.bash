# Completion of blkstack-img for bash: commands, their options as --help has them, files.
# shellcheck shell=bash

_blkstack_img() {
	local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[1]}
	local candidates=""

	[[ $previous == "=" ]] && previous=${COMP_WORDS[COMP_CWORD - 2]} # bash makes three words of --to=FORMAT
	[[ $word == "=" ]] && word=""
	if ((COMP_CWORD == 1)) && [[ $word == -* ]]; then
		candidates="--help --version"
	elif ((COMP_CWORD == 1)); then
		candidates=$(blkstack-img --help | sed -n '/^Commands:/,/^$/s/^  \([a-z]*\) .*/\1/p')
	elif [[ $word == -* ]]; then
		candidates=$(blkstack-img "$command" --help 2>/dev/null | sed -n 's/^  \(-.,\|   \) \(--[a-z0-9-]*\).*/\2/p')
	else
		case $previous in
		-f | --format | -O | --to | -F | --backing-format) candidates="raw qcow2" ;;
		--compression) candidates="zlib zstd" ;;
		-p | --prealloc) candidates="off metadata falloc full" ;;
		--qcow-version) candidates="2 3" ;;
		--refcount-bits) candidates="1 2 4 8 16 32 64" ;;
		-b | --allow-backing)
			mapfile -t COMPREPLY < <(compgen -d -- "$word")
			return
			;;
		snapshot) candidates="list create apply delete" ;;
		*)
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
			return
			;;
		esac
	fi
	mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$word")
}
complete -F _blkstack_img blkstack-img
