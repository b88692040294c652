# shellcheck shell=dash
# What about a host's own state can keep calls from connecting, now or after the next start: run as
# root over stdin behind release/host/common.sh, prints one tab-separated line a fact, changes
# nothing. Its variables (UNITS, READS, ...) are set by callready/diagnosis/inspection.py, one word an
# item; `parse` there reads the lines. Of secrets only whether they fit is printed.

# unit ID PROPERTY VALUE
print_units() {
    # shellcheck disable=SC2086 # words
    systemctl show --no-pager -p Id,LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts \
        -p MainPID,ActiveEnterTimestampMonotonic,FragmentPath,DropInPaths,ControlGroup,FreezerState \
        -p EnvironmentFiles,CPUQuotaPerSecUSec,CPUWeight,MemoryMax,MemoryHigh,TasksMax,LimitNOFILE,IPAddressDeny,NextElapseUSecRealtime $UNITS |
        awk -v OFS="$T" '
            function flush(  n) { for (n = 1; n <= count; n++) print "unit", id, line[n]; count = 0 }
            NF == 0 { flush(); next }
            { at = index($0, "="); key = substr($0, 1, at - 1); value = substr($0, at + 1) }
            key == "Id" { id = value }
            { line[++count] = key OFS value }
            END { flush() }'
}

# dropin PATH LINE: of drop-ins that are not callready's, and of files with variables their names alone
print_dropins() {
    local path
    # shellcheck disable=SC2086 # words
    for path in $(systemctl show -P DropInPaths $UNITS | tr ' ' '\n' | sort -u); do
        case $path in */callready.conf | "") continue ;; esac
        sed "s|^|dropin$T$path$T|" "$path"
    done
    # shellcheck disable=SC2086 # words
    for path in $(systemctl show -P EnvironmentFiles $UNITS | sed -n 's|^-*\(/[^ ]*\).*|\1|p' | sort -u); do
        sed -n "s|^[ $T]*\([A-Za-z_][A-Za-z0-9_]*\)=.*|dropin$T$path$T\1=…|p" "$path" 2> /dev/null
    done
}

