#!/bin/sh
# nodepass-gevent @version@ for @machine@ with glibc @glibc@ or later; made by scripts/single-file.
#
# What follows these lines is unpacked once, into a directory where nobody but root or this user can write, and the
# program there takes the place of this script: it is the same process. It keeps that directory locked until it ends.
set -eu
id=@id@       # a digest of what is unpacked
files=@files@ # how many files that are
start=@start@ # its first line here

case $0 in /*) self=$0 ;; *) self=$PWD/$0 ;; esac
PATH=${PATH:+$PATH:}/usr/sbin:/usr/bin:/sbin:/bin
user=$(id -u)
if [ "$user" = 0 ]; then mode=0755; else mode=0700; fi # what root has unpacked serves everybody

run() {
    LD_LIBRARY_PATH=$1/_internal${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} # also for what starts Python there: libz
    export LD_LIBRARY_PATH NODEPASS_SINGLE_FILE="$self"
    directory=$1
    shift
    exec "$directory/nodepass" "$@"
}
is_ours() {
    [ -n "$(find "$1" -prune -type d \( -user 0 -o -user "$user" \) ! -perm -020 ! -perm -002 2>/dev/null)" ]
}
is_whole() { # what cleans /tmp may have been here
    [ "$(find "$1" -type f | wc -l)" -eq "$files" ]
}
take() {
    is_ours "$1" && [ -r "$1/$id" ] || return 1
    exec 9<"$1/$id" # open, and so locked, for as long as the process lives
    flock -n -s 9 && is_whole "$1/$id"
}
unpack() {
    part=$1/$id.part
    rm -rf "$part" && mkdir "$part" && # of a start that was killed
        tail -n "+$start" "$self" | gzip -dc | tar -xmof - -C "$part" &&
        is_whole "$part" &&
        (run "$part" --version) >/dev/null && # it may be executed there, and finds its libraries
        rm -rf "${1:?}/$id" && mv "$part" "$1/$id" && return
    rm -rf "$part"
    return 1
}
remove_others() { # versions of which no process runs, and parts of them
    for other in "$1"/*/; do
        [ "$other" = "$1/$id/" ] || flock -n "$other" rm -rf "$other" || :
    done
}
make() {
    (umask 077; mkdir -p "${1%/*}" && mkdir -m "$mode" "$1") 2>/dev/null || :
    if ! is_ours "$1" || ! [ -w "$1" ]; then return 1; fi
    exec 8>"$1/lock"
    flock 8 # several may start at once
    take "$1" || {
        (umask 022 && unpack "$1") || return 1
        remove_others "$1"
        take "$1"
    }
    exec 8>&-
}
find_place() { # find_place FUNCTION: the first directory for which it succeeds
    for place in /var/cache/nodepass "${XDG_CACHE_HOME:+$XDG_CACHE_HOME/nodepass}" "${HOME:+$HOME/.cache/nodepass}" \
        "${TMPDIR:-/tmp}/nodepass-$user"; do
        case $place in /*) "$1" "$place" && return ;; esac
    done
    return 1
}

if ! find_place take && ! find_place make; then
    echo "nodepass: error: cannot unpack: no directory for it is writable, or lets programs run;" \
        "XDG_CACHE_HOME=DIRECTORY names another" >&2
    exit 1
fi
run "$place/$id" "$@"
