"""From a job, its profile, the market's offers and a trace to a question that can be simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from holdfast.checkpoint.policy import auto_interval_seconds
from holdfast.drivers.protocol import Offer
from holdfast.errors import ConfigError
from holdfast.ledger.profiles import JobProfile, Measurement
from holdfast.market.history import History, Life
from holdfast.market.traces import Trace, read_traces
from holdfast.model import TrainingJob, parse_interval
from holdfast.placement.policies import DEFAULT, POLICIES
from holdfast.placement.situation import reserve_seconds_for, tick_seconds_for
from holdfast.simulation.engine import Workload
from holdfast.simulation.fitted import FittedMarket
from holdfast.simulation.study import Drawn, Markets, Question, Recorded
from holdfast.supervision.plan import policy_of

HISTORY = "history"
"""Instead of a trace's path: the machines that runs on this store have had."""
HISTORY_DAYS = 90
GUESSED_BOOT_SECONDS, GUESSED_SAVE_SECONDS = 120.0, 1.0
PRIOR_OUTAGE_SECONDS = 1800.0
PRIOR_INTERRUPTIONS_PER_HOUR = 0.05
"""Where neither the market nor the history tells: a machine lasts 20 hours, and is missing for half an hour then."""
TICK_OF_DRAWN_SECONDS = 60.0


def work_seconds_of(job: TrainingJob, profile: JobProfile, instance_type: str) -> float | None:
    """Of the whole job on that type; None: nobody has said or measured it."""
    return job.work_hours * 3600 if job.work_hours else profile.work_seconds(instance_type)


def ask(
    job: TrainingJob,
    offers: Sequence[Offer],
    profile: JobProfile,
    markets: Markets,
    now: datetime,
    runs: int = 500,
    seed: int = 0,
) -> Question:
    """`offers`: that fit the job. Raises ConfigError where the job's work is unknown, or its deadline past."""
    kind = min(offers, key=lambda one: one.usd_per_hour).pool.instance_type
    measured = profile.of(kind)
    work = work_seconds_of(job, profile, kind)
    if work is None:
        raise ConfigError(
            f"work_hours: how long job {job.name!r} takes is not known; say it in the job, or measure it: "
            "python -m flows calibrate JOB.yaml"
        )
    notes = [_where_from(job, measured, work)]
    deadline = math.inf
    if deadline_at := job.deadline_at(now):
        deadline = (deadline_at - now).total_seconds()
        if deadline <= 0:
            raise ConfigError(f"deadline: {deadline_at.isoformat()} is past, it is {now.isoformat()}; name a later one")
    workload = Workload(
        work_seconds=work,
        deadline_seconds=deadline,
        boot_seconds=measured.boot_seconds if measured else GUESSED_BOOT_SECONDS,
        stop_seconds=measured.stop_seconds if measured else 0.0,
        checkpoint_seconds=commit_spacing_seconds(job, measured, offers),
        reserve_seconds=reserve_seconds_for(work) if math.isfinite(deadline) else 0.0,
    )
    chosen = policy_of(job)
    return Question(
        job=job.name,
        workload=workload,
        offers=[one for one in offers if one.pool.instance_type == kind],
        markets=markets,
        policies=[name for name in POLICIES if math.isfinite(deadline) or name in ("on-demand", DEFAULT, "greedy")],
        chosen=chosen,
        runs=runs,
        seed=seed,
        tick_seconds=tick_seconds_for(min(deadline, 4 * work)),
        failed_spot_attempts_to_fall_back=job.fallback.after_failed_spot_attempts,
        provisioning="spot" if job.provisioning == "spot" else "spot-then-on-demand",
        notes=notes,
    )


def with_prices(offers: Sequence[Offer], spot_usd: float | None, on_demand_usd: float | None) -> list[Offer]:
    """The same pools at other prices per hour, to ask what would be."""
    changed = []
    for one in offers:
        on_demand = on_demand_usd or one.on_demand_usd_per_hour
        usd = on_demand if one.pool.provisioning_model == "on-demand" else (spot_usd or one.usd_per_hour)
        changed.append(replace(one, usd_per_hour=usd, on_demand_usd_per_hour=on_demand))
    return changed


