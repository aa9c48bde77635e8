"""Opening a batch job's run: everything that can be wrong is found before anything is launched."""

from __future__ import annotations

import ast
import difflib
import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from holdfast.drivers.protocol import Driver
from holdfast.errors import AlreadyExistsError, ConfigError, HoldfastError, NotFoundError, TransientError
from holdfast.ledger.budget import Budget
from holdfast.model import BatchJob
from holdfast.queues.address import redacted
from holdfast.storage import ObjectStore
from holdfast.supervision.batch_run import BatchRun
from holdfast.supervision.fleet_opening import checked_run_id, refuse_what_can_not_go_on
from holdfast.supervision.plan import refuse_a_past_deadline
from holdfast.supervision.preflight import check_job, check_store


def open_batch_run(
    job: BatchJob, driver: Driver, store: ObjectStore, budget: Budget | None = None, run_id: str = ""
) -> BatchRun:
    """Check everything that can be wrong, then return the run, to be entered. Nothing is launched before, and nothing
    written but whose the results' place is, and what a broker needs for a new queue.

    Raises ConfigError with every problem in one message; entering raises RunTakenError when another process has it.
    """
    run_id = checked_run_id(run_id, job, driver)
    if problems := [*function_problems(job), *input_problems(job, driver), *queue_problems(job, driver)]:
        raise ConfigError("; ".join(problems))
    check_store(store)
    check_job(job, driver)
    run = BatchRun(job, driver, store, budget, run_id)
    refuse_what_can_not_go_on(run, budget)
    now = driver.clock.now()
    if run.state.state == "new" and (
        deadline_at := job.deadline_at(now)
    ):  # one that has begun is done late, if need be
        refuse_a_past_deadline(deadline_at, now)
    check_queue(run)
    claim_results(run)
    return run


def function_problems(job: BatchJob) -> Iterator[str]:
    """Looked for in the files of the code folder: a user's module is never run here."""
    for field, named in (("function", job.function), ("setup", job.setup)):
        if not named or not Path(job.code).is_dir():
            continue
        module, _, name = named.partition(":")
        path = Path(job.code, *module.split("."))
        file = next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)
        if file is None:
            known = {one.relative_to(job.code).with_suffix("").as_posix().replace("/", ".") for one in _modules(job)}
            yield f"{field}: no module {module!r} in {job.code!r}; {_hint(module, known)}"
            continue
        try:
            tree = ast.parse(file.read_bytes(), filename=str(file))
        except (SyntaxError, ValueError) as error:
            yield f"{field}: {file} is not Python: {error}; correct it"
            continue
        names = set(_names_in(tree.body))
        if "*" not in names and name not in names:
            yield f"{field}: {file} defines no {name!r}; {_hint(name, names)}"


def _modules(job: BatchJob) -> Iterable[Path]:
    return Path(job.code).rglob("*.py")


def _hint(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "name one that is there"


def _names_in(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Every name that the statements of a module bind; `*` where they don't say which."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)
            case ast.Assign() | ast.AnnAssign() | ast.With() | ast.For():
                yield from (one.id for one in ast.walk(node) if isinstance(one, ast.Name) and _is_bound(one))
            case ast.If() | ast.Try():
                yield from _names_in([*node.body, *node.orelse, *getattr(node, "finalbody", [])])
                for handler in getattr(node, "handlers", []):
                    yield from _names_in(handler.body)


def _is_bound(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def input_problems(job: BatchJob, driver: Driver) -> Iterator[str]:
    """Of files on this computer; what is elsewhere is looked at by the planner, before any machine is launched."""
    far = [cloud for cloud in driver.name.split("+") if cloud != "local"]
    for named in job.inputs:
        if "://" in named:
            continue
        if far:
            yield f"inputs: {named!r} is on this computer, which machines of {' and '.join(far)} can't reach; name a bucket"
            continue
        found = [Path(one) for one in glob.glob(os.path.expanduser(named), recursive=True)]
        files = [one for one in found if one.is_file()]
        files += [one for folder in found if folder.is_dir() for one in folder.rglob("*") if one.is_file()]
        if not files:
            yield f"inputs: {named!r} names no file; correct it, from {os.getcwd()!r}"
        elif not any(one.stat().st_size for one in files):
            yield f"inputs: {named!r} names only empty files; name some that hold records"


def queue_problems(job: BatchJob, driver: Driver) -> Iterator[str]:
    far = [cloud for cloud in driver.name.split("+") if cloud != "local"]
    url = urlsplit(job.queue.removeprefix("store+"))
    here = url.scheme in ("sqlite", "file") or url.hostname in ("localhost", "127.0.0.1", "::1")
    if far and here:
        yield (
            f"queue: {redacted(job.queue)} is on this computer, which machines of {' and '.join(far)} can't reach; name a "
            "broker that they reach, or leave it empty: then the store is the queue"
        )


def check_queue(run: BatchRun) -> None:
    """Raises ConfigError for a broker that does not answer."""
    try:
        run.queue.depth()
    except (TransientError, OSError) as error:
        raise ConfigError(f"{error}; start it, or name another queue") from error


def claim_results(run: BatchRun) -> None:
    """One place holds the results of one job. Raises ConfigError when it holds anything else."""
    key, mine = run.prefix + "/job.json", {"job": run.job.name, "fingerprint": run.fingerprint}
    where = f"results: {run.prefix!r} in {run.store.url!r}"
    try:
        there = json.loads(run.store.get(key))
    except NotFoundError:
        if run.store.list(run.prefix + "/"):
            raise ConfigError(f"{where} holds something that is no batch job's; name an empty place") from None
        try:
            run.store.create(key, json.dumps(mine).encode())
            return
        except AlreadyExistsError:
            there = json.loads(run.store.get(key))
    except (HoldfastError, ValueError) as error:
        raise ConfigError(f"{where} can't be read: {error}; name another place") from error
    if there != mine:
        raise ConfigError(
            f"{where} holds the results of another job, {there.get('job')!r}, or of this one as it was before it was "
            "changed; name an empty place"
        )
