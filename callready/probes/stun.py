"""STUN: the address and port by which the world sees a caller (RFC 8489)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from aioice import stun as messages
from aioice import turn as clients

from callready.probes import TIMEOUT, ProbeError, command, endpoint, reason, run, waited_for

UDP_SILENCE = 1.0
"""Seconds without an answer after which UDP counts as blocked: two transmissions, 0.5 s apart
(RFC 8489, section 6.2.1)."""


@dataclass(frozen=True)
class Binding:
    """The caller's own address as the server saw it, and the round-trip time in seconds."""

    mapped_address: str
    mapped_port: int
    rtt: float


class _Watched(clients.TurnClientMixin):
    """Notes what aioice passes over and waits a minute for: that the network gave up, and errors
    that are not signed (coturn does not sign a 437)."""

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(server, None, None, 600, 500)
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def error_received(self, exc: Exception) -> None:
        self._fail(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(OSError(reason(exc) if exc else "the server closed the connection"))

    def datagram_received(self, data: bytes | str, addr: tuple[str, int]) -> None:
        super().datagram_received(data, addr)
        with contextlib.suppress(ValueError):
            message = messages.parse_message(cast(bytes, data))
            # aioice asks again after a 401 or 438; every other error is final.
            if (
                message.message_class == messages.Class.ERROR
                and message.transaction_id in self.transactions
                and message.error_code not in (401, 438)
            ):
                self._fail(messages.TransactionFailed(message))

    def _fail(self, why: Exception) -> None:
        if not self.failed.done():
            self.failed.set_result(why)


class UdpChannel(_Watched, clients.TurnClientUdpProtocol):
    """STUN or TURN over UDP."""


class TcpChannel(_Watched, clients.TurnClientTcpProtocol):
    """STUN or TURN over TCP or TLS."""


Channel = UdpChannel | TcpChannel


async def connect(
    server: tuple[str, int],
    transport: Literal["udp", "tcp"],
    tls: ssl.SSLContext | None = None,
    server_name: str | None = None,
    timeout: float = TIMEOUT,
    begin: Callable[[str], object] = str,
) -> Channel:
    """A channel to a STUN or TURN server; close it with ``channel.transport.close()``.

    `begin` is told what begins: ``TCP``, ``TLS``.

    Raises:
        OSError: name, connection or TLS failed.
    """
    loop = asyncio.get_running_loop()
    channel: Channel
    async with asyncio.timeout(timeout):
        if transport == "udp":
            _, channel = await loop.create_datagram_endpoint(
                lambda: UdpChannel(server), remote_addr=server
            )
        else:
            begin("TCP")
            plain, channel = await loop.create_connection(lambda: TcpChannel(server), *server)
            if tls:
                begin("TLS")
                try:
                    secure = await loop.start_tls(plain, channel, tls, server_hostname=server_name)
                except BaseException:
                    plain.close()
                    raise
                assert secure
                channel.connection_made(secure)
    return channel


async def request(
    channel: Channel, message: messages.Message, timeout: float = TIMEOUT
) -> messages.Message:
    """Ask and wait for the answer, authenticating when the server demands it.

    Raises:
        OSError: none came in `timeout` seconds, or the connection ended.
        aioice.stun.TransactionFailed: the server answered with an error code.
    """
    asked = asyncio.ensure_future(channel.request_with_retry(message))
    either: set[asyncio.Future[Any]] = {asked, channel.failed}
    await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    failure = channel.failed.result() if channel.failed.done() else None
    if isinstance(failure, messages.TransactionFailed):  # the connection is still good
        channel.failed = asyncio.get_running_loop().create_future()
    if asked.done():
        return asked.result()[0]
    asked.cancel()
    raise failure or OSError(f"no answer in {timeout:g} s")


async def _binding(
    address: str, port: int, transport: Literal["udp", "tcp"], timeout: float
) -> Binding:
    channel = await connect((address, port), transport, timeout=timeout)
    try:
        question = messages.Message(messages.Method.BINDING, messages.Class.REQUEST)
        start = time.perf_counter()
        answer = await request(channel, question, timeout)
        rtt = time.perf_counter() - start
    finally:
        channel.transport.close()
    # Servers older than RFC 5389 answer with MAPPED-ADDRESS only.
    mapped = answer.attributes.get("XOR-MAPPED-ADDRESS") or answer.attributes["MAPPED-ADDRESS"]
    return Binding(mapped[0], mapped[1], rtt)


async def bound(
    address: str,
    port: int = 3478,
    transport: Literal["udp", "tcp"] = "udp",
    timeout: float = TIMEOUT,
    connect_to: tuple[str, int] | None = None,
) -> Binding:
    """Ask a STUN server for the caller's public address (RFC 8489 section 2).

    Args:
        address: host name or IP address; its family is the family that is probed.
        port: 3478 unless the pool says otherwise (RFC 8489 section 8).
        transport: ``udp`` or ``tcp``.
        timeout: seconds.
        connect_to: where to send to instead, if a tunnel leads there.

    Raises:
        ProbeError: no answer, or an answer without an address.
    """
    where = f"stun:{endpoint(address, port)} over {transport}"
    try:
        return await _binding(*(connect_to or (address, port)), transport, timeout)
    except OSError as error:
        raise ProbeError(
            f"callers learn no public address (no srflx candidate) from {where}",
            f"the pool's turnserver@ unit and its listening-ip, and {port}/{transport} in nftables "
            "and in the provider's firewall",
            reason(error),
        ) from None
    except (messages.TransactionFailed, KeyError) as error:
        raise ProbeError(
            f"callers learn no public address from {where}, it answered {error}",
            "whether that port is the STUN server's",
        ) from None


binding = waited_for(bound)


def comes_back(address: str, port: int) -> bool:
    """Whether UDP gets to a port and something comes back: a STUN answer, or that nothing listens
    there (ICMP port unreachable). False is silence: nobody knows.
    """
    try:
        asyncio.run(_binding(address, port, "udp", UDP_SILENCE))
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    except (messages.TransactionFailed, KeyError):
        pass  # somebody answers
    return True


def main() -> None:
    parser = command("stun", __doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int, nargs="?", default=3478)
    parser.add_argument("--transport", choices=["udp", "tcp"], default="udp")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds (%(default)g)")
    run(parser, lambda o: binding(o.address, o.port, o.transport, o.timeout))


if __name__ == "__main__":
    main()
