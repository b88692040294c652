# shellcheck shell=dash
# What callready does for recordings outside of egress' container; docs/recording.md.
#   egress may-start     whether nothing holds egress
#   egress keep          before each start: what recordings that were cut off have left, to a safe place
#   egress stop          no new recordings, and those that run end, with complete files
#   egress space BYTES   whether egress is held: as long as less is free where it writes
#   egress metrics BYTES what is to be known of recordings now, as metrics
#   egress watch BYTES [DAYS]    the same all the time, and remove recordings that are older; a service
#                        runs this
# The container chooses the names of what is in its folders: they go from find(1) to programs as
# arguments, never through a loop of root's.
STOP_TRIES=16 LOOK_EVERY=10 # at half a second, because no revert and no reboot waits over 10 s; seconds
ROOM=67108864               # bytes, for what is still written while a recording ends
MEDIA='.*\.(mp4|m4a|ogg|webm|mp3|aac|ts|m3u8|ivf|h26[45]|jpe?g)'

# find_media FOLDER ACTION...: what a recording has written something to. Links are none.
find_media() {
    local folder="$1"
    shift
    find "$folder" -regextype posix-extended -type f -size +0 -iregex "$MEDIA" "$@" 2> /dev/null
}

# count_media FOLDER
count_media() { find_media "$1" -printf . | wc -c; }

# may_start: systemd asks before each start, and does not try again where the answer is no.
may_start() {
    [ ! -e "$EGRESS_FULL" ] || { complain "not started: there is too little room for recordings" && return 1; }
    [ ! -e "$EGRESS_DRAINING" ] || { complain "not started: a deploy restarts it" && return 1; }
}

# keep: upstream's entrypoint empties the folder in which a recording is until it has been delivered.
keep() {
    local kept count
    count=$(count_media "$RECORDINGS/tmp")
    [ "$count" != 0 ] || return 0
    kept=$RECORDINGS/orphans/$(date -u +%FT%H%M%SZ)
    mkdir -p "$kept" &&
        chmod 0700 "$RECORDINGS/orphans" &&
        find "$RECORDINGS/tmp" -mindepth 1 -maxdepth 1 -exec mv -t "$kept" -- {} + || return
    # The rest is Chrome's profile, and pipes.
    find "$kept" -regextype posix-extended ! -type d ! \( -type f -size +0 -iregex "$MEDIA" \) -delete
    find "$kept" -mindepth 1 -type d -empty -delete
    complain "recordings were cut off: $count files are kept in $kept; an MP4 may lack its index (docs/recording.md)"
}

# stop: what is left after that is killed, and kept by the next start.
stop() {
    local init
    stop_taking_recordings
    end_recordings $STOP_TRIES 0.5 || complain "recordings did not end in time: what they have is kept at the next start"
    for init in $(pids_of init); do
        # It ends by itself after the last one.
        eventually 4 0.25 is_gone "$init" || kill -s KILL "$init" 2> /dev/null
    done
}

is_gone() { ! kill -0 "$1" 2> /dev/null; }

# free_bytes: of the disk of its folders that has the least.
free_bytes() {
    df -B1 --output=avail "$RECORDINGS" "$RECORDINGS"/* 2> /dev/null |
        awk 'NR > 1 && (least == "" || $1 < least) { least = $1 } END { printf "%.0f\n", least }'
}

# look_at_space LIMIT: a disk that is full ends a recording without a file, so egress stops before.
look_at_space() {
    local limit="$1" free
    free=$(free_bytes)
    if [ ! -e "$EGRESS_FULL" ] && [ "$free" -lt "$limit" ]; then
        printf '%s of %s\n' "$free" "$limit" > "$EGRESS_FULL"
        complain "no new recording starts: $free bytes are free in $RECORDINGS, fewer than $limit (egress.min_free); make room, and it goes on by itself"
        stop_taking_recordings
    elif [ -e "$EGRESS_FULL" ] && [ "$free" -ge $((limit + limit / 10)) ]; then
        rm "$EGRESS_FULL"
        complain "there is room for recordings again: $free bytes"
        systemctl start --no-block callready-egress.service
    fi
    # A local target takes a copy of the file: it must fit.
    if [ -e "$EGRESS_FULL" ] && [ -n "$(pids_of recording)" ] &&
        [ "$free" -lt $(($(du -s -B1 "$RECORDINGS/tmp" | cut -f 1) + ROOM)) ]; then
        complain "recordings are ended now, while there is room for their files"
        end_recordings 1 0 || :
    fi
}

# look_at_deploy: one that died has not said that it drains no more.
look_at_deploy() {
    local process
    read -r process 2> /dev/null < "$EGRESS_DRAINING" || return 0
    [ ! -d "/proc/$process" ] || return 0
    rm "$EGRESS_DRAINING"
    complain "the deploy that drained egress is gone: it records again"
    systemctl start --no-block callready-egress.service
}

# print_metrics LIMIT: for node_exporter, where one reads files.
print_metrics() {
    local held=0 draining=0
    [ ! -e "$EGRESS_FULL" ] || held=1
    [ ! -e "$EGRESS_DRAINING" ] || draining=1
    list_egress | awk '
        { count[$1]++ }
        function show(name, value) { printf "# TYPE callready_egress_%s gauge\ncallready_egress_%s %.0f\n", name, name, value }
        END { show("recordings", count["recording"]); show("pulseaudio", count["pulseaudio"] > 0) }'
    printf '# TYPE callready_egress_%s gauge\ncallready_egress_%s %s\n' \
        free_bytes free_bytes "$(free_bytes)" min_free_bytes min_free_bytes "$1" \
        held held $held draining draining $draining \
        orphans orphans "$(count_media "$RECORDINGS/orphans")" \
        backup backup "$(count_media "$RECORDINGS/backup")"
}

# watch LIMIT [DAYS]
watch() {
    local metrics="$RUN/callready/egress.prom" read="$RUN/callready-measure" rounds=0
    while :; do
        [ -z "${2:-}" ] || [ $((rounds % 360)) != 0 ] || expire "$2"
        rounds=$((rounds + 1))
        look_at_deploy
        look_at_space "$1"
        (umask 022 && print_metrics "$1" > "$metrics.new") && mv "$metrics.new" "$metrics"
        [ ! -d "$read" ] || { install -m 0644 "$metrics" "$read/egress.new" && mv "$read/egress.new" "$read/egress.prom"; }
        sleep $LOOK_EVERY
    done
}

# expire DAYS: only what egress has written, in this folder and on this disk; find(1) follows no link,
# also when a name is changed while it looks.
expire() {
    local minutes=$(($1 * 1440)) count
    count=$(find "$RECORDINGS/recordings" -mindepth 1 -xdev -type f -uid "$EGRESS_UID" -mmin "+$minutes" -printf . -delete | wc -c)
    find "$RECORDINGS/recordings" -mindepth 1 -xdev -type d -uid "$EGRESS_UID" -empty -mmin "+$minutes" -delete
    [ "$count" = 0 ] || complain "$count files in $RECORDINGS/recordings were older than $1 days (egress.retention_days): removed"
}

(umask 022 && mkdir -p "$RUN/callready" "$RECORDINGS")
case "${1:-}" in
    may-start) may_start ;;
    keep | stop) "$1" ;;
    space) look_at_space "$2" ;;
    metrics) print_metrics "$2" ;;
    watch) watch "$2" "${3:-}" ;;
esac
