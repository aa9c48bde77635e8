"""What a provider's own bill is read with: the credentials of an account block."""

from __future__ import annotations

from typing import Any

from blocks.accounts import AwsAccount, GcpAccount, load_account
from blocks.credentials import aws_session, google_credentials
from holdfast.errors import ConfigError


class BillAccess:
    """Clients of one account, made when they are asked for."""

    def __init__(self, account: AwsAccount | GcpAccount) -> None:
        self._account = account
        self.cloud = "aws" if isinstance(account, AwsAccount) else "gcp"

    def session(self) -> Any:
        """boto3's. Raises ConfigError of an account that is not AWS's."""
        if not isinstance(self._account, AwsAccount):
            raise ConfigError("bill: it is AWS's, and the account is GCP's; name the account whose bill it is")
        return aws_session(self._account.credentials)

    def bigquery(self, project: str) -> Any:
        """A client whose queries `project` pays for. Raises ConfigError of an account that is not GCP's."""
        if not isinstance(self._account, GcpAccount):
            raise ConfigError("bill: it is GCP's, and the account is AWS's; name the account whose bill it is")
        from google.cloud import bigquery

        endpoint = self._account.settings.api_endpoint
        options = {"api_endpoint": endpoint} if endpoint else None
        return bigquery.Client(project, google_credentials(self._account.credentials), client_options=options)


def load_bill_access(name: str) -> BillAccess:
    """Of the saved account block of that name. Raises ConfigError."""
    account = load_account(name)
    if not isinstance(account, AwsAccount | GcpAccount):
        raise ConfigError(f"account: {name!r} is the local cloud, which sends no bill; name an account of AWS or GCP")
    return BillAccess(account)
