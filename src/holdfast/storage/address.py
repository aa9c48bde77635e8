"""What the URL of a cloud's object store says: everything but credentials."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from holdfast.errors import ConfigError
from holdfast.storage.keys import is_key

BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
CHECKSUMS = ("sha256", "crc64nvme", "none")
OPTIONS = {"s3": ("region", "endpoint", "checksum", "role"), "gs": ("endpoint",)}
ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
FROM_ENVIRONMENT = {
    ("s3", "region"): ("AWS_REGION", "AWS_DEFAULT_REGION"),
    ("s3", "endpoint"): ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    ("gs", "endpoint"): ("STORAGE_EMULATOR_HOST", "GOOGLE_BASE_URL"),
}


@dataclass(frozen=True, slots=True)
class Address:
    """`s3://bucket/prefix?region=eu-west-1&endpoint=https://host` or `gs://bucket/prefix?endpoint=...`.

    `endpoint`: of another server that speaks the protocol (MinIO, R2, a private endpoint). `checksum`: the one that S3
    verifies every upload by, of CHECKSUMS (`sha256` signs the body too); without it, images are verified by the CRC-32 that
    their manifest keeps, and the rest by S3's own crc64nvme. `role`: the ARN of a role of AWS's that machines of Google's
    take on by the identity of their service account.
    """

    scheme: str
    bucket: str
    prefix: str
    """Without slashes at its ends; empty for the whole bucket."""
    options: Mapping[str, str]

    @property
    def url(self) -> str:
        """Names the same place on every machine."""
        query = urlencode(self.options, safe="/:")
        return f"{self.scheme}://{self.bucket}/{quote(self.prefix)}" + (f"?{query}" if query else "")

    @classmethod
    def parse(cls, url: str, environment: Mapping[str, str] = os.environ) -> Address:
        """What the URL leaves out is taken from the SDKs' own variables. Raises ConfigError."""
        parts = urlsplit(url)
        if parts.username or "@" in parts.netloc:
            raise ConfigError(
                f"a store's URL holds no credentials; take them out of {parts.scheme}://...@{parts.hostname}"
            )
        if not BUCKET.fullmatch(parts.netloc):
            raise ConfigError(
                f"store {url!r}: {parts.netloc!r} is no name of a bucket; write {parts.scheme}://bucket/prefix"
            )
        prefix = unquote(parts.path).strip("/")
        if (prefix and not is_key(prefix)) or parts.fragment:
            raise ConfigError(
                f"store {url!r}: {prefix or parts.fragment!r} is no prefix of keys; write a/b, and %23 for #"
            )
        return cls(parts.scheme, parts.netloc, prefix, _options(url, parts.scheme, parts.query, environment))


def _options(url: str, scheme: str, query: str, environment: Mapping[str, str]) -> dict[str, str]:
    said = parse_qsl(query, keep_blank_values=True)
    known = OPTIONS[scheme]
    for name, value in said:
        if name not in known:
            raise ConfigError(f"store {url!r}: it can't say {name!r} of a {scheme}:// store, only {', '.join(known)}")
        if not value or len([one for one, _ in said if one == name]) > 1:
            raise ConfigError(f"store {url!r}: give {name!r} one value, or leave it out")
    options = {}
    for name in known:
        variables = FROM_ENVIRONMENT.get((scheme, name), ())
        value = dict(said).get(name) or next((environment[one] for one in variables if environment.get(one)), "")
        if value:
            options[name] = value
    if "endpoint" in options:
        options["endpoint"] = _endpoint(url, options["endpoint"])
    if options.get("checksum", "none") not in CHECKSUMS:
        raise ConfigError(f"store {url!r}: no checksum {options['checksum']!r}; use one of {', '.join(CHECKSUMS)}")
    if "role" in options and not ROLE.fullmatch(options["role"]):
        raise ConfigError(
            f"store {url!r}: {options['role']!r} is no role's ARN; write role=arn:aws:iam::123456789012:role/name"
        )
    return options


def _endpoint(url: str, endpoint: str) -> str:
    if "://" not in endpoint:  # as STORAGE_EMULATOR_HOST may be
        endpoint = f"http://{endpoint}"
    parts = urlsplit(endpoint)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ConfigError(f"store {url!r}: {endpoint!r} is no endpoint; write endpoint=https://host:port")
    return endpoint.rstrip("/")
