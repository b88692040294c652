# shellcheck shell=dash
# What the scripts on a host know of recordings, outside of egress' container (docs/recording.md). It
# stands after common.sh before those that need it: where recordings are, by which user of the host (the
# container's 1001), and the marks with which egress does not start.
# shellcheck disable=SC2034 # for the scripts that follow
RECORDINGS=$CALLREADY_ROOT/var/lib/egress EGRESS_UID=${CALLREADY_EGRESS_UID:-201001}
# shellcheck disable=SC2034 # the same
EGRESS_FULL=$RUN/callready/egress.full EGRESS_DRAINING=$RUN/callready/egress.draining

# list_egress: `init PID` of the first process of egress' container, `recording PID` of each one that
# records, and `NAME PID` of the others.
list_egress() {
    local name pid
    cat "$CALLREADY_ROOT"/proc/[0-9]*/status 2> /dev/null | awk -v uid="$EGRESS_UID" '
        $1 == "Name:" { name = $2 }
        $1 == "Pid:" { pid = $2 }
        $1 == "Uid:" { is_its = $3 == uid }
        $1 == "NSpid:" && is_its { print (NF > 2 && $NF == 1 ? "init" : name), pid }' |
        while read -r name pid; do
            # It starts itself with this argument for each one.
            [ "$name" != egress ] || ! grep -qszx run-handler "$CALLREADY_ROOT/proc/$pid/cmdline" || name=recording
            printf '%s %s\n' "$name" "$pid"
        done
}

# pids_of KIND: of list_egress.
pids_of() { list_egress | sed -n "s/^$1 //p"; }

# stop_taking_recordings: egress goes on with those that run, says to Redis that it takes no new ones,
# and ends after the last one. There is no way back but a new start; a second signal does nothing.
stop_taking_recordings() {
    local init
    for init in $(pids_of init); do kill -s TERM "$init" 2> /dev/null; done
}

# end_recordings TRIES PAUSE: those that run are ended as if a caller had asked for it, with complete
# files. A signal to all of its processes would kill what encodes.
end_recordings() {
    told=' '
    eventually "$1" "$2" are_recordings_over
}

are_recordings_over() {
    local pid is_over=0
    for pid in $(pids_of recording); do
        is_over=1
        case $told in *" $pid "*) ;; *) kill -s INT "$pid" 2> /dev/null ;; esac
        told="$told$pid "
    done
    return $is_over
}
