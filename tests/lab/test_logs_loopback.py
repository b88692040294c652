"""What Debian's own rsyslogd makes of callready's configuration, sent to the monitor's receiver on
loopback. It is unpacked and never installed. In place of the journal it reads a file."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from callready.release.render import render
from callready.settings.fleet import FLEET_CA
from callready.settings.monitor import Logs
from callready.settings.ports import LOGS
from tasks.logs import SECRETS
from tests.support.fleet import eventually
from tests.support.log_receiver import MON, OURS, certified, free_port, receiver
from tests.support.packages import environment, libraries, unpack

HOST = "sfu1.callready.test"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJQTEFOVEVEIjoxfQ.PLANTED-sig_nature"
END = "and that is all"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """rsyslog and the libraries this machine lacks."""
    folder = tmp_path_factory.mktemp("rsyslog")
    yield unpack(folder, "rsyslog", "rsyslog-relp")
    shutil.rmtree(folder)


@contextmanager
def forwarder(root: Path, folder: Path, port: int, anonymise: bool = False) -> Iterator[None]:
    """rsyslogd with what `tasks/logs.py` makes for a host; the file `lines` stands for its journal:
    a unit, a tab and a text each."""
    config = render(
        "logs.conf.j2",
        logs=Logs(port=port, anonymise=anonymise),
        state=str(folder / "state"),
        target="127.0.0.1",
        monitor=MON,
        ca=FLEET_CA,
        unit=LOGS,
        secrets=SECRETS,
    ).decode()
    certified(folder / "host", OURS, HOST)
    (folder / "state").mkdir(exist_ok=True)
    (folder / "lines").touch()
    config = config.replace(f"/run/credentials/{LOGS}", f"{folder}/host")
    config = config.replace(FLEET_CA, f"{folder}/ca.pem")
    source = f'module(load="imfile")\ninput(type="imfile" tag="x" file="{folder}/lines")'
    config, journals = re.subn(r'module\(\s*load="imjournal".*?\)', source, config, flags=re.S)
    assert journals == 1
    marks = 'set $!_SYSTEMD_UNIT = field($msg, 9, 1); set $!_PID = "7";\n'
    config = config.replace("if $!_PID", marks + "if $!_PID")
    config = config.replace("$.message = $msg", "$.message = field($msg, 9, 2)")
    (folder / "logs.conf").write_text(config.replace('Interval="10"', 'Interval="1"'))
    command = f"{root}/usr/sbin/rsyslogd -n -i NONE -M {libraries(root)}/rsyslog -f logs.conf"
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command.split(), cwd=folder, env=environment(root), stderr=said)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def kept(store: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(store.glob("*/*")) for line in path.open() if line]


def arrived(store: Path) -> bool:
    lines = kept(store)
    return bool(lines) and lines[-1]["message"] == END


LINES = {
    f"invalid token: {JWT}, error: token is expired": "invalid token: [hidden], error: token is "
    "expired",
    f'{{"error":"token: {JWT}","x":"{JWT[:30]}"}}': '{"error":"token: [hidden]","x":"[hidden]"}',
    f"GET /rtc?access_token={JWT}&auto=1 and /rtc?access_token=PLANTED": "GET /rtc?[hidden]&auto=1 "
    "and /rtc?[hidden]",
    '{"apiSecret":"PLANTED","at":{"Password" : "PLANTED"}}': '{"[hidden]","at":{"[hidden]"}}',
    r'err="{\"secret\":\"PLANTED\"}"': r'err="{\"[hidden]\"}"',
    "password: PLANTED; Authorization: Basic PLANTED.PLANTED=": "[hidden]; Authorization: [hidden]",
    '"authorization":"Bearer PLANTED"': '"[hidden]"',
    r'err="canceled: Post \"https://a.test/PLANTED?x\": EOF"': r'err="canceled: [hidden]\": EOF"',
    " ".join(f"secret=PLANTED{n}" for n in range(9)): "[a line with too many secrets]",
    'Failed password for root, token "a" is valid': 'Failed password for root, token "a" is valid',
    'quotes " \\ and é, "room":"daily"': 'quotes " \\ and é, "room":"daily"',
}


def journal(lines: Iterable[str], unit: str = "livekit-server.service") -> str:
    return "".join(f"{unit}\t{line}\n" for line in lines)


def test_no_secret_leaves_the_host(tmp_path: Path, unpacked: Path) -> None:
    port = free_port()
    with receiver(tmp_path, port) as store, forwarder(unpacked, tmp_path, port):
        (tmp_path / "lines").write_text(journal([*LINES, END]))
        eventually(lambda: arrived(store), 20)
    assert [each["message"] for each in kept(store)] == [*LINES.values(), END]
    assert "PLANTED" not in "".join(path.read_text() for path in store.glob("*/*"))
    assert {(e["host"], e["unit"], e["pid"]) for e in kept(store)} == {
        (HOST, "livekit-server.service", "7")
    }


def test_addresses_of_callers_are_shortened(tmp_path: Path, unpacked: Path) -> None:
    port, line = free_port(), "203.0.113.77:5000 [2001:db8:1234:5678::7]:443 at 12:34:56"
    with receiver(tmp_path, port) as store, forwarder(unpacked, tmp_path, port, True):
        (tmp_path / "lines").write_text(
            journal([line], "ssh.service") + journal([line], "haproxy.service") + journal([END])
        )
        eventually(lambda: arrived(store), 20)
    short = "203.0.113.0:5000 [2001:db8:1234:0:0:0:0:0]:443 at 12:34:56"
    assert [each["message"] for each in kept(store)] == [line, short, END]


def test_nothing_is_lost_while_the_monitor_is_away(tmp_path: Path, unpacked: Path) -> None:
    port = free_port()
    numbers = [str(number) for number in range(3000)]
    with forwarder(unpacked, tmp_path, port):
        with (tmp_path / "lines").open("a") as file:
            file.write(journal(numbers[:2000]))
            for _ in range(2):
                file.flush()
                with receiver(tmp_path, port) as store:
                    eventually(lambda: bool(kept(store)))
            file.write(journal([*numbers[2000:], END]))
        with receiver(tmp_path, port) as store:
            eventually(lambda: arrived(store), 20)
    assert [each["message"] for each in kept(store)] == [*numbers, END]


def test_others_lines_are_not_sent(tmp_path: Path, unpacked: Path) -> None:
    port = free_port()
    ours = ["haproxy.service", "turnserver@a.service", "callready-x.service", "ssh@1.service"]
    others = ["cron.service", "user@1000.service", "xhaproxy.service", "haproxy.service.d"]
    with receiver(tmp_path, port) as store, forwarder(unpacked, tmp_path, port):
        (tmp_path / "lines").write_text(
            "".join(journal(["x"], unit) for unit in others + ours) + journal([END])
        )
        eventually(lambda: arrived(store), 20)
    assert [each["unit"] for each in kept(store)][:-1] == ours


def test_nothing_is_sent_to_who_is_not_the_monitor(tmp_path: Path, unpacked: Path) -> None:
    port, said = free_port(), tmp_path / "said"
    with receiver(tmp_path, port, "turn1.callready.test") as store:
        with forwarder(unpacked, tmp_path, port):
            (tmp_path / "lines").write_text(journal(["x", END]))
            eventually(lambda: "authentication error" in said.read_text(), 20)
        assert not kept(store)
    # Its unit starts it anew every hour.
    with receiver(tmp_path, port) as store, forwarder(unpacked, tmp_path, port):
        eventually(lambda: arrived(store), 20)
    assert [each["message"] for each in kept(store)] == ["x", END]
