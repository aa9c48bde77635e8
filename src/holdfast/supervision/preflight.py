"""Everything that can be known to be wrong before a cent is spent, in one message."""

from __future__ import annotations

import ast
import difflib
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from holdfast.drivers.protocol import Driver, Offer
from holdfast.drivers.several import SomeOffers
from holdfast.errors import ConfigError, HoldfastError
from holdfast.market.catalogue import hint
from holdfast.model import Environment, Job, Resources
from holdfast.storage import ObjectStore
from holdfast.supervision.bundle import check_code

IMPORT_SECONDS = 120.0


def check_job(job: Job, driver: Driver) -> list[Offer]:
    """The offers that fit the job. Raises ConfigError that names every field, value and remedy at once."""
    driver.check()
    problems = code_problems(job, driver)
    offers: list[Offer] = []
    asked: Sequence[Offer] = []
    try:
        asked = driver.offers()
        offers = fitting_offers(job.resources, asked)
    except ConfigError as error:
        if isinstance(asked, SomeOffers):
            raise asked.missing from error
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return offers


def code_problems(job: Job, driver: Driver) -> list[str]:
    """What is wrong with the job's folder, program and packages: field, value and remedy of each."""
    # A program that brings its own packages can't be asked for by this computer's.
    own_packages = job.environment != Environment()
    problems = list(_program_problems(job, None if own_packages else driver.image_python))
    problems += _environment_problems(job)
    try:
        check_code(Path(job.code))
    except ConfigError as error:
        problems.append(str(error))
    return problems


def check_store(store: ObjectStore) -> None:
    """Raises ConfigError unless the store can be written, read and tidied."""
    key = f"probes/{secrets.token_hex(8)}"
    try:
        store.create(key, b"holdfast")
        if store.get(key) != b"holdfast":
            raise ConfigError(f"store {store.url!r} returned other bytes than were written")
        store.delete(key)
    except (HoldfastError, OSError) as error:
        raise ConfigError(
            f"store: {store.url!r} can't be used: {error}; make it writable for this user, or name another"
        ) from error


def unreachable(store_url: str, driver_name: str) -> Iterator[str]:
    """Why machines of these clouds could not reach the store. `driver_name`: a driver's, as `aws` or `aws+gcp`."""
    clouds = driver_name.split("+")
    parts = urlsplit(store_url)
    if parts.scheme in ("", "file") and (far := [cloud for cloud in clouds if cloud != "local"]):
        yield (
            f"{store_url} is a folder of this computer, which machines of {' and '.join(far)} can't reach; name the block of "
            "a store in a bucket (--store)"
        )
    if parts.scheme == "gs" and "aws" in clouds:
        yield f"machines of aws can't reach {store_url}: runs over both clouds need a store on S3 (docs/aws.md)"
    if parts.scheme == "s3" and "gcp" in clouds and "role" not in parse_qs(parts.query):
        yield f"machines of gcp have no way into {store_url}: set machine_role in the store's block (docs/aws.md)"


def check_reachable(store_url: str, driver_name: str) -> None:
    """Raises ConfigError when the machines that would be bought could not reach the store."""
    if problems := list(unreachable(store_url, driver_name)):
        raise ConfigError("store: " + "; ".join(problems))


def fitting_offers(resources: Resources, offers: Sequence[Offer]) -> list[Offer]:
    """Raises ConfigError for names the account does not know, and when nothing fits."""
    problems = [
        *_unknown("resources.instance_types", resources.instance_types, {offer.pool.instance_type for offer in offers}),
        *_unknown("resources.regions", resources.regions, {offer.pool.region for offer in offers}),
        *_unknown("resources.zones", resources.zones, {offer.pool.zone for offer in offers}),
        *_unknown("resources.gpu_name", [resources.gpu_name] * bool(resources.gpu_name), {o.gpu_name for o in offers}),
    ]
    clouds = {offer.pool.cloud for offer in offers}
    if problems:
        if resources.gpu_name and all(offer.gpu_name != resources.gpu_name for offer in offers):
            problems += filter(None, [hint(resources, clouds)])
        raise ConfigError("; ".join(problems))
    fit = [
        offer
        for offer in offers
        if (not resources.instance_types or offer.pool.instance_type in resources.instance_types)
        and (not resources.regions or offer.pool.region in resources.regions)
        and (not resources.zones or offer.pool.zone in resources.zones)
        and offer.vcpus >= resources.vcpus
        and offer.memory_gib >= resources.memory_gib
        and offer.gpus >= resources.gpus
        and resources.gpu_name in ("", offer.gpu_name)
    ]
    if not fit:
        asked = resources.model_dump(exclude_defaults=True)
        raise ConfigError(
            f"resources: no machine of the account has all of {asked}; they contradict each other here: ask for less, "
            "or drop one of them" + "".join(f"; {words}" for words in [hint(resources, clouds)] if words)
        )
    return fit


