# Settings of the lab with hosts that record: those of group_data/lab.py, and these.

from pathlib import Path as _Path

exec(_Path("inventories/group_data/lab.py").read_text())

fleet_ca = "secret:fleet/ca"

# One key for recordings alone.
_keys = {"APIlab": "secret:livekit/api_secret", "APIrecord": "secret:egress/livekit"}
livekit = {**globals()["livekit"], "keys": _keys}

redis = {
    "livekit_password": "secret:redis/livekit",
    "egress_password": "secret:redis/egress",
}

# Upstream's program cannot be had in the lab: this is the stand-in of lab/egress, which
# `python -m lab recorder` builds and serves. Its digest changes with Debian's packages.
_digest = _Path("/var/lib/callready-lab/registry/egress.digest")
egress = {
    "image": "controller.lab.test:5000/livekit/egress",
    "digest": _digest.read_text() if _digest.exists() else f"sha256:{'0' * 64}",
    "registry_ca": "/var/lib/callready-lab/ca.pem",
    "livekit_key": "APIrecord",
}
