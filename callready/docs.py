"""The generated pages of docs/: the settings from their models, the ports from the port plan.

python -m callready.docs                   write them (make docs)
python -m callready.docs inventories/prod  print ports and edge firewall rules of your own hosts
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import annotated_types
import yaml
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from callready.diagnosis.keys import KEYS
from callready.release.render import render
from callready.secrets.loading import load_fleet
from callready.settings import types
from callready.settings.fields import model_in, origin_of
from callready.settings.fleet import Fleet
from callready.settings.host_checks import unreachable
from callready.settings.models import ROLES, HostSettings
from callready.settings.ports import Use, overlaps, port_plan
from callready.settings.problem import SettingsError
from callready.settings.turn import Pool, PoolKeys

ROOT = Path(__file__).parent.parent
GENERATED = "<!-- Made by `make docs` from the code: change callready/, not this page. -->\n"
HOST_DATA = (
    *("name", "address", "address6", "private_address", "internal_address", "region", "pools"),
    *("hand_out", "ssh_port", "sudo_password"),
)

# What everything on one host needs beside the example's settings: ports of its own for each part.
ONE_HOST: dict[str, dict[str, object]] = {
    "calls": {"min_port": 60001, "max_port": 65535},
    "avatar": {
        "listening_port": 3479,
        "tls_listening_port": 5350,
        "min_port": 40000,
        "max_port": 49999,
    },
}


def pages() -> dict[Path, str]:
    """Every page that is generated, whole or in part, with its text as it should be."""
    fleet = example()
    shown = {"the SFU": "sfu1", "a TURN host": "turn1", "the application's host": "app1"}
    guide = ROOT / "docs/ovh-firewall.md"
    head, _, rest = guide.read_text().partition("<!-- edge rules -->\n")
    _, _, tail = rest.partition("<!-- end of edge rules -->\n")
    rules = "".join(
        f"\nFor {what}:\n\n{edge_table(fleet[f'{host}.example.com'], fleet)}"
        for what, host in shown.items()
    )
    return {
        ROOT / "docs/settings.md": settings_page(),
        ROOT / "docs/ports.md": ports_page(fleet),
        guide: f"{head}<!-- edge rules -->\n{rules}\n<!-- end of edge rules -->\n{tail}",
        ROOT / "docs/verification.md": verification_page(),
        ROOT / "docs/watching.md": watching_page(),
    }


def verification_page() -> str:
    """The page of the verification, with the table of the causes that it knows."""
    head, mark, _ = (ROOT / "docs/verification.md").read_text().partition("<!-- causes -->\n")
    rows = ((f"`{key}`", f"{words[:1].upper()}{words[1:]}") for key, words in KEYS.items())
    return f"{head}{mark}\n{_markdown('cause, what is wrong', rows)}"


# ---- alerts ----

# From a fault to the message of a page, in seconds at most; the tests hold them against the rules
# and templates.
TO_THE_MESSAGE = {
    "the synthetic caller asks again": 25,
    "and waits for the answer": 10,
    "Prometheus asks for what it found": 15,
    "Prometheus looks at its rules": 15,
    "`for` of every page": 60,
    "Alertmanager waits for more of the same host": 10,
}


SFUS = [f"sfu{number}.example.com" for number in (1, 2, 3)]
TURN_HOSTS = [f"turn{number}.example.com" for number in (1, 2, 3)]


def rules(groups: Iterable[str] = ROLES) -> str:
    """The rules of Prometheus for a fleet that has hosts in these groups; with Redis, of a
    cluster."""
    names = {"livekit_names": ["livekit.example.com"], "app_names": ["app.example.com"]}
    is_cluster = "redis" in groups
    clusters = {"livekit.example.com": SFUS} if is_cluster else {}
    pools = {"calls": TURN_HOSTS} if is_cluster else {}
    return render("alerts.yml.j2", **names, clusters=clusters, pools=pools, groups=groups).decode()


def alerts(groups: Iterable[str] = ROLES) -> dict[str, dict[str, Any]]:
    """Every alert by its name, as the rules have it; of the same hosts."""
    (group,) = yaml.safe_load(rules(groups))["groups"]
    return {rule["alert"]: rule for rule in group["rules"] if "alert" in rule}


def watching_page() -> str:
    """The page of the monitor, with the table of its alerts."""
    page = (ROOT / "docs/watching.md").read_text()
    head, mark, rest = page.partition("<!-- alerts -->\n")
    _, end, tail = rest.partition("<!-- end of alerts -->\n")
    rows = []
    for name, rule in alerts().items():
        told = {key: _without_values(text) for key, text in rule["annotations"].items()}
        link = told["docs"].removeprefix("docs/")
        held = f", for {rule['for'].removesuffix('m')} min" if "for" in rule else ""
        severity = rule["labels"]["severity"]
        rows.append(
            [f"[{name}]({link})", severity, told["summary"], told["when"] + held, told["look_at"]]
        )
    table = _markdown("alert, severity, what callers suffer, when it is sent, where to look", rows)
    steps = [[what, f"{seconds} s"] for what, seconds in TO_THE_MESSAGE.items()]
    total = ["**together**", f"**{sum(TO_THE_MESSAGE.values())} s**"]
    delay = _markdown("from a fault to the message of a page, at most", [*steps, total])
    return f"{head}{mark}\n{table}\n{delay}\n{end}{tail}"


def _without_values(text: str) -> str:
    """A text of an alert as it is for any host: HOST for its name."""
    text = re.sub(r"\{\{ (range|with|if) .*\{\{ end \}\}", "…", text)
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: found[1].upper(), text)
    text = re.sub(r"\{\{ humanizePercentage \$value \}\}", "N %", text)
    return re.sub(r"\{\{ .*?\$value \}\}", "N", text)


# ---- settings ----


def settings_page() -> str:
    """docs/settings.md: every section of the models with its keys, types and defaults."""
    parts = [GENERATED, SETTINGS_HEAD, _table(HostSettings, "", HOST_DATA)]
    for path, model in sections(HostSettings):
        parts += [f"## {path}\n", f"{model.__doc__}".replace("\n    ", "\n") + "\n"]
        if model is Pool:
            parts.append(POOL_NOTE)
        parts.append(_table(model, path))
    return "\n".join(parts)


SETTINGS_HEAD = """\
# Settings