# process PID UNIT STATE NICE POLICY CPUS FILES FILES_MAX: each process of a unit; CPUS, how many it
# may use / frozen UNIT / replaced UNIT: its main process has another binary than the path of that / limit
# UNIT FILE VALUE: of its control groups, also those around it
print_processes() {
    local unit group pid state files most cpus rest name
    for unit in $UNITS; do
        group=$(systemctl show -P ControlGroup "$unit")
        [ -n "$group" ] && [ -d "/sys/fs/cgroup$group" ] || continue
        # The main one alone: others come and go while they are looked at.
        pid=$(systemctl show -P MainPID "$unit")
        [ ! -e "/proc/$pid/exe" ] || [ "/proc/$pid/exe" -ef "$(readlink "/proc/$pid/exe")" ] ||
            printf 'replaced\t%s\n' "$unit"
        ! grep -qs '^frozen 1' "/sys/fs/cgroup$group/cgroup.events" || printf 'frozen\t%s\n' "$unit"
        # shellcheck disable=SC2013 # a number a line
        for pid in $(cat "/sys/fs/cgroup$group/cgroup.procs" "/sys/fs/cgroup$group"/*/cgroup.procs 2> /dev/null); do
            rest=$(sed 's/.*) //' "/proc/$pid/stat" 2> /dev/null) || continue
            state=$(printf '%s\n' "$rest" | awk -v OFS="$T" '{ print $1, $17, $39 }')
            cpus=$(taskset -p "$pid" 2> /dev/null | sed 's/.*: //')
            # shellcheck disable=SC2012 # names are numbers
            files=$(ls "/proc/$pid/fd" 2> /dev/null | wc -l)
            most=$(awk '/^Max open files/ { print $4 }' "/proc/$pid/limits" 2> /dev/null)
            printf 'process\t%s\t%s\t%s\t%s\t%s\t%s\n' "$pid" "$unit" "$state" "${cpus:--}" "$files" "${most:--}"
        done
        until [ "${group:=/}" = / ]; do
            for name in cpu.max memory.max memory.high pids.max cpu.weight; do
                [ ! -r "/sys/fs/cgroup$group/$name" ] ||
                    printf 'limit\t%s\t%s\t%s\n' "$unit" "$group/$name" "$(cat "/sys/fs/cgroup$group/$name")"
            done
            group=${group%/*}
        done
    done
    printf 'cpus\t%s\n' "$(taskset -p 1 2> /dev/null | sed 's/.*: //')"
}

# target UNIT: what is booted into / clock UPTIME EPOCH / start UNIT EPOCH: each start of a unit in the last half hour
# deploy TIME: when a release was confirmed, or returned to
print_starts() {
    printf 'target\t%s\n' "$(systemctl get-default)"
    printf 'clock\t%s\t%s\n' "$(cut -d ' ' -f 1 /proc/uptime)" "$(date +%s)"
    tail -n 60 /var/lib/callready/history 2> /dev/null | sed -n "s/^\([0-9T:-]*Z\)$T.*/deploy$T\1/p"
    journalctl -q --no-pager --since -30min -o json --output-fields=UNIT \
        MESSAGE_ID=39f53479d3a045ac8e11786248231fbf 2> /dev/null | sed -n \
        "s/.*\"__REALTIME_TIMESTAMP\"[ ]*:[ ]*\"\([0-9]*\)[0-9]\{6\}\".*\"UNIT\"[ ]*:[ ]*\"\([^\"]*\)\".*/start$T\2$T\1/p
         t
         s/.*\"UNIT\"[ ]*:[ ]*\"\([^\"]*\)\".*\"__REALTIME_TIMESTAMP\"[ ]*:[ ]*\"\([0-9]*\)[0-9]\{6\}\".*/start$T\1$T\2/p"
}

# exposure UNIT SCORE / said UNIT LINE: of its start / given UNIT NAME SHA256: its credentials / version
# PATH WORDS: what programs say that they are
print_services() {
    local unit id path
    for unit in $SERVICES; do
        printf 'exposure\t%s\t%s\n' "$unit" "$(systemd-analyze security --no-pager "$unit" 2> /dev/null |
            sed -n '$s/.*: \([0-9.]*\) .*/\1/p')" &
    done
    wait # so that no line is written into another
    for unit in $SERVICES; do
        id=$(systemctl show -P InvocationID "$unit")
        journalctl --no-pager -q -o cat _SYSTEMD_INVOCATION_ID="$id" + INVOCATION_ID="$id" 2> /dev/null |
            head -n 400 | tr "$T" ' ' | sed "s|^|said$T$unit$T|"
        for path in "/run/credentials/$unit"/*; do
            [ ! -f "$path" ] || printf 'given\t%s\t%s\t%s\n' "$unit" "${path##*/}" "$(sha256sum < "$path" | cut -d ' ' -f 1)"
        done
    done
    for path in $PROGRAMS; do
        printf 'version\t%s\t%s\n' "$path" "$("$path" --version 2> /dev/null | head -n 1)"
    done
}

