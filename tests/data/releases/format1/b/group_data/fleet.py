_state = "/var/lib/callready-lab"
_files = "tests/data/releases/certificates"

ssh_user = "debian"
ssh_key = f"{_state}/id_ed25519"
ssh_known_hosts_file = f"{_state}/known_hosts"
ssh_config_file = "/dev/null"

firewall = {"extra_ports": ["8443/tcp"]}

deploy = {"confirm_timeout": 20}

livekit = {
    "version": "1.13.5",
    "base_url": "http://198.51.100.1:8080",
    "url": "wss://h16.lab.test",
    "keys": {
        "APIrecorded": "secret:livekit/api_secret",
        "APIlater": "secret:livekit/later",
    },
    "rtc": {"port_range_end": 52000, "tcp_port": 7882},
    "prometheus": {"password": "secret:livekit/prometheus"},
}

turn = {
    "total_quota": 1300,
    "pools": {
        "calls": {
            "realm": "calls.lab.test",
            "secrets": ["secret:turn/calls"],
            "tls_on_443": True,
            "min_port": 52001,
            "max_port": 56000,
        },
        "kiosk": {
            "realm": "kiosk.lab.test",
            "users": {"kiosk": "secret:turn/kiosk"},
            "peers": "internet",
            "listening_port": 3481,
            "tls_listening_port": 5351,
            "min_port": 56001,
            "max_port": 60000,
        },
    },
}

edge = {"requests_per_client": 400}

tls = {
    "certificate": f"{_files}/{{name}}.pem",
    "key": f"{_files}/{{name}}.key",
    "ca": f"{_files}/ca.pem",
}

app = {
    "url": "https://app.h16.lab.test",
    "upstream": "127.0.0.1:8000",
    "api_token": "secret:app/token",
    "env_file": "/srv/app/.env",
    "owner": "debian",
    "restart": ["backend.service"],
    "commands": ["/srv/app/changed"],
    "health": [{"url": "https://app.h16.lab.test/health", "fields": {"status": "ok"}}],
}
