"""Rotate a secret under load, one phase a run: python -m callready.rotate inventories/ENV WHAT

WHAT is `turn` (the secrets that LiveKit and the app mint TURN credentials with), `livekit` (the API
keys), `redis` (the passwords of LiveKit and egress there), `fleet-ca` (the authority by which hosts
know each other) or the name of one entry of the store, such as `turn/avatar` or the app's
`app/token`. Each phase is an ordinary deploy of the whole
fleet; the store's entry and what stands beside it say which phase it is in:

    turn/calls                       at rest
    turn/calls + turn/calls.next     1: accepted beside the old one, nothing mints with it yet
    turn/calls + turn/calls.previous 2: the new one mints, the old one is accepted until `.until`
    turn/calls + turn/calls.retired  3: the old one goes

A phase begins only when a survey of every host finds nothing that differs from the one before, so
any deploy in between, of part of the fleet too, meets hosts that accept whatever it mints with.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from callready.secrets.loading import validate
from callready.secrets.store import GENERATION, NEXT, PREVIOUS, Store, references, variable
from callready.settings.fields import secret_fields
from callready.settings.fleet import Fleet
from callready.settings.inventory import inventory_data
from callready.settings.ports import LIVEKIT
from callready.settings.problem import SettingsError

RETIRED, UNTIL = ".retired", ".until"
PHASES = ("", NEXT, PREVIOUS, RETIRED)
_ACCEPTED = "every coturn of the pool accepts the new secret beside the old one"
# What each phase brings, by the kind of rotation.
WORDS = {
    "turn": {
        1: _ACCEPTED,
        2: "LiveKit and the app mint with the new secret",
        3: "the old secret is gone",
    },
    "livekit": {
        1: "LiveKit knows the new key beside the old one",
        2: "the app makes its tokens with the new key",
        3: "the old key is gone",
    },
    "key": {
        1: "LiveKit knows the new key beside the old one",
        2: "the new key is the store's; monitor and egress have it: give it to others that use it",
        3: "the old key is gone",
    },
    "pool": {
        1: _ACCEPTED,
        2: "the new secret is the pool's in the store: give it to what mints for the pool",
        3: "the old secret is gone",
    },
    "app": {
        1: "the app accepts the new token beside the old one",
        2: "the new token is the app's in the store: give it to who calls the app",
        3: "the old token is gone",
    },
    "fleet-ca": {
        1: "hosts accept the certificates of the new authority beside those of the old one",
        2: "every host has a certificate of the new authority",
        3: "certificates of the old authority are refused",
    },
    "redis": {
        1: "Redis accepts the new passwords beside the old ones",
        2: "LiveKit and egress use the new passwords",
        3: "Redis refuses the old passwords",
    },
}
# Those that WHAT may be instead of a name.
_KINDS = ("turn", "livekit", "redis", "fleet-ca")


class RotationError(Exception):
    """Why a phase is not begun; the message says what to do."""


@dataclass
class Rotation:
    """The secrets of one inventory that are rotated together, and the fleet that has them."""

    inventory: str
    what: str
    kind: str
    fleet: Fleet
    store: Store
    entries: dict[str, str]
    names: list[str]

    @classmethod
    def load(cls, inventory: str, what: str) -> Rotation:
        """Read the inventory and its store; raises RotationError, SettingsError, SecretsError."""
        data, store = inventory_data(inventory), Store(inventory)
        fleet = validate(inventory, data)
        kind, names = chosen(fleet, data, what)
        entries = store.read()
        for name in names:
            if variable(name) in os.environ:
                raise RotationError(
                    f"{name} comes from the environment ({variable(name)}), which callready cannot "
                    f"change: move it to {store.path}"
                )
        return cls(inventory, what, kind, fleet, store, entries, names)

    @property
    def phase(self) -> int:
        """The phase that has begun last, 0 at rest; raises RotationError for an edited store."""
        found = {
            tuple(n for n in (1, 2, 3) if name + PHASES[n] in self.entries) for name in self.names
        }
        if len(found) > 1 or any(len(phases) > 1 for phases in found):
            raise RotationError(
                f"{self.store.path}: {', '.join(self.names)} and what stands beside them are not "
                "in one phase: restore the file from version control"
                + (", or rotate each by its name" if len(self.names) > 1 else "")
            )
        return next((phases[0] for phases in found if phases), 0)

    @property
    def of_livekit(self) -> bool:
        """Whether it is about keys that LiveKit signs and checks with."""
        return self.kind in ("livekit", "key")

    @property
    def wait(self) -> timedelta:
        """How long after phase 2 a credential or token made with the old secret may be valid; the
        clocks of two hosts may differ by twice the limit of each."""
        hosts = self.fleet.hosts.values()
        skew = 2 * max(host.host.max_clock_skew for host in hosts)
        livekits = [host.livekit for host in hosts if host.livekit]
        if self.kind == "livekit":
            ttl = max(item.token_ttl for item in livekits)
        elif self.kind == "turn":
            ttl = max(item.rtc.turn_ttl for item in livekits)
        elif self.kind in ("fleet-ca", "redis"):
            ttl = 0  # nothing of the old one is left
        else:  # others' programs use it: a day, as the setting's limit
            ttl = 86_400
        return timedelta(seconds=skew + ttl)

    def begin(self, phase: int) -> None:
        """Bring the store to a phase, before the deploy that brings the hosts to it."""
        for name in self.names:
            if phase == 1:
                self.entries[name + NEXT] = secrets.token_urlsafe(32)
            elif phase == 2:
                self.entries[name + PREVIOUS] = self.entries[name]
                self.entries[name] = self.entries.pop(name + NEXT)
                number = int(self.entries.get(name + GENERATION, "1"))
                self.entries[name + GENERATION] = str(number + 1)
            else:
                self.entries[name + RETIRED] = self.entries.pop(name + PREVIOUS)
                del self.entries[name + UNTIL]
        self.store.write(self.entries)

    def complete(self, phase: int) -> None:
        """Note that every host has reached a phase: from now on phase 3 is waited for, or the
        rotation is over."""
        until = (datetime.now(UTC) + self.wait).isoformat(timespec="seconds")
        for name in self.names:
            if phase == 2:
                self.entries[name + UNTIL] = until
            elif phase == 3:
                del self.entries[name + RETIRED]
        self.store.write(self.entries)

    @property
    def until(self) -> datetime | None:
        """When phase 3 may start, if that is known yet."""
        found = [self.entries.get(name + UNTIL) for name in self.names]
        if None in found:
            return None
        return max(datetime.fromisoformat(text) for text in found if text)


def chosen(fleet: Fleet, data: dict[str, dict[str, Any]], what: str) -> tuple[str, list[str]]:
    """The kind of rotation that `what` means, and the names of the secrets it is about."""
    kinds: dict[str, str] = {}
    ours: set[str] = set()
    livekits = [host.livekit for host in fleet.hosts.values() if host.livekit]
    minted = {f"turn.pools.{livekit.turn_pool}.secrets" for livekit in livekits}
    for field in chain.from_iterable(map(secret_fields, data.values())):
        names = [name for _, name in references(field.value)]
        kind: str | None = field.origin.rotation
        if kind == "turn":
            del names[1:]  # the first one mints
            kind = "turn" if field.path in minted else "pool"
        if kind:
            # The first LiveKit key is the app's, others are for other programs.
            others = "key" if kind == "livekit" else kind
            kinds |= dict.fromkeys(names[1:], others) | dict.fromkeys(names[:1], kind)
        if kind == what and what in _KINDS:
            ours |= set(names[:1])
    if ours:
        return what, sorted(ours)
    if what in kinds:
        return kinds[what], [what]
    raise RotationError(
        f"{what}: nothing to rotate by this name; WHAT is {', '.join(_KINDS)}, or one of "
        + (", ".join(sorted(kinds)) or "the secrets of turn.pools, livekit.keys and app.api_token")
    )


def rotate(inventory: str, what: str, wanted: int | None = None, end_calls: bool = False) -> str:
    """Complete the phase that was begun, or go on to the next one; returns what was reached.

    Args:
        inventory: path of the inventory.
        what: `turn`, `livekit`, `redis`, `fleet-ca` or a name of the store.
        wanted: the phase the operator means; another one is refused.
        end_calls: remove an old LiveKit key although calls are running.

    Raises RotationError, SettingsError or SecretsError if a phase may not begin or fails.
    """
    rotation = Rotation.load(inventory, what)
    phase, found = rotation.phase, survey(inventory)
    differing = ", ".join(sorted(host for host, item in found.items() if item["changes"]))
    if not differing and (phase == 3 or (phase == 2 and rotation.until is None)):
        return _complete(rotation, phase)  # the last run was cut short before it noted that
    target = phase if differing else phase + 1
    _may_go_on(rotation, target, wanted, differing)
    if differing:
        print(f"phase {phase} is not complete on {differing}: completing it", flush=True)
    else:
        if target == 3:
            _may_retire(rotation, found, end_calls)
        rotation.begin(target)
        print(f"phase {target} of 3: {WORDS[rotation.kind][target]}", flush=True)
    deploy(inventory, target)
    return _complete(rotation, target)


def _may_go_on(rotation: Rotation, target: int, wanted: int | None, differing: str) -> None:
    """Raise RotationError where no rotation may start, or the operator means another phase."""
    phase = rotation.phase
    if differing and phase == 0:
        raise RotationError(
            f"{differing}: not what the inventory and the store say; a rotation starts from there: "
            f"look at pyinfra {rotation.inventory} deploy.py --dry, deploy, then rotate"
        )
    if wanted not in (None, target):
        state = "has begun and is not complete" if differing else "is complete"
        raise RotationError(
            f"phase {wanted} is not what comes next: "
            + (f"phase {phase} {state}" if phase else "no rotation is under way")
            + f", next is phase {target}"
        )


def _may_retire(rotation: Rotation, found: dict[str, Any], end_calls: bool) -> None:
    """Raise RotationError while something that callers have needs the old secret."""
    until = rotation.until
    if until and datetime.now(UTC) < until:
        raise RotationError(
            f"phase 3 may start at {_time(until)}: until then something made with the old "
            f"{'key' if rotation.of_livekit else 'secret'} may be valid and would be refused"
        )
    # LiveKit signs the refresh tokens of running calls with any key it knows (getFirstKeyPair in
    # its roommanager.go), the old one too, and a removal means a restart.
    ports = sum(item["busy"].get(LIVEKIT, 0) for item in found.values())
    if rotation.of_livekit and ports and not end_calls:
        raise RotationError(
            f"phase 3 has to wait for the end of the calls ({ports} media ports in use): LiveKit "
            "restarts without the old key, and calls whose last token it signed with that could "
            "not come back; try again when they are over, or end them with --end-calls"
        )


def _complete(rotation: Rotation, phase: int) -> str:
    """Note that every host has reached a phase; what the operator is told about it and the next."""
    rotation.complete(phase)
    again = f"make rotate ENV={Path(rotation.inventory).name} WHAT={rotation.what}"
    done = f"phase {phase} is complete: {WORDS[rotation.kind][phase]}"
    if phase == 1:
        restarts = rotation.kind in ("turn", "redis")
        more = ", which restarts LiveKit: running calls reconnect once" if restarts else ""
        if rotation.kind == "redis" and rotation.fleet.group("egress"):
            more += "; egress is drained before it restarts"
        return f"{done}{_by_hand(rotation, 1)}\nnext is phase 2{more}; it may start now: {again}"
    if phase == 2:
        until = rotation.until
        unit = " and LiveKit has no calls (it restarts)" if rotation.of_livekit else ""
        return (
            f"{done}{_by_hand(rotation, 2)}\nnext is phase 3, not before "
            f"{_time(until) if until else '?'}{unit}: {again}"
        )
    over = f"the rotation of {', '.join(rotation.names)} is over"
    return f"{done}{_by_hand(rotation, 3)}\n{over}"


def _by_hand(rotation: Rotation, phase: int) -> str:
    """What has to read its environment again in this phase and is not restarted by callready."""
    no_app = ("pool", "key", "fleet-ca", "redis")
    if rotation.kind in no_app or (rotation.kind != "app" and phase != 2):
        return ""
    apps = [h.app for h in rotation.fleet.group("app").values() if h.app]
    if any(app.restart or app.commands for app in apps):
        return ""
    files = ", ".join(app.env_file for app in apps)
    what = f"restart what reads {files}" if apps else "give the new one to your application"
    return f"\nnow {what}: callready does not do that here (app.restart is empty)"


def _time(moment: datetime) -> str:
    left = (moment - datetime.now(UTC)).total_seconds()
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC (in {max(0, round(left))} s)"


def survey(inventory: str) -> dict[str, Any]:
    """What a deploy of the whole fleet would change, host by host, and each unit's media ports."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        done = _pyinfra(inventory, ["--dry"], {"CALLREADY_REPORT": str(report)}, quiet=True)
        if done.returncode or not report.exists():
            raise RotationError(
                f"cannot look at every host, and a phase concerns them all:\n{done.stderr.strip()}"
            )
        found: dict[str, Any] = json.loads(report.read_text())
    return found


