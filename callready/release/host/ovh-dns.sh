# shellcheck shell=dash
# TXT records of the dns-01 challenge in a zone at OVH, for certbot(1), which says in CERTBOT_DOMAIN,
# CERTBOT_VALIDATION and CERTBOT_AUTH_OUTPUT what it wants:
#   ovh-dns check NAME    whether the zone of NAME is there for these credentials; changes nothing
#   ovh-dns add SECONDS   --manual-auth-hook: make the record, and wait until name servers have it
#   ovh-dns remove        --manual-cleanup-hook
# Calls are signed with SHA-1 of secret, consumer key, method, URL, body and time
# (https://help.ovhcloud.com/csm/en-api-getting-started-ovhcloud-api).
CREDENTIALS=$ROOT/dns-credentials

refuse() {
    complain "$* (tls.acme.dns)"
    exit 1
}

read_credential() { sed -n "s/^dns_ovh_$1 = //p" "$CREDENTIALS"; }

# log_in: the credentials, where the API is, and how far its clock is from this host's.
log_in() {
    application=$(read_credential application_key) secret=$(read_credential application_secret)
    consumer=$(read_credential consumer_key) endpoint=$(read_credential endpoint)
    case ${endpoint:-ovh-eu} in
        ovh-eu) api=https://eu.api.ovh.com/1.0 ;;
        ovh-ca) api=https://ca.api.ovh.com/1.0 ;;
        ovh-us) api=https://api.us.ovhcloud.com/1.0 ;;
    esac
    fetch "$api/auth/time" < /dev/null
    case $status:$answer in
        200: | 200:*[!0-9]* | [!2]*) refuse "$api/auth/time answers $status $answer" ;;
    esac
    skew=$((answer - $(date +%s)))
}

# fetch ARGUMENT... URL: what curl gets with the headers on standard input (an argument would be in
# the process list): `status` and `answer`.
fetch() {
    local all
    all=$(curl -sS --max-time 30 --config - -w '\n%{http_code}' "$@" 2>&1) ||
        refuse "OVH's API does not answer this host: $(printf %s "$all" | head -n 1)"
    status=${all##*
} answer=${all%
*}
}

# call METHOD PATH [BODY]
call() {
    local method="$1" url="$api$2" body="${3:-}" now signature
    now=$(($(date +%s) + skew))
    signature=$(printf %s "$secret+$consumer+$method+$url+$body+$now" | openssl dgst -sha1 -r)
    shift $#
    [ "$method" != POST ] || set -- --data-raw "$body"
    fetch -X "$method" "$@" "$url" << END
header = "Content-Type: application/json"
header = "X-Ovh-Application: $application"
header = "X-Ovh-Consumer: $consumer"
header = "X-Ovh-Timestamp: $now"
header = "X-Ovh-Signature: \$1\$${signature%% *}"
END
}

# said KEY: a text of the answer.
said() { printf %s "$answer" | sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p"; }

# must METHOD PATH [BODY]: a call that succeeds.
must() {
    call "$@"
    [ "$status" = 200 ] || refuse_call "$1" "$2"
}

# refuse_call METHOD PATH: what OVH has answered, and what the operator has to do.
refuse_call() {
    local advice
    case $status:$(said errorCode) in
        403:NOT_GRANTED_CALL) advice="make a consumer key that may GET, POST and DELETE on /domain/zone/*" ;;
        40[013]:*) advice="application_key, application_secret and consumer_key must be of one application at ${endpoint:-ovh-eu}, and the consumer key confirmed by its owner" ;;
        460:*) advice="the zone's service at OVH has expired" ;;
        *) advice="try again later" ;;
    esac
    refuse "OVH answers $1 $2 with $status $(said errorCode): $(said message): $advice"
}

# find_zone NAME: in `zone`, and in `sub` what the record of the challenge is called there.
find_zone() {
    local path denied=
    zone=$1
    while :; do
        sub=_acme-challenge.$1
        sub=${sub%".$zone"}
        path="/domain/zone/$zone/record?fieldType=TXT&subDomain=$sub"
        call GET "$path"
        case $status:$(said errorCode) in
            200:*) return ;;
            404:*) ;;
            403:NOT_GRANTED_CALL | 403:FORBIDDEN) denied=" that this consumer key may GET" ;;
            *) refuse_call GET "$path" ;;
        esac
        zone=${zone#*.}
        case $zone in *.*) ;; *) break ;; esac
    done
    refuse "OVH has no zone$denied for $1: make the keys with the account that has the zone, or name another provider"
}

# The answer comes before the refresh, so that a record is removed whatever happens then.
add_record() {
    find_zone "$CERTBOT_DOMAIN"
    must POST "/domain/zone/$zone/record" "{\"fieldType\":\"TXT\",\"subDomain\":\"$sub\",\"target\":\"$CERTBOT_VALIDATION\",\"ttl\":60}"
    printf '%s %s\n' "$zone" "$(printf %s "$answer" | sed -n 's/.*"id" *: *\([0-9]*\).*/\1/p')"
    must POST "/domain/zone/$zone/refresh"
    sleep "$1"
}

remove_record() {
    local zone id
    read -r zone id << END
${CERTBOT_AUTH_OUTPUT:-}
END
    [ -n "$id" ] || return 0
    call DELETE "/domain/zone/$zone/record/$id"
    [ "$status" = 404 ] || [ "$status" = 200 ] || refuse_call DELETE "/domain/zone/$zone/record/$id"
    must POST "/domain/zone/$zone/refresh"
}

log_in
case ${1:-} in
    check) find_zone "$2" ;;
    add) add_record "$2" ;;
    remove) remove_record ;;
esac
