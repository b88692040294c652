# shellcheck shell=dash
# Certificates on the host: each name's pair becomes current whole or not at all, and what callers
# are served is compared with it.
#   certificates                               take up what certbot has, for every line of
#                                              /etc/callready/certificates.conf; a service runs this
#   certificates install NAME CHAIN KEY GROUP  make a pair current
#   certificates placeholder NAME GROUP        a self-signed pair, for the time before the first one
#   certificates serving ENDPOINT NAME SERIAL  wait until callers get that certificate
TLS=$ROOT/tls
LIVE=$CALLREADY_ROOT/etc/letsencrypt/live
CONFIG=$ROOT/certificates.conf # lines NAME GROUP [ADDRESS:PORT,UNIT...]
status=0

# refuse WORD...: say what is wrong, go on with the rest, and fail in the end.
refuse() {
    complain "$@"
    status=1
    return 1
}

# copy_pair NAME CHAIN KEY GROUP FOLDER
copy_pair() {
    {
        (umask 022 && mkdir -p "$5") &&
            install -m 0644 "$2" "$5/fullchain.pem" &&
            install -m 0640 -g "$4" "$3" "$5/privkey.pem" &&
            cat "$2" "$3" > "$5/both.pem" # as HAProxy wants it; root only
    } || refuse "$1: cannot be copied to $5"
}

# check_pair NAME CHAIN KEY: they belong together, lead from leaf to last, are for NAME, valid, and of
# a kind that browsers accept (settings/certificates.py has the sources).
check_pair() {
    local name="$1" chain="$2" key="$3" public subject=-verify_ip reason kind
    { [ -s "$chain" ] && [ -s "$key" ]; } || refuse "$name: $chain or $key is empty or not there" || return
    { public=$(openssl pkey -in "$key" -pubout 2> /dev/null) &&
        [ "$(openssl x509 -in "$chain" -noout -pubkey 2> /dev/null)" = "$public" ]; } ||
        refuse "$name: the key does not belong to the certificate" || return
    awk '/-BEGIN CERT/ { pem = "" } { pem = pem $0 "\n" } END { printf "%s", pem }' "$chain" > "$chain.last"
    case $name in *[!0-9.]*) subject=-verify_hostname ;; esac
    # Level 2 (SSL_CTX_set_security_level(3)): RSA from 2048 bits, no MD5 or SHA-1.
    reason=$(openssl verify -partial_chain -auth_level 2 -purpose sslserver -CAfile "$chain.last" -untrusted "$chain" \
        $subject "$name" "$chain" 2>&1) ||
        refuse "$name: $(printf '%s' "$reason" | sed -n 's/^error [0-9]* at [0-9]* depth lookup: *//p' | head -n 1)" ||
        return
    rm "$chain.last"
    kind=$(openssl x509 -in "$chain" -noout -text |
        sed -n 's/^ *\(Signature\|Public Key\) Algorithm: //p; s/^ *ASN1 OID: //p' | tr '\n' ' ')
    case $kind in
        *[Ss][Hh][Aa]1* | *[Ss][Hh][Aa]224* | *[Mm][Dd]5*) false ;;
        *" rsaEncryption "* | *" prime256v1 "* | *" secp384r1 "*) ;;
        *) false ;;
    esac || refuse "$name: browsers refuse its kind (signature and key: $kind): use EC P-256, P-384 or RSA from 2048 bits"
}

# switch_pair NAME NEW FOLDER: one rename of a link makes certificate and key current together.
switch_pair() {
    local tls="$TLS/$1" new="$2" folder="$3" old
    sync "$new"/* &&
        if [ -d "$tls/$folder" ]; then mv "$new"/* "$tls/$folder"; else mv -T "$new" "$tls/$folder"; fi &&
        ln -sfn "$folder" "$tls/.current" && mv -T "$tls/.current" "$tls/current" ||
        refuse "$1: cannot be made current in $tls" || return
    printf 'installed the certificate of %s\n' "$1"
    for old in "$tls"/*; do
        case ${old##*/} in "$folder" | current | asked) ;; *) rm -rf "$old" ;; esac
    done
}

