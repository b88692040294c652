# The steps that bring a host to a release; run as root from a private folder ($1) that holds this
# script, the files, and `steps`: the calls of the functions below, in order, made by
# callready/release.py. Prints one line a step; stops at the first failure with what to do.
set -eu
umask 077
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
here=$1
root=/etc/callready
state=/var/lib/callready
T=$(printf '\t')
trap 'rm -rf "$here"' EXIT
trap 'exit 143' INT TERM HUP

say() { printf '%s\n' "$*"; }
fail() { printf 'callready: %s\n' "$*" >&2; exit 1; }

# One deploy at a time: the lock dies with the process that holds it.
lock() {
    exec 9>>/run/callready.lock
    flock -n 9 || fail "another deploy is running on this host: $(cat /run/callready.holder 2>/dev/null)"
    printf '%s since %s\n' "${SUDO_USER:-root}" "$(date '+%F %T')" > /run/callready.holder
    mkdir -p $root/releases $state/environment
    chmod 0755 $root $root/releases
    for left in $state/incoming.*; do
        [ "$left" = "$here" ] || rm -rf "$left"
    done
    rm -rf $root/releases/.new-*
}

# A unit masked before its package is installed never runs with the package's own configuration.
mask() {
    for unit; do
        mkdir -p /etc/systemd/system
        [ "$(readlink "/etc/systemd/system/$unit")" = /dev/null ] ||
            ln -s /dev/null "/etc/systemd/system/$unit" || fail "remove this host's own unit file"
    done
    systemctl daemon-reload
}

# candidates NAME[=VERSION]...: fetch package lists and refuse another upstream VERSION.
candidates() {
    log=$here/apt.log
    say "apt-get update"
    apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 update > "$log" 2>&1 ||
        fail "apt-get update failed: $(grep '^[EW]:' "$log" | tail -n 3); mend the host's package sources"
    for item; do
        name=${item%%=*}
        [ "$name" = "$item" ] && continue
        candidate=$(apt-cache policy "$name" | awk '$1 == "Candidate:" { print $2 }')
        case ${candidate#*:} in
            "${item#*=}" | "${item#*=}"[-+~]*) ;;
            *) fail "$name ${item#*=} is wanted, this host would install ${candidate:-nothing}: set its version in the inventory or mend the package sources" ;;
        esac
    done
}

# packages NAME...: install what is missing.
packages() {
    log=$here/apt.log
    say "installing $*"
    # What a power cut left half done; apt-get would only say so.
    dpkg --force-confold --configure -a > "$log" 2>&1 < /dev/null || :
    # A controller that is gone (sed dies of SIGPIPE) must not leave dpkg half done.
    { apt-get -y -q -f -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confold --no-install-recommends install "$@" 2>&1 < /dev/null &&
        : > "$here/installed"; } | tee "$log" | {
        sed -n -u 's/^Setting up \([^ ]*\) (\(.*\)) .../  \1 \2/p' || :
        cat > /dev/null
    }
    [ -e "$here/installed" ] ||
        fail "apt-get install $* failed: $(grep '^E:' "$log" | tail -n 3)"
}

users() {
    for name; do
        getent passwd "$name" > /dev/null && continue
        say "creating user $name"
        useradd --system --user-group --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin "$name"
    done
}

# archive BASE_URL VERSION NAME [SHA256]: install livekit-server beside the versions already there.
archive() {
    url=$1/v$2 name=$3 sum=${4:-} target=/opt/livekit/$2
    say "downloading livekit-server $2"
    fetch() { curl -fsS --retry 3 --max-time 300 -o "$2" "$1" 2> "$here/curl" || fail "cannot download $1: $(cat "$here/curl")"; }
    if [ -z "$sum" ]; then
        fetch "$url/checksums.txt" "$here/checksums"
        sum=$(awk -v name="$name" '$2 == name || $2 == "*" name { print $1 }' "$here/checksums")
        [ -n "$sum" ] || fail "$url/checksums.txt does not name $name: this release has no build for this host's architecture"
    fi
    fetch "$url/$name" "$here/archive"
    printf '%s  %s\n' "$sum" "$here/archive" | sha256sum --check --status ||
        fail "$url/$name is not the release: its SHA-256 differs from the pinned one; nothing was installed"
    mkdir "$here/unpacked"
    tar -xzf "$here/archive" -C "$here/unpacked" --no-same-owner
    rm "$here/archive"
    chmod 0755 "$here/unpacked" "$here/unpacked/livekit-server"
    "$here/unpacked/livekit-server" --version > /dev/null 2>&1 ||
        fail "livekit-server $2 does not run here: is $name built for $(uname -m)?"
    (umask 022 && mkdir -p /opt/livekit)
    rm -rf "$target"
    sync "$here/unpacked/livekit-server"
    mv "$here/unpacked" "$target"
}

