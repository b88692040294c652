# shellcheck shell=dash
# The releases of this host and the way back. A deploy installs it as
# /usr/local/lib/callready/release before it switches anything, so that the host finds its way
# without a controller; apply.sh uses its functions.
#   release boot       before any service starts: the files of the confirmed release
#   release revert     become the confirmed release again
#   release previous   what rolling back would lead to
#   release watch-drain DEPLOY PID SECONDS, release open-edge    the rest of a drain (watch_drain)
# `none` stands for what the host was before callready.
#
# A release's manifest has a line for everything that it has. A tab is between two columns, none is
# empty, `-` stands for nothing:
#   format N                             of what callready writes on a host; there is none in format 1
#   file PATH MODE OWNER GROUP SHA256
#   link PATH TARGET
#   unit UNIT FINGERPRINT CREDENTIALS restart|reload PORTS    as fingerprint_of and credentials_of
#                                        print them; which of the two makes it take new ones; PORTS
#                                        are PROTO/PORT, with spaces between
#   timer UNIT
#   environment PATH OWNER SHA256 UNITS [COMMAND...]          UNITS with spaces between
#   certificate NAME
#   database PATH
#   promise ...                          for the controller
PENDING=$STATE/pending # the release that waits, PROCESS@BOOT that switches to it, who, since when
UNIT_FILES=$CALLREADY_ROOT/etc/systemd/system
LIVEKIT=$CALLREADY_ROOT/opt/livekit # a folder for each version
OWN=$CALLREADY_ROOT/opt/callready   # the same for callready's own programs
SYSCTLS_FILE=$CALLREADY_ROOT/etc/sysctl.d/60-callready.conf
SFU=livekit-server.service
DRAINED=$RUN/callready/livekit.drained # the process that was told to drain and had calls since

say() { printf '%s\n' "$*"; }

fail() {
    complain "$@"
    exit 1
}

# name_of current|confirmed: the release that the link leads to.
name_of() {
    local link
    link=$(readlink "$ROOT/$1") && printf '%s\n' "${link##*/}" || printf 'none\n'
}

# lines_of KIND[|KIND] RELEASE: what its manifest says about its files, links, units ...
lines_of() {
    [ "$2" = none ] || awk -F "$T" -v kinds="^($1)\$" '$1 ~ kinds' "$ROOT/releases/$2/manifest"
}

# names_of KIND[|KIND] RELEASE: their paths or names.
names_of() { lines_of "$1" "$2" | cut -f 2; }

# gone KIND[|KIND] FROM TO: the paths or names of one release that the other has not.
gone() { names_of "$1" "$2" | grep -vxF "$(names_of "$1" "$3")"; }

