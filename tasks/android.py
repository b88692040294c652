"""The Android project: network security configuration and client settings in its checkout."""

from urllib.parse import urlsplit

from pyinfra import logger
from pyinfra.api.host import Host

from callready.operations import checkout, read_checkout
from callready.release import android as nsc
from callready.rollout.run import Run


def android(run: Run, host: Host) -> None:
    """The release, debug and profile files and the client settings; the manifest is checked, not
    edited, and what to add is printed."""
    fleet = run.fleet
    settings, livekit = fleet[host.name].android, fleet[host.name].livekit
    if settings is None or livekit is None:
        return
    files = nsc.files(fleet, host.name)
    found = read_checkout(
        host, settings.checkout, files, settings.manifest, nsc.build_files(settings)
    )
    media = [node.address for node in fleet.hosts.values() if node.address]
    for missing in nsc.manifest_advice(
        settings, livekit.url, found.manifest, [urlsplit(livekit.url).hostname or "", *media]
    ):
        logger.warning(f"{host.print_prefix}{missing}")
    if found.is_react_native and (advice := nsc.metro_advice(settings)):
        logger.warning(f"{host.print_prefix}{advice}")
    for path in found.differing:
        logger.info(f"{host.print_prefix}  ~ file        {settings.checkout}/{path}")
    checkout(
        name="Write the Android configuration",
        root=settings.checkout,
        files={path: files[path] for path in found.differing},
        _if=lambda: _hosts_are_well(run, host),
    )


def _hosts_are_well(run: Run, host: Host) -> bool:
    """Whether the hosts have become what the app would be told."""
    if not (well := run.rollout.is_well):
        logger.warning(f"{host.print_prefix}the app's checkout stays as it is: hosts have failed")
    return well
