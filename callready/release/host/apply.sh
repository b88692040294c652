# shellcheck shell=dash
# The steps that bring a host to a release; run as root from a private folder ($1) that holds this
# script, release.sh, the files, and `steps`: the calls of the functions below, in order, made by
# callready/release/declaration.py. Prints one line a step; stops at the first failure with what to
# do.
set -eu
here=$1
# shellcheck source=release.sh
. "$here/release"
export DEBIAN_FRONTEND=noninteractive
PROGRAMS=$CALLREADY_ROOT/usr/local/lib/callready
FORMAT=2 # of what this callready writes on a host
NO_HOME=/nonexistent
# What stage writes, the release that arm and activate switch to, and whether the host goes back.
new='' release='' armed=''
trap finish EXIT
trap 'exit 130' INT HUP
trap 'exit 143' TERM

# What was not armed has changed nothing that matters; what was goes back at once.
finish() {
    local status=$?
    trap - EXIT
    set +e
    rm -rf "$here" ${new:+"$new"}
    [ "$(cat "$EGRESS_DRAINING" 2> /dev/null)" != $$ ] || record_again
    if [ -n "$armed" ] && [ $status != 0 ]; then
        [ $status != 143 ] || complain "stopped: this host has waited for its confirmation as long as deploy.confirm_timeout says"
        exec 9>&-
        systemctl start callready-revert.service
        say "this host has returned to release $(name_of current)"
    fi
    [ $status = 0 ] || serve_again
    exit $status
}

