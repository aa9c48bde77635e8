"""What a machine fetches at boot: the user's code, the agent's orders, and Holdfast itself, in one archive."""

from __future__ import annotations

import fnmatch
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import holdfast
from holdfast.errors import AlreadyExistsError, ConfigError
from holdfast.model import GangJob, Job, ServeJob, TrainingJob
from holdfast.runtime.fetch import object_url
from holdfast.serving.balancer import SETTLE_SECONDS
from holdfast.storage import ObjectStore

IGNORE_FILE = ".holdfastignore"
ALWAYS_IGNORED = ("__pycache__", "*.pyc", "node_modules", "*.egg-info")
MAX_CODE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bundle:
    url: str
    """With the query of the store's URL: region and endpoint are the machine's to know."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Vendored:
    """A package that a machine may lack, ready to be the beginning of any bundle."""

    version: str
    member: bytes
    """gzip of tar entries without the archive's end: whatever is appended makes one archive of both (RFC 1952, 2.2)."""


def upload_bundle(job: Job, store: ObjectStore, run_id: str) -> Bundle:
    """Pack and store the bundle of a run; the same content has the same name. Raises ConfigError, TransientError."""
    needs_obstore = urlsplit(store.url).scheme != "file"
    data = pack(job, obstore() if needs_obstore else None)
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"runs/{run_id}/bundles/{sha256[:16]}.tar.gz"
    try:
        store.create(key, data)
    except AlreadyExistsError:
        pass
    return Bundle(object_url(store.url, key), sha256)


@functools.cache
def obstore() -> Vendored:
    """This computer's obstore, below vendor/<its platform>/: 16 MB, so compressed once per process. Raises ConfigError."""
    spec = importlib.util.find_spec("obstore")
    if spec is None or spec.origin is None:
        raise ConfigError("a store in a cloud needs the package obstore; install holdfast[aws] or holdfast[gcp]")
    folder = Path(spec.origin).parent
    entries = io.BytesIO()
    with tarfile.open(fileobj=entries, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".so"):
                name = f"vendor/{sysconfig.get_platform()}/obstore/{path.relative_to(folder).as_posix()}"
                _add(archive, name, path.read_bytes(), 0o644)
        end = archive.offset
    member = gzip.compress(entries.getvalue()[:end], compresslevel=6, mtime=0)
    return Vendored(importlib.metadata.version("obstore"), member)


def pack(job: Job, vendored: Vendored | None = None) -> bytes:
    """A reproducible tar.gz with code/, lib/holdfast/, agent.json and what is `vendored`. Raises ConfigError."""
    buffer = io.BytesIO()
    if vendored:
        buffer.write(vendored.member)
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        lock_file = job.environment.requirements and os.path.normpath(job.environment.requirements)
        packed = set()
        for path, name in _code_files(Path(job.code)):
            packed.add(name)
            _add(archive, f"code/{name}", path.read_bytes(), path.stat().st_mode & 0o755)
        if lock_file and lock_file not in packed:
            raise ConfigError(
                f"environment.requirements: {job.environment.requirements!r} is not among the files of {job.code!r} that are "
                f"sent; correct the name, or what {IGNORE_FILE} says of it"
            )
        package = Path(holdfast.__file__).parent
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".sh"):
                _add(archive, f"lib/holdfast/{path.relative_to(package).as_posix()}", path.read_bytes(), 0o644)
        _add(archive, "agent.json", json.dumps(_agent_orders(job, vendored)).encode(), 0o644)
    return buffer.getvalue()


def _agent_orders(job: Job, vendored: Vendored | None) -> dict[str, object]:
    if job.script:
        command = [job.script]
    elif job.module:
        command = ["-m", job.module]
    else:
        command = list(job.command)
    return {
        "python": not job.command,
        "command": [*command, *job.args],
        "env": job.env,
        "notice_poll_seconds": job.notice_poll_seconds,
        "requirements": job.environment.requirements,
        "container": job.environment.container,
        "gang": isinstance(job, GangJob),
        "serving": _serving_orders(job) if isinstance(job, ServeJob) else None,
        "processes_per_machine": job.processes_per_machine if isinstance(job, TrainingJob | GangJob) else 1,
        "obstore": vendored.version if vendored else "",
    }


def _serving_orders(job: ServeJob) -> dict[str, object]:
    orders = job.model_dump(include={"port", "health_path", "health_port", "drain_seconds", "startup_seconds"})
    return {**orders, "settle_seconds": SETTLE_SECONDS[job.load_balancer.kind]}


def check_code(folder: Path) -> None:
    """Raises ConfigError when the code folder can't be sent: too large, or a link leads out of it."""
    for _ in _code_files(folder):
        pass


def _code_files(folder: Path) -> Iterator[tuple[Path, str]]:
    ignore_file = folder / IGNORE_FILE
    patterns = [*ALWAYS_IGNORED]
    if ignore_file.is_file():
        patterns += [line.strip().rstrip("/") for line in ignore_file.read_text().splitlines() if line.strip()]
    total = 0
    for parent, folders, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _ignored(relative / name, patterns))
        for name in sorted(names):
            path = Path(parent, name)
            if _ignored(relative / name, patterns) or not path.is_file():
                continue
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"code: {(relative / name).as_posix()} is a link to {path.resolve()}, outside the code folder; copy "
                    f"the file, or list the link in {IGNORE_FILE}"
                )
            total += path.stat().st_size
            if total > MAX_CODE_BYTES:
                raise ConfigError(
                    f"code: {folder} holds more than {MAX_CODE_BYTES >> 20} MiB; name a smaller folder, "
                    f"or list what the program does not need in {IGNORE_FILE}"
                )
            yield path, (relative / name).as_posix()


def _ignored(relative: Path, patterns: list[str]) -> bool:
    name = relative.name
    return name.startswith(".") or any(
        fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(relative.as_posix(), pattern) for pattern in patterns
    )


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    archive.addfile(info, io.BytesIO(data))
