"""Google Cloud: Spot and on-demand VMs of Compute Engine. Needs the extra `holdfast[gcp]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.drivers.gcp.config import AttachedGpus, GcpConfig, UsdPerHour
    from holdfast.drivers.gcp.driver import GcpDriver

__all__ = ["AttachedGpus", "GcpConfig", "GcpDriver", "UsdPerHour"]


def __getattr__(name: str) -> Any:
    # Late: whoever needs the configuration's form does not wait for the driver.
    if name == "GcpDriver":
        from holdfast.drivers.gcp.driver import GcpDriver

        return GcpDriver
    if name in __all__:
        from holdfast.drivers.gcp import config

        return getattr(config, name)
    raise AttributeError(name)
