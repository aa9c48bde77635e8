"""One run of a training job, from its first reservation to the proof that no machine is left.

Everything it knows is in the journal; whoever opens the run again goes on from there.
"""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from holdfast.checkpoint.planner import WINDOWS_SECONDS
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.drivers.protocol import Driver, LaunchRequest, Machine, Offer, PricePoint
from holdfast.drivers.several import SomeOffers
from holdfast.errors import (
    CapacityError,
    ConfigError,
    HoldfastError,
    QuotaError,
    TransientError,
)
from holdfast.ledger.billing import TERMS, bill
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.journal import Entry
from holdfast.ledger.profiles import measured, read_profile, write_profile
from holdfast.ledger.run_state import Attempt, RunState, read_run_state
from holdfast.model import TrainingJob, parse_interval
from holdfast.placement.policy import GiveUp, Launch, PastAttempt, Situation, Wait, decide
from holdfast.runtime import contract
from holdfast.runtime.startup import SHUTDOWN_SCRIPT, machine_environment, startup_script
from holdfast.storage import ObjectStore
from holdfast.supervision.bundle import Bundle, upload_bundle
from holdfast.supervision.plan import Plan, Planner, is_planned
from holdfast.supervision.preflight import fitting_offers
from holdfast.supervision.run import RUN_TAG, Run
from holdfast.supervision.spending import Spending, worst_case_usd
from holdfast.supervision.updates import Update
from holdfast.supervision.watch import Ending, watch_attempt

log = logging.getLogger(__name__)

UNSEEN_WALL_SECONDS = 20.0
"""How long a machine may take to be shown after a launch that was interrupted before it was answered."""
DETECT_POLLS = 5.0
"""So many looks may lie between a machine's end and the next one's launch."""
FIRST_GUESS_RESTART_SECONDS = 120.0
FIRST_GUESS_SAVE_SECONDS = 1.0
IDENTITY = ("name", "script", "module", "command", "args", "env")
"""What makes two jobs the same: the rest (resources, caps, intervals) may change between an end and a resume."""