# remove_entry FOLDER PATH: remove what lies right in FOLDER. PATH comes from a file on this host:
# whatever that says, nothing else is removed.
remove_entry() {
    case ${2#"$1"/} in
        "$2" | "" | . | .. | */*) complain "'$2' stays: it is not in $1, where callready put it" ;;
        *) rm -rf "$2" ;;
    esac
}

# remove_program PATH: a version of livekit-server, or of callready's own programs.
remove_program() {
    case $1 in
        "$OWN"/*) remove_entry "$OWN" "$1" ;;
        *) remove_entry "$LIVEKIT" "$1" ;;
    esac
}

# remove_image NAME@DIGEST: of a container; one that another container uses stays.
remove_image() {
    ! podman image exists "$1" 2> /dev/null || podman rmi "$1" > /dev/null 2>&1 ||
        complain "$1 stays: another container uses it"
}

# switch_to RELEASE: by one rename, made ready when the switch was armed, because a full disk has no
# room for a link.
switch_to() {
    if [ "$1" = none ]; then
        rm -f "$ROOT/current"
    else
        [ "$(readlink "$ROOT/.back")" = "releases/$1" ] || ln -sfn "releases/$1" "$ROOT/.back"
        mv -T "$ROOT/.back" "$ROOT/current"
    fi
}

# make_own_folder FOLDER: it goes again with what was in it, if callready made it.
make_own_folder() {
    [ -d "$1" ] || { (umask 022 && mkdir -p "$1") && echo "$1" >> "$STATE/folders"; }
}

remove_own_folder() { ! grep -qsxF "$1" "$STATE/folders" || rmdir "$1" 2> /dev/null || :; }

# are_free PATH...: whether a file can be put at each of them; says what stands there.
are_free() {
    local found
    found=$(obstacles "$@")
    [ -z "$found" ] || printf '%s\n' "$found" | while IFS=$T read -r path _ why; do
        complain "$path $why"
    done
    [ -z "$found" ]
}

# keep_copy PATH: of the file or link that stands there, if nothing of callready ever did.
keep_copy() {
    { [ -f "$1" ] || [ -L "$1" ]; } && ! is_there "$ROOT/before$1" || return 0
    mkdir -p "$ROOT/before${1%/*}" && cp -a "$1" "$ROOT/.before" &&
        mv -T "$ROOT/.before" "$ROOT/before$1"
}

# drop_copies RELEASE: those that it has no use for go when nothing leads back to one that had.
drop_copies() {
    local used copy path
    used=$(names_of 'file|link|environment' "$1")
    find "$ROOT/before" ! -type d 2> /dev/null | while read -r copy; do
        path=${copy#"$ROOT/before"}
        [ "$path" = /sysctl ] || printf '%s\n' "$used" | grep -qxF "$path" || rm "$copy"
    done
}

# place_link PATH TARGET OURS: make PATH a link to TARGET; what stood there before callready is kept.
# OURS are the paths of the confirmed release.
place_link() {
    local path="$1" target="$2" ours="$3" now
    ! is_there "$path" || [ -L "$path" ] || are_free "$path" || return 2
    now=$(readlink "$path") || now=
    # A link may be one of ours, but not before there was a release; a file may be one that somebody
    # edited.
    if [ ! -L "$path" ] || { [ ! -e "$ROOT/confirmed" ] && [ "${now#"$ROOT"}" = "$now" ]; }; then
        printf '%s\n' "$ours" | grep -qxF "$path" || keep_copy "$path" || return
    fi
    [ "$now" = "$target" ] && return
    make_own_folder "${path%/*}" || return
    ln -sfn "$target" "$path.callready-new" && mv -T "$path.callready-new" "$path"
}

# place_links RELEASE [leave]: every live path leads where the release says. With `leave`, what cannot
# be replaced may stay, because callready never did.
place_links() {
    local ours
    ours=$(names_of 'file|link' "$(name_of confirmed)")
    lines_of 'file|link' "$1" | {
        failed=0
        while IFS=$T read -r kind path target _; do
            [ "$kind" = link ] || target=$ROOT/current/files$path
            place_link "$path" "$target" "$ours" || [ "${2:-} $?" = 'leave 2' ] || failed=1
        done
        exit $failed
    }
}

# withdraw PATH...: what stood there before callready comes back, what somebody put there since stays.
withdraw() {
    local path failed=0
    for path; do
        if [ -L "$path" ] && is_there "$ROOT/before$path"; then
            cp -a "$ROOT/before$path" "$path.callready-new" &&
                mv -T "$path.callready-new" "$path" || failed=1
        elif [ -L "$path" ]; then
            rm "$path" || failed=1
        fi
        remove_own_folder "${path%/*}"
    done
    return $failed
}

# keep_environments RELEASE: a copy of the environment files that the confirmed release has not, before
# anything changes them; on the way back their keys come from it.
keep_environments() {
    local path
    for path in $(gone environment "$1" "$(name_of confirmed)"); do
        [ -L "$path" ] || keep_copy "$path" || return
    done
}

# merge_lines LINES OLD: an environment file from standard input, with the lines KEY=VALUE of the file
# LINES in place of what it had for the same keys, behind whatever may set them too (mark_lines), and no
# other key of the file OLD.
merge_lines() {
    mark_lines "$(sed 's/=.*//' "$1" "$2" 2> /dev/null | sort -u | paste -sd ,)" |
        awk -v lines="$1" -v old="$2" '
            function name(line) { return substr(line, 1, index(line, "=") - 1) }
            function put(key, after) {
                # A backslash would make it one line with ours.
                if (after ~ /\\\r?$/) print ""
                print wanted[key]
                is_done[key] = 1
            }
            BEGIN {
                while ((getline line < old) > 0) dropped[name(line)]
                while ((getline line < lines) > 0) { wanted[name(line)] = line; order[++count] = name(line) }
            }
            { tab = index($0, "\t"); mark[NR] = substr($0, 1, tab - 1); text[NR] = substr($0, tab + 1) }
            mark[NR] ~ /^!/ { NR--; next }
            { for (n = split(mark[NR], keys, " "); n; n--) { sub(/^[?]/, "", keys[n]); last[keys[n]] = NR } }
            END {
                for (n = 1; n <= NR; n++) {
                    if (mark[n] in wanted) {
                        if (!is_done[mark[n]] && !(mark[last[mark[n]]] ~ /[?]/)) put(mark[n], text[n - 1])
                    } else if (!(mark[n] in dropped)) {
                        print text[n]
                        for (k = split(mark[n], keys, " "); k; k--) {
                            sub(/^[?]/, "", keys[k])
                            if ((keys[k] in wanted) && last[keys[k]] == n) put(keys[k], text[n])
                        }
                    }
                }
                for (n = 1; n <= count; n++) if (!is_done[order[n]]) put(order[n], text[NR])
            }'
}

# put_environment PATH OWNER LINES OLD: have the keys of LINES and no other key of OLD in an
# application's environment file. Its folder may be another user's, who could put a link there: it is
# not followed, and nothing is made there that is written to.
put_environment() {
    local path="$1" owner="$2" new="$1.callready-new" status=0
    local made="$RUN/callready.environment" # no disk: a full one must not keep a host from returning
    # Of a deploy that was cut.
    rm -f "$new" 2> /dev/null || :
    dd if="$path" iflag=nofollow,nonblock status=none 2> /dev/null | merge_lines "$3" "$4" > "$made" &&
        { has_exactly "$path" "$owner" "$made" || replace_environment "$path" "$owner" "$made" "$new"; } ||
        status=1
    rm -f "$made" "$new" 2> /dev/null || :
    return $status
}

# has_exactly PATH OWNER FILE: whether an environment file is like FILE and its owner's alone.
has_exactly() { [ ! -L "$1" ] && cmp -s "$3" "$1" && [ "$(stat -c '%a %U' "$1")" = "600 $2" ]; }

replace_environment() { # PATH OWNER FILE NEW
    are_free "$1" "$4" || return
    [ -d "${1%/*}" ] || { complain "$1 cannot be there: its folder is missing" && return 1; }
    # Who reads it may have started with what stood there: note that before it is gone.
    cmp -s "$3" "$1" || rm -f "$(applied_note "$1")"
    install -T -m 0600 -o "$2" -g "$(id -gn "$2")" "$3" "$4" && sync "$4" && mv -T "$4" "$1"
}

# take_keys_out PATH RELEASE: the keys that RELEASE has in an environment file are as before callready.
take_keys_out() {
    local path="$1" lines="$RUN/callready.lines" ours="$ROOT/releases/$2/environment$1" owner key status=0
    [ -f "$path" ] && [ ! -L "$path" ] || return 0
    owner=$(stat -c %U "$path")
    sed -n 's/^\([A-Za-z_0-9]*\)=.*/\1/p' "$ours" |
        while read -r key; do grep "^$key=" "$ROOT/before$path"; done > "$lines" 2> /dev/null
    put_environment "$path" "$owner" "$lines" "$ours" || status=1
    rm -f "$lines"
    [ $status = 0 ] || return
    rm -f "$(applied_note "$path")"
    if [ -e "$ROOT/before$path" ]; then
        chown -h --reference="$ROOT/before$path" "$path"
        chmod --reference="$ROOT/before$path" "$path"
    elif [ ! -s "$path" ]; then
        rm -f "$path"
    fi
}

# put_environments TO FROM [leave]: the environment files of one release instead of the other's. With
# `leave`, one that cannot be written may stay if FROM never wrote it.
put_environments() {
    local path failed=0
    lines_of environment "$1" | {
        while IFS=$T read -r _ path owner _; do
            put_environment "$path" "$owner" "$ROOT/releases/$1/environment$path" \
                "$ROOT/releases/$2/environment$path" || may_stay "$path" "$2" "${3:-}" || failed=1
        done
        exit $failed
    } || failed=1
    for path in $(gone environment "$2" "$1"); do
        take_keys_out "$path" "$2" || may_stay "$path" "$2" "${3:-}" || failed=1
    done
    return $failed
}

# holds PATH LINES: whether a file has all lines of another one.
holds() { [ -f "$1" ] && [ -f "$2" ] && ! grep -qvxFf "$1" "$2"; }

# may_stay PATH RELEASE leave|'': whether RELEASE has never written an environment file.
may_stay() {
    [ "$3" = leave ] && ! holds "$1" "$ROOT/releases/$2/environment$1" &&
        complain "$1 stays as it is: release $2 has not written it"
}

# list_places TO FROM: where the one release has to put a file or link, and the other's to be taken away.
list_places() {
    local kind path target
    lines_of 'file|link|environment' "$1" | while IFS=$T read -r kind path target _; do
        case $kind in
            file) [ "$(readlink "$path")" = "$ROOT/current/files$path" ] ;;
            link) [ "$(readlink "$path")" = "$target" ] ;;
            environment) holds "$path" "$ROOT/releases/$1/environment$path" ;;
        esac || say "$path"
    done
    for path in $(gone 'file|link' "$2" "$1"); do
        [ ! -L "$path" ] || say "$path"
    done
    for path in $(gone environment "$2" "$1"); do
        ! holds "$path" "$ROOT/releases/$2/environment$path" || say "$path"
    done
}

