"""Cloud accounts: where machines come from."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field

from blocks.loading import load_saved
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Market, SeededMarket
from holdfast.drivers.protocol import Driver

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


def load_account(name: str) -> LocalAccount:
    """The saved account block of that name; `local` works unsaved. Raises ConfigError."""
    return load_saved(name, "account", [LocalAccount], {"local": LocalAccount})
