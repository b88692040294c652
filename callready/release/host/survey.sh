# shellcheck shell=dash
# What a host is like now: run as root over stdin, prints one tab-separated line a fact, changes
# nothing. Its variables (FILES, PACKAGES, UNITS, ...) are set by callready/release/facts.py, one
# word an item; `parse` there reads the lines, whose columns are named here before what prints them.
# No secret is printed: contents only as SHA-256.

# os ID VERSION / arch ARCHITECTURE
print_system() {
    # shellcheck source=/dev/null
    . /etc/os-release
    printf 'os\t%s\t%s\n' "$ID" "${VERSION_ID:-}"
    printf 'arch\t%s\n' "$(dpkg --print-architecture 2> /dev/null || uname -m)"
}

# clock SECONDS: when the survey begins and when it ends.
print_clock() { printf 'clock\t%s\n' "$(date +%s.%N)"; }

# package NAME VERSION STATUS / candidate NAME VERSION
print_packages() {
    local installed package
    [ -n "$PACKAGES" ] || return 0
    # shellcheck disable=SC2086 # words
    installed=$(dpkg-query -W -f 'package\t${Package}\t${Version}\t${db:Status-Abbrev}\n' $PACKAGES 2> /dev/null |
        awk -F "$T" '$4 ~ /^.i/')
    [ -z "$installed" ] || printf '%s\n' "$installed"
    for package in $CANDIDATES; do
        # apt-cache is slow and what is installed is known.
        case $installed in *"package$T$package$T"*) continue ;; esac
        printf 'candidate\t%s\t%s\n' "$package" \
            "$(apt-cache policy "$package" 2> /dev/null | awk '$1 == "Candidate:" { print $2 }')"
    done
}

# user NAME
print_users() {
    # shellcheck disable=SC2086 # words
    [ -z "$USERS" ] || getent passwd $USERS | sed 's/^\([^:]*\):.*/user\t\1/'
}

# current RELEASE / confirmed RELEASE / left (there is something of callready) / format N / pending
# WORDS ACTIVE (the file as it is, and whether the timer runs that ends the wait) / manifest LINE... /
# template PATH DIGEST (what each file of the release was made from; not in format 1)
print_releases() {
    local link target format
    for link in current confirmed; do
        target=$(readlink "$ROOT/$link")
        printf '%s\t%s\n' "$link" "${target##*/}"
    done
    [ ! -d "$STATE" ] || printf 'left\n'
    read -r format 2> /dev/null < "$STATE/format" && printf 'format\t%s\n' "$format"
    [ ! -e "$STATE/pending" ] || printf 'pending\t%s\t%s\n' \
        "$(cat "$STATE/pending")" "$(systemctl is-active callready-dead-man.timer)"
    [ ! -f "$ROOT/current/manifest" ] || sed 's/^/manifest\t/' "$ROOT/current/manifest"
    [ ! -f "$ROOT/current/templates" ] || sed 's/^/template\t/' "$ROOT/current/templates"
}

# link PATH TARGET (or nothing) / stat PATH MODE OWNER GROUP / sha PATH SHA256: each live path of a
# release, what it leads to, and what is there.
print_files() {
    [ -n "$FILES" ] || return 0
    # shellcheck disable=SC2086 # words
    {
        find $FILES -maxdepth 0 -printf 'link\t%p\t%l\n'
        find -L $FILES -maxdepth 0 -type f -printf 'stat\t%p\t%m\t%u\t%g\n'
        sha256sum $FILES | sed "s/^\([0-9a-f]*\)  \(.*\)/sha$T\2$T\1/"
    } 2> /dev/null
}

# unit ID LOAD ACTIVE ENABLED PID RELOAD FINGERPRINT BINARY CREDENTIALS: RELOAD, whether its files
# have changed since systemd read them; the last three are of its process, as the manifest has them.
print_units() {
    local property value id='' load='' active='' enabled='' pid=0 reload=''
    {
        # shellcheck disable=SC2086 # words
        systemctl show -p Id,LoadState,ActiveState,UnitFileState,MainPID,NeedDaemonReload $UNITS
        echo # as between two units
    } | while IFS='=' read -r property value; do
        case $property in
            Id) id=$value ;;
            LoadState) load=$value ;;
            ActiveState) active=$value ;;
            UnitFileState) enabled=$value ;;
            MainPID) pid=$value ;;
            NeedDaemonReload) reload=$value ;;
            "")
                [ -z "$id" ] || print_unit "$id" "$load" "$active" "${enabled:--}" "$pid" "$reload"
                id='' enabled='' pid=0
                ;;
        esac
    done
}

