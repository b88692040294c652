"""The monitor's receiver of logs on this machine, and certificates for it and its senders."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from callready.release.authority import Authority, Identity
from callready.release.facts import HOST
from callready.release.host.log_receiver import MUCH

OURS, FOREIGN = Authority(SecretStr("a" * 32)), Authority(SecretStr("b" * 32))
MON = "mon.callready.test"
BOTH = ("server", "client")


def certified(
    folder: Path, authority: Authority, name: str, usages: tuple[str, ...] = BOTH
) -> tuple[Path, Path]:
    """A certificate and its key, as a unit is given them."""
    folder.mkdir(exist_ok=True)
    pair = folder / "fleet.cert", folder / "fleet.key"
    for path, content in zip(pair, authority.issue(Identity(name, (), usages)), strict=True):
        path.write_bytes(content)
    return pair


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def receiver(folder: Path, port: int, name: str = MON) -> Iterator[Path]:
    """It runs, as the host `name`; gives the folder that it writes to."""
    store, ca = folder / "store", folder / "ca.pem"
    store.mkdir(exist_ok=True)
    ca.write_bytes(OURS.certificate)
    certified(folder / "own", OURS, name)
    process = subprocess.Popen(
        [sys.executable, f"{HOST}/log_receiver.py", "keep", store, str(port), "7", str(MUCH)],
        env={"FLEET_CA": str(ca), "CREDENTIALS_DIRECTORY": f"{folder}/own"},
    )
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                continue
        yield store
    finally:
        process.kill()
        process.wait()
