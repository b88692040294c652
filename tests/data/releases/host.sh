# shellcheck shell=sh
# The application that the host of the recorded releases has before its first one; run as root.
set -eu
mkdir -p /srv/app
printf 'DEBUG=1\nLIVEKIT_API_KEY=old\nPORT=80\n' > /srv/app/.env
cat > /srv/app/changed << 'END'
#!/bin/sh
echo restarted >> /run/app-log
END
cat > /srv/app/backend << 'END'
#!/usr/bin/perl
use IO::Socket::INET;
my $server = IO::Socket::INET->new(
    LocalAddr => "127.0.0.1", LocalPort => 8000, Listen => 9, ReuseAddr => 1) or die $@;
while (my $client = $server->accept) {
    while (<$client>) { last unless /\S/ }
    print $client "HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{\"status\":\"ok\"}";
}
END
chmod 0755 /srv/app/changed /srv/app/backend
cat > /etc/systemd/system/backend.service << 'END'
[Service]
EnvironmentFile=/srv/app/.env
ExecStart=/srv/app/backend
Restart=always

[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl enable --quiet --now backend.service