# stage RELEASE: write the release beside the others, whole or not at all.
stage() {
    new=$root/releases/.new-$1
    mkdir "$new"
    while IFS=$T read -r kind path mode owner group sum; do
        [ "$kind" = file ] || continue
        getent group "$group" > /dev/null || fail "$path: no group $group on this host"
        (umask 022 && mkdir -p "$new/files${path%/*}")
        install -m "$mode" -o "$owner" -g "$group" "$here/files/$sum" "$new/files$path"
    done < "$here/manifest"
    install -m 0644 "$here/manifest" "$new/manifest"
    chmod 0755 "$new"
    find "$new" -exec sync {} +
    if [ -e "$new/files$root/nftables.conf" ]; then
        nft -c -f "$new/files$root/nftables.conf" > "$here/nft" 2>&1 ||
            fail "nft refuses the firewall rules: $(head -n 5 "$here/nft")"
    fi
    if [ -e "$new/files/etc/livekit/livekit.yaml" ]; then
        # It exits 0 whatever it finds; the words decide.
        livekit_check "$new"
    fi
}

livekit_check() {
    binary=$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1/files/etc/systemd/system/livekit-server.service")
    "$binary" --config "$1/files/etc/livekit/livekit.yaml" ports > "$here/ports" 2>&1 || :
    grep -qiE 'unknown field|could not parse|yaml:|cannot unmarshal|not found in type' "$here/ports" &&
        fail "livekit-server refuses livekit.yaml: $(grep -iE 'field|parse|yaml|unmarshal' "$here/ports" | head -n 3)"
    return 0
}

# activate RELEASE: one rename makes the whole release the current one; the live paths lead there.
activate() {
    say "activating release $1"
    if [ -e "$root/releases/$1" ]; then
        # The same release again, because somebody edited its files: put them back one by one.
        (cd "$root/releases/.new-$1" && find . -type f) | while read -r path; do
            mkdir -p "$root/releases/$1/${path%/*}"
            mv "$root/releases/.new-$1/$path" "$root/releases/$1/$path"
        done
        rm -rf "$root/releases/.new-$1"
    else
        mv "$root/releases/.new-$1" "$root/releases/$1"
    fi
    ln -sfn "releases/$1" $root/.current
    mv -T $root/.current $root/current
    while IFS=$T read -r kind path rest; do
        case $kind in
            file) live "$path" "$root/current/files$path" ;;
            link) live "$path" "$rest" ;;
        esac
    done < "$here/manifest"
}

# live PATH TARGET: make PATH a link to TARGET; what stood there before callready is kept.
live() {
    [ "$(readlink "$1")" = "$2" ] && return
    (umask 022 && mkdir -p "${1%/*}")
    if [ -e "$1" ] && [ ! -L "$1" ] && [ ! -e "$root/before$1" ]; then
        mkdir -p "$root/before${1%/*}"
        cp -a "$1" "$root/before$1"
    fi
    ln -sfn "$2" "$1.callready-new"
    mv -T "$1.callready-new" "$1"
}

# withdraw PATH...: live paths that the release no longer has; what stood there before callready
# comes back, what somebody put there since stays.
withdraw() {
    for path; do
        if [ -e "$root/before$path" ]; then
            mv -T "$root/before$path" "$path"
        elif [ -L "$path" ]; then
            rm "$path"
        fi
        case $path in *.d/callready.conf) rmdir "${path%/*}" 2> /dev/null || : ;; esac
    done
}

sysctls() {
    sysctl -q -e -p /etc/sysctl.d/60-callready.conf > /dev/null 2>&1 || :
}

# rows DATABASE SQL: change a coturn user database in place; coturn reads it at every request.
rows() {
    say "secret rows of $1"
    if [ ! -f "$1" ]; then
        mkdir -p "${1%/*}"
        rm -f "$1.new"
        { cat /usr/share/coturn/schema.sql; cat "$here/files/$2"; } | sqlite3 -bail "$1.new" > /dev/null
        chown turnserver:turnserver "$1.new"
        chmod 0640 "$1.new"
        sync "$1.new"
        mv "$1.new" "$1"
    else
        { printf '.timeout 5000\n'; cat "$here/files/$2"; } | sqlite3 -bail "$1" > /dev/null
    fi
}

# pair NAME CHAIN KEY GROUP: a certificate and its key become current together.
pair() {
    sh "$here/certificates" install "$1" "$here/files/$2" "$here/files/$3" "$4"
}

# placeholder NAME GROUP: what its services start with, until the authority has been asked.
placeholder() { sh "$here/certificates" placeholder "$1" "$2"; }