# read UNIT USER PATH yes|no|missing MODE: whether the user opens it; MODE, of the first part of the
# way that it cannot pass, and whose it is
print_reads() {
    local item unit user path answer blocked part how
    for item in $READS; do # UNIT,USER,PATH
        unit=${item%%,*} path=${item#*,}
        user=${path%%,*} path=${path#*,}
        answer=yes blocked='' how=-r
        case $path in /opt/* | /usr/*) how=-x ;; esac
        if [ ! -e "$path" ]; then
            answer=missing
        elif [ "$user" != root ] &&
            ! setpriv --reuid "$user" --regid "$user" --init-groups test "$how" "$path" 2> /dev/null; then
            answer=no part=$path blocked=$(stat -L -c '%A %U:%G %n' "$path")
            while part=${part%/*} && [ -n "$part" ]; do
                setpriv --reuid "$user" --regid "$user" --init-groups test -x "$part" 2> /dev/null ||
                    blocked=$(stat -L -c '%A %U:%G %n' "$part")
            done
        fi
        printf 'read\t%s\t%s\t%s\t%s\t%s\n' "$unit" "$user" "$path" "$answer" "$blocked"
    done
}

# pair NAME FITS END ISSUED: whether key and certificate belong together; when it ends
print_pairs() {
    local pair end
    for pair in "$ROOT"/tls/*; do
        [ -L "$pair/current" ] || continue
        end=$(openssl x509 -noout -enddate -in "$pair/current/fullchain.pem" 2> /dev/null)
        printf 'pair\t%s\t%s\t%s\n' "${pair##*/}" \
            "$([ "$(openssl x509 -noout -pubkey -in "$pair/current/fullchain.pem" 2>&1)" = \
                "$(openssl pkey -pubout -in "$pair/current/privkey.pem" 2> /dev/null)" ] && echo yes || echo no)" \
            "$(date -d "${end#*=}" +%s 2> /dev/null || echo 0)"
    done
}

# rule +|- LINE: of table inet callready: more and less than its file says / ruleset JSON / text
# FAMILY TABLE HANDLE RULE / xtables FAMILY PROGRAM LINE
print_filters() {
    local folder family
    command -v nft > /dev/null || return 0
    if [ -f "$ROOT/nftables.conf" ]; then
        folder=$(mktemp -d)
        # In a network of its own the file makes the table that there should be.
        unshare -n sh -c "nft -f '$ROOT/nftables.conf' && nft -stp list table inet callready" > "$folder/wanted" 2> /dev/null
        nft -stp list table inet callready > "$folder/found" 2> /dev/null || : > "$folder/found"
        [ ! -s "$folder/wanted" ] || diff "$folder/wanted" "$folder/found" |
            sed -n "s/^>[ $T]*/rule$T+$T/p; s/^<[ $T]*/rule$T-$T/p"
        rm -r "$folder"
    fi
    printf 'ruleset\t%s\n' "$(nft -j list ruleset 2> /dev/null | tr -d '\n')"
    nft -atn list ruleset 2> /dev/null | awk -v OFS="$T" '
        $1 == "table" { table = $2 OFS $3 }
        match($0, / # handle [0-9]+$/) && !/\{ #/ {
            handle = substr($0, RSTART + 10); sub(/ # handle [0-9]+$/, ""); sub(/^[ \t]+/, "")
            print "text", table, handle, $0
        }'
    for family in 4 6; do
        set -- iptables-nft-save iptables-legacy-save
        [ $family = 4 ] || set -- ip6tables-nft-save ip6tables-legacy-save
        while [ $# -gt 0 ]; do
            # What it has without a table in use only loads modules.
            ! command -v "$1" > /dev/null || "$1" -c 2> /dev/null | sed "s/^/xtables$T$family$T$1$T/"
            shift
        done
    done
}

# ssh USER KEY VALUE: also of a Match block about whom, not from where / sshfile PATH
print_ssh() {
    local user
    command -v sshd > /dev/null || return 0
    for user in root ${SUDO_USER:-}; do
        sshd -T -C "user=$user,host=caller.invalid,addr=192.0.2.1" 2> /dev/null |
            sed -n "s/^\(passwordauthentication\|kbdinteractiveauthentication\|permitrootlogin\|permitemptypasswords\) /ssh$T$user$T\1$T/p"
    done
    awk -v OFS="$T" '
        FNR == 1 { of = "" }
        tolower($1) == "match" { of = tolower($0) ~ /address|host/ ? "" : $0; gsub(/[ \t]+/, " ", of) }
        of && tolower($1) ~ /^(password|kbdinteractive)authentication$/ { print "ssh", of, tolower($1), tolower($2) }
    ' /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*.conf 2> /dev/null
    grep -Eils '^[[:space:]]*(PasswordAuthentication|KbdInteractiveAuthentication|ChallengeResponseAuthentication|PermitRootLogin|PermitEmptyPasswords)[[:space:]=]' \
        /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*.conf | sed "s/^/sshfile$T/"
}

# disk PATH TYPE BLOCK_SIZE BLOCKS FREE INODES INODES_FREE rw|ro: where services write
print_disks() {
    local path
    for path in / /etc /var /var/lib /var/log /var/lib/turn /var/lib/callready /var/lib/callready-* /run /tmp; do
        [ -d "$path" ] || continue
        printf 'disk\t%s\t%s\t%s\n' "$path" "$(stat -f -c "%T$T%S$T%b$T%a$T%c$T%d" "$path")" \
            "$(findmnt -n -o OPTIONS -T "$path" | tail -n 1 | cut -d , -f 1)"
    done
}

# kernel KEY VALUE
print_kernel() {
    # The kernel gives a value to one read(2) only.
    # shellcheck disable=SC2046 # words
    grep -Hs '' $(printf ' %s' "$KERNEL" | tr . / | sed 's| | /proc/sys/|g') \
        /proc/sys/net/ipv[46]/conf/*/disable_ipv6 /proc/sys/net/ipv4/conf/*/rp_filter \
        /proc/sys/net/netfilter/nf_conntrack_count |
        sed "s|^/proc/sys/\([^:]*\):|kernel$T\1$T|"
}

# sockets FIRST-LAST COUNT: UDP sockets whose port is in a relay range
print_sockets() {
    local range
    for range in $RANGES; do
        printf 'sockets\t%s\t%s\n' "$range" "$(ss -Huan "( sport >= :${range%-*} and sport <= :${range#*-} )" | wc -l)"
    done
}

# links, routes, rules, qdiscs: JSON of ip(8) and tc(8) / tcfilter DEVICE LINE / way ADDRESS RESULT:
# how packets go to PEERS / neighbour ADDRESS LINE: that somebody has set / xfrm POLICY: that blocks
print_network() {
    local peer device
    printf 'links\t%s\n' "$(ip -j -d address show | tr -d '\n')"
    printf 'routes\t%s\n' "$({
        ip -j -4 route show table all
        ip -j -6 route show table all
    } | tr -d '\n')"
    printf 'rules\t%s\n' "$({
        ip -j -4 rule
        ip -j -6 rule
    } | tr -d '\n')"
    printf 'qdiscs\t%s\n' "$(tc -j qdisc show 2> /dev/null | tr -d '\n')"
    for device in $(ip -o link | awk -F ": " "{ print \$2 }" | sed "s/@.*//" | grep -v "^lo\$"); do
        tc filter show dev "$device" ingress 2> /dev/null | sed "s/^/tcfilter$T$device$T/"
        tc filter show dev "$device" egress 2> /dev/null | sed "s/^/tcfilter$T$device$T/"
        tc class show dev "$device" 2> /dev/null | sed "s/^/tcfilter$T$device$T/"
    done
    for peer in $PEERS; do
        printf 'way\t%s\t%s\n' "$peer" "$(ip route get "$peer" 2>&1 | tr '\n' ' ')"
    done
    ip neigh show nud permanent | awk -v OFS="$T" '{ print "neighbour", $1, $0 }'
    ip xfrm policy 2> /dev/null | awk -v OFS="$T" '
        /^src/ { whom = $0 }
        /action block/ { print "xfrm", whom }'
}

# name NAME ADDRESSES: as the host finds them / hosts LINE: that name one of them in its own file
print_names() {
    local name
    for name in $NAMES; do
        printf 'name\t%s\t%s\n' "$name" "$(timeout 2 getent ahosts "$name" | awk '!seen[$1]++ { printf "%s ", $1 }')" &
    done
    wait
    # shellcheck disable=SC2086 # words
    grep -Hs -wF "$(printf '%s\n' $NAMES)" /etc/hosts | sed "s/^[^:]*:/hosts$T/"
}

# clocks UNIT STATE: what keeps the time
print_clocks() {
    local unit
    for unit in systemd-timesyncd chrony ntpsec openntpd ntpd-rs; do
        printf 'clocks\t%s\t%s\n' "$unit" "$(systemctl is-active "$unit")"
    done
}

# foreign DATABASE TABLE ROW: what coturn heeds in its database beside our realms' credentials
print_databases() {
    local item database realms
    command -v sqlite3 > /dev/null || return 0
    for item in $DATABASES; do # PATH:REALM,REALM
        database=${item%%:*} realms="'$(printf %s "${item#*:}" | sed "s/,/','/g")'"
        [ ! -f "$database" ] || sqlite3 -readonly "$database" "
            select 'turn_realm_option', realm || ' ' || opt || '=' || value from turn_realm_option;
            select 'allowed_peer_ip', realm || ' ' || ip_range from allowed_peer_ip;
            select 'denied_peer_ip', realm || ' ' || ip_range from denied_peer_ip;
            select 'turn_origin_to_realm', origin || ' ' || realm from turn_origin_to_realm;
            select 'oauth_key', kid from oauth_key;
            select 'admin_user', name from admin_user;
            select 'turn_secret', 'realm ' || realm from turn_secret where realm not in ($realms);
            select 'turnusers_lt', 'realm ' || realm from turnusers_lt where realm not in ($realms);" 2> /dev/null |
            sed "s|^\([a-z_]*\)[|]|foreign$T$database$T\1$T|"
    done
}

# children UNIT COUNT
print_workers() {
    local unit main
    for unit in $WORKERS; do
        main=$(systemctl show -P MainPID "$unit")
        [ "$main" = 0 ] || printf 'children\t%s\t%s\n' "$unit" "$(pgrep -c -P "$main")"
    done
}

# egress NAME VALUE: what the host finds of its recordings now
print_recordings() {
    ! [ -x "$CALLREADY_ROOT/usr/local/lib/callready/egress" ] ||
        "$CALLREADY_ROOT/usr/local/lib/callready/egress" metrics 0 |
        sed -n "s/^callready_egress_\([a-z_]*\) /egress$T\1$T/p"
}

inspect() {
    print_units
    print_dropins
    print_processes
    print_services
    print_starts
    print_reads
    print_pairs
    print_filters
    print_ssh
    print_disks
    print_kernel
    print_sockets
    print_network
    print_names
    print_clocks
    print_databases
    print_workers
    print_recordings
    printf 'end\n'
}
inspect < /dev/null
