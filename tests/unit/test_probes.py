"""The probes' pure parts, and those that need no LiveKit or coturn, on loopback."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from livekit.api import TokenVerifier
from pydantic import SecretStr
from websockets.sync.server import ServerConnection, serve

from callready.probes import (
    ProbeError,
    app,
    as_data,
    as_line,
    livekit,
    ports,
    reason,
    secret_from,
    stun,
    tls,
    turn,
    webrtc,
)
from callready.probes.kinds import Health
from callready.probes.kinds import LiveKit as LiveKitProbe
from callready.probes.probe import Measurement
from callready.probes.turn import Credentials, IceServer, TurnRefused, TurnServer
from callready.settings.uris import place

SECRET = SecretStr("planted-9f3b-in-no-output")


def cli(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"callready.probes.{module}", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
        cwd=Path(__file__).parents[2],
    )


def test_a_token_is_one_that_livekits_own_verifier_takes() -> None:
    secret = SecretStr("s" * 32)
    made = livekit.token("APIkey", secret, "daily", "somebody", create=True).get_secret_value()
    claims = TokenVerifier("APIkey", "s" * 32).verify(made)
    assert claims.video and (claims.identity, claims.video.room) == ("somebody", "daily")
    assert claims.video.room_join and claims.video.room_create
    ended = livekit.token("APIkey", secret, ttl=-3600).get_secret_value()
    for key, other, refused in (("APIkey", "t" * 32, made), ("APIkey", "s" * 32, ended)):
        with pytest.raises(jwt.PyJWTError):
            TokenVerifier(key, other).verify(refused)


def free_port(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(family, kind) as probe:
        probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Credentials


def test_minted_credentials_are_what_openssl_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    # printf %s 1600000600:bob | openssl dgst -sha1 -hmac 'a shared secret' -binary | base64
    monkeypatch.setattr("time.time", lambda: 1_600_000_000.9)
    minted = turn.mint(SecretStr("a shared secret"), 600, "bob")
    assert (minted.username, minted.password) == ("1600000600:bob", "QEzJHnuLHuW0aR79b7JvGfoelB8=")


def test_every_minted_user_has_a_name_of_its_own() -> None:
    names = {turn.mint(SECRET, 60).username.partition(":")[2] for _ in range(50)}
    assert len(names) == 50


def test_secrets_show_in_no_repr_and_no_result() -> None:
    hidden = SECRET.get_secret_value()
    server = IceServer(("turn:turn.example.com",), "user", hidden)
    request = webrtc.Request("ws://x", (hidden, hidden), (server,), False, None, 1)
    for value in (
        Credentials("user", hidden),
        server,
        livekit.Joined("1", "ND_1", (server,), 0),
        request,
    ):
        for text in (repr(value), as_line(value), json.dumps(as_data(value))):
            assert hidden not in text
            assert "user" in text or "ws://x" in text


def test_a_secret_comes_from_the_environment_or_a_private_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURN_SECRET", "from-environment")
    (tmp_path / "secret").write_text("from-file\n")
    assert secret_from("TURN_SECRET", None).get_secret_value() == "from-environment"
    assert secret_from("TURN_SECRET", str(tmp_path / "secret")).get_secret_value() == "from-file"
    monkeypatch.delenv("TURN_SECRET")
    with pytest.raises(ProbeError, match="set TURN_SECRET in the environment"):
        secret_from("TURN_SECRET", None)
    with pytest.raises(ProbeError, match=r"No such file or directory.*/absent"):
        secret_from("TURN_SECRET", str(tmp_path / "absent"))


def test_no_command_takes_a_secret_as_an_argument() -> None:
    for module in ("stun", "turn", "tls", "livekit", "webrtc", "peer", "ports", "app"):
        done = cli(module, "--help")
        assert done.returncode == 0, done.stderr
        options = {
            word.strip("[],") for word in done.stdout.split() if word.startswith(("--", "[--"))
        }
        assert not options & {"--secret", "--password", "--token", "--api-secret"}, module


# URIs and texts


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("turn:turn1.lab.test", TurnServer("turn1.lab.test", 3478, "udp")),
        ("turn:turn1.lab.test:3479?transport=udp", TurnServer("turn1.lab.test", 3479, "udp")),
        ("turn:198.51.100.21:3478?transport=tcp", TurnServer("198.51.100.21", 3478, "tcp")),
        ("turns:turn1.lab.test", TurnServer("turn1.lab.test", 5349, "tls")),
        ("turns:turn1.lab.test:443?transport=tcp", TurnServer("turn1.lab.test", 443, "tls")),
        ("turn:[2001:db8:ca11::21]:3478", TurnServer("2001:db8:ca11::21", 3478, "udp")),
    ],
)
def test_turn_uris(uri: str, server: TurnServer) -> None:
    assert TurnServer.from_uri(uri) == server
    assert TurnServer.from_uri(server.uri) == server


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "turn1.lab.test",
        "turn:",
        "stun:turn1.lab.test",
        "turn:a:b",
        "turn://a:3478",
        "turns:a?transport=udp",
        "turn:a?transport=sctp",
        "turn:2001:db8::1",
    ],
)
def test_no_turn_uri(uri: str) -> None:
    with pytest.raises(ProbeError, match="no STUN or TURN URI"):
        TurnServer.from_uri(uri)


@pytest.mark.parametrize("code", [400, 401, 403, 437, 438, 440, 441, 442, 443, 486, 508, 599])
def test_a_refusal_says_what_callers_suffer_and_what_to_look_at(code: int) -> None:
    error = TurnRefused(TurnServer("turn1.lab.test", 5349, "tls"), code, "Because")
    assert error.code == code
    assert "callers get no relay through turns:turn1.lab.test:5349?transport=tcp" in str(error)
    assert f"({code} Because)" in str(error)
    assert len(error.finding.look_at) > 10


@pytest.mark.parametrize(
    ("url", "scheme", "path", "expected"),
    [
        ("ws://sfu1.lab.test:7880", "http", None, "http://sfu1.lab.test:7880/"),
        ("wss://a/rtc?x=1", "http", None, "https://a/rtc?x=1"),
        ("https://a", "ws", "/rtc?b=2", "wss://a/rtc?b=2"),
    ],
)
def test_web_urls(url: str, scheme: app.Scheme, path: str | None, expected: str) -> None:
    assert app.web_url(url, scheme, path) == expected


@pytest.mark.parametrize("url", ["", "sfu1.lab.test", "sfu1.lab.test:7880", "ftp://a", "ws://"])
def test_no_web_url(url: str) -> None:
    with pytest.raises(ProbeError, match="is no ws://"):
        app.web_url(url, "http")


def test_a_reason_is_the_innermost_one() -> None:
    refused = OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = refused
    assert reason(wrapped) == "Connection refused"
    both = OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 101] Connect c")
    assert reason(both) == "Connection refused, Network is unreachable"
    assert reason(TimeoutError()) == "no answer in time"
    assert reason(socket.gaierror(-2, "Name or service not known")) == "the name does not resolve"


def test_calls_count_what_succeeded_and_say_why_not() -> None:
    side = webrtc.Participant(0.2, 0, 0, "host", "", 1, "host", "", 1, "udp", "", 0.001, {})
    slow = dataclasses.replace(side, connect_seconds=0.6)
    outcomes = iter([webrtc.Call((side, slow), 0, 0), None, webrtc.Call((side, side), 0, 0)])

    def attempt() -> webrtc.Call:
        outcome = next(outcomes)
        if outcome is None:
            raise ProbeError("no call", "the cable")
        return outcome

    assert webrtc.calls(3, attempt) == webrtc.Calls(
        3, 2, (0.6, 0.2), 0.4, 0.6, ("no call. Look at: the cable",)
    )


def test_calls_are_given_up_after_so_many_failures() -> None:
    def attempt() -> webrtc.Call:
        raise ProbeError("no call", "the cable")

    got = webrtc.calls(5, attempt, give_up=1)
    assert (got.attempts, got.succeeded) == (1, 0)


def test_a_call_that_lasts_is_held_to_its_limits() -> None:
    good = webrtc.Participant(
        0.2, 0, 0, "host", "", 1, "host", "", 1, "udp", "", 0.001, {}, 0.01, 0.004, 210_000
    )
    poor = dataclasses.replace(good, loss=0.2, jitter=0.5, bitrate=10_000)
    limits = webrtc.LIMITS
    assert webrtc.shortcomings(webrtc.Call((good, good), 0, 0), limits) == []
    found = webrtc.shortcomings(webrtc.Call((good, poor), 0, 1), limits)
    assert [each.evidence for each in found] == [
        "loss 20.0%, more than 5.0%",
        "jitter 0.500, more than 0.030",
        "10 kbit/s of video arrive, less than 150",
        "1 reconnects",
    ]


PARTICIPANTS = """
import json, os, sys, time
for line in sys.stdin:
    match json.loads(line)["url"]:
        case "dead":
            sys.exit(3)
        case "hung":
            time.sleep(600)
        case "bad":
            print(json.dumps({"suffers": "s", "look_at": "l", "evidence": ""}), flush=True)
        case _:
            print(json.dumps({**GOOD, "retries": os.getpid()}), flush=True)