Every key an inventory may set, with its type and default. For operators who edit
`inventories/group_data/ENV.py`; the port table is in [ports.md](ports.md).

A section below is a variable of that file, a dotted name is a nested key:
`livekit = {"url": "wss://livekit.example.com", "rtc": {"tcp_port": 7881}}` sets `livekit.url` and
`livekit.rtc.tcp_port`. A key that is not listed is an error. Everything is checked for all hosts
before any connection is made; all errors are shown at once.

**Secrets** are references: `"secret:turn/calls"` stands for the entry `turn/calls` of
`inventories/ENV.secrets.yaml` (mode 0600, not in version control), or for the environment variable
`CALLREADY_SECRET_TURN_CALLS`, which comes first. A secret written into the inventory is an error.
`make secrets` makes those that are called generated below; the others belong to something that
exists and are filled in by hand. `make rotate` renews those that are called rotated
([secrets.md](secrets.md)).

**How this machine reaches the hosts** is pyinfra's own data and may stand beside these keys:
`ssh_user`, `ssh_key`, `ssh_hostname`, `ssh_known_hosts_file`, `ssh_config_file` and the other names
that begin with `ssh_`. `ssh_key_password` and `ssh_password` are secret references, filled in by
hand. Unknown host keys are refused unless `ssh_strict_host_key_checking` says otherwise.

## A host's own data

