# The steps that bring a host to a release; run as root from a private folder ($1) that holds this
# script, release.sh, the files, and `steps`: the calls of the functions below, in order, made by
# callready/release.py. Prints one line a step; stops at the first failure with what to do.
set -eu
here=$1
# shellcheck source=release.sh
. "$here/release"
export DEBIAN_FRONTEND=noninteractive
armed='' new=''
trap finish EXIT
trap 'exit 143' INT TERM HUP

# What was not armed has changed nothing that matters; what was goes back at once.
finish() {
    status=$?
    trap - EXIT
    set +e
    rm -rf "$here" ${new:+"$new"}
    if [ -n "$armed" ] && [ $status != 0 ]; then
        exec 9>&-
        systemctl start callready-revert.service
        say "this host has returned to release $(name_of current)"
    fi
    exit $status
}

# lock_host [FOLDER]: one deploy at a time. The lock dies with the process that holds it, and a release
# that waits for its confirmation counts as one. FOLDER is the release that the plan was made for.
lock_host() {
    lock -n || fail "another deploy is running on this host: $(cat /run/callready.holder 2>/dev/null)"
    if read -r release process who 2>/dev/null < $pending; then
        systemctl is-active --quiet callready-dead-man.timer ||
            systemctl start --no-block callready-revert.service
        fail "another deploy of this host waits for its confirmation: release $release by $who; within a minute or so it is confirmed or the host has returned to release $(name_of confirmed), then try again"
    fi
    [ "${1:-$(name_of current)}" = "$(name_of current)" ] ||
        fail "another deploy has changed this host since it was looked at: run it again"
    printf '%s since %s\n' "${SUDO_USER:-root}" "$(date '+%F %T')" > /run/callready.holder
    mkdir -p $root/releases $state/environment
    chmod 0755 $root $root/releases
    # Folders of scripts that died; another one may be about to be told that it has to wait.
    for left in $state/incoming.*; do
        process=${left#"$state/incoming."}
        [ -d "/proc/${process%%.*}" ] || rm -rf "$left"
    done
    rm -rf $root/releases/.new-*
    drop_copies "$(name_of current)" # of a deploy that died before it was armed
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

# check_candidates NAME[=VERSION]...: fetch package lists and refuse another upstream VERSION.
check_candidates() {
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
            # apt-get update says so and exits 0.
            "" | "(none)") fail "$name is in none of this host's package lists: $(grep '^[EW]:' "$log" | tail -n 3); mend its package sources" ;;
            *) fail "$name ${item#*=} is wanted, this host would install $candidate: set its version in the inventory or mend the package sources" ;;
        esac
    done
}

# install_packages NAME...: install what is missing.
install_packages() {
    log=$here/apt.log
    say "installing $*"
    dpkg-query -W -f '${Package}\n' | sort > "$here/had"
    # What a power cut left half done; apt-get would only say so.
    dpkg --force-confold --configure -a > "$log" 2>&1 < /dev/null || :
    # What it left half unpacked is neither configured nor, by apt-get's reckoning, missing.
    torn=$(dpkg-query -W -f '${db:Status-Eflag} ${Package}\n' | sed -n 's/^reinstreq //p')
    # A controller that is gone (sed dies of SIGPIPE) must not leave dpkg half done.
    { apt-get -y -q -f -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confold --no-install-recommends --reinstall install "$@" $torn 2>&1 < /dev/null &&
        : > "$here/installed"; } | tee "$log" | {
        sed -n -u 's/^Setting up \([^ ]*\) (\(.*\)) .../  \1 \2/p' || :
        cat > /dev/null
    }
    dpkg-query -W -f '${Package}\n' | sort | comm -13 "$here/had" - >> $state/packages
    [ -e "$here/installed" ] ||
        fail "apt-get install $* failed: $(grep -E -A 2 '^(E:|dpkg: error)' "$log" | tail -n 8)"
}

create_users() {
    for name; do
        getent passwd "$name" > /dev/null && continue
        say "creating user $name"
        useradd --system --user-group --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin "$name"
        printf '%s\n' "$name" >> $state/users
    done
}

# install_livekit BASE_URL VERSION NAME [SHA256]: install livekit-server beside the versions already there.
install_livekit() {
    url=$1/v$2 name=$3 sum=${4:-} target=/opt/livekit/$2
    say "downloading livekit-server $2"
    # GitHub sends on to where its releases lie; what began encrypted stays so.
    fetch() { curl -fsSL --proto-redir "=https,${1%%:*}" --retry 3 --max-time 300 -o "$2" "$1" 2> "$here/curl" || fail "cannot download $1: $(cat "$here/curl")"; }
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
    own_folder /opt/livekit
    [ ! -e "$target" ] || grep -qsxF "$target" $state/binaries ||
        fail "$target is not callready's and has no livekit-server: move it out of the way"
    rm -rf "$target"
    printf '%s\n' "$target" >> $state/binaries
    sync "$here/unpacked/livekit-server"
    mv "$here/unpacked" "$target"
}

