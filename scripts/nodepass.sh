#!/bin/bash
# Installs nodepass and keeps tunnels running under supervisord or systemd, for the system or for one user.
# Usage: scripts/nodepass.sh [COMMAND]     without a command, on a terminal, a menu; --help shows all
set -eu -o pipefail
umask 022

readonly MARK="made by nodepass.sh" # ends the first line of each program section and unit that is ours
readonly COMMANDS="install, update, add, list, status, log, start, stop, restart, reload, delete, remove"
readonly PROJECT="nodepass-gevent"
readonly IN_USE="fine if it is by the service" # in nodepass check's warning of a port that is taken

usage() {
    cat <<'TEXT'
usage: nodepass.sh install [--from WHEEL|DIR|SDIST]      into an environment of its own; from this checkout by default
       nodepass.sh update [--from WHEEL|DIR|SDIST]       if it starts and takes every tunnel; else the old one stays
       nodepass.sh add NAME [URL|--config FILE] [nodepass options] [--tunnel-key-file FILE|-] [--new-tunnel-key]
                         [--replace [--no-tunnel-key]]
       nodepass.sh list | status [NAME] | log NAME
       nodepass.sh start|stop|restart NAME|--all
       nodepass.sh reload NAME|--all                     its file, certificates and keys are read again; its exchanges go on
       nodepass.sh delete NAME [--purge]
       nodepass.sh remove [--yes] [--purge]              all of it; settings, keys and logs only with --purge
       nodepass.sh                                       a menu, on a terminal

A command that finds its work done changes nothing. "add NAME" alone takes what NAME had before it was deleted.
For root the system is changed (/opt/nodepass, /etc/nodepass), for others their home (~/.local, ~/.config).

  --dry-run                 print every change, make none
  --manager MANAGER         supervisord or systemd; found out otherwise
  --supervisord-conf FILE   supervisord's configuration, whose [include] says where programs are
  --user                    in the home, also for root
  --root DIR                everything below DIR, for trials
  --tunnel-key-file FILE    add: the key is copied, to be read by nobody else; - is standard input
  --new-tunnel-key          add: a key is made, unless the tunnel has one
  --replace                 add: other settings, all of them, for a tunnel that is there; it keeps its tunnel key
  --no-tunnel-key           add --replace: the key is given up
  PYTHON, in the environment, names the interpreter for install; pip's own variables (PIP_...) reach pip

Exit codes: 0 done, 1 it failed and nothing was left half done, or status: a tunnel does not run, 2 wrong use.
TEXT
}

# What is said

fail() { # fail CODE TEXT
    printf 'nodepass.sh: error: %s\n' "$2" >&2
    exit "$1"
}
misuse() { fail 2 "$1; --help shows all"; }
shown() { printf '%q' "${1:0:80}"; } # what was typed, without what a terminal would obey
last_line() { tail -n 1 -- "$1" 2>/dev/null | cut -c -300 || true; }

# Changes: each is made or, with --dry-run, printed

