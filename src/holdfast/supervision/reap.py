"""Machines that carry our tag and that no live run owns, and load balancers of runs that are over: the last of four nets."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from holdfast.drivers.protocol import Driver, Machine
from holdfast.errors import HoldfastError, NotFoundError, TransientError
from holdfast.runtime.contract import lease_key, store_tag
from holdfast.serving.haproxy import end_own, own_haproxies
from holdfast.storage import ObjectStore
from holdfast.supervision.ownership import Ownership

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    machine: str
    run_id: str
    pool: str
    why: str


def reap(driver: Driver, store: ObjectStore) -> list[Reaped]:
    """Terminate every machine of this store's runs whose run has no live owner and whose lease is over.

    Maintained fleets first: what is left of one would be replaced. Machines of other stores are left alone: their leases
    can't be read from here. One machine that can't be judged or ended, and one cloud that can't be asked, do not keep the
    others alive; raises TransientError for it when they have had their turn.
    """
    reaped: list[Reaped] = []
    failures: list[str] = []
    tags = {"holdfast-store": store_tag(store.url)}
    for fleet in _asked("fleets", lambda: driver.fleets(tags), failures):
        run_id = fleet.tags.get("holdfast-run", "")
        try:
            if why := _why_orphaned(run_id, driver, store):
                driver.end_fleet(fleet.token, fleet.region)
                log.warning("orphan ended fleet=%s why=%s", fleet.token, why)
                reaped.append(Reaped(machine=f"fleet {fleet.token}", run_id=run_id, pool=fleet.region, why=why))
        except (HoldfastError, OSError, ValueError, KeyError) as error:
            log.error("fleet=%s can't be judged or ended: %r", fleet.token, error)
            failures.append(f"fleet {fleet.token}: {error!r}")
    clouds = driver.name.split("+")
    listed = [_asked(name, lambda name=name: driver.machines(tags, cloud=name), failures) for name in clouds]
    for machine in itertools.chain.from_iterable(listed):
        if machine.state == "terminated":
            continue
        try:
            if why := _why_orphaned(_run_of(machine), driver, store):
                driver.terminate(machine.id, machine.pool)
                log.warning("orphan terminated machine=%s why=%s", machine.id, why)
                reaped.append(Reaped(machine=machine.id, run_id=_run_of(machine), pool=str(machine.pool), why=why))
        except (HoldfastError, OSError, ValueError, KeyError) as error:
            log.error("machine=%s can't be judged or ended: %r", machine.id, error)
            failures.append(f"{machine.id}: {error!r}")
    reaped += _load_balancers(driver, store, failures)
    if failures:
        raise TransientError(f"{len(failures)} machines or fleets can't be judged or ended: {'; '.join(failures)}")
    return reaped


def _load_balancers(driver: Driver, store: ObjectStore, failures: list[str]) -> Iterator[Reaped]:
    """An haproxy of this computer that a serving run of this store has started, and nobody will end any more."""
    for own in own_haproxies():
        if own.store_url != store.url:
            continue
        try:
            if why := _why_orphaned(own.run_id, driver, store):
                end_own(own.record)
                log.warning("orphan ended haproxy of run=%s why=%s", own.run_id, why)
                yield Reaped(machine=f"haproxy of {own.run_id}", run_id=own.run_id, pool="this computer", why=why)
        except (HoldfastError, OSError, ValueError, KeyError) as error:
            log.error("haproxy of run=%s can't be judged or ended: %r", own.run_id, error)
            failures.append(f"haproxy of {own.run_id}: {error!r}")


def _asked(what: str, ask: Callable[[], Sequence[T]], failures: list[str]) -> Sequence[T]:
    try:
        return ask()
    except HoldfastError as error:
        log.error("%s can't be listed: %r", what, error)
        failures.append(f"{what}: {error!r}")
        return []


def _why_orphaned(run_id: str, driver: Driver, store: ObjectStore) -> str:
    if Ownership(store, run_id).has_live_owner():
        return ""
    try:
        lease = json.loads(store.get(lease_key(run_id)))
    except NotFoundError:
        return "its run has no lease and no owner"
    expires_at = datetime.fromisoformat(lease["expires_at"])
    if driver.clock.now() < expires_at:
        return ""  # the owner may be on its way back: the lease is what a dead one leaves its machine
    return f"its run's lease ended at {expires_at.isoformat()} and nobody owns the run"


def _run_of(machine: Machine) -> str:
    return machine.tags.get("holdfast-run", "")
