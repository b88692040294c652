"""What keeps a host from recording, and recordings from those who asked for them."""

from __future__ import annotations

from collections.abc import Iterator

from callready.diagnosis.model import Cause, Place
from callready.diagnosis.seen import OF_RECORDING, OF_UNIT, Seen
from callready.settings.egress import FOLDER
from callready.settings.ports import EGRESS


def causes(seen: Seen) -> Iterator[Cause]:
    """What the host knows of its recordings (host/egress.sh), beside its units."""
    if EGRESS not in seen.node.release.services:
        return
    checks = (*OF_UNIT, *OF_RECORDING)
    if seen.facts.held:
        free, least = (f"{size / 1e9:.1f} GB" for size in seen.facts.held)
        yield seen.cause(
            "recordings-held",
            Place.CAPACITY,
            f"egress starts no recording, because {free} are free in {FOLDER} and egress.min_free "
            f"is {least}",
            f"du -sh {FOLDER}/*, and make room; it goes on by itself",
            f"/run/callready/egress.full: {free} of {least}",
            checks=checks,
        )
    known = seen.inspection.egress
    if known.get("draining"):
        yield seen.cause(
            "recordings-draining",
            Place.UNIT,
            "a deploy waits for the recordings that run, and egress takes no new ones meanwhile",
            "wait; systemctl restart callready-egress ends them, with complete files",
            f"{known.get('recordings', 0)} recordings run",
            checks=checks,
        )
    is_running = seen.inspection.unit(EGRESS).get("ActiveState") == "active"
    if is_running and known.get("pulseaudio") == 0:
        yield seen.cause(
            "sound-server-dead",
            Place.UNIT,
            "egress has lost its sound server: it refuses to record rooms and pages in Chrome, and "
            "looks healthy",
            "systemctl restart callready-egress, which ends what is recorded, with complete files",
            "no pulseaudio runs in its container",
            checks=("test_sound_of_rooms",),
        )
    for folder, key, what, mend in (
        (
            "orphans",
            "recordings-cut-off",
            "recordings were cut off: whoever asked for them has not got them",
            "save what is there or delete it; journalctl -u callready-egress says when that was",
        ),
        (
            "backup",
            "recordings-not-uploaded",
            "recordings could not be uploaded: their storage refuses them or does not answer",
            "journalctl -u callready-egress -g -i upload; upload what is there, and delete it",
        ),
    ):
        if count := known.get(folder):
            shown = f"{count} files in {FOLDER}/{folder}"
            yield seen.cause(key, Place.UNIT, what, mend, shown, latent=True)