dry() { [ -n "${given[dry-run]-}" ]; }
change() { # change COMMAND...
    if dry; then
        printf 'would run:%s\n' "$(printf ' %q' "$@")"
    else
        "$@"
    fi
}
quietly() { # quietly COMMAND...: a change whose output is shown only when it fails
    if dry; then
        change "$@"
    elif ! "$@" >"$work/output" 2>&1; then
        sed 's/^/    /' "$work/output" | tail -n 20 >&2
        return 1
    fi
}
make_dir() { # make_dir DIR: which of its parents are new is kept, for remove
    local missing=() dir=$1
    while [ ! -d "$dir" ]; do
        missing=("$dir" "${missing[@]}")
        dir=${dir%/*}
        dir=${dir:-/}
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    change mkdir -p -- "$1" || fail 1 "$1: cannot be made"
    dry || printf '%s\n' "${missing[@]}" >>"$etc/directories"
}
put() { # put FILE MODE TEXT: whole or not at all
    local temporary
    if dry; then
        printf 'would write: %s (mode %s)\n' "$1" "$2"
        printf '%s\n' "$3" | sed 's/^/    /'
        return
    fi
    temporary=$(mktemp -- "$1.XXXXXX") || fail 1 "$1: its directory cannot be written"
    if ! { printf '%s\n' "$3" >"$temporary" && chmod "$2" "$temporary" && mv -f -- "$temporary" "$1"; }; then
        rm -f -- "$temporary"
        fail 1 "$1: cannot be written"
    fi
}
link() { # link TARGET NAME: at once, whatever link was there
    if ! { change ln -sfn -- "$1" "$2.new" && change mv -fT -- "$2.new" "$2"; }; then
        fail 1 "$2: cannot be linked"
    fi
}

# Where things are

locate() {
    root=${given[root]-}
    if [ -n "$root" ]; then
        [ -d "$root" ] || misuse "--root: $(shown "$root") is no directory"
        root=$(cd -- "$root" && pwd -P)
        root=${root%/}
    fi
    scope=system
    if [ "$(id -u)" != 0 ] || [ -n "${given[user]-}" ]; then
        scope=user
        [[ ${HOME-} == /* ]] || misuse "HOME: names no directory"
        local home=$root${HOME%/}
        base=$home/.local prefix=$home/.local/share/nodepass etc=$home/.config/nodepass
        logs=$home/.local/state/nodepass units=$home/.config/systemd/user
        find_conf "$home/.config/supervisor/supervisord.conf" "$home/supervisord.conf"
    else
        base=$root/usr/local prefix=$root/opt/nodepass etc=$root/etc/nodepass
        logs=$root/var/log/nodepass units=$root/etc/systemd/system
        find_conf "$root/etc/supervisor/supervisord.conf" "$root/etc/supervisord.conf"
    fi
    current=$prefix/current program=$prefix/current/bin/nodepass
}
find_conf() { # find_conf CANDIDATE...: sets conf, and where it takes programs from: sections and suffix
    local candidate pattern
    conf='' sections='' suffix=''
    if [ -n "${given[supervisord-conf]-}" ]; then
        conf=$(absolute "${given[supervisord-conf]}")
        [ -f "$conf" ] || misuse "--supervisord-conf: $(shown "$conf") is no file"
    elif [ -f "$etc/supervisord-conf" ]; then
        conf=$(<"$etc/supervisord-conf")
    fi
    for candidate; do
        [ -n "$conf" ] || [ ! -f "$candidate" ] || conf=$candidate
    done
    [ -f "$conf" ] || return 0
    pattern=$(awk '/^\[/ { inside = /^\[include\]/ }
        inside && sub(/^files[ \t]*[=:][ \t]*/, "") { print $1; exit }' "$conf")
    pattern=${pattern//'%(here)s'/${conf%/*}}
    [ -z "$pattern" ] || [[ $pattern == /* ]] || pattern=${conf%/*}/$pattern
    [[ $pattern =~ ^(/[^*?]*)/\*([A-Za-z0-9._-]*)$ ]] || return 0
    sections=${BASH_REMATCH[1]} suffix=${BASH_REMATCH[2]}
}
absolute() { if [[ $1 == /* ]]; then printf '%s' "$1"; else printf '%s' "$PWD/$1"; fi; }

installed() { [ -x "$program" ]; }
need_installed() { installed || fail 2 "nodepass is not installed in $prefix; nodepass.sh install does"; }
lock() { # one of us at a time
    dry && return
    exec 9<"$prefix"
    ! command -v flock >/dev/null || flock -n 9 || fail 1 "$prefix: another nodepass.sh is at work"
}

# The program: $prefix/versions/DIGEST are environments, $prefix/current links to one of them

find_python() { # sets python
    local lacks='' hidden='' candidate
    local -a candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    [ "$scope" = user ] || candidates=(/usr/bin/python3 /usr/local/bin/python3 "${candidates[@]}")
    for candidate in ${PYTHON:+"$PYTHON"} "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            lacks=$candidate
            continue
        fi
        python=$candidate
        [ "$scope" = system ] && [[ $("$python" -c 'import sys; print(sys.base_prefix)') =~ ^/(root|home)/ ]] || return 0
        hidden=$candidate # systemd's unit does not see homes
    done
    if [ -n "$hidden" ]; then
        python=$hidden
        echo "warning: $hidden lies in a home, where a unit of systemd cannot see it"
    elif [ -n "$lacks" ]; then
        fail 1 "$lacks lacks its venv module; on Debian and Ubuntu: apt-get install python3-venv"
    else
        fail 1 "no Python 3.10 or newer was found; name one with PYTHON=/path/to/python3"
    fi
}
files_of() { # what of a source tree makes the program, each path ended by NUL
    (cd -- "$1" && find . -mindepth 1 \( -name '.*' -o -name __pycache__ -o -name '*.egg-info' -o -path ./build \
        -o -path ./dist -o -path ./tests \) -prune -o -type f -print0 | LC_ALL=C sort -z)
}
find_source() { # sets from, what --from names, and digest, that of its content
    from=${given[from]-}
    if [ -z "$from" ]; then
        from=$(cd -- "$(dirname -- "$self")/.." && pwd)
        [ -f "$from/setup.cfg" ] || misuse "--from WHEEL|DIR|SDIST is needed: this script does not lie in a checkout"
    fi
    from=$(absolute "$from")
    if [ -d "$from" ]; then
        [ -f "$from/setup.py" ] || [ -f "$from/pyproject.toml" ] || misuse "--from: $(shown "$from") has no setup.py"
        digest=$( (cd -- "$from" && files_of . | xargs -0 sha256sum --) | sha256sum)
    elif [ -f "$from" ] && [[ $from =~ \.(whl|tar\.gz|zip)$ ]]; then
        digest=$(sha256sum <"$from")
    else
        misuse "--from: $(shown "$from") is no wheel (.whl), source distribution (.tar.gz, .zip) or directory"
    fi
    digest=${digest:0:12}
}
build() { # build TARGET: an environment with what from holds; TARGET is gone when that fails
    local source=$from text
    if [ -e "$1/complete" ] && "$1/bin/nodepass" --version >/dev/null 2>&1; then
        return
    fi
    find_python
    if dry; then
        printf 'would run: %s -m venv %s, and its pip install %s\n' "$python" "$1" "$from"
        return
    fi
    echo "installing $from with $("$python" --version)"
    rm -rf -- "$1"
    if [ -d "$from" ]; then # a copy: building leaves things behind
        source=$work/source
        mkdir "$source"
        (cd -- "$from" && files_of . | tar --null -T - -cf -) | tar -C "$source" -xf -
    fi
    if ! { quietly "$python" -m venv "$1" &&
        quietly "$1/bin/python" -m pip --disable-pip-version-check --no-input install --use-pep517 --quiet "$source"; }; then
        rm -rf -- "$1"
        fail 1 "$(shown "$from"): cannot be installed, for the reason above; nothing is changed"
    fi
    if ! text=$("$1/bin/nodepass" --version 2>"$work/output") || [[ $text != "$PROJECT "* ]]; then
        text=$(last_line "$work/output")
        rm -rf -- "$1"
        fail 1 "$(shown "$from"): is no $PROJECT that runs${text:+: $text}; nothing is changed"
    fi
    printf '%s\n' "$from" >"$1/complete"
}
# before a command: without the settings that the environment of this shell may have
readonly BARE=(env -i "PATH=$PATH" "HOME=${HOME-/}" "LANG=${LANG-C.UTF-8}")
starts() { # starts PROGRAM: does it open a tunnel, and end when it is told?
    local pid code=0
    "${BARE[@]}" "$1" server://127.0.0.1:0/127.0.0.1:0 >"$work/output" 2>&1 9<&- &
    pid=$!
    for _ in {1..300}; do
        ! grep -q listening "$work/output" || break
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || code=$?
    [ "$code" = 0 ] && grep -q listening "$work/output"
}
links() { # of the program and what belongs to it, as they stand below base
    printf '%s\n' bin/nodepass share/man/man1/nodepass.1 share/bash-completion/completions/nodepass \
        share/zsh/site-functions/_nodepass share/fish/vendor_completions.d/nodepass.fish
}
is_our_link() { [ -L "$base/$1" ] && [ "$(readlink -- "$base/$1")" = "$current/$1" ]; }
check_link() {
    is_our_link bin/nodepass || [[ ! -e $base/bin/nodepass && ! -L $base/bin/nodepass ]] ||
        fail 1 "$base/bin/nodepass: is there already, and not by this script"
}
activate() { # activate VERSION, and link what it has
    local name
    link "versions/$1" "$current"
    while read -r name; do
        [ "$name" = bin/nodepass ] || [ -e "$current/$name" ] || continue
        ! is_our_link "$name" || continue
        [ "$name" = bin/nodepass ] || [ ! -e "$base/$name" ] || continue # somebody else's page
        make_dir "$base/${name%/*}"
        link "$current/$name" "$base/$name"
    done < <(links)
}

command_install() {
    [ $# = 0 ] || misuse "install is followed by options only, not by $(shown "$1")"
    find_source
    check_link
    if installed && [ "$(readlink -- "$current")" = "versions/$digest" ] && is_our_link bin/nodepass; then
        echo "$("$program" --version) is installed already, from the same source: nothing to do"
        return
    fi
    ! installed || [ "$(readlink -- "$current")" = "versions/$digest" ] ||
        fail 2 "$("$program" --version) is installed; nodepass.sh update puts another one in its place"
    make_dir "$etc"
    make_dir "$prefix/versions"
    lock
    build "$prefix/versions/$digest"
    activate "$digest"
    dry || echo "installed: $("$program" --version), as $base/bin/nodepass"
    case :$PATH: in *":$base/bin:"*) ;; *) [ -n "$root" ] || echo "note: $base/bin is not on your PATH" ;; esac
}
command_update() {
    local old names=() restarted=() name
    [ $# = 0 ] || misuse "update is followed by options only, not by $(shown "$1")"
    need_installed
    find_source
    old=$(readlink -- "$current")
    if [ "$old" = "versions/$digest" ]; then
        echo "$("$program" --version) is installed already, from the same source: nothing to do"
        return
    fi
    lock
    build "$prefix/versions/$digest"
    readarray -t names < <(tunnels)
    dry || refuse_unless_sound "$prefix/versions/$digest" "${names[@]}"
    for name in "${names[@]}"; do
        [ "$(state_of "$name")" != running ] || restarted+=("$name")
    done
    activate "$digest"
    for name in "${restarted[@]}"; do
        restart "$name" && continue
        echo "nodepass.sh: $name does not run with the new version: $(cause_of "$name")" >&2
        activate "${old#versions/}"
        restart_all "${restarted[@]}"
        change rm -rf -- "$prefix/versions/$digest"
        fail 1 "$(shown "$from"): does not run every tunnel; the old version is back"
    done
    change rm -rf -- "$prefix/$old"
    dry || echo "updated: $("$program" --version); restarted: ${restarted[*]:-no tunnel}"
}
restart_all() {
    local name
    for name; do
        restart "$name" || echo "nodepass.sh: $name does not run with the old version either" >&2
    done
}
refuse_unless_sound() { # refuse_unless_sound VERSION NAME...: nothing is touched when the new one is not up to it
    local new=$1 name why=''
    shift
    if ! starts "$new/bin/nodepass"; then
        why="does not start: $(last_line "$work/output")"
    fi
    for name; do
        [ -n "$why" ] && break
        read_record "$name"
        "${BARE[@]}" "$new/bin/nodepass" check "${record[@]}" >"$work/output" 2>&1 ||
            why="refuses $name: $(grep -m 1 ^error "$work/output" || last_line "$work/output")"
    done
    [ -n "$why" ] || return 0
    rm -rf -- "$new"
    fail 1 "$(shown "$from"): $why; the old version stays"
}

# Tunnels: $etc/NAME.tunnel has the words of its command line, one per line; a unit or program section runs it

check_name() {
    local LC_ALL=C
    [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$ ]] ||
        fail 2 "$(shown "$1") is no name; allowed: 1 to 64 ASCII letters, digits, '_', '.' or '-', the first a letter or digit"
}
one_name() { # one_name COMMAND WORD...: sets name
    [ $# = 2 ] || misuse "$1 is followed by one NAME${all_too-}"
    check_name "$2"
    name=$2
}
read_record() { readarray -t record <"$etc/$1.tunnel"; }
is_ours() {
    local first=''
    [ -f "$1" ] && { IFS= read -r first <"$1" || true; } && [[ $first == *" $MARK" ]]
}
file_of() { # file_of MANAGER NAME: where the program section or unit is
    if [ "$1" = systemd ]; then printf '%s' "$units/nodepass-$2.service"; else printf '%s' "$sections/nodepass-$2$suffix"; fi
}
manager_of() { # manager_of NAME: who runs it; false when it is no tunnel of ours
    local manager
    [ -f "$etc/$1.tunnel" ] || return 1
    for manager in systemd supervisord; do
        if is_ours "$(file_of "$manager" "$1")"; then
            echo "$manager"
            return
        fi
    done
    return 1
}
tunnels() { # the names of all
    local path name
    for path in "$etc"/*.tunnel; do
        name=${path##*/}
        name=${name%.tunnel}
        ! manager_of "$name" >/dev/null || printf '%s\n' "$name"
    done
}
need_tunnel() {
    local names
    manager_of "$1" >/dev/null && return
    names=$(tunnels | paste -sd ' ')
    fail 2 "$1: is no tunnel of this script; there is ${names:-none}"
}

choose_manager() { # sets manager, which answers
    manager=${given[manager]-}
    case $manager in
        supervisord | systemd) ;;
        '')
            if [ -d "$root/run/systemd/system" ] && { [ "$scope" = system ] || systemctl --user show-environment >/dev/null 2>&1; }; then
                manager=systemd
            elif [ -n "$conf" ]; then
                manager=supervisord
            else
                fail 2 "neither systemd nor a configuration of supervisord is here; name them with --manager and --supervisord-conf"
            fi
            ;;
        *) misuse "--manager: $(shown "$manager") is neither supervisord nor systemd" ;;
    esac
    need_manager "$manager"
}
need_manager() {
    if [ "$1" = systemd ]; then
        command -v systemctl >/dev/null || fail 1 "systemd: there is no systemctl"
        return
    fi
    [ -n "$conf" ] || fail 2 "supervisord: its configuration was not found; name it with --supervisord-conf FILE"
    [ -n "$sections" ] || fail 2 "$conf: [include] must say files = DIR/*.conf, for the programs of tunnels"
    need_supervisorctl
    supervisord_answers || fail 1 "supervisord does not answer; is it started, with $conf?"
}
need_supervisorctl() {
    command -v supervisorctl >/dev/null || fail 1 "supervisord: there is no supervisorctl on the PATH"
}
supervisord_answers() { [[ $(supervisord_ pid 2>&1) =~ ^[0-9]+$ ]]; }
supervisord_() { supervisorctl -c "$conf" "$@"; }
systemd_() { if [ "$scope" = user ]; then systemctl --user "$@"; else systemctl "$@"; fi; }

