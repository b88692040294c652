"""Logs on their way to the monitor: what is declared, who may write under which name, what stays."""

import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from callready.release.authority import Authority
from callready.release.declaration import Release
from callready.release.facts import Facts
from callready.release.host import log_receiver
from callready.release.host.log_receiver import AGAIN, Store, show
from callready.release.plan import plan
from tasks import declare
from tests.support.inventories import SECRETS, SFU1, TURN1, Edit, load, write_store
from tests.support.log_receiver import BOTH, FOREIGN, MON, OURS, certified, free_port, receiver

LINE = {"time": "2026-01-31T12:00:00.5+00:00", "unit": "turnserver@calls.service", "message": "hi"}


def watched(**logs: object) -> list[Edit]:
    monitor = {
        "url": "https://look.callready.test",
        "password": "secret:monitor/password",
        "page": {"webhooks": ["https://hooks.callready.test/page"]},
        "logs": logs or None,
    }
    return [
        (MON, "groups", ["monitor"]),
        (MON, "address", "192.0.2.41"),
        (MON, "edge", {}),
        (SFU1, "livekit.prometheus", {"password": "secret:livekit/prometheus"}),
        *((name, "monitor", monitor) for name in ("*", MON)),
        *((name, "fleet_ca", "secret:fleet/ca") for name in ("*", MON)),
        (MON, "tls", {"certificate": "certificates/chain.pem", "key": "certificates/key.pem"}),
    ]


@pytest.fixture
def stocked(project: Path) -> None:
    write_store({**SECRETS, "fleet/ca": "unit-fleet-ca-" + "0" * 20, "monitor/password": "9" * 32})


@pytest.mark.usefixtures("stocked")
def test_every_host_sends_to_the_monitor_and_to_nobody_else() -> None:
    fleet = load(*watched(port=9911))
    config = declare(fleet, TURN1).release.files["/etc/callready/logs.conf"].content.decode()
    assert 'target="192.0.2.41" port="9911"' in config
    assert f'tls.authMode="name" tls.permittedPeer=["{MON}"]' in config
    assert "mmanon" not in config
    own = declare(fleet, MON).release
    assert 'target="127.0.0.1"' in own.files["/etc/callready/logs.conf"].content.decode()
    assert own.services["callready-log-receiver.service"].listens == ("tcp/9911",)
    rules = own.files["/etc/callready/nftables.conf"].content.decode()
    everyone = "192.0.2.11/32, 192.0.2.21/32, 192.0.2.22/32, 192.0.2.41/32"
    assert f"ip saddr {{ {everyone} }} tcp dport 9911" in rules
    assert (
        "9911"
        not in declare(fleet, SFU1).release.files["/etc/callready/nftables.conf"].content.decode()
    )


@pytest.mark.usefixtures("stocked")
def test_who_wants_none_gets_none() -> None:
    release = declare(load(*watched()), SFU1).release
    assert "rsyslog" not in release.packages
    assert not [path for path in release.files if "logs" in path]


def test_rsyslog_of_an_operator_stays_his() -> None:
    release = Release()
    release.mask_new("rsyslog.service")
    release.package("rsyslog")
    steps = [each.function for each in plan(release, Facts()).install]
    assert steps.index("mask") < steps.index("install_packages")
    assert plan(release, Facts(packages={"rsyslog": "8.2302.0-1"})).steps == []


# The receiver

Connect = Callable[..., ssl.SSLSocket]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """A connection to a running receiver; its store is `store`."""
    port = free_port()

    def connected(
        name: str, authority: Authority = OURS, usages: tuple[str, ...] = BOTH
    ) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        if usages:
            context.load_cert_chain(*certified(tmp_path / "client", authority, name, usages))
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        return context.wrap_socket(raw, server_hostname=MON)

    with receiver(tmp_path, port):
        yield connected


def say(connection: ssl.SSLSocket, number: int, command: str, data: str = "") -> str:
    """A frame of RELP, and the answer to it; raises OSError if there is none."""
    connection.sendall(f"{number} {command} {len(data.encode())} {data}\n".encode())
    answer = connection.recv(4096).decode()
    if not answer:
        raise ConnectionError("closed")
    return answer


def kept(folder: Path) -> list[dict[str, str]]:
    lines = [line for path in sorted(folder.glob("*/*")) for line in path.open()]
    return [json.loads(line) for line in lines]


def test_a_host_writes_under_the_name_in_its_certificate_only(
    tmp_path: Path, connect: Connect
) -> None:
    with connect(TURN1) as connection:
        assert say(connection, 1, "open", "relp_version=0\ncommands=syslog").startswith("1 rsp ")
        forged = {**LINE, "host": SFU1, "other": "x"}
        assert say(connection, 2, "syslog", json.dumps(forged)) == "2 rsp 6 200 OK\n"
        assert say(connection, 3, "syslog", 'no JSON\n{"host": "x"}') == "3 rsp 6 200 OK\n"
        assert say(connection, 4, "close").startswith("4 rsp 0\n")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [TURN1]
    assert kept(tmp_path / "store") == [
        {"host": TURN1, **LINE},
        {"host": TURN1, "message": 'no JSON\n{"host": "x"}'},
    ]


