"""The certificate a caller is shown, and whether a phone or a browser would accept it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import ssl
import time
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from cryptography import x509

from callready.probes import TIMEOUT, ProbeError, command, endpoint, reason, run
from callready.settings.certificates import browsers_refuse
from callready.settings.pins import pin

# What X509_verify_cert reports (openssl/x509_vfy.h): the rest is the chain.
_VALIDITY = {9: "is not valid yet", 10: "has expired"}
_NAME = {62, 63, 64}


@dataclass(frozen=True)
class Certificate:
    """A served certificate; `serial` in hexadecimal as ``openssl x509 -serial`` prints it.

    `chain_ok` is None where the chain was not verified; `pins` are its keys as Android pins them,
    leaf first: of the verified chain with its root, else of what was sent.
    """

    serial: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    days_left: int
    chain_ok: bool | None
    tls_version: str
    pins: tuple[str, ...]


class Rejected(ProbeError):
    """Callers reject the certificate that is served, because of its name, its time or its chain."""

    def __init__(
        self, kind: Literal["name", "validity", "chain"], suffers: str, look_at: str, evidence: str
    ) -> None:
        super().__init__(suffers, look_at, evidence)
        self.kind = kind


def client_context(ca_file: str | None = None, verify: bool = True) -> ssl.SSLContext:
    """A TLS client as callers have it: the system's authorities, or those of `ca_file`.

    Raises:
        ProbeError: `ca_file` cannot be read or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ProbeError(
            "no certificate can be verified", f"the file {ca_file}", f"{ca_file}: {reason(error)}"
        ) from None
    # Python 3.13 adds RFC 5280 pedantry that browsers and phones do not have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def shared_context(user: str, ca_file: str | None = None, verify: bool = True) -> ssl.SSLContext:
    """`client_context`, the same for up to a minute: to read the system's authorities takes longer
    than a handshake. `user` keeps apart those who set more in it (httpx sets ALPN)."""
    return _shared(user, ca_file, verify, time.monotonic() // 60)


@functools.lru_cache(maxsize=16)
def _shared(_user: str, ca_file: str | None, verify: bool, _minute: float) -> ssl.SSLContext:
    return client_context(ca_file, verify)


def served(
    address: str,
    port: int,
    server_name: str | None = None,
    ca_file: str | None = None,
    verify: bool = True,
    connect_to: tuple[str, int] | None = None,
) -> Certificate:
    """The certificate served on `address`:`port` to a client that asks for `server_name`.

    Args:
        address: host name or IP address to connect to.
        port: TCP port.
        server_name: name sent as SNI and looked for in the certificate; default `address`.
        ca_file: PEM file of the authorities to trust; default the system's.
        verify: check chain, name and validity; without, only say what is served.
        connect_to: where to connect to instead, if a tunnel leads there.

    Raises:
        ProbeError: nothing answers, no TLS is spoken, or chain, name or validity fail.
    """
    name = server_name or address
    where = endpoint(address, port)
    at = connect_to or (address, port)
    shown = _handshake(where, at, name, client_context(verify=False))
    if not verify:
        return shown
    try:
        return _handshake(where, at, name, client_context(ca_file))
    except ssl.SSLCertVerificationError as error:
        raise _rejected(error, where, name, shown) from None


def _handshake(where: str, at: tuple[str, int], name: str, context: ssl.SSLContext) -> Certificate:
    try:
        with (
            socket.create_connection(at, TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            version = connection.version()
            # Public from Python 3.13 on; what is beneath has them since 3.10.
            beneath = connection._sslobj  # type: ignore[attr-defined]
            verified = context.verify_mode is ssl.CERT_REQUIRED
            shown = beneath.get_verified_chain() if verified else beneath.get_unverified_chain()
    except ssl.SSLCertVerificationError:
        raise
    except ssl.SSLError as error:
        raise ProbeError(
            f"callers cannot open TLS to {where}",
            "whether that port speaks TLS, its protocol versions, and the service's log",
            reason(error),
        ) from None
    except OSError as error:
        raise ProbeError(
            f"callers cannot connect to {where}",
            f"the service listening on {where.rpartition(':')[2]}/tcp (coturn drops its TLS "
            "listener silently when certificate or key cannot be read), and the firewall",
            reason(error),
        ) from None
    chain = [x509.load_pem_x509_certificate(each.public_bytes().encode()) for each in shown]
    if verified and (why := browsers_refuse(chain)):
        raise Rejected(
            "chain",
            f"browsers and phones refuse the certificate on {where}",
            "what made the key and who signed it: OpenSSL takes more kinds than browsers do",
            f"it {why}",
        )
    return _described(chain, version or "", verified)


def _described(chain: list[x509.Certificate], version: str, verified: bool) -> Certificate:
    leaf = chain[0]
    try:
        alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternative = x509.SubjectAlternativeName([])
    serial = f"{leaf.serial_number:X}"
    return Certificate(
        serial=serial.zfill(len(serial) + len(serial) % 2),
        names=tuple(
            str(name)
            for kind in (x509.DNSName, x509.IPAddress)
            for name in alternative.get_values_for_type(kind)
        ),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        days_left=(leaf.not_valid_after_utc - datetime.now(UTC)).days,
        chain_ok=verified or None,
        tls_version=version,
        pins=tuple(map(pin, chain)),
    )


def _rejected(
    error: ssl.SSLCertVerificationError, where: str, name: str, shown: Certificate
) -> ProbeError:
    kind: Literal["name", "validity", "chain"] = "chain"
    if error.verify_code in _NAME:
        kind = "name"
        names = ", ".join(shown.names) or "no name at all"
        evidence = f"its name is not {name}, it names {names}"
        look_at = f"whether tls.cert is the one for {name}"
    elif error.verify_code in _VALIDITY:
        kind = "validity"
        period = f"valid from {shown.not_before:%Y-%m-%d %H:%M} to {shown.not_after:%Y-%m-%d %H:%M}"
        evidence = f"its validity: it {_VALIDITY[error.verify_code]} ({period} UTC)"
        look_at = "the renewal, and whether the service took the renewed certificate up; the clocks"
    else:
        evidence = f"its chain: {error.verify_message}"
        look_at = (
            "whether the file holds the intermediate certificates too, and which authority signed "
            "it"
        )
    return Rejected(
        kind,
        f"callers refuse the certificate on {where} (serial {shown.serial})",
        look_at,
        evidence,
    )


def versions(address: str, port: int, server_name: str) -> list[str]:
    """The TLS versions that `address`:`port` accepts, offered one by one, old ciphers too."""

    def accepted(name: str) -> str | None:
        context = client_context(verify=False)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that is what they are asked for
            context.minimum_version = context.maximum_version = ssl.TLSVersion[name]
        try:
            return _handshake(
                endpoint(address, port), (address, port), server_name, context
            ).tls_version
        except ProbeError:
            return None

    # Side by side, because a dead port keeps each waiting.
    with ThreadPoolExecutor() as threads:
        found = threads.map(accepted, ("TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"))
        return [each for each in found if each]


@contextlib.asynccontextmanager
async def tls_forwarder(
    address: str,
    port: int,
    server_name: str | None = None,
    ca_file: str | None = None,
    host: str = "",
) -> AsyncIterator[int]:
    """A port on 127.0.0.1 whose connections go to `address`:`port` inside TLS.

    For clients that trust none but built-in authorities: ``turn:127.0.0.1:<port>?transport=tcp``
    then really uses the server's TLS listener and its certificate, verified here. With `host`,
    HTTP requests are for it: ``ws://127.0.0.1:<port>`` then is that site at this address.

    Raises:
        ProbeError: the certificate does not verify, before any client connects.
    """
    name = server_name or address
    await asyncio.to_thread(served, address, port, name, ca_file)
    context = client_context(ca_file)

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(target):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            far = await asyncio.open_connection(address, port, ssl=context, server_hostname=name)
            if host:
                head = await reader.readuntil(b"\r\n\r\n")
                far[1].write(re.sub(rb"(?im)^host:.*$", b"Host: %s\r" % host.encode(), head))
            await asyncio.gather(pump(reader, far[1]), pump(far[0], writer))

    listener = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


def main() -> None:
    parser = command("tls", __doc__, "--ca-file")
    parser.add_argument("address")
    parser.add_argument("port", type=int, nargs="?", default=443)
    parser.add_argument("--server-name", help="name to ask for and to verify (default: address)")
    parser.add_argument("--no-verify", action="store_true", help="only say what is served")
    run(parser, lambda o: served(o.address, o.port, o.server_name, o.ca_file, not o.no_verify))


if __name__ == "__main__":
    main()
