"""Clients that only cost: connections that say nothing, and ones that say a byte now and then."""

import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.fleet import Host

CONTEXT = ssl.create_default_context()
CONTEXT.check_hostname, CONTEXT.verify_mode = False, ssl.CERT_NONE


def hello(name: str) -> bytes:
    """The first words of a TLS client."""
    said = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


class Client:
    """Says `words` a byte at a time, after a TLS handshake for the name `tls` or instead of one."""

    def __init__(self, host: Host, tls: str, words: bytes = b"") -> None:
        self.host, self.tls, self.words = host, tls, words
        self.connection: socket.socket | None = None

    def connect(self) -> None:
        """Come, or come again if the other end has closed the connection."""
        if self.is_connected():
            return
        self.close()
        with suppress(OSError):  # refused: the edge may have had enough of us
            connection = socket.create_connection((self.host.ipv4, 443), timeout=5)
            if self.tls:
                connection = CONTEXT.wrap_socket(connection, server_hostname=self.tls)
            connection.settimeout(0)
            self.connection, self.left = connection, iter(self.words)

    def is_connected(self) -> bool:
        """Any answer is a farewell."""
        try:
            if self.connection:
                self.connection.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def speak(self) -> None:
        with suppress(OSError, StopIteration):
            if self.connection:
                self.connection.send(bytes([next(self.left)]))

    def close(self) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None


@contextmanager
def crowd(host: Host, name: str, idle: int, slow: int) -> Iterator[threading.Event]:
    """From this machine, to port 443 of a host: `idle` connections and `slow` ones. One in five is
    so after a TLS handshake for `name`, the others instead of one. What the host closes is opened
    again, until the event is set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\nX-Slow: ".encode() + b"x" * 1000
    clients = [
        *(Client(host, name) for _ in range(idle // 5)),  # these take time, so they come first
        *(Client(host, name, request) for _ in range(slow // 5)),
        *(Client(host, "") for _ in range(idle - idle // 5)),
        *(Client(host, "", hello(name)) for _ in range(slow - slow // 5)),
    ]
    enough, done = threading.Event(), threading.Event()

    def go_on() -> None:
        while not done.wait(0.5):
            for client in clients:
                if not enough.is_set():
                    client.connect()
                client.speak()

    for client in clients:
        client.connect()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield enough
    finally:
        enough.set()
        done.set()
        thread.join()
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def held(host: Host) -> int:
    """Connections of this machine that a host's port 443 holds."""
    shown = host.root("ss -Htn state established '( sport = :443 )' dst 198.51.100.1")
    return len(shown.splitlines())
