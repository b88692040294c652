"""The edge and TURN as strangers, scanners and other people's clients see them, on the lab as
`make demo` leaves it."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr

from callready.probes import ProbeError, app, livekit, tls, turn
from callready.probes.turn import Credentials, TurnServer
from callready.settings.pools import Transport
from lab import Lab, ca, tools
from tests.support.browser import opens_tls
from tests.support.continuity import calls_of
from tests.support.crowd import crowd, held
from tests.support.fleet import REPOSITORY, Host, deploy_lab, eventually, probe, verify

pytestmark = pytest.mark.usefixtures("good")

SFU, CALLS, AVATAR = Host("sfu1"), Host("turn1"), Host("turn2")
POOLS = {CALLS: "calls", AVATAR: "avatar"}
ACME = "https://acme.lab.test/directory"
PER_CLIENT = 1000  # edge.connections_per_client


def secret(name: str) -> str:
    store = REPOSITORY / "inventories/lab.secrets.yaml"
    return str(yaml.safe_load(store.read_text())[name])


def call() -> dict[str, Any]:
    """A call of two people somewhere else, through the edge."""
    return probe(
        "webrtc",
        f"wss://{SFU.fqdn}",
        "--ca-file",
        str(ca.CA_CERTIFICATE),
        secret=secret("livekit/api_secret"),
        LIVEKIT_API_KEY="APIlab",
    )


def test_slow_and_idle_clients_keep_nobody_from_calling() -> None:
    with crowd(SFU, SFU.fqdn, idle=500, slow=PER_CLIENT - 400) as enough:
        eventually(lambda: held(SFU) <= PER_CLIENT, 5)  # one address may not hold more
        got = call()
        assert got["ok"], got
        assert got["retries"] == got["reconnects"] == 0
        assert held(SFU) > 500, "they were gone too soon to prove it"
        enough.set()
        eventually(lambda: held(SFU) == 0)  # each has its time, and no more


# What a scan must have looked at to be worth anything.
LOOKED_AT = {
    "TLS1",
    "TLS1_2",
    "cipherlist_NULL",
    "cert_chain_of_trust",
    "heartbleed",
    "ROBOT",
    "SWEET32",
    "RC4",
}
ABOVE_LOW = {"MEDIUM", "HIGH", "CRITICAL", "FATAL"}
# The lab's authority has no revocation; a public one has.
NOT_OURS = {"cert_revocation"}


def scan(host: Host, port: int, report: Path) -> dict[str, dict[str, str]]:
    """What testssl.sh finds on a port, by its names of the findings."""
    file = report / f"{host.name}-{port}.json"
    subprocess.run(
        [
            *Lab().client_prefix(),
            "testssl",
            "--quiet",
            "--color=0",
            "--warnings=off",
            f"--add-ca={ca.CA_CERTIFICATE}",
            f"--ip={host.ipv4}",
            f"--jsonfile={file}",
            "-p",
            "-s",
            "-f",
            "-P",
            "-S",
            "-h",
            "-U",
            f"{host.fqdn}:{port}",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    return {item["id"]: item for item in json.loads(file.read_text())}


def test_a_scanner_finds_nothing(tmp_path: Path) -> None:
    where = [(SFU, 443), (CALLS, 443), (CALLS, 5349)]
    with ThreadPoolExecutor() as pool:
        scans = list(pool.map(lambda at: scan(at[0], at[1], tmp_path), where))
    for at, found in zip(where, scans, strict=True):
        assert found.keys() >= LOOKED_AT, at
        assert found["cert_chain_of_trust"]["severity"] == "OK"
        bad = {
            name: item["finding"]
            for name, item in found.items()
            if item["severity"] in ABOVE_LOW and name not in NOT_OURS
        }
        assert not bad, at


def ed25519(name: str) -> str:
    """A certificate of the lab's authority with a key that browsers refuse, and that key."""
    authority = x509.load_pem_x509_certificate(ca.CA_CERTIFICATE.read_bytes())
    signer = serialization.load_pem_private_key(ca.CA_KEY.read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = Ed25519PrivateKey.generate(), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(signer, hashes.SHA256())
    )
    return (
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    ).decode()


