"""What every kind of run has: one owner, a journal, a pulse, a budget, and patience with store and cloud."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from holdfast.drivers.protocol import Driver, Machine, Offer
from holdfast.errors import AlreadyExistsError, CredentialsError, HoldfastError, RunTakenError, TransientError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.journal import Entry, Journal
from holdfast.market.history import History
from holdfast.market.informed import InformedMarket
from holdfast.market.lives import lives_of
from holdfast.model import Job
from holdfast.runtime import contract
from holdfast.storage import ObjectStore
from holdfast.supervision.keepalive import Keepalive
from holdfast.supervision.ownership import Ownership

log = logging.getLogger(__name__)

T = TypeVar("T")
SETTLE_WALL_SECONDS = 300.0
TERMINATE_AGAIN_WALL_SECONDS = 30.0
"""A termination may come to nothing, and what is stopped is not terminated: both are asked for again."""
CLOUD_PATIENCE_WALL_SECONDS = 120.0
CREDENTIALS_PATIENCE_WALL_SECONDS = 24 * 3600.0
CREDENTIALS_POLL_WALL_SECONDS = 15.0
"""Credentials that have ended are for people to renew: the run waits for them for so long, and asks so often."""
STORE_PATIENCE_WALL_SECONDS = 600.0
"""How long an entry waits for a store that does not answer, before the run is given up."""
RUN_TAG = "holdfast-run"
ENDS: frozenset[str] = frozenset({"ended", "members-ended", "round-refused", "closed"})
"""Entries after which the history of the store's machines has something to learn."""


class State(Protocol):
    state: str
    warnings: list[str]


S = TypeVar("S", bound=State)


