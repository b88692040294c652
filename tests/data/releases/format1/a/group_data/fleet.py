_state = "/var/lib/callready-lab"
_files = "tests/data/releases/certificates"

ssh_user = "debian"
ssh_key = f"{_state}/id_ed25519"
ssh_known_hosts_file = f"{_state}/known_hosts"
ssh_config_file = "/dev/null"

deploy = {"confirm_timeout": 20}

livekit = {
    "version": "1.13.5",
    "base_url": "http://198.51.100.1:8080",
    "url": "wss://h16.lab.test",
    "keys": {"APIrecorded": "secret:livekit/api_secret"},
    "rtc": {"port_range_end": 52000, "tcp_port": 7881},
    "prometheus": {"password": "secret:livekit/prometheus"},
}

turn = {
    "total_quota": 1200,
    "pools": {
        "calls": {
            "realm": "calls.lab.test",
            "secrets": ["secret:turn/calls"],
            "tls_on_443": True,
            "min_port": 52001,
            "max_port": 56000,
        },
        "gadget": {
            "realm": "gadget.lab.test",
            "users": {"gadget": "secret:turn/gadget"},
            "peers": "internet",
            "listening_port": 3479,
            "tls_listening_port": 5350,
            "min_port": 56001,
            "max_port": 60000,
        },
    },
}

edge = {}

tls = {
    "certificate": f"{_files}/{{name}}.pem",
    "key": f"{_files}/{{name}}.key",
    "ca": f"{_files}/ca.pem",
}

app = {
    "url": "https://app.h16.lab.test",
    "upstream": "127.0.0.1:8000",
    "env_file": "/srv/app/.env",
    "owner": "debian",
    "restart": ["backend.service"],
    "commands": ["/srv/app/changed"],
    "health": [{"url": "https://app.h16.lab.test/health", "fields": {"status": "ok"}}],
}