def _unknown(field: str, names: Iterable[str], known: set[str]) -> Iterable[str]:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known - {''}))}"
            yield f"{field}: the account has no {name!r}; {hint}"


def _program_problems(job: Job, image_python: Path | None) -> Iterable[str]:
    code = Path(job.code)
    if not code.is_dir():
        yield f"code: {job.code!r} is no folder; name the one that holds the program"
    elif job.script:
        yield from _script_problems(code, job.script, image_python)
    elif job.module and image_python:
        yield from _import_problems(code, job.module, image_python)
    elif job.command and image_python and not (code / job.command[0]).is_file() and not shutil.which(job.command[0]):
        yield f"command: {job.command[0]!r} is neither a file in {job.code!r} nor a program on the path; correct it"


def _environment_problems(job: Job) -> Iterable[str]:
    lock_file = job.environment.requirements
    if not lock_file:
        return
    code, path = Path(job.code), Path(job.code, lock_file)
    if not path.resolve().is_relative_to(code.resolve()):
        yield f"environment.requirements: {lock_file!r} lies outside the code folder {str(code)!r}; name one below it"
    elif not path.is_file():
        yield f"environment.requirements: {lock_file!r} does not exist in {str(code)!r}; name a file below the code folder"


def _script_problems(code: Path, script: str, image_python: Path | None) -> Iterable[str]:
    path = code / script
    if not path.resolve().is_relative_to(code.resolve()):
        yield f"script: {script!r} lies outside the code folder {str(code)!r}; name one below it"
    elif not path.is_file():
        near = difflib.get_close_matches(script, [p.relative_to(code).as_posix() for p in code.rglob("*.py")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name a file below the code folder"
        yield f"script: {script!r} does not exist in {str(code)!r}; {hint}"
    else:
        try:
            tree = ast.parse(path.read_bytes(), filename=script)
        except SyntaxError as error:
            yield f"script: {script!r} line {error.lineno} is not Python: {error.msg}; correct it"
            return
        if image_python:
            yield from _missing_imports(code, script, tree, image_python)


def _missing_imports(code: Path, script: str, tree: ast.Module, image_python: Path) -> Iterable[str]:
    """Packages that a script imports at its top and that the machine's Python does not have. Nothing is executed."""
    wanted: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                wanted.setdefault(alias.name.partition(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            wanted.setdefault(node.module.partition(".")[0], node.lineno)
    folders = [(code / script).parent, code]
    names = [name for name in wanted if not any((f / name).exists() or (f / f"{name}.py").exists() for f in folders)]
    find = (
        "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if n != 'holdfast' and not u.find_spec(n)])"
    )
    found = subprocess.run([str(image_python), "-c", find, *names], capture_output=True, text=True, cwd=code)
    for name in found.stdout.split():
        yield f"script: {script!r} line {wanted[name]} imports {name!r}, which the machine's Python does not have; add it"


def _import_problems(code: Path, module: str, image_python: Path) -> Iterable[str]:
    try:
        tried = subprocess.run(
            [str(image_python), "-c", "import importlib, sys; importlib.import_module(sys.argv[1])", module],
            capture_output=True,
            text=True,
            cwd=code,
            timeout=IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield f"module: importing {module!r} took over {IMPORT_SECONDS:.0f} s; guard its work by __name__ == '__main__'"
        return
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        yield f"module: {module!r} does not import from {str(code)!r}: {last}; correct it"