# apply_environment PATH HASH UNITS COMMANDS: restart what reads an environment file, then remember
# that.
apply_environment() {
    local path="$1" hash="$2" units="$3" commands="$4" unit command
    for unit in $units; do
        say "restarting $unit, which reads $path"
        systemctl restart "$unit" || fail "$unit does not restart: $(last_words "$unit")"
    done
    if [ -n "$commands" ]; then
        printf '%s\n' "$commands" | while IFS= read -r command; do
            say "running $command"
            # Whatever it leaves running must not keep the lock.
            sh -c "$command" < /dev/null 9>&- || fail "the command exits with $?: $command"
        done || exit 1
    fi
    mkdir -p "$STATE/environment"
    printf '%s\n' "$hash" > "$(applied_note "$path")"
}

# load_filter FOLDER: the packet filter straight from a release's files, whatever else works.
load_filter() {
    local rules="$1/files$ROOT/nftables.conf"
    if [ -e "$rules" ]; then
        nft -f "$rules"
    elif nft list table inet callready > /dev/null 2>&1; then
        nft delete table inet callready
        rm -f "$RUN/callready-firewall"
    fi
}

main_pid() { systemctl show --property MainPID --value "$1"; } # UNIT

# runs_with UNIT FINGERPRINT CREDENTIALS: whether its process has what a release says.
runs_with() {
    local pid
    systemctl is-active --quiet "$1" || return
    pid=$(main_pid "$1")
    [ "$(fingerprint_of "$1" "$pid")" = "$2" ] && [ "$(credentials_of "$1")" = "$3" ]
}

