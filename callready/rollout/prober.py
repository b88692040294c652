"""The prober process of a run (callready/probes/__main__.py): started once, asked for all hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any

from callready.probes import Finding
from callready.probes.__main__ import VERSION
from callready.probes.probe import Probe, as_json, hidden

WITHIN = 10.0
"""Seconds in which each probe must have passed once; a service that just started may need some."""
GRACE = 60.0
"""Seconds beyond that after which a prober that does not answer is given up."""

ROOT = Path(__file__).parents[2]

Waiting = dict[int, SimpleQueue[dict[str, Any]]]


class Prober:
    """Has probes asked by a process that starts when first needed and ends with this one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._waiting: Waiting = {}
        self._asked = 0

    def start(self, probes: Iterable[Probe]) -> None:
        """Have it ready for probes of these kinds, without waiting for it."""
        self._send({probe.kind for probe in probes}, (), 0)

    def ask(self, probes: Sequence[Probe], within: float = WITHIN) -> list[Finding | None]:
        """Ask probes at the same time.

        Args:
            probes: what to ask.
            within: seconds in which each must have passed once; 0 asks once.

        Returns:
            What each found, in their order; None for one that passed without a word.
        """
        if not probes:
            return []
        waiting = self._send({probe.kind for probe in probes}, probes, within)
        try:
            answer = waiting.get(timeout=within + GRACE)
        except Empty:
            answer = {"error": f"no answer within {within + GRACE:g} s"}
        if error := answer.get("error"):
            broken = {
                "suffers": "the probes did not run",
                "look_at": "the load of this machine",
                "evidence": error,
            }
            answer = {"findings": [broken, *[None] * (len(probes) - 1)]}
        return [found and hidden(Finding(**found), probes) for found in answer["findings"]]

    def _send(
        self, kinds: set[str], probes: Sequence[Probe], within: float
    ) -> SimpleQueue[dict[str, Any]]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process, self._waiting = self._started()
            self._asked += 1
            waiting = self._waiting[self._asked] = SimpleQueue()
            request = {
                "version": VERSION,
                "id": self._asked,
                "within": within,
                "kinds": sorted(kinds),
                "probes": [as_json(probe) for probe in probes],
            }
            assert self._process.stdin
            try:
                self._process.stdin.write(f"{json.dumps(request)}\n")
                self._process.stdin.flush()
            except OSError as error:
                waiting.put({"error": f"the prober has ended: {error.strerror}"})
            return waiting

    def _started(self) -> tuple[subprocess.Popen[str], Waiting]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (_read closes it)
        process = subprocess.Popen(
            [sys.executable, "-m", "callready.probes"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env={**os.environ, "PYTHONPATH": path},
        )
        waiting: Waiting = {}
        Thread(target=_read, args=(process, words, waiting), daemon=True).start()
        return process, waiting


def _read(process: subprocess.Popen[str], words: IO[str], waiting: Waiting) -> None:
    """Hand its answers to those who wait; when it ends, say why to all that still do."""
    assert process.stdout
    for line in process.stdout:
        answer = json.loads(line)
        waiting.pop(answer["id"]).put(answer)
    status = process.wait()
    with words:
        words.seek(0)
        last = (words.read().strip().splitlines() or [f"exit status {status}"])[-1]
    for each in list(waiting.values()):
        each.put({"error": last})