# acme NAME REQUEST ARGUMENT...: have certbot ask the authority for a certificate, unless it has one
# that was asked for in the same way and is not due.
acme() {
    name=$1 request=$2 asked=$root/tls/$1/asked
    shift 2
    say "asking the authority for the certificate of $name"
    [ ! -e "$asked" ] || [ "$(cat "$asked")" = "$request" ] || set -- "$@" --force-renewal
    [ ! -e $root/acme-ca.pem ] || export REQUESTS_CA_BUNDLE=$root/acme-ca.pem
    for try in 1 2 3 4 5; do
        certbot certonly --non-interactive --agree-tos --no-eff-email --keep-until-expiring "$@" \
            > "$here/certbot" 2>&1 < /dev/null && break
        # What an authority may say to a right request; anything else is not asked twice, because
        # authorities count failed ones.
        certbot_reason | grep -qE 'error:(badNonce|serverInternal)|Another instance of Certbot' &&
            [ "$try" -lt 5 ] ||
            fail "the authority gives no certificate for $name (all of it: /var/log/letsencrypt): $(certbot_reason)"
        sleep 2
    done
    printf '%s\n' "$request" > "$asked"
    systemctl reset-failed certbot.service 2> /dev/null || :
}

# Debian 12's certbot 2.1 on Python 3.11 says "can't set attribute" for whatever the authority says:
# its log has the words.
certbot_reason() {
    sed -n 's/^acme\.messages\.Error: /    /p' /var/log/letsencrypt/letsencrypt.log 2> /dev/null | tail -n 1
    grep -vE '^$|^(Saving|Plugins|Ask for help|Some challenges|Requesting|Certbot failed|- )' "$here/certbot" |
        tail -n 6 | sed 's/^/    /'
}

take_up() {
    say "taking up the certificates"
    systemctl start callready-certificates.service ||
        fail "certificates are not served: $(last_words callready-certificates.service)"
}

timer() {
    systemctl is-enabled --quiet "$1" || systemctl enable --quiet "$1"
    systemctl restart "$1"
}

# environment PATH OWNER LINES: replace our keys in an environment file and keep the others.
environment() {
    say "writing $1"
    (umask 022 && mkdir -p "${1%/*}")
    new=$1.callready-new
    rm -f "$new"
    install -m 0600 -o "$2" -g "$(id -gn "$2")" /dev/null "$new"
    {
        awk -F= 'NR == FNR { line[$1] = $0; order[++n] = $1; next }
            $1 in line { if (!done[$1]++) print line[$1]; next }
            { print }
            END { for (i = 1; i <= n; i++) if (!done[order[i]]) print line[order[i]] }' \
            "$here/files/$3" "$([ -f "$1" ] && printf %s "$1" || printf /dev/null)"
    } > "$new"
    sync "$new"
    # Who reads it may have started with what stood there: note that before it is gone.
    cmp -s "$new" "$1" || rm -f "$state/environment/$(printf %s "$1" | tr / _)"
    mv -T "$new" "$1"
}

# applied PATH HASH UNITS COMMANDS: restart what reads an environment file, then remember that.
applied() {
    for unit in $3; do
        say "restarting $unit, which reads $1"
        systemctl restart "$unit" || fail "$unit does not restart: $(last_words "$unit")"
    done
    if [ -n "$4" ]; then
        printf '%s\n' "$4" | while IFS= read -r command; do
            say "running $command"
            sh -c "$command" < /dev/null || fail "the command exits with $?: $command"
        done
    fi
    printf '%s\n' "$2" > "$state/environment/$(printf %s "$1" | tr / _)"
}

stop() {
    for unit; do
        say "stopping $unit"
        systemctl stop "$unit" 2> /dev/null || :
    done
}

reload_manager() { systemctl daemon-reload; }

firewall() {
    say "loading the firewall"
    systemctl restart callready-firewall.service ||
        fail "the firewall does not load: $(last_words callready-firewall.service)"
}

unload_firewall() {
    say "removing the firewall"
    systemctl stop callready-firewall.service
    rm -f /run/callready-firewall
    nft delete table inet callready 2> /dev/null || :
}

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

# listening UNIT PROTO/PORT...: a unit is up when every port it should serve is open, not before.
listening() {
    unit=$1
    shift
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
        ss -Hlntu > "$here/listening"
        missing=
        for port; do
            awk -v proto="${port%/*}" -v port="${port#*/}" '
                $1 == proto { p = $5; sub(/.*:/, "", p); if (p == port) found = 1 }
                END { exit !found }' "$here/listening" || missing="$missing $port"
        done
        systemctl is-active --quiet "$unit" && [ -z "$missing" ] && return
        sleep 0.5
    done
    fail "$unit does not listen on$missing after 15 s: $(last_words "$unit")"
}

# serving ENDPOINT NAME SERIAL: the certificate that callers get is the one just installed.
serving() { sh "$here/certificates" serving "$1" "$2" "$3"; }

# confirm RELEASE: the host is what was asked for; keep the last five releases.
confirm() {
    printf '%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$1" "${SUDO_USER:-root}" >> $state/history
    touch "$root/releases/$1"
    ls -1t $root/releases | tail -n +6 | while read -r old; do
        rm -rf "$root/releases/$old"
    done
    say "done: release $1"
}

lock
. "$here/steps"
