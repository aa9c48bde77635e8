"""One run of a gang: a fleet whose members train together, in one formation after another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from holdfast.checkpoint.policy import DEFAULT_MEAN_SECONDS_BETWEEN_PREEMPTIONS, CheckpointPolicy
from holdfast.drivers.protocol import Offer
from holdfast.errors import AlreadyExistsError, TransientError
from holdfast.ledger.fleet_state import Member
from holdfast.ledger.gang_state import Formation, GangState, read_gang_state
from holdfast.ledger.gang_summary import gang_headline, gang_to_markdown, summarise_gang
from holdfast.ledger.journal import Entry
from holdfast.model import GangJob, parse_interval
from holdfast.placement.fleet_policy import LaunchRound
from holdfast.placement.gang_policy import Dissolve, Form, Ready
from holdfast.placement.policy import GiveUp, Wait
from holdfast.runtime import contract
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.fleet_watch import FleetWatch
from holdfast.supervision.gang_watch import GangWatch


class GangRun(FleetRun):
    """Made by `open_fleet_run` (fleet_opening.py)."""

    job: GangJob
    state: GangState

    def _fold(self, entries: Sequence[Entry]) -> GangState:
        return read_gang_state(self.run_id, entries)

    @property
    def complete(self) -> bool:
        state = self.state
        return state.trained and not state.living and not state.open_round

    @property
    def filled(self) -> list[Member]:
        """Who has finished keeps its place only while the formation lasts: what is to be trained again needs machines."""
        state = self.state
        keep = state.newest.members if state.newest and (state.trained or not state.forming) else []
        return [*state.living, *(one for one in state.ended("finished") if one.machine in keep)]

    @property
    def missing(self) -> int:
        return 0 if self.state.trained else super().missing

    def _decide(self) -> LaunchRound | Wait | GiveUp | None:
        return None if self.state.trained else super()._decide()

    @property
    def program_failures(self) -> list[str]:
        together = self.state.failures_of_opening
        words = [f"formation {one.formation}, machine {one.machine}: {one.detail}" for one in together]
        return [*super().program_failures, *words]

    def _fitting(self, offers: Sequence[Offer]) -> Sequence[Offer]:
        """Members reach each other by private addresses: where some live, the others must come too."""
        fit = super()._fitting(offers)
        regions = {(member.pool.cloud, member.pool.region) for member in self.state.living}
        near = [offer for offer in fit if not regions or (offer.pool.cloud, offer.pool.region) in regions]
        if not near:
            raise TransientError(f"no pool that fits the job is offered where its members live: {sorted(regions)}")
        return near

    def _keep_alive(self) -> None:
        """The lease names the newest formation: what an earlier one would commit is fenced off."""
        last = self.state.newest
        self.keepalive.attempt = last.number if last else contract.FLEET_ATTEMPT
        self.keepalive.renew()

    def _new_watch(self) -> FleetWatch:
        return GangWatch(self)

    def _more_environment(self) -> dict[str, str]:
        return {contract.CHECKPOINT_POLICY: self._policy().to_json()}

    def _policy(self) -> CheckpointPolicy:
        unit, number = parse_interval(self.job.checkpointing.every)
        return CheckpointPolicy(
            every_steps=int(number) if unit == "steps" else None,
            every_seconds=number if unit == "seconds" else None,
            max_to_keep=self.job.checkpointing.max_to_keep,
            compression=self.job.checkpointing.compression,
            # Each machine that is taken stops all of them.
            mean_seconds_between_preemptions=DEFAULT_MEAN_SECONDS_BETWEEN_PREEMPTIONS / self.job.machines,
        )

    @property
    def refused_since(self) -> datetime | None:
        """Since when no round has brought all that it asked for; None: the last one has, or there was none."""
        since = None
        for asked in reversed(self._rounds()):
            if not asked.refused_pools:
                break
            since = asked.asked_at
        return since

    # -- formations ---------------------------------------------------------------------------------------------------

    def form(self, decision: Form, ready: Mapping[str, Ready], left: Mapping[str, Any]) -> Formation:
        """Write the next formation down; from then on no earlier one can commit.

        `left`: the last that the members of the one before have said of it.
        """
        host = ready[decision.host]
        self._append(
            "gang-formed",
            formation=len(self.state.formations) + 1,
            members=list(decision.members),
            host=host.member,
            address=host.address,
            port=host.port,
            left=dict(left),
        )
        formed = self.state.newest
        assert formed
        self.tell_newest()
        return formed

    def dissolve(self, decision: Dissolve, report: Mapping[str, Any]) -> None:
        """The newest formation is over: its members are told, and wait for the next."""
        self._append("gang-over", gracious=decision.gracious, why=decision.why, report=dict(report))
        self.tell_newest()

    def tell_newest(self) -> None:
        """Say in the store what the journal says of the newest formation. Doing it again changes nothing."""
        last = self.state.newest
        if last is None:
            return
        self._keep_alive()
        place = {"members": last.members, "host": last.host, "address": last.address, "port": last.port}
        self._tell(contract.formation_key(self.run_id, last.number), place)
        if last.over_at:
            self._tell(contract.over_key(self.run_id, last.number), {"gracious": last.gracious, "why": last.why})

    def _tell(self, key: str, content: dict[str, Any]) -> None:
        def create() -> None:
            try:
                self.store.create(key, json.dumps(content).encode())
            except AlreadyExistsError:
                pass

        self.patiently(create)

    def record_failure(self, failed: Ready) -> None:
        last = self.state.newest
        assert last
        if not any(one.formation == last.number for one in self.state.failures):
            self._append("gang-failed", formation=last.number, machine=failed.member, detail=failed.detail)

    # -- the summary --------------------------------------------------------------------------------------------------

    def summarise(self) -> dict[str, Any]:
        return summarise_gang(self.state)

    def headline(self, summary: Mapping[str, Any]) -> str:
        return gang_headline(dict(summary))

    def to_markdown(self, summary: Mapping[str, Any]) -> str:
        return gang_to_markdown(dict(summary))