"""


def test_a_process_makes_calls_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    side = webrtc.Participant(0.2, 0, 0, "host", "", 1, "host", "", 1, "udp", "", 0.001, {})
    good = as_data(webrtc.Call((side, side), 0, 0))
    script = f"GOOD = {good!r}\n{PARTICIPANTS}"
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    monkeypatch.setattr(
        webrtc, "started", lambda *_: subprocess.Popen(command, stdin=pipe, stdout=pipe)
    )
    monkeypatch.setattr(webrtc, "_idle", defaultdict(list))

    def process(url: str) -> int:
        return webrtc.call(url, (SECRET, SECRET), duration=0).retries

    first = process("good")
    assert process("good") == first
    with pytest.raises(ProbeError, match="Look at: l"):
        process("bad")
    second = process("good")
    assert second != first
    with pytest.raises(ProbeError, match="its process ended with status 3 and no result"):
        process("dead")
    assert process("good") not in (first, second)
    monkeypatch.setattr(webrtc, "CONNECT_TIMEOUT", 0.01)
    with pytest.raises(ProbeError, match="its process did not end in 0 s and was killed"):
        process("hung")


# Commands


def test_a_failed_probe_is_one_line_and_exit_status_1() -> None:
    port = str(free_port())
    done = cli("stun", "127.0.0.1", port, "--transport", "tcp")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("FAILED callers learn no public address")
    assert "Connection refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = cli("stun", "127.0.0.1", port, "--transport", "tcp", "--json")
    failure = json.loads(done.stdout)
    assert (done.returncode, failure["ok"], done.stderr) == (1, False, "")
    assert port in failure["look_at"]


def test_a_command_says_which_secret_is_missing() -> None:
    done = cli("turn", "allocate", "127.0.0.1")
    assert done.returncode == 1
    assert "set TURN_SECRET in the environment" in done.stderr


def test_stun_over_udp_notices_a_closed_port() -> None:
    with pytest.raises(ProbeError, match=r"stun:\[::1\]:\d+ over udp: Connection refused"):
        stun.binding("::1", free_port(socket.AF_INET6, socket.SOCK_DGRAM))


# Ports


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_sweep_finds_exactly_the_open_ports(family: int) -> None:
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    closed = [free_port(family) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server((address, 0), family=family)) for _ in range(3)
        ]
        listening = [each.getsockname()[1] for each in listeners]
        found = ports.sweep(address, [*closed, *listening], concurrency=2)
    assert found.open == set(listening)
    assert found.refused == set(closed) - set(listening)
    assert found.filtered == set()


def test_a_port_that_answers_nothing_is_filtered() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(3):  # a full accept queue drops connection attempts
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            found = ports.sweep("127.0.0.1", [port], timeout=0.2)
    assert (found.open, found.filtered) == (frozenset(), frozenset({port}))


def test_the_usual_ports_hold_the_well_known_ones() -> None:
    usual = ports.usual()
    assert {22, 80, 443, 3306, 5432, 6379, 7880, 8080, 27017} <= set(usual)
    assert 1000 < len(usual) < 1500


def test_the_ports_command_fails_for_an_unplanned_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = cli("ports", "127.0.0.1", "--ports", port, "--planned", "22")
        assert done.returncode == 1
        assert f"on ports nobody planned: {port}" in done.stderr
        assert cli("ports", "127.0.0.1", "--ports", port, "--planned", port).returncode == 0
    assert cli("ports", "127.0.0.1", "--ports", "0-70000").returncode == 2


# TLS


@dataclasses.dataclass
class Authority:
    """Signs certificates into files below `folder`."""

    folder: Path

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.file = str(self.folder / "ca.pem")
        own = self._builder(self.name, 10).add_extension(x509.BasicConstraints(True, None), True)
        Path(self.file).write_bytes(
            own.public_key(self.key.public_key())
            .sign(self.key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def _builder(self, subject: x509.Name, days: float) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=20))
            .not_valid_after(now + timedelta(days=days))
        )

    def context(self, name: str, days: float = 10.5) -> tuple[ssl.SSLContext, x509.Certificate]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(subject, days)
            .public_key(key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
            .sign(self.key, hashes.SHA256())
        )
        pem = self.folder / f"{name}{days}.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context, certificate


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextlib.contextmanager
def echo_server(context: ssl.SSLContext | None) -> Iterator[int]:
    """A server that sends back what it is sent, in a thread with a loop of its own."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(echo, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


