"""Where recordings go, and how to read and delete them there. Buckets need obstore."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import SecretStr

from callready.probes import ProbeError
from callready.settings import egress

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Store

TIMEOUT = "10s"


@dataclass(frozen=True)
class Bucket:
    """A bucket of S3 or of what speaks as it does, with the credentials that egress has."""

    name: str
    access_key: str
    secret: SecretStr
    region: str = "us-east-1"
    endpoint: str = ""
    force_path_style: bool = False

    def read(self, key: str, ca_file: str | None = None) -> bytes:
        """The content of an object.

        Args:
            key: of the object.
            ca_file: PEM file of authorities to trust besides the system's.

        Raises:
            Unreadable: the credentials may write only, or no way leads there from here.
            ProbeError: it is not there.
        """
        import obstore
        from obstore import exceptions

        try:
            return bytes(obstore.get(self._store(ca_file), key).bytes())
        except (exceptions.NotFoundError, FileNotFoundError):
            raise ProbeError(
                "recordings get lost",
                "who else writes and deletes in the bucket, and its rules",
                f"{key} is said to be complete and is not in {self.name}",
            ) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise Unreadable(f"its credentials may not read {self.name}") from None
        except exceptions.BaseError:
            where = self.endpoint or "AWS"
            raise Unreadable(f"{where} does not give it to this machine") from None

    def remove(self, key: str, ca_file: str | None = None) -> bool:
        """Delete an object; whether that was allowed. Arguments as `read`."""
        import obstore
        from obstore import exceptions

        try:
            obstore.delete(self._store(ca_file), key)
        except exceptions.BaseError:
            return False
        return True

    def _store(self, ca_file: str | None) -> S3Store:
        from obstore.store import S3Store

        client: ClientConfig = {"timeout": TIMEOUT, "connect_timeout": TIMEOUT}
        if ca_file:
            client["root_certificate"] = Path(ca_file).read_bytes()
        config: S3Config = {
            "bucket": self.name,
            "region": self.region,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret.get_secret_value(),
            "virtual_hosted_style_request": not self.force_path_style,
        }
        if self.endpoint:
            url = urlsplit(self.endpoint)
            client["allow_http"] = url.scheme == "http"
            host = url.netloc if self.force_path_style else f"{self.name}.{url.netloc}"
            config["endpoint"] = f"{url.scheme}://{host}"
        return S3Store(config=config, client_options=client, retry_config={"max_retries": 1})


@dataclass(frozen=True)
class Storage:
    """Where recordings go.

    Args:
        prefix: a folder in it, or empty.
        bucket: None where they stay on the host, or `elsewhere`, which says where.
    """

    prefix: str = ""
    bucket: Bucket | None = None
    elsewhere: str = ""

    @classmethod
    def of(cls, settings: egress.Storage) -> Storage:
        """As the inventory says it."""
        s3 = settings.s3
        if s3 and not s3.assume_role_arn:
            bucket = Bucket(
                s3.bucket,
                s3.access_key,
                s3.secret,
                s3.region or Bucket.region,
                s3.endpoint or "",
                s3.force_path_style,
            )
            return cls(settings.prefix, bucket)
        return cls(settings.prefix, None, "".join(settings.remotes))


class Unreadable(ProbeError):
    """A recording that cannot be looked at from here."""

    def __init__(self, why: str) -> None:
        super().__init__("nobody has looked at what is recorded", "egress.storage, from here", why)
