"""A directory with the semantics of an object store."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from holdfast.errors import AlreadyExistsError, NotFoundError, TransientError
from holdfast.storage.direct_io import read_direct, write_chunks
from holdfast.storage.keys import STAGED_SUFFIX, check_key, is_key
from holdfast.storage.protocol import Data, ObjectInfo
from holdfast.storage.spare import Spare

ABANDONED_SECONDS, UNLOCKED_SECONDS = 24 * 3600.0, 120.0
"""What a killed writer left half-written is removed when it has not grown for so long; the shorter time is for what
nobody has locked. Locks alone don't tell: on some network file systems other machines don't see them.
"""
LARGE_BYTES = 1024 * 1024
"""An object whose first chunk is as large is written over a spare file, where there is one."""


class DirectoryStore:
    """Objects are files below `root`. A write is staged beside its key, synced, then linked or renamed into place.

    Several processes may share a root; it must be on one file system that has hard links (every local Linux and
    macOS one has; NFSv3 and later too).
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.url = self.root.as_uri()
        self._spare = Spare(self.root)

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        path = self._path(key)
        with self._staged(path, data) as staged:
            os.replace(staged, path)
            _sync_folder(path.parent)

    def put_summed(self, key: str, pieces: Iterable[tuple[Data, int]]) -> None:
        self.put(key, (data for data, _ in pieces))

    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        path = self._path(key)
        if os.path.exists(path):  # spares the writing; unlike Path.exists it never raises
            raise AlreadyExistsError(f"{key} exists in {self.url}")
        with self._staged(path, data) as staged:
            try:
                os.link(staged, path)  # link, not rename: it fails when the name is taken, in one step
            except FileExistsError:
                raise AlreadyExistsError(f"{key} exists in {self.url}") from None
            _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        return self.get_range(key, 0, -1)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with open(self._path(key), "rb") as file:
                file.seek(start)
                return file.read(length)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFoundError(f"{key} is not in {self.url}") from None
        except OSError as error:
            raise TransientError(f"{self.url}: can't read {key}: {error}") from error

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        try:
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return read_direct(file, start, buffer)
            finally:
                os.close(file)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFoundError(f"{key} is not in {self.url}") from None
        except OSError as error:
            raise TransientError(f"{self.url}: can't read {key}: {error}") from error

    def list(self, prefix: str) -> list[ObjectInfo]:
        below, slash, _ = prefix.rpartition("/")
        if slash and not is_key(below):
            return []  # no key begins like that
        found = []
        try:
            for parent, _, names in os.walk(self.root / below, onerror=_raise_unless_gone):
                for name in names:
                    path = Path(parent, name)
                    if name.endswith(STAGED_SUFFIX):
                        _remove_if_abandoned(path)
                        continue
                    key = path.relative_to(self.root).as_posix()
                    if key.startswith(prefix):
                        with contextlib.suppress(FileNotFoundError):  # deleted while we were listing
                            found.append(ObjectInfo(key, path.stat().st_size))
        except OSError as error:
            raise TransientError(f"{self.url}: can't list {prefix!r}: {error}") from error
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            # A folder is no object; unlinking it fails in another way on every system.
            if not path.is_dir() and not self._spare.keep(path):
                path.unlink(missing_ok=True)
        except NotADirectoryError:  # a key below an object
            return
        except OSError as error:
            raise TransientError(f"{self.url}: can't delete {key}: {error}") from error
        with contextlib.suppress(OSError):  # a store has no empty folders
            for parent in path.parents:
                if parent == self.root:
                    break
                parent.rmdir()

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root.joinpath(*key.split("/"))

    @contextlib.contextmanager
    def _staged(self, path: Path, data: Data | Iterable[Data]) -> Iterator[Path]:
        staged = path.with_name(f"{path.name}.{secrets.token_hex(6)}{STAGED_SUFFIX}")
        chunks = iter([data] if isinstance(data, Data) else data)
        first = next(chunks, b"")
        try:
            file = self._spare.take(staged) if memoryview(first).nbytes >= LARGE_BYTES else None
            if file is None:
                file = _open_in_new_folder(staged)
            try:
                os.ftruncate(file, write_chunks(file, itertools.chain([first], chunks)))
                os.fsync(file)
                yield staged  # still locked
            finally:
                os.close(file)
        except OSError as error:
            raise TransientError(f"{self.url}: can't write {path.relative_to(self.root)}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)


def _remove_if_abandoned(staged: Path) -> None:
    with contextlib.suppress(OSError):
        seconds = time.time() - staged.stat().st_mtime
        if seconds > ABANDONED_SECONDS or (seconds > UNLOCKED_SECONDS and not _is_locked(staged)):
            staged.unlink()


def _is_locked(path: Path) -> bool:
    """Raises OSError where the file system has no locks."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _raise_unless_gone(error: OSError) -> None:
    # os.walk alone takes a folder that can't be read for an empty one: a run would not find its checkpoints.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _open_in_new_folder(path: Path) -> int:
    # Another process's delete may remove the folder between our mkdir and our open.
    for _ in range(20):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with contextlib.suppress(OSError):  # as long as its writer lives; where there are locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
    raise FileNotFoundError(f"{path.parent} disappears as fast as it is made")


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
