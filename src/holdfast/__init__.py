"""Run training on interruptible cloud machines and lose nothing when they are taken away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.checkpoint.attach import Attached, attach
    from holdfast.checkpoint.resumable_loader import ResumableLoader
    from holdfast.checkpoint.sampling import ShuffledBatches

__version__ = "0.1.0"
__all__ = ["Attached", "ResumableLoader", "ShuffledBatches", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    # Late: the agent, the orchestrator and the local cloud import this package too, and need none of it.
    if name in ("Attached", "attach"):
        from holdfast.checkpoint import attach

        return getattr(attach, name)
    if name == "ResumableLoader":
        from holdfast.checkpoint.resumable_loader import ResumableLoader

        return ResumableLoader
    if name == "ShuffledBatches":
        from holdfast.checkpoint.sampling import ShuffledBatches

        return ShuffledBatches
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
