# What a host is like now: run as root over stdin, prints one tab-separated line a fact, changes
# nothing. Its variables (FILES, PACKAGES, UNITS, ...) are set by callready/facts.py, one word an
# item. No secret is printed: contents only as SHA-256.
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
T=$(printf '\t')

system() {
    . /etc/os-release
    printf 'os\t%s\t%s\n' "$ID" "${VERSION_ID:-}"
    printf 'arch\t%s\n' "$(dpkg --print-architecture 2>/dev/null || uname -m)"
}

clock() {
    printf 'clock\t%s\n' "$(date +%s.%N)"
}

packages() {
    [ -n "$PACKAGES" ] || return 0
    installed=$(dpkg-query -W -f 'package\t${Package}\t${Version}\t${db:Status-Abbrev}\n' $PACKAGES 2>/dev/null |
        awk -F "$T" '$4 ~ /^.i/')
    [ -n "$installed" ] && printf '%s\n' "$installed"
    for package in $CANDIDATES; do
        # apt-cache is slow and what is installed is known.
        case $installed in *"package$T$package$T"*) continue ;; esac
        printf 'candidate\t%s\t%s\n' "$package" \
            "$(apt-cache policy "$package" 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')"
    done
}

users() {
    [ -z "$USERS" ] || getent passwd $USERS | sed 's/^\([^:]*\):.*/user\t\1/'
}

# The files of the running release and their live paths: what each path leads to, and its content.
files() {
    for link in current confirmed; do
        target=$(readlink /etc/callready/$link 2>/dev/null)
        printf '%s\t%s\n' "$link" "${target##*/}"
    done
    [ -e /var/lib/callready/pending ] && printf 'pending\t%s\t%s\n' \
        "$(cat /var/lib/callready/pending)" "$(systemctl is-active callready-dead-man.timer)"
    [ -d /var/lib/callready ] && printf 'left\n'
    [ -f /etc/callready/current/manifest ] && sed 's/^/manifest\t/' /etc/callready/current/manifest
    [ -n "$FILES" ] || return 0
    find $FILES -maxdepth 0 -printf 'link\t%p\t%l\n' 2>/dev/null
    find -L $FILES -maxdepth 0 -type f -printf 'stat\t%p\t%m\t%u\t%g\n' 2>/dev/null
    sha256sum $FILES 2>/dev/null | sed "s/^\([0-9a-f]*\)  \(.*\)/sha$T\2$T\1/"
}

units() {
    systemctl show -p Id,LoadState,ActiveState,UnitFileState,MainPID,NeedDaemonReload $UNITS |
        awk -v RS= -F '\n' '{
            split("", p); for (i = 1; i <= NF; i++) { eq = index($i, "="); p[substr($i, 1, eq - 1)] = substr($i, eq + 1) }
            print p["Id"], p["LoadState"], p["ActiveState"], p["UnitFileState"] ? p["UnitFileState"] : "-", p["MainPID"] + 0, p["NeedDaemonReload"]
        }' | while read -r id load active enabled pid reload; do
            fingerprint=- binary=- given=
            if [ "$pid" -gt 0 ]; then
                fingerprint=$(tr '\0' '\n' < "/proc/$pid/environ" 2>/dev/null | sed -n 's/^CALLREADY_FINGERPRINT=//p')
                binary=$(readlink "/proc/$pid/exe")
                given=$(sha256sum "/run/credentials/$id"/* 2>/dev/null | cut -c 1-64 | sort)
                [ -e "/run/callready/$id" ] && read -r fingerprint < "/run/callready/$id"
            fi
            printf 'unit\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$id" "$load" "$active" "$enabled" \
                "$pid" "$reload" "${fingerprint:--}" "${binary:--}" "$(printf %s "$given" | tr '\n' ' ')"
        done
}

# Every listening socket with the unit of its process, and the port this connection came in by.
listeners() {
    found=$(ss -Hlntup)
    # A socket that is opened while ss looks for its process seems to have none, as happens to
    # relays under load: only what has none twice has none.
    unknown=$(printf '%s\n' "$found" | awk 'NF && !/users:/ { printf "%s/%s ", $1, $5 }')
    [ -z "$unknown" ] || found=$(ss -Hlntup |
        awk -v unknown=" $unknown" '/users:/ || index(unknown, " " $1 "/" $5 " ")')
    printf '%s\n' "$found" | awk -v OFS="$T" '
        function unit_of(pid,  file, line) {
            if (pid == "-" || pid in unit) return pid in unit ? unit[pid] : "-"
            file = "/proc/" pid "/cgroup"; unit[pid] = "-"
            while ((getline line < file) > 0)
                if (line ~ /^0::/ && match(line, /[^\/]+\.(service|scope|socket)/))
                    unit[pid] = substr(line, RSTART, RLENGTH)
            close(file)
            return unit[pid]
        }
        NF {
            pid = match($0, /pid=[0-9]+/) ? substr($0, RSTART + 4, RLENGTH - 4) : "-"
            name = match($0, /\(\("[^"]+"/) ? substr($0, RSTART + 3, RLENGTH - 4) : "-"
            port = $5; sub(/.*:/, "", port)
            address = substr($5, 1, length($5) - length(port) - 1)
            sub(/%.*/, "", address); gsub(/[][]/, "", address)
            if (!seen[$1, address, port, pid]++) print "listen", $1, address, port, name, unit_of(pid)
        }'
    [ -n "$SSH_PORT" ] && printf 'ssh\t%s\n' "$SSH_PORT"
    return 0
}

