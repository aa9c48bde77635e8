"""Does it work, what is missing, what will it cost: asked before anything runs. Nothing is launched."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from holdfast.drivers.protocol import Driver, Finding, Offer, ProvisioningModel
from holdfast.errors import AlreadyExistsError, ConfigError, HoldfastError
from holdfast.model import FleetJob, GangJob, TrainingJob
from holdfast.placement.policy import Situation, rank
from holdfast.storage import ObjectStore
from holdfast.supervision.preflight import code_problems, fitting_offers, unreachable
from holdfast.supervision.training_run import FIRST_GUESS_RESTART_SECONDS, FIRST_GUESS_SAVE_SECONDS
from holdfast.supervision.windows import examine_windows

POOLS_SHOWN = 5

Opened = TypeVar("Opened")
AnyJob = TrainingJob | FleetJob | GangJob


def examine(
    open_store: Callable[[], ObjectStore], open_driver: Callable[[], Driver], job: AnyJob | None = None
) -> Iterator[Finding]:
    """The store; the account, or several as one; whether the one's machines reach the other, and how fast; the job."""
    store, of_store = _opened("store", open_store, _examine_store)
    works = True
    for finding in of_store:
        works = works and finding.ok
        yield finding
    driver, of_account = _opened("account", open_driver, lambda driver: driver.examine())
    yield from of_account
    if store and driver:
        yield from (Finding(subject="store", ok=False, detail=why) for why in unreachable(store.url, driver.name))
    if store and works:
        yield from examine_windows(store, driver.name if driver else "", job)
    if driver and job:
        yield from examine_job(job, driver)


def examine_account(open_driver: Callable[[], Driver]) -> Iterator[Finding]:
    """What the driver says of its account, or why it can't be had."""
    return _opened("account", open_driver, lambda driver: driver.examine())[1]


def examine_store(open_store: Callable[[], ObjectStore]) -> Iterator[Finding]:
    """Every right that a run needs of its store, tried one by one on a probe object that is deleted again."""
    return _opened("store", open_store, _examine_store)[1]


def _opened(
    subject: str, open_it: Callable[[], Opened], look: Callable[[Opened], Iterator[Finding]]
) -> tuple[Opened | None, Iterator[Finding]]:
    try:
        opened = open_it()
    except HoldfastError as error:
        return None, iter([Finding(subject=subject, ok=False, detail=str(error))])
    return opened, look(opened)


def _examine_store(store: ObjectStore) -> Iterator[Finding]:
    key = f"probes/{secrets.token_hex(8)}"

    def conditional_write() -> None:
        try:
            store.create(key, b"holdfast")
        except AlreadyExistsError:
            return
        raise ConfigError("a key that exists was written again: the store has no conditional writes; use another")

    def read() -> None:
        if store.get(key) != b"holdfast":
            raise ConfigError("other bytes came back than were written")

    yield Finding(subject="store", ok=True, detail=store.url)
    for subject, act in (
        ("store write", lambda: store.create(key, b"holdfast")),
        ("store conditional write", conditional_write),
        ("store read", read),
        ("store list", lambda: store.list(key)),
        ("store delete", lambda: store.delete(key)),
    ):
        try:
            act()
            yield Finding(subject=subject, ok=True, detail="works")
        except (HoldfastError, OSError) as error:
            yield Finding(subject=subject, ok=False, detail=str(error))
            if subject == "store write":
                return  # the rest would only say the same again


def examine_job(job: AnyJob, driver: Driver) -> Iterator[Finding]:
    """Whether the job's code can be sent, which pools fit, and what an hour and the worst case cost."""
    problems = code_problems(job, driver)
    yield Finding(subject="code", ok=not problems, detail="; ".join(problems) or str(job.code))
    try:
        offers = fitting_offers(job.resources, driver.offers())
    except HoldfastError as error:
        yield Finding(subject="pools", ok=False, detail=str(error))
        return
    for model in _models(job):
        ranked = _ranked([offer for offer in offers if offer.pool.provisioning_model == model], driver)
        if not ranked:
            yield Finding(subject=f"{model} pools", ok=False, detail="none fits the job's resources; ask for less")
            continue
        shown = "; ".join(f"{offer.pool} ${offer.usd_per_hour:.4f}/h" for offer in ranked[:POOLS_SHOWN])
        rest = f"; and {len(ranked) - POOLS_SHOWN} more" if len(ranked) > POOLS_SHOWN else ""
        yield Finding(subject=f"{model} pools", ok=True, detail=shown + rest)
    yield _cost(job, _ranked(offers, driver))
    if isinstance(job, GangJob):
        yield Finding(subject="ports", ok=True, detail=_ports(driver.name))


def _models(job: AnyJob) -> list[ProvisioningModel]:
    """Those that the job may use; a fleet falls back to on-demand when spot fails."""
    if isinstance(job, TrainingJob):
        return ["spot", "on-demand"] if job.provisioning == "spot-then-on-demand" else [job.provisioning]
    return ["spot", "on-demand"] if job.spot_share else ["on-demand"]


def _ports(clouds: str) -> str:
    if clouds == "local":
        return "its members are one computer's: nothing is closed between them"
    return (
        "its members must reach each other on every TCP port, which can't be seen from here: 'Machines of a gang' in "
        + " and ".join(f"docs/{cloud}.md" for cloud in clouds.split("+") if cloud != "local")
    )


def _cost(job: AnyJob, offers: Sequence[Offer]) -> Finding:
    wanted = _models(job)[0]
    best = next((offer for offer in offers if offer.pool.provisioning_model == wanted), offers[0])
    dearest = max(offers, key=lambda offer: offer.on_demand_usd_per_hour)
    worst, highest = (one.on_demand_usd_per_hour * job.max_run_hours for one in (best, dearest))
    detail = (
        f"${best.usd_per_hour:.4f} an hour{_each(job)} in {best.pool} (on demand ${best.on_demand_usd_per_hour:.4f}); max_run_hours "
        f"{job.max_run_hours:g} at the on-demand price: ${worst:.2f}"
    )
    if highest > worst:
        detail += f", and ${highest:.2f} if only {dearest.pool.instance_type}, the dearest that fits, were to be had"
    return Finding(subject="cost", ok=True, detail=detail)


def _each(job: AnyJob) -> str:
    return "" if isinstance(job, TrainingJob) else f" for each of {job.machines} machines"


def _ranked(offers: Sequence[Offer], driver: Driver) -> list[Offer]:
    return rank(
        offers,
        Situation(
            now=driver.clock.now(),
            offers=offers,
            attempts=[],
            provisioning="spot",
            failed_spot_attempts_to_fall_back=1,
            max_attempts=1,
            restart_seconds=FIRST_GUESS_RESTART_SECONDS,
            save_seconds=FIRST_GUESS_SAVE_SECONDS,
        ),
    )


def to_text(findings: Iterable[Finding]) -> str:
    """One line each, what is wrong marked; for a terminal or a log."""
    found = list(findings)
    width = max((len(finding.subject) for finding in found), default=0)
    lines = [f"{_mark(one)}  {one.subject:<{width}}  {one.detail}" for one in found]
    missing = sum(not finding.ok for finding in found)
    return "\n".join([*lines, "", f"{missing} of {len(found)} are missing" if missing else "everything works"])


def _mark(finding: Finding) -> str:
    if not finding.ok:
        return "MISSING"
    return "warning" if finding.warning else "ok     "