In `inventories/ENV`, beside the host's name. Its groups decide what it is: `livekit` (the SFU),
`turn` (coturn), `redis` ([what SFUs share](redis.md)), `egress` (recordings), `app` (the
application's `.env`), `android` (a checkout of the app). A group is a list of hosts, each a name or
a pair of name and data: `livekit = ["sfu2", ("sfu1", {…})]`. A host has one name and stands once in
each of its groups; what each of them says of it is put together. Other variables of that file begin
with `_` if they are lists.
"""

POOL_NOTE = """\
`NAME` is the pool's name, a word of your own. Besides these keys a pool takes every key of `turn`
except `version` and `pools`; what it does not set is taken from there.
"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below a model, by the heading that its page has."""
    for name, field in model.model_fields.items():
        if inner := model_in(field.annotation):
            key = f"{path}.{field.alias or name}{inner[1]}".removeprefix(".")
            yield key, inner[0]
            yield from sections(inner[0], key)


def _table(model: type[BaseModel], path: str, only: tuple[str, ...] = ()) -> str:
    hints = get_type_hints(model, include_extras=True)
    inherited = PoolKeys.model_fields if model is Pool else {}
    rows = []
    for name, field in model.model_fields.items():
        if name in inherited or (only and name not in only):
            continue
        origin = origin_of(field)
        rotated = ", rotated" if origin and origin.rotation else ""
        kind = "; ".join([_type(hints[name]) + rotated, *_limits(field)])
        is_name = field is HostSettings.model_fields["name"]
        default = "the inventory name" if is_name else _default(field)
        rows.append([f"`{field.alias or name}`", kind, default, field.description or ""])
    return _markdown("key, type, default, what it is", rows)


def _markdown(columns: str, rows: Iterable[Iterable[str]]) -> str:
    heads = columns.split(", ")
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (heads, *rows)]
    head, *body = (f"| {line} |\n" for line in lines)
    return "".join([head, "|", "---|" * len(heads), "\n", *body])


_WORDS: dict[Any, str] = {
    types.Port: "port",
    types.IPv4: "IPv4 address",
    types.IPv6: "IPv6 address",
    types.Listener: "`ADDRESS:PORT`",
    types.IP: "IP address",
    types.StunServer: "`HOST:PORT`",
    types.RedisAddress: "`HOST:PORT` or absolute path",
    types.LiveKitUrl: "`ws://` or `wss://` URL without a path",
    types.HttpUrl: "`http://` or `https://` URL without a query",
    types.HttpUrlWithQuery: "`http://` or `https://` URL",
    types.WsUrlWithQuery: "`ws://` or `wss://` URL",
    types.DirectoryUrl: "`https://` URL",
    types.SmtpServer: "`HOST:PORT`",
    types.Mailbox: "mail address",
    types.AlertUrl: "`http://` or `https://` URL, or a secret reference to one, by hand",
    types.PeerRange: "address or range",
    types.SecretByHand: "secret reference, by hand",
    types.GeneratedSecret: "secret reference, 32 characters or more, generated",
    types.Username: "name",
    types.Unit: "systemd unit",
    types.Path: "absolute path",
    types.Name: "host name",
    types.ImageName: "image with its registry, without a tag",
    types.Digest: "`sha256:…`",
    types.OpenPort: "`PORT/tcp`, `PORT/udp` or a range",
    types.Network: "address or network",
    types.Source: "address, network or group",
    types.Protocol: "protocol",
    Any: "any",
}


def _type(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(item) for item in arguments if item is not NoneType)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "section, see below"
    return f"{hint.__name__}"


_LIMITS = {
    annotated_types.Ge: "{0.ge} or more",
    annotated_types.Gt: "more than {0.gt}",
    annotated_types.Le: "{0.le} or less",
    annotated_types.MinLen: "not empty",
}


def _limits(field: FieldInfo) -> list[str]:
    return [_LIMITS[type(item)].format(item) for item in field.metadata if type(item) in _LIMITS]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    if field.default in (None, [], {}, (), frozenset()):
        return "none"
    text = f'"{field.default}"' if isinstance(field.default, str) else f"{field.default}"
    return f"`{text}`"


# ---- ports ----


def example() -> Fleet:
    """The hosts of inventories/prod as it is shipped, which in this clone may be edited."""
    hosts = {
        "sfu1.example.com": _host("sfu1.example.com", {"livekit"}, {}),
        "turn1.example.com": _host("turn1.example.com", {"turn"}, {"calls": {}}),
        "turn2.example.com": _host("turn2.example.com", {"turn"}, {"avatar": {}}),
        "app1.example.com": _host("app1.example.com", {"app"}, {}),
        "mon1.example.com": _host("mon1.example.com", {"monitor"}, {}, "192.0.2.41"),
    }
    return Fleet("inventories/prod", hosts)


