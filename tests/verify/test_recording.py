"""Calls are recorded, and who was in them is heard and seen in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import pytest

from callready.probes import ProbeError, livekit, recording
from callready.probes.recording import Api, Elsewhere, Host, Kind, Room
from callready.probes.storage import Storage
from callready.settings.egress import CONTAINER_USER, FOLDER, USER
from callready.settings.ports import EGRESS
from tasks.egress import CONTAINER
from tests.verify.check import Check, each, having, ms
from tests.verify.servers import Server
from tests.verify.targets import Site

SECONDS = 10
WORDS: dict[Kind, str] = {
    "audio_room_composite": "everybody's voice",
    "track": "a track",
    "participant": "a participant",
    "room_composite": "the whole room",
}

recorders = each(having(lambda server: server.settings.records))


@dataclass(frozen=True)
class Take:
    """Something that a host shall record."""

    server: Server
    kind: Kind

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self.server.name

    @property
    def what(self) -> str:
        """As a person says it."""
        return WORDS[self.kind]

    def __str__(self) -> str:
        return f"{self.server}-{self.kind}"


def _takes(site: Site) -> list[Take]:
    return [
        Take(server, kind)
        for server in site.hosts()
        if server.settings.records
        for kind in get_args(Kind)
    ]


def _api(server: Server) -> Api:
    """As the app asks LiveKit for recordings."""
    told = server.settings.livekit
    assert told
    key, secret = next(iter(told.keys.items()))
    return Api(told.url, key, secret, server.ca)


def _fits(server: Server, kind: Kind) -> bool:
    told = server.settings.records
    return bool(told and kind in told.fitting(server.facts.cores))


def _shell(server: Server) -> Host:
    return Host(server.name, lambda script: str(server.host.run(script).stdout))


@pytest.mark.lane("calls")
@each(_takes)
def test_recorded(take: Take, site: Site, check: Check) -> None:
    """Records {take.what}"""
    server, api = take.server, _api(take.server)
    told = server.settings.records
    assert told
    if not _fits(server, take.kind):
        cost = told.costs(server.facts.cores)[take.kind]
        check.figure(f"not tried: {cost:g} of {server.facts.cores} cores, by egress.cpu_cost")
        return
    for sfu in site.sfus():
        if sfu.url == api.url:
            site.expect_passing(sfu)
    with recording.talking(api.url, api.key, api.secret, api.ca) as room:
        others = [_shell(each) for each in site.hosts() if each.settings.records and each != server]
        storage = Storage.of(told.storage)
        try:
            proof = recording.prove(api, room, take.kind, SECONDS, _shell(server), storage, others)
        except Elsewhere as elsewhere:  # LiveKit asks who answers first, and nobody can choose
            check.figure(f"not seen: {elsewhere.finding.shown}")
            return
    done = proof.recording
    check.figure(f"on in {ms(done.time_to_start)}, there {ms(done.time_to_end)} after its end")
    check.figure(str(proof))


@pytest.mark.lane("waiting")
@each(lambda site: _takes(site)[:1])
def test_refused(take: Take, site: Site, check: Check) -> None:
    """A recording that no host has room for is refused, and its caller told"""
    servers = [server for server in site.hosts() if server.settings.records]
    # Of a room alone: nobody has to be in it.
    kinds: tuple[Kind, ...] = ("room_composite", "audio_room_composite")
    dear = [kind for kind in kinds if not any(_fits(server, kind) for server in servers)]
    if not dear:
        check.figure("not tried: there is room for each kind")
        return
    api, name = _api(take.server), livekit.new_room()
    maker = livekit.token(api.key, api.secret, name, ttl=60, create=True)
    livekit.create_room(api.url, maker, name, ca_file=api.ca)
    try:
        started = api.start(dear[0], Room(name, "", ""))
    except ProbeError as error:
        check.figure(f"{WORDS[dear[0]]}: {error.finding.evidence}")
        return
    api.stop(started)
    check.expect(
        False,
        f"a recording of {WORDS[dear[0]]} begins, for which no host has processors: calls and "
        "recordings beside it stutter",
        "cpu_cost in egress.yaml, and who else records with this Redis",
    )


@recorders
def test_sound_of_rooms(server: Server, check: Check) -> None:
    """Whole rooms have sound: pulseaudio runs"""
    asked = server.host.run(
        f"podman exec --user {CONTAINER_USER}:0 --env HOME=/home/egress {CONTAINER} "
        "timeout 5 pactl info"
    )
    lines = (asked.stdout + asked.stderr).strip().splitlines() or ["no answer"]
    check.figure(next((line for line in lines if line.startswith("Server Version")), "no answer"))
    check.expect(
        asked.succeeded,
        f"whole rooms and web pages are not recorded, though egress says that it is well: its "
        f"pulseaudio does not answer ({lines[-1]})",
        f"systemctl restart {EGRESS}, when nothing is recorded",
    )


@recorders
def test_recordings_are_private(server: Server, check: Check) -> None:
    """Nobody else on the host reads recordings"""
    places = " ".join(f"{FOLDER}/{name}" for name in ("recordings", "backup", "orphans"))
    others = rf"\( -perm /007 -o ! -uid 0 ! -uid {USER} \)"
    found = server.host.run(
        f"find {FOLDER} -maxdepth 1 {others}; "
        f"find {places} ! -type l {others} 2> /dev/null | head; "
        f"find {places} -type f 2> /dev/null | wc -l"
    ).stdout.splitlines()
    check.expect(found, f"{FOLDER} is not there", f"systemctl status {EGRESS}")
    *wrong, files = found or ["0"]
    check.figure(f"{files} files")
    check.expect(
        not wrong,
        f"others on the host read recordings: {', '.join(dict.fromkeys(wrong))}",
        f"chmod o= and chown {USER} there, and the umask in systemctl cat {EGRESS}",
    )
