#!/bin/sh
# The releases of this host and the way back. A deploy installs it as
# /usr/local/lib/callready/release before it switches anything, so that the host finds its way
# without a controller; apply.sh uses its functions.
#   release boot       before any service starts: the files of the confirmed release
#   release revert     become the confirmed release again
#   release previous   what rolling back would lead to
# `none` stands for what the host was before callready.
set -u
umask 077
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=/etc/callready
state=/var/lib/callready
pending=$state/pending # the release that waits, the process that switches to it, who, since when
T=$(printf '\t')

say() { printf '%s\n' "$*"; }
complain() { printf 'callready: %s\n' "$*" >&2; }
fail() { complain "$@"; exit 1; }

# name_of current|confirmed: the release that the link leads to.
name_of() {
    link=$(readlink "$root/$1") && printf '%s\n' "${link##*/}" || printf 'none\n'
}

# lines_of KIND RELEASE: what its manifest says about the files, links, units ... it has.
lines_of() {
    [ "$2" = none ] || awk -F "$T" -v kind="$1" '$1 == kind' "$root/releases/$2/manifest"
}

# gone KIND FROM TO: the paths or names of one release that the other has not.
gone() {
    { lines_of "$1" "$3"; printf '\n'; lines_of "$1" "$2"; } |
        awk -F "$T" '!NF { from = 1; next } !from { kept[$2]; next } !($2 in kept) { print $2 }'
}

switch() {
    if [ "$1" = none ]; then
        rm -f $root/current
    else
        # Made when the switch was armed, because a full disk has no room for a link.
        [ "$(readlink $root/.back)" = "releases/$1" ] || ln -sfn "releases/$1" $root/.back
        mv -T $root/.back $root/current
    fi
}

# Folders of ours go again with what was in them.
own_folder() {
    [ -d "$1" ] || { (umask 022 && mkdir -p "$1") && echo "$1" >> $state/folders; }
}

remove_own_folder() { ! grep -qsxF "$1" $state/folders || rmdir "$1" 2> /dev/null || :; }

# live PATH TARGET: make PATH a link to TARGET; what stood there before callready is kept.
live() {
    link=$(readlink "$1") || link=
    # A link may be one of ours, but not before there was a release; a file may be one that somebody
    # edited.
    if [ ! -L "$1" ] || { [ ! -e $root/confirmed ] && [ "${link#"$root"}" = "$link" ]; }; then
        printf '%s\n' "$confirmed" | grep -qxF "$1" || before "$1" || return
    fi
    [ "$link" = "$2" ] && return
    own_folder "${1%/*}" || return
    ln -sfn "$2" "$1.callready-new" && mv -T "$1.callready-new" "$1"
}

there() { [ -e "$1" ] || [ -L "$1" ]; } # also a link to nowhere

# before PATH: keep a copy of what stands there, if nothing of callready ever did.
before() {
    there "$1" && ! there "$root/before$1" || return 0
    mkdir -p "$root/before${1%/*}" && cp -a "$1" "$root/.before" && mv -T "$root/.before" "$root/before$1"
}