def one_host() -> HostSettings:
    """The host of inventories/single as it is shipped, with ports that do not meet."""
    host = _host("one.example.com", {"livekit", "turn", "app"}, ONE_HOST, watched=False)
    if clash := list(overlaps(port_plan(host))):
        raise ValueError(f"ONE_HOST of callready/docs.py: {clash}")
    return host


def _host(
    name: str,
    groups: set[str],
    pools: Mapping[str, Mapping[str, object]],
    address: str | None = None,
    watched: bool = True,
) -> HostSettings:
    secret = SecretStr("-" * 32)
    page = {"mail": ["oncall@example.com"]}
    monitor = {"url": "https://monitor.example.com", "password": secret, "page": page}
    livekit = {"url": "wss://livekit.example.com", "keys": {"APIexample": secret}}
    if watched:
        livekit["prometheus"] = {"password": secret}
    both: dict[str, object] = {"realm": "example.com", "secrets": [secret]}
    same = {"calls": {**both, "tls_on_443": True}, "avatar": both}
    return HostSettings.model_validate(
        {
            "name": name,
            "groups": groups,
            "pools": list(pools),
            "address": address,
            "livekit": livekit,
            "monitor": monitor if watched else None,
            "turn": {"pools": {pool: {**same[pool], **own} for pool, own in pools.items()}},
            "edge": {},
            "tls": {"acme": {"email": "operator@example.com"}},
            "app": {
                "url": "https://app.example.com",
                "upstream": "127.0.0.1:8000",
                "env_file": "/opt/app/.env",
            },
        }
    )


def ports_page(fleet: Fleet) -> str:
    """docs/ports.md: what each host of the example opens, and to whom."""
    alone = one_host()
    pools = "".join(f'        "{name}": {json.dumps(own)},\n' for name, own in ONE_HOST.items())
    parts = [GENERATED, PORTS_HEAD]
    for name, host in fleet.hosts.items():
        parts += [f"## {name}\n", port_table(host)]
    parts += [
        "## Everything on one host\n",
        ONE_HOST_TEXT,
        f'```python\nturn = {{\n    "pools": {{\n{pools}    }},\n}}\n```\n',
        port_table(alone),
        "The rules for OVHcloud's edge firewall:\n",
        edge_table(alone, fleet),
        OPEN_TEXT,
    ]
    return "\n".join(parts)


PORTS_HEAD = """\
# Ports

Which ports each host opens, to whom and for what. For operators who set up a firewall in front of
the hosts, or who look for a port that is taken. The tables come from the port plan, which
also makes the hosts' own packet filter, for `inventories/prod` as it is shipped: with the edge,
certificates by ACME and the default ports. For your own hosts:

```sh
python -m callready.docs inventories/prod
```

"Anyone" is the whole Internet, over IPv4 and IPv6. "This host" is closed to the outside. What else
stands there is who may: addresses, networks, and groups of the inventory, which stand for
`address`, `address6` and `internal_address` of their hosts. ICMP that path MTU discovery and
neighbour discovery need is always let in; everything else is dropped. sshd's port is the one it
really listens on, read from the host at each deploy.
"""

ONE_HOST_TEXT = """\
LiveKit's 50000-60000 lies inside coturn's default 49152-65535, and two pools cannot both listen on
3478. On one host give each part ports of its own, as `inventories/single` does, beside `realm` and
`secrets` as before:
"""


OPEN_TEXT = """\
## Ports and protocols of other programs

`firewall.extra_ports` opens ports to everyone, `firewall.open` to some only, and protocols that
have no ports. For example a database for the app, keepalived (IPv6 sends VRRP from link-local
addresses), and an exporter and LiveKit's metrics for one Prometheus:

```python
firewall = {
    "open": {
        "database": {"ports": ["5432/tcp"], "sources": ["app"]},
        "keepalived": {"protocols": ["vrrp"], "sources": ["10.0.0.0/24", "fe80::/10"]},
        "node_exporter": {"ports": ["9100/tcp"], "sources": ["monitor"]},
    },
}
livekit = {"prometheus": {"password": "secret:livekit/prometheus", "sources": ["monitor"]}}
```

`app` and `monitor` are groups of the inventory. A group may have hosts that get nothing of
callready. pyinfra still connects to them; for a host that it must not enter, write the address
instead of a group. Where LiveKit is behind the edge, HAProxy passes scrapers on.

## What the packet filter counts

Each line of these tables that is open has a counter of its own in `table inet callready`, named by
its setting, protocol and ports. It counts packets that began a flow, or all of those that are not
tracked (`firewall.notrack`):

```sh
nft list counter inet callready livekit.rtc.tcp_port/tcp/7881
```

STUN and TURN answer everyone, also a request whose sender is forged: the answer then goes to
somebody else. So one client, an IPv4 address or an IPv6 /64, may send 1000 requests in a second and
10,000 at once, to all TURN ports of a host together. New TCP connections count as requests, media
does not. To join, a caller makes at most 24 allocations, of two to four requests each: a hundred
callers behind one address may join in the same moment. What is over that is dropped, and counted by
the port's name with `/limited` behind it. `firewall.turn_requests_per_client` changes it, 0 is
without limit.
"""


