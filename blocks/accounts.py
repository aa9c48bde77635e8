"""Cloud accounts: where machines come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from prefect.blocks.core import Block
from prefect_aws import AwsCredentials
from prefect_gcp import GcpCredentials
from pydantic import Field

from blocks.credentials import READ_AGAIN_SECONDS, Reload, aws_session, google_credentials
from blocks.loading import load_now, load_saved
from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.gcp.config import GcpConfig
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Market, SeededMarket
from holdfast.drivers.protocol import Driver
from holdfast.drivers.several import SeveralDrivers
from holdfast.supervision.doctor import examine_account, to_text

DEFAULT_ROOT = Path(".holdfast/clouds/local")


class LocalAccount(Block):
    """The cloud in a box: machines are real processes here, with a market, notices and preemptions, and no bill."""

    _block_type_name: ClassVar[str] = "Local Account"
    _block_type_slug: ClassVar[str] = "local-account"

    root: Path = Field(DEFAULT_ROOT, title="Folder", description="Where the cloud keeps its machines and its clock.")
    clock_speed: float = Field(
        1.0, gt=0, title="Clock speed", description="Seconds of the cloud per second of the wall; bills follow it."
    )
    market: Market = Field(
        SeededMarket(), title="Market", description="Prices, refusals and lifetimes of spot machines."
    )

    def driver(self) -> Driver:
        return LocalDriver(
            LocalCloudConfig(root=self.root.absolute(), clock_speed=self.clock_speed, market=self.market)
        )

    def check(self) -> str:
        """One screen: what works."""
        return to_text(examine_account(self.driver))


class AwsAccount(Block):
    """EC2 machines, spot and on demand. The credentials are the orchestrator's; machines have a role of their own."""

    _block_type_name: ClassVar[str] = "AWS Account"
    _block_type_slug: ClassVar[str] = "aws-account"

    # Not in the block's repr: a session token is no SecretStr there, and logs print what they are given.
    credentials: AwsCredentials = Field(default_factory=AwsCredentials, title="Credentials", repr=False)
    settings: AwsConfig = Field(title="Settings", description="Regions, types, image, role, volume.")

    def driver(self, read_again_seconds: float = READ_AGAIN_SECONDS) -> Driver:
        """`read_again_seconds`: for which keys that were typed into the block are taken to be the newest.

        Raises ConfigError when the settings contradict each other, or name a profile that is not there.
        """
        from holdfast.drivers.aws.driver import AwsDriver  # late: boto3's clients are for those who use them

        client = self.credentials.aws_client_parameters.get_params_override()
        settings = self.settings.model_copy(update={"client_parameters": {**self.settings.client_parameters, **client}})
        return AwsDriver(settings, aws_session(self.credentials, self._reload(), read_again_seconds))

    def _reload(self) -> Reload | None:
        name = self._block_document_name
        # Not `load`: in a thread with an event loop that would be a coroutine.
        return (lambda: load_now(AwsAccount, name).credentials) if name else None

    def check(self) -> str:
        """One screen: what works, and which permission, quota or image is missing."""
        return to_text(examine_account(self.driver))


class GcpAccount(Block):
    """Compute Engine machines, spot and standard. The credentials are the orchestrator's; machines have a service
    account of their own."""

    _block_type_name: ClassVar[str] = "GCP Account"
    _block_type_slug: ClassVar[str] = "gcp-account"

    credentials: GcpCredentials = Field(title="Credentials", repr=False)
    settings: GcpConfig = Field(title="Settings", description="Project, regions, types, image, service account.")

    def driver(self) -> Driver:
        """Raises ConfigError when this computer has no credentials, and the block none of its own."""
        from holdfast.drivers.gcp.driver import GcpDriver

        return GcpDriver(self.settings, google_credentials(self.credentials))

    def check(self) -> str:
        """One screen: what works, and which permission, quota or image is missing."""
        return to_text(examine_account(self.driver))


Account = LocalAccount | AwsAccount | GcpAccount


def load_account(name: str) -> Account:
    """The saved account block of that name; `local` works unsaved. Raises ConfigError."""
    return load_saved(name, "account", [LocalAccount, AwsAccount, GcpAccount], {"local": LocalAccount})


def load_driver(accounts: str | Sequence[str]) -> Driver:
    """The cloud of one account, or of several as one. Raises ConfigError."""
    names = [accounts] if isinstance(accounts, str) else list(accounts)
    return driver_of([load_account(name) for name in names])


def driver_of(accounts: Sequence[Account]) -> Driver:
    """Raises ConfigError when one of them can't be used, or two are of the same cloud."""
    drivers = [account.driver() for account in accounts]
    return drivers[0] if len(drivers) == 1 else SeveralDrivers(drivers)
