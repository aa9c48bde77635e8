"""Credentials that outlive a run: they are read again before they end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.session
from botocore.credentials import RefreshableCredentials
from prefect_aws import AwsCredentials

log = logging.getLogger(__name__)

READ_AGAIN_AFTER = timedelta(minutes=16)
"""botocore reads credentials again when they have less than 15 minutes left: about once a minute, while they are used."""


def aws_session(credentials: AwsCredentials, reload: Callable[[], AwsCredentials] | None = None) -> boto3.Session:
    """A session whose credentials are renewed where the block's own session would let them end.

    An assumed role's end after an hour, and keys that were typed into a block end when their owner says so: `reload`
    reads the block again, so that a run goes on once somebody has saved new ones. Profiles, single sign-on and roles of
    the computer are renewed by botocore itself.
    """
    if not credentials.assume_role_arn and (reload is None or not credentials.aws_secret_access_key):
        return credentials.get_boto3_session()
    newest = credentials

    def read() -> dict[str, Any]:
        nonlocal newest
        if reload is not None:
            try:
                newest = reload()
            except Exception as error:  # the server may be away; the keys at hand may be good all the same
                log.warning("credentials block not read again error=%s", type(error).__name__)
        keys = newest.get_boto3_session().get_credentials().get_frozen_credentials()
        return {
            "access_key": keys.access_key,
            "secret_key": keys.secret_key,
            "token": keys.token,
            "expiry_time": (datetime.now(UTC) + READ_AGAIN_AFTER).isoformat(),
        }

    session = botocore.session.get_session()
    session._credentials = RefreshableCredentials.create_from_metadata(read(), read, "holdfast-block")
    if credentials.region_name:
        session.set_config_variable("region", credentials.region_name)
    return boto3.Session(botocore_session=session)
