#!/bin/sh
# Certificates on the host: each name's pair becomes current whole or not at all, and what callers
# are served is compared with it.
#   certificates                               take up what certbot has, for every line of
#                                              /etc/callready/certificates.conf; a service runs this
#   certificates install NAME CHAIN KEY GROUP  make a pair current
#   certificates placeholder NAME GROUP        a self-signed pair, for the time before the first one
#   certificates serving ENDPOINT NAME SERIAL  wait until callers get that certificate
set -u
umask 077
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=/etc/callready/tls
status=0

complain() { printf 'callready: %s\n' "$*" >&2; status=1; }

# sound NAME CHAIN KEY: whether they belong together, lead from leaf to last, are for NAME and valid.
sound() {
    [ -s "$2" ] && [ -s "$3" ] || { complain "$1: $2 or $3 is empty or not there"; return 1; }
    public=$(openssl pkey -in "$3" -pubout 2> /dev/null) &&
        [ "$(openssl x509 -in "$2" -noout -pubkey 2> /dev/null)" = "$public" ] ||
        { complain "$1: the key does not belong to the certificate"; return 1; }
    awk '/-BEGIN CERT/ { pem = "" } { pem = pem $0 "\n" } END { printf "%s", pem }' "$2" > "$2.last"
    case $1 in *[!0-9.]*) subject=-verify_hostname ;; *) subject=-verify_ip ;; esac
    reason=$(openssl verify -partial_chain -CAfile "$2.last" -untrusted "$2" \
        $subject "$1" "$2" 2>&1)
    found=$?
    rm -f "$2.last"
    [ $found = 0 ] && return
    complain "$1: $(printf '%s' "$reason" | sed -n 's/^error [0-9]* at [0-9]* depth lookup: *//p' | head -n 1)"
    return 1
}

# install_pair NAME CHAIN KEY GROUP [FOLDER]: what is copied is what is checked, and one rename of a
# link makes certificate and key current together. Anything that fails leaves the old pair.
install_pair() {
    tls=$root/$1 new=$root/$1/.new
    rm -rf "$new"
    (umask 022 && mkdir -p "$new") &&
        install -m 0644 "$2" "$new/fullchain.pem" &&
        install -m 0640 -g "$4" "$3" "$new/privkey.pem" &&
        cat "$2" "$3" > "$new/both.pem" || # as HAProxy wants it; root only
        { complain "$1: cannot be copied to $new"; rm -rf "$new"; return 1; }
    sound "$1" "$new/fullchain.pem" "$new/privkey.pem" || { rm -rf "$new"; return 1; }
    diff -r "$new" "$tls/current/" > /dev/null 2>&1 && { rm -rf "$new"; return 0; }
    folder=${5:-$(cat "$new/fullchain.pem" "$new/privkey.pem" | sha256sum | cut -c 1-16)}
    sync "$new"/* &&
        if [ -d "$tls/$folder" ]; then mv "$new"/* "$tls/$folder"; else mv -T "$new" "$tls/$folder"; fi &&
        ln -sfn "$folder" "$tls/.current" && mv -T "$tls/.current" "$tls/current" ||
        { complain "$1: cannot be made current in $tls"; return 1; }
    printf 'installed the certificate of %s\n' "$1"
    for old in "$tls"/* "$new"; do
        case ${old##*/} in "$folder" | current | asked) ;; *) rm -rf "$old" ;; esac
    done
}

placeholder() {
    made=$(mktemp -d) || return
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
        -subj "/CN=no certificate yet" -addext "subjectAltName=DNS:$1" \
        -keyout "$made/key" -out "$made/chain" 2> /dev/null &&
        install_pair "$1" "$made/chain" "$made/key" "$2" placeholder || status=1
    rm -rf "$made"
}

serial() { openssl x509 -noout -serial 2> /dev/null | sed 's/.*=0*//' | tr A-F a-f; }

served() { # ENDPOINT NAME
    timeout 3 openssl s_client -connect "$1" -servername "$2" < /dev/null 2> /dev/null | serial
}

serving() { # ENDPOINT NAME SERIAL
    for try in 1 2 3 4 5 6 7 8 9 10; do
        now=$(served "$1" "$2")
        [ "$now" = "$3" ] && return
        sleep 0.5
    done
    complain "$1 serves certificate ${now:-none} for $2, not $3"
}

# due NAME: certbot renews when a third of the validity is left; a sixth says that it does not.
due() {
    [ -e "$root/$1/current/fullchain.pem" ] || return
    since=$(date +%s -d "$(openssl x509 -noout -startdate -in "$root/$1/current/fullchain.pem" | cut -d= -f2)")
    until=$(date +%s -d "$(openssl x509 -noout -enddate -in "$root/$1/current/fullchain.pem" | cut -d= -f2)")
    left=$((until - $(date +%s)))
    [ $((left * 6)) -gt $((until - since)) ] ||
        complain "$1: its certificate has $((left / 86400)) days left and was not renewed: journalctl -u certbot.service"
}

# Each name on its own: one that is broken does not keep the others from being renewed.
take_up_all() {
    config=/etc/callready/certificates.conf
    systemctl is-failed --quiet certbot.service &&
        complain "certbot's last run failed: journalctl -u certbot.service, /var/log/letsencrypt"
    while read -r name group endpoints; do
        live=/etc/letsencrypt/live/$name
        install_pair "$name" "$live/fullchain.pem" "$live/privkey.pem" "$group" ||
            complain "$name: the certificate from before stays; certbot renew --force-renewal --cert-name $name makes a new one"
        due "$name"
    done < $config
    for unit in $(not_served | cut -d ' ' -f 1 | sort -u); do
        printf 'reloading %s\n' "$unit"
        systemctl reload "$unit" || complain "$unit does not reload: journalctl -u $unit"
    done
    for try in 1 2 3 4 5 6 7 8 9 10; do
        left=$(not_served)
        [ -n "$left" ] || return
        sleep 0.5
    done
    complain "callers do not get the installed certificate from
$left"
}

# Every endpoint that serves something else than the installed certificate of its name.
not_served() {
    while read -r name group endpoints; do
        wanted=$(serial < "$root/$name/current/fullchain.pem")
        for item in $endpoints; do # ADDRESS:PORT,UNIT
            now=$(served "${item%,*}" "$name")
            [ "$now" = "$wanted" ] ||
                printf '%s on %s: %s instead of %s\n' "${item#*,}" "${item%,*}" "${now:-nothing}" "$wanted"
        done
    done < $config
}

exec 8>> /run/callready-certificates.lock
flock 8
case ${1:-} in
    install) shift && install_pair "$@" && rm -f "$root/$1/asked" ;;
    placeholder) placeholder "$2" "$3" ;;
    serving) serving "$2" "$3" "$4" ;;
    *) take_up_all ;;
esac
exit $status