def test_a_good_certificate_is_described(authority: Authority) -> None:
    context, certificate = authority.context("turn1.lab.test")
    with echo_server(context) as port:
        seen = tls.served("127.0.0.1", port, "turn1.lab.test", authority.file)
    assert int(seen.serial, 16) == certificate.serial_number
    assert (seen.names, seen.days_left, seen.chain_ok) == (("turn1.lab.test",), 10, True)
    assert seen.tls_version == "TLSv1.3"


@pytest.mark.parametrize(
    ("certificate_name", "days", "trusted", "message"),
    [
        ("turn2.lab.test", 10.5, True, "its name is not turn1.lab.test, it names turn2.lab.test"),
        ("turn1.lab.test", -1, True, "its validity: it has expired"),
        ("turn1.lab.test", 10.5, False, "its chain: unable to get local issuer certificate"),
    ],
)
def test_a_bad_certificate_is_refused_for_its_reason(
    authority: Authority, certificate_name: str, days: float, trusted: bool, message: str
) -> None:
    context, certificate = authority.context(certificate_name, days)
    ca_file = authority.file if trusted else None
    with echo_server(context) as port:
        with pytest.raises(ProbeError) as failure:
            tls.served("127.0.0.1", port, "turn1.lab.test", ca_file)
        unverified = tls.served("127.0.0.1", port, "turn1.lab.test", verify=False)
    assert message in str(failure.value)
    assert unverified.serial in str(failure.value)
    assert int(unverified.serial, 16) == certificate.serial_number
    assert unverified.chain_ok is None