restart() {
    local unit
    for unit; do
        say "restarting $unit"
        [ "$unit" != callready-egress.service ] || rm -f "$EGRESS_DRAINING"
        [ "$unit" != "$SFU" ] || cut_drained
        systemctl reset-failed "$unit" 2> /dev/null || :
        systemctl restart "$unit" || fail "$unit does not start: $(last_words "$unit")"
    done
}

# cut_drained: LiveKit is about to be stopped. One that was told to drain takes a second SIGTERM for the
# end of its calls; after a SIGKILL clients come back by themselves. If Redis heard of it again before, it
# would take rooms off the list that are on other nodes by now.
cut_drained() {
    local told
    read -r told 2> /dev/null < "$DRAINED" || return 0
    rm -f "$DRAINED"
    [ "$told" != "$(main_pid "$SFU")" ] || systemctl kill -s KILL "$SFU" 2> /dev/null || :
    show_node
}

# show_node: what hide_node did is over.
show_node() { nft delete table inet callready-hidden 2> /dev/null || :; }

# open_edge PERCENT: with 0 this host's edge gives no new caller to its own LiveKit as long as another
# SFU is well, and says so to the edges of those; with 100 all is as before. HAProxy has the state, so
# a reload forgets it. perl-base is on every Debian.
open_edge() {
    local server
    server=$(sed -n 's/.* srv_uweight(\([^)]*\)) .*/\1/p' "$CALLREADY_ROOT/etc/haproxy/haproxy.cfg" 2> /dev/null) || :
    [ -z "$server" ] || perl -MIO::Socket::UNIX -e '
        my $edge = IO::Socket::UNIX->new(shift) or exit;
        print $edge "@ARGV\n";
        print STDERR grep /\S/, <$edge>;' "$RUN/haproxy/admin.sock" "set server $server weight $1%" || :
}

