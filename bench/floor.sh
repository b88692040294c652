# shellcheck shell=sh
# What callready does on a TURN host, in one script by hand; run as root over stdin with PACKAGES,
# BUNDLE (a compressed tar archive in base64) and RESERVED_PORTS set. Prints each change.
set -eu
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
printf %s "$BUNDLE" | base64 -d | tar -xz -C "$new"
changed=

put() { # NAME PATH MODE GROUP
    cmp -s "$new/$1" "$2" && [ "$(stat -c %a:%G "$2")" = "$3:$4" ] && return
    install -m "$3" -g "$4" "$new/$1" "$2"
    changed="$changed $1"
    echo "changed $2"
}

# shellcheck disable=SC2086 # a package is one word
dpkg-query -W $PACKAGES > /dev/null 2>&1 || apt-get -y -q --no-install-recommends install $PACKAGES
[ "$(readlink /etc/systemd/system/coturn.service)" = /dev/null ] || systemctl mask coturn.service
grep -q ^benchturn: /etc/passwd ||
    useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin benchturn
mkdir -p /etc/bench/tls
[ "$(cat /proc/sys/net/ipv4/ip_local_reserved_ports)" = "$RESERVED_PORTS" ] ||
    echo "$RESERVED_PORTS" > /proc/sys/net/ipv4/ip_local_reserved_ports
put 60-bench.conf /etc/sysctl.d/60-bench.conf 644 root
put fullchain.pem /etc/bench/tls/fullchain.pem 644 root
put privkey.pem /etc/bench/tls/privkey.pem 640 turnserver
put nftables.conf /etc/bench/nftables.conf 644 root
put load-firewall /usr/local/lib/bench-load-firewall 755 root
put bench-firewall.service /etc/systemd/system/bench-firewall.service 644 root
put calls.conf /etc/bench/calls.conf 640 turnserver
put benchturn@.service /etc/systemd/system/benchturn@.service 644 root
case $changed in *.service*) systemctl daemon-reload ;; esac
case $changed in *nftables.conf* | *load-firewall* | *bench-firewall*) systemctl restart bench-firewall ;; esac
case $changed in *calls.conf* | *benchturn*) systemctl restart benchturn@calls ;; esac
for unit in bench-firewall benchturn@calls; do
    systemctl is-enabled -q $unit 2> /dev/null || systemctl enable -q $unit
    systemctl is-active -q $unit || systemctl start $unit
done
echo end
