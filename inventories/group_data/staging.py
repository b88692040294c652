# Staging settings. Every key with its default is in docs/settings.md; secrets are references
# into inventories/staging.secrets.yaml, which `make secrets ENV=staging` completes.

# How this machine reaches the hosts. A key file, or leave ssh_key out to use the SSH agent.
ssh_user = "debian"
# ssh_key = "~/.ssh/id_ed25519"
ssh_known_hosts_file = "inventories/staging.known_hosts"  # make trust ENV=staging
# ssh_config_file = "~/.ssh/config"  # for ProxyJump
# sudo_password = "secret:sudo/staging"  # where sudo asks for one

livekit = {
    "version": "1.13.5",
    # What clients are told; this name leads to the SFU's host.
    "url": "wss://livekit.staging.example.com",
    # The first is the app's, the other one the monitor's, for test calls.
    "keys": {"APIstaging": "secret:livekit/api_secret", "APIcaller": "secret:monitor/livekit"},
    "prometheus": {"password": "secret:livekit/prometheus"},
    # "redis": {"address": "10.0.0.5:6379", "password": "secret:redis/password"},  # of your own
    # "config": {"room": {"empty_timeout": 300}},
}

# redis = {"livekit_password": "secret:redis/livekit"}

# Recordings (docs/recording.md): the image, pinned, a key of their own in livekit.keys, and where
# they go, if not to the host's disk. redis needs "egress_password": "secret:redis/egress" too.
# egress = {
#     "digest": "sha256:…",
#     "livekit_key": "APIegress",
#     "storage": {"s3": {"bucket": "…", "access_key": "…", "secret": "secret:egress/s3"}},
# }

turn = {
    "pools": {
        # For LiveKit: relays reach the SFU and nothing else. TURN over TLS on 443 too, for callers
        # whose network lets nothing else out.
        "calls": {
            "realm": "staging.example.com",
            "secrets": ["secret:turn/calls"],
            "tls_on_443": True,
        },
        # For peer-to-peer media: relays reach any public address.
        "avatar": {
            "realm": "avatar.staging.example.com",
            "secrets": ["secret:turn/avatar"],
            "peers": "internet",
        },
    },
}

# HAProxy with TLS on 443 in front of LiveKit and the application (docs/edge.md).
edge = {}

# Certificates, issued and renewed on the hosts (docs/certificates.md). Or files of your own:
# {"certificate": "certificates/{name}/fullchain.pem", "key": "certificates/{name}/privkey.pem"}
tls = {
    # Nothing trusts the authority's staging roots by itself, our probes included: get them from
    # https://letsencrypt.org/docs/staging-environment/ into this one file.
    "ca": "inventories/letsencrypt-staging.pem",
    "acme": {
        "email": "operator@staging.example.com",
        "server": "https://acme-staging-v02.api.letsencrypt.org/directory",
    },
}

# Metrics of every host, and who is told what calls suffer (docs/watching.md).
fleet_ca = "secret:fleet/ca"
monitor = {
    "url": "https://monitor.staging.example.com",
    "password": "secret:monitor/password",
    "livekit_key": "APIcaller",
    "turn_secret": "secret:monitor/turn",
    "mail": {
        "smarthost": "mail.staging.example.com:587",
        "sender": "callready@staging.example.com",
        # "username": "…", "password": "secret:monitor/smtp",  # where it wants them
    },
    "page": {"mail": ["oncall@staging.example.com"]},
    "ticket": {"mail": ["team@staging.example.com"]},
    # "watchdog": "secret:monitor/watchdog",  # a dead man's switch, elsewhere
}

# Listeners of other programs that are meant to be there: Debian's systemd-resolved has these.
host = {"other_listeners": ["5355/tcp", "5355/udp"]}

app = {
    # What the edge serves, and where it passes it on to; leave both out for a proxy of your own.
    "url": "https://app.staging.example.com",
    "upstream": "127.0.0.1:8000",
    "env_file": "/opt/app/.env",
    "owner": "app",
    "restart": ["app.service"],
    # "health": [{"url": "https://app.staging.example.com/health", "fields": {"status": "ok"}}],
}

android = {
    "checkout": "/CHANGE-ME/path/to/the/flutter/project",
}