def test_browsers_open_tls_wherever_clients_are_told_to(tmp_path: Path) -> None:
    """A kind of key that they refuse is served by HAProxy without a word; verification notices."""
    client, file = Lab().client_prefix(), str(ca.CA_CERTIFICATE)
    for host, port in ((SFU, 443), (CALLS, 443), (CALLS, 5349), (Host("app1"), 443)):
        assert opens_tls(f"{host.ipv4}:{port}", host.fqdn, file, before=client)
    name, at = SFU.fqdn, f"{SFU.ipv4}:443"
    served, check = f"/etc/callready/tls/{name}/current/both.pem", f"test_certificate[{name}]"
    take_up = "haproxy -c -q -f /etc/haproxy/haproxy.cfg && systemctl reload haproxy"
    SFU.root(
        f"cp -p {served} /root/both.pem; cat > {served} <<'END'\n{ed25519(name)}END\n{take_up}"
    )
    try:
        eventually(lambda: not opens_tls(at, name, file, before=client), 10)
        assert opens_tls(at, name, file, offered=(), before=client)
        said = verify(tmp_path / "report", check)[check]
        assert "browsers and phones refuse the certificate" in said and "Ed25519" in said
    finally:
        SFU.root(f"cp -p /root/both.pem {served}; rm /root/both.pem; {take_up}")
    eventually(lambda: opens_tls(at, name, file, before=client), 10)