class Run(ABC, Generic[S]):
    """Everything it knows is in the journal; whoever opens the run again goes on from there."""

    def __init__(
        self, job: Job, driver: Driver, store: ObjectStore, budget: Budget | None, run_id: str, lease_seconds: float
    ) -> None:
        self.driver, self.store, self.run_id = driver, store, run_id
        self._job_as_started = job.model_dump(mode="json")
        self._budget = BudgetLedger(store, budget) if budget else None
        self._journal = Journal(store, contract.journal_prefix(run_id))
        self._owner = Ownership(store, run_id)
        self._unwritten_warnings: list[str] = []
        self._history, self._in_history = History(store), 0
        self._market = InformedMarket(store, driver.clock, self._history)
        self._folded: tuple[int, S] = (0, self._fold([]))
        self.keepalive = Keepalive(store, run_id, driver.clock, lease_seconds, self._owner)

    @abstractmethod
    def _fold(self, entries: Sequence[Entry]) -> S: ...

    @abstractmethod
    def _settle_budget(self, closing: bool) -> None:
        """Whatever a crash left between an entry of ours and the budget's own. Doing it again changes nothing."""

    @abstractmethod
    def _clouds(self) -> list[str]:
        """Every cloud that the run has ever asked for a machine."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The same for jobs that are the same."""

    # -- opening and closing ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._owner.claim()
        self._journal.read()
        state = self.state
        if state.state == "new":
            self._append(
                "run-started",
                job=self._job_as_started,
                fingerprint=self.fingerprint,
                clock_speed=self.driver.clock.speed,
                store=self.store.url,
            )
        elif self._owner.took_over:
            self._append("taken-over", owner=self._owner.number)
        if state.state in ("failed", "cancelled", "over-budget", "calibrated"):
            self._append("reopened", after=state.state)
        self._settle_budget(closing=False)
        self.keepalive.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keepalive.stop()
        try:
            if not self.taken:
                self._owner.release()
        except (HoldfastError, OSError) as problem:
            # It must not hide what ended the run, and this owner is dead soon anyway.
            log.warning("run not released run=%s error=%s", self.run_id, problem)

    def read(self) -> S:
        """The state with what others have written since."""
        self._journal.read()
        return self.state

    @property
    def state(self) -> S:
        """What the journal says, folded anew when it has grown. To be read, not changed."""
        entries = list(self._journal)
        if self._folded[0] != len(entries):
            self._folded = (len(entries), self._fold(entries))
        return self._folded[1]

    @property
    def taken(self) -> bool:
        """Has another process taken the run over? Then neither its machines nor its journal are ours to touch."""
        if not self.keepalive.taken:
            try:
                self.keepalive.taken = not self._owner.is_mine()
            except HoldfastError as error:
                log.warning("can't ask who owns the run run=%s error=%s", self.run_id, error)
        return self.keepalive.taken

    def settle(self) -> None:
        """Prove that no machine of the run lives. Raises TransientError when one does not go, RunTakenError."""
        if self.taken:
            raise self._taken_error()
        self.keepalive.attempt = None
        give_up_at = time.monotonic() + SETTLE_WALL_SECONDS
        asked_at: dict[str, float] = {}
        while living := self.patiently(self._living_machines):
            for machine in living:
                now = time.monotonic()
                if now - asked_at.get(machine.id, -math.inf) > TERMINATE_AGAIN_WALL_SECONDS:
                    self.patiently(lambda machine=machine: self.driver.terminate(machine.id, machine.pool))
                    asked_at[machine.id] = now
            if time.monotonic() > give_up_at:
                names = ", ".join(machine.id for machine in living)
                raise TransientError(f"machines of run {self.run_id} do not end: {names}; reap_orphans goes on trying")
            time.sleep(self.driver.poll_seconds)

    def pause(self, until: datetime) -> None:
        """Sleep on the cloud's clock. Raises RunTakenError when another process takes the run over meanwhile."""
        clock = self.driver.clock
        while (left := (until - clock.now()).total_seconds()) > 0:
            if self.keepalive.taken:
                raise self._taken_error()
            time.sleep(min(1.0, left / clock.speed))

    def warn(self, text: str) -> bool:
        """Put a warning into the journal once; True when it is new."""
        if text in self.state.warnings or text in self._unwritten_warnings:
            return False
        self._unwritten_warnings.append(text)
        self._write_warnings()
        return True

    # -- the journal --------------------------------------------------------------------------------------------------

    def _append(self, kind: str, patient: bool = True, **fields: Any) -> Entry:
        """Waits for a store that does not answer: what has happened must be written down, however late."""
        give_up_at = time.monotonic() + (STORE_PATIENCE_WALL_SECONDS if patient else 0)
        pause = 0.5
        now = self.driver.clock.now()  # the same at every try, so that the journal knows its own entry
        while True:
            try:
                entry = self._journal.append(kind, now, **fields)
                if kind in ENDS:
                    self._extend_history(from_the_start=kind == "closed")
                return entry
            except AlreadyExistsError as error:
                self.keepalive.taken = True
                raise self._taken_error() from error
            except TransientError as error:
                if time.monotonic() + pause > give_up_at and not isinstance(error, CredentialsError):
                    raise
                log.warning("entry %r waits for the store run=%s error=%s", kind, self.run_id, error)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)

    def _extend_history(self, from_the_start: bool) -> None:
        """What the store does not take now is written with a later end; estimates miss it until then, and nothing else."""
        lives = lives_of(self.state)
        try:
            self._history.record(lives if from_the_start else lives[self._in_history :])
            self._in_history = len(lives)
            self._market.forget()
        except (HoldfastError, OSError) as error:
            log.warning("history not extended run=%s error=%s", self.run_id, error)

    def _taken_error(self) -> RunTakenError:
        return RunTakenError(
            f"run {self.run_id!r} was taken over by another process: it and its machines are that one's"
        )

    def _write_warnings(self) -> None:
        """What the store does not take now is written with a later one."""
        try:
            while self._unwritten_warnings:
                self._append("warned", patient=False, text=self._unwritten_warnings[0])
                del self._unwritten_warnings[0]
        except TransientError as error:
            log.warning("warning not written yet run=%s error=%s", self.run_id, error)

    # -- the cloud ----------------------------------------------------------------------------------------------------

    def _offers(self) -> Sequence[Offer]:
        """What the cloud offers now, with the interruption rates that the store's history tells. Raises TransientError."""
        return self._market.inform(self.driver.offers())

    def _living_machines(self) -> list[Machine]:
        tags = {RUN_TAG: self.run_id}
        described = [machine for cloud in self._clouds() for machine in self.driver.machines(tags, cloud=cloud)]
        return [machine for machine in described if machine.state != "terminated"]

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns, asked again for a while. Raises TransientError in the end."""
        give_up_at = time.monotonic() + CLOUD_PATIENCE_WALL_SECONDS
        pause = min(1.0, self.driver.poll_seconds)
        while True:
            try:
                return self._with_credentials(call)
            except TransientError as error:
                if time.monotonic() + pause > give_up_at:
                    raise
                log.warning("asking the cloud again run=%s error=%s", self.run_id, error)
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _with_credentials(self, call: Callable[[], T]) -> T:
        """What `call` returns, however long it takes until somebody has renewed credentials that have ended.

        Meanwhile a machine lives by its lease, which the store's own credentials renew: it is not leaked.
        """
        give_up_at = time.monotonic() + CREDENTIALS_PATIENCE_WALL_SECONDS
        while True:
            try:
                return call()
            except CredentialsError as error:
                self.warn(f"waited for credentials: {error}")
                log.warning("waiting for credentials run=%s error=%s", self.run_id, error)
                if time.monotonic() > give_up_at:
                    raise
                if self.keepalive.taken:
                    raise self._taken_error() from error
                time.sleep(min(CREDENTIALS_POLL_WALL_SECONDS, 10 * self.driver.poll_seconds))
