"""Run where the callers are: one datagram to ADDRESS PORT, `direct` or through a `relay` of SERVER
(its shared secret on standard input). Prints `echo` if it came back, `silence` if not."""

import asyncio
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


how, address, port, server = sys.argv[1:]
target = (address, int(port))
came = direct(target) if how == "direct" else asyncio.run(relay(target, server, sys.stdin.read()))
print("echo" if came else "silence")
