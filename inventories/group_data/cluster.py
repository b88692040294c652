# Settings of the lab with several SFUs: those of group_data/lab.py, and these.

from pathlib import Path as _Path

exec(_Path("inventories/group_data/lab.py").read_text())

# The name has the addresses of all three.
_url = "wss://livekit.lab.test"
livekit = {**globals()["livekit"], "url": _url}

turn = {"pools": {"calls": globals()["turn"]["pools"]["calls"]}}

fleet_ca = "secret:fleet/ca"
redis = {"livekit_password": "secret:redis/livekit"}

_health = {"url": "https://app1.lab.test/health", "fields": {"status": "ok", "livekit_url": _url}}
app = {**globals()["app"], "health": [_health]}
