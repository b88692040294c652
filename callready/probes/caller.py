"""The synthetic caller: asks probes all the time, and serves what they found as metrics.

Its configuration is a file of JSON (`configuration`), which holds secrets: it is for this process
alone. The metrics are on 127.0.0.1, in Prometheus' text format. The log has a line for each probe
that begins to fail or passes again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callready.probes import Finding, ProbeError, reason
from callready.probes.kinds import Call, Health, Meet, from_json
from callready.probes.probe import Measured, Measurement, Probe, as_json, broken, hidden
from callready.settings.ports import CALLER_PORT

VERSION = 1
EVERY = 20.0
"""Seconds between two runs of a probe that is no call."""
CALLS_A_MINUTE = 12.0
"""Of all paths together: a call takes 0.4 s of a processor (measured)."""

LIMIT, CALL_LIMIT = 10.0, 60.0
"""Seconds after which a probe or a call has failed; a call's participants are killed before."""
_A_SECOND = 25
"""Probes that are no calls, at most: each takes 6 ms of a processor (measured), of the quarter that
the unit has. A large fleet is asked more rarely."""
_CALLS_AT_ONCE = 2
_THREADS = 64  # for what waits: names, and the HTTP requests of joins and to the app

_METRICS = {
    "success": "Whether it passed: 1, or 0.",
    "last_run_seconds": "When it was asked last, since 1970.",
    "interval_seconds": "Time between two runs, as planned.",
    "seconds": "Time that each phase of the last run took that passed.",
    "rtt_seconds": "Median round trip of the last run.",
    "loss_ratio": "Share of the packets of the last run that got no answer.",
}

Labels = tuple[tuple[str, str], ...]


def labels(probe: Probe) -> Labels:
    """What its metrics are told apart by; nothing of it is secret."""
    found = {
        "probe": probe.kind,
        "host": probe.node,
        "pool": getattr(probe, "pool", ""),
        "turn": probe.turn if isinstance(probe, Call) else "",
        "peer": probe.peer if isinstance(probe, Meet) else "",
        "service": probe.service if isinstance(probe, Meet) else "",
        "way": probe.way,
        "family": str(probe.family),
        "url": probe.url if isinstance(probe, Health) else "",
    }
    return tuple((name, value) for name, value in found.items() if value)


@dataclass(frozen=True)
class Run:
    """A probe's last run: when it ended (s since 1970), what it measured, what was wrong."""

    ended: float
    measured: Measurement
    finding: Finding | None


class Caller:
    """Asks probes; `metrics` says how they are.

    Args:
        probes: what to ask.
        every: seconds between two runs of one that is no call, at least.
        calls_a_minute: of all paths together, each in turn.
    """

    def __init__(
        self,
        probes: Iterable[Measured],
        every: float = EVERY,
        calls_a_minute: float = CALLS_A_MINUTE,
    ) -> None:
        self.probes = {labels(probe): probe for probe in probes}
        self._calls = {key: each for key, each in self.probes.items() if isinstance(each, Call)}
        self._others = {key: each for key, each in self.probes.items() if key not in self._calls}
        self._every = max(every, len(self._others) / _A_SECOND)
        self._pause = 60 / calls_a_minute
        self._runs: dict[Labels, Run] = {}

    async def ask_all(self) -> None:
        """Ask them until it is cancelled; what they have open then is closed."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
        async with asyncio.TaskGroup() as tasks:
            for number, key in enumerate(self._others):
                tasks.create_task(self._ask_again(key, number / len(self._others)))
            if self._calls:
                tasks.create_task(self._call_in_turn())

    async def _ask_again(self, key: Labels, offset: float) -> None:
        async for _ in _ticks(self._every, offset):
            await self.ask(key)

    async def _call_in_turn(self) -> None:
        free, turns = asyncio.Semaphore(_CALLS_AT_ONCE), itertools.cycle(self._calls)
        async with asyncio.TaskGroup() as tasks:
            async for number in _ticks(self._pause, 0):
                await free.acquire()
                failed = self._failed if number % 2 else None
                task = tasks.create_task(self.ask(failed or next(turns)))
                task.add_done_callback(lambda _: free.release())

    @property
    def _failed(self) -> Labels | None:
        """The path that failed longest ago, which is tried again soon: one lost call among many
        paths is no reason to wake somebody."""
        failed = {key: run.ended for key, run in self._runs.items() if run.finding}
        return min(failed.keys() & self._calls.keys(), key=failed.__getitem__, default=None)

    async def ask(self, key: Labels) -> None:
        """Ask one once, and note what it found."""
        probe, measured = self.probes[key], Measurement()
        limit = CALL_LIMIT if key in self._calls else LIMIT
        finding = None
        try:
            async with asyncio.timeout(limit):
                await probe.measure(measured)
        except ProbeError as error:
            finding = error.finding
        except TimeoutError:
            finding = Finding(f"no answer to {probe.title}", "the host", f"none in {limit:g} s")
        except Exception as error:
            finding = broken(error)
        before = self._runs.get(key)
        self._runs[key] = Run(time.time(), measured, finding)
        if finding and not (before and before.finding):
            print(f"{probe.title}: {hidden(finding, [probe])}", file=sys.stderr, flush=True)
        if before and before.finding and not finding:
            print(f"{probe.title}: passes again", file=sys.stderr, flush=True)

    def metrics(self) -> str:
        """How they are, in Prometheus' text format."""
        found: dict[str, list[tuple[Labels, float]]] = {name: [] for name in _METRICS}
        for key in self.probes:
            calls = len(self._calls) * self._pause
            found["interval_seconds"].append((key, calls if key in self._calls else self._every))
            for name, more, value in _of(self._runs.get(key)):
                found[name].append((key + more, value))
        lines = []
        for name, series in found.items():
            name, words = f"callready_probe_{name}", _METRICS[name]
            lines += [f"# HELP {name} {words}", f"# TYPE {name} gauge"]
            lines += [f"{name}{{{_text(key)}}} {value!r}" for key, value in series]
        return "".join(f"{line}\n" for line in lines)


