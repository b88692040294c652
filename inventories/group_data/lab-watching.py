# Settings of the lab with a monitor: those of group_data/lab.py, and these.

from pathlib import Path as _Path

exec(_Path("inventories/group_data/lab.py").read_text())

fleet_ca = "secret:fleet/ca"

# One key for test calls alone.
_keys = {"APIlab": "secret:livekit/api_secret", "APIcaller": "secret:monitor/livekit"}
livekit = {**globals()["livekit"], "keys": _keys}

monitor = {
    "url": "https://mon1.lab.test",
    "password": "secret:monitor/password",
    "livekit_key": "APIcaller",
    "turn_secret": "secret:monitor/turn",
    "wheels": "/var/cache/callready/wheels",  # python -m lab wheels
    # What the tests listen with (tests/support/sink.py).
    "mail": {"smarthost": "198.51.100.1:2525", "sender": "alerts@lab.test", "require_tls": False},
    "page": {"mail": ["oncall@lab.test"], "webhooks": ["http://198.51.100.1:8081/page"]},
    "ticket": {"mail": ["team@lab.test"]},
    "watchdog": "http://198.51.100.1:8081/watchdog",
}
