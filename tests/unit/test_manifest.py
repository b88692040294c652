"""A release's manifest: what is written is read again, of this format and of earlier ones."""

import dataclasses
import re

import pytest

from callready.probes.probe import Key
from callready.release import refusals
from callready.release.manifest import FORMAT, LinkLine, Manifest, Promise
from callready.release.plan import plan
from tasks import declare
from tests.support.inventories import SFU1, Edit, box, deployed

pytestmark = pytest.mark.usefixtures("project")

EDGE: tuple[Edit, ...] = (
    (SFU1, "edge", {}),
    (SFU1, "name", "turn.callready.test"),
    (SFU1, "app.url", "https://app.callready.test"),
    (SFU1, "app.upstream", "127.0.0.1:8000"),
    (SFU1, "app.commands", ["true", "echo a b"]),
    (SFU1, "app.health", [{"url": "https://app.callready.test/health"}]),
)


def read(text: str) -> Manifest:
    return Manifest.read(line.split("\t") for line in text.splitlines())


def test_what_is_written_is_read_again() -> None:
    for edits in ((), EDGE):
        manifest = declare(box(*edits), SFU1).release.manifest
        again = read(manifest.text)
        assert again.text == manifest.text
        assert again == dataclasses.replace(manifest, promises=sorted(manifest.promises))


def test_promises_are_keys_and_no_words() -> None:
    promises = declare(box(*EDGE), SFU1).release.manifest.promises
    livekit = next(each for each in promises if each.key.kind == "livekit")
    assert livekit.key == ("livekit", "tcp", 443, "livekit.callready.test")
    assert re.fullmatch("[0-9a-f]{16}", livekit.credentials)
    assert Promise.of(Key("stun", "udp", 3478, "calls")) in promises
    assert Promise.of(Key("turn", "tls", 5349, "calls@turn.callready.test")) in promises
    assert len({each.key for each in promises}) == len(promises)


# What 0.1.0 wrote (format 1).
WORDS = {
    "STUN of pool calls udp/3478": ("stun", "udp", 3478, "calls"),
    "TURN allocation over udp of pool calls udp/3478 t.test": ("turn", "udp", 3478, "calls@t.test"),
    "TURN allocation over tcp of pool calls tcp/3478 t.test": ("turn", "tcp", 3478, "calls@t.test"),
    "TURN allocation over tls of pool a tcp/5349 t.test": ("turn", "tls", 5349, "a@t.test"),
    "TURN allocation over tls on 443 of pool a tcp/443 t.test": ("turn", "tls", 443, "a@t.test"),
    "LiveKit tcp/7880": ("livekit", "tcp", 7880, ""),
    "LiveKit tcp/443 livekit.test": ("livekit", "tcp", 443, "livekit.test"),
    "LiveKit by wss://livekit.test tcp/443": ("livekit", "tcp", 443, "livekit.test"),
    "HTTPS of app.test tcp/443": ("https", "tcp", 443, "app.test"),
    "certificate of t.test on port 5349 tcp/5349 t.test": ("certificate", "tcp", 5349, "t.test"),
    "health of the app at http://127.0.0.1:8000/health": (
        "app",
        "tcp",
        8000,
        "http://127.0.0.1:8000/health",
    ),
}


@pytest.mark.parametrize("words", WORDS)
def test_promises_of_format_1_are_read_by_their_words(words: str) -> None:
    found = read(f"unit\tx.service\tf\t-\trestart\t-\npromise\t{words}\n")
    assert (found.format, found.promises) == (1, [Promise.of(Key(*WORDS[words]))])


def test_a_release_is_switched_with_a_line_that_says_why() -> None:
    release = declare(box(), SFU1).release
    facts = deployed(release)
    facts.folder, facts.manifest = "0123", dataclasses.replace(facts.manifest, format=1)
    (change,) = plan(release, facts).changes
    assert change == ("~", "release", f"0123 -> {release.id}: its manifest is in format 1, now 2")
    facts.manifest = dataclasses.replace(facts.manifest, format=FORMAT, promises=[])
    (change,) = plan(release, facts).changes
    assert change.what == f"0123 -> {release.id}: its promises differ"


def test_a_file_that_changes_with_its_template_says_so() -> None:
    release = declare(box(), SFU1).release
    facts = deployed(release)
    path = "/etc/coturn/calls.conf"
    facts.files[path] = dataclasses.replace(facts.files[path], sha256="0" * 64)
    facts.manifest.files[path] = facts.manifest.files[path]._replace(sha256="0" * 64)
    assert [c.what for c in plan(release, facts).changes] == [path]
    facts.templates[path] = "0" * 16
    made = plan(release, facts)
    assert [c.what for c in made.changes] == [f"{path} (callready's template of it has changed)"]
    facts.templates.clear()  # a release of format 1 does not say
    made = plan(release, facts)
    assert [c.what for c in made.changes] == [path]
    assert "does not say which templates it was made from" in made.notes[0]


def test_a_host_of_a_newer_callready_is_refused() -> None:
    assert list(refusals.of_format(FORMAT)) == []
    (why,) = refusals.of_format(FORMAT + 1)
    assert why == (
        f"a newer callready has deployed this host (format {FORMAT + 1}, this one knows {FORMAT}): "
        "upgrade callready here first"
    )
    later = read(f"format\t{FORMAT + 1}\nlink\t/a\t/b\tmore\nsomething\tnew\n")
    assert (later.format, later.links) == (FORMAT + 1, {"/a": LinkLine("/a", "/b")})