def _of(run: Run | None) -> Iterator[tuple[str, Labels, float]]:
    """Metrics of a run, with the labels that are theirs alone."""
    if not run:
        return
    yield "success", (), int(run.finding is None)
    yield "last_run_seconds", (), run.ended
    for phase, seconds in run.measured.phases.items():
        yield "seconds", (("phase", phase),), seconds
    if run.measured.rtt is not None:
        yield "rtt_seconds", (), run.measured.rtt
    if run.measured.loss is not None:
        yield "loss_ratio", (), run.measured.loss


def _text(key: Labels) -> str:
    """Labels with what Prometheus' text format wants escaped."""
    plain = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return ",".join(f'{name}="{value.translate(plain)}"' for name, value in key)


async def _ticks(every: float, offset: float) -> Any:
    """One tick in each `every` seconds, the first after `offset` of them, none at the same moment
    as in the round before: what happens on the minute would be met always or never."""
    loop = asyncio.get_running_loop()
    start = loop.time() + every * offset
    for number in itertools.count():
        await asyncio.sleep(start + every * (number + random.random() / 4) - loop.time())
        yield number
        if loop.time() > start + every * (number + 1):  # it took longer: no hurry afterwards
            start = loop.time() - every * number


async def _serve(caller: Caller, port: int) -> asyncio.Server:
    """The metrics over HTTP."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, EOFError, ValueError):
            async with asyncio.timeout(5):
                line = (await reader.readuntil(b"\r\n\r\n")).split()
                is_known = line[:2] == [b"GET", b"/metrics"]
                status, body = ("200 OK", caller.metrics()) if is_known else ("404 Not Found", "")
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n"
                    f"Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n"
                    f"{body}".encode()
                )
                await writer.drain()

    return await asyncio.start_server(answer, "127.0.0.1", port)


def configuration(probes: Iterable[Measured], calls_a_minute: float = CALLS_A_MINUTE) -> str:
    """What the caller is started with, its secrets readable."""
    asked = [as_json(probe) for probe in probes]
    data = {"version": VERSION, "calls_a_minute": calls_a_minute, "probes": asked}
    return json.dumps(data, indent=1) + "\n"


def from_configuration(data: Mapping[str, Any]) -> Caller:
    """What `configuration` wrote; raises ValueError for anything else."""
    if data.get("version") != VERSION:
        raise ValueError(f"this caller reads version {VERSION}, that is {data.get('version')}")
    probes = [from_json(each) for each in data["probes"]]
    for probe in probes:
        if not isinstance(probe, Measured):
            raise ValueError(f"a probe of kind {probe.kind} does not measure itself")
    measured = [probe for probe in probes if isinstance(probe, Measured)]
    return Caller(measured, calls_a_minute=data["calls_a_minute"])


async def _until_stopped(caller: Caller, port: int) -> None:
    loop = asyncio.get_running_loop()
    async with await _serve(caller, port):
        asking = asyncio.create_task(caller.ask_all())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asking.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await asking


def main() -> None:
    parser = argparse.ArgumentParser("python -m callready.probes.caller", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE")
    parser.add_argument("--port", type=int, default=CALLER_PORT, help="default %(default)s")
    options = parser.parse_args()
    try:
        caller = from_configuration(json.loads(options.config.read_text()))
    except (OSError, ValueError, KeyError) as error:
        # Not what is behind it, which quotes values.
        why = reason(error) if isinstance(error, OSError) else error
        sys.exit(f"{options.config}: {why}; callready's deploy writes it")
    asyncio.run(_until_stopped(caller, options.port))


if __name__ == "__main__":
    main()
