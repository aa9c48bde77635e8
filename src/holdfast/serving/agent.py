"""The agent of a replica: starts the model server, says whether it is well, and drains it before the machine goes."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, TransientError
from holdfast.runtime import contract
from holdfast.runtime.agent import Agent, log
from holdfast.runtime.logs import LogShipper
from holdfast.runtime.metadata import own_address
from holdfast.serving.connections import connections_to, free_port
from holdfast.serving.health import Prober, answer_health
from holdfast.serving.replicas import Replica, ReplicaBook, ReplicaState

PORT_IN_ARGUMENTS = "{port}"
QUIET_WALL_SECONDS = 1.0
"""No connection for so long, and no request is in flight: between two of one client there may be a moment without."""
STOP_SECONDS = 5.0
"""Of a notice, for the server's own end, and never more than a fifth of it."""
ILL_WALL_SECONDS = 60.0
"""A server that was healthy and is not for so long is replaced."""
WRITE_AGAIN_WALL_SECONDS = 1.0


class ServeAgent(Agent):
    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.orders: dict[str, Any] = self.config["serving"]
        self.member = self.of_member[contract.MEMBER]
        self.address = own_address(self.clock)
        self.port, self.health_port = self.orders["port"], self.orders["health_port"]
        if ipaddress.ip_address(self.address).is_loopback:  # machines that are one computer
            self.port = free_port()
            self.health_port = free_port((self.port,))
        self.of_member |= {contract.PORT: str(self.port)}
        self.prober = Prober(self.port, self.orders["health_path"])
        self.book = ReplicaBook(self.store, self.run_id)
        self._published: Replica | None = None
        self._next_write = 0.0
        self._draining_since = self._quiet_since = 0.0
        self._told_to_stop = self._was_healthy = False
        self._given_up = ""

    def _carry_out(self) -> None:
        try:
            page = answer_health(self.address, self.health_port, self._verdict)
        except OSError as error:
            raise ConfigError(
                f"health_port {self.health_port} can't be had on the machine: {error}; choose another"
            ) from error
        self._started = time.monotonic()
        self.prober.start()
        try:
            super()._carry_out()
        finally:
            self.prober.stop()
            page.shutdown()

    def _command(self) -> list[str]:
        return [part.replace(PORT_IN_ARGUMENTS, str(self.port)) for part in super()._command()]

    # -- what is said of it -------------------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        return self.notice is not None and self.notice.kind != "rebalance"

    def _verdict(self) -> tuple[bool, str]:
        """For the load balancer. Any thread may ask."""
        state = self._state()
        return state == "serving", f"{state}: {self._why(state)}".rstrip(": ")

    def _state(self) -> ReplicaState:
        if self.is_leaving:
            return "draining"
        if self.prober.healthy_since:
            return "serving"
        return "unhealthy" if self._was_healthy else "starting"

    def _why(self, state: ReplicaState) -> str:
        notice = self.notice
        if state == "draining" and notice:
            return f"{notice.kind}, until {notice.reclaim_at:%H:%M:%S}" if notice.reclaim_at else notice.kind
        return "" if state == "serving" else self.prober.said

    def _publish(self) -> None:
        """Say in the store what has changed; what it does not take now is said again soon."""
        state = self._state()
        self._was_healthy |= state == "serving"
        at_risk = self.notice is not None and self.notice.kind == "rebalance"
        last = self._published
        if (last and (last.state, last.at_risk) == (state, at_risk)) or time.monotonic() < self._next_write:
            return
        replica = Replica(
            machine=self.member,
            address=self.address,
            port=self.port,
            health_port=self.health_port,
            state=state,
            at_risk=at_risk,
            why=self._why(state),
            at=self.clock.now().isoformat(),
        )
        try:
            self.book.write(replica)
            self._published = replica
            self._mark(f"replica-{state}")
        except (TransientError, ConfigError) as error:
            self._next_write = time.monotonic() + WRITE_AGAIN_WALL_SECONDS
            log.warning("state of the replica not stored error=%s", error)

    # -- while the server runs ----------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        self._publish()
        if self.is_leaving:
            if self._draining_since and not self._told_to_stop and self._may_stop():
                self._told_to_stop = True
                self._mark("server-stopping")
                self._signal_program(signal.SIGTERM)
            return
        if self.prober.healthy_since or self._given_up:
            return
        ill = time.monotonic() - self.prober.ill_since
        startup = self.orders["startup_seconds"]
        if self._was_healthy and ill > ILL_WALL_SECONDS:
            self._give_up(f"the server was not healthy for {ill:.0f} s: {self.prober.said}")
        elif not self._was_healthy and (time.monotonic() - self._started) * self.clock.speed > startup:
            self._give_up(f"the server was not healthy within startup_seconds, {startup:g}: {self.prober.said}")

    def _give_up(self, why: str) -> None:
        self._given_up = why
        log.error("%s", why)
        self._kill_program()

    def _ask_program_to_leave(self) -> None:
        """Not yet: first its requests in flight."""
        self._draining_since = self._quiet_since = time.monotonic()

    def _may_stop(self) -> bool:
        """Nothing is in flight and nothing comes any more, or time is up."""
        now = time.monotonic()
        if not self._was_healthy or self.clock.now() >= self._stop_at():
            return True
        if not self.prober.in_a_probe and connections_to(self.port):
            self._quiet_since = now
        # A load balancer that has not heard of the notice yet may be between two requests.
        return (
            now - self._draining_since > self.orders["settle_seconds"] and now - self._quiet_since > QUIET_WALL_SECONDS
        )

    def _stop_at(self) -> datetime:
        notice = self.notice
        assert notice
        by_job = notice.seen_at + timedelta(seconds=self.orders["drain_seconds"])
        if notice.reclaim_at is None:
            return by_job
        window = max(timedelta(0), notice.reclaim_at - notice.seen_at)
        return min(by_job, notice.reclaim_at - min(timedelta(seconds=STOP_SECONDS), 0.2 * window))

    def _end(self, logs: LogShipper) -> dict[str, Any]:
        ending = super()._end(logs)
        with contextlib.suppress(OSError):  # a console that is gone
            print(f"holdfast: the server ended with status {ending['exit_status']}", flush=True)
        if ending["outcome"] == "preempted":
            return ending
        tail = ending["log_tail"]
        if self._was_healthy:  # it served: another may serve again
            why = self._given_up or f"the server ended by itself with status {ending['exit_status']}"
            return {**ending, "outcome": "lost", "detail": f"{why}:\n{tail}"}
        words = self._given_up or "the server ended before it was healthy"
        return {**ending, "outcome": "program-failed", "log_tail": f"{tail}\n{words}"}