def pion(server: TurnServer, who: Credentials, peer: str) -> dict[str, str]:
    """What pion's client gets that has a datagram echoed by `peer`: `relayed` or `error`."""
    at = f"[{server.address}]" if ":" in server.address else server.address
    asked = {
        "server": f"{at}:{server.port}",
        "transport": server.transport,
        "username": who.username,
        "credential": who.password,
        "peer": peer,
        "servername": server.server_name,
        "cafile": server.ca_file,
    }
    done = subprocess.run(
        [*Lab().client_prefix(), tools.pion_turn()],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("host", POOLS, ids=lambda host: POOLS[host])
def test_another_client_agrees(host: Host) -> None:
    """pion's, on every transport and family: a relay that carries data; refused like our probe."""
    minted = turn.mint(SecretStr(secret(f"turn/{POOLS[host]}")), 60)
    wrong = Credentials(minted.username, "wrong")
    ways: list[tuple[Transport, int]] = [("udp", 3478), ("tcp", 3478), ("tls", 5349)]
    if host == CALLS:
        ways.append(("tls", 443))
    with SFU.listening("udp", 59990):
        for address, peer in ((host.ipv4, SFU.ipv4), (host.ipv6, f"[{SFU.ipv6}]")):
            for transport, port in ways:
                server = TurnServer(address, port, transport, host.fqdn, str(ca.CA_CERTIFICATE))
                got = pion(server, minted, f"{peer}:59990")
                ours = turn.allocate(server, minted, 6 if ":" in address else 4)
                relay, _, relayed_port = got.get("relayed", f"{got}").rpartition(":")
                assert relay.strip("[]") == ours.relayed_address == address
                assert 49152 <= int(relayed_port) <= 65535
                assert "401" in pion(server, wrong, f"{peer}:59990")["error"]
                with pytest.raises(turn.TurnRefused, match="401"):
                    turn.allocate(server, wrong)


def test_pins_are_compared_with_what_is_served(tmp_path: Path) -> None:
    """The lab's inventory with pins for its apps: its authority's, then ones that nobody has."""
    served = tls.served(SFU.fqdn, 443, ca_file=str(ca.CA_CERTIFICATE))
    check, strangers = f"test_pins[{SFU.fqdn}]", ["A" * 43 + "=", "B" * 43 + "="]
    shutil.copytree(REPOSITORY / "inventories", tmp_path / "own")
    data = tmp_path / "own/group_data/lab.py"
    for pins in ([served.pins[-1], strangers[0]], strangers):
        pinned = {"host": SFU.fqdn, "pins": pins, "pin_expiration": "2099-01-01"}
        data.write_text(
            (REPOSITORY / "inventories/group_data/lab.py").read_text()
            + f'android["domains"].append({pinned})\n'
            # As if it came from an authority: then nobody knows its certificate before.
            + f'tls = {{"ca": tls["ca"], "acme": {{"email": "a@lab.test", "server": "{ACME}"}}}}\n'
        )
        said = verify(tmp_path / "report", check, inventory=tmp_path / "own/lab")[check]
        wrong = f"installed release builds refuse {SFU.fqdn}: none of the pins of {SFU.fqdn}"
        assert said.startswith(f"{wrong} ({', '.join(strangers)})") == (pins == strangers), said


def test_the_token_of_the_app_is_rotated_and_nobody_refused(tmp_path: Path) -> None:
    """Callers go on with the token that they have until phase 3, also while the app restarts."""
    shutil.copytree(REPOSITORY / "inventories", tmp_path / "own")
    store, done, url = tmp_path / "own/lab.secrets.yaml", Event(), "https://app1.lab.test"
    before = store.read_text()
    ask = partial(app.turn_credentials, url, ca_file=str(ca.CA_CERTIFICATE))

    def tokens() -> dict[str, SecretStr]:
        entries = yaml.safe_load(store.read_text())
        return {k: SecretStr(v) for k, v in entries.items() if k.startswith("app/token")}

    def rotate() -> None:
        subprocess.run(
            [sys.executable, "-m", "callready.rotate", tmp_path / "own/lab", "app/token"],
            cwd=REPOSITORY,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )

    def caller(bearer: SecretStr) -> list[float]:
        waits: list[float] = []
        while not done.wait(0.1):
            began = time.monotonic()
            try:
                ask(bearer)
            except app.Refused:
                raise
            except ProbeError:
                # A worker had taken it and not read it yet as it ended: 502, once.
                cut.append(began)
                ask(bearer)
            waits.append(time.monotonic() - began)
        return waits

    old, cut = tokens()["app/token"], list[float]()
    try:
        with ThreadPoolExecutor() as pool:
            waits = pool.submit(caller, old)
            try:
                rotate()
                ask(tokens()["app/token.next"])
                rotate()
                ask(tokens()["app/token"])
            finally:
                done.set()
        print(
            f"{len(waits.result())} requests, longest {max(waits.result()):.1f} s, {len(cut)} cut"
        )
        assert len(cut) <= 2  # as often as it restarts
        until = tokens()["app/token.until"].get_secret_value()
        store.write_text(store.read_text().replace(until, "2020-01-01T00:00:00+00:00"))
        rotate()
        ask(tokens()["app/token"])
        with pytest.raises(app.Refused):
            ask(old)
    finally:
        store.write_text(before)
        deploy_lab()


def test_the_edge_holds_who_comes_while_livekit_restarts() -> None:
    """New connections every 100 ms wait for LiveKit. One that it has accepted already when it is
    told to stop is cut, and let in when it comes again, as every SDK does. So is a call."""
    key = SecretStr(secret("livekit/api_secret"))

    def join(_: int) -> tuple[float, list[str]]:
        began, token = time.monotonic(), livekit.token("APIlab", key)
        failed: list[str] = []
        while len(failed) < 2:
            try:
                livekit.signalling(f"wss://{SFU.fqdn}", token, str(ca.CA_CERTIFICATE))
                break
            except ProbeError as error:
                failed.append(str(error))
                time.sleep(0.3)  # as livekit-client's reconnect policy
        return time.monotonic() - began, failed

    with (
        calls_of(f"wss://{SFU.fqdn}", "APIlab", key.get_secret_value(), {}) as calls,
        ThreadPoolExecutor(100) as pool,
    ):
        start, joins = time.monotonic(), []
        for number in range(100):
            joins.append(pool.submit(join, number))
            if number == 20:
                restart = pool.submit(SFU.root, "systemctl restart livekit-server")
            time.sleep(max(0.0, start + number * 0.1 - time.monotonic()))
        restart.result()
        waits = [done.result() for done in joins]
    refused = [failed for _, failed in waits if len(failed) == 2]
    cut, longest = sum(len(failed) == 1 for _, failed in waits), max(waits)[0]
    print(f"{len(waits)} came, {cut} cut, {len(refused)} refused, longest wait {longest:.1f} s")
    print("a running call:", *calls["direct"], sep="\n")
    assert not refused
    assert not [each for each in calls["direct"] if each.gone or each.way == "none"]


def test_the_edge_logs_no_token() -> None:
    """Clients of LiveKit have theirs in the query."""
    assert call()["ok"]
    logged = "journalctl -u haproxy.service -o cat --no-pager"
    assert " GET /rtc" in SFU.root(f"{logged} | tail -n 20")
    assert SFU.root(f"{logged} | grep -c access_token || true") == "0"