# watch_drain DEPLOY PID SECONDS: the part of a drain that outlives its deploy (drain_node in apply.sh);
# it ends when LiveKit has been restarted. As long as the process DEPLOY is there, the edge is closed. If
# that ends before, callers may come again at once, and LiveKit, which takes no new rooms, goes on until
# its calls have ended, SECONDS at most: then systemd starts it anew.
watch_drain() {
    local left="$3" pause=2
    while [ -d "/proc/$1" ]; do
        open_edge 0
        sleep $pause
        left=$((left - pause))
    done
    open_edge 100
    ! nft list table inet callready-hidden > /dev/null 2>&1 || left=0 # its callers have moved
    while [ -d "/proc/$2" ] && [ "$(cat "$DRAINED" 2> /dev/null)" = "$2" ]; do
        if [ "$left" -le 0 ]; then
            cut_drained
            return
        fi
        sleep $pause
        left=$((left - pause))
    done
}

reload() {
    local unit
    for unit; do
        say "reloading $unit"
        systemctl reload "$unit" || fail "$unit does not reload: $(last_words "$unit")"
    done
}

last_words() {
    journalctl -u "$1" -n 8 --no-pager -o cat 2> /dev/null | sed 's/^/    /'
}

# wait_for_ports UNIT PROTO/PORT...: a unit is up when every port it should serve is open, not before.
wait_for_ports() {
    local missing
    if is_held "$1"; then
        say "$1 starts when there is room for recordings again"
        return
    fi
    eventually 30 0.5 is_up "$@" ||
        fail "$1 does not listen on$missing after 15 s: $(last_words "$1")"
    [ "$1" != "$SFU" ] || systemctl stop callready-drain.service 2> /dev/null || :
}

# is_held UNIT: whether it is not to run now.
is_held() { [ "$1" = callready-egress.service ] && [ -e "$EGRESS_FULL" ]; }

# is_up UNIT PROTO/PORT...: says in `missing` which ports are not open.
is_up() {
    local unit="$1"
    shift
    missing=$(ss -Hlntu | awk -v wanted="$*" '
        { p = $5; sub(/.*:/, "", p); open[$1 "/" p] }
        END { n = split(wanted, port, " "); for (i = 1; i <= n; i++) if (!(port[i] in open)) printf " %s", port[i] }')
    systemctl is-active --quiet "$unit" && [ -z "$missing" ]
}

stop() {
    local unit
    for unit; do
        say "stopping $unit"
        case $unit in *.timer) systemctl disable --quiet "$unit" 2> /dev/null || : ;; esac
        [ "$unit" != "$SFU" ] || cut_drained
        systemctl stop "$unit" 2> /dev/null || :
    done
}

# put_files TO FROM [leave]: the packet filter and every file as TO says, nothing that only FROM says;
# `leave` as place_links takes it. An operator who was locked out gets in first, and what fails does not
# keep the rest from being done.
put_files() {
    local failed=0
    load_filter "$ROOT/releases/$1" || failed=1
    [ "$1" = none ] || switch_to "$1" || failed=1
    place_links "$1" "${3:-}" || failed=1
    # shellcheck disable=SC2046 # a path is one word
    withdraw $(gone 'file|link' "$2" "$1") || failed=1
    [ "$1" != none ] || switch_to none || failed=1
    systemctl daemon-reload || failed=1
    set_kernel
    return $failed
}

# What the kernel settings are with the files that are there now.
set_kernel() {
    local file="$SYSCTLS_FILE"
    [ -e "$file" ] || file=$ROOT/before/sysctl
    [ ! -e "$file" ] || sysctl -q -e -p "$file" > /dev/null 2>&1 || :
}

