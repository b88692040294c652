# shellcheck shell=dash
# What no exporter knows of this host, as metrics for node_exporter (prometheus.io, "text-based
# format"): allocations, the packet filter's counters, releases, the certificates that callers get,
# whether Redis answers, and how far it is; on the monitor, when each host's logs came last.
#   measure        every 15 seconds; a service runs this
#   measure once
# Lines `pool NAME QUOTA FIRST LAST`, `certificate NAME ADDRESS:PORT`, of certificates of the fleet's
# authority `fleet KIND`, `redis ADDRESS PORT [--tls --insecure]`, of the Redis that an SFU has in common
# with others `shared ADDRESS PORT`, and of hosts whose logs come here `sender NAME`.
CONFIG=$ROOT/measure.conf
METRICS=$RUN/callready-measure/callready.prom
certificates='' rounds=0

# Each UDP socket in a pool's relay range is an allocation's; coturn itself tells nobody.
print_pools() {
    set -- "$CONFIG" "$CALLREADY_ROOT/proc/net/udp" "$CALLREADY_ROOT/proc/net/udp6"
    [ -e "$3" ] || set -- "$1" "$2"
    awk '
        function number(hex,  n, value) {
            for (n = 1; n <= 4; n++) value = 16 * value + index("123456789ABCDEF", substr(hex, n, 1))
            return value
        }
        NR == FNR && $1 == "pool" { name[++pools] = $2; quota[pools] = $3; first[pools] = $4; last[pools] = $5 }
        NR == FNR { next }
        !pools { exit }
        FNR > 1 {
            port = number(substr($2, length($2) - 3))
            for (n = 1; n <= pools; n++) if (first[n] <= port && port <= last[n]) used[n]++
        }
        END {
            if (!pools) exit
            print "# TYPE callready_turn_allocations gauge"
            for (n = 1; n <= pools; n++) printf "callready_turn_allocations{pool=\"%s\"} %d\n", name[n], used[n]
            print "# TYPE callready_turn_quota gauge"
            for (n = 1; n <= pools; n++) printf "callready_turn_quota{pool=\"%s\"} %s\n", name[n], quota[n]
        }' "$@"
}

# The counters of our table: what each use of the port plan let in, and what was dropped.
print_filter() {
    nft -t list table inet callready 2> /dev/null | awk '
        $1 == "counter" && $3 == "{" {
            use = $2
            gsub(/"/, "", use)
            if (!uses++) print "# TYPE callready_filter_packets_total counter"
        }
        $1 == "packets" {
            printf "callready_filter_packets_total{use=\"%s\"} %s\n", use, $2
            if (use ~ /\/limited$/) dropped += $2
        }
        / drop$/ && match($0, /counter packets [0-9]+/) { dropped += substr($0, RSTART + 16, RLENGTH - 16) }
        END {
            if (!NR) exit
            print "# TYPE callready_filter_dropped_packets_total counter"
            printf "callready_filter_dropped_packets_total %.0f\n", dropped
        }'
}

print_releases() {
    local release reverts pending=0
    release=$(readlink "$ROOT/current") || release=none
    reverts=$(grep -sc "${T}reverted from " "$STATE/history")
    [ ! -e "$STATE/pending" ] || pending=1
    printf '# TYPE callready_release_info gauge\ncallready_release_info{release="%s"} 1\n' "${release##*/}"
    printf '# TYPE callready_reverts_total counter\ncallready_reverts_total %s\n' "${reverts:-0}"
    printf '# TYPE callready_release_pending gauge\ncallready_release_pending %s\n' $pending
    [ $pending = 0 ] ||
        printf '# TYPE callready_release_pending_since_seconds gauge\ncallready_release_pending_since_seconds %s\n' \
            "$(stat -c %Y "$STATE/pending")"
    # The last changes; of one that came twice, the later.
    tail -n 5 "$STATE/history" 2> /dev/null | TZ=UTC awk -F "$T" '
        {
            gsub(/[^0-9]/, " ", $1)
            sub(/ .*/, "", $4)
            last[$2 "\",how=\"" $4] = mktime($1)
        }
        END {
            if (NR) print "# TYPE callready_release_change_seconds gauge"
            for (each in last) printf "callready_release_change_seconds{release=\"%s\"} %.0f\n", each, last[each]
        }'
}

# Whether Redis answers PING as it answers strangers; who is asked is said by its certificate, which is
# measured too.
print_redis() {
    local kind address port options said up=0
    while read -r kind address port options; do
        [ "$kind" = redis ] || continue
        # shellcheck disable=SC2086 # its options are several words, or none
        said=$(timeout 2 redis-cli -h "$address" -p "$port" $options ping 2> /dev/null < /dev/null)
        case $said in NOAUTH* | PONG) up=1 ;; esac
        printf '# TYPE callready_redis_up gauge\ncallready_redis_up %s\n' $up
    done < "$CONFIG"
}

