"""Clients that only cost: connections that say nothing, and ones that say a byte now and then."""

import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fleet import Host


def hello(name: str) -> bytes:
    """The first words of a TLS client."""
    said = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


@contextmanager
def crowd(host: Host, name: str, idle: int, slow: int) -> Iterator[None]:
    """From this machine, to port 443 of a host: `idle` connections, half of them after a TLS
    handshake for `name`; `slow` ones, half of them slow in the handshake, half in the request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\nX-Slow: ".encode() + b"x" * 1000
    opened: list[socket.socket] = []
    speaking: list[tuple[socket.socket, Iterator[int]]] = []
    done = threading.Event()

    def connect(secure: bool, words: bytes = b"") -> None:
        with suppress(OSError):  # refused: the edge may have had enough of us
            connection = socket.create_connection((host.ipv4, 443), timeout=5)
            opened.append(connection)
            if secure:
                opened[-1] = connection = context.wrap_socket(connection, server_hostname=name)
            speaking.append((connection, iter(words)))

    def speak() -> None:
        while not done.wait(0.5):
            for connection, words in speaking:
                with suppress(OSError, StopIteration):
                    connection.send(bytes([next(words)]))

    for _ in range(idle // 2):
        connect(False)
        connect(True)
    for _ in range(slow // 2):
        connect(False, hello(name))
        connect(True, request)
    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
        for connection in opened:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def held(host: Host) -> int:
    """Connections of this machine that a host's port 443 holds."""
    shown = host.root("ss -Htn state established '( sport = :443 )' dst 198.51.100.1")
    return len(shown.splitlines())