def commit_spacing_seconds(job: TrainingJob, measured: Measurement | None, offers: Sequence[Offer]) -> float:
    unit, number = parse_interval(job.checkpointing.every)
    if unit == "seconds":
        return number
    if unit == "steps":
        return number * measured.step_seconds if measured else 0.0
    rate = max((one.interruptions_per_hour for one in offers), default=0.0) or PRIOR_INTERRUPTIONS_PER_HOUR
    return auto_interval_seconds(measured.save_seconds if measured else GUESSED_SAVE_SECONDS, 3600 / rate)


def _where_from(job: TrainingJob, measured: Measurement | None, work: float) -> str:
    hours = f"{work / 3600:.2f} h of work: " + ("the job says so" if job.work_hours else "calibrated")
    if measured is None:
        return f"{hours}; boots of {GUESSED_BOOT_SECONDS:.0f} s are a guess, nothing was measured (calibrate)"
    return f"{hours}; step {measured.step_seconds:.4g} s and boot {measured.boot_seconds:.0f} s measured on {measured.instance_type}"


# -- where markets come from ------------------------------------------------------------------------------------------


def markets_of(
    trace: str, offers: Sequence[Offer], history: History, now: datetime, fitted: bool = False, together: bool = False
) -> Markets:
    """`trace`: a file, a folder, `history`, or empty: drawn from the market's rates. Raises ConfigError."""
    if trace == HISTORY:
        return Drawn(of_lives(history.lives(now - timedelta(days=HISTORY_DAYS)), offers))
    if not trace:
        return Drawn(_of_rates(offers))
    traces = read_traces(trace)
    if fitted:
        return Drawn(FittedMarket.of(_on_one_tick(traces)))
    return Recorded(traces, together)


def of_lives(lives: Sequence[Life], offers: Sequence[Offer]) -> FittedMarket:
    """Rates of this store's own spot machines of these pools' types. Raises ConfigError when there were none."""
    pools = {(one.pool.cloud, one.pool.instance_type) for one in offers}
    own = [
        life
        for life in lives
        if (life.pool.cloud, life.pool.instance_type) in pools and life.pool.provisioning_model == "spot"
    ]
    hours = sum(life.hours for life in own)
    if not hours:
        raise ConfigError(
            f"trace: no run on this store has had a spot machine of {' or '.join(sorted(kind for _, kind in pools))} in "
            f"{HISTORY_DAYS} days; name a trace, or none"
        )
    taken, refused = sum(life.preempted for life in own), sum(life.refused for life in own)
    # One interruption more than were seen, in the hours that a prior machine lasts: few hours prove little.
    up_hours = (hours + 1 / PRIOR_INTERRUPTIONS_PER_HOUR) / (taken + 1)
    asked = sum(life.launched_at is not None for life in own) + refused
    share_down = refused / asked
    down = max(PRIOR_OUTAGE_SECONDS, up_hours * 3600 * share_down / (1 - share_down) if share_down < 1 else 0.0)
    name = f"own history: {taken} interruptions in {hours:.1f} h, {refused} of {asked} launches refused"
    return FittedMarket.of_means(TICK_OF_DRAWN_SECONDS, up_hours * 3600, down, name)


def _of_rates(offers: Sequence[Offer]) -> FittedMarket:
    rates = [one.interruptions_per_hour for one in offers if one.pool.provisioning_model == "spot"]
    rate = max(rates, default=0.0) or PRIOR_INTERRUPTIONS_PER_HOUR
    name = (
        f"drawn from the market's rate: {24 * rate:.2g} interruptions a day, half an hour without capacity after each"
    )
    return FittedMarket.of_means(TICK_OF_DRAWN_SECONDS, 3600 / rate, PRIOR_OUTAGE_SECONDS, name)


def _on_one_tick(traces: Sequence[Trace]) -> list[Trace]:
    """The coarsest there is."""
    gap = max(trace.gap_seconds for trace in traces)
    return [trace if trace.gap_seconds == gap else trace.on_ticks_of(gap) for trace in traces]
