"""obstore's stores for S3 and GCS: endpoint, credentials, retries. obstore is imported here alone, when it is needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ConfigError, CredentialsError
from holdfast.storage.address import Address
from holdfast.storage.s3_parts import CONNECT_SECONDS, REQUEST_SECONDS, Keys, is_behind_proxy

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

OLDEST_OBSTORE = "0.12"
CREDENTIALS_SECONDS = 300.0
"""So long obstore keeps what a session gave. botocore renews 10 to 15 minutes before the end, in time for this."""
NATIVE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
Provider = Callable[[], dict[str, Any]]
"""As obstore wants it: access_key_id, secret_access_key, token, expires_at."""
OBSTORE_ONLY = (
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_",
    "AWS_REQUEST_PAYER",
    "AWS_SKIP_SIGNATURE",
    "AWS_S3_EXPRESS",
    "AWS_TOKEN",
    "AWS_METADATA_ENDPOINT",
    "AWS_CHECKSUM_ALGORITHM",
)
"""What these begin, obstore heeds in the environment: https://docs.rs/object_store/latest/object_store/aws/enum.AmazonS3ConfigKey.html"""
ASK_AGAIN_SECONDS = 5.0
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


_process_of_obstore: int | None = None


def check_process() -> None:
    """Raises ConfigError in a child forked from a process that used obstore: its threads are gone, calls would hang."""
    if _process_of_obstore not in (None, os.getpid()):
        raise ConfigError(
            f"process {os.getpid()} was forked from {_process_of_obstore}, which has used S3 or GCS; its child can't: "
            "start it anew (multiprocessing's method 'spawn'), or fork before the store is opened"
        )


def client(address: Address, credentials: Any, retry_seconds: float) -> tuple[S3Store | GCSStore, Keys | None]:
    """And, for S3, what requests of our own to it are signed with, if they may be. Raises ConfigError: obstore is missing, or an
    option is none that it knows.
    """
    try:
        from obstore import store
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise ConfigError(
            f"store {address.url!r} needs the package obstore, which this Python does not have; "
            f"pip install 'obstore>={OLDEST_OBSTORE}' ({error})"
        ) from error
    global _process_of_obstore
    check_process()
    _process_of_obstore = os.getpid()
    common = {
        "client_options": {
            "allow_http": True,  # an endpoint's scheme is the user's to choose; without one it is https
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        },
        "retry_config": {
            "max_retries": 1000,  # time is the limit
            "retry_timeout": timedelta(seconds=retry_seconds),
            "backoff": {
                "init_backoff": timedelta(milliseconds=200),
                "max_backoff": timedelta(seconds=8),
                "base": 2,
            },
        },
    }
    try:
        if address.scheme == "s3":
            provide = _provider(address, credentials, os.environ)
            options = _s3_options(address, provide, os.environ)
            return store.S3Store(address.bucket, **options, **common), signing_keys(address, provide, os.environ)
        return store.GCSStore(address.bucket, **_gcs_options(address, credentials), **common), None
    except (BaseError, ValueError) as error:
        said = str(error).partition("\n\nDebug source")[0]
        raise ConfigError(f"store {address.url!r} can't be opened: {said}") from error


def _s3_options(address: Address, provide: Provider | None, environment: Mapping[str, str]) -> dict[str, Any]:
    # What is said here, obstore does not look up in the environment.
    options: dict[str, Any] = {
        "region": address.options.get("region", "us-east-1"),
        "conditional_put": "etag",
        "virtual_hosted_style_request": False,
        # One DELETE for one object: not every server that speaks S3 has DeleteObjects.
        "disable_bulk_delete": True,
    }
    if endpoint := address.options.get("endpoint"):
        options["endpoint"] = options["aws_endpoint_url_s3"] = endpoint
    if (checksum := address.options.get("checksum", "crc64nvme")) != "none":
        options["checksum_algorithm"] = checksum
    if checksum != "sha256":
        # Hashing the body for the signature as well would take twice the processor time of everything else in an upload.
        # TLS keeps it from being changed on its way, and S3 verifies the checksum.
        options["unsigned_payload"] = True
    # botocore reads another variable than object_store does. Whoever redirects one means both.
    metadata = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if metadata and not environment.get("AWS_METADATA_ENDPOINT"):
        options["metadata_endpoint"] = metadata.rstrip("/")
    if provide:
        options["credential_provider"] = provide
    return options


