"""python -m bench.faults RESULTS: the same faults against plain pyinfra operations, judged as
tests/faults judges callready; adds them to RESULTS, which the tests wrote (FAULTS_RESULTS), and
writes docs/faults.md from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from bench.faults.report import write
from callready.release.plan import rows_sql
from lab import Lab
from lab.run import say
from tests.support.fleet import PYINFRA, Run, eventually
from tests.support.place import Place

ROOT = Path(__file__).parents[2]
HOSTS = ("h19", "h20")
NEW = b"        ct state invalid counter drop\n"
WAIT = 20  # seconds after a fault: four times as long as callready's hosts had


class Plain(Place):
    """The same host and states, deployed with plain operations."""

    patch: tuple[str, bytes, bytes] = ("", b"", b"")

    def start(
        self, *arguments: str, before: tuple[str, ...] = (), file: str = ""
    ) -> subprocess.Popen[str]:
        self.write_work()
        return subprocess.Popen(
            [PYINFRA, self.inventory, ROOT / "bench/faults/plain.py", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYINFRA_YES": "1", **self.environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, before: tuple[str, ...] = (), file: str = "") -> Run:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=180)
        return Run(process.returncode, stdout, stderr)

    def use(self, state: str, timer: int = 60) -> None:
        super().use(state, timer)
        self.state = state

    def write_work(self) -> None:
        """The inventory's files, rendered: what a usual deploy keeps beside itself."""
        state, environment = self.state, self.environment
        release = self.declared(state).release
        other = self.declared("A" if state == "B" else "B").release
        self.use(state)
        self.environment = environment
        self.write()
        contents = {p: (f.content, f.owner, f.group, f.mode) for p, f in release.files.items()}
        for c in release.certificates.values():
            contents[c.path("fullchain.pem")] = (c.chain, "root", c.group, 0o644)
            contents[c.path("privkey.pem")] = (c.key, "root", c.group, 0o640)
        work: dict[str, Any] = {
            "packages": [name.partition(" | ")[0] for name in release.packages],
            "reserved_ports": release.sysctls["net.ipv4.ip_local_reserved_ports"],
            "links": release.links,
            "units": [*release.services, "callready-firewall.service"],
            "no_units": [u for u in other.services if u not in release.services],
            "no_files": [
                p
                for p in [*other.files, *other.links]
                if p not in release.files.keys() | release.links.keys()
            ],
            "databases": {},
            "files": {},
        }
        made = self.folder / "made"
        made.mkdir(exist_ok=True)
        for path, (content, owner, group, mode) in contents.items():
            name, old, new = self.patch
            source = made / path.replace("/", "_")
            source.write_bytes(content.replace(old, new) if path == name else content)
            work["files"][path] = (str(source), owner, group, f"{mode:o}")
        for path, rows in release.databases.items():
            source = made / path.replace("/", "_")
            source.write_bytes(rows_sql(rows).get_secret_value())
            work["databases"][path] = str(source)
        (self.folder / "work.json").write_text(json.dumps(work))
        with self.inventory.with_name("group_data").joinpath("fleet.py").open("a") as data:
            data.write(f"work = {str(self.folder / 'work.json')!r}\n")

    def deliver(self) -> None:
        Lab().reset(self.host.name)


def held(place: Plain, act: Callable[[subprocess.Popen[str]], object]) -> int:
    """Strike while half of the files are new."""
    (place.folder / "held").unlink(missing_ok=True)
    place.environment = {"FAULTS_HOLD": "yes"}
    process = place.start()
    try:
        eventually((place.folder / "held").exists)
        act(process)
        (place.folder / "held").unlink(missing_ok=True)
        process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return 124
    return process.returncode


def patched(path: str, old: bytes, new: bytes) -> Callable[[Plain], int]:
    def strike(place: Plain) -> int:
        place.patch = (path, old, new)
        try:
            return place.run().status
        finally:
            place.patch = ("", b"", b"")

    return strike