def test_no_tls_and_no_listener_are_told_apart() -> None:
    with echo_server(None) as port, pytest.raises(ProbeError, match="cannot open TLS"):
        tls.served("127.0.0.1", port, "turn1.lab.test")
    with pytest.raises(ProbeError, match=r"cannot connect to 127\.0\.0\.1.*Connection refused"):
        tls.served("127.0.0.1", free_port(), "turn1.lab.test")


def test_the_forwarder_carries_plain_bytes_through_verified_tls(authority: Authority) -> None:
    async def through(port: int) -> bytes:
        forwarder = tls.tls_forwarder("127.0.0.1", port, "turn1.lab.test", authority.file)
        async with forwarder as local:
            reader, writer = await asyncio.open_connection("127.0.0.1", local)
            writer.write(b"x" * 100_000)
            received = await asyncio.wait_for(reader.readexactly(100_000), 10)
            writer.close()
            return received

    with echo_server(authority.context("turn1.lab.test")[0]) as port:
        assert asyncio.run(through(port)) == b"x" * 100_000
    with (
        echo_server(authority.context("turn2.lab.test")[0]) as port,
        pytest.raises(ProbeError, match=r"it names turn2\.lab\.test"),
    ):
        asyncio.run(through(port))


def test_the_forwarder_says_which_site_http_requests_are_for(authority: Authority) -> None:
    asked = b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: 127.0.0.1:%d\r\n\r\nmore"

    async def through(port: int) -> bytes:
        name = "turn1.lab.test"
        forwarder = tls.tls_forwarder("127.0.0.1", port, name, authority.file, host=name)
        async with forwarder as local:
            reader, writer = await asyncio.open_connection("127.0.0.1", local)
            writer.write(asked % local)
            received = await asyncio.wait_for(reader.readuntil(b"more"), 10)
            writer.close()
            return received

    with echo_server(authority.context("turn1.lab.test")[0]) as port:
        said = asyncio.run(through(port))
    assert said == b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: turn1.lab.test\r\n\r\nmore"