class TrainingRun(Run[RunState]):
    """Made by `open_run` (opening.py); a context manager that gives the run back, whatever happens."""

    def __init__(
        self,
        job: TrainingJob,
        driver: Driver,
        store: ObjectStore,
        budget: Budget | None,
        run_id: str,
        fits: list[Offer],
    ) -> None:
        self.job, self._fits = job, fits
        super().__init__(job, driver, store, budget, run_id, job.lease_seconds)
        self._ledgers = {self._budget.name: self._budget} if self._budget else {}
        """By name of the budget."""
        self._bundle: Bundle | None = None
        self._spending = Spending(job.max_usd, self._prices)
        self.planner: Planner | None = None
        """Who decides where a policy of `placement.policies` does; None: `placement.policy` alone."""
        if is_planned(job):
            detect_seconds = DETECT_POLLS * driver.poll_seconds * driver.clock.speed
            self.planner = Planner(job, fits, read_profile(store, job.name), detect_seconds, self._market.seen)
        self._untold_plans: list[Plan] = []
        self._asked_for = 0
        """The attempt that this process asked the cloud for a machine for."""

    def _fold(self, entries: Sequence[Entry]) -> RunState:
        return read_run_state(self.run_id, entries)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.job)

    def _clouds(self) -> list[str]:
        return sorted({attempt.pool.cloud for attempt in self.state.attempts})

    # -- closing ------------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Has the last attempt finished? Then no machine is needed any more."""
        attempts = self.state.attempts
        return bool(attempts) and attempts[-1].outcome == "finished"

    def close(self, state: str, detail: str = "") -> None:
        """Settle every machine of the run and write its last word. Doing it again changes nothing.

        Raises HoldfastError when a run is to be finished whose last attempt has not finished.
        """
        if state == "finished" and not self.complete:
            last = self.state.attempts[-1] if self.state.attempts else None
            raise HoldfastError(f"run {self.run_id!r} is not finished: its last attempt is {last and last.outcome!r}")
        self.settle()
        self._settle_budget(closing=True)
        self._write_warnings()
        if self.state.state == "running":
            self._append("closed", state=state, detail=detail)
        if state == "finished":
            self._extend_profile()

    def _extend_profile(self) -> None:
        """What this run has seen, for the plans of the next; a store that does not take it now misses nothing else."""
        attempts = self.state.attempts
        totals = [one.report["total_steps"] for one in attempts if one.report.get("total_steps")]
        if not (found := measured(attempts)):
            return
        try:
            profile = read_profile(self.store, self.job.name)
            write_profile(self.store, profile.with_measurements(found, totals[-1] if totals else None))
        except (HoldfastError, OSError) as error:
            log.warning("profile not extended run=%s error=%s", self.run_id, error)

    def end(self, state: str, why: str) -> None:
        """End the open attempt's machine now and close the run as `state`: cancelled, failed or over-budget."""
        if self.state.state == "running":
            self._finish_open_attempt("cancelled", why)
            self.close(state, why)

    # -- one attempt --------------------------------------------------------------------------------------------------

    def decide(self) -> Launch | Wait | GiveUp:
        """Where to go next; giving up is a decision too. Raises TransientError when the cloud does not tell its offers."""
        return self._with_credentials(self._decide)

    def _decide(self) -> Launch | Wait | GiveUp:
        offers = self._offers()
        missing = offers.missing if isinstance(offers, SomeOffers) else None
        try:
            decision = self._decide_on(offers)
        except ConfigError:
            if missing:
                raise missing from None
            raise
        if isinstance(decision, GiveUp) and missing and len(self.state.attempts) < self.job.max_attempts:
            raise missing
        return decision

    def _decide_on(self, offers: Sequence[Offer]) -> Launch | Wait | GiveUp:
        fits, past, now = fitting_offers(self.job.resources, offers), self._past_attempts(), self.driver.clock.now()
        if self.planner:
            decision = self.planner.next_machine(self.state, past, fits, now)
            self._note_plan()
            return decision
        return decide(
            Situation(
                now=now,
                offers=fits,
                attempts=past,
                provisioning=self.job.provisioning,
                failed_spot_attempts_to_fall_back=self.job.fallback.after_failed_spot_attempts,
                max_attempts=self.job.max_attempts,
                restart_seconds=FIRST_GUESS_RESTART_SECONDS,
                save_seconds=FIRST_GUESS_SAVE_SECONDS,
            )
        )

    def _past_attempts(self) -> list[PastAttempt]:
        state = self.state
        return [past_attempt(one, self.job) for one in state.attempts if one.outcome and not _is_forgiven(one, state)]

    def check_plan(self) -> None:
        """Raises ConfigError when the deadline can't be kept, with the figures."""
        if self.planner:
            self.planner.check(self.state, self.driver.clock.now())

    def _note_plan(self) -> None:
        """In the journal when it has changed: once the run has begun, and another decision or reason was come to."""
        assert self.planner
        plan, state = self.planner.last, self.state
        if plan is None or state.state != "running":
            return
        if not state.plan or (plan.pool, plan.reason) != (state.plan["pool"], state.plan["reason"]):
            self._append("planned", **plan.to_json())
            self._untold_plans.append(plan)

    def reserve(self, launch: Launch) -> Attempt:
        """Set the worst case aside and give the attempt its number, before any machine is asked for.

        Raises OverBudgetError when the caps leave no room.
        """
        state = self.state
        if state.open_attempt:
            return state.open_attempt
        usd = worst_case_usd(self.job, state, launch.offer)
        number = len(state.attempts) + 1
        if self._budget:
            hours = self.job.max_run_hours - state.billed_seconds / 3600
            self._budget.reserve(self._token(number), usd, self.driver.clock.now(), hours=hours)
        if launch.fell_back:
            self._append("fallback", reason=launch.reason)
        self._append(
            "reserved",
            attempt=number,
            pool=dataclasses.asdict(launch.offer.pool),
            usd_per_hour=launch.offer.usd_per_hour,
            on_demand_usd_per_hour=launch.offer.on_demand_usd_per_hour,
            interruptions_per_hour=launch.offer.interruptions_per_hour,
            hazards=self._market.hazards(launch.offer),
            usd_reserved=usd,
            budget=self._budget.name if self._budget else "",
            reason=launch.reason,
        )
        return self.state.attempts[-1]

    def launch(self) -> Machine:
        """Ask for the reserved attempt's machine, or adopt it if it was launched before a crash.

        One that is in the journal is never asked for again: a cloud forgets a machine an hour after its end, and its
        token a day later. Raises CapacityError, QuotaError (the attempt has ended then), ConfigError, TransientError.
        """
        attempt = self.state.open_attempt
        assert attempt, "reserve() comes first"
        self.keepalive.attempt = attempt.number
        self.keepalive.renew()
        if attempt.machine:
            return self._with_credentials(lambda: self._recorded(attempt))
        try:
            machine = self._with_credentials(lambda: self._adopt_or_launch(attempt))
        except CapacityError as error:
            self._record_end(attempt, Ending(outcome="no-capacity", detail=str(error)))
            raise
        except QuotaError as error:
            self._record_end(attempt, Ending(outcome="quota", detail=str(error)))
            raise
        except ConfigError as error:
            self._record_end(attempt, Ending(outcome="program-failed", detail=f"the launch was refused: {error}"))
            raise
        self._append("launched", attempt=attempt.number, machine=machine.id, launched_at=_iso(machine.launched_at))
        return machine

    def _recorded(self, attempt: Attempt) -> Machine:
        """The attempt's machine. One that the cloud does not show is for the watch to wait for, or to declare gone."""
        assert attempt.launched_at
        unseen = Machine(id=attempt.machine, pool=attempt.pool, state="pending", launched_at=attempt.launched_at)
        return next((machine for machine in self._machines(attempt) if machine.id == attempt.machine), unseen)

    def _adopt_or_launch(self, attempt: Attempt) -> Machine:
        living = self._machines(attempt)
        if living:
            return living[0]
        request = self._launch_request(attempt)
        self._asked_for = attempt.number
        return self.driver.launch(request)

    def supervise(self) -> Iterator[Update]:
        """Watch the open attempt to its end, which is in the journal when the iterator is exhausted."""
        attempt = self.state.open_attempt
        assert attempt and attempt.machine, "launch() comes first"
        ending: Ending | None = None
        for told in watch_attempt(self, attempt):
            if isinstance(told, Ending):
                ending = told
            else:
                yield told
        assert ending, "a watch ends with an ending"
        self._record_end(attempt, ending)
        yield self._told_end(self.state.attempts[-1])

    def ended_update(self) -> Update:
        """The last attempt's end, for whoever was not watching."""
        return self._told_end(self.state.attempts[-1])

    def ask_to_stop(self, attempt: Attempt, outcome: contract.Outcome, why: str, grace_seconds: float) -> None:
        """Let the attempt's machine commit and end itself; the journal remembers why, whoever sees its end."""
        if not attempt.asked_to_end:
            self._append("asked-to-end", attempt=attempt.number, outcome=outcome, why=why)
        self.keepalive.ask_to_stop(outcome, grace_seconds)

    def why_too_dear(self, attempt: Attempt, now: datetime) -> str | None:
        return self._spending.why_too_dear(attempt, self.state.usd_total, now)

    def why_stop(
        self, attempt: Attempt, report: Mapping[str, Any], now: datetime
    ) -> tuple[contract.Outcome, str] | None:
        """Asked at every look at a living machine: the outcome and the words with which it is to end now, or None."""
        planner = self.planner
        if planner is None or not planner.is_due(now) or (report.get("notice") or {}).get("kind") == "preemption":
            return None
        offers = fitting_offers(self.job.resources, self.driver.offers())
        why = planner.why_move(self.state, self._past_attempts(), offers, attempt, report, now)
        self._note_plan()
        return ("moved", why) if why else None

    def told_plans(self) -> Iterator[Update]:
        """Every plan that has changed since it was last asked."""
        while self._untold_plans:
            plan = self._untold_plans.pop(0)
            fields = {"usd": self.state.usd_total, **self.plan_fields()}
            yield Update(kind="planned", at=plan.at, attempt=len(self.state.attempts), text=plan.words, fields=fields)

    def plan_fields(self) -> dict[str, Any]:
        """Of the last plan, for whoever watches; empty without one."""
        return {"plan": self.planner.last.to_json()} if self.planner and self.planner.last else {}

    def usd_so_far(self, attempt: Attempt) -> float:
        """What the run has cost by now, the living machine included."""
        if attempt.launched_at is None:
            return self.state.usd_total
        now = self.driver.clock.now()
        prices = [
            PricePoint(at=attempt.launched_at, usd_per_hour=attempt.usd_per_hour)
        ]  # asks no cloud: it is shown often
        running = bill(attempt.launched_at, now, prices, TERMS[attempt.pool.cloud], preempted=False)
        return self.state.usd_total + running.usd

    # -- the journal --------------------------------------------------------------------------------------------------

    def _settle_budget(self, closing: bool) -> None:
        """Whatever a crash left between an entry of ours and the budget's own. Doing it again changes nothing."""
        now = self.driver.clock.now()
        for attempt in self.state.attempts:
            if attempt.budget and attempt.outcome:  # it may have been reserved from another budget than today's
                hours = attempt.billed_seconds / 3600
                self._ledger(attempt.budget).settle(self._token(attempt.number), attempt.usd, now, hours)
        if closing and self._budget and not self.state.open_attempt:
            # Reserved, but the attempt never came into the journal: no machine was asked for.
            self._budget.settle(self._token(len(self.state.attempts) + 1), 0.0, now)

    def _ledger(self, budget: str) -> BudgetLedger:
        """One for each budget: of a journal that all runs share, and that only grows, it reads each entry once."""
        if budget not in self._ledgers:
            self._ledgers[budget] = BudgetLedger(self.store, Budget(name=budget, max_usd=0, max_machines=0))
        return self._ledgers[budget]

    def _record_end(self, attempt: Attempt, ending: Ending) -> None:
        """Bill the machine and write the attempt's end. Every second is charged here and nowhere else."""
        machine = ending.machine
        seconds = usd = 0.0
        if machine and machine.terminated_at:
            prices = self._prices(attempt, machine.launched_at, machine.terminated_at)
            preempted = machine.reason == "preempted" and attempt.pool.provisioning_model == "spot"
            terms = TERMS[attempt.pool.cloud]
            charged = bill(machine.launched_at, machine.terminated_at, prices, terms, preempted)
            seconds, usd = charged.seconds, charged.usd
        self._append(
            "ended",
            attempt=attempt.number,
            outcome=ending.outcome,
            detail=ending.detail,
            terminated_at=_iso(machine.terminated_at) if machine and machine.terminated_at else None,
            billed_seconds=seconds,
            usd=usd,
            resumed_step=ending.resumed_step,
            last_step=ending.last_step,
            committed_step=ending.committed_step,
            report=ending.report,
        )
        self.keepalive.attempt = None
        try:
            self._settle_budget(closing=False)
        except TransientError as error:
            log.warning("budget not settled yet run=%s error=%s", self.run_id, error)  # close() does it

    def _prices(self, attempt: Attempt, start: datetime, end: datetime) -> Sequence[PricePoint]:
        """What held then; the price that was reserved at, with a warning, when the cloud does not tell, or not for long."""
        try:
            return self.patiently(lambda: self.driver.price_history(attempt.pool, start, end))
        except (TransientError, ConfigError) as error:
            self.warn(
                f"attempt {attempt.number} is billed at the price of its reservation, no history was told: {error}"
            )
            return [PricePoint(at=start, usd_per_hour=attempt.usd_per_hour)]

    def _finish_open_attempt(self, outcome: contract.Outcome, why: str) -> None:
        attempt = self.state.open_attempt
        if attempt is None:
            return
        if self.taken:
            raise self._taken_error()
        machines = self.patiently(lambda: self._machines(attempt))
        if not machines and not attempt.machine and self._asked_for == attempt.number:
            machines = self._await_unseen(attempt, outcome)
        for machine in machines:  # before anything is written: a journal that can't be must not keep a machine alive
            self.patiently(lambda machine=machine: self.driver.terminate(machine.id, machine.pool))
        if not attempt.machine and not machines:
            self._record_end(attempt, Ending(outcome=outcome, detail=why))
            return
        if not attempt.machine:  # the crash came between the launch and its record
            machine = machines[0]
            self._append("launched", attempt=attempt.number, machine=machine.id, launched_at=_iso(machine.launched_at))
            attempt = self.state.attempts[-1]
        for told in watch_attempt(self, attempt, asked_to_end=outcome):
            if isinstance(told, Ending):
                self._record_end(attempt, dataclasses.replace(told, detail=told.detail or why))

    def _await_unseen(self, attempt: Attempt, outcome: contract.Outcome) -> list[Machine]:
        """The machine of a launch whose answer never came, once the cloud shows it, if there is one.

        One that is shown later still is told by its lease, which it reads first of all.
        """
        try:
            self.keepalive.ask_to_stop(outcome, 0)
        except HoldfastError as error:  # then the lease ends by itself, some minutes later
            log.warning("lease not ended run=%s error=%s", self.run_id, error)
        give_up_at = time.monotonic() + UNSEEN_WALL_SECONDS
        while not (machines := self.patiently(lambda: self._machines(attempt))) and time.monotonic() < give_up_at:
            time.sleep(min(1.0, self.driver.poll_seconds))
        return machines

    def _told_end(self, attempt: Attempt) -> Update:
        kind = "preempted" if attempt.outcome in ("preempted", "lost") else "ended"
        if attempt.outcome in ("no-capacity", "quota"):
            kind = "refused"
        lost = f", {attempt.lost_steps} steps to do again" if attempt.lost_steps else ""
        words = {
            "preempted": f"preempted after step {attempt.last_step or 0}{lost}",
            "lost": f"machine lost after step {attempt.last_step or 0}{lost}",
            "no-capacity": f"refused: {attempt.detail}",
            "quota": f"refused: {attempt.detail}",
            "finished": f"finished at step {attempt.last_step or attempt.committed_step or 0}",
        }
        text = words.get(attempt.outcome or "", f"{attempt.outcome}: {attempt.detail}".rstrip(": "))
        assert attempt.outcome
        return Update(
            kind=kind,
            at=attempt.detected_at or self.driver.clock.now(),
            attempt=attempt.number,
            text=text,
            fields={
                "outcome": attempt.outcome,
                "machine": attempt.machine,
                "pool": str(attempt.pool),
                "step": attempt.last_step,
                "committed_step": attempt.committed_step,
                "lost_steps": attempt.lost_steps,
                "usd": self.state.usd_total,
            },
        )

    # -- the cloud ----------------------------------------------------------------------------------------------------

    def _machines(self, attempt: Attempt) -> list[Machine]:
        tags = {RUN_TAG: self.run_id, "holdfast-attempt": str(attempt.number)}
        return list(self.driver.machines(tags, cloud=attempt.pool.cloud))

    def _token(self, attempt: int) -> str:
        return f"{self.run_id}-{attempt:04d}"

    def _launch_request(self, attempt: Attempt) -> LaunchRequest:
        if self._bundle is None:
            self._bundle = upload_bundle(self.job, self.store, self.run_id)
        # What is left of the run's hours; the same when the launch is repeated, as everything here has to be.
        max_run_seconds = max(60.0, self.job.max_run_hours * 3600 - self.state.billed_seconds)
        environment = {
            **machine_environment(self.job.environment.python, max_run_seconds),
            contract.STORE: self.store.url,
            contract.RUN: self.run_id,
            contract.CLOUD: attempt.pool.cloud,
            contract.ATTEMPT: str(attempt.number),
            contract.BUNDLE: self._bundle.url,
            contract.BUNDLE_SHA256: self._bundle.sha256,
            contract.CHECKPOINT_POLICY: self._checkpoint_policy(attempt).to_json(),
        }
        return LaunchRequest(
            token=self._token(attempt.number),
            pool=attempt.pool,
            tags={
                RUN_TAG: self.run_id,
                "holdfast-attempt": str(attempt.number),
                "holdfast-job": self.job.name,
                "holdfast-store": contract.store_tag(self.store.url),
                "holdfast-owner": getpass.getuser(),
                "holdfast-lease": str(int(attempt.reserved_at.timestamp() + self.job.lease_seconds)),
            },
            environment=environment,
            startup_script=startup_script(environment),
            shutdown_script=SHUTDOWN_SCRIPT,
            max_run_seconds=max_run_seconds,
            disk_gib=self.job.resources.disk_gib,
        )

    def _checkpoint_policy(self, attempt: Attempt) -> CheckpointPolicy:
        unit, number = parse_interval(self.job.checkpointing.every)
        # As of the reservation: a repeated launch must ask for the same machine, whatever has been learned since.
        rate = attempt.interruptions_per_hour
        return CheckpointPolicy(
            every_steps=int(number) if unit == "steps" else None,
            every_seconds=number if unit == "seconds" else None,
            max_to_keep=self.job.checkpointing.max_to_keep,
            compression=self.job.checkpointing.compression,
            mean_seconds_between_preemptions=3600 / rate if rate else None,
            hazards=attempt.hazards,
            notice_seconds=WINDOWS_SECONDS["AWS" if attempt.pool.cloud == "aws" else "GCP"],
        )


