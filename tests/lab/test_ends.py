"""How a deploy ends when something is in its way: a true exit status, and a sentence."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from fleet import PAIR, PYINFRA, REPOSITORY, Fleet, Host, eventually
from test_interrupted import held, idle, starting

SFU, TURN = PAIR


@contextmanager
def blackholed(host: Host, packets: str = "meta l4proto { tcp, udp }") -> Iterator[None]:
    """Lose packets from and to a host without a word; unlike a cut line, it has neighbours."""
    rules = "".join(
        f"add chain bridge blackhole {hook} {{ type filter hook {hook} priority 0; }}\n"
        f"add rule bridge blackhole {hook} {ip} {side} {address} {packets} drop\n"
        for hook, side in (("input", "saddr"), ("output", "daddr"))
        for ip, address in (("ip", host.ipv4), ("ip6", host.ipv6))
    )
    subprocess.run(["nft", "-f", "-"], input=f"add table bridge blackhole\n{rules}",
                   text=True, check=True)  # fmt: skip
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "bridge", "blackhole"], check=True)


def test_host_that_falls_silent_is_given_up_and_the_other_left_alone(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1300
    pair.data["livekit"]["logging"] = {"level": "debug"}
    pair.unsettled = True
    with held(TURN, "turnserver@calls.service"):
        process = pair.start()
        eventually(lambda: starting(TURN, "turnserver@calls.service"))
        with blackholed(TURN):
            _, said = process.communicate(timeout=40)  # 20 s and what pyinfra takes to end
    assert process.returncode == 1
    assert f"[{TURN.fqdn}] the connection broke; within 15 s of its switch the host returns" in said
    assert f"[{SFU.fqdn}] not switched, because {TURN.fqdn} failed" in said
    assert "Traceback" not in said
    eventually(lambda: idle(TURN))
    assert "level: debug" not in SFU.root("cat /etc/livekit/livekit.yaml")
    pair.deploy()
    assert "level: debug" in SFU.root("cat /etc/livekit/livekit.yaml")
    assert "total-quota=1300" in TURN.root("cat /etc/coturn/calls.conf")


def test_question_that_nobody_can_answer_is_an_error(pair: Fleet) -> None:
    pair.data["turn"]["total_quota"] = 1400
    pair.write()
    before = TURN.snapshot()
    run = subprocess.run(
        [PYINFRA, pair.inventory, "deploy.py"], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYINFRA_YES"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1
    assert "callready: no terminal to ask on: give -y or PYINFRA_YES=1" in run.stderr
    assert "Traceback" not in run.stderr and "exception" not in run.stderr
    assert TURN.snapshot() == before
