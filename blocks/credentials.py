"""The orchestrator's credentials, from blocks or from this computer: those that would end in a run are read again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.session
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    Credentials,
    DeferredRefreshableCredentials,
)
from botocore.exceptions import BotoCoreError, NoCredentialsError
from google.auth.exceptions import GoogleAuthError
from prefect_aws import AwsCredentials, MinIOCredentials
from prefect_gcp import GcpCredentials

from holdfast.errors import ConfigError

log = logging.getLogger(__name__)

READ_AGAIN_SECONDS = 60.0
BOTOCORE_RENEWS_BEFORE_END = timedelta(minutes=15)
"""https://github.com/boto/botocore/blob/develop/botocore/credentials.py (_DEFAULT_ADVISORY_REFRESH_TIMEOUT)"""

GOOGLE_REMEDY = (
    "run gcloud auth application-default login on the computer that runs the flows, or put a service account's key into "
    "the credentials block"
)

Reload = Callable[[], AwsCredentials]


def aws_session(
    credentials: AwsCredentials | MinIOCredentials,
    reload: Reload | None = None,
    read_again_seconds: float = READ_AGAIN_SECONDS,
) -> boto3.Session:
    """A session whose credentials are renewed where the block's own session would let them end.

    An assumed role's end after an hour, and keys that were typed into a block end when their owner says so: `reload`
    reads the block again, at most so often, so that a run goes on once somebody has saved new ones. Profiles, single
    sign-on and roles of the computer are renewed by botocore itself. Nothing is asked of AWS yet.
    Raises ConfigError for a profile that is not there, and for half a key.
    """
    try:
        if isinstance(credentials, MinIOCredentials):
            return credentials.get_boto3_session()
        session = _without_role(credentials)
        if reload is not None and credentials.aws_secret_access_key:
            session = _session_with(_read_again(credentials, reload, read_again_seconds), credentials)
        if credentials.assume_role_arn:
            session = _session_with(_role(credentials, session), credentials)
        return session
    except BotoCoreError as error:
        raise ConfigError(
            f"credentials: {error}; correct the credentials block, or this computer's profiles"
        ) from error


def google_credentials(credentials: GcpCredentials) -> Any:
    """The block's key, or what Google's libraries find on this computer; both renew themselves. Raises ConfigError."""
    try:
        return credentials.get_credentials_from_service_account()
    except (GoogleAuthError, OSError) as error:
        raise ConfigError(f"credentials: no Google credentials: {error}; {GOOGLE_REMEDY}") from error


def _without_role(credentials: AwsCredentials) -> boto3.Session:
    return credentials.model_copy(update={"assume_role_arn": None}).get_boto3_session()


def _read_again(credentials: AwsCredentials, reload: Reload, seconds: float) -> Credentials:
    newest = credentials

    def read() -> dict[str, Any]:
        nonlocal newest
        try:
            newest = reload()
        except Exception as error:  # the server may be away; the keys at hand may be good all the same
            log.warning("credentials block not read again error=%s", type(error).__name__)
        found = _without_role(newest).get_credentials()
        if found is None:
            raise NoCredentialsError
        keys = found.get_frozen_credentials()
        return {
            "access_key": keys.access_key,
            "secret_key": keys.secret_key,
            "token": keys.token,
            "expiry_time": (datetime.now(UTC) + BOTOCORE_RENEWS_BEFORE_END + timedelta(seconds=seconds)).isoformat(),
        }

    return DeferredRefreshableCredentials(read, "holdfast-block")


def _role(credentials: AwsCredentials, source: boto3.Session) -> Credentials:
    """The role's, by their own end: asked for at first use, so that a refusal is told like every other of AWS's."""

    parameters = {"RoleSessionName": "holdfast", **credentials.assume_role_kwargs.get_params_override()}

    def fetch() -> dict[str, Any]:
        found = source.get_credentials()
        if found is None:
            raise NoCredentialsError
        return AssumeRoleCredentialFetcher(
            source.client,
            found,
            credentials.assume_role_arn,
            extra_args=parameters,
            mfa_prompter=lambda _: parameters.get("TokenCode", ""),  # else botocore asks the terminal, and waits
        ).fetch_credentials()

    return DeferredRefreshableCredentials(fetch, "assume-role")


class _Given(CredentialProvider):
    METHOD = "holdfast-block"
    CANONICAL_NAME = "custom-holdfast-block"

    def __init__(self, given: Credentials) -> None:
        super().__init__()
        self._given = given

    def load(self) -> Credentials:
        return self._given


def _session_with(given: Credentials, credentials: AwsCredentials) -> boto3.Session:
    session = botocore.session.Session(profile=credentials.profile_name)
    session.register_component("credential_provider", CredentialResolver([_Given(given)]))
    if credentials.region_name:
        session.set_config_variable("region", credentials.region_name)
    return boto3.Session(botocore_session=session)