print_unit() { # ID LOAD ACTIVE ENABLED PID RELOAD
    local fingerprint='' binary='' credentials=-
    if [ "$5" -gt 0 ]; then
        fingerprint=$(fingerprint_of "$1" "$5")
        binary=$(readlink "/proc/$5/exe")
        credentials=$(credentials_of "$1")
    fi
    printf 'unit\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$@" \
        "${fingerprint:--}" "${binary:--}" "$credentials"
}

# listen PROTO ADDRESS PORT PROCESS UNIT: every listening socket / ssh PORT: by which this came in.
print_listeners() {
    local found unknown
    found=$(ss -Hlntup)
    # A socket that is opened while ss looks for its process seems to have none, as happens to
    # relays under load: only what has none twice has none.
    unknown=$(printf '%s\n' "$found" | awk 'NF && !/users:/ { printf "%s/%s ", $1, $5 }')
    [ -z "$unknown" ] || found=$(ss -Hlntup |
        awk -v unknown=" $unknown" '/users:/ || index(unknown, " " $1 "/" $5 " ")')
    # PROTO STATE QUEUE QUEUE LOCAL:PORT PEER:PORT users:(("NAME",pid=PID,fd=N),...)
    printf '%s\n' "$found" | awk -v OFS="$T" '
        function unit_of(pid,  file, line) {
            if (pid in unit) return unit[pid]
            file = "/proc/" pid "/cgroup"; unit[pid] = "-"
            while ((getline line < file) > 0)
                if (line ~ /^0::/ && match(line, /[^\/]+\.(service|scope|socket)/))
                    unit[pid] = substr(line, RSTART, RLENGTH)
            close(file)
            return unit[pid]
        }
        function part(pattern, before, after) {
            return match($0, pattern) ? substr($0, RSTART + before, RLENGTH - before - after) : "-"
        }
        BEGIN { unit["-"] = "-" }
        NF {
            name = part("\\(\\(\"[^\"]+\"", 3, 1)
            pid = part("pid=[0-9]+", 4, 0)
            address = port = $5
            sub(/.*:/, "", port); sub(/:[^:]*$/, "", address)
            sub(/%.*/, "", address); gsub(/[][]/, "", address)
            if (!seen[$1, address, port, pid]++) print "listen", $1, address, port, name, unit_of(pid)
        }'
    [ -z "${SSH_PORT:-}" ] || printf 'ssh\t%s\n' "$SSH_PORT"
}

# address ADDRESS: of each interface.
print_addresses() { ip -o address | awk -v OFS="$T" '{ sub("/.*", "", $4); print "address", $4 }'; }

# table FAMILY NAME / nat FAMILY NAME: nftables' / ruleset SHA256|changed: the file that is loaded /
# firewall ufw
print_filters() {
    local loaded table now
    command -v nft > /dev/null && nft list ruleset 2> /dev/null | awk -v OFS="$T" '
        $1 == "table" { table = $2 OFS $3; print "table", table }
        /type nat hook/ && !seen[table]++ { print "nat", table }'
    # What load-firewall noted, as long as the table is still what it loaded.
    if read -r loaded table 2> /dev/null < "$RUN/callready-firewall"; then
        now=$(nft -stp list table inet callready 2> /dev/null | sha256sum)
        [ "$table" = "${now%% *}" ] || loaded=changed
        printf 'ruleset\t%s\n' "$loaded"
    fi
    # Its unit says nothing: `ufw enable` leaves it inactive until the next boot.
    ! grep -qs '^ENABLED=yes' /etc/ufw/ufw.conf || printf 'firewall\tufw\n'
}