# drop_copies RELEASE: those that it has no use for go when nothing leads back to one that had.
drop_copies() {
    used=$(for kind in file link environment; do lines_of $kind "$1"; done | cut -f 2)
    find $root/before ! -type d 2> /dev/null | while read -r copy; do
        path=${copy#"$root/before"}
        [ "$path" = /sysctl ] || printf '%s\n' "$used" | grep -qxF "$path" || rm "$copy"
    done
}

# withdraw PATH...: what stood there before callready comes back, what somebody put there since stays.
withdraw() {
    for path; do
        if [ -L "$path" ] && there "$root/before$path"; then
            cp -a "$root/before$path" "$path.callready-new" && mv -T "$path.callready-new" "$path" ||
                return
        elif [ -L "$path" ]; then
            rm "$path" || return
        fi
        remove_own_folder "${path%/*}"
    done
}

# links RELEASE: every live path leads where the release says.
links() {
    confirmed=$(for kind in file link; do lines_of $kind "$(name_of confirmed)"; done | cut -f 2)
    { lines_of file "$1"; lines_of link "$1"; } | while IFS=$T read -r kind path target rest; do
        [ "$kind" = link ] || target=$root/current/files$path
        live "$path" "$target" || exit 1
    done
}

# keep_environments RELEASE: a copy of the environment files that the confirmed release has not, before
# anything changes them; on the way back their keys come from it.
keep_environments() {
    for path in $(gone environment "$1" "$(name_of confirmed)"); do
        [ -L "$path" ] || before "$path" || return
    done
}

# put_environment PATH OWNER LINES OLD: the keys of LINES and no other key of OLD in an application's
# environment file; the rest of it is kept.
put_environment() {
    (umask 022 && mkdir -p "${1%/*}")
    # Not in its folder: that may be another user's, who could put a link there. Not on a disk: a
    # full one must not keep a host from returning.
    made=/run/callready.environment
    # Nor is a link followed that its owner made of the file: it could lead to anything.
    dd if="$1" iflag=nofollow,nonblock status=none 2> /dev/null | awk -F= -v lines="$3" -v old="$4" '
        BEGIN {
            while ((getline < old) > 0) ours[$1]
            while ((getline < lines) > 0) { line[$1] = $0; order[++n] = $1; ours[$1] }
        }
        $1 in line { if (!done[$1]++) print line[$1]; next }
        !($1 in ours) { print }
        END { for (i = 1; i <= n; i++) if (!done[order[i]]) print line[order[i]] }' > "$made" || return
    # Who reads it may have started with what stood there: note that before it is gone.
    cmp -s "$made" "$1" || rm -f "$(note_of "$1")"
    install -T -m 0600 -o "$2" -g "$(id -gn "$2")" "$made" "$1.callready-new" &&
        sync "$1.callready-new" && mv -T "$1.callready-new" "$1" && rm "$made"
}

note_of() { printf '%s/environment/%s' $state "$(printf %s "$1" | tr / _)"; }

# environments TO FROM: the environment files of one release instead of the other's.
environments() {
    lines_of environment "$1" | while IFS=$T read -r kind path owner rest; do
        put_environment "$path" "$owner" "$root/releases/$1/environment$path" \
            "$root/releases/$2/environment$path" || exit 1
    done &&
        for path in $(gone environment "$2" "$1"); do
            owner=$(stat -c %U "$path") || continue
            sed -n 's/^\([A-Za-z_0-9]*\)=.*/\1/p' "$root/releases/$2/environment$path" |
                while read -r key; do grep "^$key=" "$root/before$path"; done \
                    > /run/callready.lines 2> /dev/null # no disk, as in put_environment
            put_environment "$path" "$owner" /run/callready.lines "$root/releases/$2/environment$path" || return 1
            rm -f /run/callready.lines "$(note_of "$path")"
            if [ -e "$root/before$path" ]; then
                chown -h --reference="$root/before$path" "$path"
                chmod --reference="$root/before$path" "$path"
            elif [ ! -s "$path" ]; then
                rm -f "$path"
            fi
        done
}

# apply_environment PATH HASH UNITS COMMANDS: restart what reads an environment file, then remember that.
apply_environment() {
    for unit in $3; do
        say "restarting $unit, which reads $1"
        systemctl restart "$unit" || fail "$unit does not restart: $(last_words "$unit")"
    done
    if [ -n "$4" ]; then
        printf '%s\n' "$4" | while IFS= read -r command; do
            say "running $command"
            # Whatever it leaves running must not keep the lock.
            sh -c "$command" < /dev/null 9>&- || fail "the command exits with $?: $command"
        done || exit 1
    fi
    mkdir -p $state/environment
    printf '%s\n' "$2" > "$(note_of "$1")"
}

# filter FOLDER|none: load the packet filter straight from a release's files, whatever else works.
filter() {
    rules=$1/files$root/nftables.conf
    if [ -e "$rules" ]; then
        nft -f "$rules"
    elif nft list table inet callready > /dev/null 2>&1; then
        nft delete table inet callready
        rm -f /run/callready-firewall
    fi
}

# runs UNIT FINGERPRINT CREDENTIALS: whether its process was started with what a release says.
runs() {
    systemctl is-active --quiet "$1" || return
    pid=$(systemctl show --property MainPID --value "$1")
    has=$(tr '\0' '\n' < "/proc/$pid/environ" | sed -n 's/^CALLREADY_FINGERPRINT=//p')
    [ ! -e "/run/callready/$1" ] || read -r has < "/run/callready/$1"
    given=$(sha256sum "/run/credentials/$1"/* 2> /dev/null | cut -c 1-64 | sort | tr '\n' ,)
    [ "$has" = "$2" ] && [ "${given:--}" = "$3" ]
} 2> /dev/null

restart() {
    for unit; do
        say "restarting $unit"
        systemctl reset-failed "$unit" 2> /dev/null || :
        systemctl restart "$unit" || fail "$unit does not start: $(last_words "$unit")"
    done
}

reload() {
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
    unit=$1
    shift
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
        missing=$(ss -Hlntu | awk -v wanted="$*" '
            { p = $5; sub(/.*:/, "", p); open[$1 "/" p] }
            END { n = split(wanted, port, " "); for (i = 1; i <= n; i++) if (!(port[i] in open)) printf " %s", port[i] }')
        systemctl is-active --quiet "$unit" && [ -z "$missing" ] && return
        sleep 0.5
    done
    fail "$unit does not listen on$missing after 15 s: $(last_words "$unit")"
}

stop() {
    for unit; do
        say "stopping $unit"
        case $unit in *.timer) systemctl disable --quiet "$unit" 2> /dev/null || : ;; esac
        systemctl stop "$unit" 2> /dev/null || :
    done
}

# files TO FROM: the packet filter and every file as TO says, nothing that only FROM says. An
# operator who was locked out gets in first, and what fails does not keep the rest from being done.
files() {
    files_failed=0
    filter "$root/releases/$1" || files_failed=1
    [ "$1" = none ] || switch "$1" || files_failed=1
    links "$1" || files_failed=1
    # shellcheck disable=SC2046 # a path and a unit are one word each
    withdraw $(gone file "$2" "$1") $(gone link "$2" "$1") || files_failed=1
    environments "$1" "$2" || files_failed=1
    [ "$1" != none ] || switch none || files_failed=1
    systemctl daemon-reload || files_failed=1
    kernel
    return $files_failed
}

kernel() {
    if [ -e /etc/sysctl.d/60-callready.conf ]; then
        sysctl -q -e -p /etc/sysctl.d/60-callready.conf
    elif [ -e $root/before/sysctl ]; then
        sysctl -q -e -p $root/before/sysctl
    fi > /dev/null 2>&1 || :
}

# services TO FROM: every unit of TO runs with what TO says, those that only FROM has are stopped.
services() {
    # shellcheck disable=SC2046
    stop $(gone unit "$2" "$1") $(gone timer "$2" "$1")
    for unit in $(gone unit "$2" "$1"); do
        # One of the same name that was there before callready.
        [ ! -e "/etc/systemd/system/$unit" ] || (restart "$unit")
    done
    if [ -e $root/nftables.conf ]; then
        systemctl restart callready-firewall.service || complain "the firewall does not load: $(last_words callready-firewall.service)"
    else
        systemctl stop callready-firewall.service 2> /dev/null || :
    fi
    lines_of unit "$1" | while IFS=$T read -r kind unit fingerprint credentials how ports; do
        runs "$unit" "$fingerprint" "$credentials" && continue
        (
            if [ "$how" = reload ] && systemctl is-active --quiet "$unit"; then reload "$unit"; else restart "$unit"; fi
            [ "$ports" = - ] || wait_for_ports "$unit" $ports
        )
    done
    for timer in $(lines_of timer "$1" | cut -f 2); do
        systemctl enable --quiet --now "$timer" || complain "$timer does not start"
    done
    lines_of environment "$1" | while IFS=$T read -r kind path owner hash units commands; do
        [ "$(cat "$(note_of "$path")" 2> /dev/null)" = "$hash" ] && continue
        [ "$units" != - ] || units=
        (apply_environment "$path" "$hash" "$units" "$(printf %s "$commands" | tr "$T" '\n')")
    done
}

lock() { exec 9>>/run/callready.lock; flock "$@" 9; }

log() { # RELEASE WHAT RUN
    printf '%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$1" "${SUDO_USER:-root}" "$2" "$3" >> $state/history
}

# revert [boot]: the confirmed release again. At boot only its files: services start with them, and
# the rest is done when they have.
revert() {
    read -r failed process who < $pending || return 0
    # The script that switches must not go on beside this, however stuck it is.
    lock -n || { kill -KILL -- "-$process" 2> /dev/null; lock -w 5; }
    [ -e $pending ] || return 0 # confirmed in the meantime
    good=$(name_of confirmed)
    # Files that cannot be put back now are put back by the next try; see callready-revert.service.
    files "$good" "$failed" || fail "release $good is not wholly back; trying again"
    if [ "${1:-}" = boot ]; then
        systemctl start --no-block callready-revert.service
        return
    fi
    services "$good" "$failed"
    drop_copies "$good"
    log "$good" "reverted from $failed" -
    rm -f $pending
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    say "returned to release $good"
}

# confirm ID WHAT RUN: what comes up after a power cut from now on.
confirm() {
    lock -w 10 || fail "release $1 cannot be confirmed: this host is busy"
    read -r waiting rest 2> /dev/null < $pending || waiting=nothing
    case $waiting in
        "$1" | "$1"-*) [ "$waiting" = "$(name_of current)" ] ;;
        *) false ;;
    esac || fail "release $1 was not confirmed in time: this host has returned to $(name_of current)"
    [ ! -e /run/callready-firewall ] || nft list table inet callready > /dev/null 2>&1 ||
        fail "release $1 is not confirmed: another program has flushed nftables, and the firewall with it; this host returns to $(name_of confirmed) by itself"
    if [ "$waiting" = none ]; then
        rm -f $root/confirmed
    else
        ln -sfn "releases/$waiting" $root/.confirmed && mv -T $root/.confirmed $root/confirmed || exit 1
    fi
    sync $root
    log "$waiting" "$2" "$3"
    rm -f $pending
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    tidy
    say "confirmed release $waiting"
}

# stack: confirmed releases and the runs that brought them, the newest first, as rolling back walks
# them.
stack() {
    awk -F "$T" '$4 == "rollback" { n-- } $4 == "remove" { n = 0 }
        $4 == "deploy" && s[n] != $2 { s[++n] = $2; run[n] = $5 }
        END { for (; n > 0; n--) print s[n], run[n] }' $state/history
}

# previous: the release to roll back to, the run that brought the one after it, and the former's
# manifest.
previous() {
    good=$(stack | sed -n '2s/ .*//p')
    say "${good:-none}"
    stack | sed -n '1s/.* //p'
    [ -z "$good" ] || cat "$root/releases/$good/manifest"
}

# Five releases are kept, and what they need: versions of livekit-server, databases, certificates.
tidy() {
    drop_copies "$(name_of current)"
    kept=" $(name_of current) $(stack | awk '!seen[$1]++ { print $1 }' | head -n 5 | tr '\n' ' ')"
    for folder in $root/releases/*; do
        case $kept in *" ${folder##*/} "*) ;; *) rm -rf "$folder" ;; esac
    done
    sort -u $state/binaries 2> /dev/null | while read -r version; do
        grep -qs "^ExecStart=$version/" $root/releases/*/files/etc/systemd/system/livekit-server.service ||
            rm -rf "$version"
    done
    # Secrets, too, go with the last release that has them.
    sort -u $state/databases 2> /dev/null | while read -r database; do
        grep -qsxF "database$T$database" $root/releases/*/manifest || rm -f "$database"
    done
    for pair in $root/tls/*; do
        grep -qsxF "certificate$T${pair##*/}" $root/releases/*/manifest ||
            { unask "${pair##*/}"; rm -rf "$pair"; }
    done
}

# unask NAME: no authority is asked for its certificate any more; what it has stays for rolling back.
unask() {
    if [ -e "/etc/letsencrypt/renewal/$1.conf" ] && command -v certbot > /dev/null; then
        certbot -q delete -n --cert-name "$1" ||
            { complain "certbot goes on renewing $1, which nobody serves any more"; return 0; }
    fi
    rm -f "$root/tls/$1/asked"
}

case "${0##*/} ${1:-}" in
    "release boot" | "release revert") [ ! -e $pending ] || revert "$1" ;;
    "release previous") previous ;;
esac
