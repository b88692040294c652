"""How a host drains an SFU that is one of several, in a folder that its scripts take for the whole
host: what `ss`, `systemctl` and LiveKit say is made up, the edge's socket and the processes are real."""

from __future__ import annotations

import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from callready.release.bundle import APPLY
from callready.release.facts import host_script

# A LiveKit that says each SIGTERM, and goes on.
LIVEKIT = """
import pathlib, signal, sys
told = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: told.write_text(told.read_text() + "told"))
told.touch()
while True:
    signal.pause()
"""
NODES = """\
│       ID        │   IP Address   │ Region │ CPUs │     Started At      │
│                 │                │        │      │     Updated At      │
├─────────────────┼────────────────┼────────┼──────┼─────────────────────┤
│ ND_ownownownown │ 192.0.2.11     │ gra    │    2 │ 2026-01-01 00:00:00 │
│    (SERVING)    │                │        │      │ {now} │
├─────────────────┼────────────────┼────────┼──────┼─────────────────────┤
│ ND_otherotherot │ 192.0.2.12     │ {region:<6} │    2 │ 2026-01-01 00:00:00 │
│ {state:^15} │                │        │      │ {seen} │
└─────────────────┴────────────────┴────────┴──────┴─────────────────────┘
"""
PRELUDE = """
systemctl() {
    case $* in *MainPID*) echo @PID@ ;; *) echo "systemctl $*" ;; esac
}
PATH=$CALLREADY_ROOT/bin:$PATH
journalctl() { cat "$CALLREADY_ROOT/journal"; }
ss() { cat "$CALLREADY_ROOT/ss$1"; }
nft() {
    case $1 in
        -f) cat > "$CALLREADY_ROOT/nft" ;;
        list) [ -e "$CALLREADY_ROOT/nft" ] ;;
        *) rm -f "$CALLREADY_ROOT/nft" ;;
    esac
}
sleep() { command sleep 0.02; }
"""
STEP = "drain_node %d tcp/7880 tcp/7881 tcp/7880 tcp/7881"
SOCKET = '0 0 127.0.0.1:7880 127.0.0.1:{port} users:(("livekit",pid=@PID@,fd=9)) lastsnd:{last}\n'


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Edge(socketserver.ThreadingUnixStreamServer):
    """HAProxy's socket for the operator: keeps what it is told."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        super().__init__(str(path), Told)


class Told(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Edge)
        self.server.said.append(self.rfile.readline().decode().strip())
        self.wfile.write(b"\n")


class Machine:
    """A folder that is the whole host, on which LiveKit runs."""

    def __init__(self, root: Path, edge: Edge) -> None:
        self.root, self.edge = root, edge
        self.told = root / "told"
        self.livekit = subprocess.Popen([sys.executable, "-c", LIVEKIT, self.told])
        eventually(self.told.exists)
        for folder in ("bin", "etc/haproxy", "etc/livekit", "usr/local/bin", "run/callready"):
            (root / folder).mkdir(parents=True)
        rule = (
            "http-request return status 503 if { path / } { srv_uweight(to_a/upstream) eq 0 } { x }"
        )
        (root / "etc/haproxy/haproxy.cfg").write_text(f"    {rule}\n")
        (root / "etc/livekit/livekit.yaml").write_text("region: gra\nrtc:\n  node_ip: 192.0.2.11\n")
        (root / "journal").touch()
        (root / "bin/systemd-run").write_text('#!/bin/sh\necho "systemd-run $*"\n')
        (root / "bin/systemd-run").chmod(0o755)
        self.nodes()
        self.open()

    @property
    def pid(self) -> int:
        return self.livekit.pid

    @property
    def mark(self) -> Path:
        return self.root / "run/callready/livekit.drained"

    def nodes(self, state: str = "(SERVING)", region: str = "gra", age: float = 0) -> None:
        """What LiveKit lists, the other one as it was seen that many seconds ago."""
        form, now = "%Y-%m-%d %H:%M:%S", time.time()
        said = NODES.format(
            now=time.strftime(form, time.gmtime(now)),
            seen=time.strftime(form, time.gmtime(now - age)),
            state=state,
            region=region,
        )
        program = self.root / "usr/local/bin/livekit-server"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
        program.chmod(0o755)

    def open(self, udp: int = 0, ice: int = 0, sockets: str = "") -> None:
        """What LiveKit has open beside its own ports."""
        users = f'users:(("livekit",pid={self.pid},fd=7))'
        ports = [f"UNCONN 0 0 192.0.2.11:{50000 + n} 0.0.0.0:* {users}\n" for n in range(udp)]
        media = [f"0 0 192.0.2.11:7881 192.0.2.99:{n + 1} {users}\n" for n in range(ice)]
        for name, text in (
            ("-Hlnup", "".join(ports)),
            ("-Htnp", "".join(media)),
            ("-HOtnpi", sockets.replace("@PID@", str(self.pid))),
            ("-Hltnp", "".join(f"LISTEN 0 0 *:{port} *:* {users}\n" for port in (7880, 7881))),
        ):
            (self.root / "new").write_text(text)
            (self.root / "new").rename(self.root / f"ss{name}")

    def run(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", script, *arguments],
            env={**os.environ, "CALLREADY_ROOT": str(self.root)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def apply(self, *steps: str) -> subprocess.Popen[str]:
        """Steps, as a deploy runs them."""
        here = self.root / "here"
        here.mkdir()
        for name, content in APPLY.items():
            (here / name).write_bytes(content)
        (here / "steps").write_text(
            "\n".join((PRELUDE.replace("@PID@", str(self.pid)), *steps, "echo done"))
        )
        return self.run(f"{here}/apply.sh", str(here))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "run/haproxy").mkdir(parents=True)
    with Edge(tmp_path / "run/haproxy/admin.sock") as edge:
        threading.Thread(target=edge.serve_forever, daemon=True).start()
        made = Machine(tmp_path, edge)
        yield made
        made.livekit.kill()
        made.livekit.wait()
        edge.shutdown()


def until(deploy: subprocess.Popen[str], words: str) -> list[str]:
    """What a deploy says until it says that."""
    lines = []
    assert deploy.stdout
    for line in deploy.stdout:
        lines.append(line.rstrip("\n"))
        if words in line:
            return lines
    raise AssertionError(lines)


def rest(deploy: subprocess.Popen[str]) -> list[str]:
    return deploy.communicate(timeout=30)[0].splitlines()


CLOSED, OPEN = (f"set server to_a/upstream weight {n}%" for n in (0, 100))


def test_it_is_told_when_there_is_somebody_to_wait_for_and_not_before(machine: Machine) -> None:
    """LiveKit would end at once, and cut what it relays."""
    machine.open(sockets=SOCKET.format(port=40001, last=9000))
    deploy = machine.apply(STEP % 100_000)
    lines = until(deploy, "0 media ports in use, 1 WebSockets, ")
    (guard,) = (line for line in lines if line.startswith("systemd-run"))
    release = machine.root / "usr/local/lib/callready/release"
    assert guard.endswith(f"{release} watch-drain {deploy.pid} {machine.pid} 100000")
    assert f"ExecStopPost={release} open-edge" in guard and os.access(release, os.X_OK)
    assert machine.edge.said == [CLOSED] and not machine.mark.exists()
    machine.open(ice=1, sockets=SOCKET.format(port=40001, last=9000))
    eventually(lambda: machine.told.read_text() == "told")
    assert machine.mark.read_text() == f"{machine.pid}\n"
    until(deploy, "1 media ports in use, 1 WebSockets, ")
    machine.open(udp=2)
    until(deploy, "2 media ports in use, 0 WebSockets, ")
    machine.open()
    assert rest(deploy)[-1] == "done" and deploy.returncode == 0
    assert not machine.mark.exists()  # it ends by itself


def test_what_is_no_websocket_holds_nothing(machine: Machine) -> None:
    """A connection that nothing comes over, and one for a request, which is another at each look."""
    idle = SOCKET.format(port=40002, last=12001)
    machine.open(sockets=SOCKET.format(port=40001, last=0).replace(" lastsnd:0", "") + idle)
    deploy = machine.apply(STEP % 100_000)
    until(deploy, "0 media ports in use, 1 WebSockets, ")
    machine.open(sockets=SOCKET.format(port=40003, last=0) + idle)
    assert rest(deploy)[-1] == "done"


def test_rooms_that_stay_are_named_and_end_by_sigkill(machine: Machine) -> None:
    """A second SIGTERM would end their calls for good."""
    began = '{"msg":"starting RTC session","room":"%s","roomID":"RM_1","x":{"room":"no"}}\n'
    ended = '{"msg":"room closed","room":"%s","roomID":"RM_1"}\n'
    rooms = ["over", "callready-1", 'a \\"b\\"', *(f"r{n}" for n in range(11))]
    words = "".join(began % room for room in rooms) + ended % "over" + ended % "r1" + began % "r1"
    plain = 'INFO\tlivekit\troommanager.go:433\tstarting RTC session\t{"room": "plain", "x": 1}\n'
    (machine.root / "journal").write_text(words)
    machine.open(udp=1)
    lines = rest(machine.apply(STEP % 2, "restart livekit-server.service"))
    (over,) = (line for line in lines if line.startswith("the time is over: 1 media ports"))
    names = over.partition("reconnect once: ")[2]
    assert names.count('"r') >= 9 and names.endswith(" and 2 more"), over
    assert '"over"' not in over and "callready-" not in over and '"no"' not in over
    kill = lines.index("systemctl kill -s KILL livekit-server.service")
    assert kill < lines.index("systemctl restart livekit-server.service")
    assert not machine.mark.exists()
    (machine.root / "journal").write_text(plain + began % 'a \\"b\\"')
    over = next(line for line in rest(machine.apply(STEP % 1)) if "time is over" in line)
    assert '"plain"' in over and '"a \\"b\\""' in over
    (machine.root / "journal").write_text("")
    over = next(line for line in rest(machine.apply(STEP % 1)) if "time is over" in line)
    assert over.endswith("none that the log names (livekit.logging.level)")


def test_callers_who_stay_move_before_it_ends(machine: Machine) -> None:
    """Redis refuses it what it asks, until it has been restarted."""
    machine.open(udp=1)
    rules = machine.root / "nft"
    assert rest(machine.apply(STEP % 1))[-1] == "done"
    assert "meta skuid @user tcp sport != { 7880, 7881 } reject" in rules.read_text()
    lines = rest(machine.apply("restart livekit-server.service"))
    assert "systemctl kill -s KILL livekit-server.service" in lines
    assert not rules.exists()


def test_callers_stay_to_the_end_where_no_edge_leads_them_to_others(machine: Machine) -> None:
    (machine.root / "etc/haproxy/haproxy.cfg").unlink()
    machine.open(udp=1)
    assert any("the time is over" in line for line in rest(machine.apply(STEP % 1)))
    assert machine.mark.exists() and not (machine.root / "nft").exists()


@pytest.mark.parametrize("how", ["SIGINT", "nobody listens"])
def test_a_deploy_that_stops_while_it_drains(machine: Machine, how: str) -> None:
    """Says how it goes on; another deploy does not tell LiveKit once more."""
    machine.open(udp=1)
    deploy = machine.apply(STEP % 100_000)
    eventually(lambda: machine.told.read_text() == "told")
    until(deploy, "media ports in use")
    if how == "SIGINT":
        deploy.send_signal(signal.SIGINT)
        assert any("systemctl kill -s KILL livekit-server" in line for line in rest(deploy))
        assert deploy.returncode == 130
    else:
        assert deploy.stdout
        deploy.stdout.close()
        assert deploy.wait(timeout=30) == 141
    assert machine.mark.exists() and machine.livekit.poll() is None
    again = machine.apply(STEP % 1, "restart livekit-server.service")
    lines = rest(again)
    assert lines[0] == "systemctl stop callready-drain.service"
    assert "systemctl kill -s KILL livekit-server.service" in lines
    assert machine.told.read_text() == "told"


@pytest.mark.parametrize(("seconds", "hidden"), [(-1, False), (100_000, True), (100_000, False)])
def test_what_such_a_deploy_leaves_ends(machine: Machine, seconds: int, hidden: bool) -> None:
    """The edge is open at once; LiveKit ends with its calls, when the time is over, or at once where
    its callers have moved."""
    machine.mark.write_text(f"{machine.pid}\n")
    if hidden:
        (machine.root / "nft").touch()
    script = machine.root / "release"
    head, tail = host_script("release.sh").decode().split("\ncase ", 1)
    stubs = PRELUDE.replace("@PID@", str(machine.pid))
    script.write_text(f"{head}{stubs}\ncase {tail}")
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    watch = machine.run(
        str(script), "watch-drain", gone.stdout.strip(), str(machine.pid), str(seconds)
    )
    is_over = seconds < 0 or hidden
    if not is_over:
        eventually(lambda: machine.edge.said == [OPEN])
        assert watch.poll() is None
        machine.livekit.kill()
        machine.livekit.wait()
    lines = rest(watch)
    assert machine.edge.said == [OPEN]
    assert lines == ["systemctl kill -s KILL livekit-server.service"] * is_over
    assert not (machine.root / "nft").exists()


@pytest.mark.parametrize("other", ["shuts down", "is gone", "unknown"])
def test_a_node_that_no_other_one_replaces_goes_on_taking_calls(
    machine: Machine, other: str
) -> None:
    if other == "unknown":
        (machine.root / "usr/local/bin/livekit-server").unlink()
    elif other == "is gone":
        machine.nodes(age=60)
    else:
        machine.nodes("(SHUTTING_DOWN)")
    machine.open(udp=1)
    lines = rest(machine.apply(STEP % 2))
    assert "no other SFU takes new calls now" in lines[0] and lines[-1] == "done"
    assert machine.edge.said == [] and not machine.mark.exists()
    assert machine.told.read_text() == ""


def test_a_region_that_is_left_alone_is_said(machine: Machine) -> None:
    machine.nodes(region="waw")
    lines = rest(machine.apply(STEP % 2))
    assert "no other SFU of region gra takes new calls now: they go to other regions" in lines
    assert machine.edge.said == [CLOSED]