@pytest.mark.parametrize(
    ("name", "authority", "usages"),
    [
        (TURN1, OURS, ()),
        (TURN1, FOREIGN, BOTH),
        (TURN1, OURS, ("server",)),
        ("../turn1", OURS, BOTH),
        (".", OURS, BOTH),
    ],
)
def test_who_has_no_name_in_the_fleet_is_refused(
    tmp_path: Path, connect: Connect, name: str, authority: Authority, usages: tuple[str, ...]
) -> None:
    with pytest.raises(OSError), connect(name, authority, usages) as connection:
        say(connection, 1, "open")
    assert not kept(tmp_path / "store")
    with connect(TURN1) as connection:
        assert say(connection, 1, "open")


def test_what_is_sent_again_is_kept_once(tmp_path: Path, connect: Connect) -> None:
    lines = [json.dumps({**LINE, "message": str(number)}) for number in range(AGAIN + 2)]
    with connect(TURN1) as connection:
        for number, line in enumerate(lines):
            say(connection, number, "syslog", line)
    with connect(TURN1) as connection:
        for number, line in enumerate([*lines[-3:], "new", *["x"] * AGAIN, lines[-1]]):
            assert say(connection, number, "syslog", line)
    said = [each["message"] for each in kept(tmp_path / "store")]
    first = [str(number) for number in range(AGAIN + 2)]
    assert said == [*first, "new", *["x"] * AGAIN, first[-1]]


def test_a_frame_that_is_too_long_ends_the_connection(tmp_path: Path, connect: Connect) -> None:
    with connect(TURN1) as connection, pytest.raises(OSError):
        connection.sendall(b"1 syslog 999999999 x")
        if not connection.recv(10):
            raise ConnectionError
    assert not kept(tmp_path / "store")


# What is kept


@pytest.fixture(autouse=True)
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_receiver, "hour", lambda: "2026-01-31T12")


def hours(store: Path, host: str, *octets: int) -> list[Path]:
    (store / host).mkdir()
    first = 13 - len(octets)
    made = [store / host / f"2026-01-31T{hour:02}.jsonl" for hour in range(first, 13)]
    for path, size in zip(made, octets, strict=True):
        path.write_bytes(b"x" * size)
    return made


def test_who_has_most_loses_its_oldest_and_never_this_hour(tmp_path: Path) -> None:
    loud, quiet = hours(tmp_path, "loud", 40, 40, 40), hours(tmp_path, "quiet", 20, 5)
    store = Store(tmp_path, 7, 70)
    assert [path.exists() for path in loud + quiet] == [False, False, True, True, True]
    assert not store.refused
    assert Store(tmp_path, 7, 44).refused == {"loud"}
    assert [path.exists() for path in loud + quiet] == [False, False, True, True, True]


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    old, new = hours(tmp_path, "host", 1, 1)
    os.utime(old, (old.stat().st_mtime - 8 * 86400,) * 2)
    Store(tmp_path, 7, 1000)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_host_that_fills_the_store_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_receiver, "MUCH", 100)
    store = Store(tmp_path, 7, 150)
    store.write("quiet", b"x")
    with pytest.raises(OSError, match="filled the store"):
        for _ in range(1000):
            store.write("loud", b"x" * 9)
    store.write("quiet", b"x")
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) < 400


def test_a_full_disk_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours(tmp_path, "host", 1)
    monkeypatch.setattr(log_receiver, "SPARE", 1 << 60)
    assert Store(tmp_path, 7, 1000).refused == {"host"}


def test_lines_are_found_by_host_unit_time_and_text(tmp_path: Path) -> None:
    for host, second, unit, message in (
        ("turn1", 1, "haproxy.service", "GET"),
        ("sfu1", 3, "livekit-server.service", '"room": "daily"\x1b[2J'),
        ("sfu1", 2, "ssh.service", "z daily"),
        ("sfu1", 2, "ssh.service", "a daily"),
    ):
        (tmp_path / host).mkdir(exist_ok=True)
        with (tmp_path / host / "2026-01-31T12.jsonl").open("a") as file:
            time = f"2026-01-31T12:00:0{second}"
            line = {"host": host, "time": time, "unit": unit, "message": message}
            file.write(json.dumps(line) + "\n" + '{"torn\n')

    def found(most: int = 9, **wanted: str) -> list[str]:
        every = {"host": "", "unit": "", "since": "", "match": ""}
        return [line.split()[0][-1] for line in show(tmp_path, most, **{**every, **wanted})]

    assert found() == ["1", "2", "2", "3"]
    assert found(2) == ["2", "3"]
    ssh = show(tmp_path, 9, host="", unit="ssh", since="", match="")
    assert [line.split()[3] for line in ssh] == ["z", "a"]
    assert found(host="sfu1", unit="livekit") == ["3"]
    assert found(match="daily", since="2026-01-31T12:00:03") == ["3"]
    assert found(match='"room": "daily"') == ["3"]
    assert found(since="2026-01-31T13") == []
    assert "\x1b" not in "".join(show(tmp_path, 9, host="", unit="", since="", match=""))
