"""The edge: HAProxy, and the certificates of it and of TURN over TLS."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator

from callready.settings import dns_providers
from callready.settings.types import (
    INLINE,
    INT_MAX,
    ControllerFile,
    DirectoryUrl,
    FreeKeys,
    Name,
    Port,
    Section,
    Timeout,
)

VIA_PEER = "callready-peer"
"""What answers that the edge of another SFU gave have in their Via (RFC 9110, section 7.6.3)."""


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
    peers_port: Port = Field(
        7443,
        description="Where other SFUs with the same `livekit.url` hand callers over while their "
        "own LiveKit takes none: for them alone.",
    )
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
