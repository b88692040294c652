"""Run where the callers are:

direct ADDRESS PORT        one datagram: prints `echo` if it came back, `silence` if not
relay ADDRESS PORT SERVER  the same through a relay of SERVER (its shared secret on standard input)
protocol ADDRESS NUMBER    one packet of an IP protocol that has no ports
requests ADDRESS COUNT     STUN requests to port 3478: prints how many were answered
"""

import asyncio
import contextlib
import os
import socket
import sys

from pydantic import SecretStr

from callready.probes.turn import TurnServer, client, mint

SECONDS = 1.0


def direct(target: tuple[str, int]) -> bool:
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as caller:
        caller.settimeout(SECONDS)
        caller.connect(target)
        try:
            caller.send(b"hello")
            return caller.recv(100) == b"hello"
        except OSError:
            return False


async def relay(target: tuple[str, int], server: str, secret: str) -> bool:
    async with client(TurnServer(server), mint(SecretStr(secret), 600)) as caller:
        await caller.allocate()
        await caller.bind(target)
        await caller.send(b"hello")
        try:
            async with asyncio.timeout(SECONDS):
                while await caller.recv() != b"hello":
                    pass
        except TimeoutError:
            return False
        return True


def packet(address: str, protocol: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, protocol) as sender:
        sender.sendto(bytes(24), (address, 0))


def requests(address: str, count: int) -> int:
    family, answers = socket.AF_INET6 if ":" in address else socket.AF_INET, 0
    with socket.socket(family, socket.SOCK_DGRAM) as caller:
        caller.settimeout(SECONDS)
        caller.connect((address, 3478))
        for _ in range(count):
            # Binding Request without attributes (RFC 8489, section 5).
            caller.send(bytes.fromhex("000100002112a442") + os.urandom(12))
        with contextlib.suppress(TimeoutError):
            while caller.recv(1500):
                answers += 1
    return answers


how, address, number, *server = sys.argv[1:]
target = (address, int(number))
match how:
    case "direct":
        print("echo" if direct(target) else "silence")
    case "relay":
        came = asyncio.run(relay(target, server[0], sys.stdin.read()))
        print("echo" if came else "silence")
    case "protocol":
        packet(*target)
    case "requests":
        print(requests(*target))
