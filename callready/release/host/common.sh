#!/bin/sh
# shellcheck shell=dash
# What the scripts on a host share. It stands before each of them where they are sent or installed,
# so that every one is whole by itself (host_script in callready/release/facts.py). POSIX sh with
# `local`, as Debian Policy 10.4 allows: a bare Debian has no Python.
set -u
umask 077
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
# Tests set CALLREADY_ROOT to a folder that is the whole host then.
CALLREADY_ROOT=${CALLREADY_ROOT:-}
# shellcheck disable=SC2034 # for the scripts that follow
ROOT=$CALLREADY_ROOT/etc/callready STATE=$CALLREADY_ROOT/var/lib/callready RUN=$CALLREADY_ROOT/run T=$(printf '\t')

complain() { printf 'callready: %s\n' "$*" >&2; }

# eventually TRIES PAUSE COMMAND...: whether COMMAND succeeds, tried again every PAUSE seconds.
eventually() {
    local tries="$1" pause="$2"
    shift 2
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return
        sleep "$pause"
    done
}

# read_serial: the serial of the certificate on standard input, in hex as Python prints it.
read_serial() { openssl x509 -noout -serial 2> /dev/null | sed 's/.*=0*//; y/ABCDEF/abcdef/'; }

# ask_serial ENDPOINT NAME: that of the certificate that callers get now, whatever lies in the file.
ask_serial() {
    timeout 3 openssl s_client -no-CAfile -no-CApath -no-CAstore -connect "$1" -servername "$2" \
        < /dev/null 2> /dev/null | read_serial
}

# fingerprint_of UNIT PID: what its process was started with, or has loaded since (note-inputs.sh).
fingerprint_of() {
    local noted=
    if [ -e "$RUN/callready/$1" ]; then
        read -r noted < "$RUN/callready/$1"
        printf '%s\n' "$noted"
    else
        tr '\0' '\n' < "/proc/$2/environ" | sed -n 's/^CALLREADY_FINGERPRINT=//p'
    fi
} 2> /dev/null

# credentials_of UNIT: the SHA-256 of each one that systemd gave its process, sorted, with a comma
# after each; `-` for none.
credentials_of() {
    local given=
    [ ! -d "/run/credentials/$1" ] ||
        given=$(sha256sum "/run/credentials/$1"/* | cut -c 1-64 | sort | tr '\n' ,)
    printf '%s\n' "${given:--}"
} 2> /dev/null

# applied_note PATH: where it is noted what of an environment file its readers have.
applied_note() { printf '%s/environment/%s' "$STATE" "$(printf %s "$1" | tr / _)"; }