# stage RELEASE: write the release beside the others, whole or not at all, and let the programs read
# their files. One that somebody edited stays as it is; the new one gets another name.
stage() {
    new=$root/releases/.new-$1
    mkdir "$new"
    while IFS=$T read -r kind path mode owner group sum rest; do
        case $kind in
            file)
                getent group "$group" > /dev/null || fail "$path: no group $group on this host"
                (umask 022 && mkdir -p "$new/files${path%/*}")
                install -m "$mode" -o "$owner" -g "$group" "$here/files/$sum" "$new/files$path"
                ;;
            environment)
                mkdir -p "$new/environment${path%/*}"
                install -m 0600 "$here/environment$path" "$new/environment$path"
                ;;
        esac
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
    if [ -e "$new/files/etc/haproxy/haproxy.cfg" ]; then
        haproxy -c -f "$new/files/etc/haproxy/haproxy.cfg" > "$here/haproxy" 2>&1 ||
            fail "haproxy refuses its configuration: $(grep ALERT "$here/haproxy" | head -n 5)"
    fi
    release=$1
    number=1
    while [ -e "$root/releases/$release" ]; do
        release=$1-$number
        number=$((number + 1))
    done
    mv "$new" "$root/releases/$release"
}

livekit_check() {
    binary=$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1/files/etc/systemd/system/livekit-server.service")
    "$binary" --config "$1/files/etc/livekit/livekit.yaml" ports > "$here/ports" 2>&1 || :
    grep -qiE 'unknown field|could not parse|yaml:|cannot unmarshal|not found in type' "$here/ports" &&
        fail "livekit-server refuses livekit.yaml: $(grep -iE 'field|parse|yaml|unmarshal' "$here/ports" | head -n 3)"
    return 0
}

# arm SECONDS [RELEASE]: from here on the host goes back by itself, unless `release confirm` comes in
# time: by a timer, or when it boots. RELEASE instead of the staged one.
arm() {
    release=${2:-$release}
    say "switching to release $release; without confirmation back within $1 s"
    (umask 022 && mkdir -p /usr/local/lib/callready)
    install -m 0755 "$here/release" /usr/local/lib/callready/.release
    mv -T /usr/local/lib/callready/.release /usr/local/lib/callready/release
    for unit in revert boot; do
        cmp -s "$here/$unit.service" "/etc/systemd/system/callready-$unit.service" && continue
        install -m 0644 "$here/$unit.service" "/etc/systemd/system/callready-$unit.service"
        reload=yes
    done
    [ -z "${reload:-}" ] || systemctl daemon-reload
    systemctl is-enabled --quiet callready-boot.service || systemctl enable --quiet callready-boot.service
    # A host of an older callready: what it has was never confirmed in so many words.
    if [ -e $root/current ] && [ ! -e $root/confirmed ]; then
        cp -P $root/current $root/confirmed
    fi
    good=$(name_of confirmed)
    # Made now, because a full disk has no room for a link.
    [ "$good" = none ] || ln -sfn "releases/$good" $root/.back
    ln -sfn "releases/$release" $root/.next
    keep_environments "$release"
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    systemd-run --quiet --unit=callready-dead-man --on-active="$1" --timer-property=AccuracySec=1s \
        systemctl start --no-block callready-revert.service
    printf '%s %s %s since %s\n' "$release" $$ "${SUDO_USER:-root}" "$(date '+%F %T')" > $pending.new
    sync /usr/local/lib/callready /etc/systemd/system/callready-* /etc/systemd/system/sysinit.target.wants \
        $root $root/releases $pending.new
    mv $pending.new $pending
    sync $state
    armed=yes
}

# activate: one rename makes the whole release the current one; the live paths lead there.
activate() {
    mv -T $root/.next $root/current
    links "$release"
}

# return_to RELEASE: what an earlier release says, all of it.
return_to() {
    from=$(name_of current)
    files "$1" "$from"
    services "$1" "$from"
}

# write_environment PATH OWNER: our keys in an application's environment file.
write_environment() {
    say "writing $1"
    put_environment "$1" "$2" "$root/current/environment$1" "$root/confirmed/environment$1"
}

set_sysctls() {
    if [ ! -e $root/before/sysctl ]; then
        mkdir -p $root/before
        sed -n 's/^\([a-z0-9_.]*\) *=.*/\1/p' /etc/sysctl.d/60-callready.conf |
            xargs sysctl -e 2> /dev/null > $root/before/.sysctl || :
        mv $root/before/.sysctl $root/before/sysctl
    fi
    kernel
}

