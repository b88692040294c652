"""The way back: `rollback.py`, and what `history.py` says of it."""

from __future__ import annotations

from tests.support.fleet import PAIR, Fleet, eventually

SFU, TURN = PAIR


def settings() -> tuple[str, str]:
    """What the running releases say."""
    level = SFU.root("grep -o 'level: .*' /etc/livekit/livekit.yaml | head -n 1")
    return level, TURN.root("grep -o 'total-quota=.*' /etc/coturn/calls.conf")


def test_fleet_goes_back_to_what_it_had_before_its_last_deploy(pair: Fleet) -> None:
    pair.unsettled = True
    for level, quota in (("debug", 1300), ("warn", 1400)):
        pair.data["livekit"]["logging"] = {"level": level}
        pair.data["turn"]["total_quota"] = quota
        pair.deploy()
    assert settings() == ("level: warn", "total-quota=1400")
    # coturn closes what the gate has allocated a second later.
    eventually(lambda: not TURN.root("ss -Hlun 'sport >= :49152'"))
    told = pair.run("--dry", file="rollback.py")
    assert told.status == 0 and settings() == ("level: warn", "total-quota=1400")
    for host, unit in ((SFU, "livekit-server.service"), (TURN, "turnserver@calls.service")):
        assert f"! unit {unit}: restart, the earlier release has it otherwise" in told.plan(
            host.name
        )
        assert f"restarting {unit} (0 media ports in use)" in told.text
    # Keys that the inventory has by now and the earlier release has not are no failure of it.
    pair.data["livekit"]["keys"]["APInew"] = "secret:livekit/new"
    pair.secrets["livekit/new"] = pair.secrets["livekit/api_secret"] + "-new"
    back = pair.run(file="rollback.py")
    assert back.status == 0, back.text
    assert settings() == ("level: debug", "total-quota=1300")
    said = [line for line in back.text.splitlines() if "confirmed release" in line]
    assert [host.fqdn in line for host, line in zip((SFU, TURN), said, strict=True)], said

    history = pair.run(file="history.py")
    assert history.status == 0
    for host in PAIR:
        lines = [line.split("\t") for line in history.text.splitlines() if host.fqdn in line]
        whats = [line[3] for line in lines if len(line) > 3]
        assert whats[-3:] == ["deploy", "deploy", "rollback"], history.text
    pair.restore()
    pair.deploy()


def test_host_that_the_last_deploy_left_alone_stays_as_it_is(pair: Fleet) -> None:
    pair.unsettled = True
    pair.data["turn"]["total_quota"] = 1500
    assert pair.deploy().changed == ["h08"]
    before = SFU.pids()
    back = pair.run(file="rollback.py")
    assert back.status == 0, back.text
    assert f"[{SFU.fqdn}]     the last deploy (" in back.text
    assert SFU.pids() == before
    assert settings()[1] != "total-quota=1500"