def fingerprint(job: TrainingJob) -> str:
    identity = job.model_dump(mode="json", include=set(IDENTITY))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def past_attempt(attempt: Attempt, job: TrainingJob) -> PastAttempt:
    assert attempt.outcome and attempt.detected_at
    return PastAttempt(
        pool=attempt.pool,
        outcome=attempt.outcome,
        detail=attempt.detail,
        ended_at=attempt.detected_at,
        made_progress=_made_progress(attempt, job),
    )


def _is_forgiven(attempt: Attempt, state: RunState) -> bool:
    """Whoever takes a run up again may have been given the quota that was lacking: its pools are asked anew."""
    return attempt.outcome == "quota" and bool(
        state.reopened_at and attempt.detected_at and attempt.detected_at < state.reopened_at
    )


def _made_progress(attempt: Attempt, job: TrainingJob) -> bool:
    """Did the attempt commit enough for its end not to count as a failure?"""
    new = attempt.new_committed_steps
    if job.fallback.progress_to_reset is not None:
        return new >= job.fallback.progress_to_reset
    unit, number = parse_interval(job.checkpointing.every)
    if unit == "steps":
        return new > 0 and new >= number / 2
    if unit == "seconds" and attempt.step_seconds is not None:
        return new > 0 and new * attempt.step_seconds >= number / 2
    return new > 0


def _iso(at: datetime) -> str:
    return at.isoformat()