def deploy(inventory: str, phase: int) -> None:
    """Deploy the whole fleet; raises RotationError if any host failed."""
    if _pyinfra(inventory, [], {"PYINFRA_YES": "1"}, quiet=False).returncode:
        raise RotationError(
            f"phase {phase} has begun and is not complete; nothing is refused meanwhile. Mend what "
            "is said above, then run the same command again"
        )


def _pyinfra(
    inventory: str, options: list[str], environment: dict[str, str], quiet: bool
) -> subprocess.CompletedProcess[str]:
    if not Path("deploy.py").is_file():
        raise RotationError("there is no deploy.py here: run this in callready's folder")
    return subprocess.run(
        [sys.executable, "-m", "pyinfra", inventory, "deploy.py", *options],
        env={**os.environ, "PYINFRA_PROGRESS": "off", **environment},
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=quiet,
        check=False,
    )


def main(arguments: list[str]) -> int:
    """The `make rotate` command."""
    parser = argparse.ArgumentParser(
        "python -m callready.rotate", description="Rotate a secret, one phase a run."
    )
    parser.add_argument("inventory", help="such as inventories/prod")
    parser.add_argument(
        "what", help="turn, livekit, redis, fleet-ca, or an entry of the store such as turn/avatar"
    )
    parser.add_argument("--phase", type=int, choices=[1, 2, 3], help="refuse unless it is this one")
    parser.add_argument(
        "--end-calls", action="store_true", help="remove an old LiveKit key although calls run"
    )
    options, rest = parser.parse_known_args(arguments)
    if rest:
        print(
            f"{rest[0]}: is for a deploy; a phase always concerns every host of the inventory",
            file=sys.stderr,
        )
        return 2
    try:
        print(rotate(options.inventory, options.what, options.phase, options.end_calls))
    except (RotationError, SettingsError) as error:
        print(f"callready: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("callready: interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