state_of() { # state_of NAME: running, starting, stopped, failed or unknown
    local said
    if [ "$(manager_of "$1")" = systemd ]; then
        said=$(systemd_ is-active "nodepass-$1.service" 2>/dev/null) || true
    else
        said=$(supervisord_ status "$1" 2>/dev/null) || true
        [[ $said =~ ^[^\ ]+\ +([A-Z]+) ]] && said=${BASH_REMATCH[1]} || said=''
    fi
    case $said in
        active | RUNNING) echo running ;;
        activating | reloading | STARTING) echo starting ;;
        inactive | deactivating | STOPPED | STOPPING | EXITED) echo stopped ;;
        failed | FATAL | BACKOFF) echo failed ;;
        *) echo unknown ;;
    esac
}
runs() { # runs NAME: once it has started
    local state left=120
    ! dry || return 0
    while state=$(state_of "$1") && [ "$state" = starting ] && [ "$left" -gt 0 ]; do
        sleep 0.5
        left=$((left - 1))
    done
    [ "$state" = running ]
}
cause_of() { # what the program said last
    if [ "$(manager_of "$1")" = systemd ]; then
        echo "see nodepass.sh log $1"
    else
        last_line "$logs/nodepass-$1.log"
    fi
}
tell() { # tell VERB NAME: start or stop
    if [ "$(manager_of "$2")" = systemd ]; then
        quietly systemd_ "$1" "nodepass-$2.service" || return 1
    else
        quietly supervisord_ "$1" "$2" || return 1
    fi
}
restart() { tell restart "$1" && runs "$1"; }
take_up() { # take_up MANAGER NAME [KEY]: a new or changed section or unit, or only another KEY
    if [ "$1" = systemd ]; then
        quietly systemd_ daemon-reload && quietly systemd_ enable "nodepass-$2.service" &&
            quietly systemd_ restart "nodepass-$2.service" || return 1
    else
        quietly supervisord_ update "$2" || return 1
        # to supervisord a program with the same section is the same
        [ -z "${3-}" ] || quietly supervisord_ restart "$2" || return 1
    fi
    runs "$2"
}

