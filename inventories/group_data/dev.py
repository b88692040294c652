# Settings of everything on one host of a LAN. Every key with its default is in docs/settings.md;
# secrets are references into inventories/dev.secrets.yaml, which `make secrets ENV=dev` completes.

ssh_user = "debian"
# ssh_key = "~/.ssh/id_ed25519"
ssh_known_hosts_file = "inventories/dev.known_hosts"  # make trust ENV=dev

livekit = {
    "version": "1.13.5",
    "url": "ws://dev.example.com:7880",
    "keys": {"APIdev": "secret:livekit/api_secret"},
    # Media takes 50000-60000/udp.
}

# On one host each part has ports of its own; the port plan (docs/ports.md) refuses what overlaps.
turn = {
    "tls": False,  # no certificate on a LAN
    "pools": {
        # For LiveKit: relays reach the SFU and nothing else.
        "calls": {
            "realm": "example.com",
            "secrets": ["secret:turn/calls"],
            "min_port": 60001,
            "max_port": 65535,
        },
        # For peer-to-peer media: private addresses are denied, except those of the LAN.
        "avatar": {
            "realm": "avatar.example.com",
            "secrets": ["secret:turn/avatar"],
            "peers": "internet",
            "allowed_peers": ["192.168.1.0-192.168.1.255"],
            "listening_port": 3479,
            "min_port": 40000,
            "max_port": 49999,
        },
    },
}

# The application: here examples/backend, whose README says how it is reached without an edge.
app = {
    "url": "http://dev.example.com:8000",
    "api_token": "secret:app/token",
    "env_file": "/srv/app/.env",
    "owner": "app",
    "restart": ["backend.service"],
    "health": [{"url": "http://dev.example.com:8000/health", "fields": {"status": "ok"}}],
    "websockets": [{"url": "ws://dev.example.com:8000/ws", "send": "ping", "expect": "pong"}],
    "workers": [{"unit": "backend.service", "count": 3}],
}

firewall = {"extra_ports": ["8000/tcp"]}  # the application

android = {
    "checkout": "/CHANGE-ME/path/to/the/flutter/project",
    "domains": [{"host": "dev.example.com", "scheme": "ws", "scope": "debug"}],
}

# systemd-resolved's LLMNR: Debian starts it on every address, the firewall covers it.
host = {"other_listeners": ["5355/tcp", "5355/udp"]}