# lock_host [FOLDER]: one deploy at a time. The lock dies with the process that holds it, and a release
# that waits for its confirmation counts as one. FOLDER is the release that the plan was made for.
lock_host() {
    local waiting who left process
    lock -n || fail "another deploy is running on this host: $(cat "$RUN/callready.holder" 2> /dev/null)"
    if read -r waiting _ who 2> /dev/null < "$PENDING"; then
        systemctl is-active --quiet callready-dead-man.timer ||
            systemctl start --no-block callready-revert.service
        fail "another deploy of this host waits for its confirmation: release $waiting by $who; within a minute or so it is confirmed or the host has returned to release $(name_of confirmed), then try again"
    fi
    [ "${1:-$(name_of current)}" = "$(name_of current)" ] ||
        fail "another deploy has changed this host since it was looked at: run it again"
    printf '%s since %s\n' "${SUDO_USER:-root}" "$(date '+%F %T')" > "$RUN/callready.holder"
    mkdir -p "$ROOT/releases" "$STATE/environment"
    chmod 0755 "$ROOT" "$ROOT/releases"
    # Folders of scripts that died; another one may be about to be told that it has to wait.
    for left in "$STATE"/incoming.*; do
        process=${left#"$STATE/incoming."}
        [ -d "/proc/${process%%.*}" ] || rm -rf "$left"
    done
    rm -rf "$ROOT"/releases/.new-*
    drop_copies "$(name_of current)" # of a deploy that died before it was armed
}

# mask UNIT...: masked before its package is installed it never runs with the package's own
# configuration. One that the operator has masked is not noted, and stays so.
mask() {
    local unit
    mkdir -p "$UNIT_FILES"
    : >> "$STATE/masks"
    for unit; do
        [ "$(readlink "$UNIT_FILES/$unit")" != /dev/null ] || continue
        ln -s /dev/null "$UNIT_FILES/$unit" || fail "remove this host's own unit file"
        printf '%s\n' "$unit" >> "$STATE/masks"
    done
    systemctl daemon-reload
}

# check_candidates NAME[=VERSION]...: fetch package lists and refuse another upstream VERSION.
check_candidates() {
    local log="$here/apt.log" item name candidate
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

list_packages() { dpkg-query -W -f '${Package}\n' | sort; }

# install_packages NAME...: what is missing.
install_packages() {
    local log="$here/apt.log" torn
    say "installing $*"
    list_packages > "$here/had"
    # What a power cut left half done; apt-get would only say so.
    dpkg --force-confold --configure -a > "$log" 2>&1 < /dev/null || :
    # What it left half unpacked is neither configured nor, by apt-get's reckoning, missing.
    torn=$(dpkg-query -W -f '${db:Status-Eflag} ${Package}\n' | sed -n 's/^reinstreq //p')
    # A controller that is gone (sed dies of SIGPIPE) must not leave dpkg half done.
    # shellcheck disable=SC2086 # a package is one word
    { apt-get -y -q -f -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confold --no-install-recommends --no-remove --reinstall install "$@" $torn 2>&1 < /dev/null &&
        : > "$here/installed"; } | tee "$log" | {
        sed -n -u 's/^Setting up \([^ ]*\) (\(.*\)) .../  \1 \2/p' || :
        cat > /dev/null
    }
    list_packages | comm -13 "$here/had" - >> "$STATE/packages"
    [ -e "$here/installed" ] ||
        fail "apt-get install $* failed: $(grep -E -A 2 '^(E:|dpkg: error|.* will be REMOVED:)' "$log" | tail -n 8)"
}

create_users() {
    local name
    for name; do
        getent passwd "$name" > /dev/null && continue
        say "creating user $name"
        useradd --system --user-group --home-dir "$NO_HOME" --no-create-home --shell /usr/sbin/nologin "$name"
        printf '%s\n' "$name" >> "$STATE/users"
    done
}

# download URL FILE: GitHub sends on to where its releases lie; what began encrypted stays so.
download() {
    curl -fsSL --proto-redir "=https,${1%%:*}" --retry 3 --max-time 300 -o "$2" "$1" 2> "$here/curl" ||
        fail "cannot download $1: $(cat "$here/curl")"
}

# install_livekit BASE_URL VERSION NAME [SHA256]: livekit-server beside the versions already there.
install_livekit() {
    local url="$1/v$2" version="$2" name="$3" sum="${4:-}" target="$LIVEKIT/$2" unpacked="$here/unpacked"
    say "downloading livekit-server $version"
    if [ -z "$sum" ]; then
        download "$url/checksums.txt" "$here/checksums"
        sum=$(awk -v name="$name" '$2 == name || $2 == "*" name { print $1 }' "$here/checksums")
        [ -n "$sum" ] || fail "$url/checksums.txt does not name $name: this release has no build for this host's architecture"
    fi
    download "$url/$name" "$here/archive"
    printf '%s  %s\n' "$sum" "$here/archive" | sha256sum --check --status ||
        fail "$url/$name is not the release: its SHA-256 differs from the pinned one; nothing was installed"
    mkdir "$unpacked"
    tar -xzf "$here/archive" -C "$unpacked" --no-same-owner
    rm "$here/archive"
    chmod 0755 "$unpacked" "$unpacked/livekit-server"
    "$unpacked/livekit-server" --version > /dev/null 2>&1 ||
        fail "livekit-server $version does not run here: is $name built for $(uname -m)?"
    make_own_folder "$LIVEKIT"
    [ ! -e "$target" ] || grep -qsxF "$target" "$STATE/binaries" ||
        fail "$target is not callready's and has no livekit-server: move it out of the way"
    remove_entry "$LIVEKIT" "$target"
    printf '%s\n' "$target" >> "$STATE/binaries"
    sync "$unpacked/livekit-server"
    mv "$unpacked" "$target"
}

# install_programs NAME INDEX PACKAGES SOURCES [FILE WHEEL]...: callready's own programs, and what they
# need by the hashes in PACKAGES: from an index, or these wheels; else from where pip would take it.
install_programs() {
    local target="$OWN/$1" index="$2" packages="$here/files/$3" sources="$here/files/$4" version
    local made="$here/programs" log="$here/pip.log" wheels="$here/wheels"
    shift 4
    say "installing callready's own programs"
    mkdir "$wheels"
    if [ $# -gt 0 ]; then
        while [ $# -gt 0 ]; do
            ln "$here/files/$2" "$wheels/$1"
            shift 2
        done
        set -- --no-index --find-links "$wheels"
    elif [ -n "$index" ]; then
        set -- --index-url "$index"
    fi
    python3 -m venv "$made" > "$log" 2>&1 || fail "python3 -m venv failed: $(tail -n 3 "$log")"
    "$made/bin/python3" -m pip --quiet --disable-pip-version-check --no-cache-dir --no-input install \
        --require-hashes --no-deps --only-binary :all: "$@" -r "$packages" > "$log" 2>&1 < /dev/null ||
        fail "packages of callready's own programs cannot be installed: $(grep -i error "$log" | tail -n 3); monitor.wheels says where they come from"
    version=$("$made/bin/python3" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$made/bin/python3" -m zipfile -e "$sources" "$made/lib/$version/site-packages"
    "$made/bin/python3" -m compileall -q "$made/lib/$version/site-packages/callready"
    "$made/bin/python3" -P -m callready.probes.caller --help > "$log" 2>&1 ||
        fail "callready's own programs do not run here: $(tail -n 3 "$log")"
    chmod -R go+rX "$made"
    # When the system has another Python, this one is not there any more and all is installed anew.
    ln -sfn "/usr/bin/$version" "$made/bin/python3"
    make_own_folder "$OWN"
    [ ! -e "$target" ] || grep -qsxF "$target" "$STATE/binaries" ||
        fail "$target is not callready's: move it out of the way"
    remove_entry "$OWN" "$target"
    printf '%s\n' "$target" >> "$STATE/binaries"
    sync -f "$made"
    mv "$made" "$target"
}

# reserve_ids NAME:FIRST:COUNT: user and group numbers that useradd(8) gives to nobody else.
reserve_ids() {
    local file
    say "reserving users and groups: $1"
    for file in "$CALLREADY_ROOT/etc/subuid" "$CALLREADY_ROOT/etc/subgid"; do
        ! grep -qsxF "$1" "$file" || continue
        printf '%s %s\n' "$file" "$1" >> "$STATE/subordinates"
        printf '%s\n' "$1" >> "$file" || fail "$file cannot be written"
    done
}

# install_image NAME@DIGEST USER [AUTHORITY]: a container's image, whose registry's HTTPS may be
# signed by AUTHORITY; its user has the number USER, by which its folders are its own.
install_image() {
    local image="$1" trusted="$here/registry" found
    say "pulling $image"
    mkdir "$trusted"
    [ $# = 2 ] || ln "$here/files/$3" "$trusted/ca.crt"
    if ! podman image exists "$image"; then
        # Noted before, so that one that was just pulled is not taken for somebody else's.
        printf '%s\n' "$image" >> "$STATE/images"
        podman pull --quiet --cert-dir "$trusted" "$image" > /dev/null 2> "$here/podman" < /dev/null ||
            fail "cannot pull $image: $(tail -n 3 "$here/podman"); egress.image says where it comes from"
    fi
    found=$(podman run --rm --pull=never --network=none --cgroups=disabled --read-only --cap-drop=all \
        --security-opt=no-new-privileges --entrypoint=id "$image" -u 2> "$here/podman" < /dev/null) ||
        fail "$image does not run here: $(tail -n 3 "$here/podman")"
    [ "$found" = "$2" ] ||
        fail "$image runs as user $found, egress' own image as $2: egress.digest is another image's"
}

# stage RELEASE: write the release beside the others, whole or not at all, and let the programs read
# their files. One that somebody edited stays as it is; the new one gets another name.
stage() {
    local kind path mode owner group sum number=1
    new=$ROOT/releases/.new-$1
    mkdir "$new"
    while IFS=$T read -r kind path mode owner group sum _; do
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
    install -m 0644 "$here/manifest" "$here/templates" "$new"
    chmod 0755 "$new"
    find "$new" -exec sync {} +
    check_files "$new/files"
    release=$1
    while [ -e "$ROOT/releases/$release" ]; do
        release=$1-$number
        number=$((number + 1))
    done
    mv "$new" "$ROOT/releases/$release"
}

# check_files FOLDER: the programs themselves read what they will start with.
check_files() {
    local rules="$1$ROOT/nftables.conf" livekit="$1$CALLREADY_ROOT/etc/livekit/livekit.yaml"
    local edge="$1$CALLREADY_ROOT/etc/haproxy/haproxy.cfg" binary
    if [ -e "$rules" ]; then
        nft -c -f "$rules" > "$here/nft" 2>&1 ||
            fail "nft refuses the firewall rules: $(head -n 5 "$here/nft")"
    fi
    if [ -e "$livekit" ]; then
        binary=$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1$UNIT_FILES/livekit-server.service")
        # It exits 0 whatever it finds; the words decide.
        "$binary" --config "$livekit" ports > "$here/ports" 2>&1 || :
        ! grep -qiE 'unknown field|could not parse|yaml:|cannot unmarshal|not found in type' "$here/ports" ||
            fail "livekit-server refuses livekit.yaml: $(grep -iE 'field|parse|yaml|unmarshal' "$here/ports" | head -n 3)"
    fi
    if [ -e "$edge" ]; then
        # The fleet's authority is there only when this release is.
        sed "s| ca-file /| ca-file $1/|g" "$edge" > "$here/haproxy.cfg"
        haproxy -c -f "$here/haproxy.cfg" > "$here/haproxy" 2>&1 ||
            fail "haproxy refuses its configuration: $(grep ALERT "$here/haproxy" | head -n 5)"
    fi
}

# install_release: the program that does what must be done without this script.
install_release() {
    (umask 022 && mkdir -p "$PROGRAMS")
    install -m 0755 "$here/release" "$PROGRAMS/.release"
    mv -T "$PROGRAMS/.release" "$PROGRAMS/release"
}

# arm SECONDS [RELEASE]: from here on the host goes back by itself, unless `release confirm` comes in
# time: by a timer, or when it boots. RELEASE instead of the staged one.
arm() {
    local unit changed='' good path
    release=${2:-$release}
    # shellcheck disable=SC2046 # a path is one word
    are_free $(list_places "$release" "$(name_of current)") ||
        fail "nothing was switched: mend that first"
    for path in $(names_of environment "$release"); do
        [ -d "${path%/*}" ] || fail "nothing was switched: $path has no folder on this host"
    done
    say "switching to release $release; without confirmation back within $1 s"
    install_release
    for unit in revert boot; do
        cmp -s "$here/$unit.service" "$UNIT_FILES/callready-$unit.service" && continue
        install -m 0644 "$here/$unit.service" "$UNIT_FILES/callready-$unit.service"
        changed=yes
    done
    [ -z "$changed" ] || systemctl daemon-reload
    systemctl is-enabled --quiet callready-boot.service || systemctl enable --quiet callready-boot.service
    # A host of an older callready: what it has was never confirmed in so many words.
    if [ -e "$ROOT/current" ] && [ ! -e "$ROOT/confirmed" ]; then
        cp -P "$ROOT/current" "$ROOT/confirmed"
    fi
    good=$(name_of confirmed)
    # Made now, because a full disk has no room for a link.
    [ "$good" = none ] || ln -sfn "releases/$good" "$ROOT/.back"
    ln -sfn "releases/$release" "$ROOT/.next"
    keep_environments "$release"
    systemctl stop callready-dead-man.timer 2> /dev/null || :
    systemd-run --quiet --unit=callready-dead-man --on-active="$1" --timer-property=AccuracySec=1s \
        systemctl start --no-block callready-revert.service
    printf '%s\n' "$FORMAT" > "$STATE/format.new"
    printf '%s %s %s since %s\n' "$release" "$$@$(boot_id)" "${SUDO_USER:-root}" "$(date '+%F %T')" > "$PENDING.new"
    sync "$PROGRAMS" "$UNIT_FILES"/callready-* "$UNIT_FILES/sysinit.target.wants" \
        "$ROOT" "$ROOT/releases" "$STATE/format.new" "$PENDING.new"
    mv "$STATE/format.new" "$STATE/format"
    mv "$PENDING.new" "$PENDING"
    sync "$STATE"
    armed=yes
}

# activate: one rename makes the whole release the current one; the live paths lead there.
activate() {
    mv -T "$ROOT/.next" "$ROOT/current"
    place_links "$release"
}

# return_to RELEASE: what an earlier release says, all of it.
return_to() {
    local from
    from=$(name_of current)
    put_files "$1" "$from"
    put_environments "$1" "$from"
    put_services "$1" "$from"
    apply_environments "$1"
}

# write_environment PATH OWNER: our keys in an application's environment file.
write_environment() {
    say "writing $1"
    put_environment "$1" "$2" "$ROOT/current/environment$1" "$ROOT/confirmed/environment$1"
}

# Kernel settings as the new release says; what they were before callready is kept.
set_sysctls() {
    local key
    mkdir -p "$ROOT/before"
    {
        cat "$ROOT/before/sysctl" 2> /dev/null || :
        sed -n 's/^\([a-z0-9_.]*\) *=.*/\1/p' "$SYSCTLS_FILE" | while read -r key; do
            grep -qs "^$key =" "$ROOT/before/sysctl" || sysctl -e "$key" 2> /dev/null || :
        done
    } > "$ROOT/before/.sysctl"
    mv "$ROOT/before/.sysctl" "$ROOT/before/sysctl"
    set_kernel
}

# write_rows DATABASE SQL: change a coturn user database in place; coturn reads it at every request,
# and refuses a caller (401) who comes while it is locked. In WAL mode a writer locks no reader out
# (sqlite.org/wal.html). coturn cannot make the files that this mode needs, so they stay; the
# checkpoint takes the old secret out of them.
write_rows() {
    local database="$1" sql="$here/files/$2"
    say "secret rows of $database"
    if [ ! -f "$database" ]; then
        mkdir -p "${database%/*}"
        rm -f "$database.new"
        cat /usr/share/coturn/schema.sql "$sql" | sqlite3 -bail "$database.new" > /dev/null
        chown turnserver:turnserver "$database.new"
        chmod 0640 "$database.new"
        sync "$database.new"
        printf '%s\n' "$database" >> "$STATE/databases"
        mv "$database.new" "$database"
    fi
    {
        printf '%s\n' '.timeout 5000' '.filectrl persist_wal 1' 'PRAGMA journal_mode = WAL;'
        cat "$sql"
        echo 'PRAGMA wal_checkpoint(TRUNCATE);'
    } | sqlite3 -bail "$database" > /dev/null
}

# install_identity KIND CERTIFICATE KEY: one rename of a link makes both current together, and who has
# the old ones starts anew, or reloads where that is enough.
install_identity() {
    local new=".$1-$2" unit old
    mkdir -p "$ROOT/fleet/$new"
    {
        install -m 0644 "$here/files/$2" "$ROOT/fleet/$new/cert.pem" &&
            install -m 0600 "$here/files/$3" "$ROOT/fleet/$new/key.pem" &&
            cat "$ROOT/fleet/$new/cert.pem" "$ROOT/fleet/$new/key.pem" > "$ROOT/fleet/$new/both.pem" &&
            sync "$ROOT/fleet/$new"/* &&
            ln -sfn "$new" "$ROOT/fleet/.next" &&
            mv -T "$ROOT/fleet/.next" "$ROOT/fleet/$1"
    } || fail "$ROOT/fleet/$1: cannot be replaced"
    for old in "$ROOT/fleet/.$1"-*; do
        [ "${old##*/}" = "$new" ] || rm -rf "$old"
    done
    say "installed the certificate of the fleet for $1"
    for unit in $(list_outdated); do
        systemctl try-restart "$unit" || fail "$unit does not restart: $(last_words "$unit")"
    done
    ! grep -qs " $ROOT/fleet/$1/" "$CALLREADY_ROOT/etc/haproxy/haproxy.cfg" ||
        systemctl try-reload-or-restart haproxy.service ||
        fail "haproxy.service does not reload: $(last_words haproxy.service)"
}

# drop_identity KIND
drop_identity() { rm -rf "$ROOT/fleet/$1" "$ROOT/fleet/.$1"-*; }

# install_pair NAME CHAIN KEY GROUP: a certificate and its key become current together.
install_pair() { sh "$here/certificates" install "$1" "$here/files/$2" "$here/files/$3" "$4"; }

# install_placeholder NAME GROUP: what its services start with, until the authority has been asked.
install_placeholder() { sh "$here/certificates" placeholder "$1" "$2"; }

# wait_for_certificate ENDPOINT NAME SERIAL: callers get the one just installed.
wait_for_certificate() { sh "$here/certificates" serving "$1" "$2" "$3"; }

# request_certificate NAME REQUEST ARGUMENT...: have certbot ask the authority for a certificate,
# unless it has one that was asked for in the same way and is not due.
request_certificate() {
    local name="$1" request="$2" asked="$ROOT/tls/$1/asked" lineage
    local renewal="$CALLREADY_ROOT/etc/letsencrypt/renewal"
    shift 2
    say "asking the authority for the certificate of $name"
    lineage=$(lineage_of "$name")
    if [ ! -e "$asked" ] && [ ! -e "$STATE/lineages/$name" ] && [ -e "$renewal/$lineage.conf" ]; then
        lineage=$name-callready
        say "certbot's $name was there before callready and stays; $lineage is a new one"
    fi
    # Noted before, so that one that was just made is not taken for somebody else's.
    note_lineage "$name" "$lineage"
    set -- "$@" --cert-name "$lineage"
    [ ! -e "$asked" ] || [ "$(cat "$asked")" = "$request" ] || set -- "$@" --force-renewal
    [ ! -e "$ROOT/acme-ca.pem" ] || export REQUESTS_CA_BUNDLE="$ROOT/acme-ca.pem"
    export AWS_SHARED_CREDENTIALS_FILE="$ROOT/dns-credentials" # certbot's route53 reads no other
    case " $* " in *" --manual "*)
        # certbot asks the authority, which counts failures, even after a hook that failed.
        "$CALLREADY_ROOT/usr/local/lib/callready/ovh-dns" check "$name" 2> "$here/certbot" ||
            fail "no certificate for $name was asked for: $(sed 's/^callready: //' "$here/certbot")"
        ;;
    esac
    eventually 5 2 run_certbot "$@" || refuse_certificate
    printf '%s\n' "$request" > "$asked"
    systemctl reset-failed certbot.service 2> /dev/null || :
}

run_certbot() {
    certbot certonly --non-interactive --agree-tos --no-eff-email --keep-until-expiring "$@" \
        > "$here/certbot" 2>&1 < /dev/null && return
    # What an authority may say to a right request; anything else is not asked twice, because
    # authorities count failed ones.
    certbot_reason | grep -qE 'error:(badNonce|serverInternal)|Another instance of Certbot' ||
        refuse_certificate
    return 1
}

refuse_certificate() {
    fail "the authority gives no certificate for $name (all of it: /var/log/letsencrypt): $(certbot_reason)"
}

# Debian 12's certbot 2.1 on Python 3.11 says "can't set attribute" for whatever the authority says:
# its log has the words.
certbot_reason() {
    sed -n 's/^ *callready: /    /p' "$here/certbot" | head -n 1
    sed -n 's/^acme\.messages\.Error: /    /p' /var/log/letsencrypt/letsencrypt.log 2> /dev/null | tail -n 1
    grep -vE '^$|^(Saving|Plugins|Ask for help|Some challenges|Requesting|Certbot failed|- )' "$here/certbot" |
        tail -n 6 | sed 's/^/    /'
}

# take_up: what certbot has, for all who serve it. A start would only join a run that is under way,
# by its timer perhaps, and has looked before certbot was asked.
take_up() {
    say "taking up the certificates"
    systemctl restart callready-certificates.service ||
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
    rm -f "$RUN/callready-firewall"
    nft delete table inet callready 2> /dev/null || :
}

# count_media PID MEDIA PROTO/PORT...: what a process has open for calls: UDP ports beside its own ones,
# and connections to its port MEDIA (`-`: none).
count_media() {
    local pid="$1" media="${2#tcp/}"
    shift 2
    {
        ss -Hlnup
        [ "$media" = - ] || ss -Htnp state established "sport = :$media" | sed 's/^/tcp /'
    } | awk -v pid=",pid=$pid," -v own=" $* " '
        index($0, pid) { p = $4; sub(/.*:/, "", p); if ($1 == "tcp" || !index(own, " udp/" p " ")) n++ }
        END { print n + 0 }'
}

# drain UNIT SIGNAL SECONDS MEDIA PROTO/PORT...: wait for the calls of a unit to end. SIGNAL makes it
# take no new ones where it can; `-` where it cannot.
drain() {
    local unit="$1" signal="$2" left="$3" pid calls
    shift 3
    pid=$(main_pid "$unit")
    say "waiting up to $left s for the calls on $unit to end"
    [ "$signal" = - ] || kill -s "$signal" "$pid"
    while [ "$left" -gt 0 ] && [ -d "/proc/$pid" ]; do
        calls=$(count_media "$pid" "$@")
        [ "$calls" != 0 ] || return 0
        [ $((left % 30)) != 0 ] || say "$calls media ports in use, $left s left"
        sleep 1
        left=$((left - 1))
    done
    [ "$signal" = - ] || systemctl kill -s KILL "$unit" 2> /dev/null || :
}

# drain_node SECONDS SIGNALLING MEDIA PROTO/PORT...: LiveKit as one of several that take each other's
# calls: no new callers by the edges, no new rooms, then wait for its participants, and for the
# WebSockets that it relays to rooms on other nodes. There is no way back from SIGTERM but a restart, and
# when its last participant leaves, LiveKit ends by itself and cuts what it relays: so it is told when
# there is a participant, and not before.
drain_node() {
    local left="$1" signalling="${2#tcp/}" pid told='' calls relayed=''
    shift 2
    if ! is_replaced; then
        drain "$SFU" - "$left" "$@"
        return
    fi
    systemctl stop callready-drain.service 2> /dev/null || : # of a deploy that was cut
    pid=$(main_pid "$SFU")
    [ "$(cat "$DRAINED" 2> /dev/null)" != "$pid" ] || told=yes
    install_release
    (umask 022 && mkdir -p "$RUN/callready")
    systemd-run --quiet --collect --unit=callready-drain --property="ExecStopPost=$PROGRAMS/release open-edge" \
        "$PROGRAMS/release" watch-drain $$ "$pid" "$left" || fail "nothing was changed: mend that first"
    open_edge 0
    # Whoever waited may go away: then nothing is switched (watch_drain).
    trap 'exit 141' PIPE
    say "waiting up to $left s for the participants on this node to leave, and for WebSockets that it relays; others get new calls"
    while [ -d "/proc/$pid" ]; do
        calls=$(count_media "$pid" "$@")
        relayed=$(list_websockets "$pid" "$signalling" "$relayed")
        [ "$calls:$relayed" != 0: ] || break
        if [ "$calls" != 0 ] && [ -z "$told" ]; then
            printf '%s\n' "$pid" > "$DRAINED"
            kill -s TERM "$pid"
            told=yes
        fi
        [ "$left" -gt 0 ] || break
        [ $((left % 10)) != 0 ] || say "$calls media ports in use, $(printf %s "$relayed" | wc -w) WebSockets, $left s left"
        [ "$left" != 60 ] || say "rooms on this node: $(list_rooms "$pid")"
        sleep 1
        left=$((left - 1))
    done
    if [ -d "/proc/$pid" ] && [ "$calls" != 0 ]; then
        say "the time is over: $calls media ports are in use, and these rooms reconnect once: $(list_rooms "$pid")"
        hide_node "$pid" "$@"
    else
        rm -f "$DRAINED" # it ends by itself
    fi
    trap - PIPE
}

# hide_node PID MEDIA PROTO/PORT...: have callers move while their media goes on. A node of which Redis
# hears nothing is dead for the others after 5 s, and its callers, who lose their signalling after 10 s,
# come to other nodes, with a gap of half a second; of ten if it is killed under them. So nothing that
# LiveKit connects to (Redis, webhooks) takes it until it has been restarted (show_node), for a minute at
# most. Waits until the callers are gone.
hide_node() {
    local pid="$1" left=15 own
    shift
    # Without an edge callers have nowhere else to come to.
    command -v nft > /dev/null && grep -qs srv_uweight "$CALLREADY_ROOT/etc/haproxy/haproxy.cfg" || return 0
    own=$(ss -Hltnp | awk -v pid=",pid=$pid," '
        index($0, pid) { p = $4; sub(/.*:/, "", p); printf "%s%s", (n++ ? ", " : ""), p }')
    show_node
    nft -f - << END || return 0
table inet callready-hidden {
    set user { type uid; flags timeout; elements = { livekit timeout 60s }; }
    chain output {
        type filter hook output priority -10;
        meta skuid @user tcp sport != { $own } reject with tcp reset
    }
}
END
    while [ "$left" -gt 0 ] && [ -d "/proc/$pid" ] && [ "$(count_media "$pid" "$@")" != 0 ]; do
        sleep 1
        left=$((left - 1))
    done
}

# is_replaced: whether another node takes new calls now; says where that is not so, or far away.
is_replaced() {
    local config="$CALLREADY_ROOT/etc/livekit/livekit.yaml" own region others
    own=$(sed -n 's/^ *node_ip: *//p' "$config")
    region=$(sed -n 's/^region: *//p' "$config" | tr -d "\"'")
    others=$(timeout 10 "$CALLREADY_ROOT/usr/local/bin/livekit-server" --config "$config" list-nodes 2> /dev/null |
        awk -F ' *│ *' -v own="$own" -v since="$(date -u -d '10 seconds ago' '+%F %T')" '
            $2 ~ /^ND_/ { ip = $3; region = $4 }
            $2 == "(SERVING)" && ip != own && $(NF - 1) >= since { print region == "" ? "-" : region }') || :
    if [ -z "$others" ]; then
        say "no other SFU takes new calls now (livekit-server list-nodes): this one goes on taking them until it restarts"
        return 1
    fi
    [ -z "$region" ] || printf '%s\n' "$others" | grep -qxF "$region" ||
        say "no other SFU of region $region takes new calls now: they go to other regions"
}

# list_websockets PID PORT [EARLIER]: the other ends of the connections to LiveKit's port that are
# WebSockets: LiveKit pings each one every 10 s, and they outlive two looks.
list_websockets() {
    ss -HOtnpi state established "sport = :$2" | awk -v pid=",pid=$1," -v earlier="${3:+ $3 }" '
        index($0, pid) && (earlier == "" || index(earlier, " " $4 " ")) {
            sent = match($0, /lastsnd:[0-9]+/) ? substr($0, RSTART + 8, RLENGTH - 8) : 0
            if (sent + 0 < 12000) printf "%s%s", (n++ ? " " : ""), $4
        }'
}

# list_rooms PID: the rooms on this node, by LiveKit's log: ten, and how many more.
list_rooms() {
    journalctl -b -o cat "_PID=$1" 2> /dev/null | awk '
        match($0, /(starting RTC session|room closed)"?[^"]*"room": ?"([^"\\]|\\.)*"/) {
            name = substr($0, RSTART, RLENGTH)
            is_open = name ~ /^s/
            sub(/^[^:]*: ?/, "", name)
            if (name ~ /^"callready-/) next
            if (is_open) open[name]; else delete open[name]
        }
        END {
            for (name in open) if (++n <= 10) printf "%s%s", (n > 1 ? ", " : ""), name
            if (n > 10) printf " and %d more", n - 10
            if (!n) printf "none that the log names (livekit.logging.level)"
        }'
}

# serve_again: a deploy that told LiveKit to drain has not come to its restart (watch_drain).
serve_again() {
    local told
    read -r told 2> /dev/null < "$DRAINED" || return 0
    [ ! -d "/proc/$told" ] || [ "$(main_pid "$SFU")" != "$told" ] ||
        complain "LiveKit takes no new rooms until it restarts, which it does when its calls have ended, or deploy.drain is over; to have it serve at once (its calls reconnect once): systemctl kill -s KILL livekit-server"
}

# drain_egress SECONDS: wait for the recordings to end; those that are left then are ended, with complete
# files. It takes no new ones from now on, and is not started again before the restart that follows.
drain_egress() {
    local left="$1" count
    (umask 022 && mkdir -p "$RUN/callready")
    echo $$ > "$EGRESS_DRAINING"
    stop_taking_recordings
    # Whoever waited may go away: egress does not wait for what does not come then (finish).
    trap 'exit 141' PIPE
    say "waiting up to $left s for recordings to end; no new one starts"
    while [ "$left" -gt 0 ]; do
        count=$(pids_of recording | wc -l)
        [ "$count" != 0 ] || break
        [ $((left % 10)) != 0 ] || say "recordings that run: $count, $left s left"
        sleep 1
        left=$((left - 1))
    done
    # As long as an upload may take.
    end_recordings 60 1 || say "a recording does not end: what it has is kept when egress starts"
    eventually 20 0.5 is_egress_gone || : # by itself, after the last one
    trap - PIPE
}

is_egress_gone() { [ -z "$(pids_of init)" ]; }

# record_again: a deploy that drained egress has not come to its restart. Recordings that still run go on.
record_again() {
    rm -f "$EGRESS_DRAINING"
    systemctl start --no-block callready-egress.service
    [ -z "$(pids_of recording)" ] ||
        complain "egress takes new recordings when those that run have ended, which goes on; to end them now, with complete files: systemctl restart callready-egress"
}

# uninstall UNIT...: nothing of callready is left, the units it masked are not any more, and the
# packages it installed go if nothing else needs them.
uninstall() {
    local unit user version image file line
    [ "$(name_of current)" = none ] || fail "this host still has release $(name_of current)"
    sort -u "$STATE/images" 2> /dev/null | while read -r image; do remove_image "$image"; done
    ! grep -qsxF podman "$STATE/packages" || empty_storage
    sort -u "$STATE/subordinates" 2> /dev/null | while read -r file line; do
        sed -i "/^$line\$/d" "$file"
    done
    # shellcheck disable=SC2046 # a package is one word
    [ ! -s "$STATE/packages" ] || purge_packages $(sort -u "$STATE/packages")
    for unit; do unmask "$unit"; done
    sort -u "$STATE/users" 2> /dev/null | while read -r user; do remove_user "$user"; done
    systemctl disable --quiet callready-boot.service 2> /dev/null || :
    sort -u "$STATE/binaries" 2> /dev/null | while read -r version; do remove_program "$version"; done
    remove_own_folder "$LIVEKIT"
    remove_own_folder "$OWN"
    rm -rf "$PROGRAMS" "$ROOT" "$STATE" "$UNIT_FILES"/callready-boot.service \
        "$UNIT_FILES"/callready-revert.service "$RUN"/callready*
    systemctl daemon-reload
    say "nothing of callready is left on this host"
}

# empty_storage: of podman, which callready installed, unless somebody else has something in it.
empty_storage() {
    [ -z "$({ podman ps -aq && podman images -aq && podman volume ls -q; } 2>&1)" ] || return 0
    podman system reset --force > "$here/podman" 2>&1 || complain "$(tail -n 3 "$here/podman")"
    rm -rf --one-file-system "$CALLREADY_ROOT"/var/lib/containers/storage "$CALLREADY_ROOT"/var/lib/containers/cache || :
}

# unmask UNIT: if callready masked it (an older one has not noted that), and if its package is not one
# of callready's that stays and would start it.
unmask() {
    [ "$(readlink "$UNIT_FILES/$1")" = /dev/null ] || return 0
    if [ -e "$STATE/masks" ] && ! grep -qxF "$1" "$STATE/masks"; then
        say "$1 stays masked, as it was before"
    elif grep -qsxF "${1%.*}" "$STATE/packages" && dpkg-query -W "${1%.*}" > /dev/null 2>&1; then
        say "$1 stays masked, or its package would start it"
    else
        rm "$UNIT_FILES/$1"
    fi
}

# purge_packages NAME...: apt-get would take along what was installed since and needs them, and with
# certbot the certificates of others.
purge_packages() {
    local others renewal certbot='$^' # matches nothing
    for renewal in "$CALLREADY_ROOT"/etc/letsencrypt/renewal/*.conf; do
        [ ! -e "$renewal" ] || certbot='certbot|python3-certbot-.*'
    done
    others=$({
        apt-get -s purge "$@" 2> /dev/null < /dev/null | awk '$1 == "Purg" { print $2 }' |
            grep -vxF "$(printf '%s\n' "$@")"
        printf '%s\n' "$@" | grep -xE "$certbot"
    } || :)
    if [ -n "$others" ]; then
        say "packages stay, because $(printf %s "$others" | tr '\n' ' ') need them: $*"
        return
    fi
    say "removing $*"
    apt-get -q -y -o DPkg::Lock::Timeout=120 purge "$@" > "$here/apt.log" 2>&1 < /dev/null ||
        fail "apt-get purge failed: $(grep '^E:' "$here/apt.log" | tail -n 3)"
}

# remove_user NAME: one that callready created, whatever its list says.
remove_user() {
    case $(getent passwd -- "$1") in
        "$1":*:"$NO_HOME":/usr/sbin/nologin) userdel "$1" 2> /dev/null || : ;;
        ?*) complain "user '$1' stays: it is not one that callready created" ;;
    esac
}

# shellcheck source=/dev/null
. "$here/steps"