def port_table(host: HostSettings) -> str:
    """The port plan of a host."""
    rows = [
        [use.ports, use.proto.upper(), use.service, use.purpose, use.open_to, f"`{use.setting}`"]
        for use in port_plan(host)
    ]
    return _markdown("port, over, service, for, open to, setting", rows)


class EdgeRule(NamedTuple):
    """A rule of OVHcloud's edge firewall as its form asks for it."""

    action: str
    protocol: str
    source: str
    source_port: str
    destination_port: str
    state: str
    purpose: str


def edge_rules(plan: list[Use], fleet: Fleet) -> list[EdgeRule]:
    """The rules that let a port plan through OVHcloud's Edge Network Firewall.

    It is stateless and knows 20 rules an address, IPv4 only; the last one denies. What comes from
    private addresses does not pass it. Source: OVHcloud, "Enabling and configuring the Edge Network
    Firewall" (KB0043448).
    """
    rules = [EdgeRule("Accept", "TCP", "", "", "", "established", "answers to what the host asked")]
    for use in sorted(plan, key=lambda use: use.proto):
        if use.audience == "this host" or not _edge_knows(use):
            continue
        sources = [str(each) for each in fleet.networks(use.some)[0]] if use.some else [""]
        for source in sources:
            if not source or not unreachable(source):
                what = (use.proto.upper(), source, "", use.ports, "")
                rules.append(EdgeRule("Accept", *what, f"{use.service}: {use.purpose}"))
    return [
        *dict.fromkeys(rules),
        EdgeRule("Accept", "UDP", "", "53", "", "", "answers of DNS resolvers outside OVHcloud"),
        EdgeRule("Accept", "UDP", "", "123", "", "", "answers of NTP servers outside OVHcloud"),
        EdgeRule("Accept", "ICMP", "", "", "", "", "path MTU discovery, ping"),
        EdgeRule("Deny", "IPv4", "", "", "", "", "everything else"),
    ]


def _edge_knows(use: Use) -> bool:
    return bool(use.first) or use.proto in ("ah", "esp", "gre")


def edge_table(host: HostSettings, fleet: Fleet) -> str:
    """The edge firewall's rules of a host, with their priorities, and what they cannot say."""
    plan = port_plan(host)
    rules = edge_rules(plan, fleet)
    # The last priority is 19, whatever is added in between.
    priorities = [*range(len(rules) - 1), max(19, len(rules) - 1)]
    columns = "priority, action, protocol, source IP, source port, destination port, TCP state, for"
    rows = [[f"{priority}", *rule] for priority, rule in zip(priorities, rules, strict=True)]
    much = f"\nThese are {len(rules)} rules and it takes 20: join neighbouring ports.\n"
    unknown = ", ".join(dict.fromkeys(use.proto for use in plan if not _edge_knows(use)))
    lost = f"\nThe form has no protocol {unknown}: with any rules, that does not pass.\n"
    return _markdown(columns, rows) + much * (len(rules) > 20) + lost * bool(unknown)


def main(arguments: list[str]) -> int:
    """Write the pages, or print the ports of an inventory; returns the exit status."""
    if not arguments:
        for path, text in pages().items():
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    try:
        fleet = load_fleet(arguments[0])
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for name, host in fleet.hosts.items():
        if host.is_server:
            print(f"# {name}\n\n{port_table(host)}\n{edge_table(host, fleet)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
