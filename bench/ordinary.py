"""What callready does on a TURN host, with pyinfra's own operations: one operation a resource."""

from pyinfra.context import config, host
from pyinfra.operations import apt, files, server, systemd
from pyinfra.operations.util import any_changed

config.SUDO = True
source = f"{host.data.bench_files}/{host.name}"

apt.packages(name="Packages", packages=host.data.bench_packages.split())
files.link(
    name="Mask Debian's coturn.service",
    path="/etc/systemd/system/coturn.service",
    target="/dev/null",
)
server.user(
    name="User",
    user="benchturn",
    system=True,
    home="/nonexistent",
    ensure_home=False,
    shell="/usr/sbin/nologin",
)
server.sysctl(
    name="Reserved ports",
    key="net.ipv4.ip_local_reserved_ports",
    value=host.data.bench_reserved_ports,
)
files.put(
    name="Kernel settings",
    src=f"{source}/60-bench.conf",
    dest="/etc/sysctl.d/60-bench.conf",
    user="root",
    group="root",
    mode="644",
)
files.directory(name="Folder", path="/etc/bench", user="root", group="root", mode="755")
files.directory(
    name="Folder of the certificate", path="/etc/bench/tls", user="root", group="root", mode="755"
)
files.put(
    name="Certificate",
    src=f"{source}/fullchain.pem",
    dest="/etc/bench/tls/fullchain.pem",
    user="root",
    group="root",
    mode="644",
)
files.put(
    name="Key",
    src=f"{source}/privkey.pem",
    dest="/etc/bench/tls/privkey.pem",
    user="root",
    group="turnserver",
    mode="640",
)
rules = files.put(
    name="Firewall rules",
    src=f"{source}/nftables.conf",
    dest="/etc/bench/nftables.conf",
    user="root",
    group="root",
    mode="644",
)
loader = files.put(
    name="Firewall loader",
    src=f"{source}/load-firewall",
    dest="/usr/local/lib/bench-load-firewall",
    user="root",
    group="root",
    mode="755",
)
firewall_unit = files.put(
    name="Firewall unit",
    src=f"{source}/bench-firewall.service",
    dest="/etc/systemd/system/bench-firewall.service",
    user="root",
    group="root",
    mode="644",
)
turn_config = files.put(
    name="turnserver.conf",
    src=f"{source}/calls.conf",
    dest="/etc/bench/calls.conf",
    user="root",
    group="turnserver",
    mode="640",
)
turn_unit = files.put(
    name="coturn unit",
    src=f"{source}/benchturn@.service",
    dest="/etc/systemd/system/benchturn@.service",
    user="root",
    group="root",
    mode="644",
)
systemd.daemon_reload(name="Reload systemd", _if=any_changed(firewall_unit, turn_unit))
systemd.service(name="Firewall runs", service="bench-firewall.service", running=True, enabled=True)
systemd.service(
    name="Firewall loads again",
    service="bench-firewall.service",
    restarted=True,
    _if=any_changed(rules, loader, firewall_unit),
)
systemd.service(name="coturn runs", service="benchturn@calls.service", running=True, enabled=True)
systemd.service(
    name="coturn restarts",
    service="benchturn@calls.service",
    restarted=True,
    _if=any_changed(turn_config, turn_unit),
)
