"""One run of a fleet: rounds of machines asked for, watched together, replaced, and proven gone in the end."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Self

from holdfast.drivers.protocol import Driver, FleetRequest, Machine, Offer, PricePoint
from holdfast.drivers.several import SomeOffers
from holdfast.errors import (
    CapacityError,
    ConfigError,
    HoldfastError,
    OverBudgetError,
    ProgramFailedError,
    QuotaError,
    TransientError,
)
from holdfast.ledger.billing import TERMS, add_usd, bill, round_usd
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.fleet_state import TAKEN, UNFINISHED, FleetState, Member, Round, read_fleet_state
from holdfast.ledger.fleet_summary import fleet_headline, fleet_to_markdown, summarise_fleet
from holdfast.ledger.journal import Entry
from holdfast.model import BatchJob, FleetJob, GangJob, ServeJob
from holdfast.placement.fleet_policy import FleetSituation, LaunchRound, PastRound, decide_round
from holdfast.placement.policy import GiveUp, Wait
from holdfast.runtime import contract
from holdfast.runtime.startup import SHUTDOWN_SCRIPT, machine_environment, startup_script
from holdfast.storage import ObjectStore
from holdfast.supervision.bundle import Bundle, upload_bundle
from holdfast.supervision.fleet_watch import FleetWatch, MemberEnd
from holdfast.supervision.preflight import fitting_offers
from holdfast.supervision.run import RUN_TAG, Run
from holdfast.supervision.updates import Update, UpdateKind

log = logging.getLogger(__name__)

FLEET_TAG = "holdfast-fleet"
FIRST_GUESS_RESTART_SECONDS = 120.0


class FleetRun(Run[FleetState]):
    """Made by `open_fleet_run` (fleet_opening.py); a context manager that gives the run back, whatever happens."""

    identity: ClassVar[tuple[str, ...]] = ("name", "script", "module", "command", "args", "env", "kind")
    """What makes two jobs the same: the rest (machines, share, resources, caps) may change between an end and a resume."""

    def __init__(
        self,
        job: FleetJob | GangJob | BatchJob | ServeJob,
        driver: Driver,
        store: ObjectStore,
        budget: Budget | None,
        run_id: str,
    ) -> None:
        self.job = job
        self._bundle: Bundle | None = None
        self._watch: FleetWatch | None = None
        self._asked_for: int | None = None
        """The round whose machines this process has asked for without having heard the answer."""
        super().__init__(job, driver, store, budget, run_id, job.lease_seconds)

    def _fold(self, entries: Sequence[Entry]) -> FleetState:
        return read_fleet_state(self.run_id, entries)

    @property
    def fingerprint(self) -> str:
        identity = self.job.model_dump(mode="json", include=set(self.identity))
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def __enter__(self) -> Self:
        super().__enter__()
        if self.state.living or self.state.open_round:
            self._keep_alive()
        return self

    @property
    def maintained(self) -> bool:
        return self.job.kind == "maintained"

    @property
    def complete(self) -> bool:
        """Is there nothing left to be done? A maintained fleet is complete when it was asked to end, and has."""
        state = self.state
        if state.living or state.open_round:
            return False
        if self.maintained:
            return bool(state.asked_to_end)
        return len(state.ended("finished")) >= self.job.machines

    def close(self, state: str, detail: str = "") -> None:
        """Settle every machine of the run and write its last word. Doing it again changes nothing.

        Raises HoldfastError when a run is to be finished that is not complete.
        """
        if state == "finished" and not self.complete:
            done = len(self.state.ended("finished"))
            raise HoldfastError(f"run {self.run_id!r} is not finished: {done} of {self.job.machines} machines are")
        self.settle()
        self._settle_budget(closing=True)
        self._write_warnings()
        if self.state.state == "running":
            self._append("closed", state=state, detail=detail)

    def end(self, state: str, why: str) -> None:
        """End every machine now and close the run as `state`: cancelled, failed or over-budget."""
        if self.state.state == "running":
            self._end_members("cancelled", why)
            self.close(state, why)

    def settle(self) -> None:
        """Prove that no machine of the run lives, and that no cloud makes new ones. Raises as `Run.settle`."""
        if not self.taken:
            self._end_maintained()
        super().settle()

    # -- asking for machines ------------------------------------------------------------------------------------------

    def decide(self) -> LaunchRound | Wait | GiveUp | None:
        """What to ask for next; None: every place is filled. Giving up is a decision too.

        Raises ProgramFailedError with the last lines of a program that failed too often, OverBudgetError when the hours
        are used up, TransientError when the cloud does not tell its offers.
        """
        state = self.state
        failures = self.program_failures
        if len(failures) > self.job.max_program_failures:
            raise ProgramFailedError(failures[-1])
        if state.asked_to_end:
            if state.asked_to_end[0] == "over-budget" and not self.maintained and not state.living:
                raise OverBudgetError(f"{state.asked_to_end[1]}; raise it to go on")
            return None
        if self.maintained and any(past.members for past in self._rounds()):
            return None  # the cloud replaces by itself
        return self._with_credentials(self._decide)

    @property
    def program_failures(self) -> list[str]:
        """Of the present opening: where, and the last lines."""
        failures = self.state.unfinished("program-failed")
        return [f"machine {one.machine} ({one.pool}): {one.detail}" for one in failures]

    def _decide(self) -> LaunchRound | Wait | GiveUp | None:
        offers = self._offers()
        missing = offers.missing if isinstance(offers, SomeOffers) else None
        try:
            decision = decide_round(self._situation(self._fitting(offers)))
        except ConfigError:
            if missing:
                raise missing from None
            raise
        if isinstance(decision, GiveUp) and missing and not self._replacements_used_up():
            raise missing
        return decision

    def _fitting(self, offers: Sequence[Offer]) -> Sequence[Offer]:
        return fitting_offers(self.job.resources, offers)

    def _replacements_used_up(self) -> bool:
        refusals = sum(one.refusal is not None for one in self._rounds())
        return len(self.state.unfinished(*UNFINISHED)) + refusals > self.job.max_replacements

    def _situation(self, offers: Sequence[Offer]) -> FleetSituation:
        state = self.state
        return FleetSituation(
            now=self.driver.clock.now(),
            offers=offers,
            rounds=[self._past_round(one) for one in self._rounds() if one.answered_at],
            machines=self.job.machines,
            spot_share=self._market.spot_share(self.job.spot_share, offers),
            filled=Counter(member.model for member in self.filled),
            replaced=len(state.unfinished(*UNFINISHED)),
            max_replacements=self.job.max_replacements,
            restart_seconds=FIRST_GUESS_RESTART_SECONDS,
            save_seconds=0.0,
        )

    def _past_round(self, asked: Round) -> PastRound:
        return past_round(asked)

    @property
    def filled(self) -> list[Member]:
        """Who has a place: a machine that runs, and one that has done its work."""
        return [*self.state.living, *self.state.ended("finished")]

    @property
    def most_machines(self) -> int:
        """That may live at the same time."""
        return self.job.machines

    @property
    def missing(self) -> int:
        """Places that are empty."""
        state = self.state
        if state.asked_to_end or (self.maintained and any(past.members for past in self._rounds())):
            return 0
        return max(0, self.job.machines - len(self.filled))

    def _rounds(self) -> list[Round]:
        """Those of the present opening."""
        return [one for one in self.state.rounds if one.opening == self.state.opening]

    def reserve(self, launch: LaunchRound) -> Round:
        """Set the worst case aside and write down what is to be asked, before any machine is asked for.

        Raises OverBudgetError when the caps leave no room.
        """
        state = self.state
        if state.open_round:
            return state.open_round
        hours_left = self.job.max_run_hours - state.billed_seconds / 3600
        if hours_left <= 0:
            raise OverBudgetError(
                f"the run has used its max_run_hours of {self.job.max_run_hours:g}; raise it to go on"
            )
        asked_before = [priced for one in self._rounds() for priced in one.pools]
        dearest = max(one.on_demand_usd_per_hour for one in [*asked_before, *launch.offers])
        usd = self.within_cap(round_usd(add_usd([state.usd_of_opening(state.opening)]) + dearest * hours_left))
        if usd > state.reserved.get(state.opening, ("", -1.0))[1]:
            if self._budget:
                now = self.driver.clock.now()
                hours = state.hours_of_opening(state.opening) + hours_left
                self._budget.reserve(self._budget_token(state.opening), usd, now, self.most_machines, hours)
            self._append("fleet-reserved", usd_reserved=usd, budget=self._budget.name if self._budget else "")
        if launch.fell_back:
            self._append("fallback", reason=launch.reason)
        number = len(state.rounds) + 1
        self._append(
            "round-asked",
            round=number,
            token=f"{self.run_id}-fleet-{number}",
            pools=[
                {
                    "pool": dataclasses.asdict(offer.pool),
                    "usd_per_hour": offer.usd_per_hour,
                    "on_demand_usd_per_hour": offer.on_demand_usd_per_hour,
                }
                for offer in launch.offers
            ],
            spot=launch.spot,
            on_demand=launch.on_demand,
            reason=launch.reason,
        )
        return self.state.rounds[-1]

    def within_cap(self, usd: float) -> float:
        """The worst case of this opening, where the job has a cap on dollars too."""
        return usd

    def launch(self) -> Round:
        """Ask for the open round's machines; a repeated call brings the same ones, also after a crash.

        Raises CapacityError, QuotaError, ConfigError (the round is over then), TransientError.
        """
        asked = self.state.open_round
        assert asked, "reserve() comes first"
        self._keep_alive()
        self._asked_for = asked.number
        try:
            machines = self._with_credentials(lambda: self.driver.launch_fleet(self._fleet_request(asked)))
        except CapacityError as error:
            self._refused(asked, "no-capacity", str(error))
            raise
        except QuotaError as error:
            self._refused(asked, "quota", str(error))
            raise
        except ConfigError as error:
            self._refused(asked, "program-failed", f"the launch was refused: {error}")
            raise
        self.record_launched(asked, machines)
        self._asked_for = None
        return self.state.rounds[-1]

    def _refused(self, asked: Round, outcome: contract.Outcome, detail: str) -> None:
        self._append("round-refused", round=asked.number, outcome=outcome, detail=detail)
        self._asked_for = None

    def record_launched(self, asked: Round, machines: Sequence[Machine]) -> None:
        """Take in the machines of a round that are not known yet."""
        numbers = {priced.pool: number for number, priced in enumerate(asked.pools)}
        new = [
            {
                "machine": machine.id,
                "pool": numbers.get(machine.pool, dataclasses.asdict(machine.pool)),
                "launched_at": machine.launched_at.isoformat(),
            }
            for machine in machines
            if machine.id not in self.state.members
        ]
        if new or asked.answered_at is None:
            self._append("members-launched", round=asked.number, members=new)

    def _keep_alive(self) -> None:
        self.keepalive.attempt = contract.FLEET_ATTEMPT
        self.keepalive.renew()

    # -- watching them ------------------------------------------------------------------------------------------------

    def supervise(self, until: datetime | None = None) -> Iterator[Update]:
        """Watch all members until there is something to decide: complete, a place is empty, a program has failed.

        `until`: empty places are not to be filled before.
        """
        self._watch = self._watch or self._new_watch()
        yield from self._watch.updates(until)

    def _new_watch(self) -> FleetWatch:
        return FleetWatch(self)

    def ask_to_stop(self, outcome: contract.Outcome, why: str, grace_seconds: float) -> None:
        """Let every machine end itself; the journal remembers why, whoever sees their ends."""
        if not self.state.asked_to_end:
            self._append("fleet-asked-to-end", outcome=outcome, why=why)
        self._end_maintained()
        self.keepalive.ask_to_stop(outcome, grace_seconds)

    @property
    def seconds_used(self) -> float:
        """Machine seconds of all members, the living included."""
        now = self.driver.clock.now()
        state = self.state
        return state.billed_seconds + sum((now - member.launched_at).total_seconds() for member in state.living)

    @property
    def usd_so_far(self) -> float:
        """What the run has cost by now, the living machines included."""
        now = self.driver.clock.now()
        running = [  # asks no cloud: it is shown often
            bill(
                member.launched_at,
                now,
                [PricePoint(at=member.launched_at, usd_per_hour=member.priced.usd_per_hour)],
                TERMS[member.pool.cloud],
                preempted=False,
            ).usd
            for member in self.state.living
        ]
        return add_usd([self.state.usd_total, *running])

    def counts(self) -> dict[str, int]:
        """Members by what became of them; `running` first."""
        state = self.state
        ended = Counter(str(member.outcome) for member in state.members.values() if member.outcome)
        return {"running": len(state.living), "finished": ended.pop("finished", 0), **ended}

    def update(
        self, kind: UpdateKind, text: str, machines: Mapping[str, str] | None = None, outcome: str = ""
    ) -> Update:
        """What happened, for whoever watches. `machines`: the pools of those that it happened to."""
        return Update(
            kind=kind,
            at=self.driver.clock.now(),
            attempt=len(self.state.rounds),
            text=text,
            fields={
                "machines": dict(machines or {}),
                "outcome": outcome,
                "counts": self.counts(),
                "wanted": self.job.machines,
                "usd": self.usd_so_far,
            },
        )

    # -- their ends ---------------------------------------------------------------------------------------------------

    def record_ends(self, ends: Sequence[MemberEnd]) -> None:
        """Bill the machines and write their ends. Every second is charged here and nowhere else."""
        charged = []
        prices: dict[object, Sequence[PricePoint]] = {}
        for end in ends:
            member = self.state.members[end.machine.id]
            if member.outcome is not None:
                continue
            ended_at = end.machine.terminated_at or self.driver.clock.now()
            if member.pool not in prices:
                prices[member.pool] = self._prices(member, [one for one in ends if self._is_of(one, member)])
            preempted = end.machine.reason == "preempted" and member.model == "spot"
            cost = bill(member.launched_at, ended_at, prices[member.pool], TERMS[member.pool.cloud], preempted)
            charged.append(
                {
                    "machine": member.machine,
                    "outcome": end.outcome,
                    "terminated_at": ended_at.isoformat(),
                    "billed_seconds": cost.seconds,
                    "usd": cost.usd,
                }
                | ({"detail": end.detail} if end.detail else {})
            )
        if charged:
            self._append("members-ended", members=charged)

    def _is_of(self, end: MemberEnd, member: Member) -> bool:
        return self.state.members[end.machine.id].pool == member.pool

    def _prices(self, member: Member, ends: Sequence[MemberEnd]) -> Sequence[PricePoint]:
        """What held in the lives of machines of one pool; the price at the launch when the cloud does not tell for long."""
        start = min(self.state.members[end.machine.id].launched_at for end in ends)
        end = max((end.machine.terminated_at or self.driver.clock.now()) for end in ends)
        try:
            return self.patiently(lambda: self.driver.price_history(member.pool, start, end))
        except (TransientError, ConfigError) as error:
            self.warn(
                f"round {member.round}: machines in {member.pool} are billed at the price of their launch, no history was "
                f"told: {error}"
            )
            return [PricePoint(at=start, usd_per_hour=member.priced.usd_per_hour)]

    def _end_members(self, outcome: contract.Outcome, why: str) -> None:
        if self.taken:
            raise self._taken_error()
        self._end_maintained()
        self._watch = self._watch or self._new_watch()
        if self._asked_for:
            # Machines that are shown later than `end_all` waits are told by their lease, which they read first of all.
            self._ask_to_stop_at_once(outcome)
        self._watch.end_all(outcome, why, self._asked_for)
        if asked := self.state.open_round:
            self._refused(asked, outcome, why)

    def _ask_to_stop_at_once(self, outcome: contract.Outcome) -> None:
        try:
            self.keepalive.ask_to_stop(outcome, 0)
        except HoldfastError as error:  # then the lease ends by itself, some minutes later
            log.warning("lease not ended run=%s error=%s", self.run_id, error)

    def _end_maintained(self) -> None:
        """From here on no cloud replaces anything. Before the machines: else it would make new ones of them."""
        if self.maintained:
            for asked in self.state.rounds:
                self.patiently(lambda asked=asked: self.driver.end_fleet(asked.token, asked.region))

    # -- the summary ----------------------------------------------------------------------------------------------------

    def summarise(self) -> dict[str, Any]:
        """The content of summary.json."""
        return summarise_fleet(self.state)

    def headline(self, summary: Mapping[str, Any]) -> str:
        return fleet_headline(dict(summary))

    def to_markdown(self, summary: Mapping[str, Any]) -> str:
        return fleet_to_markdown(dict(summary))

    # -- the rest -----------------------------------------------------------------------------------------------------

    def clouds(self) -> list[str]:
        return self._clouds()

    def _clouds(self) -> list[str]:
        return sorted({asked.cloud for asked in self.state.rounds})

    def round_of(self, machine: Machine) -> Round | None:
        """Which round brought this machine, as its tags say."""
        token = machine.tags.get(FLEET_TAG)
        return next((asked for asked in self.state.rounds if asked.token == token), None)

    def _settle_budget(self, closing: bool) -> None:
        state, now = self.state, self.driver.clock.now()
        for opening, (budget, _) in state.reserved.items():
            if budget and (closing or opening < state.opening or state.state != "running"):
                # It may have been reserved from another budget than today's.
                ledger = BudgetLedger(self.store, Budget(name=budget, max_usd=0, max_machines=0))
                hours = state.hours_of_opening(opening)
                ledger.settle(self._budget_token(opening), state.usd_of_opening(opening), now, hours)
        if closing and self._budget and state.opening not in state.reserved:
            # Reserved, but it never came into the journal: no machine was asked for.
            self._budget.settle(self._budget_token(state.opening), 0.0, now)

    def _budget_token(self, opening: int) -> str:
        return f"{self.run_id}-{opening:04d}"

    def _more_environment(self) -> dict[str, str]:
        """Of the machines, in a kind of fleet that tells them more."""
        return {}

    def _fleet_request(self, asked: Round) -> FleetRequest:
        if self._bundle is None:
            self._bundle = upload_bundle(self.job, self.store, self.run_id)
        environment = {
            **machine_environment(self.job.environment.python, self.job.max_run_hours * 3600),
            contract.STORE: self.store.url,
            contract.RUN: self.run_id,
            contract.CLOUD: asked.pools[0].pool.cloud,
            contract.ATTEMPT: str(contract.FLEET_ATTEMPT),
            contract.BUNDLE: self._bundle.url,
            contract.BUNDLE_SHA256: self._bundle.sha256,
            **self._more_environment(),
        }
        return FleetRequest(
            token=asked.token,
            kind=self.job.kind,
            pools=[priced.pool for priced in asked.pools],
            machines=asked.spot + asked.on_demand,
            spot_share=asked.spot / (asked.spot + asked.on_demand),
            tags={
                RUN_TAG: self.run_id,
                "holdfast-job": self.job.name,
                "holdfast-store": contract.store_tag(self.store.url),
                "holdfast-owner": getpass.getuser(),
                # As of the round, not of this call: a repeated one must say the same.
                "holdfast-lease": str(int(asked.asked_at.timestamp() + self.job.lease_seconds)),
            },
            startup_script=startup_script(environment),
            shutdown_script=SHUTDOWN_SCRIPT,
            max_run_seconds=self.job.max_run_hours * 3600,
            disk_gib=self.job.resources.disk_gib,
        )


def past_round(asked: Round) -> PastRound:
    assert asked.answered_at
    return PastRound(
        pools=[priced.pool for priced in asked.pools],
        spot=asked.spot,
        answered_at=asked.answered_at,
        refusal=asked.refusal,
        refused_pools=asked.refused_pools,
        taken=[
            (member.pool, member.detected_at)
            for member in asked.members
            if member.outcome in TAKEN and member.detected_at
        ],
        finished=any(member.outcome == "finished" for member in asked.members),
    )
