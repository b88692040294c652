# Settings of everything on one host. Every key with its default is in docs/settings.md; secrets are
# references into inventories/single.secrets.yaml, which `make secrets ENV=single` completes.

# How this machine reaches the host. A key file, or leave ssh_key out to use the SSH agent.
ssh_user = "debian"
# ssh_key = "~/.ssh/id_ed25519"
ssh_known_hosts_file = "inventories/single.known_hosts"  # make trust ENV=single
# ssh_config_file = "~/.ssh/config"  # for ProxyJump
# sudo_password = "secret:sudo/single"  # where sudo asks for one

livekit = {
    "version": "1.13.5",
    "url": "wss://livekit.example.com",
    "keys": {"APIsingle": "secret:livekit/api_secret"},
    # Media takes 50000-60000/udp.
}

# On one host each part has ports of its own; the port plan (docs/ports.md) refuses what overlaps.
turn = {
    "pools": {
        # For LiveKit: relays reach the SFU and nothing else. TURN over TLS on 443 too, beside
        # HTTPS, for callers whose network lets nothing else out.
        "calls": {
            "realm": "example.com",
            "secrets": ["secret:turn/calls"],
            "tls_on_443": True,
            "min_port": 60001,
            "max_port": 65535,
        },
        # For peer-to-peer media: relays reach any public address. Leave it out, here and in `pools`
        # of inventories/single, if you do not need it.
        "avatar": {
            "realm": "avatar.example.com",
            "secrets": ["secret:turn/avatar"],
            "peers": "internet",
            "listening_port": 3479,
            "tls_listening_port": 5350,
            "min_port": 40000,
            "max_port": 49999,
        },
    },
}

# HAProxy: TLS on 443 for LiveKit, the application and TURN, redirects on 80.
edge = {}

# Certificates of all three names, issued and renewed on the host. Or files of your own:
# {"certificate": "certificates/{name}/fullchain.pem", "key": "certificates/{name}/privkey.pem"}
tls = {"acme": {"email": "operator@example.com"}}

# The application behind the edge: here examples/backend, whose README says how to install it.
app = {
    "url": "https://app.example.com",
    "upstream": "127.0.0.1:8000",
    "api_token": "secret:app/token",
    "env_file": "/srv/app/.env",
    "owner": "app",
    "restart": ["backend.service"],
    "health": [{"url": "https://app.example.com/health", "fields": {"status": "ok"}}],
    "websockets": [{"url": "wss://app.example.com/ws", "send": "ping", "expect": "pong"}],
    "workers": [{"unit": "backend.service", "count": 3}],
}

android = {
    "checkout": "/CHANGE-ME/path/to/the/flutter/project",
    "domains": [{"host": "app.example.com"}],
}

# Metrics and alerts from the same host (docs/watching.md): seen from itself, so that the dead man's
# switch is required. It also needs a fifth name that leads here, and in livekit
# "prometheus": {"password": "secret:livekit/prometheus"}.
# fleet_ca = "secret:fleet/ca"
# monitor = {
#     "url": "https://monitor.example.com",
#     "password": "secret:monitor/password",
#     "livekit_key": "APIcaller",  # another one of livekit["keys"]
#     "turn_secret": "secret:monitor/turn",
#     "calls_a_minute": 6,  # on one host, half as many as by default
#     "page": {"webhooks": ["secret:monitor/webhook"]},
#     "watchdog": "secret:monitor/watchdog",
# }

# systemd-resolved's LLMNR: Debian starts it on every address, the firewall covers it.
host = {"other_listeners": ["5355/tcp", "5355/udp"]}
