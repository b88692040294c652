"""The certificate that callers are shown: what a phone or a browser makes of it, and whether it is
the one on the host."""

from functools import partial

from callready.diagnosis.causes import of_certificate
from callready.diagnosis.model import Cause, Flow, Place
from callready.probes import tls
from tests.verify.check import Check
from tests.verify.servers import Server

MIN_DAYS = 14


def check_certificate(server: Server, name: str, port: int, unit: str, check: Check) -> None:
    """Chain, name, days left and serial of what `unit` serves for `name` on `port`."""
    pair = server.planned.certificates.get(name)
    ports = [int(at.rpartition(":")[2]) for at, _ in pair.endpoints] if pair else []
    rejected = partial(of_certificate, host=server.name, name=name, ports=[*ports, port])
    for family, address in server.addresses.items():
        with check.probing(rejected):
            got = tls.served(address, port, name, server.ca)
            check.figure(f"IPv{family} {got.days_left} days, {got.tls_version}")
            check.expect(
                got.days_left >= MIN_DAYS,
                f"in {got.days_left} days callers are refused: the certificate of {name} ends on "
                f"{got.not_after:%Y-%m-%d}",
                "its renewal, and whether the renewed one reached the host",
                Cause(
                    "certificate-near-end",
                    server.name,
                    Place.CERTIFICATE,
                    f"the certificate of {name} ends on {got.not_after:%Y-%m-%d}",
                    "its renewal: journalctl -u callready-certificates -u certbot; for files of "
                    "your own, renew them and deploy",
                    breaks=(Flow(server.name, "tcp", port, port),),
                    latent=True,
                ),
            )
            wanted = pair and (pair.serial or server.facts.serials.get(name))
            check.expect(
                wanted and int(got.serial, 16) == int(wanted, 16),
                f"callers get certificate {got.serial} on {address}, the host's file is "
                f"{wanted or 'none'}",
                f"systemctl reload {unit.removesuffix('.service')} on {server.name}",
            )
