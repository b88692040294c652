"""Probes from another host: what they send to ports of this machine's loopback leaves from there.

TCP goes through SSH's own forwarding (RFC 4254, section 7.2), UDP through a relay of a few lines of
Python at the other end of the same SSH connection.
"""

from __future__ import annotations

import shlex
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any, cast

from paramiko import Channel, ChannelException, SSHException, Transport
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.connectors.sshuserclient.client import SSHClient

from callready.probes.kinds import Join
from callready.probes.probe import Probe
from callready.rollout.ssh import TIMEOUT, client

Target = tuple[str, int]
LOOPBACK = "127.0.0.1"
_LOST = (OSError, EOFError, SSHException)

# A datagram's frame: which target, from which port of our loopback, length. Each pair of the two
# has a socket of its own there. Length 0 on the way back: the host refused it (ICMP).
_FRAME = struct.Struct("!HHH")
_RELAY = """
import os, select, socket, struct, sys
frame, flows, keys = struct.Struct("!HHH"), {}, {}
def exact(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return data
os.write(1, b"+")
while True:
    for ready in select.select([0, *keys], [], [])[0]:
        data = None
        try:
            if ready == 0:
                target, port, size = frame.unpack(exact(6))
                key, sent = (target, port), exact(size)
                if key not in flows:
                    address, port = sys.argv[1 + 2 * target : 3 + 2 * target]
                    family = socket.AF_INET6 if ":" in address else socket.AF_INET
                    flows[key] = socket.socket(family, socket.SOCK_DGRAM)
                    keys[flows[key]] = key
                    flows[key].connect((address, int(port)))
                flows[key].send(sent)
            else:
                key = keys[ready]
                data = ready.recv(65535)
        except OSError:
            data = b""
        if data is not None:
            os.write(1, frame.pack(*key, len(data)) + data)
"""


@contextmanager
def tunnel(host: Host, probes: Sequence[Probe]) -> Iterator[list[Probe]]:
    """`probes` as they are to be asked here so that their packets leave from `host`.

    Everything goes over one new SSH connection, which ends with the block.

    Raises:
        ConnectError: no connection, or the host cannot pass packets on; with what to do.
    """
    with ExitStack() as stack:
        ssh = stack.enter_context(client(host, None))
        near: dict[tuple[str, Target], Target] = {}
        tcp, udp = (
            list(dict.fromkeys(_target(probe) for probe in probes if probe.proto == proto))
            for proto in ("tcp", "udp")
        )
        if tcp:
            _check_forwarding(ssh, host, tcp[0])
        for target in tcp:
            near["tcp", target] = _forward_tcp(stack, ssh, target)
        if udp:
            ports = _forward_udp(stack, ssh, host, udp)
            near |= {("udp", target): port for target, port in zip(udp, ports, strict=True)}
        through = [replace(probe, connect_to=near[probe.proto, _target(probe)]) for probe in probes]
        if any(isinstance(probe, Join) for probe in through):
            path = _forwarder(stack, ssh, host)
            through = [
                replace(probe, forwarder=path) if isinstance(probe, Join) else probe
                for probe in through
            ]
        yield through


def _forward_tcp(stack: ExitStack, ssh: SSHClient, target: Target) -> Target:
    """A port of our loopback that leads to a target."""
    listener = socket.create_server((LOOPBACK, 0))
    stack.callback(_end, listener)
    _start(_accept, listener, ssh, target)
    port: Target = listener.getsockname()
    return port


