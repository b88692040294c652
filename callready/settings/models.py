"""What an inventory may say: one model a section, every field with its default and its reason.

The keys keep the name of the key they end up in (`port_range_start`, `min-port` as `min_port`).
Rules that need more than one section are in `host_checks.py`, those of the fleet in `checks.py`.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    model_validator,
)

from callready.settings import dns_providers
from callready.settings.android import Android
from callready.settings.egress import Egress
from callready.settings.monitor import Monitor
from callready.settings.redis import USERS, RedisServer
from callready.settings.types import (
    INLINE,
    INT_MAX,
    IP,
    PROTOCOLS,
    Command,
    ControllerFile,
    DirectoryUrl,
    FreeKeys,
    GeneratedSecret,
    HttpUrl,
    HttpUrlWithQuery,
    IPv4,
    IPv6,
    Listener,
    LiveKitUrl,
    Name,
    Network,
    OpenPort,
    Origin,
    Path,
    PeerRange,
    Port,
    Protocol,
    RedisAddress,
    Resolver,
    SecretByHand,
    Section,
    Source,
    StunServer,
    Timeout,
    Unit,
    Username,
    Version,
    WsUrlWithQuery,
    listed,
)

PROMETHEUS_PORT = 9090  # on loopback
# The groups whose hosts get something on them that runs.
ROLES = frozenset({"redis", "livekit", "turn", "egress", "app", "monitor"})


class Host(Section):
    """The host itself, before any role."""

    other_listeners: list[OpenPort] = Field(
        [], description="Listeners of other programs that are meant to be there, as `9100/tcp`."
    )
    udp_buffer: int = Field(
        5_000_000,
        ge=212_992,
        le=INT_MAX,
        description="Bytes for net.core.rmem_max and wmem_max; LiveKit warns below 5 MB.",
    )
    max_clock_skew: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="Seconds a host's clock may differ from the controller's; TURN REST "
        "credentials carry an expiry time.",
    )


class Dns(Section):
    """Where the records of the dns-01 challenge are made. OVH's keys may stand here directly,
    without `provider` and `credentials`."""

    provider: str = Field("ovh", description=f"Whose API: {', '.join(dns_providers.PROVIDERS)}.")
    credentials: FreeKeys = Field(
        description="What it wants, by name, secrets as references; see "
        "[certificates](certificates.md#dns-01)."
    )
    propagation: int = Field(
        120,
        ge=0,
        le=3600,
        description="Seconds until the zone's name servers have a new record; route53 says so "
        "itself.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ovh_alone(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "credentials" in data:
            return data
        ovh = dns_providers.PROVIDERS["ovh"]
        given = {key: data[key] for key in (*ovh.ways[0], *ovh.more) if key in data}
        rest = {key: value for key, value in data.items() if key not in given}
        return {**rest, "credentials": given} if given else data

    @model_validator(mode="after")
    def _fits(self) -> Dns:
        if self.provider not in dns_providers.PROVIDERS:
            raise ValueError(
                f"provider {self.provider!r} is none of those that certbot in Debian has a plugin "
                f"for: {', '.join(dns_providers.PROVIDERS)}"
            )
        if why := dns_providers.misfit(self.provider, self.credentials):
            raise ValueError(why)
        for key, value in self.credentials.items():
            if key not in dns_providers.PUBLIC and not isinstance(value, SecretStr):
                raise ValueError(f"credentials.{key} {INLINE}")
            plain = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            if not plain.isprintable() or (self.provider != "google" and {"'", '"'} <= set(plain)):
                raise ValueError(f"credentials.{key} has quotes of both kinds or a line break")
        return self


class Acme(Section):
    """Certificates from an ACME server (RFC 8555), issued and renewed on the host by certbot."""

    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$", description="Where the authority reaches you.")
    server: DirectoryUrl = Field(
        "https://acme-v02.api.letsencrypt.org/directory",
        description="Directory URL of the ACME server. For staging: "
        "`https://acme-staging-v02.api.letsencrypt.org/directory`.",
    )
    challenge: Literal["http-01", "dns-01"] = Field(
        "http-01", description="How the names are proved: on port 80, or by DNS records."
    )
    dns: Dns | None = Field(None, description="For dns-01.")
    ca: str | None = Field(
        None,
        description="PEM file of the authority that a private ACME server's HTTPS is signed by.",
    )

    caa_identity: Name | None = Field(
        None,
        description="What CAA records call the authority, such as `letsencrypt.org`; known for "
        "some, else CAA records are not looked at.",
    )

    @model_validator(mode="after")
    def _dns(self) -> Acme:
        if (self.challenge == "dns-01") != bool(self.dns):
            raise ValueError(
                "challenge dns-01 needs dns, the provider of the zone and its credentials; http-01 "
                "takes none"
            )
        return self


class Deploy(Section):
    """How a host changes."""

    confirm_timeout: int = Field(
        60,
        ge=5,
        le=3600,
        description="Seconds from the switch until a host that nobody confirmed reverts by itself.",
    )
    gate_from: Name | None = Field(
        None,
        description="A host of the inventory to probe from, where this machine's network lets no "
        "UDP out.",
    )
    resolver: Resolver | None = Field(
        None,
        description="Name server (`ADDRESS` or `ADDRESS:PORT`) that says what callers are told, "
        "where this machine's own says something else (split horizon): asked for CAA records, and "
        "what names lead to, before ACME, by the gate and in the verification.",
    )
    batch: int = Field(5, ge=1, description="Hosts of a role that change at once, after the first.")
    drain: int = Field(
        0,
        ge=0,
        le=86_400,
        description="Seconds to wait for calls to end before LiveKit or coturn restarts.",
    )


class Verify(Section):
    """What the verification asks of calls at this host's LiveKit."""

    attempts: int = Field(5, ge=1, description="Calls in a row that must all connect.")
    max_loss: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of packets that may be lost, of each path and call: above it video "
        "stutters.",
    )
    max_jitter: float = Field(
        0.03,
        gt=0,
        description="Seconds by which packets of sound may vary (jitter) in a call that lasts.",
    )
    min_bitrate: int = Field(
        150,
        ge=0,
        description="Kilobits a second of video that must arrive in a call that lasts; 300 are "
        "sent.",
    )


