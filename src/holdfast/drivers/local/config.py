"""What can be said about a local cloud: where it lives, how fast its clock runs, what its market does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fate(Strict):
    """What the market does to one machine. Without a trigger the machine lives until it ends itself."""

    refuse: bool = Field(False, title="Refuse", description="No capacity: the launch is refused.")
    after_seconds: Seconds | None = Field(None, title="After (seconds)", description="Taken so long after its launch.")
    at_step: int | None = Field(
        None, ge=1, title="At step", description="Taken when its program has trained this step."
    )
    in_phase: Literal["resume", "snapshot", "commit"] | None = Field(
        None, title="In phase", description="Taken when its program begins this phase of checkpointing."
    )
    after_step: int = Field(
        0, ge=0, title="After step", description="Earlier phases than after this step do not count."
    )
    delay_seconds: Seconds = Field(0.0, title="Delay (wall seconds)", description="Between the trigger and the taking.")
    notice: bool = Field(True, title="Notice", description="Announced 120 s (AWS) or 30 s (GCP) before, or not at all.")
    notice_seconds: Seconds | None = Field(
        None, title="Notice (seconds)", description="So long before instead: a cloud's notice is best effort."
    )
    rebalance_seconds_before: Seconds | None = Field(
        None, title="Rebalance (seconds)", description="A rebalance recommendation comes so long before the notice."
    )

    @model_validator(mode="after")
    def _one_trigger(self) -> Fate:
        triggers = [name for name in ("after_seconds", "at_step", "in_phase") if getattr(self, name) is not None]
        if len(triggers) + self.refuse > 1:
            named = ["refuse"] * self.refuse + triggers
            raise ValueError(f"a fate has one trigger; this one has {' and '.join(named)}")
        return self

    @property
    def takes(self) -> bool:
        return self.after_seconds is not None or self.at_step is not None or self.in_phase is not None


class SeededMarket(Strict):
    """Prices, refusals and lifetimes drawn from a seed: the same seed and launches give the same market."""

    kind: Literal["seeded"] = "seeded"
    seed: int = Field(0, title="Seed")
    mean_life_seconds: PositiveSeconds = Field(
        7200.0, title="Mean life (seconds)", description="Of a spot machine; lives are exponentially distributed."
    )
    refusal_probability: float = Field(0.1, ge=0, le=1, title="Refusals", description="Share of spot launches refused.")
    notice_probability: float = Field(0.9, ge=0, le=1, title="Notices", description="Share of preemptions announced.")


class ScriptedMarket(Strict):
    """An exact sequence: spot launch n meets fate n; after the list, spot machines live on. Prices stand still."""

    kind: Literal["scripted"] = "scripted"
    spot: list[Fate] = Field([], title="Fates of spot machines", description="In the order of their launches.")
    on_demand: list[Fate] = Field(
        [], title="Fates of on-demand machines", description="In the order of their launches."
    )


class Outage(Strict):
    """No spot capacity from `start_seconds` until `end_seconds`, counted from the beginning of the cloud's clock."""

    start_seconds: Seconds = Field(title="Start (seconds)", description="After the cloud was first opened.")
    end_seconds: PositiveSeconds = Field(title="End (seconds)", description="From then on there is capacity again.")
    zones: list[str] = Field([], title="Zones", description="Only these; empty: every zone.")

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Outage:
        if self.end_seconds <= self.start_seconds:
            raise ValueError(
                f"an outage ends at {self.end_seconds:g} s, not after its start at {self.start_seconds:g} s; swap them"
            )
        return self


class TimedMarket(Strict):
    """Spot capacity by the clock, as a trace tells it: refused during an outage, taken when one begins. Prices stand still."""

    kind: Literal["timed"] = "timed"
    outages: list[Outage] = Field([], title="Outages", description="Of spot capacity, in any order.")
    notice: bool = Field(True, title="Notice", description="Are preemptions announced?")
    notice_seconds: Seconds | None = Field(
        None, title="Notice (seconds)", description="So long before instead of the cloud's 120 or 30 s."
    )


Market = Annotated[SeededMarket | ScriptedMarket | TimedMarket, Field(discriminator="kind")]


class LocalCloudConfig(Strict):
    root: Path = Field(title="Folder", description="Where the cloud keeps its machines and its clock.")
    clock_speed: PositiveSeconds = Field(1.0, title="Clock speed", description="Cloud seconds per second of the wall.")
    market: Market = Field(SeededMarket(), title="Market")
    shutdown_grace_seconds: PositiveSeconds = Field(
        5.0, title="Shutdown grace (wall seconds)", description="What an orderly shutdown may take before power off."
    )