# sysctl KEY VALUE|- / elsewhere KEY VALUE FILE: what it would be without callready: as the last file
# of sysctl.d(5) that has it says, else as it was before callready, else as it is
print_sysctls() {
    local key path now all before='' file=$CALLREADY_ROOT/etc/sysctl.d/60-callready.conf newline='
'
    [ -n "$SYSCTLS" ] || return 0
    # shellcheck disable=SC2046 # words
    set -- $(printf ' %s' "$SYSCTLS" | tr . / | sed 's| | /proc/sys/|g')
    all=$(grep -Hs '' "$@") # the kernel gives a value to one read(2) only, which the shell's is not
    for key in $SYSCTLS; do
        path=$1
        shift
        now=${all#*"$path:"}
        [ "$now" != "$all" ] || now=
        now=${now%%"$newline"*}
        [ -e "$file" ] || before="$before$key = $now$newline"
        [ -w "$path" ] || now=-
        printf 'sysctl\t%s\t%s\n' "$key" "$now"
    done
    {
        printf '# - \n%s' "$before"
        [ ! -e "$ROOT/before/sysctl" ] || cat "$ROOT/before/sysctl"
        echo
        # Each file behind a comment with its path.
        /usr/lib/systemd/systemd-sysctl --cat-config 2> /dev/null
    } | awk -v OFS="$T" -v keys=" $SYSCTLS " -v ours="$file" '
        /^# [\/-]/ { file = $2; next }
        file == ours || /^[ \t]*[#;]/ || !match($0, /=/) { next }
        {
            key = substr($0, 1, RSTART - 1); value = substr($0, RSTART + 1)
            gsub(/^[ \t]*-?|[ \t]*$/, "", key); gsub(/^[ \t]*|[ \t]*$/, "", value)
            # With slashes a dot is part of a name.
            if (match(key, /[.\/]/) && substr(key, RSTART, 1) == "/") gsub(/\//, ".", key)
            if (index(keys, " " key " ")) found[key] = value OFS file
        }
        END { for (key in found) print "elsewhere", key, found[key] }'
}

# database PATH / row PATH HASH: of our realms. coturn cannot write what readers share (-shm), so it
# may find none there but a survey; one that could write would begin by locking it, and coturn would
# refuse a caller (401) who comes at that moment. Hence readonly_shm (sqlite.org/uri.html).
print_databases() {
    local item database realms row as
    command -v sqlite3 > /dev/null || return 0
    for item in $DATABASES; do # PATH:REALM,REALM
        database=${item%%:*} realms="'$(printf %s "${item#*:}" | sed "s/,/','/g")'"
        [ -f "$database" ] || continue
        printf 'database\t%s\n' "$database"
        as=''
        [ ! -e "$database-shm" ] || as='?readonly_shm=1'
        sqlite3 -readonly -separator "$T" "file:$database$as" \
            "select 'turn_secret', realm, value from turn_secret where realm in ($realms);
             select 'turnusers_lt', realm, name || ':' || hmackey from turnusers_lt
             where realm in ($realms);" |
            while IFS= read -r row; do
                printf 'row\t%s\t%.16s\n' "$database" "$(printf %s "$row" | sha256sum)"
            done
    done
}

# pair NAME HASH SERIAL ASKED: a certificate and its key, and as what certbot was asked for it.
print_pairs() {
    local pair
    for pair in "$ROOT"/tls/*; do
        [ -L "$pair/current" ] || continue
        printf 'pair\t%s\t%.16s\t%s\t%s\n' "${pair##*/}" \
            "$(cat "$pair/current/fullchain.pem" "$pair/current/privkey.pem" | sha256sum)" \
            "$(read_serial < "$pair/current/fullchain.pem")" \
            "$(cat "$pair/asked" 2> /dev/null)"
    done
}

# identity KIND HAS_KEY DER: a certificate of the fleet's authority / outdated UNIT
print_identities() {
    local folder has_key
    for folder in "$ROOT"/fleet/*; do
        [ -L "$folder" ] || continue
        has_key=no
        [ ! -e "$folder/both.pem" ] || [ "$(openssl x509 -noout -pubkey -in "$folder/cert.pem" 2> /dev/null)" != "$(openssl pkey -pubout -in "$folder/key.pem" 2> /dev/null)" ] ||
            has_key=yes
        printf 'identity\t%s\t%s\t%s\n' "${folder##*/}" "$has_key" \
            "$(openssl x509 -outform DER -in "$folder/cert.pem" 2> /dev/null | base64 -w 0)"
    done
    list_outdated | sed 's/^/outdated\t/'
}

# environment PATH MODE OWNER SHA256 APPLIED: of the lines by which its readers have our keys, and of
# what they have / obstacle PATH KIND WORDS: also of the way that it is written
print_environments() {
    local item path marked newline='
'
    for item in $ENVIRONMENTS; do # PATH:KEY,KEY
        path=${item%%:*}
        [ -d "${path%/*}" ] ||
            printf 'obstacle\t%s\tmissing\tcannot be there: %s does not exist\n' "$path" "${path%/*}"
        [ ! -L "$path" ] || printf 'obstacle\t%s\tlink\tis a symbolic link\n' "$path"
        [ -f "$path" ] || continue
        marked=$(mark_lines "${item#*:}" < "$path")
        printf 'environment\t%s\t%s\t%.64s\t%s\n' "$path" "$(stat -L -c "%a$T%U" "$path")" \
            "$(printf '%s\n' "$marked" | effective_lines | sort | sha256sum)" \
            "$(cat "$(applied_note "$path")" 2> /dev/null)"
        marked=${marked##*"$newline"}
        marked=${marked%"$T"}
        case $marked in
            !*) printf 'obstacle\t%s\tunclosed\topens a quote in line %s that nothing closes\n' "$path" "${marked#!}" ;;
        esac
    done
}

# obstacle PATH KIND WORDS: what keeps a file from being put there
print_obstacles() {
    local found unit="$CALLREADY_ROOT/etc/systemd/system/callready"
    # shellcheck disable=SC2086 # words
    found=$(obstacles $PLACES "$ROOT/current" "$STATE/pending" "$unit-revert.service" "$unit-boot.service" \
        "$CALLREADY_ROOT/usr/local/lib/callready/release")
    [ -z "$found" ] || printf '%s\n' "$found" | sed 's/^/obstacle\t/'
}

# binary PATH
print_binaries() {
    local binary
    for binary in $BINARIES; do
        [ ! -x "$binary" ] || printf 'binary\t%s\n' "$binary"
    done
}

# image NAME@DIGEST / subordinate FILE LINE: of subuid(5) and subgid(5) / cores N
print_containers() {
    local image file
    [ -n "$IMAGES" ] || return 0
    for file in subuid subgid; do
        [ ! -e "/etc/$file" ] || sed "s/^/subordinate$T$file$T/" "/etc/$file"
    done
    printf 'cores\t%s\n' "$(nproc)"
    command -v podman > /dev/null || return 0
    for image in $IMAGES; do
        ! podman image exists "$image" 2> /dev/null || printf 'image\t%s\n' "$image"
    done
}

# served ENDPOINT NAME SERIAL
print_served() {
    local item
    for item in $TLS_ENDPOINTS; do # ADDRESS:PORT,NAME
        printf 'served\t%s\t%s\t%s\n' "${item%,*}" "${item#*,}" "$(ask_serial "${item%,*}" "${item#*,}")"
    done
}

# redis SECONDS: to the Redis of its SFU
print_redis() {
    local address
    [ -n "$REDIS" ] || return 0
    address=$(getent ahosts "${REDIS% *}" | sed -n '1s/ .*//p')
    seconds_to "$address" "${REDIS#* }" | sed "s/^/redis$T/"
}

# recordings COUNT: that run now / held FREE LIMIT: egress starts none, for want of room (bytes)
print_recordings() {
    local free limit
    [ -d "$RECORDINGS" ] || return 0
    printf 'recordings\t%s\n' "$(pids_of recording | wc -l)"
    ! read -r free _ limit 2> /dev/null < "$EGRESS_FULL" || printf 'held\t%s\t%s\n' "$free" "$limit"
}

print_all() {
    print_system
    print_packages
    print_users
    print_releases
    print_files
    print_units
    print_listeners
    print_addresses
    print_filters
    print_sysctls
    print_databases
    print_pairs
    print_identities
    print_environments
    print_obstacles
    print_binaries
    print_containers
    print_redis
    print_recordings
}

# Handshakes take their time while the rest is read; apart, so that no line is torn.
survey() {
    local served
    print_clock
    exec 3>&1
    served=$(
        print_served &
        print_all >&3
        wait
    )
    [ -z "$served" ] || printf '%s\n' "$served"
    print_clock
    printf 'end\n'
}
survey < /dev/null