def signing_keys(address: Address, provide: Provider | None, environment: Mapping[str, str]) -> Keys | None:
    """What requests to S3 that are not obstore's are signed with. None where it alone does what is wished: by an option of the
    URL or of the environment, by credentials that it alone finds (a container's, a cluster's), or through a proxy.
    """
    if "checksum" in address.options or is_behind_proxy(address):
        return None
    if any(name.upper().startswith(OBSTORE_ONLY) for name, value in environment.items() if value):
        return None
    if provide := provide or _from_machine(environment):
        return _Kept(provide)
    key, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        return None
    found = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": environment.get("AWS_SESSION_TOKEN", "")}
    return lambda: found


class _Kept:
    """Keys, until shortly before they end; where no new ones can be had then, until their end."""

    def __init__(self, provide: Provider) -> None:
        self._provide, self._lock = provide, threading.Lock()
        self._found: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._ask_at = 0.0
        """time.monotonic(): a service that fails is not asked by every thread in turn."""

    def __call__(self) -> dict[str, str]:
        with self._lock:
            now = datetime.now(UTC)
            if not self._found or now > self._found["expires_at"] - timedelta(seconds=CREDENTIALS_SECONDS):
                self._renew()
            if not self._found or (self._failure and now > self._found["expires_at"]):
                raise CredentialsError(f"no credentials for S3: {self._failure}") from self._failure
            found = self._found
        return {
            "AccessKeyId": found["access_key_id"],
            "SecretAccessKey": found["secret_access_key"],
            "Token": found["token"] or "",
        }

    def _renew(self) -> None:
        if time.monotonic() < self._ask_at:
            return
        try:
            self._found, self._failure = self._provide(), None
        except Exception as error:
            self._failure, self._ask_at = error, time.monotonic() + ASK_AGAIN_SECONDS


def _provider(address: Address, credentials: Any, environment: Mapping[str, str]) -> Provider | None:
    """Of credentials for S3 that obstore does not find by itself."""
    role = address.options.get("role", "")
    if role and not credentials and environment.get("HOLDFAST_CLOUD") == "gcp":
        return _from_web_identity(role)
    session = credentials or _profile_session(environment)
    return _from_session(session) if session else None


def _from_machine(environment: Mapping[str, str]) -> Provider | None:
    """By the role of a machine of AWS's."""
    if environment.get("HOLDFAST_CLOUD") != "aws" or any(environment.get(name) for name in NATIVE):
        return None
    from holdfast.runtime.fetch import aws_identity

    return lambda: _given(aws_identity()[1])


def _given(keys: Mapping[str, str]) -> dict[str, Any]:
    """AWS's words in obstore's."""
    return {
        "access_key_id": keys["AccessKeyId"],
        "secret_access_key": keys["SecretAccessKey"],
        "token": keys["Token"],
        "expires_at": datetime.fromisoformat(keys["Expiration"]),
    }


def _from_session(session: Any) -> Provider:
    """A boto3 or botocore session as obstore's credential provider. Raises ConfigError when it has no credentials."""
    found = session.get_credentials()
    if found is None:
        raise ConfigError("the AWS session has no credentials; log in, or name a profile that has some")

    def provide() -> dict[str, Any]:
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_SECONDS),
        }

    return provide


def _from_web_identity(role: str) -> Provider:
    """On a machine of Google's: its service account's identity for a role of AWS's, and again before that ends."""
    from holdfast.runtime.fetch import web_identity

    return lambda: _given(web_identity(role))


def _profile_session(environment: Mapping[str, str]) -> Any:
    """botocore's session where credentials are a profile's, which obstore can't read: a person's computer, mostly."""
    if any(environment.get(name) for name in NATIVE):
        return None
    files = (
        environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        environment.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    named = environment.get("AWS_PROFILE")
    if not named and not any(Path(file).expanduser().is_file() for file in files):
        return None
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        if named:
            raise ConfigError(f"AWS_PROFILE is {named!r}, and to read it boto3 is needed; pip install boto3") from error
        return None
    session = botocore.session.Session()
    try:
        return session if session.get_credentials() else None
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(f"AWS profile {named or 'default'!r} gives no credentials: {error}") from error


def _gcs_options(address: Address, credentials: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if endpoint := address.options.get("endpoint"):
        options["base_url"] = endpoint
    if credentials is not None:
        from google.auth.credentials import with_scopes_if_required
        from obstore.auth.google import GoogleCredentialProvider

        options["credential_provider"] = GoogleCredentialProvider(with_scopes_if_required(credentials, [SCOPE]))
    return options