# put_services TO FROM: every unit of TO runs with what TO says, those that only FROM has are stopped.
put_services() {
    local unit fingerprint credentials how ports timer
    # The last that was started goes first: what it ends with may need the others.
    # shellcheck disable=SC2046 # a unit is one word
    stop $(gone 'unit|timer' "$2" "$1" | tac)
    for unit in $(gone unit "$2" "$1"); do
        # One of the same name that was there before callready, or whose package was.
        if [ -e "$UNIT_FILES/$unit" ] || { systemctl is-enabled --quiet "$unit" 2> /dev/null &&
            ! grep -qsxF "${unit%.*}" "$STATE/packages"; }; then
            (restart "$unit")
        fi
    done
    if [ -e "$ROOT/nftables.conf" ]; then
        systemctl restart callready-firewall.service ||
            complain "the firewall does not load: $(last_words callready-firewall.service)"
    else
        systemctl stop callready-firewall.service 2> /dev/null || :
    fi
    lines_of unit "$1" | while IFS=$T read -r _ unit fingerprint credentials how ports; do
        runs_with "$unit" "$fingerprint" "$credentials" && continue
        (
            [ "$how" = reload ] && systemctl is-active --quiet "$unit" || how=restart
            "$how" "$unit"
            # shellcheck disable=SC2086 # a port is one word
            [ "$ports" = - ] || wait_for_ports "$unit" $ports
        )
    done
    for timer in $(names_of timer "$1"); do
        systemctl enable --quiet --now "$timer" || complain "$timer does not start"
    done
}

# apply_environments RELEASE: what reads its environment files has them.
apply_environments() {
    local path hash units commands
    lines_of environment "$1" | while IFS=$T read -r _ path _ hash units commands; do
        [ "$(cat "$(applied_note "$path")" 2> /dev/null)" = "$hash" ] && continue
        [ "$units" != - ] || units=
        (apply_environment "$path" "$hash" "$units" "$(printf %s "$commands" | tr "$T" '\n')")
    done
}

# lock [OPTION...]: of flock(1).
lock() {
    exec 9>> "$RUN/callready.lock"
    flock "$@" 9
}

# boot_id: another one after every boot (random(4)).
boot_id() { cat /proc/sys/kernel/random/boot_id; }

log() { # RELEASE WHAT RUN
    printf '%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$1" "${SUDO_USER:-root}" "$2" "$3" >> "$STATE/history"
}

# stop_deploy PROCESS@BOOT: the script that switches must not go on beside this, however stuck it is;
# it is given the time to say so. After a boot its number may be another's.
stop_deploy() {
    if [ "${1#*@}" = "$(boot_id)" ]; then
        kill -TERM "-${1%@*}" 2> /dev/null
        lock -w 2 && return
        kill -KILL "-${1%@*}" 2> /dev/null
    fi
    lock -w 5
}

# revert [boot]: the confirmed release again. At boot only its files: services start with them, and
# the rest is done when they have. What fails is done by the next try (callready-revert.service), beside
# services that have been returned to.
revert() {
    local failed process good returned="$RUN/callready.returned"
    read -r failed process _ < "$PENDING" || return 0
    lock -n || stop_deploy "$process"
    [ -e "$PENDING" ] || return 0 # confirmed in the meantime
    good=$(name_of confirmed)
    put_files "$good" "$failed" leave || fail "release $good is not wholly back; trying again"
    if [ "${1:-}" = boot ]; then
        put_environments "$good" "$failed" leave
        systemctl start --no-block callready-revert.service
        return
    fi
    [ "$(cat "$returned" 2> /dev/null)" = "$failed" ] || put_services "$good" "$failed"
    printf '%s\n' "$failed" > "$returned"
    put_environments "$good" "$failed" leave ||
        fail "release $good is back, but not in every environment file; trying again"
    apply_environments "$good"
    drop_copies "$good"
    log "$good" "reverted from $failed" -
    rm -f "$PENDING" "$returned"
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    say "returned to release $good"
}