# write_rows DATABASE SQL: change a coturn user database in place; coturn reads it at every request.
write_rows() {
    say "secret rows of $1"
    if [ ! -f "$1" ]; then
        mkdir -p "${1%/*}"
        rm -f "$1.new"
        { cat /usr/share/coturn/schema.sql; cat "$here/files/$2"; } | sqlite3 -bail "$1.new" > /dev/null
        chown turnserver:turnserver "$1.new"
        chmod 0640 "$1.new"
        sync "$1.new"
        printf '%s\n' "$1" >> $state/databases
        mv "$1.new" "$1"
    else
        { printf '.timeout 5000\n'; cat "$here/files/$2"; } | sqlite3 -bail "$1" > /dev/null
    fi
}

# install_pair NAME CHAIN KEY GROUP: a certificate and its key become current together.
install_pair() {
    sh "$here/certificates" install "$1" "$here/files/$2" "$here/files/$3" "$4"
}

# install_placeholder NAME GROUP: what its services start with, until the authority has been asked.
install_placeholder() { sh "$here/certificates" placeholder "$1" "$2"; }

# request_certificate NAME REQUEST ARGUMENT...: have certbot ask the authority for a certificate, unless it has one
# that was asked for in the same way and is not due.
request_certificate() {
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

start_timer() {
    systemctl is-enabled --quiet "$1" || systemctl enable --quiet "$1"
    systemctl restart "$1"
}

reload_manager() { systemctl daemon-reload; }

load_firewall() {
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

# wait_for_certificate ENDPOINT NAME SERIAL: the certificate that callers get is the one just installed.
wait_for_certificate() { sh "$here/certificates" serving "$1" "$2" "$3"; }

# drain UNIT SIGNAL SECONDS PROTO/PORT...: wait for the calls of a unit to end. SIGNAL makes it take
# no new ones where it can; `-` where it cannot.
drain() {
    unit=$1 signal=$2 left=$3
    shift 3
    pid=$(systemctl show --property MainPID --value "$unit")
    say "waiting up to $left s for the calls on $unit to end"
    [ "$signal" = - ] || kill -s "$signal" "$pid"
    while [ "$left" -gt 0 ] && [ -d "/proc/$pid" ]; do
        calls=$(ss -Hlnup | awk -v pid=",pid=$pid," -v own=" $* " '
            index($0, pid) { p = $4; sub(/.*:/, "", p); if (!index(own, " udp/" p " ")) n++ } END { print n + 0 }')
        [ "$calls" != 0 ] || return 0
        [ $((left % 30)) != 0 ] || say "$calls media ports in use, $left s left"
        sleep 1
        left=$((left - 1))
    done
    # A second SIGTERM would end its calls for good; after a SIGKILL clients come back by themselves.
    [ "$signal" = - ] || systemctl kill -s KILL "$unit" 2> /dev/null || :
}

# uninstall UNIT...: nothing of callready is left, the units it masked are not any more, and the packages
# it installed go if nothing else needs them.
uninstall() {
    [ "$(name_of current)" = none ] || fail "this host still has release $(name_of current)"
    for unit; do
        [ "$(readlink "/etc/systemd/system/$unit")" != /dev/null ] || rm "/etc/systemd/system/$unit"
    done
    installed=$(cat $state/packages 2> /dev/null | sort -u)
    # apt-get would take along what was installed since and needs them.
    others=$(apt-get -s purge $installed 2> /dev/null < /dev/null | awk '$1 == "Purg" { print $2 }' |
        grep -vxF "$installed" || :)
    if [ -n "$installed" ] && [ -z "$others" ]; then
        say "removing $(printf '%s' "$installed" | tr '\n' ' ')"
        apt-get -q -y -o DPkg::Lock::Timeout=120 purge $installed > "$here/apt.log" 2>&1 < /dev/null ||
            fail "apt-get purge failed: $(grep '^E:' "$here/apt.log" | tail -n 3)"
    elif [ -n "$others" ]; then
        say "packages stay, because $(printf %s "$others" | tr '\n' ' ') need them: $(printf '%s' "$installed" | tr '\n' ' ')"
    fi
    for user in $(cat $state/users 2> /dev/null); do userdel "$user" 2> /dev/null || :; done
    systemctl disable --quiet callready-boot.service 2> /dev/null || :
    sort -u $state/binaries 2> /dev/null | while read -r version; do rm -rf "$version"; done
    remove_own_folder /opt/livekit
    rm -rf /usr/local/lib/callready $root $state /etc/systemd/system/callready-*.service /run/callready*
    systemctl daemon-reload
    say "nothing of callready is left on this host"
}

# shellcheck source=/dev/null
. "$here/steps"