def rule(text: bytes) -> Callable[[Plain], int]:
    return patched("/etc/callready/nftables.conf", NEW, NEW + b"        " + text + b"\n")


def cut_line(place: Plain) -> int:
    try:
        return held(place, lambda _: Lab().cut(place.host.name))
    finally:
        Lab().mend(place.host.name)


def on_small_disk(place: Plain) -> int:
    folder = "/etc/coturn"
    place.host.root(
        f"cp -a {folder} /run/kept; mount -t tmpfs -o size=64k,mode=755 tmpfs {folder}; "
        f"cp -aT /run/kept {folder}; cat /dev/zero > {folder}/fill 2>&-; true"
    )
    status = place.run().status
    place.host.root(
        f"rm {folder}/fill; cp -aT {folder} /run/kept; umount -l {folder}; "
        f"cp -aT /run/kept {folder}; rm -r /run/kept"
    )
    return status


def reboot(place: Plain) -> int:
    return held(place, lambda _: Lab().reboot(place.host.name))


def power_cut(place: Plain) -> int:
    def strike(_: object) -> None:
        Lab().power_cut(place.host.name)
        Lab().boot(place.host.name)

    return held(place, strike)


# By the name that callready's result has, from the sweep or from a fault of its own.
FAULTS: dict[str, Callable[[Plain], int]] = {
    "controller killed": lambda p: held(p, lambda process: os.killpg(process.pid, 9)),
    "line cut": cut_line,
    "power cut": power_cut,
    "reboot inside the window": reboot,
    "Ctrl-C": lambda p: held(p, lambda process: os.killpg(process.pid, signal.SIGINT)),
    "ruleset that locks out": rule(b"tcp dport 22 ct state new drop"),
    "lockout on IPv6 only": rule(b"meta nfproto ipv6 tcp dport 22 ct state new drop"),
    "ruleset that shuts callers out": rule(b"udp dport 3478 drop"),
    "configuration that starts and does not serve": patched(
        "/etc/coturn/calls.conf", b"realm=", b"realm=not-"
    ),
    "full disk": on_small_disk,
}


def judge(place: Plain, name: str) -> dict[str, str]:
    """What a fault left behind, by the invariant of tests/faults."""
    place.use(target := "A" if place.now == "B" else "B")
    status = FAULTS[name](place)
    result = {"plain": name, "status": str(status)}
    time.sleep(WAIT)
    result["left"] = broken(place)
    try:
        place.reach_state(target)
        result["again"] = "completed" if place.sound() == target else "another state"
    except AssertionError:
        result["again"] = broken(place)
        place.deliver()
        place.reach_state(target)
    say(" · ".join(result.values()))
    return result


def broken(place: Plain) -> str:
    """The first line of what does not hold."""
    try:
        place.sound()
    except AssertionError as error:
        words = str(error).partition("\n")[0]
        return "torn: half of each release" if words.startswith("torn") else words[:160]
    return "whole"


def main() -> None:
    results = Path(sys.argv[1])
    found = json.loads(results.read_text())
    lab = Lab()
    made = [name for name in HOSTS if lab.state(name) == "absent"]
    lab.up(HOSTS)
    free: Queue[Plain] = Queue()

    def work(name: str) -> dict[str, str]:
        place = free.get()
        try:
            return judge(place, name)
        finally:
            free.put(place)

    try:
        with (
            tempfile.TemporaryDirectory(prefix="faults-") as folder,
            ThreadPoolExecutor(len(HOSTS)) as pool,
        ):
            for name in HOSTS:
                own = Path(folder, name)
                own.mkdir()
                free.put(place := Plain(name, "turn", own, ""))
                place.learn()
            plain = list(pool.map(work, FAULTS))
    finally:
        for name in made:
            lab.destroy(name)
    results.write_text(json.dumps(found + plain, indent=1) + "\n")
    write(results)


if __name__ == "__main__":
    main()
