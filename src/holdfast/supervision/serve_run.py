"""One run of a model server: a fleet whose members a load balancer knows, replaced without end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

from holdfast.drivers.protocol import Driver, Offer
from holdfast.errors import ConfigError, HoldfastError
from holdfast.ledger.budget import Budget
from holdfast.ledger.fleet_state import Member
from holdfast.ledger.journal import Entry
from holdfast.model import ServeJob
from holdfast.placement.fleet_policy import FleetSituation, PastRound
from holdfast.runtime import contract
from holdfast.serving.balancer import Endpoint, LoadBalancer
from holdfast.serving.state import THE_RUN_ENDS, ServeState, read_serve_state
from holdfast.serving.summary import serve_headline, serve_to_markdown, summarise_serving
from holdfast.storage import ObjectStore
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.fleet_watch import FleetWatch
from holdfast.supervision.serve_watch import ServeWatch

log = logging.getLogger(__name__)

REMEMBERED_SECONDS = 3600.0
"""A service lives for weeks: what a pool refused or took longer ago says little of it now, and spot is tried again."""


class ServeRun(FleetRun):
    """Made by `open_serve_run` (serve_opening.py)."""

    job: ServeJob
    state: ServeState

    def __init__(
        self,
        job: ServeJob,
        driver: Driver,
        store: ObjectStore,
        budget: Budget | None,
        run_id: str,
        balancer: LoadBalancer,
    ) -> None:
        self.balancer = balancer
        self.leaving: set[str] = set()
        """Machines that others are to take the place of, as the watch last saw them."""
        super().__init__(job, driver, store, budget, run_id)

    def _fold(self, entries: Sequence[Entry]) -> ServeState:
        return read_serve_state(self.run_id, entries)

    def __enter__(self) -> Self:
        super().__enter__()
        if self.state.state == "running":
            self.balancer.open()
        return self

    @property
    def complete(self) -> bool:
        state = self.state
        return bool(state.asked_to_end) and not state.living and not state.open_round

    @property
    def most_machines(self) -> int:
        return self.job.most_machines

    @property
    def filled(self) -> list[Member]:
        """Who has a place: not a machine that is about to go, unless the cap leaves no room for another beside it."""
        living = self.state.living
        staying = [member for member in living if member.machine not in self.leaving]
        leaving = [member for member in living if member.machine in self.leaving]
        room = max(0, self.job.most_machines - len(living))
        kept = max(0, self.job.replicas - len(staying) - room)
        return [*staying, *leaving[:kept]]

    def _situation(self, offers: Sequence[Offer]) -> FleetSituation:
        situation = super()._situation(offers)
        since = situation.now - timedelta(seconds=REMEMBERED_SECONDS)
        answered = [one for one in self._rounds() if one.answered_at]
        rounds = [
            self._worth_it(past, any(self.state.was_worth_its_start(one, situation.now) for one in asked.members))
            for asked, past in zip(answered, situation.rounds, strict=True)
            if past.answered_at > since or any(at > since for _, at in past.taken)
        ]
        return dataclasses.replace(situation, rounds=rounds)

    @staticmethod
    def _worth_it(past: PastRound, finished: bool) -> PastRound:
        """No server ever finishes: a round has done well when one of its replicas was worth its start."""
        return dataclasses.replace(past, finished=finished)

    def _new_watch(self) -> FleetWatch:
        return ServeWatch(self)

    def counts(self) -> dict[str, int]:
        living = {member.machine for member in self.state.living}
        return {"serving": len(self.state.registered.keys() & living), **super().counts()}

    # -- the load balancer --------------------------------------------------------------------------------------------

    def register(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            self.balancer.register(endpoint)
        known = self.state.registered
        if new := [dataclasses.asdict(one) for one in endpoints if one.machine not in known]:
            self._append("replicas-registered", replicas=new)

    def deregister(self, why: Mapping[str, str]) -> None:
        """Send these nothing new. First the load balancer, then the journal: a crash in between repeats a harmless call."""
        for machine in why:
            endpoint = self.state.endpoint_of(machine)
            assert endpoint
            self.balancer.drain(endpoint)
        self.record_deregistered(why)

    def record_deregistered(self, why: Mapping[str, str]) -> None:
        known = self.state.registered
        if gone := {machine: words for machine, words in why.items() if machine in known}:
            self._append("replicas-deregistered", replicas=gone)

    def retire(self, machine: str, why: str) -> None:
        self._append("replica-retiring", machine=machine, why=why)

    def _end_members(self, outcome: contract.Outcome, why: str) -> None:
        if not self.taken and self.state.state == "running":
            try:  # what is in flight gets the machines' shutdown time
                self.deregister(dict.fromkeys(self.state.registered, f"{THE_RUN_ENDS}: {why}"))
            except HoldfastError as error:
                log.warning("load balancer not told of the end run=%s error=%s", self.run_id, error)
        super()._end_members(outcome, why)

    def close(self, state: str, detail: str = "") -> None:
        super().close(state, detail)
        try:
            for machine in self.state.services:
                if endpoint := self.state.endpoint_of(machine):
                    self.balancer.remove(endpoint)
            self.balancer.close()
        except (ConfigError, HoldfastError) as error:
            log.warning("load balancer not left clean run=%s error=%s", self.run_id, error)

    # -- the summary --------------------------------------------------------------------------------------------------

    def summarise(self) -> dict[str, Any]:
        return summarise_serving(self.state, self.driver.clock.now())

    def headline(self, summary: Mapping[str, Any]) -> str:
        return serve_headline(dict(summary))

    def to_markdown(self, summary: Mapping[str, Any]) -> str:
        return serve_to_markdown(dict(summary))
