"""The Android app's checkout, where it is on a host of the inventory."""

from pathlib import Path

from pyinfra.api.exceptions import PyinfraError
from pyinfra.connectors.ssh import SSHConnector

from callready.diagnosis.model import Cause, Place
from callready.operations import read_checkout
from callready.rollout.run import Refused
from tests.verify.check import Check, each
from tests.verify.targets import Checkout


def _differing(app: Checkout, root: str) -> list[str]:
    if isinstance(app.connection.connector, SSHConnector):
        app.connection.connect(show_errors=False, raise_exceptions=True)
        return read_checkout(
            app.connection, root, dict(app.files), app.settings.manifest, []
        ).differing
    # pyinfra's own way to this machine works in the main thread only.
    here = Path(root).expanduser().resolve(strict=True)
    return [
        name
        for name, body in app.files.items()
        if not (path := here / name).is_file() or path.read_bytes() != body
    ]


@each(lambda site: site.checkouts)
def test_checkout(app: Checkout, check: Check) -> None:
    """The app's network configuration and settings as rendered"""
    root = app.settings.checkout
    try:
        differing = ", ".join(_differing(app, root))
    except (PyinfraError, Refused, OSError):
        check.figure(f"not looked at: {root} is not there")
        return
    check.figure(f"{len(app.files)} files")
    check.expect(
        not differing,
        f"the app's next build trusts or calls other servers: {differing} in {root} is not as "
        "rendered",
        "who edited it (git diff there); deploy again",
        Cause(
            "android-file",
            app.name,
            Place.APP,
            f"{differing} in {root} is not what the inventory says",
            "deploy again, which writes it, and build the app anew",
            latent=True,
        ),
    )