class Tls(Section):
    """Certificates and keys: from an ACME server, or files on the controller, in whose paths
    `{name}` is the name that the certificate is for and `{host}` the host's inventory name."""

    acme: Acme | None = Field(None, description="An ACME server, instead of files.")
    certificate: ControllerFile | None = Field(
        None, description="PEM file with the full chain, leaf first."
    )
    key: ControllerFile | None = Field(None, description="PEM file with its private key.")
    ca: str | None = Field(
        None, description="PEM file of the authority, where it is not a publicly trusted one."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Tls:
        given = (self.acme is not None, self.certificate is not None, self.key is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ValueError("set either acme, or both certificate and key")
        return self

    def files(self, host: str, name: str) -> tuple[str, str]:
        """The certificate and key file for `name` on the inventory host `host`."""
        certificate, key = (
            (path or "").format(host=host, name=name) for path in (self.certificate, self.key)
        )
        return certificate, key


class Edge(Section):
    """HAProxy in front of LiveKit and the application: TLS on 443, redirects and ACME on 80."""

    port: Port = Field(443, description="HTTPS and wss.")
    http_port: Port = Field(80, description="Redirects to HTTPS and ACME challenges.")
    max_connections: int = Field(
        20_000,
        ge=100,
        le=262_144,  # two descriptors each, of LimitNOFILE (templates/drop-in.conf.j2)
        description="Connections in all.",
    )
    connections_per_client: int = Field(
        1_000,
        ge=10,
        le=INT_MAX,
        description="Connections that one client address may hold; a whole office may share one.",
    )
    requests_per_client: int = Field(
        500, ge=10, le=INT_MAX, description="Requests in 10 s that one client address may make."
    )
    tunnel_timeout: int = Field(
        86_400,
        ge=3600,
        le=INT_MAX // 1000,  # HAProxy counts milliseconds
        description="Seconds a silent WebSocket lives; calls are long.",
    )
    livekit_timeout: Timeout = Field(
        60, description="Seconds without a byte after which LiveKit's answer is given up (504)."
    )
    app_timeout: Timeout = Field(
        60,
        description="The same for the application: more than the longest silence of its "
        "server-sent events and long polls.",
    )
    client_timeout: Timeout = Field(
        20,
        description="Seconds without a byte after which a client's upload or download is given "
        "up; also the longest TLS handshake, where TURN does not share 443.",
    )


class Opening(Section):
    """What another program on the host is reached by, and by whom. A group of the inventory may be
    one that gets nothing else of callready."""

    ports: list[OpenPort] = Field([], description="Ports, as `6379/tcp` or `60000-60010/udp`.")
    protocols: list[Protocol] = Field(
        [],
        description="IP protocols without ports, by number or name: "
        + ", ".join(f"`{name}`" for name in PROTOCOLS)
        + ".",
    )
    sources: list[Source] | None = Field(
        None,
        min_length=1,
        description="Who may: addresses, networks (`10.0.0.0/24`), and groups of the inventory, "
        "which stand for `address`, `address6` and `internal_address` of their hosts. Without it "
        "anyone.",
    )

    @model_validator(mode="after")
    def _something(self) -> Opening:
        if not self.ports and not self.protocols:
            raise ValueError("opens nothing: set ports or protocols")
        return self


class Firewall(Section):
    """The host's own nftables table, made from the port plan."""

    enabled: bool = Field(True, description="False leaves the host's packet filter alone.")
    extra_ports: list[OpenPort] = Field(
        [], description="More ports to open to everyone, as `443/tcp` or `60000-60010/udp`."
    )
    open: dict[Username, Opening] = Field(
        {},
        description="What else to open, by a name of your own: to some only, or protocols without "
        "ports.",
    )
    turn_requests_per_client: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="STUN and TURN requests and new TURN connections in a second that one client, "
        "an IPv4 address or an IPv6 /64, may make, for ten seconds at once. Media is not counted. "
        "0 is without limit.",
    )
    notrack: bool = Field(
        False,
        description="Exempt media from connection tracking; refused where another table does NAT.",
    )


class Ips(Section):
    """livekit.yaml's `rtc.ips`: callers are told of the host's `address` and `address6`, and of
    these addresses of its interfaces."""

    includes: list[Network] = Field([], description="More addresses or networks of the host.")


class Rtc(Section):
    """livekit.yaml's `rtc`."""

    port_range_start: Port = Field(50000, description="First UDP port of media.")
    port_range_end: Port = Field(60000, description="Last UDP port of media.")
    tcp_port: Port = Field(7881, description="ICE over TCP.")
    stun_servers: list[StunServer] = Field(
        [], description="STUN servers, `host:port`, besides our own coturn (which comes first)."
    )
    turn_ttl: int = Field(
        3600, ge=30, le=86400, description="Seconds a TURN credential minted by LiveKit is valid."
    )
    ips: Ips | None = Field(
        Ips(),
        description="Which of the host's addresses callers are told of. None is all of them, also "
        "those of bridges and internal networks.",
    )

    def more(self, version: Literal[4, 6]) -> list[str]:
        """The networks of an address family that callers are told of beside the host's own."""
        networks = map(ipaddress.ip_network, self.ips.includes if self.ips else ())
        return [str(network) for network in networks if network.version == version]

    @model_validator(mode="after")
    def _range(self) -> Rtc:
        if self.port_range_end - self.port_range_start < 100:
            raise ValueError(
                f"{self.port_range_start}-{self.port_range_end} is less than 100 ports, too few "
                "for media: set port_range_start and port_range_end"
            )
        return self


class Logging(Section):
    """livekit.yaml's `logging`."""

    level: Literal["debug", "info", "warn", "error"] = Field("info", description="LiveKit's own.")
    pion_level: Literal["debug", "info", "warn", "error"] = Field(
        "error", description="The WebRTC library's."
    )
    json_: bool = Field(True, alias="json", description="One JSON object a line.")


class Redis(Section):
    """livekit.yaml's `redis`; any address switches on distributed mode."""

    address: RedisAddress = Field(description="`host:port`, or the path of a socket on this host.")
    username: str | None = Field(None, description="ACL user.")
    password: SecretByHand | None = Field(None, description="Its password.")
    db: int = Field(0, ge=0, le=INT_MAX, description="Database number.")
    use_tls: bool = Field(False, description="Connect with TLS.")


class Prometheus(Section):
    """livekit.yaml's `prometheus`."""

    port: Port = Field(6789, description="Port of /metrics.")
    username: str = Field("prometheus", min_length=1, description="Basic-auth user.")
    password: GeneratedSecret = Field(description="Basic-auth password.")
    sources: list[Source] = Field(
        [],
        description="Who may scrape it besides the host itself, as `firewall.open.NAME.sources`.",
    )


class Webhook(Section):
    """livekit.yaml's `webhook`."""

    urls: list[HttpUrlWithQuery] = Field(
        min_length=1,
        description="URLs that get events, also of callready's own rooms, `callready-…`.",
    )
    api_key: str = Field(description="The key that signs them; one of `livekit.keys`.")


class LiveKit(Section):
    """livekit-server, the SFU."""

    version: Version = Field("1.13.5", description="Release to install, pinned.")
    base_url: HttpUrl = Field(
        "https://github.com/livekit/livekit/releases/download",
        description="Where `v<version>/livekit_<version>_linux_<arch>.tar.gz` and "
        "`checksums.txt` are; a mirror for hosts without Internet.",
    )
    archive_sha256: dict[Literal["amd64", "arm64"], str] = Field(
        {}, description="SHA-256 of the archive; without it the release's checksums.txt decides."
    )
    url: LiveKitUrl = Field(
        description="What clients are told: wss://…, or ws:// for a lab or a LAN."
    )
    port: Port = Field(7880, description="Signalling over HTTP and WebSocket.")
    bind_addresses: list[IP] = Field(
        [], description="Addresses `port` listens on; empty is every address."
    )
    keys: Annotated[dict[str, GeneratedSecret], Origin(rotation="livekit")] = Field(
        min_length=1, description="API key name to secret; the first is the one handed to the app."
    )
    token_ttl: int = Field(
        21_600,
        ge=30,
        le=INT_MAX,
        description="Seconds the app's tokens are valid at most (6 h is the SDKs' "
        "default); a rotated key stays known that long.",
    )
    turn_pool: str | None = Field(
        "calls", description="The TURN pool LiveKit hands out; none is for a LAN only."
    )
    rtc: Rtc = Field(Rtc(), description="Media transport.")
    logging: Logging = Field(Logging(), description="What goes to the journal.")
    redis: Redis | None = Field(
        None,
        description="A Redis of your own, instead of that of group `redis`: SFUs with one `url` "
        "have one in common.",
    )
    prometheus: Prometheus | None = Field(None, description="Metrics.")
    webhook: Webhook | None = Field(None, description="Events to the app.")
    config: FreeKeys = Field(
        {}, description="Other keys of livekit.yaml (`room`, `limit`, …), checked by version."
    )

    @model_validator(mode="after")
    def _webhook_key(self) -> LiveKit:
        if self.webhook and self.webhook.api_key not in self.keys:
            raise ValueError(
                f"webhook.api_key {self.webhook.api_key!r} is not one of keys: "
                + ", ".join(self.keys)
            )
        return self


class PoolKeys(Section):
    """What one coturn instance is configured with; set in `turn` for all pools or in one pool."""

    listening_port: Port = Field(3478, description="STUN and TURN, UDP and TCP.")
    tls_listening_port: Port = Field(5349, description="TURN over TLS.")
    tls: bool = Field(True, description="Listen with TLS; needs a certificate.")
    tls_on_443: bool = Field(
        False,
        description="TURN over TLS on 443 too, for networks that let nothing else out; it is then "
        "what clients are told.",
    )
    proxy_port: Port = Field(
        3480,
        description="Where coturn takes connections from the edge of the same host (PROXY "
        "protocol, loopback only).",
    )
    min_port: Port = Field(49152, description="First relay port (RFC 8656, section 7.2).")
    max_port: Port = Field(65535, description="Last relay port.")
    peers: Literal["sfu", "internet"] = Field(
        "sfu",
        description="Whom a relay may reach: only the SFUs' addresses, or any public address.",
    )
    allowed_peers: list[PeerRange] = Field(
        [], description="Exceptions from the deny-list: addresses or ranges first-last."
    )
    user_quota: int | None = Field(
        None,
        ge=0,
        le=INT_MAX,
        description="Allocations a user name may hold on a host, 0 is any number. Unset it is 48, "
        "twice what a caller with IPv4 and IPv6 on two networks takes; of fixed users, whom "
        "callers share, any number.",
    )
    total_quota: int | None = Field(
        None,
        ge=0,
        le=INT_MAX,
        description="Allocations in all on a host, 0 is any number; unset: as many as relay ports.",
    )
    stale_nonce: int = Field(
        600, ge=60, le=INT_MAX, description="Seconds a nonce lives (RFC 8656, 5)."
    )
    tcp_relay: bool = Field(False, description="RFC 6062 relaying to TCP peers.")
    extra: FreeKeys = Field(
        {}, description="Other keys of turnserver.conf, checked by version; true is a bare key."
    )

    @model_validator(mode="after")
    def _range(self) -> PoolKeys:
        if self.max_port < self.min_port:
            raise ValueError(
                f"min_port {self.min_port} is above max_port {self.max_port}; coturn would start "
                "and crash at the first allocation"
            )
        if self.max_port - self.min_port < 100:
            raise ValueError(
                f"{self.min_port}-{self.max_port} is less than 100 relay ports: "
                "set min_port and max_port"
            )
        return self


class Pool(PoolKeys):
    """A TURN service: the instances of one pool share realm and secrets on all its hosts."""

    realm: Name = Field(description="The realm of its credentials, usually a domain.")
    secrets: Annotated[list[GeneratedSecret], Origin(rotation="turn")] = Field(
        [],
        description="Accepted shared secrets of TURN REST credentials; the first one mints.",
    )
    users: dict[Username, GeneratedSecret] = Field(
        {}, description="Fixed users instead, for SDKs that take only a name and a password."
    )

    @property
    def relay_ports(self) -> int:
        """How many there are of one address."""
        return self.max_port - self.min_port + 1

    @property
    def allocations_per_user(self) -> int:
        """turnserver.conf's `user-quota`; 0 is any number."""
        if self.user_quota is not None:
            return self.user_quota
        return 0 if self.users else 48

    @property
    def allocations(self) -> int:
        """turnserver.conf's `total-quota`; 0 is any number. Without a free port coturn tries all of
        them for every further allocation."""
        return self.relay_ports if self.total_quota is None else self.total_quota

    @model_validator(mode="after")
    def _fits(self) -> Pool:
        if bool(self.secrets) == bool(self.users):
            raise ValueError("set either secrets (TURN REST credentials) or users (fixed ones)")
        if self.tls_on_443 and not self.tls:
            raise ValueError("tls_on_443 needs TLS: leave it out, or set tls to True")
        return self


class Turn(PoolKeys):
    """coturn; keys set here are the defaults of every pool."""

    version: Version = Field("4.6.1", description="coturn as the Debian release installs it.")
    pools: dict[Username, Pool] = Field({}, description="The TURN services by name.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pools(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("pools"), dict):
            return data
        common = {key: value for key, value in data.items() if key in PoolKeys.model_fields}
        pools = {
            name: {**common, **pool} if isinstance(pool, dict) else pool
            for name, pool in data["pools"].items()
        }
        return {**data, "pools": pools}


class HttpCheck(Section):
    """An HTTP endpoint of the app that verification asks."""

    url: HttpUrlWithQuery = Field(description="http:// or https:// URL.")
    status: int = Field(200, ge=100, le=599, description="The status it must answer with.")
    fields: dict[str, Any] = Field({}, description="JSON fields it must contain, by value.")


class WebSocketCheck(Section):
    """A WebSocket endpoint of the app that verification talks to."""

    url: WsUrlWithQuery = Field(description="ws:// or wss:// URL.")
    send: str = Field(description="Text to send.")
    expect: str = Field(description="Text the answer must contain.")


class Workers(Section):
    """How many worker processes a unit of the app must run."""

    unit: Unit = Field(description="The systemd unit.")
    count: int = Field(ge=1, description="Worker processes, its main process not counted.")


class App(Section):
    """The application that mints tokens: its environment file and how to see that it works."""

    env_file: Path = Field(description="The .env file; other keys in it are kept.")
    url: HttpUrl | None = Field(None, description="URL that callers reach it at.")
    upstream: Listener | None = Field(None, description="Where it listens, for the edge.")
    owner: Username = Field("root", description="User that owns it (mode 0600).")
    api_token: Annotated[list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="app")] = (
        Field(
            [],
            description="Written into it as `APP_TOKEN`: what callers of `/token` and "
            "`/turn-credentials` present (examples/backend); two with a comma while it is rotated. "
            "With `url`, verification makes a call with what they hand out.",
        )
    )
    restart: list[Unit] = Field([], description="Units to restart when it changed.")
    commands: list[Command] = Field([], description="Shell commands to run when it changed.")
    health: list[HttpCheck] = Field([], description="HTTP checks.")
    websockets: list[WebSocketCheck] = Field([], description="WebSocket checks.")
    workers: list[Workers] = Field([], description="Worker processes.")


class HostSettings(Section):
    """Everything one host's inventory data says."""

    name: Name = Field(
        description="The name callers use, no other host's; the inventory name unless set."
    )
    groups: frozenset[str] = Field(frozenset(), description="The inventory groups it is in.")
    elsewhere: frozenset[str] = Field(
        frozenset(), description="The inventory groups that other hosts are in."
    )
    address: IPv4 | None = Field(None, description="Public IPv4 address.")
    address6: IPv6 | None = Field(None, description="Public IPv6 address, if any.")
    private_address: IPv4 | None = Field(
        None, description="The address on the interface, behind 1:1 NAT."
    )
    internal_address: IP | None = Field(
        None,
        description="The address on an internal network (vRack), over which the hosts reach each "
        "other; callers are never told of it.",
    )
    pools: list[Username] = Field([], description="TURN pools this host runs.")
    sudo_password: SecretByHand | None = Field(None, description="sudo's, where it asks for one.")
    ssh_port: Port = Field(22, description="Port pyinfra connects to.")
    host: Host = Field(Host(), description="The host itself.")
    deploy: Deploy = Field(Deploy(), description="How it changes.")
    verify: Verify = Field(Verify(), description="What is asked of its calls.")
    tls: Tls | None = Field(None, description="Certificates.")
    edge: Edge | None = Field(None, description="HAProxy with TLS in front of LiveKit and app.")
    firewall: Firewall = Field(Firewall(), description="Packet filter.")
    fleet_ca: Annotated[
        list[GeneratedSecret], BeforeValidator(listed), Origin(rotation="fleet-ca")
    ] = Field(
        [],
        description="What the key of the fleet's own authority is made from, by whose certificates "
        "hosts know each other; needed with `monitor`, and with a `redis` that other hosts use. "
        "The first one signs, others are accepted.",
    )
    monitor: Monitor | None = Field(None, description="Metrics and alerts.")
    redis: RedisServer | None = Field(None, description="What SFUs and recorders share.")
    livekit: LiveKit | None = Field(None, description="The SFU.")
    turn: Turn = Field(Turn(), description="coturn.")
    egress: Egress | None = Field(None, description="Recording.")
    app: App | None = Field(None, description="The application's environment.")
    android: Android | None = Field(None, description="The Android project.")

    @property
    def local_address(self) -> str:
        """The IPv4 address on the host's interface."""
        return self.private_address or self.address or ""

    @property
    def addresses(self) -> list[str]:
        """Those by which other hosts know it, public and internal."""
        return [a for a in (self.address, self.address6, self.internal_address) if a]

    @property
    def sfu(self) -> LiveKit | None:
        """LiveKit's settings, if this host runs it."""
        return self.livekit if "livekit" in self.groups else None

    @property
    def backend(self) -> App | None:
        """The application's settings, if this host runs it."""
        return self.app if "app" in self.groups else None

    @property
    def records(self) -> Egress | None:
        """The settings of egress, if this host runs it."""
        return self.egress if "egress" in self.groups else None

    @property
    def watches(self) -> Monitor | None:
        """The monitor's settings, if this host runs it."""
        return self.monitor if "monitor" in self.groups else None

    @property
    def watched(self) -> Monitor | None:
        """The monitor's settings, if it measures this host."""
        return self.monitor if self.groups & ROLES else None

    @property
    def redis_here(self) -> RedisServer | None:
        """Redis' settings, if this host runs it."""
        return self.redis if "redis" in self.groups else None

    @property
    def redis_clients(self) -> tuple[str, ...]:
        """The groups whose other hosts use the Redis of this one."""
        return tuple(group for group in USERS if self.redis_here and group in self.elsewhere)

    @property
    def turn_pools(self) -> dict[str, Pool]:
        """The pools that run on this host, by name."""
        if "turn" not in self.groups:
            return {}
        return {name: self.turn.pools[name] for name in self.pools if name in self.turn.pools}

    @property
    def serves(self) -> bool:
        """Whether callers reach this host."""
        return bool(self.groups & {"livekit", "turn", "monitor"}) or bool(self.edge_backends)

    @property
    def is_server(self) -> bool:
        """Whether callers reach this host, or other hosts of the fleet do, or it records what
        callers say, so that its kernel and firewall are ours to set."""
        return self.serves or bool(self.groups & {"redis", "egress"})

    @property
    def has_release(self) -> bool:
        """Whether something of ours is on this host, or may still be after its last role has gone:
        an Android project is only a folder on it."""
        return "android" not in self.groups or bool(self.groups & ROLES)

    @property
    def edge_backends(self) -> dict[str, str]:
        """What this host's edge serves: name in the URL to `address:port` behind it."""
        found: dict[str, str] = {}
        if self.edge and (livekit := self.sfu):
            found[urlsplit(livekit.url).hostname or ""] = f"127.0.0.1:{livekit.port}"
        if self.edge and (app := self.backend) and app.url and app.upstream:
            found[urlsplit(app.url).hostname or ""] = app.upstream
        if self.edge and (monitor := self.watches):
            found[urlsplit(monitor.url).hostname or ""] = f"127.0.0.1:{PROMETHEUS_PORT}"
        return found

    @property
    def has_edge(self) -> bool:
        """Whether there is anything on this host for an edge to serve."""
        return bool(self.edge_backends)

    @property
    def tls_names(self) -> list[str]:
        """The names this host needs certificates for."""
        names = [self.name] if any(pool.tls for pool in self.turn_pools.values()) else []
        return [*names, *(name for name in self.edge_backends if name not in names)]

    @property
    def challenge_port(self) -> int | None:
        """Where certbot answers HTTP-01 challenges: behind an edge on loopback, else on 80."""
        acme = self.tls.acme if self.tls else None
        if acme is None or acme.challenge != "http-01" or not self.tls_names:
            return None
        return 8888 if self.has_edge else 80

    @property
    def livekit_addresses(self) -> list[str]:
        """livekit.yaml's `bind_addresses`: loopback behind an edge."""
        if self.livekit is None:
            return []
        return ["127.0.0.1"] if self.has_edge else self.livekit.bind_addresses

    @property
    def livekit_on_loopback(self) -> bool:
        """Whether LiveKit's signalling and metrics are for this host alone."""
        bound = self.livekit_addresses
        return bool(bound) and {"127.0.0.1", "::1"}.issuperset(bound)