command_add() {
    local name key='' kept='' hint='' state path text manager
    [ $# -gt 0 ] || misuse "add is followed by NAME, and a URL or --config FILE"
    check_name "$1"
    name=$1
    shift
    choose_manager
    path=$(file_of "$manager" "$name")
    if ! installed && dry; then
        echo "would install nodepass first; then check the tunnel, write $path and start it"
        return
    fi
    need_installed
    lock
    read_words "$name" "$@"
    read_key "$name"
    text=$(generate) || exit 2
    refuse_foreign "$name" "$path"
    if [ -e "$path" ] && [ "$(<"$path")" = "$text" ] && [ -f "$etc/$name.tunnel" ] && same_key; then
        state=$(state_of "$name")
        [ "$state" != running ] || [[ " ${words[*]}" != *" --config="* ]] ||
            hint="; after a change of the file: nodepass.sh reload $name"
        echo "$name is there already, with these settings, and $state: nothing to do$hint"
        return
    fi
    [ ! -e "$path" ] || [ -n "${given[replace]-}" ] ||
        fail 2 "$name: is there already, with other settings; --replace puts these in their place"
    check_settings
    [ -z "$kept" ] || [ ! -e "$path" ] || echo "$name keeps its tunnel key"
    write_tunnel
}
read_words() { # read_words NAME WORD...: sets words, those of nodepass
    local name=$1 word is_file=''
    shift
    words=()
    for word; do
        [[ $word != *[[:cntrl:]]* ]] || fail 2 "$(shown "$word"): holds control characters"
        case $word in
            -c | --config) is_file=1 ;;
            --config=*) words+=("--config=$(absolute "${word#*=}")") ;;
            -c*) misuse "the config file is given by --config FILE" ;;
            --numprocs*) misuse "--numprocs: add each of several processes under a name of its own" ;;
            *) if [ -n "$is_file" ]; then words+=("--config=$(absolute "$word")"); else words+=("$word"); fi ;;
        esac
        [[ $word == -c || $word == --config ]] || is_file=''
    done
    if [ ${#words[@]} = 0 ]; then
        [ -f "$etc/$name.tunnel" ] || misuse "add $name is followed by a URL or --config FILE"
        read_record "$name"
        words=("${record[@]}")
    fi
}
read_key() { # sets key, a file with the tunnel key that NAME is to have, and adds its place to words
    local place=$etc/$1.tunnel-key source=${given[tunnel-key-file]-} ways=0 word others=()
    for word in tunnel-key-file new-tunnel-key no-tunnel-key; do
        [ -z "${given[$word]-}" ] || ways=$((ways + 1))
    done
    [ "$ways" -le 1 ] || misuse "--tunnel-key-file, --new-tunnel-key and --no-tunnel-key exclude each other"
    [ -z "${given[no-tunnel-key]-}" ] || [ -n "${given[replace]-}" ] || misuse "--no-tunnel-key belongs to --replace"
    for word in "${words[@]}"; do # it is among those of the record
        if [ "$word" = "--tunnel-key-file=$place" ]; then kept=1; else others+=("$word"); fi
    done
    words=("${others[@]}")
    [ -z "${given[replace]-}" ] || [[ ${words[*]} == *[?\&]tunnel[-_]key* ]] ||
        ! grep -qsxF -e "--tunnel-key-file=$place" -- "$etc/$1.tunnel" || kept=1
    [ "$ways" = 0 ] || kept=''
    if [ -n "$kept" ]; then
        source=$place
        [ -r "$place" ] || fail 2 "$1: its tunnel key $place cannot be read; give it one, or --replace --no-tunnel-key"
    elif [ -n "${given[new-tunnel-key]-}" ]; then
        source=$place
        [ -f "$place" ] || (umask 077 && "$program" genkey >"$work/key") || fail 1 "no key could be made"
    fi
    [ -n "$source" ] || return 0
    [ -e "$work/key" ] || (umask 077 && if [ "$source" = - ]; then cat; else cat -- "$source"; fi >"$work/key") ||
        fail 2 "--tunnel-key-file: $(shown "$source") cannot be read"
    key=$work/key
    words+=("--tunnel-key-file=$place")
}
same_key() { [ -z "$key" ] || cmp -s "$key" "$etc/$name.tunnel-key"; }
generate() { # the program section or unit; nothing is printed when nodepass refuses
    local kind=supervisor sign=';' more=("--log-dir=$logs")
    if [ "$manager" = systemd ]; then
        kind=systemd sign='#' more=()
        [ "$scope" = system ] || more=(--user)
    fi
    text=$("$program" generate "$kind" "$name" "${words[@]}" "${more[@]}") || return
    printf '%s %s\n%s\n' "$sign" "$MARK" "$text"
}
passes() { # passes WORD...: does nodepass check take them? If not, its errors are shown
    "${BARE[@]}" "$program" check "$@" >"$work/output" 2>&1 && return
    grep ^error "$work/output" >&2 || cat "$work/output" >&2
    return 1
}
may_share_ports() { # as several processes do by reuse-port; the check does not say whether they can
    local word said='reuse[-_]port *= *1'
    for word in "${words[@]}"; do
        if [[ $word == --config=* ]]; then
            ! grep -Eqrs -e "$said" -- "${word#*=}" || return 0
        elif [[ $word =~ $said ]]; then
            return 0
        fi
    done
    return 1
}
check_settings() { # with the key where it is now
    local each=("${words[@]}") taken
    [ -z "$key" ] || each[-1]=--tunnel-key-file=$key
    passes "${each[@]}" || fail 2 "$name: is not added, for what nodepass check says above"
    [ -e "$path" ] || may_share_ports || ! taken=$(grep -m 1 "$IN_USE" "$work/output") ||
        fail 2 "$name: is not added: $(sed "s/^warning *//; s/; $IN_USE.*//" <<<"$taken")"
    grep ^warning "$work/output" || true
}
refuse_foreign() { # refuse_foreign NAME PATH: what is there and not ours
    local other
    other=$(manager_of "$1") || other=$manager
    [ "$other" = "$manager" ] || fail 2 "$1: is run by $other; delete it there first"
    [ ! -e "$2" ] || is_ours "$2" || fail 2 "$2: is there already, and not by this script"
    [ "$manager" = systemd ] || [ -e "$2" ] || [[ $(supervisord_ status "$1" 2>&1) == *"no such process"* ]] ||
        fail 2 "$1: supervisord has another program of that name"
}
write_tunnel() {
    local former='' former_record='' former_key='' only_key='' place=$etc/$name.tunnel-key
    [ ! -e "$path" ] || former=$(<"$path")
    [ ! -e "$etc/$name.tunnel" ] || former_record=$(<"$etc/$name.tunnel")
    [ ! -e "$place" ] || former_key=$(<"$place")
    make_dir "$etc"
    if [ "$manager" = supervisord ]; then
        make_dir "$logs"
        make_dir "$sections"
        dry || printf '%s\n' "$conf" >"$etc/supervisord-conf"
    else
        make_dir "$units"
    fi
    if [ -n "$key" ] && ! same_key; then
        if dry; then
            echo "would write: $place (mode 600, the tunnel key)"
        else
            put "$place" 600 "$(<"$key")"
        fi
    fi
    put "$etc/$name.tunnel" 600 "$(printf '%s\n' "${words[@]}")"
    put "$path" 644 "$text"
    [ "$former" != "$text" ] || only_key=1
    if ! take_up "$manager" "$name" "$only_key"; then
        echo "nodepass.sh: $name does not run: $(cause_of "$name")" >&2
        if [ -n "$former" ]; then
            put "$path" 644 "$former"
            put "$etc/$name.tunnel" 600 "$former_record"
            if [ -n "$former_key" ]; then put "$place" 600 "$former_key"; else rm -f -- "$place"; fi
            take_up "$manager" "$name" "$only_key" || true
            fail 1 "$name: keeps its former settings"
        fi
        delete_tunnel "$name"
        fail 1 "$name: is not added"
    fi
    [ -z "${given[no-tunnel-key]-}" ] || change rm -f -- "$place"
    dry || echo "added: $name, run by $manager"
    [ -z "${given[new-tunnel-key]-}" ] || echo "its key is $etc/$name.tunnel-key; the other side needs the same"
}

command_list() {
    local name some=
    [ $# = 0 ] || misuse "list is followed by nothing, not by $(shown "$1")"
    while read -r name; do
        show_tunnel "$name"
        some=1
    done < <(tunnels)
    [ -n "$some" ] || echo "no tunnels"
}
show_tunnel() {
    read_record "$1"
    printf '%-16s %-8s %-11s %s\n' "$1" "$(state_of "$1")" "$(manager_of "$1")" "${record[*]}"
}
command_status() {
    local name state code=0
    [ $# -le 1 ] || misuse "status is followed by one NAME, or by none"
    need_installed
    if [ $# = 1 ]; then
        one_name status "$1"
        need_tunnel "$name"
        show_tunnel "$name"
        if [ "$(manager_of "$name")" = systemd ]; then
            systemd_ status --no-pager --lines=0 "nodepass-$name.service" || true
        else
            supervisord_ status "$name" || true
        fi
        [ "$(state_of "$name")" = running ] || code=1
    else
        echo "$("$program" --version), $base/bin/nodepass, from $(<"$current/complete")"
        while read -r name; do
            state=$(state_of "$name")
            echo "$name $state"
            [ "$state" = running ] || code=1
        done < <(tunnels)
    fi
    return "$code"
}
command_log() {
    local name
    one_name log "$@"
    need_tunnel "$name"
    if [ "$(manager_of "$name")" = supervisord ]; then
        tail -n 40 -- "$logs/nodepass-$name.log"
    elif [ "$scope" = user ]; then
        journalctl --user --no-pager -n 40 -u "nodepass-$name.service"
    else
        journalctl --no-pager -n 40 -u "nodepass-$name.service"
    fi
}
each_tunnel() { # each_tunnel VERB WORD...: the names for start, stop, restart and reload
    local verb=$1 name
    shift
    if [ -n "${given[all]-}" ]; then
        [ $# = 0 ] || misuse "$verb is followed by NAME or by --all"
        readarray -t names < <(tunnels)
    else
        all_too=', or by --all' one_name "$verb" "$@"
        names=("$name")
        need_tunnel "$name"
    fi
    for name in "${names[@]}"; do
        need_manager "$(manager_of "$name")"
    done
}
command_start() {
    local names name
    each_tunnel start "$@"
    for name in "${names[@]}"; do
        if [ "$(state_of "$name")" = running ]; then
            echo "$name runs already"
        elif ! { tell start "$name" && runs "$name"; }; then
            fail 1 "$name: does not run: $(cause_of "$name")"
        fi
    done
}
command_stop() {
    local names name
    each_tunnel stop "$@"
    for name in "${names[@]}"; do
        if [ "$(state_of "$name")" = stopped ]; then
            echo "$name is stopped already"
        else
            tell stop "$name" || fail 1 "$name: is not stopped"
        fi
    done
}
command_restart() {
    local names name
    each_tunnel restart "$@"
    for name in "${names[@]}"; do
        restart "$name" || fail 1 "$name: does not run: $(cause_of "$name")"
    done
}
command_reload() { # nothing is told to any tunnel unless all of them run and pass
    local names name record
    each_tunnel reload "$@"
    for name in "${names[@]}"; do
        [ "$(state_of "$name")" = running ] || fail 1 "$name: does not run; nodepass.sh start starts it"
        read_record "$name"
        if ! passes "${record[@]}"; then
            fail 1 "$name: is not reloaded, for what nodepass check says above"
        fi
        grep ^warning "$work/output" | grep -v "$IN_USE" || true # the tunnel itself has its ports
    done
    for name in "${names[@]}"; do
        if [ "$(manager_of "$name")" = systemd ]; then
            quietly systemd_ reload "nodepass-$name.service" || fail 1 "$name: is not reloaded"
            ! grep -q ^LoadCredential= "$(file_of systemd "$name")" ||
                echo "$name runs with copies of its keys, certificate and token: after a change, restart it"
        else
            quietly supervisord_ signal HUP "$name" || fail 1 "$name: is not reloaded"
        fi
        dry || echo "$name reads its settings again; nodepass.sh log $name has what came of it"
    done
}

delete_tunnel() { # what has to be known to add it again is kept
    local manager
    manager=$(manager_of "$1")
    if [ "$manager" = systemd ]; then
        quietly systemd_ disable --now "nodepass-$1.service" || true
        change rm -f -- "$(file_of systemd "$1")"
        quietly systemd_ daemon-reload || true
    else
        need_supervisorctl
        change rm -f -- "$(file_of supervisord "$1")"
        if ! supervisord_answers; then
            echo "supervisord does not answer, and so runs no $1"
        elif ! quietly supervisord_ update "$1"; then
            fail 1 "$1: supervisord did not let go of it"
        fi
    fi
}
purge_tunnel() {
    local path
    for path in "$etc/$1.tunnel" "$etc/$1.tunnel-key" "$logs/nodepass-$1.log" "$logs/nodepass-$1.log."[0-9]; do
        change rm -f -- "$path"
    done
}
command_delete() {
    local name
    one_name delete "$@"
    if manager_of "$name" >/dev/null; then
        lock
        delete_tunnel "$name"
        dry || echo "deleted: $name"
    else
        echo "$name: is no tunnel of this script: nothing to delete"
    fi
    [ -z "${given[purge]-}" ] || purge_tunnel "$name"
}
command_remove() {
    local name path dirs=() answer='' number kept=''
    [ $# = 0 ] || misuse "remove is followed by options only, not by $(shown "$1")"
    if [ ! -d "$prefix" ] && { [ -z "${given[purge]-}" ] || [ ! -d "$etc" ]; }; then
        echo "nodepass is not installed in $prefix: nothing to remove"
        return
    fi
    if [ -z "${given[yes]-}" ] && ! dry; then
        [ -t 0 ] || misuse "remove asks, and there is no terminal: say --yes"
        read -r -p "Remove nodepass from $prefix and all of its tunnels? [y/N] " answer || true
        [[ $answer == [yY]* ]] || fail 1 "nothing is removed"
    fi
    [ ! -d "$prefix" ] || lock
    while read -r name; do
        delete_tunnel "$name"
    done < <(tunnels)
    for path in "$etc"/*.tunnel; do
        kept=1
        [ -n "${given[purge]-}" ] || break
        name=${path##*/}
        purge_tunnel "${name%.tunnel}"
        kept=''
    done
    while read -r name; do
        ! is_our_link "$name" || change rm -f -- "$base/$name"
    done < <(links)
    change rm -rf -- "$prefix/versions" "$current"
    [ ! -f "$etc/directories" ] || readarray -t dirs <"$etc/directories"
    [ -n "$kept" ] || change rm -f -- "$etc/directories" "$etc/supervisord-conf"
    for ((number = ${#dirs[@]} - 1; number >= 0; number--)); do # those that hold nothing else
        dry || rmdir -- "${dirs[number]}" 2>/dev/null || true
    done
    dry || echo "removed"
    [ -z "$kept" ] || echo "kept: $etc, with settings and keys, and logs; remove --purge takes them"
}

# The menu calls this script again for each choice, so that a failure ends the choice alone

menu() {
    local answer name
    while :; do
        echo
        if installed; then "$program" --version; else echo "nodepass is not installed"; fi
        call list || true
        cat <<'TEXT'
  1 install or update    4 start      7 log
  2 add a tunnel         5 stop       8 delete a tunnel
  3 status               6 restart    9 remove everything
  0 exit                10 reload
TEXT
        ask "choice" || return 0
        case $answer in
            0 | q) return ;;
            1) if installed; then call update; else call install; fi || true ;;
            2) menu_add || true ;;
            3) call status || true ;;
            4) menu_call start ;;
            5) menu_call stop ;;
            6) menu_call restart ;;
            7) menu_call log ;;
            8) menu_delete ;;
            9) call remove || true ;;
            10) menu_call reload ;;
            *) echo "allowed: 0 to 10" ;;
        esac
    done
}
ask() { # ask PROMPT [DEFAULT]: sets answer; false at the end of input
    read -r -p "$1${2:+ [$2]}: " answer || return 1
    answer=${answer:-${2-}}
}
call() { "$BASH" "$self" "${common[@]}" "$@"; }
menu_call() { if ask "$1 which"; then call "$1" "$answer" || true; fi; }
menu_delete() {
    local name
    ask "delete which" || return 0
    name=$answer
    ask "delete $(shown "$name"), its settings, key and log? y or n" n || return 0
    [ "$answer" != y ] || call delete "$name" --purge || true
}
menu_add() {
    local name side tunnel target options=()
    ask "name" && name=$answer && (check_name "$name") || return
    ask "this side: server (users come here) or client (the service is here)" server && side=$answer || return
    ask "tunnel address, such as 0.0.0.0:10101 or server.example.com:10101" && tunnel=$answer || return
    if [ "$side" = server ]; then
        ask "public address, such as 0.0.0.0:8080" && target=$answer || return
        ask "TLS: 0 plain, 1 encrypted, 2 with a certificate" 1 && options+=("--tls=$answer") || return
        if [ "$answer" = 2 ]; then
            ask "certificate, PEM file" && options+=("--crt=$answer") || return
            ask "its private key, PEM file" && options+=("--key=$answer") || return
        fi
    else
        ask "address of the service, such as 127.0.0.1:80" && target=$answer || return
    fi
    ask "tunnel key: a file, new, or none" none || return
    case $answer in
        none) ;;
        new) options+=(--new-tunnel-key) ;;
        *) options+=("--tunnel-key-file=$answer") ;;
    esac
    while ask "one more option, such as --log=debug (empty: no more)" && [ -n "$answer" ]; do
        options+=("$answer")
    done
    call add "$name" "$side://$tunnel/$target" "${options[@]}"
}

