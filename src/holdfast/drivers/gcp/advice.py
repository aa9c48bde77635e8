"""What Compute Engine itself says of Spot capacity: how likely a machine is to be had, and how long most of them last.

https://cloud.google.com/compute/docs/instances/view-vm-availability
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.drivers.gcp.api import ComputeApi
from holdfast.drivers.gcp.config import region_of
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from google.cloud import compute_v1

log = logging.getLogger(__name__)

PERMISSION = "compute.advice.capacity"
ASKED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Advice:
    obtainability: float
    """From 0, can't be had, to 1."""
    uptime_hours: float
    """So long most of such Spot VMs run before they are preempted; 0: not told."""

    @property
    def words(self) -> str:
        lasts = f", most last {self.uptime_hours:.3g} h" if self.uptime_hours else ""
        return f"capacity advice {self.obtainability:.2f} of 1{lasts}"

    def interruptions_per_hour(self, prior: float) -> float:
        """Two guesses in one: the prior's rate, and that of machines half of which are gone after the time told."""
        return math.sqrt(prior * math.log(2) / self.uptime_hours) if self.uptime_hours else prior


@dataclass(frozen=True, slots=True)
class Wanted:
    """One machine type in one zone, with its attached GPUs."""

    machine_type: str
    zone: str
    accelerator: str = ""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class AllAdvice:
    of: Mapping[tuple[str, str], Advice] = field(default_factory=dict)
    """By (machine type, zone)."""
    refusal: str = ""


def read_advice(api: ComputeApi, wanted: Sequence[Wanted]) -> AllAdvice:
    """What is refused is left out: nothing is launched by it."""
    refusal = ""

    def ask(one: Wanted) -> Advice | None:
        nonlocal refusal
        if refusal:  # not for this project: not asked again for every other
            return None
        try:
            return _ask(api, one)
        except HoldfastError as error:
            refusal = str(error)
            log.info("no capacity advice on %s in %s: %s", one.machine_type, one.zone, error)
            return None

    first = [ask(one) for one in wanted[:1]]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        answers = [*first, *pool.map(ask, wanted[1:])]
    found = {(one.machine_type, one.zone): advice for one, advice in zip(wanted, answers, strict=True) if advice}
    return AllAdvice(found, refusal)


def _ask(api: ComputeApi, one: Wanted) -> Advice | None:
    from google.cloud import compute_v1

    selection = compute_v1.CapacityAdviceRequestInstanceFlexibilityPolicyInstanceSelection(
        machine_types=[one.machine_type]
    )
    if one.accelerator:
        selection.guest_accelerators = [
            compute_v1.AcceleratorConfig(accelerator_type=one.accelerator, accelerator_count=one.gpus)
        ]
    body = compute_v1.CapacityAdviceRequest(
        size=1,
        distribution_policy=compute_v1.CapacityAdviceRequestDistributionPolicy(
            target_shape="ANY_SINGLE_ZONE",
            zones=[compute_v1.CapacityAdviceRequestDistributionPolicyZoneConfiguration(zone=f"zones/{one.zone}")],
        ),
        instance_flexibility_policy=compute_v1.CapacityAdviceRequestInstanceFlexibilityPolicy(
            instance_selections={"holdfast": selection}
        ),
        instance_properties=compute_v1.CapacityAdviceRequestInstanceProperties(
            scheduling=compute_v1.CapacityAdviceRequestInstancePropertiesScheduling(provisioning_model="SPOT")
        ),
    )
    answer: compute_v1.CapacityAdviceResponse = api.call(
        api.advice.capacity,
        f"asking for capacity advice on {one.machine_type} in {one.zone}",
        PERMISSION,
        project=api.project,
        region=region_of(one.zone),
        capacity_advice_request_resource=body,
    )
    if not answer.recommendations:
        return None
    scores = answer.recommendations[0].scores
    return Advice(scores.obtainability, _hours(scores.estimated_uptime))


def _hours(duration: str) -> float:
    """Of `36000s`; 0 where nothing is told."""
    try:
        return float(duration.removesuffix("s")) / 3600
    except ValueError:
        return 0.0
