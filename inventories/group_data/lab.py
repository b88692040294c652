# Settings of the lab. Every key is explained in docs/settings.md.

_state = "/var/lib/callready-lab"

ssh_user = "debian"
ssh_key = f"{_state}/id_ed25519"
ssh_known_hosts_file = f"{_state}/known_hosts"
ssh_config_file = "/dev/null"

livekit = {
    "version": "1.13.5",
    # Built from the Go module and served in the release's own layout (lab/archive.py).
    "base_url": "http://198.51.100.1:8080",
    "url": "wss://sfu1.lab.test",
    "keys": {"APIlab": "secret:livekit/api_secret"},
    "prometheus": {"password": "secret:livekit/prometheus"},
}

turn = {
    # The lab's addresses are documentation addresses, which the deny-list contains.
    "pools": {
        "calls": {
            "realm": "calls.lab.test",
            "secrets": ["secret:turn/calls"],
            "tls_on_443": True,
        },
        "avatar": {
            "realm": "avatar.lab.test",
            "secrets": ["secret:turn/avatar"],
            "peers": "internet",
            "allowed_peers": [
                "198.51.100.0-198.51.100.255",
                "2001:db8:ca11::-2001:db8:ca11:0:ffff:ffff:ffff:ffff",
            ],
        },
    },
}

# HAProxy with TLS on the SFU's and the app's host.
edge = {}

tls = {
    "certificate": f"{_state}/certs/{{name}}.pem",
    "key": f"{_state}/certs/{{name}}.key",
    "ca": f"{_state}/ca.pem",
}

app = {
    "url": "https://app1.lab.test",
    "upstream": "127.0.0.1:8000",
    "api_token": "secret:app/token",
    "env_file": "/srv/app/.env",
    "owner": "app",
    "restart": ["backend.service"],
    "health": [
        {
            "url": "https://app1.lab.test/health",
            "fields": {"status": "ok", "livekit_url": "wss://sfu1.lab.test"},
        },
    ],
    "websockets": [{"url": "wss://app1.lab.test/ws", "send": "ping", "expect": "pong"}],
    "workers": [{"unit": "backend.service", "count": 3}],
}

# systemd-resolved's LLMNR: Debian starts it on every address, the firewall covers it.
host = {"other_listeners": ["5355/tcp", "5355/udp"]}

android = {
    "checkout": f"{_state}/android",
    "domains": [
        {"host": "app1.lab.test"},
        # A developer's own server, as the emulator sees it. ws:// is for debug builds only: Android
        # refuses cleartext in release builds, as it should.
        {"host": "10.0.2.2", "scheme": "ws", "scope": "debug"},
    ],
}