# The command line

declare -A given=()
words=()
parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                usage
                exit
                ;;
            --dry-run | --user | --yes | --purge | --all) given[${1#--}]=1 ;;
            --replace | --new-tunnel-key | --no-tunnel-key) given[${1#--}]=1 ;;
            --from | --root | --manager | --supervisord-conf | --tunnel-key-file)
                [ $# -gt 1 ] || misuse "$1 is followed by a value"
                given[${1#--}]=$2
                shift
                ;;
            --from=* | --root=* | --manager=* | --supervisord-conf=* | --tunnel-key-file=*)
                local name=${1%%=*}
                given[${name#--}]=${1#*=}
                ;;
            *) words+=("$1") ;;
        esac
        shift
    done
}
check_options() { # check_options COMMAND TAKEN...: options that a command does not take are refused
    local command=$1 option
    shift
    for option in "${!given[@]}"; do
        case " dry-run root user manager supervisord-conf $* " in
            *" $option "*) ;;
            *) misuse "--$option does not belong to $command" ;;
        esac
    done
    for option in "${words[@]:1}"; do
        [ "$command" = add ] || [[ $option != -* ]] || misuse "$command: unknown option $(shown "$option")"
    done
}
main() {
    local option
    self=$(absolute "$0")
    parse "$@"
    common=()
    for option in root manager supervisord-conf; do
        [ -z "${given[$option]-}" ] || common+=("--$option=${given[$option]}")
    done
    for option in dry-run user; do
        [ -z "${given[$option]-}" ] || common+=("--$option")
    done
    shopt -s nullglob
    locate
    work=$(mktemp -d)
    trap 'rm -rf -- "$work"' EXIT
    if [ ${#words[@]} = 0 ]; then
        check_options "the menu"
        [[ -t 0 && -t 1 ]] || misuse "a command is needed where there is no terminal: $COMMANDS"
        menu
        return
    fi
    case ${words[0]} in
        install | update) check_options "${words[0]}" from ;;
        add) check_options add tunnel-key-file new-tunnel-key no-tunnel-key replace ;;
        list | status | log) check_options "${words[0]}" ;;
        start | stop | restart | reload) check_options "${words[0]}" all ;;
        delete) check_options delete purge ;;
        remove) check_options remove purge yes ;;
        *) misuse "unknown command $(shown "${words[0]}"); allowed: $COMMANDS" ;;
    esac
    "command_${words[0]}" "${words[@]:1}"
}
main "$@"
