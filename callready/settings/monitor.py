"""What an inventory may say of the host that watches the others."""

from __future__ import annotations

from pydantic import Field, SecretStr, model_validator

from callready.settings.types import (
    AlertUrl,
    GeneratedSecret,
    HttpUrl,
    Mailbox,
    Port,
    SecretByHand,
    Section,
    SmtpServer,
    Source,
    Username,
)


class Mail(Section):
    """The server that takes mails of alerts."""

    smarthost: SmtpServer = Field(description="`HOST:PORT` of the server, submission is 587.")
    sender: Mailbox = Field(description="The address that they come from.")
    username: str | None = Field(None, min_length=1, description="Where the server wants one.")
    password: SecretByHand | None = Field(None, description="Its password.")
    require_tls: bool = Field(True, description="Send nothing without STARTTLS.")

    @model_validator(mode="after")
    def _login(self) -> Mail:
        if bool(self.username) != bool(self.password):
            raise ValueError("set both username and password, or neither")
        return self


class Receiver(Section):
    """Who gets alerts of a severity."""

    mail: list[Mailbox] = Field([], description="Mail addresses.")
    webhooks: list[AlertUrl] = Field(
        [], description="URLs that get Alertmanager's JSON; those that hold a token as references."
    )

    @property
    def is_nobody(self) -> bool:
        """Whether nobody would be told."""
        return not self.mail and not self.webhooks


class Logs(Section):
    """What LiveKit, coturn, the edge, certbot, callready's own units and sshd write to the journals
    of all hosts, kept on the monitor. Tokens and secrets are taken out before a line is sent."""

    port: Port = Field(9999, description="Where the monitor takes them, from its fleet only.")
    days: int = Field(7, ge=1, le=3650, description="Days that they are kept.")
    size: int = Field(
        2,
        ge=1,
        le=10_000,
        description="Gigabytes at most; the oldest of whoever has most go first.",
    )
    anonymise: bool = Field(
        False,
        description="Shorten callers' addresses before they are sent, to /24 and /48. Those in "
        "sshd's lines stay.",
    )


class Monitor(Section):
    """The host of group `monitor`: Prometheus and Alertmanager. With it every host is measured."""

    url: HttpUrl = Field(description="Where people look at it: https://, a name of its own.")
    user: Username = Field("operator", description="The name that it asks for.")
    password: GeneratedSecret = Field(description="And the password.")
    port: Port = Field(
        9998, description="Where every host shows its metrics, to the monitor's addresses only."
    )
    sources: list[Source] = Field(
        [],
        description="Who may scrape them too, as `firewall.open.NAME.sources`: a Prometheus of "
        "your own (`make export`).",
    )
    retention_days: int = Field(30, ge=1, le=3650, description="Days that metrics are kept.")
    retention_size: int = Field(
        2, ge=1, le=10_000, description="Gigabytes of metrics at most; the oldest go first."
    )
    calls_a_minute: float = Field(
        12, gt=0, le=60, description="Test calls, of all paths together: each takes its turn."
    )
    livekit_key: str | None = Field(
        None,
        description="Which of `livekit.keys` makes the tokens of test calls: one that nothing else "
        "uses. Unset, the first one, which is the app's.",
    )
    turn_secret: GeneratedSecret | None = Field(
        None,
        description="A TURN secret that only test calls use: pools with secrets accept it beside "
        "their own. Unset, test calls use the pools' own.",
    )
    wheels: str | None = Field(
        None,
        min_length=1,
        description="Where the Python packages of test calls come from: the URL of an index that "
        "the host reaches, or a folder of wheels on the controller. Unset, from where pip on the "
        "host takes them. Their hashes are pinned.",
    )
    mail: Mail | None = Field(None, description="For receivers with mail addresses.")
    page: Receiver = Field(
        Receiver(), description="Who is woken: calls do not connect, now. Required."
    )
    ticket: Receiver = Field(
        Receiver(), description="Who looks at it in the morning; unset, those of `page`."
    )
    logs: Logs | None = Field(
        Logs(), description="The logs of all hosts; `None`: each keeps its own only."
    )
    watchdog: AlertUrl | None = Field(
        None,
        description="A dead man's switch elsewhere, which raises the alarm when its URL is not "
        "called every minute: nobody else says that the monitor is down.",
    )

    def told(self, severity: str) -> Receiver:
        """Who gets alerts of a severity, `page` or `ticket`."""
        return self.page if severity == "page" or self.ticket.is_nobody else self.ticket

    @property
    def urls(self) -> list[tuple[str, SecretStr]]:
        """Every URL that alerts go to, by its key."""
        found = [("watchdog", self.watchdog)] if self.watchdog else []
        for name, receiver in (("page", self.page), ("ticket", self.ticket)):
            hooks = enumerate(receiver.webhooks)
            found += [(f"{name}.webhooks.{number}", each) for number, each in hooks]
        return found
