"""A TLS client that offers and accepts only what browsers and phones do."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

# BoringSSL's, as Chromium and Android have them: kVerifySignatureAlgorithms and the default groups.
OFFERED = (
    *("-sigalgs", "ECDSA+SHA256:RSA-PSS+SHA256:RSA+SHA256:ECDSA+SHA384:RSA-PSS+SHA384:RSA+SHA384"),
    *("-groups", "X25519:P-256:P-384", "-auth_level", "2"),
)


def opens_tls(
    at: str,
    name: str,
    ca_file: str,
    offered: Sequence[str] = OFFERED,
    *,
    before: Sequence[str] = (),
) -> bool:
    """Whether the client is content with what `at` (`address:port`) serves for `name`; `before` is
    a command that it is run by."""
    client = subprocess.run(
        [
            *(*before, "openssl", "s_client", "-connect", at, "-servername", name, *offered),
            *("-CAfile", ca_file, "-verify_return_error", "-verify_hostname", name),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )
    return client.returncode == 0
