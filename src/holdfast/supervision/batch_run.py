"""One run of a batch job: a plan, a queue of batches, and a fleet that grows and shrinks with what is left of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, ClassVar, TypeVar

from holdfast.batch.audit import finish
from holdfast.batch.plan import bodies, make_plan
from holdfast.batch.results import give_up, undone
from holdfast.batch.settings import SETTINGS, WorkerSettings, settings_key, write_settings
from holdfast.batch.several import WORKERS
from holdfast.batch.spec import GROUP
from holdfast.batch.worker import PROGRESS_SECONDS
from holdfast.drivers.protocol import Driver, Offer, PricePoint
from holdfast.errors import OverBudgetError
from holdfast.ledger.batch_state import BatchState, read_batch_state
from holdfast.ledger.batch_summary import batch_headline, batch_to_markdown, summarise_batch
from holdfast.ledger.billing import TERMS, add_usd, bill
from holdfast.ledger.budget import Budget
from holdfast.ledger.fleet_state import Member, Round
from holdfast.ledger.journal import Entry
from holdfast.model import BatchJob
from holdfast.placement.fleet_policy import FleetSituation, PastRound
from holdfast.queues.opening import open_queue
from holdfast.queues.protocol import Queue
from holdfast.storage import ObjectStore
from holdfast.supervision.batch_pace import Pace
from holdfast.supervision.batch_places import (
    credentials_for,
    machines_of_use,
    queue_url,
    reached_as_the_store,
    results_prefix,
)
from holdfast.supervision.batch_watch import BatchWatch
from holdfast.supervision.fleet_run import FIRST_GUESS_RESTART_SECONDS, FleetRun, past_round
from holdfast.supervision.fleet_watch import STOP_GRACE_SECONDS, FleetWatch
from holdfast.supervision.updates import Update, UpdateKind

T = TypeVar("T")

PUT_AT_ONCE = 500
PUT_BETWEEN_ENTRIES = 20
"""So many puts are one entry of the journal: a killed orchestrator puts as many again at most, and no result is made twice."""
WORKERS_READ_PER_LOOK = 20
USEFUL_LIFE_SECONDS = 5 * FIRST_GUESS_RESTART_SECONDS
"""A machine that lived so long has done enough batches not to count as a failed attempt at spot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is left to do."""

    batches: int
    done: int
    waiting: int
    leased: int
    dead: int
    approximate: bool = False
    """The broker counts late, or not all: RabbitMQ and Pub/Sub tell nobody what others have leased."""

    @property
    def left(self) -> int:
        return self.batches - self.done


class BatchRun(FleetRun):
    """Made by `open_batch_run` (batch_opening.py)."""

    job: BatchJob
    state: BatchState
    identity: ClassVar[tuple[str, ...]] = (
        "name",
        "inputs",
        "input_format",
        "function",
        "setup",
        "env",
        "results",
        "results_format",
        "batch_size",
    )

    def __init__(self, job: BatchJob, driver: Driver, store: ObjectStore, budget: Budget | None, run_id: str) -> None:
        self.prefix = results_prefix(job, store, run_id)
        self.tally: Tally | None = None
        """As of the last look; None before the first."""
        self._queue: Queue | None = None
        self._whole_groups: set[int] = set()
        self._begun: set[str] = set()
        """Machines whose workers are known to have taken batches."""
        self.start_seconds: float | None = None
        """The longest that one took from its launch until that was known, on the cloud's clock."""
        super().__init__(job, driver, store, budget, run_id)
        self._pace = Pace(self, self._market.seen)
        self._opened_at = driver.clock.now()

    def _fold(self, entries: Sequence[Entry]) -> BatchState:
        return read_batch_state(self.run_id, entries)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._queue:
            self._queue.close()
            self._queue = None

    @property
    def queue(self) -> Queue:
        """Raises ConfigError for a broker that can't be, TransientError for one that does not answer."""
        if self._queue is None:
            url = queue_url(self.job, self.driver, self.store)
            self._queue = open_queue(
                url,
                self.run_id,
                visibility_seconds=self.job.visibility_seconds,
                max_deliveries=self.job.max_deliveries,
                credentials=credentials_for([url], self.store),
            )
        return self._queue

    # -- what there is to do --------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Split the inputs into batches, once. Raises ConfigError for inputs that can't be read, or hold nothing."""
        if not self.state.plan:
            job = self.job
            credentials = credentials_for(job.inputs, self.store)
            inputs = reached_as_the_store(job.inputs, self.store)
            made = make_plan(self.store, self.prefix, inputs, job.batch_size, job.input_format, credentials)
            plan = {name: value for name, value in dataclasses.asdict(made).items() if name != "parts"}
            self._append("planned", plan=plan)
        return self.state.plan

    def put_batches(self) -> Iterator[int]:
        """Put every batch that has no result into the queue; how many of the plan's are dealt with, as it goes on."""
        self._tell_workers()
        start, done = self.state.put_up_to, self.finished_batches()
        chunks = chunks_of(PUT_AT_ONCE, enumerate(bodies(self.store, self.prefix)))
        number = 0
        for written, chunk in enumerate(chunks, 1):
            number = chunk[-1][0] + 1
            if number > start and (fresh := [body for i, body in chunk if i >= start and i not in done]):
                self.patiently(lambda fresh=fresh: self.queue.put(fresh))
            if written % PUT_BETWEEN_ENTRIES == 0 and number > start:
                self._append("batches-put", up_to=number)
            yield number
        if number > self.state.put_up_to:
            self._append("batches-put", up_to=number)

    def _tell_workers(self) -> None:
        job = self.job
        settings = WorkerSettings(
            queue=queue_url(job, self.driver, self.store),
            queue_name=self.run_id,
            prefix=self.prefix,
            function=job.function,
            setup=job.setup,
            batch_time_limit_seconds=job.batch_time_limit_seconds,
            visibility_seconds=job.visibility_seconds,
            max_deliveries=job.max_deliveries,
            results_format=job.results_format,
            idle_seconds=job.idle_seconds,
        )
        write_settings(self.store, settings)

    def finished_batches(self) -> set[int]:
        """Places in the order of those that have a result."""
        prefix = self.prefix + "/results/"
        return {int(info.key.rpartition("/")[2].partition("-")[0]) for info in self.store.list(prefix)}

    def _count_finished(self) -> int:
        """Groups that are whole are not listed again: they stay so."""
        batches, done = self.state.plan["batches"], 0
        for number in range(math.ceil(batches / GROUP)):
            size = min(GROUP, batches - number * GROUP)
            if number not in self._whole_groups:
                found = len(self.store.list(f"{self.prefix}/results/{number:05d}/"))
                if found < size:
                    done += found
                    continue
                self._whole_groups.add(number)
            done += size
        return done

    def look(self) -> Tally:
        """Raises TransientError when store or broker does not answer."""
        depth = self.queue.depth()
        batches, done = self.state.plan["batches"], self._count_finished()
        self.tally = Tally(
            batches=batches,
            done=done,
            waiting=min(depth.waiting, batches - done),  # Pub/Sub knows only what we put
            leased=depth.leased,
            dead=depth.dead,
            approximate=depth.approximate,
        )
        if self.tally.waiting and (len(self.state.living) < self.job.machines or self.job.has_deadline):
            self._see_who_has_begun()
        return self.tally

    def _see_who_has_begun(self) -> None:
        living = {member.machine for member in self.state.living} - self._begun
        workers = [info.key for info in self.store.list(f"{self.prefix}/workers/")] if living else []
        for key in [key for key in workers if self._machine_of(key) in living][:WORKERS_READ_PER_LOOK]:
            if json.loads(self.store.get(key))["phase"] != "starting":
                machine = self._machine_of(key)
                self._begun.add(machine)
                launched_at = self.state.members[machine].launched_at
                if launched_at >= self._opened_at:  # when an earlier process's machine began, nobody saw
                    took = (self.driver.clock.now() - launched_at).total_seconds()
                    self.start_seconds = max(self.start_seconds or 0.0, took)

    def _machine_of(self, key: str) -> str:
        return key.removeprefix(f"{self.prefix}/workers/").removesuffix(".json").rpartition("-")[0]

    def put_again(self, why: str) -> int:
        """Put every batch without a result into the queue once more: those that are there twice are worked on once or
        twice, and have one result all the same."""
        number = 0
        missing = (spec.body for spec in undone(self.store, self.prefix, self.job.results_format))
        for chunk in chunks_of(PUT_AT_ONCE, missing):
            self.queue.put(chunk)
            number += len(chunk)
        if number:
            self._append("batches-put-again", batches=number, why=why)
        return number

    def audit(self) -> dict[str, Any]:
        """Read plan and results back, and make one data set of them; what was found."""
        if not self.state.audit:
            found = finish(self.store, self.prefix)
            busy = {name: round(one["busy_seconds"], 3) for name, one in self.said_by_workers().items()}
            self._append("audited", audit={**dataclasses.asdict(found), "whole": found.whole, "busy_seconds": busy})
        return self.state.audit

    def give_up_the_dead(self) -> int:
        """Batches over which workers died too often leave results too: all their records are failed ones."""
        given_up = 0
        for body, reason in self.queue.dead():
            given_up += give_up(self.store, self.prefix, body, reason, self.job.results_format)
        if given_up:
            self._append("batches-given-up", batches=given_up)
        return given_up

    def said_by_workers(self) -> dict[str, dict[str, float]]:
        """By machine: seconds in which a worker of it was busy, and the failed records of all of them."""
        said: dict[str, dict[str, float]] = {}
        for info in self.store.list(f"{self.prefix}/workers/"):
            told = json.loads(self.store.get(info.key))
            sums = said.setdefault(self._machine_of(info.key), {"busy_seconds": 0.0, "failed": 0})
            sums["busy_seconds"] = max(sums["busy_seconds"], told["busy_seconds"])
            sums["failed"] += told["failed"]
        return said

    def machine_seconds(self) -> float:
        """Of the cloud, that machines were busy: what they have not said yet of the last seconds included."""
        speed = self.driver.clock.speed
        said = sum(one["busy_seconds"] for one in self.said_by_workers().values())
        return speed * (said + PROGRESS_SECONDS * len(self.state.living))

    # -- how many machines ----------------------------------------------------------------------------------------------

    @property
    def all_done(self) -> bool:
        return self.tally is not None and self.tally.left <= 0

    @property
    def complete(self) -> bool:
        state = self.state
        return self.all_done and not state.living and not state.open_round

    @property
    def filled(self) -> list[Member]:
        """A machine that ended because it found nothing to do leaves no place empty: there was nothing to do."""
        return self.state.living

    @property
    def wanted(self) -> int:
        """Machines that have something to do."""
        if self.tally is None:
            return self.job.machines
        if self.all_done:
            return 0
        living = {member.machine for member in self.state.living}
        at_work = len(living & self._begun)
        return machines_of_use(
            self.job.machines, len(living), at_work, self.tally.waiting, self.job.workers_per_machine
        )

    @property
    def missing(self) -> int:
        return 0 if self.state.asked_to_end else max(0, self.wanted - len(self.state.living))

    def _situation(self, offers: Sequence[Offer]) -> FleetSituation:
        filled = Counter(member.model for member in self.filled)
        situation = super()._situation(offers)
        paced = self._pace.decide(offers, situation.rounds, situation.now)
        return dataclasses.replace(situation, machines=self.wanted, filled=filled, paced=paced)

    def _past_round(self, asked: Round) -> PastRound:
        now = self.driver.clock.now()
        useful = timedelta(seconds=USEFUL_LIFE_SECONDS)
        lives = [(one.terminated_at or now) - one.launched_at for one in asked.members]
        past = past_round(asked)
        return dataclasses.replace(past, finished=past.finished or any(life >= useful for life in lives))

    def _new_watch(self) -> FleetWatch:
        return BatchWatch(self)

    def update(
        self, kind: UpdateKind, text: str, machines: Mapping[str, str] | None = None, outcome: str = ""
    ) -> Update:
        update = super().update(kind, text, machines, outcome)
        if isinstance(self._watch, BatchWatch):
            update.fields.update(self._watch.progress_fields())
        return update

    def _more_environment(self) -> dict[str, str]:
        return {
            SETTINGS: settings_key(self.prefix),
            WORKERS: str(self.job.workers_per_machine),
        }

    # -- dollars --------------------------------------------------------------------------------------------------------

    def within_cap(self, usd: float) -> float:
        cap = self.job.max_usd
        if cap is None:
            return usd
        state = self.state
        left = cap - add_usd([state.usd_total, -state.usd_of_opening(state.opening)])
        if cap - self.usd_so_far <= 0:
            raise OverBudgetError(
                f"the run has spent ${self.usd_so_far:.4f} of its max_usd of ${cap:g}; raise it to go on"
            )
        return min(usd, left)

    def usd_if_stopped_now(self, at_on_demand_prices: bool) -> float:
        """What the run will have cost when its machines are asked to end now, the time that they take for it included."""
        now = self.driver.clock.now()
        ended_at = now + timedelta(seconds=STOP_GRACE_SECONDS)
        amounts = [self.state.usd_total]
        prices: dict[object, Sequence[PricePoint]] = {}
        for member in self.state.living:
            if at_on_demand_prices:
                held = [PricePoint(at=member.launched_at, usd_per_hour=member.priced.on_demand_usd_per_hour)]
            else:
                if member.pool not in prices:
                    start = min(one.launched_at for one in self.state.living if one.pool == member.pool)
                    prices[member.pool] = self.driver.price_history(member.pool, start, now)
                held = list(prices[member.pool])
            amounts.append(bill(member.launched_at, ended_at, held, TERMS[member.pool.cloud], preempted=False).usd)
        return add_usd(amounts)

    # -- the summary ----------------------------------------------------------------------------------------------------

    def summarise(self) -> dict[str, Any]:
        state = self.state
        deadline_at = self.job.deadline_at(state.started_at) if state.started_at else None
        return summarise_batch(state, self.store.url, self.prefix, self.tally.done if self.tally else 0, deadline_at)

    def headline(self, summary: Mapping[str, Any]) -> str:
        return batch_headline(dict(summary))

    def to_markdown(self, summary: Mapping[str, Any]) -> str:
        return batch_to_markdown(dict(summary))


def chunks_of(number: int, items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, number)):
        yield chunk
