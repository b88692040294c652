"""The certificate that callers are shown: what a phone or a browser makes of it, and whether it is
the one on the host."""

from callready.probes import tls
from tests.verify.check import Check
from tests.verify.targets import Server

MIN_DAYS = 14


def check_certificate(server: Server, name: str, port: int, unit: str, check: Check) -> None:
    """Chain, name, days left and serial of what `unit` serves for `name` on `port`."""
    for family, address in server.addresses.items():
        with check.probing():
            got = tls.served(address, port, name, server.ca)
            check.figure(f"IPv{family} {got.days_left} days, {got.tls_version}")
            check.expect(
                got.days_left >= MIN_DAYS,
                f"in {got.days_left} days callers are refused: the certificate of {name} ends on "
                f"{got.not_after:%Y-%m-%d}",
                "its renewal, and whether the renewed one reached the host",
            )
            pair = server.planned.certificates.get(name)
            wanted = pair and (pair.serial or server.facts.serials.get(name))
            check.expect(
                wanted and int(got.serial, 16) == int(wanted, 16),
                f"callers get certificate {got.serial} on {address}, the host's file is "
                f"{wanted or 'none'}",
                f"systemctl reload {unit.removesuffix('.service')} on {server.name}",
            )