# confirm ID WHAT RUN: what comes up after a power cut from now on.
confirm() {
    local waiting
    lock -w 10 || fail "release $1 cannot be confirmed: this host is busy"
    read -r waiting _ 2> /dev/null < "$PENDING" || waiting=nothing
    case $waiting in
        "$1" | "$1"-*) [ "$waiting" = "$(name_of current)" ] ;;
        *) false ;;
    esac || fail "release $1 was not confirmed in time: this host has returned to $(name_of current)"
    [ ! -e "$RUN/callready-firewall" ] || nft list table inet callready > /dev/null 2>&1 ||
        fail "release $1 is not confirmed: another program has flushed nftables, and the firewall with it; this host returns to $(name_of confirmed) by itself"
    if [ "$waiting" = none ]; then
        rm -f "$ROOT/confirmed"
    else
        ln -sfn "releases/$waiting" "$ROOT/.confirmed" &&
            mv -T "$ROOT/.confirmed" "$ROOT/confirmed" || exit 1
    fi
    sync "$ROOT"
    log "$waiting" "$2" "$3"
    rm -f "$PENDING"
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    tidy
    say "confirmed release $waiting"
}

# list_confirmed: confirmed releases and the runs that brought them, the newest first, as rolling back
# walks them.
list_confirmed() {
    awk -F "$T" '$4 == "rollback" { n-- } $4 == "remove" { n = 0 }
        $4 == "deploy" && s[n] != $2 { s[++n] = $2; run[n] = $5 }
        END { for (; n > 0; n--) print s[n], run[n] }' "$STATE/history"
}

# print_previous: the release to roll back to, the run that brought the one after it, and the former's
# manifest.
print_previous() {
    local good
    good=$(list_confirmed | sed -n '2s/ .*//p')
    say "${good:-none}"
    list_confirmed | sed -n '1s/.* //p'
    [ -z "$good" ] || cat "$ROOT/releases/$good/manifest"
}

# Five releases are kept, and what they need: versions of livekit-server, images, databases,
# certificates.
tidy() {
    local kept folder version image database pair file
    drop_copies "$(name_of current)"
    kept=" $(name_of current) $(list_confirmed | awk '!seen[$1]++ { print $1 }' | head -n 5 | tr '\n' ' ')"
    for folder in "$ROOT"/releases/*; do
        case $kept in *" ${folder##*/} "*) ;; *) rm -rf "$folder" ;; esac
    done
    sort -u "$STATE/binaries" 2> /dev/null | while read -r version; do
        grep -qs "^ExecStart=$version/" "$ROOT"/releases/*/files"$UNIT_FILES"/*.service ||
            remove_program "$version"
    done
    sort -u "$STATE/images" 2> /dev/null | while read -r image; do
        grep -qsF "$image" "$ROOT"/releases/*/files"$UNIT_FILES"/*.service || remove_image "$image"
    done
    # Secrets, too, go with the last release that has them.
    sort -u "$STATE/databases" 2> /dev/null | while read -r database; do
        grep -qsxF "database$T$database" "$ROOT"/releases/*/manifest ||
            for file in "$database" "$database-wal" "$database-shm"; do
                remove_entry "$CALLREADY_ROOT/var/lib/turn" "$file"
            done
    done
    for pair in "$ROOT"/tls/*; do
        grep -qsxF "certificate$T${pair##*/}" "$ROOT"/releases/*/manifest && continue
        unask "${pair##*/}"
        rm -rf "$pair"
    done
}

# unask NAME: no authority is asked for its certificate any more; what it has stays for rolling back.
# A certificate that somebody else has asked for stays.
unask() {
    local lineage
    if [ -e "$STATE/lineages/$1" ] || [ -e "$ROOT/tls/$1/asked" ]; then
        lineage=$(lineage_of "$1")
        if [ -e "$CALLREADY_ROOT/etc/letsencrypt/renewal/$lineage.conf" ] && command -v certbot > /dev/null; then
            certbot -q delete -n --cert-name "$lineage" || {
                complain "certbot goes on renewing $lineage, which nobody serves any more"
                return 0
            }
        fi
    fi
    rm -f "$ROOT/tls/$1/asked" "$STATE/lineages/$1"
}

case "${0##*/} ${1:-}" in
    "release boot" | "release revert") [ ! -e "$PENDING" ] || revert "$1" ;;
    "release previous") print_previous ;;
    "release watch-drain") watch_drain "$2" "$3" "$4" ;;
    "release open-edge")
        open_edge 100
        show_node
        ;;
esac
