"""The prober: asks what it is told to and says what it found, until its input ends.

Requests and answers are lines of JSON on standard input and output. A request has `version`, `id`,
`within` (seconds in which each probe must have passed once), `kinds` (what to load) and `probes`
(`probe.as_json`); its answer has `version`, `id` and `findings`, one for each probe: null, or what
was wrong. A process of its own, because the probes are asyncio programs and pyinfra has its own
patched by gevent; one for a whole run, because starting Python costs more than most probes.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from callready.probes import Finding, ProbeError, as_data
from callready.probes.kinds import KINDS, from_json
from callready.probes.probe import Probe, broken

VERSION = 1
AT_ONCE = 128
"""Probes at the same time; each waits for a network most of the time."""

_writing = Lock()


def found(probe: Probe, end: float) -> Finding | None:
    """Try until it passes (None, or what callers could have better) or `end` has come (what was
    wrong the last time)."""
    pause = 0.2
    while True:
        try:
            return probe.ask()
        except ProbeError as error:
            finding = error.finding
        except Exception as error:
            finding = broken(error)
        if time.monotonic() + pause > end:
            return finding
        time.sleep(pause)
        pause = min(2 * pause, 1)


def answer(request: dict[str, Any], probers: ThreadPoolExecutor) -> None:
    """Ask what one request names, and print what was found."""
    if request["version"] != VERSION:
        reply: dict[str, Any] = {"error": f"this prober speaks version {VERSION}"}
    else:
        try:
            probes = [from_json(item) for item in request["probes"]]
        except ValueError as error:
            reply = {"error": str(error)}
        else:
            end = time.monotonic() + request["within"]
            findings = probers.map(lambda probe: found(probe, end), probes)
            reply = {"findings": [as_data(each) for each in findings]}
    with _writing:
        print(json.dumps({"version": VERSION, "id": request["id"], **reply}), flush=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it belongs to the deploy: ends without a word
    with ThreadPoolExecutor(AT_ONCE) as probers, ThreadPoolExecutor(AT_ONCE) as requests:
        for line in sys.stdin:
            request = json.loads(line)
            for kind in KINDS.keys() & set(request["kinds"]):
                # Here and not in the threads, which would import the same at once.
                importlib.import_module(f"callready.probes.{KINDS[kind].module}")
            requests.submit(answer, request, probers)


if __name__ == "__main__":
    main()