filters() {
    command -v nft > /dev/null && nft list ruleset 2>/dev/null | awk '
        $1 == "table" { family = $2; name = $3; print "table\t" family "\t" name }
        /type nat hook/ { print "nat\t" family "\t" name }' | sort -u
    # What load-firewall noted, as long as the table is still what it loaded.
    if read -r source table 2>/dev/null < /run/callready-firewall; then
        now=$(nft list table inet callready 2>/dev/null | sed -E 's/ packets [0-9]+ bytes [0-9]+//' | sha256sum)
        [ "$table" = "${now%% *}" ] || source=changed
        printf 'ruleset\t%s\n' "$source"
    fi
    # Its unit says nothing: `ufw enable` leaves it inactive until the next boot.
    grep -qs '^ENABLED=yes' /etc/ufw/ufw.conf && printf 'firewall\tufw\n'
    return 0
}

sysctls() {
    for key in $SYSCTLS; do
        path=/proc/sys/$(printf %s "$key" | tr . /)
        if [ -w "$path" ]; then
            printf 'sysctl\t%s\t%s\n' "$key" "$(cat "$path")"
        else
            printf 'sysctl\t%s\t-\n' "$key"
        fi
    done
}

# State that lives beside the releases: secret rows, the certificate, the app's environment.
state() {
    for database in $DATABASES; do
        [ -f "$database" ] && command -v sqlite3 > /dev/null || continue
        printf 'database\t%s\n' "$database"
        sqlite3 -readonly -separator "$T" "$database" \
            'select "turn_secret", realm, value from turn_secret;
             select "turnusers_lt", realm, name || ":" || hmackey from turnusers_lt;' |
            while IFS= read -r row; do
                printf 'row\t%s\t%s\n' "$database" "$(printf %s "$row" | sha256sum | cut -c1-16)"
            done
    done
    for pair in /etc/callready/tls/*/current; do
        [ -L "$pair" ] || continue
        name=${pair%/current}
        printf 'pair\t%s\t%s\t%s\t%s\n' "${name##*/}" \
            "$(cat "$pair/fullchain.pem" "$pair/privkey.pem" | sha256sum | cut -c1-16)" \
            "$(openssl x509 -noout -serial -in "$pair/fullchain.pem" | sed 's/.*=0*//' | tr A-F a-f)" \
            "$(cat "$name/asked" 2>/dev/null)" # as certbot was asked for it
    done
    for item in $ENVIRONMENTS; do # path:KEY,KEY
        path=${item%%:*} keys=$(printf %s "${item#*:}" | tr , '|')
        [ ! -L "$path" ] || printf 'linked\t%s\n' "$path"
        [ -f "$path" ] || continue
        printf 'environment\t%s\t%s\t%s\t%s\n' "$path" "$(stat -L -c "%a$T%U" "$path")" \
            "$(grep -E "^($keys)=" "$path" | sort | sha256sum | cut -c1-64)" \
            "$(cat "/var/lib/callready/environment/$(printf %s "$path" | tr / _)" 2>/dev/null)"
    done
    for binary in $BINARIES; do
        [ -x "$binary" ] && printf 'binary\t%s\n' "$binary"
    done
    return 0
}

# The certificate that callers get now, whatever lies in the file.
served() {
    for item in $TLS_ENDPOINTS; do # address:port,name
        printf 'served\t%s\t%s\t%s\n' "${item%,*}" "${item#*,}" "$(timeout 3 openssl s_client \
            -no-CAfile -no-CApath -no-CAstore -connect "${item%,*}" -servername "${item#*,}" 2>/dev/null |
            openssl x509 -noout -serial 2>/dev/null | sed 's/.*=0*//' | tr A-F a-f)"
    done
}

survey() {
    exec 3>&1
    clock
    # Handshakes take their time while the rest is read; apart, so that no line is torn.
    tls=$(served & { system; packages; users; files; units; listeners; filters; sysctls; state; } >&3; wait)
    [ -n "$tls" ] && printf '%s\n' "$tls"
    clock
    printf 'end\n'
}
survey < /dev/null
