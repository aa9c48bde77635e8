"""The local cloud: machines are real process groups on this computer, with a market, notices and preemptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.drivers.local.config import LocalCloudConfig
    from holdfast.drivers.local.driver import LocalDriver

__all__ = ["LocalCloudConfig", "LocalDriver"]


def __getattr__(name: str) -> Any:
    # Late: the machine's host lives in this package too, and must not wait for what only the driver needs.
    if name == "LocalCloudConfig":
        from holdfast.drivers.local.config import LocalCloudConfig

        return LocalCloudConfig
    if name == "LocalDriver":
        from holdfast.drivers.local.driver import LocalDriver

        return LocalDriver
    raise AttributeError(name)
