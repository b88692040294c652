"""The TURN probes against a real coturn on loopback: every refusal told apart, data relayed.

The coturn is this machine's Debian package, unpacked below a temporary folder and never installed:
Debian starts it when installed, as an open relay.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aioice.turn import UDP_TRANSPORT
from pydantic import SecretStr

from callready.probes import SILENCE, ProbeError, ice, peer, stun, turn
from callready.probes.caller import Caller
from callready.probes.kinds import Call, Stun, Turn
from callready.probes.turn import Credentials, IceServer, TurnRefused, TurnServer, client
from tests.support.packages import environment, unpack

SECRET = SecretStr(secrets.token_hex(24))
Start = Callable[..., TurnServer]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """coturn and the libraries this machine lacks, unpacked."""
    folder = tmp_path_factory.mktemp("coturn")
    yield unpack(folder, "coturn")
    shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def start(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a coturn with these lines in its configuration; ended with the module."""
    running: list[subprocess.Popen[bytes]] = []

    def started(*lines: str) -> TurnServer:
        folder = tmp_path_factory.mktemp("pool")
        port = free_port()
        relay = (
            ()
            if any(line.startswith("relay-ip") for line in lines)
            else ("relay-ip=127.0.0.1", "relay-ip=::1")
        )
        (folder / "turnserver.conf").write_text(
            "\n".join(
                [
                    f"listening-port={port}",
                    "listening-ip=127.0.0.1",
                    "listening-ip=::1",
                    *relay,
                    "realm=probes.test",
                    "use-auth-secret",
                    f"static-auth-secret={SECRET.get_secret_value()}",
                    "no-tls",
                    "no-dtls",
                    "no-cli",
                    f"userdb={folder}/db",
                    f"pidfile={folder}/pid",
                    f"log-file={folder}/log",
                    "min-port=30000",
                    "max-port=30999",
                    *lines,
                    "",
                ]
            )
        )
        running.append(
            subprocess.Popen(
                [unpacked / "usr/bin/turnserver", "-c", folder / "turnserver.conf"],
                env=environment(unpacked),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        server = TurnServer("127.0.0.1", port)
        for _ in range(100):
            try:
                stun.binding("127.0.0.1", port, timeout=1)
                return server
            except ProbeError:
                assert running[-1].poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError("coturn does not answer")

    try:
        yield started
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(start: Start) -> TurnServer:
    """Relays to loopback, which only a test may, but not to 127.0.0.2 and no TCP."""
    return start("allow-loopback-peers", "denied-peer-ip=127.0.0.2", "no-tcp-relay")


def over(server: TurnServer, transport: str, address: str = "127.0.0.1") -> TurnServer:
    return TurnServer(address, server.port, transport)  # type: ignore[arg-type]


def pid_of(server: TurnServer) -> int:
    command = ["ss", "-Hlunp", f"sport = :{server.port}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(found.partition("pid=")[2].partition(",")[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_binding_and_allocation(server: TurnServer, transport: str, address: str) -> None:
    way = over(server, transport, address)
    assert stun.binding(address, way.port, transport).mapped_address == address  # type: ignore[arg-type]
    for family, relay in ((4, "127.0.0.1"), (6, "::1")):
        allocation = turn.allocate(way, turn.mint(SECRET, 60), family)  # type: ignore[arg-type]
        assert (allocation.relayed_address, allocation.mapped_address) == (relay, address)
        assert 30000 <= allocation.relayed_port <= 30999


@pytest.mark.parametrize(
    "credentials",
    [
        None,
        turn.mint(SecretStr("another secret"), 60),
        turn.mint(SECRET, -60),
        Credentials("nobody", "password"),
    ],
    ids=["anonymous", "another secret", "expired", "no such user"],
)
def test_unknown_callers_get_401(server: TurnServer, credentials: Credentials | None) -> None:
    with pytest.raises(TurnRefused) as refused:
        turn.allocate(server, credentials)
    assert refused.value.code == 401


def test_each_peer_gets_its_own_answer(server: TurnServer) -> None:
    peers = ["127.0.0.2", "127.0.0.1", "::1"]
    assert turn.permissions(server, turn.mint(SECRET, 60), peers) == {
        "127.0.0.2": 403,
        "127.0.0.1": None,
        "::1": None,
    }


def test_tcp_relaying_is_seen_either_way(server: TurnServer, start: Start) -> None:
    minted = turn.mint(SECRET, 60)
    assert turn.tcp_allocation_code(over(server, "tcp"), minted) == 442
    assert turn.tcp_allocation_code(over(start(), "tcp"), minted) is None


def test_a_second_allocation_on_one_connection_gets_437(server: TurnServer) -> None:
    async def twice() -> None:
        async with client(server, turn.mint(SECRET, 60)) as caller:
            await caller.allocate(4, UDP_TRANSPORT)
            await caller.allocate(4, UDP_TRANSPORT)

    with pytest.raises(TurnRefused) as refused:
        asyncio.run(twice())
    assert refused.value.code == 437


@pytest.mark.parametrize(("ports", "code"), [(2, None), (3, 437)])
def test_a_port_of_which_the_server_has_an_allocation_is_left_for_another(
    server: TurnServer, monkeypatch: pytest.MonkeyPatch, ports: int, code: int | None
) -> None:
    async def without_goodbye() -> int:
        caller = turn.Client(server, partial(stun.connect, (server.address, server.port), "udp"), 5)
        await caller.connect()
        minted = turn.mint(SECRET, 60)
        caller.channel.username, caller.channel.password = minted.username, minted.password
        await caller.allocate()
        address = caller.channel.transport.get_extra_info("sockname")
        caller.channel.transport.abort()
        return int(address[1])

    taken = [asyncio.run(without_goodbye()) for _ in range(ports)]

    async def connect(address: tuple[str, int], *_: object) -> stun.Channel:
        local = ("127.0.0.1", taken.pop(0) if taken else 0)
        loop = asyncio.get_running_loop()
        return (
            await loop.create_datagram_endpoint(
                lambda: stun.UdpChannel(address), local_addr=local, remote_addr=address
            )
        )[1]

    monkeypatch.setattr(turn, "connect", connect)
    try:
        turn.allocate(server, turn.mint(SECRET, 60))
        seen = None
    except TurnRefused as refused:
        seen = refused.code
    assert (seen, taken) == (code, [])


def test_quota_and_capacity_are_told_apart(start: Start) -> None:
    quota = start("user-quota=1")
    minted = turn.mint(SECRET, 60)

    async def two() -> None:
        async with client(quota, minted) as first, client(quota, minted) as second:
            await first.allocate()
            await second.allocate()

    with pytest.raises(TurnRefused) as refused:
        asyncio.run(two())
    assert refused.value.code == 486
    with pytest.raises(TurnRefused) as refused:
        turn.allocate(start("relay-ip=198.51.100.250"), minted)
    assert refused.value.code == 508


def test_probes_leave_no_allocation_behind(start: Start) -> None:
    quota = start("user-quota=4", "allow-loopback-peers")
    users = [turn.mint(SECRET, 60) for _ in range(4)]
    sides = [(quota, user) for user in users]
    turn.allocate(*sides[0])
    turn.permissions(*sides[1], ["127.0.0.1"])
    turn.relay_between(sides[2], sides[2], packets=3)
    peer.peer_to_peer(sides[3], sides[3], duration=0.1)

    async def whole_quota(user: Credentials) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                caller = await stack.enter_async_context(client(quota, user))
                await caller.allocate()

    end = time.monotonic() + 30  # coturn takes a second or two, one left behind ten minutes
    while users:
        try:
            asyncio.run(whole_quota(users[-1]))
            users.pop()
        except TurnRefused as refused:
            assert refused.code == 486
            assert time.monotonic() < end, "an allocation was left behind"
            time.sleep(3)


def test_data_goes_through_two_allocations_and_back(server: TurnServer, start: Start) -> None:
    other = start("allow-loopback-peers")
    a, b = (server, turn.mint(SECRET, 60)), (over(other, "tcp"), turn.mint(SECRET, 60))
    for family in (4, 6):
        relay = turn.relay_between(a, b, packets=20, family=family)
        assert (relay.sent, relay.received) == (20, 20)
    connected = peer.peer_to_peer(a, b, duration=0.3)
    assert connected.received == connected.sent > 5


def test_peers_that_may_not_reach_each_other_say_403(start: Start) -> None:
    closed = start("allow-loopback-peers", "denied-peer-ip=127.0.0.0-127.255.255.255")
    side = closed, turn.mint(SECRET, 60)
    with pytest.raises(TurnRefused) as refused:
        turn.relay_between(side, side, packets=1)
    assert refused.value.code == 403
    with pytest.raises(TurnRefused) as refused:
        peer.peer_to_peer(side, side)
    assert refused.value.code == 403


def test_a_pool_that_dies_ends_the_peers_call(start: Start) -> None:
    dying = start("allow-loopback-peers")
    side = dying, turn.mint(SECRET, 60)
    pid = pid_of(dying)

    def kill() -> None:
        time.sleep(0.5)
        os.kill(pid, 9)
        time.sleep(SILENCE + 0.5)

    with pytest.raises(ProbeError, match=r"did not stay up: [1-9]\d* of \d+ packets came back"):
        peer.peer_to_peer_while(side, side, kill)


def test_a_pool_that_dies_is_seen_by_the_synthetic_caller(start: Start) -> None:
    dying = start("allow-loopback-peers")
    common: dict[str, Any] = {"node": "turn1", "address": "127.0.0.1", "port": dying.port}
    common["pool"] = "calls"
    turns = {"server_name": "127.0.0.1", "secret": SECRET, **common}
    asking = Caller(
        [
            Stun(**common),
            Turn(transport="udp", **turns),
            Turn(transport="tcp", **turns),
            Call(transport="udp", max_loss=0.05, turn="turn1", **turns),
        ]
    )

    def passing() -> str:
        for key in asking.probes:
            asyncio.run(asking.ask(key))
        lines = asking.metrics().splitlines()
        return "".join(line[-1] for line in lines if line.startswith("callready_probe_success{"))

    assert passing() == "1111"
    os.kill(pid_of(dying), 9)
    assert passing() == "0000"


def test_a_probe_that_is_ended_leaves_no_allocation_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = start("total-quota=1")
    allocate = turn.Client.allocate

    async def ended_once_it_is_granted() -> None:
        granted = asyncio.Event()

        async def and_wait(caller: turn.Client, *arguments: Any) -> turn.Allocation:
            await allocate(caller, *arguments)
            granted.set()
            await asyncio.Event().wait()
            raise AssertionError("it is ended here")

        monkeypatch.setattr(turn.Client, "allocate", and_wait)
        where: dict[str, Any] = {"address": "127.0.0.1", "port": only.port, "pool": "calls"}
        probe = Turn(node="turn1", transport="udp", server_name="", secret=SECRET, **where)
        asking = asyncio.create_task(Caller([probe]).ask_all())
        await granted.wait()
        with pytest.raises(TurnRefused):
            await turn.allocated(only, turn.mint(SECRET, 60))
        asking.cancel()
        await asyncio.wait([asking])

    asyncio.run(ended_once_it_is_granted())
    monkeypatch.undo()
    end = time.monotonic() + 30  # coturn takes a second or two, one left behind ten minutes
    while True:
        try:
            turn.allocate(only, turn.mint(SECRET, 60))
            return
        except TurnRefused as refused:
            assert refused.code == 486
            assert time.monotonic() < end, "an allocation was left behind"
            time.sleep(1)


def test_ice_servers_are_each_asked(server: TurnServer) -> None:
    good, bad = turn.mint(SECRET, 60), turn.mint(SecretStr("another secret"), 60)
    stun_uri, other_uri = f"stun:127.0.0.1:{server.port}", over(server, "tcp").uri
    found = ice.gather(
        [
            IceServer((stun_uri,)),
            IceServer((server.uri,), good.username, good.password),
            IceServer((other_uri,), bad.username, bad.password),
        ]
    )
    assert isinstance(found[stun_uri], stun.Binding)
    assert isinstance(found[server.uri], turn.Allocation)
    refused = found[other_uri]
    assert isinstance(refused, TurnRefused)
    assert refused.code == 401
