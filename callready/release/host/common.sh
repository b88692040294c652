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

# ask_certificate ENDPOINT NAME: the one that callers get now, whatever lies in the file.
ask_certificate() {
    timeout 3 openssl s_client -no-CAfile -no-CApath -no-CAstore -connect "$1" -servername "$2" \
        < /dev/null 2> /dev/null
}

# ask_serial ENDPOINT NAME: its serial.
ask_serial() { ask_certificate "$@" | read_serial; }

# seconds_to ADDRESS PORT: until a TCP connection is open, the median of five; nothing where none opens.
seconds_to() {
    # shellcheck disable=SC2016 # for bash
    timeout 3 bash -c '
        for _ in 1 2 3 4 5; do
            begun=$EPOCHREALTIME
            exec 3<> "/dev/tcp/$0/$1" || exit
            echo "$begun $EPOCHREALTIME"
        done' "$@" 2> /dev/null < /dev/null |
        awk '{ printf "%.6f\n", $2 - $1 }' | sort -n | sed -n 3p
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
# after each; `-` for none. Those of the fleet's authority are state, not release.
credentials_of() {
    local given=
    [ ! -d "/run/credentials/$1" ] ||
        given=$(sha256sum "/run/credentials/$1"/* | sed '/\/fleet\.[a-z]*$/d' | cut -c 1-64 | sort | tr '\n' ,)
    printf '%s\n' "${given:--}"
} 2> /dev/null

# list_outdated: the units that were given a certificate of the fleet that is none of this host's now.
list_outdated() {
    local given own unit
    for given in "$CALLREADY_ROOT"/run/credentials/*/fleet.cert; do
        [ -e "$given" ] || continue
        for own in "$ROOT"/fleet/*/cert.pem; do
            ! cmp -s "$given" "$own" || continue 2
        done
        unit=${given%/fleet.cert}
        printf '%s\n' "${unit##*/}"
    done
}

# lineage_of NAME: certbot's name of the certificate that callready has asked for, or would take up.
lineage_of() { cat "$STATE/lineages/$1" 2> /dev/null || printf '%s\n' "$1"; }

# note_lineage NAME [LINEAGE]: that it is callready's, if nothing else is noted.
note_lineage() {
    [ -e "$STATE/lineages/$1" ] || { mkdir -p "$STATE/lineages" && printf '%s\n' "${2:-$1}" > "$STATE/lineages/$1"; }
}

# applied_note PATH: where it is noted what of an environment file its readers have.
applied_note() { printf '%s/environment/%s' "$STATE" "$(printf %s "$1" | tr / _)"; }

is_there() { [ -e "$1" ] || [ -L "$1" ]; } # also a link to nowhere

# obstacles PATH...: a line `PATH KIND WORDS`, with tabs between, for each where a file cannot be put
# by a rename (rename(2)), and why. A link is none: it is replaced itself.
obstacles() {
    local path folder mounts
    mounts=" $(awk '{ printf "%s ", $5 }' /proc/self/mountinfo)" # the shell reads byte by byte
    for path; do
        folder=${path%/*}
        until is_there "${folder:=/}"; do folder=${folder%/*}; done
        if [ ! -d "$folder" ]; then
            printf '%s\tfolder\tcannot be there: %s is not a folder\n' "$path" "$folder"
        elif [ ! -w "$folder" ]; then
            printf '%s\tfixed\tcannot be written: %s is immutable (chattr +i) or on a read-only file system\n' "$path" "$folder"
        elif [ -L "$path" ] || [ ! -e "$path" ]; then
            continue
        elif [ -d "$path" ]; then
            printf '%s\tfolder\tis a folder\n' "$path"
        elif [ ! -f "$path" ]; then
            printf '%s\tspecial\tis a device, a socket or a named pipe\n' "$path"
        elif [ "${mounts#*" $path "}" != "$mounts" ]; then
            printf '%s\tmounted\tis a mount point\n' "$path"
        elif [ ! -w "$path" ]; then
            printf '%s\tfixed\tis immutable (chattr +i) or on a read-only file system\n' "$path"
        fi
    done
}

# mark_lines KEY,...: the lines of an environment file, each behind a tab and before that what it is to
# any of its readers, who differ (python-dotenv, sh, systemd.exec(5), compose's): `KEY`, it sets the key
# as callready writes it; ` ?KEY`, it may set it for one of them (`export KEY=`, ` KEY = `, `key: `, a
# line that the one before continues); `-`, neither. A value in quotes may have several lines. The
# number of a line with a quote that nothing closes comes last, behind `!`.
mark_lines() {
    awk -v keys="$1" '
        function closes(text, quote) {
            if (quote == "\"") gsub(/\\./, "", text)
            return index(text, quote)
        }
        { line[NR] = $0 }
        END {
            count = split(keys, key, ",")
            for (n = 1; n <= NR; n++) {
                mark = ""
                is_comment = line[n] ~ /^[ \t]*[#;]/
                for (k = 1; k <= count; k++) {
                    other = "(^|[^a-z0-9_${])" tolower(key[k]) "[\"\047]?[ \t]*([=:]|\r?$)"
                    if (index(line[n], key[k] "=") == 1 && !continued) { mark = key[k]; break }
                    if (!is_comment && tolower(line[n]) ~ other) mark = mark " ?" key[k]
                }
                print (mark = mark == "" ? "-" : mark) "\t" line[n]
                continued = line[n] ~ /\\\r?$/
                if (is_comment || !match(line[n], /^[^=:]*[=:][ \t]*["\047]/)) continue
                quote = substr(line[n], RLENGTH, 1)
                if (closes(substr(line[n], RLENGTH + 1), quote)) continue
                for (m = n + 1; m <= NR && !closes(line[m], quote); m++);
                if (m > NR) { if (!unclosed) unclosed = n; continue }
                if (mark ~ /[?]/) mark = "-"
                while (n < m) print mark "\t" line[++n]
                continued = 0
            }
            if (unclosed) print "!" unclosed "\t"
        }'
}

# effective_lines: of marked lines those by which all readers have the keys: as callready writes them,
# with `?KEY` for each that a later line may set otherwise.
effective_lines() {
    awk '
        { mark = substr($0, 1, index($0, "\t") - 1) }
        mark ~ /^[-!]/ { next }
        mark !~ /[?]/ { print substr($0, index($0, "\t") + 1); at[mark] = NR; next }
        { for (n = split(mark, others, " "); n; n--) last[substr(others[n], 2)] = NR }
        END { for (key in last) if (key in at && last[key] > at[key]) print "?" key }'
}