def _forward_udp(
    stack: ExitStack, ssh: SSHClient, host: Host, targets: list[Target]
) -> list[Target]:
    """A port of our loopback for each target."""
    channel = _relay(ssh, host, targets)
    lock, sockets = Lock(), []
    for number in range(len(targets)):
        sockets.append(opened := socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        opened.bind((LOOPBACK, 0))
        stack.callback(_end, opened)
        _start(_send, opened, channel, lock, number)
    _start(_receive, channel, sockets)
    return [opened.getsockname() for opened in sockets]


def _forwarder(stack: ExitStack, ssh: SSHClient, host: Host) -> str:
    """The path of a Unix socket, of this user alone, that is asked for the way to targets which
    only a join tells of: a line `PROTO ADDRESS PORT` is answered with a port of our loopback, or
    with nothing."""
    path = Path(stack.enter_context(TemporaryDirectory(prefix="callready-"))) / "forwarder"
    listener = socket.socket(socket.AF_UNIX)
    stack.callback(_end, listener)
    listener.bind(str(path))
    listener.listen()
    _start(_answer, listener, stack, ssh, host)
    return str(path)


def _answer(listener: socket.socket, stack: ExitStack, ssh: SSHClient, host: Host) -> None:
    with suppress(OSError):
        while True:
            _start(_tell, listener.accept()[0], stack, ssh, host)


def _tell(asked: socket.socket, stack: ExitStack, ssh: SSHClient, host: Host) -> None:
    with suppress(*_LOST, ConnectError), asked:
        proto, address, port = asked.makefile().readline().split()
        target = address, int(port)
        if proto == "tcp":
            _, near = _forward_tcp(stack, ssh, target)
        else:
            [(_, near)] = _forward_udp(stack, ssh, host, [target])
        asked.sendall(f"{near}\n".encode())


def _target(probe: Probe) -> Target:
    return probe.address, probe.port


def _start(function: Any, *arguments: Any) -> None:
    Thread(target=function, args=arguments, daemon=True).start()


def _end(either: Any) -> None:
    """Close a socket or channel; a thread that waits for it ends."""
    with suppress(*_LOST):
        either.shutdown(socket.SHUT_RDWR)
    either.close()


def _open(ssh: SSHClient, target: Target) -> Channel:
    transport = cast(Transport, ssh.get_transport())
    return transport.open_channel("direct-tcpip", target, (LOOPBACK, 0), timeout=TIMEOUT)


def _check_forwarding(ssh: SSHClient, host: Host, target: Target) -> None:
    try:
        _open(ssh, target).close()
    except ChannelException as error:
        if error.code == 1:  # prohibited (RFC 4254, section 5.1); a refused connection is 2
            raise ConnectError(
                f"{host.name} passes no probes on: allow AllowTcpForwarding in its sshd_config, or "
                "name another host in deploy.gate_from"
            ) from None
    except _LOST:
        pass  # the probe says what is wrong with the target


def _accept(listener: socket.socket, ssh: SSHClient, target: Target) -> None:
    with suppress(OSError):
        while True:
            near = listener.accept()[0]
            _start(_connect, near, ssh, target)


def _connect(near: socket.socket, ssh: SSHClient, target: Target) -> None:
    try:
        far = _open(ssh, target)
    except _LOST:
        _end(near)
        return
    _start(_pump, near, far)
    _pump(far, near)


def _pump(source: Any, to: Any) -> None:
    with suppress(*_LOST):
        while data := source.recv(65536):
            to.sendall(data)
    _end(source)
    _end(to)


def _relay(ssh: SSHClient, host: Host, targets: list[Target]) -> Channel:
    arguments = shlex.join([_RELAY, *(str(part) for target in targets for part in target)])
    try:
        channel = cast(Transport, ssh.get_transport()).open_session(timeout=TIMEOUT)
        channel.settimeout(TIMEOUT)
        channel.exec_command(f"exec python3 -c {arguments}")
        started = channel.recv(1) == b"+"
    except _LOST:
        started = False
    if not started:
        raise ConnectError(
            f"{host.name} passes no UDP probes on: it needs python3 (apt-get install python3), or "
            "name another host in deploy.gate_from"
        )
    channel.settimeout(None)
    return channel


def _send(near: socket.socket, channel: Channel, lock: Lock, number: int) -> None:
    with suppress(*_LOST):
        while True:
            data, sender = near.recvfrom(65535)
            if not data:
                return
            with lock:
                channel.sendall(_FRAME.pack(number, sender[1], len(data)) + data)


def _receive(channel: Channel, sockets: list[socket.socket]) -> None:
    stream = channel.makefile("rb")
    with suppress(*_LOST):
        while head := stream.read(_FRAME.size):
            number, port, size = _FRAME.unpack(head)
            sockets[number].sendto(stream.read(size), (LOOPBACK, port))
