"""Leases on batches of work over a broker that is there already."""

from holdfast.queues.opening import open_queue
from holdfast.queues.protocol import Depth, Lease, Queue

__all__ = ["Depth", "Lease", "Queue", "open_queue"]
