# Production settings. Every key with its default is in docs/settings.md; secrets are references
# into inventories/prod.secrets.yaml, which `make secrets ENV=prod` completes.

# How this machine reaches the hosts. A key file, or leave ssh_key out to use the SSH agent.
ssh_user = "debian"
# ssh_key = "~/.ssh/id_ed25519"
ssh_known_hosts_file = "inventories/prod.known_hosts"  # ssh-keyscan -H NAME... > this file
# ssh_config_file = "~/.ssh/config"  # for ProxyJump
# sudo_password = "secret:sudo/prod"  # where sudo asks for one

livekit = {
    "version": "1.13.5",
    # What clients are told. Your own proxy terminates TLS and passes on to port 7880.
    "url": "wss://livekit.example.com",
    "keys": {"APIprod": "secret:livekit/api_secret"},
    # "prometheus": {"password": "secret:livekit/prometheus"},
    # "redis": {"address": "10.0.0.5:6379", "password": "secret:redis/password"},
    # "config": {"room": {"empty_timeout": 300}},
}

turn = {
    "pools": {
        # For LiveKit: relays reach the SFU and nothing else.
        "calls": {"realm": "example.com", "secrets": ["secret:turn/calls"]},
        # For peer-to-peer media: relays reach any public address.
        "avatar": {
            "realm": "avatar.example.com",
            "secrets": ["secret:turn/avatar"],
            "peers": "internet",
        },
    },
}

# TURN over TLS: {host} is the host's name in the inventory.
tls = {
    "certificate": "certificates/{host}/fullchain.pem",
    "key": "certificates/{host}/privkey.pem",
}

# Listeners of other programs that are meant to be there: Debian's systemd-resolved has these.
host = {"other_listeners": ["5355/tcp", "5355/udp"]}

app = {
    "env_file": "/opt/app/.env",
    "owner": "app",
    "restart": ["app.service"],
    # "health": [{"url": "https://app.example.com/health", "fields": {"status": "ok"}}],
}

android = {
    "checkout": "/CHANGE-ME/path/to/the/flutter/project",
}
