"""Watch a model server's replicas: what a fleet's watch sees, who is well, and what the load balancer has to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from holdfast.drivers.protocol import Machine
from holdfast.errors import ConfigError, TransientError
from holdfast.ledger.fleet_state import Member
from holdfast.serving.balancer import Endpoint, Standing
from holdfast.serving.replicas import Replica, ReplicaBook
from holdfast.supervision.fleet_watch import FleetWatch
from holdfast.supervision.updates import Update

if TYPE_CHECKING:
    from holdfast.supervision.serve_run import ServeRun


@dataclass(slots=True)
class ServeWatch(FleetWatch):
    run: ServeRun
    book: ReplicaBook = field(init=False)
    replicas: dict[str, Replica] = field(default_factory=dict)
    """By machine: its last word."""
    removed: set[str] = field(default_factory=set)
    """Machines that are gone, from the load balancer and from the book too."""

    def __post_init__(self) -> None:
        self.book = ReplicaBook(self.run.store, self.run.run_id)

    def _lead(self, machines: dict[str, Machine]) -> Iterator[Update]:
        yield from self._hear()
        try:
            standings = self._standings()
            yield from self._take_out(machines, standings)
            yield from self._take_in(machines, standings)
            yield from self._retire(machines, standings)
            self._forget_the_gone()
        except ConfigError as error:
            if not self.run.state.services:
                raise  # nothing has ever been served in this way
            # A right that was taken away must not end what serves: the load balancer goes on with what it was told.
            if self.run.warn(f"went on without the load balancer: {error}"):
                yield self.run.update("warned", f"the load balancer can't be told of changes: {error}; going on")

    def _standings(self) -> dict[str, Standing]:
        try:
            return self.run.balancer.standings()
        except TransientError:
            self.run.balancer.open()  # one of ours may have died
            return self.run.balancer.standings()

    def _hear(self) -> Iterator[Update]:
        run, state = self.run, self.run.state
        for replica in self.book.news():
            before = self.replicas.get(replica.machine)
            self.replicas[replica.machine] = replica
            member = state.members.get(replica.machine)
            if member is None or member.outcome:
                continue
            where = {replica.machine: str(member.pool)}
            if replica.state == "draining" or (replica.at_risk and not (before and before.at_risk)):
                what = "drains" if replica.state == "draining" else "was recommended for rebalancing"
                yield run.update("notice", f"{replica.machine} {what}: {replica.why}".rstrip(": "), where)
            elif replica.state == "unhealthy":
                yield run.update("warned", f"{replica.machine} is not healthy: {replica.why}", where)
        run.leaving = {
            member.machine
            for member in state.living
            if member.machine in self.ends or member.machine in state.retiring or self._is_leaving(member)
        }

    def _is_leaving(self, member: Member) -> bool:
        replica = self.replicas.get(member.machine)
        return replica is not None and (replica.state == "draining" or replica.at_risk)

    # -- the load balancer --------------------------------------------------------------------------------------------

    def _may_serve(self, member: Member, machines: dict[str, Machine]) -> bool:
        replica, machine = self.replicas.get(member.machine), machines.get(member.machine)
        return (
            replica is not None
            and replica.state == "serving"
            and machine is not None
            and machine.state in ("pending", "running")
            and member.machine not in self.ends
            and member.machine not in self.run.state.retiring
        )

    def _take_in(self, machines: dict[str, Machine], standings: dict[str, Standing]) -> Iterator[Update]:
        run = self.run
        new: list[Endpoint] = []
        for member in run.state.living:
            standing = standings.get(member.machine)
            is_in = standing is not None and standing.state != "draining"
            if self._may_serve(member, machines) and not (is_in and member.machine in run.state.registered):
                new.append(self._endpoint(member))
        if new:
            run.register(new)
            pools = {one.machine: str(run.state.members[one.machine].pool) for one in new}
            names = ", ".join(f"{one.machine} at {one.address}:{one.port}" for one in new)
            yield run.update("registered", f"{len(new)} registered: {names}", machines=pools)

    def _take_out(self, machines: dict[str, Machine], standings: dict[str, Standing]) -> Iterator[Update]:
        run = self.run
        out: dict[str, str] = {}
        for machine in run.state.registered:
            member = run.state.members[machine]
            if member.outcome:
                out[machine] = f"{member.outcome}"
            elif not self._may_serve(member, machines) and machine in self.replicas:
                out[machine] = self._why_out(member)
        if out:
            run.deregister(out)
            pools = {machine: str(run.state.members[machine].pool) for machine in out}
            text = ", ".join(f"{machine} ({why})" for machine, why in out.items())
            yield run.update("deregistered", f"{len(out)} deregistered: {text}", machines=pools)

    def _why_out(self, member: Member) -> str:
        if member.machine in self.run.state.retiring:
            return "retired"
        replica = self.replicas[member.machine]
        return f"{replica.state}: {replica.why}" if replica.state != "serving" else "ended"

    def _endpoint(self, member: Member) -> Endpoint:
        replica = self.replicas[member.machine]
        return Endpoint(
            machine=member.machine,
            zone=member.pool.zone,
            address=replica.address,
            port=replica.port,
            health_port=replica.health_port,
        )

    # -- those that are at risk -----------------------------------------------------------------------------------------

    def _retire(self, machines: dict[str, Machine], standings: dict[str, Standing]) -> Iterator[Update]:
        """A replica that a rebalance recommendation was heard for leaves when others serve in its place."""
        run, state, now = self.run, self.run.state, self.run.driver.clock.now()
        for member in state.living:
            if member.machine in state.retiring:
                self._end_when_drained(member, standings.get(member.machine), now)
        up = {name for name in state.registered if name in standings and standings[name].state == "up"}
        if len(up - run.leaving) < run.job.replicas:
            return
        for machine in up & run.leaving:
            replica = self.replicas.get(machine)
            if replica and replica.at_risk and replica.state == "serving" and machine not in state.retiring:
                run.retire(machine, "a rebalance recommendation was heard, and its replacement serves")
                yield run.update(
                    "notice", f"{machine} retires: its replacement serves", {machine: str(state.members[machine].pool)}
                )

    def _end_when_drained(self, member: Member, standing: Standing | None, now: datetime) -> None:
        since, why = self.run.state.retiring[member.machine]
        heard = self._heard_of(member)
        if heard.asked or member.machine in self.run.state.registered:
            return
        drained = standing is None or standing.in_flight == 0  # None: the load balancer has let go of it
        if drained or now - since > timedelta(seconds=self.run.job.drain_seconds):
            heard.asked = ("moved", why)
            self.run.driver.terminate(member.machine, member.pool)

    def _forget_the_gone(self) -> None:
        state = self.run.state
        for machine, member in state.members.items():
            if member.outcome and machine not in self.removed:
                if endpoint := state.endpoint_of(machine):
                    self.run.balancer.remove(endpoint)
                self.book.forget(machine)
                self.replicas.pop(machine, None)
                self.removed.add(machine)
