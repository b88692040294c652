"""What becomes of recordings: outside of egress' container, by this host."""

from callready.release.facts import host_script
from callready.release.node import Node
from callready.settings.ports import EGRESS_SPACE

SCRIPT = "/usr/local/lib/callready/egress"


def recordings(node: Node) -> None:
    """No recording is lost by a start, a stop or a full disk, and none is removed unless the
    settings say when."""
    if not (settings := node.settings.records):
        return
    release, unit_file = node.release, f"/etc/systemd/system/{EGRESS_SPACE}"
    release.file(SCRIPT, content=host_script("egress.sh"), mode=0o755)
    release.file(
        unit_file,
        f"{EGRESS_SPACE}.j2",
        script=SCRIPT,
        bytes=round(settings.min_free * 1e9),
        days=settings.retention_days,
    )
    release.enable(EGRESS_SPACE, unit_file)
    release.service(EGRESS_SPACE, inputs=[unit_file, SCRIPT])