# install_pair NAME CHAIN KEY GROUP [FOLDER]: what is copied is what is checked. Anything that fails
# leaves the old pair.
install_pair() {
    local name="$1" new="$TLS/$1/.new" result
    rm -rf "$new"
    copy_pair "$name" "$2" "$3" "$4" "$new" &&
        check_pair "$name" "$new/fullchain.pem" "$new/privkey.pem" && {
        diff -r "$new" "$TLS/$name/current/" > /dev/null 2>&1 ||
            switch_pair "$name" "$new" "${5:-$(cat "$new/fullchain.pem" "$new/privkey.pem" | sha256sum | cut -c 1-16)}"
    }
    result=$?
    rm -rf "$new"
    return $result
}

install_placeholder() {
    local made
    made=$(mktemp -d) || return
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
        -subj "/CN=no certificate yet" -addext "subjectAltName=DNS:$1" \
        -keyout "$made/key" -out "$made/chain" 2> /dev/null &&
        install_pair "$1" "$made/chain" "$made/key" "$2" placeholder || status=1
    rm -rf "$made"
}

wait_for_certificate() { # ENDPOINT NAME SERIAL
    local served
    eventually 10 0.5 serves "$@" || refuse "$1 serves certificate ${served:-none} for $2, not $3"
}

# serves ENDPOINT NAME SERIAL: says in `served` what it serves.
serves() {
    served=$(ask_serial "$1" "$2")
    [ "$served" = "$3" ]
}

# check_renewal NAME: certbot renews when a third of the validity is left; a sixth says that it does
# not.
check_renewal() {
    local chain="$TLS/$1/current/fullchain.pem" since until left
    [ -e "$chain" ] || return
    since=$(date +%s -d "$(openssl x509 -noout -startdate -in "$chain" | cut -d= -f2)")
    until=$(date +%s -d "$(openssl x509 -noout -enddate -in "$chain" | cut -d= -f2)")
    left=$((until - $(date +%s)))
    [ $((left * 6)) -gt $((until - since)) ] ||
        refuse "$1: its certificate has $((left / 86400)) days left and was not renewed: journalctl -u certbot.service"
}

# Each name on its own: one that is broken does not keep the others from being renewed.
take_up_all() {
    local name group unit left live
    systemctl is-failed --quiet certbot.service &&
        refuse "certbot's last run failed: journalctl -u certbot.service, /var/log/letsencrypt"
    while read -r name group _; do
        live=$LIVE/$(lineage_of "$name")
        install_pair "$name" "$live/fullchain.pem" "$live/privkey.pem" "$group" ||
            complain "$name: the certificate from before stays; certbot renew --force-renewal --cert-name ${live##*/} makes a new one"
        check_renewal "$name"
    done < "$CONFIG"
    for unit in $(list_unserved | cut -d ' ' -f 1 | sort -u); do
        printf 'reloading %s\n' "$unit"
        systemctl reload "$unit" || refuse "$unit does not reload: journalctl -u $unit"
    done
    eventually 10 0.5 all_served || refuse "callers do not get the installed certificate from
$left"
}

# all_served: says in `left` what is not.
# shellcheck disable=SC2329 # eventually calls it
all_served() {
    left=$(list_unserved)
    [ -z "$left" ]
}

# Every endpoint that serves something else than the installed certificate of its name.
list_unserved() {
    local name endpoints wanted item served
    while read -r name _ endpoints; do
        wanted=$(read_serial < "$TLS/$name/current/fullchain.pem")
        for item in $endpoints; do
            serves "${item%,*}" "$name" "$wanted" ||
                printf '%s on %s: %s instead of %s\n' "${item#*,}" "${item%,*}" "${served:-nothing}" "$wanted"
        done
    done < "$CONFIG"
}

exec 8>> "$RUN/callready-certificates.lock"
flock 8
case ${1:-} in
    install)
        shift
        # What was asked for before is callready's to end (unask).
        install_pair "$@" && { [ ! -e "$TLS/$1/asked" ] || { note_lineage "$1" && rm -f "$TLS/$1/asked"; }; }
        ;;
    placeholder) install_placeholder "$2" "$3" ;;
    serving) wait_for_certificate "$2" "$3" "$4" ;;
    *) take_up_all ;;
esac
exit $status
