"""Sabotages of recording: of egress, its container, its disk and its storage."""

from tests.sabotage.sabotage import (
    RECORDING,
    Broken,
    Service,
    dropped_in,
    edited,
    sabotage,
    scripted,
    signalled,
)

CHECKS = "test_hosts or test_recording"
UNIT, FOLDER = "callready-egress", "/var/lib/egress"
KNOWN = "/run/callready/egress.prom"


def until(metric: str) -> str:
    """A script that waits until the host has found this of its recordings."""
    return waited(f'grep -qx "callready_egress_{metric}" {KNOWN}')


def waited(condition: str) -> str:
    """A script that waits for another to succeed."""
    return f"timeout 60 sh -c 'until {condition}; do sleep 0.2; done'"


def serving(unit: str, port: int) -> str:
    """A script that starts a unit anew, and waits until it listens."""
    return f"systemctl restart {unit}; {waited(f'ss -Hltn sport = :{port} | grep -q .')}"


AGAIN = serving(UNIT, 7982)


@sabotage(RECORDING, "recorder", "unit-stopped", checks=CHECKS)
def egress_stopped(at: Service) -> Broken:
    return scripted(at.recorder, f"systemctl stop {UNIT}", AGAIN)


@sabotage(RECORDING, "recorder", "unit-hung", checks=CHECKS)
def egress_hung(at: Service) -> Broken:
    return signalled(at.recorder, UNIT)


@sabotage(RECORDING, "recorder", "sound-server-dead", checks=CHECKS)
def the_sound_server_killed(at: Service) -> Broken:
    its = "ps -e -o pid=,uid=,comm= | awk '/ 201001 pulseaudio$/ { print $1 }'"
    do = f"kill -9 $({its}); {until('pulseaudio 0')}"
    return scripted(at.recorder, do, f"{AGAIN}; {until('pulseaudio 1')}")


@sabotage(RECORDING, "recorder", "recordings-held", checks=CHECKS)
def the_disk_of_recordings_full(at: Service) -> Broken:
    """A small one is: egress.min_free is more than it has."""
    mount = f"mount -t tmpfs -o size=2m others {FOLDER}/backup"
    undo = f"umount {FOLDER}/backup; {until('held 0')}; {AGAIN}"
    return scripted(at.recorder, f"{mount}; {until('held 1')}", undo)


@sabotage(RECORDING, "recorder", "recordings-cut-off", checks=CHECKS)
def a_recording_killed(at: Service) -> Broken:
    """What is left of it, as the start after that finds it."""
    cut = f"mkdir -p {FOLDER}/tmp/EG_cut; echo media > {FOLDER}/tmp/EG_cut/cut.ogg"
    undo = f"rm -r {FOLDER}/orphans; {until('orphans 0')}"
    return scripted(at.recorder, f"{cut}; {AGAIN}; {until('orphans 1')}", undo)


@sabotage(RECORDING, "recorder", "recordings-not-uploaded", checks=CHECKS)
def an_upload_refused(at: Service) -> Broken:
    file = f"{FOLDER}/backup/refused.ogg"
    undo = f"rm {file}; {until('backup 0')}"
    return scripted(at.recorder, f"echo media > {file}; {until('backup 1')}", undo)


@sabotage(RECORDING, "recorder", "file-edited", checks=CHECKS)
def egress_with_another_secret(at: Service) -> Broken:
    sed = "s/^api_secret: .*/api_secret: others/"
    return edited(at.recorder, "/etc/egress/egress.yaml", sed, AGAIN)


@sabotage(RECORDING, "recorder", "foreign-drop-in", checks=CHECKS)
def egress_with_a_configuration_of_others(at: Service) -> Broken:
    return dropped_in(at.recorder, UNIT, "Environment=EGRESS_CONFIG_BODY=others", AGAIN)