# App


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = {
                "/peer": b"OK",
                "/health": b'{"status": "ok", "workers": [{"up": true}, {"up": false}]}',
            }
            self.send_response(200 if self.path in body else 503)
            self.send_header("Via", "1.1 caddy, 1.1 " + "callready-peer" * ("peer" in self.path))
            self.send_header("Content-Length", str(len(body.get(self.path, b"down"))))
            self.end_headers()
            self.wfile.write(body.get(self.path, b"down"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_app_health_compares_status_and_fields(web: str) -> None:
    fields = {"status": "ok", "workers.0.up": True}
    assert app.health(f"{web}/health", fields=fields).fields == fields
    assert app.health(f"{web}/other", status=503).status == 503


def test_app_health_tells_everything_that_differs(web: str) -> None:
    wanted = {"status": "well", "workers.1.up": True, "workers.9.up": True, "workers.0.up": 1}
    with pytest.raises(ProbeError) as failure:
        app.health(f"{web}/health", 204, wanted)
    for part in (
        "status is 200, not 204",
        'status is "ok", not "well"',
        "workers.1.up is false, not true",
        "workers.9.up is null, not true",
        "workers.0.up is true, not 1",
    ):
        assert part in str(failure.value)
    with pytest.raises(ProbeError, match="status is 503, not 200; the body is not JSON"):
        app.health(f"{web}/other", fields={"status": "ok"})


def test_the_app_is_measured_as_it_is_asked(web: str) -> None:
    def measured(url: str, **wanted: Any) -> Measurement:
        host, port = place(url)
        into, probe = Measurement(), Health(node="app1", address=host, port=port, url=url, **wanted)
        asyncio.run(probe.measure(into))
        return into

    assert [*measured(f"{web}/health", status=200).phases] == ["dns", "http"]
    assert measured(f"{web}/health").phases["http"] > 0
    with pytest.raises(ProbeError, match=r"the app is not well: .*/other: status is 503"):
        measured(f"{web}/other")
    with pytest.raises(ProbeError, match=r"callers are not led to nobody\.invalid"):
        measured("http://nobody.invalid/")


def test_app_commands(web: str) -> None:
    assert cli("app", f"{web}/health", "--field", 'status="ok"').returncode == 0
    assert cli("app", f"{web}/health", "--field", 'status="x"').returncode == 1
    assert cli("app", f"{web}/health", "--field", "status=ok").returncode == 2


def test_app_websocket_waits_for_the_answer_it_expects() -> None:
    def talk(connection: ServerConnection) -> None:
        with contextlib.suppress(Exception):
            for message in connection:
                connection.send("hello first")
                connection.send(f"echo {message!s}")
                connection.close()

    with serve(talk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        try:
            assert app.websocket(url, "ping", "ping").received == "echo ping"
            with pytest.raises(ProbeError, match="gave 2 other messages, then"):
                app.websocket(url, "ping", "something else")
        finally:
            server.shutdown()
            thread.join()


def test_app_websocket_meets_plain_http(web: str) -> None:
    with pytest.raises(ProbeError, match="answers 200 instead of a WebSocket"):
        app.websocket(web.replace("http", "ws") + "/health", "ping", "pong")


# LiveKit


def test_livekit_health_refuses_another_status(web: str) -> None:
    with pytest.raises(ProbeError, match="answers 503 instead of 200"):
        livekit.health(web)


def test_a_node_whose_edge_hands_callers_over_is_not_well(web: str) -> None:
    """An answer of another SFU says nothing of this one."""
    port = int(web.rpartition(":")[2])
    sfu1 = LiveKitProbe(node="sfu1", address="127.0.0.1", port=port, url=f"{web}/health")
    assert sfu1.ask() is None
    with pytest.raises(ProbeError, match="without sfu1: its edge hands callers to another SFU"):
        replace(sfu1, url=f"{web}/peer").ask()