# How far the Redis is that SFUs have in common.
print_shared() {
    local kind address port seconds reached=0
    while read -r kind address port; do
        [ "$kind" = shared ] || continue
        seconds=$(seconds_to "$address" "$port")
        [ -z "$seconds" ] || reached=1
        printf '# TYPE callready_redis_reached gauge\ncallready_redis_reached %s\n' $reached
        [ $reached = 0 ] ||
            printf '# TYPE callready_redis_rtt_seconds gauge\ncallready_redis_rtt_seconds %s\n' "$seconds"
    done < "$CONFIG"
}

# When the last line of each host came; 0: never.
print_senders() {
    find "$CALLREADY_ROOT/var/log/callready" -name '*.jsonl' -printf '%Ts %P\n' 2> /dev/null | awk '
        NR == FNR { if ($1 == "sender") last[$2] = 0; next }
        { sub("/.*", "", $2) }
        $2 in last && last[$2] < $1 { last[$2] = $1 }
        END { for (name in last) printf "callready_logs_last_seconds{sender=\"%s\"} %s\n", name, last[name] }' \
        "$CONFIG" -
}

# print_certificates: until when callers, and hosts of the fleet, can go on with what they get; fails
# where they get none.
print_certificates() {
    local kind name endpoint until failed=0
    printf '# TYPE callready_certificate_not_after_seconds gauge\n'
    while read -r kind name endpoint _; do
        case $kind in
            # Who asks for it without one of his own is refused, and that is logged.
            fleet) until=$(read_end < "$ROOT/fleet/$name/cert.pem") endpoint=$name name=fleet ;;
            certificate) until=$(ask_certificate "$endpoint" "$name" | read_end) ;;
            *) continue ;;
        esac
        if [ -n "$until" ]; then
            printf 'callready_certificate_not_after_seconds{name="%s",endpoint="%s"} %s\n' \
                "$name" "$endpoint" "$(date +%s -d "${until#*=}")"
        else
            failed=1
        fi
    done < "$CONFIG"
    return $failed
}

read_end() { openssl x509 -noout -enddate 2> /dev/null; }

# Handshakes cost both ends more than all the rest: one in five minutes, in one where some failed.
measure() {
    if [ $rounds = 0 ]; then
        rounds=20
        certificates=$(print_certificates) || rounds=4
        # A host that has nothing to say is heard on the monitor all the same.
        printf 'measured, and certificates too\n'
    fi
    rounds=$((rounds - 1))
    {
        print_pools
        print_filter
        print_releases
        print_redis
        print_shared
        ! grep -q ^sender "$CONFIG" || print_senders
        printf '%s\n' "$certificates"
        printf '# TYPE callready_measured_seconds gauge\ncallready_measured_seconds %s\n' "$(date +%s)"
    } > "$METRICS.new" && mv "$METRICS.new" "$METRICS"
}

umask 022
if [ "${1:-}" = once ]; then
    measure
else
    while :; do
        measure
        sleep 15
    done
fi
